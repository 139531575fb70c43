//! Writing a log: records in, frames out, the seal at the end. Needs nothing but `Write`,
//! and never goes back over a byte, so a log can be a pipe or an object in the making.

use std::io::{IoSlice, Write};

use crate::error::{Error, ErrorKind, Result};
use crate::frame::{FrameBuilder, Home, Place, Shape};
use crate::header::{Features, HeaderPage, LogHeader, RecordOrder};
use crate::key::{VolumeKey, match_key};
use crate::layout::{PAGE, RawDirectoryEntry};
use crate::record::{Record, Tag};
use crate::seal::{self, Seal, Sections, Totals};
use crate::state::{LogState, Standing};
use crate::units::{Extent, FileOffset, FrameNumber, Sequence, Timestamp};

/// Writes at least this long go to the file from where they are, in a frame of their own,
/// if nothing else waits for one.
const OUTSIDE: usize = 256 << 10;

/// Whether frames are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// No.
    #[default]
    None,
    /// With LZ4, each frame where it saves an eighth at least.
    Lz4,
}

/// How a log is written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Whether frames are compressed.
    pub compression: Compression,
}

/// Writes one log. Dropped without [`Self::seal`], it leaves a torn log behind.
pub struct LogWriter<W> {
    out: W,
    page: HeaderPage,
    key: Option<VolumeKey>,
    builder: FrameBuilder,
    position: FileOffset,
    next: Sequence,
    // The number of the first record in `builder`.
    first: Sequence,
    // What the last change bears, in a log in order.
    completed: Timestamp,
    last_time: Option<Timestamp>,
    data: u64,
    directory: Vec<RawDirectoryEntry>,
    state: LogState,
    health: Health,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Health {
    Sound,
    // A write failed: what is in the file from there on is not known.
    Broken,
}

impl<W: Write> LogWriter<W> {
    /// Begins a log: writes its header. With a key the log is encrypted, and
    /// `header.key` is filled in.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the header is none; [`ErrorKind::KeyWrong`],
    /// [`ErrorKind::KeyMissing`] if it names a key and another or none is given;
    /// [`ErrorKind::Io`].
    pub fn create(
        mut out: W,
        header: LogHeader,
        options: &LogOptions,
        key: Option<&VolumeKey>,
    ) -> Result<Self> {
        let mut header = header;
        match (header.key, key) {
            (Some(_), None) => {
                let what = "the header names a key, and none was given";
                return Err(Error::new(ErrorKind::KeyMissing, what));
            }
            (Some(_), Some(_)) => match_key(header.key, key)?,
            (None, key) => header.key = key.map(VolumeKey::key_id),
        }
        let lz4 = options.compression == Compression::Lz4;
        let page = header.encode(Features { lz4, moved: false })?;
        out.write_all(page.page.as_slice())
            .map_err(|error| Error::from_io("write the header", error))?;
        let cipher = key.map(|key| key.frame_cipher(header.log));
        Ok(Self {
            out,
            builder: FrameBuilder::new(Home::of(&page), cipher),
            page,
            key: key.cloned(),
            position: FileOffset::new(PAGE as u64),
            next: Sequence::ZERO,
            first: Sequence::ZERO,
            completed: Timestamp::from_nanos(i64::MIN),
            last_time: None,
            data: 0,
            directory: Vec::new(),
            state: LogState::new(header.volume_size),
            health: Health::Sound,
        })
    }

    /// The header as it was written.
    pub fn header(&self) -> &LogHeader {
        &self.page.header
    }

    /// How many bytes the file has now, what still waits for a frame not counted.
    pub fn bytes_written(&self) -> u64 {
        self.position.get()
    }

    /// How many entries the index has now; each takes some 40 bytes of memory here, and
    /// 32 bytes in the sealed file.
    pub fn index_len(&self) -> usize {
        self.state.extents.len()
    }

    /// How many records were appended.
    pub fn records(&self) -> u64 {
        self.next.get()
    }

