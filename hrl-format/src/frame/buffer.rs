//! Reading a frame: first the head, which says how long it is; then all of it, its
//! checksums and its table; then, with the key, what it holds. The buffers are kept from
//! frame to frame. Data that is stored as it is, is never copied.

use zerocopy::{FromBytes, IntoBytes};

use super::{Home, Shape, codec, table};
use crate::error::{Error, ErrorKind, Result};
use crate::extents::DataOffset;
use crate::id::{KeyId, LogId};
use crate::key::{Cipher, CipherTag, Nonce, VolumeKey};
use crate::layout::{
    CIPHER_TAG, FRAME_AUTHENTICATED, FRAME_ENCRYPTED, FRAME_HEAD_SUMMED, FRAME_LZ4, FRAME_MAGIC,
    MAX_DATA, MAX_RECORDS, MAX_SPAN, REGION, RawDirectoryEntry, RawFrame, RawRecord, pages,
};
use crate::record::Record;
use crate::units::{ByteLen, FileOffset, FrameNumber, Sequence, Timestamp};

/// Where a frame was first written; its cipher's proof holds for no other place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// In which log.
    pub log: LogId,
    /// As which of its frames.
    pub frame: FrameNumber,
}

/// Where a frame was found, or is to be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub number: FrameNumber,
    pub position: FileOffset,
}

/// A record as it stands in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Its number.
    pub sequence: Sequence,
    /// When it completed; a tag's is the point's own time.
    pub time: Timestamp,
    /// The frame that holds it.
    pub frame: FrameNumber,
    /// Where its data is in the frame's plain data.
    pub at: DataOffset,
    /// What changed.
    pub record: Record<&'a [u8]>,
}

/// A record without its data: what can be read without the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// Its number.
    pub sequence: Sequence,
    /// When it completed; a tag's is the point's own time.
    pub time: Timestamp,
    /// Where its data is in the frame's plain data.
    pub at: DataOffset,
    /// What changed.
    pub shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Data {
    // Nothing was read, or what was read did not pass.
    Nothing,
    // Only the head was read, and checked.
    Head,
    // Checked, but encrypted, and not opened.
    Locked,
    // The plain data is where it was read, in `opened`, in `plain`.
    Raw,
    Opened,
    Plain,
}

/// Holds one frame at a time, and what was needed to open it.
pub struct FrameBuffer {
    // All three only grow, so that nothing is zeroed twice; `head` says what counts.
    raw: Vec<u8>,
    opened: Vec<u8>,
    plain: Vec<u8>,
    head: Head,
    data: Data,
    // The last key derived: frames of one origin come in a row.
    cipher: Option<(KeyId, LogId, Cipher)>,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    place: Place,
    origin: Origin,
    first_sequence: Sequence,
    span: usize,
    table_end: usize,
    stored_end: usize,
    plain: usize,
    flags: u32,
}

impl Default for Head {
    fn default() -> Self {
        let origin = Origin {
            log: LogId::NIL,
            frame: FrameNumber::ZERO,
        };
        let place = Place {
            number: FrameNumber::ZERO,
            position: FileOffset::ZERO,
        };
        let first_sequence = Sequence::ZERO;
        let (span, table_end) = (0, size_of::<RawFrame>());
        Self {
            place,
            origin,
            first_sequence,
            span,
            table_end,
            stored_end: table_end,
            plain: 0,
            flags: 0,
        }
    }
}

/// How many bytes of the file the frame that begins with `page` takes.
pub(crate) fn span_of(page: &[u8]) -> Result<usize> {
    let (raw, _) = RawFrame::ref_from_prefix(page)
        .map_err(|_| Error::new(ErrorKind::Cut, "the file ends within a frame's header"))?;
    if raw.magic != FRAME_MAGIC {
        return Err(Error::damaged("no frame where one should begin"));
    }
    let (records, stored) = (raw.records.get() as usize, raw.stored.get() as usize);
    if records == 0 || records > MAX_RECORDS || stored > MAX_DATA + CIPHER_TAG {
        return Err(Error::damaged("a frame's lengths are past the limits"));
    }
    Ok(pages(
        size_of::<RawFrame>() + records * size_of::<RawRecord>() + stored,
    ))
}

