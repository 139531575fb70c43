//! Reading a sealed log at any place: its header and trailer at once, everything else
//! when it is asked for, each page and frame checked as it comes.

use std::io;

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::extents::IndexEntry;
use crate::frame::{FrameBuffer, Home, MarkDetail, Place};
use crate::header::{HeaderPage, LogHeader};
use crate::key::{VolumeKey, match_key};
use crate::layout::{
    MAX_DATA, MAX_RECORDS, MAX_SPAN, PAGE, RawDirectoryEntry, RawFrame, RawIndexEntry, RawRecord,
};
use crate::record::{Record, Tag};
use crate::seal::{self, Mark, Seal, Trailer};
use crate::section::SectionStream;
use crate::source::ReadAt;
use crate::units::{ByteOffset, Extent, FileOffset, FrameNumber, VolumeSize};

/// A sealed log, open for reading.
pub struct Log<R> {
    pub(crate) source: R,
    pub(crate) page: HeaderPage,
    pub(crate) trailer: Trailer,
    pub(crate) key: Option<VolumeKey>,
    home: Home,
}

impl<R: ReadAt> Log<R> {
    /// Opens a log by reading its header and its trailer. Without the key of an encrypted
    /// log, all can be read but the data. With the key, the trailer is proved; that the
    /// sections are those it was written with is what [`Self::check_seal`] proves.
    ///
    /// # Errors
    /// [`ErrorKind::NotSealed`] if there is no trailer; [`ErrorKind::NotALog`],
    /// [`ErrorKind::Unsupported`], [`ErrorKind::Damaged`], [`ErrorKind::Foreign`],
    /// [`ErrorKind::Forged`]; [`ErrorKind::KeyWrong`], [`ErrorKind::KeyUnused`];
    /// [`ErrorKind::Io`].
    pub fn open(source: R, key: Option<&VolumeKey>) -> Result<Self> {
        let size = source
            .size()
            .map_err(|error| Error::from_io("find the log's size", error))?;
        let page = read_header(&source, size)?;
        match_key(page.header.key, key)?;
        let last = size.saturating_sub(PAGE as u64);
        let mut trailer = [0; PAGE];
        if last < PAGE as u64 {
            let what = "the log ends behind its header";
            return Err(Error::new(ErrorKind::NotSealed, what).at(FileOffset::new(size)));
        }
        let at = FileOffset::new(last);
        source
            .read_exact_at(&mut trailer, at)
            .map_err(|error| Error::from_io("read the trailer", error).at(at))?;
        let trailer = Trailer::decode(&trailer, &page, at, key)?;
        let home = Home::of(&page);
        Ok(Self {
            source,
            page,
            trailer,
            key: key.cloned(),
            home,
        })
    }

    /// What the log says of itself.
    pub const fn header(&self) -> &LogHeader {
        &self.page.header
    }

    /// What its seal says.
    pub const fn seal(&self) -> &Seal {
        &self.trailer.seal
    }

    /// Whether `next` follows this log, as [`LogHeader::check_followed_by`] says, and begins
    /// with the size that the volume has at this one's end.
    ///
    /// # Errors
    /// [`ErrorKind::Chain`], saying what does not follow.
    pub fn check_followed_by(&self, next: &LogHeader) -> Result<()> {
        let seal = self.seal();
        self.header().check_followed_by(seal.digest, next)?;
        if next.volume_size != seal.volume_size {
            let (theirs, ours) = (next.volume_size, seal.volume_size);
            let broken = format!("a volume of {theirs} bytes follows one of {ours}");
            return Err(Error::new(ErrorKind::Chain, broken));
        }
        Ok(())
    }

    /// Where its frames end, and the lists of the seal begin.
    pub const fn frames_end(&self) -> FileOffset {
        self.trailer.sections_at
    }

    /// What it was opened on.
    pub const fn source(&self) -> &R {
        &self.source
    }

    /// Gives back what it was opened on.
    pub fn into_source(self) -> R {
        self.source
    }

    /// The final state of every extent, by ascending offset.
    pub fn index(&self) -> IndexStream<&R> {
        self.index_stream(&self.source, 0, VolumeSize::new(u64::MAX).extent())
    }

    /// The part of the index that touches `extent`, cut to it. Found by bisection.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Damaged`].
    pub fn index_in(&self, extent: Extent) -> Result<IndexStream<&R>> {
        let first = self.first_in(extent)?;
        Ok(self.index_stream(&self.source, first, extent))
    }

    /// The same, for whoever lets go of the log before the stream has ended.
    ///
    /// # Errors
    /// As [`Self::index_in`].
    pub fn own_index_in(&self, extent: Extent) -> Result<IndexStream<R>>
    where
        R: Clone,
    {
        let first = self.first_in(extent)?;
        Ok(self.index_stream(self.source.clone(), first, extent))
    }