    /// The time that the last record bears; `None` before the first.
    pub const fn last_time(&self) -> Option<Timestamp> {
        self.last_time
    }

    /// Appends a record, and returns its number. A write that does not fit into one frame,
    /// or not into one region of 64 KiB if the log is encrypted, becomes several records;
    /// the number is then the first one's. A tag's time is the tag's own, whatever `time`. In
    /// a log in order no change bears an earlier time than the one before it: after a clock
    /// was set back, that one's is repeated.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the extent is empty or not within the volume, the data not
    /// as long as it, or a label too long; then nothing was appended. [`ErrorKind::Io`] if
    /// the file could not be written, and [`ErrorKind::Broken`] ever after.
    pub fn append(&mut self, record: &Record<&[u8]>, time: Timestamp) -> Result<Sequence> {
        self.sound()?;
        self.check(record)?;
        let sequence = self.next;
        let time = self.time_of(record, time);
        match record {
            Record::Write { extent, data } => self.append_write(*extent, data, time)?,
            Record::Tag(tag) => {
                self.append_whole(
                    record,
                    size_of::<crate::layout::RawTag>() + tag.label.len(),
                    time,
                )?;
            }
            _ => self.append_whole(record, 0, time)?,
        }
        Ok(sequence)
    }

    /// What a record bears that completed at `time`.
    fn time_of(&mut self, record: &Record<&[u8]>, time: Timestamp) -> Timestamp {
        match record {
            Record::Tag(tag) => tag.time,
            _ if self.page.header.order == RecordOrder::AsRead => time,
            _ => {
                self.completed = self.completed.max(time);
                self.completed
            }
        }
    }

    /// Ends the frame that records are gathered in, so that all of them are in the file.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn flush(&mut self) -> Result<()> {
        self.sound()?;
        self.end_frame(None)?;
        self.out.flush().map_err(|error| self.broken(error))
    }

    /// What it writes to.
    pub const fn get_ref(&self) -> &W {
        &self.out
    }