impl Default for FrameBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl FrameBuffer {
    /// An empty one; it grows to the largest frame it sees.
    pub fn new() -> Self {
        let (raw, opened, plain) = (Vec::new(), Vec::new(), Vec::new());
        Self {
            raw,
            opened,
            plain,
            head: Head::default(),
            data: Data::Nothing,
            cipher: None,
        }
    }

    /// Room for a frame of `span` bytes, to be filled, then passed to [`Self::verify`].
    pub(crate) fn room(&mut self, span: usize) -> &mut [u8] {
        self.data = Data::Nothing;
        let span = span.min(MAX_SPAN);
        if self.raw.len() < span {
            self.raw.resize(span, 0);
        }
        &mut self.raw[..span]
    }

    /// Checks the frame that was read into [`Self::room`]: all that can be without a key.
    pub(crate) fn verify(&mut self, home: &Home, place: Place) -> Result<()> {
        self.data = Data::Nothing;
        self.head = self
            .verify_head(home, place)
            .and_then(|head| self.verify_data(&head).map(|()| head))
            .map_err(|error| error.in_frame(place.number).at(place.position))?;
        let locked = self.head.flags & FRAME_ENCRYPTED != 0;
        let packed = self.head.flags & FRAME_LZ4 != 0;
        self.data = if locked || packed {
            Data::Locked
        } else {
            Data::Raw
        };
        Ok(())
    }

    /// As [`Self::verify`], of the head alone; nothing behind the table need be there.
    pub(crate) fn verify_table(&mut self, home: &Home, place: Place) -> Result<()> {
        self.data = Data::Nothing;
        self.head = self
            .verify_head(home, place)
            .map_err(|error| error.in_frame(place.number).at(place.position))?;
        self.data = Data::Head;
        Ok(())
    }

    fn verify_head(&self, home: &Home, place: Place) -> Result<Head> {
        let span = span_of(&self.raw)?;
        let (raw, _) = RawFrame::ref_from_prefix(&self.raw).map_err(|_| short())?;
        let table_end = size_of::<RawFrame>() + raw.records.get() as usize * size_of::<RawRecord>();
        let summed = self
            .raw
            .get(FRAME_HEAD_SUMMED..table_end)
            .ok_or_else(short)?;
        if crc32fast::hash(summed) != raw.head_crc.get() {
            return Err(Error::damaged(
                "the checksum of a frame's head does not agree",
            ));
        }
        check_place(raw, home, place)?;
        let flags = raw.flags.get();
        let encrypted = flags & FRAME_ENCRYPTED != 0;
        let stored = raw.stored.get() as usize;
        let inner = if encrypted {
            stored.checked_sub(CIPHER_TAG)
        } else {
            Some(stored)
        };
        let plain = raw.plain.get() as usize;
        let packed = flags & FRAME_LZ4 != 0;
        let sound = flags & !(FRAME_LZ4 | FRAME_ENCRYPTED) == 0
            && encrypted == home.key.is_some()
            && (!packed || home.lz4)
            && inner.is_some_and(|inner| {
                if packed {
                    inner < plain
                } else {
                    inner == plain
                }
            })
            && (encrypted || raw.nonce == [0; 12])
            && raw.reserved == [0; 16];
        if !sound {
            return Err(Error::damaged(
                "a field of a frame's header is not what it may be",
            ));
        }
        let region = encrypted.then_some(ByteLen::new(REGION as u64));
        table::check(records_of(&self.raw, table_end), plain, region)?;
        Ok(Head {
            place,
            origin: Origin {
                log: LogId::from_bytes(raw.origin_log),
                frame: FrameNumber::new(raw.origin_number.get()),
            },
            first_sequence: Sequence::new(raw.first_sequence.get()),
            span,
            table_end,
            stored_end: table_end + stored,
            plain,
            flags,
        })
    }

