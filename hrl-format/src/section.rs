//! Sections: lists of entries of one size, in pages that are each checked on their own,
//! so that any entry is found by its number, and trusted, with one read of 4 KiB.

use std::io::Write;
use std::marker::PhantomData;

use sha2::{Digest, Sha256};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, ErrorKind, Result};
use crate::id::LogId;
use crate::layout::{PAGE, PAGE_SUMMED, PAYLOAD, RawFooter, RawSection};
use crate::source::ReadAt;
use crate::units::FileOffset;

/// How many pages a stream reads at once: 32 KiB, of which there is one a log when many
/// logs are merged.
const READ_PAGES: usize = 8;

/// What the entries of a section are made of.
pub(crate) trait RawEntry:
    FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned + Copy
{
    /// How many fit into a page.
    const PER_PAGE: usize = PAYLOAD / size_of::<Self>();
}

impl<T: FromBytes + IntoBytes + KnownLayout + Immutable + Unaligned + Copy> RawEntry for T {}

/// Writes pages behind one another, and the digest that the seal vouches for them with.
pub(crate) struct PageSink<W> {
    pub write: W,
    pub position: FileOffset,
    pub digest: Sha256,
}

impl<W: Write> PageSink<W> {
    pub(crate) fn put(&mut self, page: &[u8; PAGE]) -> Result<()> {
        self.digest.update(page);
        self.write
            .write_all(page)
            .map_err(|error| Error::from_io("write the seal", error))?;
        self.position = FileOffset::new(self.position.get() + PAGE as u64);
        Ok(())
    }

    /// Writes a whole section.
    pub(crate) fn section<T: RawEntry>(
        &mut self,
        log: LogId,
        kind: [u8; 4],
        entries: impl Iterator<Item = Result<T>>,
    ) -> Result<RawSection> {
        let mut page = PageBuilder::new(self, log, kind);
        let mut count = 0u64;
        for entry in entries {
            page.push(entry?.as_bytes())?;
            count += 1;
        }
        page.finish(count)
    }
}

impl<W: Write> PageSink<W> {
    /// Writes whole pages as they are.
    pub(crate) fn verbatim(
        &mut self,
        pages: impl Iterator<Item = Result<Box<[u8; PAGE]>>>,
    ) -> Result<RawSection> {
        let position = self.position.get();
        for page in pages {
            self.put(&*page?)?;
        }
        let count = (self.position.get() - position) / PAGE as u64;
        Ok(RawSection {
            position: position.into(),
            pages: count.into(),
            entries: count.into(),
        })
    }
}

/// Fills pages of one section.
pub(crate) struct PageBuilder<'a, W> {
    sink: &'a mut PageSink<W>,
    log: LogId,
    kind: [u8; 4],
    start: FileOffset,
    number: u32,
    used: usize,
    page: Box<[u8; PAGE]>,
}

impl<'a, W: Write> PageBuilder<'a, W> {
    pub(crate) fn new(sink: &'a mut PageSink<W>, log: LogId, kind: [u8; 4]) -> Self {
        let start = sink.position;
        Self {
            sink,
            log,
            kind,
            start,
            number: 0,
            used: 0,
            page: Box::new([0; PAGE]),
        }
    }

    /// Adds an entry, which never straddles two pages.
    pub(crate) fn push(&mut self, entry: &[u8]) -> Result<()> {
        if self.used + entry.len() > PAYLOAD {
            self.flush()?;
        }
        self.page[self.used..self.used + entry.len()].copy_from_slice(entry);
        self.used += entry.len();
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let mut footer = RawFooter {
            log: *self.log.as_bytes(),
            kind: self.kind,
            number: self.number.into(),
            used: (self.used as u32).into(),
            crc: 0.into(),
        };
        self.page[PAYLOAD..].copy_from_slice(footer.as_bytes());
        footer.crc.set(crc32fast::hash(&self.page[..PAGE_SUMMED]));
        self.page[PAYLOAD..].copy_from_slice(footer.as_bytes());
        self.sink.put(&self.page)?;
        self.page.fill(0);
        self.used = 0;
        self.number = self
            .number
            .checked_add(1)
            .ok_or_else(|| Error::invalid("more pages than a section can have"))?;
        Ok(())
    }

    pub(crate) fn finish(mut self, entries: u64) -> Result<RawSection> {
        if self.used > 0 {
            self.flush()?;
        }
        Ok(RawSection {
            position: self.start.get().into(),
            pages: u64::from(self.number).into(),
            entries: entries.into(),
        })
    }
}

/// The entries' bytes of a section's page, if it is page `number` of that section.
pub(crate) fn payload_of(
    page: &[u8; PAGE],
    log: LogId,
    kind: [u8; 4],
    number: u64,
) -> Result<&[u8]> {
    let (payload, footer) = page.split_at(PAYLOAD);
    let footer = RawFooter::ref_from_bytes(footer)
        .map_err(|_| Error::damaged("a section's page has no footer"))?;
    if footer.crc.get() != crc32fast::hash(&page[..PAGE_SUMMED]) {
        return Err(Error::damaged(
            "the checksum of a page of the seal does not agree",
        ));
    }
    if footer.log != *log.as_bytes() || footer.kind != kind || u64::from(footer.number) != number {
        let found = "a page of the seal that belongs elsewhere";
        return Err(Error::new(ErrorKind::Foreign, found));
    }
    let (used, rest) = payload
        .split_at_checked(footer.used.get() as usize)
        .ok_or_else(|| Error::damaged("a page of the seal is fuller than a page"))?;
    if rest.iter().any(|&byte| byte != 0) {
        return Err(Error::damaged(
            "a page of the seal has a rest that is not zero",
        ));
    }
    Ok(used)
}

