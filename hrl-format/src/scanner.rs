//! Reading a log from its start, as a stream, sealed or not: each frame is checked, and
//! where they end, so is the seal. What is torn off is said, with the place and the cause.

use std::io::{self, Read};

use sha2::{Digest, Sha256};
use zerocopy::IntoBytes;

use crate::error::{Error, ErrorKind, Result};
use crate::extents::DataOffset;
use crate::frame::{Entry, FrameBuffer, Home, Place, Shape, TableEntry, span_of};
use crate::header::{Features, HeaderPage, LogHeader, RecordOrder};
use crate::key::{VolumeKey, match_key};
use crate::layout::{FRAME_MAGIC, PAGE, RawDirectoryEntry, SECTION_DIRECTORY};
use crate::record::Record;
use crate::seal::{Seal, Trailer};
use crate::section::{RawEntry, payload_of};
use crate::units::{FileOffset, FrameNumber, Sequence, VolumeSize};

/// How a log ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// With a seal that agrees with all that came before it.
    Sealed(Seal),
    /// Without: everything before `at` is whole, and nothing from there on counts.
    Torn {
        /// Where the first part begins that is not whole.
        at: FileOffset,
        /// What is wrong there: [`ErrorKind::NotSealed`] if the file just ends.
        cause: Error,
    },
}

/// Reads a log's frames and records in order.
pub struct Scanner<R> {
    source: R,
    page: HeaderPage,
    home: Home,
    key: Option<VolumeKey>,
    position: FileOffset,
    frames: u32,
    records: u64,
    data: u64,
    volume_size: VolumeSize,
    // What the seal's directory must say: 48 bytes for each frame that was read.
    directory: Vec<RawDirectoryEntry>,
    buffer: FrameBuffer,
    // The next record of the frame in `buffer`, and where its data is.
    next: (usize, DataOffset),
    ending: Option<Ending>,
}