    fn verify_data(&self, head: &Head) -> Result<()> {
        let data = self.raw.get(head.table_end..head.span).ok_or_else(short)?;
        if crc32fast::hash(data) != self.raw_head().data_crc.get() {
            return Err(Error::damaged(
                "the checksum of a frame's data does not agree",
            ));
        }
        if self.raw[head.stored_end..head.span]
            .iter()
            .any(|&byte| byte != 0)
        {
            return Err(Error::damaged("a frame's padding is not zero"));
        }
        Ok(())
    }

    /// Where in the file the plain data of the checked frame lies, if it lies there as it is:
    /// neither compressed nor encrypted.
    pub fn plain_at(&self) -> Option<FileOffset> {
        let at = self.head.place.position.get() + self.head.table_end as u64;
        (self.data == Data::Raw).then(|| FileOffset::new(at))
    }

    /// Decrypts and decompresses, where that is needed.
    ///
    /// # Errors
    /// [`ErrorKind::KeyMissing`], [`ErrorKind::Forged`], [`ErrorKind::Damaged`].
    pub(crate) fn open(&mut self, key: Option<&VolumeKey>) -> Result<()> {
        if self.data == Data::Locked {
            self.data = self.opened(key).map_err(|error| {
                error
                    .in_frame(self.head.place.number)
                    .at(self.head.place.position)
            })?;
        }
        Ok(())
    }

    fn opened(&mut self, key: Option<&VolumeKey>) -> Result<Data> {
        let head = self.head;
        let encrypted = head.flags & FRAME_ENCRYPTED != 0;
        if encrypted {
            self.decrypt(key.ok_or_else(key_missing)?)?;
            if head.flags & FRAME_LZ4 == 0 {
                return Ok(Data::Opened);
            }
        }
        if self.plain.len() < head.plain {
            self.plain.resize(head.plain, 0);
        }
        let stored = if encrypted {
            &self.opened[..head.stored_end - head.table_end - CIPHER_TAG]
        } else {
            &self.raw[head.table_end..head.stored_end]
        };
        codec::decompress(stored, &mut self.plain[..head.plain])?;
        Ok(Data::Plain)
    }

    fn decrypt(&mut self, key: &VolumeKey) -> Result<()> {
        let head = self.head;
        let name = key.key_id();
        if !matches!(&self.cipher, Some((held, log, _)) if *held == name && *log == head.origin.log)
        {
            let cipher = key.frame_cipher(head.origin.log);
            self.cipher = Some((name, head.origin.log, cipher));
        }
        let Some((_, _, cipher)) = &self.cipher else {
            return Err(key_missing());
        };
        let (stored, proof) = self.raw[head.table_end..head.stored_end]
            .split_last_chunk::<CIPHER_TAG>()
            .ok_or_else(short)?;
        if self.opened.len() < stored.len() {
            self.opened.resize(stored.len(), 0);
        }
        let nonce: Nonce = self.raw_head().nonce;
        let aad = &self.raw[FRAME_AUTHENTICATED..head.table_end];
        cipher.open(
            &nonce,
            aad,
            (stored, &mut self.opened[..stored.len()]),
            proof,
        )
    }

    fn raw_head(&self) -> RawFrame {
        RawFrame::read_from_prefix(&self.raw)
            .map_or_else(|_| zerocopy::FromZeros::new_zeroed(), |(raw, _)| raw)
    }

    fn raw_table(&self) -> &[RawRecord] {
        match self.data {
            Data::Nothing => &[],
            _ => records_of(&self.raw, self.head.table_end),
        }
    }

    /// Which frame of its log it is.
    pub fn number(&self) -> FrameNumber {
        self.head.place.number
    }

    /// Whether it holds that frame, opened.
    pub(crate) fn holds(&self, log: LogId, frame: FrameNumber) -> bool {
        !matches!(self.data, Data::Nothing | Data::Head | Data::Locked)
            && self.number() == frame
            && self.raw_head().log == *log.as_bytes()
    }