    /// The number of an index entry, before all that touch `extent` and near the first.
    fn first_in(&self, extent: Extent) -> Result<u64> {
        let section = &self.trailer.index;
        // The last page that begins at or before `extent` may hold what reaches into it.
        let (mut low, mut high) = (0, section.pages);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let page = section.page(&self.source, middle)?;
            let begins = page.first().map_or(u64::MAX, |entry| entry.offset.get());
            if begins <= extent.offset().get() {
                low = middle;
            } else {
                high = middle;
            }
        }
        let per_page = <RawIndexEntry as crate::section::RawEntry>::PER_PAGE as u64;
        Ok(low * per_page)
    }

    fn index_stream<S: ReadAt>(&self, source: S, first: u64, within: Extent) -> IndexStream<S> {
        IndexStream {
            entries: self.trailer.index.stream(source, first),
            within,
            frames: self.trailer.seal.frames,
            volume_size: self.trailer.seal.volume_size,
            last: None,
        }
    }

    /// Reads a frame into `buffer`, checks it, and opens it with the key.
    ///
    /// # Errors
    /// [`ErrorKind::KeyMissing`], [`ErrorKind::Forged`], [`ErrorKind::Foreign`],
    /// [`ErrorKind::Damaged`], [`ErrorKind::Io`]; [`ErrorKind::Invalid`] if there is no
    /// such frame.
    pub fn read_frame(&self, frame: FrameNumber, buffer: &mut FrameBuffer) -> Result<()> {
        self.load_frame(frame, buffer)?;
        buffer.open(self.key.as_ref())
    }

    /// Reads and checks a frame, but leaves its data as it is stored: enough for
    /// [`FrameBuffer::table`], with or without the key.
    ///
    /// # Errors
    /// As [`Self::read_frame`], the key's aside.
    pub fn load_frame(&self, frame: FrameNumber, buffer: &mut FrameBuffer) -> Result<()> {
        let entry = self
            .trailer
            .directory
            .entry(&self.source, u64::from(frame.get()))?
            .ok_or_else(|| Error::invalid("no such frame in this log").in_frame(frame))?;
        self.load_listed(frame, &entry, buffer)
    }

    /// Reads and checks the head and the table of frame `frame`, which the directory lists as `entry`.
    pub(crate) fn load_table(
        &self,
        frame: FrameNumber,
        entry: &RawDirectoryEntry,
        buffer: &mut FrameBuffer,
    ) -> Result<()> {
        let position = FileOffset::new(entry.position.get());
        let records = (entry.records.get() as usize).min(MAX_RECORDS);
        let len = size_of::<RawFrame>() + records * size_of::<RawRecord>();
        self.source
            .read_exact_at(buffer.room(len), position)
            .map_err(|error| {
                Error::from_io("read a frame", error)
                    .in_frame(frame)
                    .at(position)
            })?;
        buffer.verify_table(
            &self.home,
            Place {
                number: frame,
                position,
            },
        )?;
        if !buffer.is_listed_as(entry) {
            let what = "a frame is not the one that the directory lists";
            return Err(Error::new(ErrorKind::Foreign, what)
                .in_frame(frame)
                .at(position));
        }
        Ok(())
    }

    pub(crate) fn load_listed(
        &self,
        frame: FrameNumber,
        entry: &RawDirectoryEntry,
        buffer: &mut FrameBuffer,
    ) -> Result<()> {
        let position = FileOffset::new(entry.position.get());
        let span = entry.span.get() as usize;
        let end = position.get().checked_add(span as u64);
        let sound = span.is_multiple_of(PAGE)
            && (PAGE..=MAX_SPAN).contains(&span)
            && position.get() >= PAGE as u64
            && end.is_some_and(|end| end <= self.trailer.sections_at.get());
        if !sound {
            return Err(Error::damaged("the directory is not what it may be").in_frame(frame));
        }
        self.source
            .read_exact_at(buffer.room(span), position)
            .map_err(|error| {
                Error::from_io("read a frame", error)
                    .in_frame(frame)
                    .at(position)
            })?;
        buffer.verify(
            &self.home,
            Place {
                number: frame,
                position,
            },
        )?;
        if zerocopy::IntoBytes::as_bytes(&buffer.directory_entry())
            != zerocopy::IntoBytes::as_bytes(entry)
        {
            let what = "a frame is not the one that the directory lists";
            return Err(Error::new(ErrorKind::Foreign, what)
                .in_frame(frame)
                .at(position));
        }
        Ok(())
    }

    /// The frame directory, in order.
    pub(crate) fn directory(&self) -> SectionStream<&R, RawDirectoryEntry> {
        self.trailer.directory.stream(&self.source, 0)
    }

    /// Checks that the sections are those that the trailer vouches for, by SHA-256 over all
    /// of them and the header; with the key, that proves them.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`], [`ErrorKind::Io`].
    pub fn check_seal(&self) -> Result<()> {
        let mut digest = Sha256::new();
        digest.update(self.page.page.as_slice());
        let end = self.trailer.seal.file_len.get() - PAGE as u64;
        let mut at = self.trailer.sections_at.get();
        let mut buffer = vec![0; 16 * PAGE];
        while at < end {
            let here = FileOffset::new(at);
            let len = (end - at).min(buffer.len() as u64);
            let piece = &mut buffer[..len as usize];
            self.source
                .read_exact_at(piece, here)
                .map_err(|error| Error::from_io("read the seal", error).at(here))?;
            digest.update(&piece);
            at += len;
        }
        if self.trailer.contents != <[u8; 32]>::from(digest.finalize()) {
            return Err(Error::damaged(
                "the seal's digest does not agree with what it seals",
            ));
        }
        Ok(())
    }

    /// The tags and resizes that count, in order; they can be read without the key.
    pub fn marks(&self) -> impl Iterator<Item = Result<Mark>> + '_ {
        let mut behind = None;
        self.trailer.marks.stream(&self.source, 0).map(move |raw| {
            let mark = seal::mark(&raw?)?;
            // No record is marked twice: so there are no more marks than records.
            if behind.replace((mark.frame, mark.record)) >= Some((mark.frame, mark.record)) {
                return Err(Error::damaged("the marks of the seal are not in order"));
            }
            Ok(mark)
        })
    }

    /// The recovery points, in order, with their labels; that needs the key.
    ///
    /// # Errors
    /// Each as [`Self::read_frame`].
    pub fn tags(&self) -> impl Iterator<Item = Result<Tag>> + '_ {
        let mut frame = FrameBuffer::new();
        self.marks().filter_map(move |mark| match mark {
            Ok(mark) => match mark.detail {
                MarkDetail::Tag(_) => Some(self.read_tag(&mark, &mut frame)),
                MarkDetail::Resize(_) => None,
            },
            Err(error) => Some(Err(error)),
        })
    }

    /// The tag that a mark points to; `frame` is read anew unless it holds it already.
    pub(crate) fn read_tag(&self, mark: &Mark, frame: &mut FrameBuffer) -> Result<Tag> {
        if !frame.holds(self.header().log, mark.frame) {
            self.read_frame(mark.frame, frame)?;
        }
        let entry = frame.record(mark.record as usize)?;
        match (entry.map(|entry| entry.record), mark.detail) {
            (Some(Record::Tag(tag)), MarkDetail::Tag(named)) if tag.id == named.id => Ok(tag),
            _ => {
                let what = "the seal lists a tag that its frame does not hold";
                Err(Error::damaged(what).in_frame(mark.frame))
            }
        }
    }
}

