//! Writing a level file: entries as they come, by ascending offset, then the fences, then the
//! header, which only now is known. It lies in `incoming/` until it is whole and synced.

use std::path::PathBuf;

use hrl_format::Piece;
use hrl_format::units::{ByteLen, ByteOffset};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::layout::{self, ENTRIES, FENCES, Head, Kind, PAGE, Page, RawEntry};
use crate::error::{Error, ErrorKind, Result};
use crate::store::durable::StoreFile;

/// Written at once.
const BUFFER: usize = 64 * PAGE;

/// A level file that is being written.
#[derive(Debug)]
pub(super) struct LevelWriter {
    file: StoreFile,
    /// What it will say of itself; the entries are counted as they come.
    head: Head,
    page: Box<Page>,
    used: usize,
    /// How many pages of the current kind were closed.
    closed: u64,
    /// With what offset each page of the current kind begins.
    begins: Vec<u64>,
    buffer: Vec<u8>,
    position: u64,
}

impl LevelWriter {
    /// Begins a file.
    pub(super) fn create(path: PathBuf, head: Head) -> Result<Self> {
        Ok(Self {
            file: StoreFile::create(path)?,
            head: Head { entries: 0, ..head },
            page: Box::new([0; PAGE]),
            used: 0,
            closed: 0,
            begins: Vec::new(),
            buffer: Vec::with_capacity(BUFFER),
            position: PAGE as u64,
        })
    }

    pub(super) const fn head(&self) -> &Head {
        &self.head
    }

    /// Adds what lies behind all before; the piece's source is the number of its log in the run.
    pub(super) fn push(&mut self, piece: Piece) -> Result<()> {
        layout::parts(piece).try_for_each(|part| {
            let raw = RawEntry::of(&part);
            if self.head.entries.is_multiple_of(ENTRIES) {
                if self.head.entries > 0 {
                    self.close(Kind::Entries)?;
                }
                self.begins.push(raw.offset().get());
            }
            self.head.entries += 1;
            self.put(raw.as_bytes());
            Ok(())
        })
    }

    fn put(&mut self, bytes: &[u8]) {
        self.page[self.used..self.used + bytes.len()].copy_from_slice(bytes);
        self.used += bytes.len();
    }

    fn close(&mut self, kind: Kind) -> Result<()> {
        let number = u32::try_from(self.closed).map_err(|_| {
            Error::new(ErrorKind::Invalid, "write a level of the store")
                .detail("there are more entries than a file can have")
        })?;
        layout::close(&mut self.page, &self.head.run, kind, number, self.used);
        self.buffer.extend_from_slice(self.page.as_slice());
        self.used = 0;
        self.closed += 1;
        match self.buffer.len() < BUFFER {
            true => Ok(()),
            false => self.flush(),
        }
    }

    fn flush(&mut self) -> Result<()> {
        if !self.buffer.is_empty() {
            let at = ByteOffset::new(self.position);
            self.file.write_at(at, &self.buffer)?;
            self.position += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }

    /// Writes what is left, and syncs the file. What it says of itself, and how long it is.
    pub(super) fn finish(mut self) -> Result<(Head, ByteLen)> {
        if self.used > 0 {
            self.close(Kind::Entries)?;
        }
        while self.begins.len() > 1 {
            let below = std::mem::take(&mut self.begins);
            self.closed = 0;
            for row in below.chunks(FENCES as usize) {
                self.begins.extend(row.first());
                for &begin in row {
                    self.put(U64::new(begin).as_bytes());
                }
                self.close(Kind::Fences)?;
            }
        }
        self.flush()?;
        let header = self.head.encode();
        self.file.write_at(ByteOffset::ZERO, header.as_slice())?;
        self.file.sync()?;
        Ok((self.head, ByteLen::new(self.position)))
    }
}