    /// Where it lies in the file.
    pub fn position(&self) -> FileOffset {
        self.head.place.position
    }

    /// Where it was first written.
    pub fn origin(&self) -> Origin {
        self.head.origin
    }

    /// How many bytes of the file it takes.
    pub fn span(&self) -> usize {
        self.head.span
    }

    /// How many bytes of data its records have.
    pub fn data_len(&self) -> usize {
        self.head.plain
    }

    /// The first record's number.
    pub(crate) fn first_sequence(&self) -> Sequence {
        self.head.first_sequence
    }

    /// All the data of its records, one after the other.
    ///
    /// # Errors
    /// [`ErrorKind::KeyMissing`] if it is encrypted and was read without the key.
    pub fn data(&self) -> Result<&[u8]> {
        let (bytes, from) = match self.data {
            Data::Nothing | Data::Head => return Err(Error::invalid("no data was read")),
            Data::Locked => return Err(key_missing().in_frame(self.number())),
            Data::Raw => (&self.raw, self.head.table_end),
            Data::Opened => (&self.opened, 0),
            Data::Plain => (&self.plain, 0),
        };
        bytes.get(from..from + self.head.plain).ok_or_else(short)
    }

    /// `len` bytes of the data, from `at` on: what an index entry of this frame points to.
    ///
    /// # Errors
    /// As [`Self::data`]; [`ErrorKind::Damaged`] if the data is shorter.
    pub fn slice(&self, at: DataOffset, len: ByteLen) -> Result<&[u8]> {
        let start = at.get() as usize;
        usize::try_from(len.get())
            .ok()
            .and_then(|len| start.checked_add(len))
            .map_or(Ok(None), |end| self.data().map(|data| data.get(start..end)))?
            .ok_or_else(|| {
                Error::damaged("the index points past a frame's data").in_frame(self.number())
            })
    }