    /// Ends the log: the index and all else that a sealed log has, and the trailer.
    /// Durability is the caller's: the file is not synced.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn seal(self) -> Result<(W, Seal)> {
        self.seal_at(Timestamp::now())
    }

    /// As [`Self::seal`], saying that it was sealed at `sealed`: so the same records always
    /// make the same file, unless it is encrypted.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn seal_at(mut self, sealed: Timestamp) -> Result<(W, Seal)> {
        self.flush()?;
        let totals = Totals {
            frames: self.directory.len() as u64,
            records: self.next.get(),
            data: self.data,
            volume_size: self.state.volume_size,
            sealed,
        };
        let sections = Sections {
            directory: self.directory.iter().copied().map(Ok),
            index: self.state.extents.iter().map(Ok),
            marks: self.state.marks.iter().copied().map(Ok),
            provenance: std::iter::empty(),
        };
        seal::write(
            self.out,
            self.position,
            &self.page,
            totals,
            self.key.as_ref(),
            sections,
        )
    }

    /// Gives the file up unsealed, what still waited for a frame dropped.
    pub fn abandon(self) -> W {
        self.out
    }

    fn sound(&self) -> Result<()> {
        match self.health {
            Health::Sound => Ok(()),
            Health::Broken => Err(Error::new(
                ErrorKind::Broken,
                "an earlier write to the log failed",
            )),
        }
    }

    fn check(&self, record: &Record<&[u8]>) -> Result<()> {
        let fits = |extent: &Extent| {
            !extent.is_empty() && extent.end().get() <= self.state.volume_size.get()
        };
        match record {
            Record::Write { extent, data } if data.len() as u64 != extent.len().get() => Err(
                Error::invalid(format!("{} bytes of data for {extent}", data.len())),
            ),
            Record::Write { extent, .. }
            | Record::Zeroes { extent }
            | Record::Discard { extent }
                if !fits(extent) =>
            {
                let size = self.state.volume_size;
                Err(Error::invalid(format!(
                    "{extent} is empty or not within {size} bytes"
                )))
            }
            Record::Tag(tag) if tag.label.len() > Tag::LABEL_MAX => {
                Err(Error::invalid("a label is longer than 1024 bytes"))
            }
            _ => Ok(()),
        }
    }

    fn append_write(&mut self, extent: Extent, data: &[u8], time: Timestamp) -> Result<()> {
        let (mut extent, mut data) = (extent, data);
        while !data.is_empty() {
            let (piece, rest) = data.split_at(self.builder.longest(extent));
            let len = crate::units::ByteLen::new(piece.len() as u64);
            let end = extent.offset().checked_add(len).unwrap_or(extent.end());
            let here = Extent::between(extent.offset(), end);
            let record = Record::Write {
                extent: here,
                data: piece,
            };
            if !self.builder.takes(&record, piece.len()) {
                self.end_frame(None)?;
            }
            if piece.len() >= OUTSIDE && self.builder.takes_outside_data() {
                self.note(&record, time);
                self.builder.push_outside(here, piece.len(), time);
                self.end_frame(Some(piece))?;
            } else {
                self.note(&record, time);
                self.builder.push(&record, time)?;
            }
            (extent, data) = (Extent::between(end, extent.end()), rest);
        }
        Ok(())
    }

    fn append_whole(&mut self, record: &Record<&[u8]>, data: usize, time: Timestamp) -> Result<()> {
        if !self.builder.takes(record, data) {
            self.end_frame(None)?;
        }
        self.note(record, time);
        self.builder.push(record, time)
    }

    /// Takes a record that is about to join the frame into the index and the totals.
    fn note(&mut self, record: &Record<&[u8]>, time: Timestamp) {
        let shape = match record {
            Record::Write { extent, .. } => Shape::Write(*extent),
            Record::Zeroes { extent } => Shape::Zeroes(*extent),
            Record::Discard { extent } => Shape::Discard(*extent),
            Record::Tag(tag) => Shape::Tag {
                id: tag.id,
                consistency: tag.consistency,
            },
            Record::Resize { size } => Shape::Resize(*size),
        };
        self.last_time = Some(time);
        let standing = Standing {
            frame: FrameNumber::new(self.directory.len() as u32),
            record: self.builder.records() as u32,
            sequence: self.next,
            time,
            at: self.builder.at(),
        };
        self.state.apply(shape, standing);
        self.next = Sequence::new(self.next.get() + 1);
    }

    fn end_frame(&mut self, outside: Option<&[u8]>) -> Result<()> {
        if self.builder.records() == 0 {
            return Ok(());
        }
        // Whatever goes wrong from here on leaves half a frame, or a gap in the numbers.
        self.health = Health::Broken;
        let number = u32::try_from(self.directory.len())
            .map_err(|_| Error::invalid("more frames than a log can have"))?;
        let place = Place {
            number: FrameNumber::new(number),
            position: self.position,
        };
        let plain = outside.map_or(self.builder.at().get() as usize, <[u8]>::len);
        let frame = self.builder.finish(place, self.first, outside)?;
        let mut parts = frame.parts.map(IoSlice::new);
        write_all_vectored(&mut self.out, &mut parts)
            .map_err(|error| Error::from_io("write a frame", error).at(place.position))?;
        self.position = FileOffset::new(self.position.get() + frame.span as u64);
        self.directory.push(frame.entry);
        self.data += plain as u64;
        self.builder.clear();
        self.first = self.next;
        self.health = Health::Sound;
        Ok(())
    }

    fn broken(&mut self, error: std::io::Error) -> Error {
        self.health = Health::Broken;
        Error::from_io("write the log", error)
    }
}

pub(crate) fn write_all_vectored<W: Write>(
    out: &mut W,
    mut parts: &mut [IoSlice<'_>],
) -> std::io::Result<()> {
    IoSlice::advance_slices(&mut parts, 0);
    while !parts.is_empty() {
        match out.write_vectored(parts) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut parts, written),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