fn read_header<R: ReadAt>(source: &R, size: u64) -> Result<HeaderPage> {
    if size < PAGE as u64 {
        let what = "too short to be a log";
        return Err(Error::new(ErrorKind::NotALog, what).at(FileOffset::new(size)));
    }
    let mut page = Box::new([0; PAGE]);
    source
        .read_exact_at(page.as_mut_slice(), FileOffset::ZERO)
        .map_err(|error: io::Error| Error::from_io("read the header", error))?;
    HeaderPage::decode(page)
}

/// A log's index, streamed: disjoint extents by ascending offset.
pub struct IndexStream<R> {
    entries: SectionStream<R, RawIndexEntry>,
    within: Extent,
    frames: u32,
    volume_size: VolumeSize,
    last: Option<IndexEntry>,
}

impl<R: ReadAt> IndexStream<R> {
    fn check(&self, entry: &IndexEntry) -> Result<()> {
        let len = entry.extent.len().get();
        let starts = self.last.map_or(ByteOffset::ZERO, |last| last.extent.end());
        let end_in_frame = u64::from(entry.at.get()).saturating_add(len);
        let placed = match entry.kind {
            crate::extents::ExtentKind::Write => end_in_frame <= MAX_DATA as u64,
            _ => entry.at.get() == 0,
        };
        let sound = entry.extent.offset() >= starts
            && placed
            && entry.frame.get() < self.frames
            && entry.extent.end().get() <= self.volume_size.get()
            && !self.last.is_some_and(|last| last.continues_in(entry));
        sound.then_some(()).ok_or_else(|| {
            let number = self.entries.position().saturating_sub(1);
            Error::damaged(format!("entry {number} of the index is not what it may be"))
        })
    }

    fn read(&mut self) -> Option<Result<IndexEntry>> {
        loop {
            let entry = match self.entries.next()?.and_then(|raw| seal::index_entry(&raw)) {
                Ok(entry) => entry,
                Err(error) => return Some(Err(error)),
            };
            if let Err(error) = self.check(&entry) {
                return Some(Err(error));
            }
            self.last = Some(entry);
            if entry.extent.offset() >= self.within.end() {
                return None;
            }
            if let Some(entry) = entry.clip(self.within) {
                return Some(Ok(entry));
            }
        }
    }
}

impl<R: ReadAt> Iterator for IndexStream<R> {
    type Item = Result<IndexEntry>;

    fn next(&mut self) -> Option<Result<IndexEntry>> {
        let read = self.read();
        if !matches!(read, Some(Ok(_))) {
            // An error, or the end of what was asked for: nothing follows.
            self.entries.stop();
        }
        read
    }
}