    /// What the table says of each record, in order; that needs no key.
    pub fn table(&self) -> impl Iterator<Item = TableEntry> + '_ {
        let mut next = 0;
        let first = self.head.first_sequence.get();
        self.raw_table()
            .iter()
            .enumerate()
            .filter_map(move |(n, raw)| {
                let at = DataOffset::new(next);
                next = next.wrapping_add(raw.data.get());
                Some(TableEntry {
                    sequence: Sequence::new(first.wrapping_add(n as u64)),
                    time: Timestamp::from_nanos(raw.time.get()),
                    at,
                    // The table was checked when the frame was read.
                    shape: table::shape(raw).ok()?,
                })
            })
    }

    /// How many records it has.
    pub fn records(&self) -> usize {
        self.raw_table().len()
    }

    /// Record `n` with its data that begins at `at`.
    pub(crate) fn entry(&self, n: usize, at: DataOffset) -> Result<Option<Entry<'_>>> {
        let Some(raw) = self.raw_table().get(n) else {
            return Ok(None);
        };
        let len = ByteLen::new(u64::from(raw.data.get()));
        let record = table::decode(raw, self.slice(at, len)?)
            .map_err(|error| error.in_frame(self.number()).at(self.position()))?;
        Ok(Some(Entry {
            sequence: Sequence::new(self.head.first_sequence.get().wrapping_add(n as u64)),
            time: Timestamp::from_nanos(raw.time.get()),
            frame: self.number(),
            at,
            record,
        }))
    }

    /// Record `n` of the frame, with its data; `None` past the last.
    ///
    /// # Errors
    /// As [`Self::data`]; [`ErrorKind::Damaged`] if it is a tag whose data is none.
    pub fn record(&self, n: usize) -> Result<Option<Entry<'_>>> {
        let before = self.raw_table().get(..n).unwrap_or(&[]);
        let at = before
            .iter()
            .fold(0u32, |at, raw| at.wrapping_add(raw.data.get()));
        self.entry(n, DataOffset::new(at))
    }

    /// The records with their data, in order.
    pub fn entries(&self) -> impl Iterator<Item = Result<Entry<'_>>> + '_ {
        let mut at = 0;
        self.raw_table()
            .iter()
            .enumerate()
            .map_while(move |(n, raw)| {
                let start = DataOffset::new(at);
                at = at.wrapping_add(raw.data.get());
                self.entry(n, start).transpose()
            })
    }

    /// Whether its head is the one that a directory lists.
    pub(crate) fn is_listed_as(&self, entry: &RawDirectoryEntry) -> bool {
        let raw = self.raw_head();
        (raw.position, raw.first_sequence, raw.records, raw.head_crc)
            == (
                entry.position,
                entry.first_sequence,
                entry.records,
                entry.head_crc,
            )
    }

    /// Its entry in a frame directory.
    pub(crate) fn directory_entry(&self) -> RawDirectoryEntry {
        self.entry_with(&self.raw_head())
    }

    /// Its entry in a frame directory, were its header `raw`.
    fn entry_with(&self, raw: &RawFrame) -> RawDirectoryEntry {
        RawDirectoryEntry {
            position: raw.position,
            first_sequence: raw.first_sequence,
            span: (self.head.span as u32).into(),
            records: raw.records,
            head_crc: raw.head_crc,
            data_crc: raw.data_crc,
            cipher_tag: self.cipher_tag(),
        }
    }

    fn cipher_tag(&self) -> CipherTag {
        let encrypted = self.head.flags & FRAME_ENCRYPTED != 0;
        let stored = &self.raw[self.head.table_end..self.head.stored_end];
        stored
            .last_chunk()
            .filter(|_| encrypted)
            .copied()
            .unwrap_or_default()
    }

    /// The frame as it is to lie at `place` in `log`: its new header, all behind that, and
    /// its entry in the directory. What the cipher vouches for stays as it is.
    pub(crate) fn moved(&self, log: LogId, place: Place) -> (RawFrame, &[u8], RawDirectoryEntry) {
        let mut raw = self.raw_head();
        raw.log = *log.as_bytes();
        raw.number.set(place.number.get());
        raw.position.set(place.position.get());
        let (table, rest) = (
            &self.raw[size_of::<RawFrame>()..self.head.table_end],
            self.head.span,
        );
        let mut sum = crc32fast::Hasher::new();
        sum.update(&raw.as_bytes()[FRAME_HEAD_SUMMED..]);
        sum.update(table);
        raw.head_crc.set(sum.finalize());
        let entry = self.entry_with(&raw);
        (raw, &self.raw[size_of::<RawFrame>()..rest], entry)
    }
}

fn check_place(raw: &RawFrame, home: &Home, place: Place) -> Result<()> {
    let foreign = |what: String| Err(Error::new(ErrorKind::Foreign, what));
    if raw.log != *home.log.as_bytes() {
        return foreign(format!("a frame of log {}", LogId::from_bytes(raw.log)));
    }
    if raw.number.get() != place.number.get() || raw.position.get() != place.position.get() {
        return foreign(format!(
            "frame {}, which belongs to byte {}",
            raw.number, raw.position
        ));
    }
    let own = raw.origin_log == raw.log
        && raw.origin_number == raw.number
        && raw.origin_header == home.digest;
    let moved = home.moved && raw.origin_log != raw.log;
    if !own && !moved {
        return foreign(format!(
            "a frame from log {}",
            LogId::from_bytes(raw.origin_log)
        ));
    }
    Ok(())
}

fn records_of(raw: &[u8], table_end: usize) -> &[RawRecord] {
    raw.get(size_of::<RawFrame>()..table_end)
        .and_then(|table| <[RawRecord]>::ref_from_bytes(table).ok())
        .unwrap_or(&[])
}

fn short() -> Error {
    Error::new(ErrorKind::Cut, "a frame is shorter than its header says")
}

fn key_missing() -> Error {
    Error::new(ErrorKind::KeyMissing, "encrypted, and no key was given")
}