/// A section of a sealed log, by what its trailer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Section<T> {
    pub log: LogId,
    pub kind: [u8; 4],
    pub position: FileOffset,
    pub pages: u64,
    pub entries: u64,
    entry: PhantomData<T>,
}

impl<T: RawEntry> Section<T> {
    /// If its counts agree with each other.
    pub(crate) fn new(raw: RawSection, log: LogId, kind: [u8; 4]) -> Result<Self> {
        let (pages, entries) = (raw.pages.get(), raw.entries.get());
        if pages != entries.div_ceil(T::PER_PAGE as u64) || pages > u64::from(u32::MAX) {
            return Err(Error::damaged(
                "the seal's counts of pages and entries do not agree",
            ));
        }
        let position = FileOffset::new(raw.position.get());
        Ok(Self {
            log,
            kind,
            position,
            pages,
            entries,
            entry: PhantomData,
        })
    }

    /// Where page `n` is.
    fn page_at(&self, n: u64) -> FileOffset {
        // Within the file: the trailer's sections were checked against its size.
        FileOffset::new(self.position.get() + n * PAGE as u64)
    }

    /// Entries of page `n`, out of `page`.
    fn entries_of<'a>(&self, page: &'a [u8; PAGE], n: u64) -> Result<&'a [T]> {
        let expected = (self.entries - n * T::PER_PAGE as u64).min(T::PER_PAGE as u64);
        payload_of(page, self.log, self.kind, n)
            .and_then(|used| {
                <[T]>::ref_from_bytes(used)
                    .ok()
                    .filter(|entries| entries.len() as u64 == expected)
                    .ok_or_else(|| Error::damaged("a page of the seal has another count"))
            })
            .map_err(|error| error.at(self.page_at(n)))
    }

    /// Reads page `n`.
    pub(crate) fn page<R: ReadAt>(&self, source: &R, n: u64) -> Result<Vec<T>> {
        let mut page = [0; PAGE];
        self.read(source, n, &mut page)?;
        self.entries_of(&page, n).map(<[T]>::to_vec)
    }

    fn read<R: ReadAt>(&self, source: &R, n: u64, page: &mut [u8; PAGE]) -> Result<()> {
        let at = self.page_at(n);
        source
            .read_exact_at(page, at)
            .map_err(|error| Error::from_io("read the seal", error).at(at))
    }

    /// Reads entry `n`; `None` past the last.
    pub(crate) fn entry<R: ReadAt>(&self, source: &R, n: u64) -> Result<Option<T>> {
        if n >= self.entries {
            return Ok(None);
        }
        let per_page = T::PER_PAGE as u64;
        let (number, mut page) = (n / per_page, [0; PAGE]);
        self.read(source, number, &mut page)?;
        Ok(self
            .entries_of(&page, number)?
            .get((n % per_page) as usize)
            .copied())
    }

    /// Streams the entries from number `first` on.
    pub(crate) fn stream<R: ReadAt>(self, source: R, first: u64) -> SectionStream<R, T> {
        SectionStream {
            source,
            section: self,
            next: first,
            buffer: Vec::new(),
            held: 0..0,
        }
    }
}

/// A section's entries, in order; a few pages are held at a time.
pub(crate) struct SectionStream<R, T> {
    source: R,
    section: Section<T>,
    next: u64,
    buffer: Vec<u8>,
    // Which pages the buffer holds.
    held: std::ops::Range<u64>,
}

impl<R: ReadAt, T: RawEntry> SectionStream<R, T> {
    /// The number of the entry that comes next.
    pub(crate) const fn position(&self) -> u64 {
        self.next
    }

    /// Ends the stream here.
    pub(crate) const fn stop(&mut self) {
        self.next = self.section.entries;
    }

    fn fill(&mut self, page: u64) -> Result<()> {
        let count = (self.section.pages - page).min(READ_PAGES as u64);
        self.buffer.resize(count as usize * PAGE, 0);
        let at = self.section.page_at(page);
        self.source
            .read_exact_at(&mut self.buffer, at)
            .map_err(|error| Error::from_io("read the seal", error).at(at))?;
        for (n, bytes) in (page..).zip(self.buffer.as_chunks::<PAGE>().0) {
            self.section.entries_of(bytes, n)?;
        }
        self.held = page..page + count;
        Ok(())
    }

    fn read(&mut self) -> Result<Option<T>> {
        if self.next >= self.section.entries {
            return Ok(None);
        }
        let per_page = T::PER_PAGE as u64;
        let page = self.next / per_page;
        if !self.held.contains(&page) {
            self.fill(page)?;
        }
        let size = size_of::<T>();
        let start =
            (page - self.held.start) as usize * PAGE + (self.next % per_page) as usize * size;
        self.next += 1;
        Ok(self
            .buffer
            .get(start..start + size)
            .and_then(|bytes| T::read_from_bytes(bytes).ok()))
    }
}

impl<R: ReadAt, T: RawEntry> Iterator for SectionStream<R, T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        let read = self.read();
        if read.is_err() {
            self.stop();
        }
        read.transpose()
    }
}