impl<R: Read> Scanner<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// [`ErrorKind::NotALog`], [`ErrorKind::Unsupported`], [`ErrorKind::Damaged`];
    /// [`ErrorKind::KeyWrong`], [`ErrorKind::KeyUnused`]; [`ErrorKind::Io`].
    pub fn new(source: R, key: Option<&VolumeKey>) -> Result<Self> {
        let mut source = source;
        let mut page = Box::new([0; PAGE]);
        let got = read_up_to(&mut source, page.as_mut_slice())?;
        if got < PAGE {
            let at = FileOffset::new(got as u64);
            return Err(Error::new(ErrorKind::NotALog, "too short to be a log").at(at));
        }
        let page = HeaderPage::decode(page)?;
        match_key(page.header.key, key)?;
        Ok(Self {
            source,
            home: Home::of(&page),
            key: key.cloned(),
            position: FileOffset::new(PAGE as u64),
            frames: 0,
            records: 0,
            data: 0,
            volume_size: page.header.volume_size,
            page,
            directory: Vec::new(),
            buffer: FrameBuffer::new(),
            next: (0, DataOffset::default()),
            ending: None,
        })
    }

    /// What the log says of itself.
    pub const fn header(&self) -> &LogHeader {
        &self.page.header
    }

    pub(crate) const fn features(&self) -> Features {
        self.page.features
    }

    pub(crate) fn header_page(&self) -> Box<[u8; PAGE]> {
        self.page.page.clone()
    }

    /// How it ended, once everything was read.
    pub const fn ending(&self) -> Option<&Ending> {
        self.ending.as_ref()
    }

    /// The volume's size after the last frame that was read.
    pub const fn volume_size(&self) -> VolumeSize {
        self.volume_size
    }

    /// The next record with its data; `None` at the end, see [`Self::ending`].
    ///
    /// # Errors
    /// [`ErrorKind::KeyMissing`] if the log is encrypted and no key was given;
    /// [`ErrorKind::Io`]. A part that is not whole is no error, but ends the log.
    pub fn next_record(&mut self) -> Result<Option<Entry<'_>>> {
        if self.home.key.is_some() && self.key.is_none() {
            let what = "encrypted, and no key was given";
            return Err(Error::new(ErrorKind::KeyMissing, what));
        }
        if self.next.0 >= self.buffer.records() && self.next_frame()?.is_none() {
            return Ok(None);
        }
        let (number, at) = self.next;
        let entry = self.buffer.entry(number, at)?;
        if let Some(entry) = &entry {
            let len = match &entry.record {
                Record::Write { data, .. } => data.len(),
                Record::Tag(tag) => size_of::<crate::layout::RawTag>() + tag.label.len(),
                _ => 0,
            };
            self.next = (number + 1, DataOffset::new(at.get() + len as u32));
        }
        Ok(entry)
    }

    /// The next frame, opened if the key is there; `None` at the end. Without the key of an
    /// encrypted log its shapes can still be read.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]. A part that is not whole is no error, but ends the log.
    pub fn next_frame(&mut self) -> Result<Option<&FrameBuffer>> {
        if self.ending.is_some() {
            return Ok(None);
        }
        match self.read_frame() {
            Ok(None) => {
                self.next = (0, DataOffset::default());
                return Ok(Some(&self.buffer));
            }
            Ok(Some(seal)) => self.ending = Some(Ending::Sealed(seal)),
            Err(error) if error.kind() == ErrorKind::Io => return Err(error),
            Err(cause) => {
                self.ending = Some(Ending::Torn {
                    at: self.position,
                    cause,
                })
            }
        }
        self.next = (usize::MAX, DataOffset::default());
        Ok(None)
    }

    /// Reads a frame, or the seal.
    fn read_frame(&mut self) -> Result<Option<Seal>> {
        let position = self.position;
        let at = |error: Error| error.at(position);
        let first = self.buffer.room(PAGE);
        let got = read_up_to(&mut self.source, first)?;
        if got == 0 {
            return Err(at(Error::new(
                ErrorKind::NotSealed,
                "the log ends without a seal",
            )));
        }
        if got < PAGE {
            return Err(at(Error::new(ErrorKind::Cut, "the log ends within a page")));
        }
        if !first.starts_with(&FRAME_MAGIC) {
            let mut page = Box::new([0; PAGE]);
            page.copy_from_slice(first);
            return self.read_seal(page).map(Some);
        }
        let span = span_of(first).map_err(at)?;
        let rest = &mut self.buffer.room(span)[PAGE..];
        if read_up_to(&mut self.source, rest)? < rest.len() {
            return Err(at(Error::new(
                ErrorKind::Cut,
                "the log ends within a frame",
            )));
        }
        let number = FrameNumber::new(self.frames);
        self.buffer.verify(&self.home, Place { number, position })?;
        let volume_size = self
            .check_records()
            .map_err(|error| at(error.in_frame(number)))?;
        if self.key.is_some() || self.home.key.is_none() {
            self.buffer.open(self.key.as_ref())?;
            // A tag's data is sound, too, before the frame counts as whole.
            self.buffer
                .entries()
                .try_for_each(|entry| entry.map(|_| ()))?;
        }
        self.directory.push(self.buffer.directory_entry());
        self.frames = number
            .get()
            .checked_add(1)
            .ok_or_else(|| at(Error::damaged("more frames than a log can have")))?;
        self.volume_size = volume_size;
        self.records += self.buffer.records() as u64;
        self.data += self.buffer.data_len() as u64;
        self.position = FileOffset::new(position.get() + span as u64);
        Ok(None)
    }

    /// What holds between frames: numbers go on, and extents are within the volume. Returns
    /// the volume's size behind the frame.
    fn check_records(&self) -> Result<VolumeSize> {
        let expected = Sequence::new(self.records);
        let numbered_on = !self.home.moved || self.page.header.order == RecordOrder::AsCompleted;
        if numbered_on && self.buffer.first_sequence() != expected {
            return Err(Error::damaged("a frame's records are not numbered on"));
        }
        let mut size = self.volume_size;
        for TableEntry { shape, .. } in self.buffer.table() {
            if shape
                .extent()
                .is_some_and(|extent| extent.end().get() > size.get())
            {
                return Err(Error::damaged("a record reaches past the volume's end"));
            }
            if let Shape::Resize(new) = shape {
                size = new;
            }
        }
        Ok(size)
    }

    /// Reads the seal, whose first page is `page`, to the end of the file.
    fn read_seal(&mut self, page: Box<[u8; PAGE]>) -> Result<Seal> {
        let mut page = page;
        let mut at = self.position;
        let mut digest = Sha256::new();
        digest.update(self.page.page.as_slice());
        let mut listed = self.directory.chunks(RawDirectoryEntry::PER_PAGE).zip(0..);
        loop {
            if Trailer::begins(&page) && page[16..32] == *self.page.header.log.as_bytes() {
                break;
            }
            if let Some((entries, number)) = listed.next() {
                let log = self.page.header.log;
                let found = payload_of(&page, log, SECTION_DIRECTORY, number);
                if found.map_err(|error| error.at(at))? != entries.as_bytes() {
                    let what = "the directory lists other frames than there are";
                    return Err(Error::new(ErrorKind::Foreign, what).at(at));
                }
            }
            digest.update(page.as_slice());
            at = FileOffset::new(at.get() + PAGE as u64);
            if read_up_to(&mut self.source, page.as_mut_slice())? < PAGE {
                return Err(Error::new(ErrorKind::Cut, "the log ends within its seal").at(at));
            }
        }
        let trailer = Trailer::decode(&page, &self.page, at, self.key.as_ref())?;
        let seal = trailer.seal;
        let agrees = trailer.sections_at == self.position
            && seal.frames == self.frames
            && seal.records == self.records
            && seal.data.get() == self.data
            && seal.volume_size == self.volume_size
            && trailer.contents == <[u8; 32]>::from(digest.finalize());
        if !agrees {
            return Err(Error::damaged("the seal does not agree with what it seals").at(at));
        }
        if read_up_to(&mut self.source, &mut [0])? != 0 {
            return Err(Error::damaged("the file goes on behind the seal").at(at));
        }
        Ok(seal)
    }
}

/// Fills `buffer` as far as there is something.
fn read_up_to<R: Read>(source: &mut R, buffer: &mut [u8]) -> Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match source.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(more) => got += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::from_io("read the log", error)),
        }
    }
    Ok(got)
}
