//! A level file, open for reading. Opening reads its header alone; an offset is found by
//! following the fences, a page of each row; entries stream from there. Pages of fences that were
//! read are kept, up to a limit that all files of a reader share.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hrl_format::Piece;
use hrl_format::units::{ByteOffset, Extent};

use super::layout::{self, ENTRIES, FENCES, Head, PAGE, Page, Run};
use crate::error::{Error, IoContext, Result};
use crate::store::durable::damaged;

const READ: &str = "read a level of the store";
/// How many pages a long stream reads at once.
const READ_PAGES: u64 = 16;
/// How many pages of fences are kept: 4 MiB.
const KEPT: usize = 1024;

/// Pages of fences that were read and checked.
#[derive(Debug, Default)]
pub(in crate::store) struct Fences(Mutex<HashMap<Place, Arc<Page>>>);

/// Which file, by half of its run, and which of its pages.
type Place = ([u8; 16], u64);

impl Fences {
    fn get(&self, file: &LevelFile, page: u64) -> Option<Arc<Page>> {
        // A panic elsewhere leaves at worst a page more or less in the table.
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(&(file.head.run.short(), page)).cloned()
    }

    fn keep(&self, file: &LevelFile, page: u64, content: &Arc<Page>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert((file.head.run.short(), page), Arc::clone(content));
    }
}

/// A level file.
#[derive(Debug)]
pub(in crate::store) struct LevelFile {
    file: File,
    path: PathBuf,
    head: Head,
    /// Pages of entries, then of each row of fences.
    rows: Vec<u64>,
    fences: Arc<Fences>,
}

impl LevelFile {
    /// Opens the file of this run.
    pub(super) fn open(path: &Path, expected: &Head, fences: &Arc<Fences>) -> Result<Self> {
        let file = File::open(path).at(READ, path)?;
        let mut page = Box::new([0; PAGE]);
        file.read_exact_at(page.as_mut_slice(), 0).at(READ, path)?;
        let head = Head::decode(&page).map_err(|why| damaged(READ, path, why))?;
        if head != *expected {
            let why = "it is not the one that the manifest lists";
            return Err(damaged(READ, path, why));
        }
        let rows = head.rows();
        let pages = rows.iter().sum::<u64>() + 1;
        let len = file.metadata().at(READ, path)?.len();
        if Some(len) != pages.checked_mul(PAGE as u64) {
            let why = format!("it has {len} bytes, and must have {pages} pages");
            return Err(damaged(READ, path, why));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            head,
            rows,
            fences: Arc::clone(fences),
        })
    }

    pub(super) fn run(&self) -> Run {
        self.head.run
    }

    fn bad(&self, page: u64, why: &str) -> Error {
        damaged(READ, &self.path, why).offset(ByteOffset::new(page * PAGE as u64))
    }

    /// The number of the page of entries that holds `at`, or else the entry before it.
    fn find(&self, at: ByteOffset) -> Result<u64> {
        let mut child = 0;
        for row in (1..self.rows.len()).rev() {
            child = self.find_in(row, child, at)?;
        }
        Ok(child)
    }

    /// Which page of the row below to follow from page `number` of a row of fences.
    fn find_in(&self, row: usize, number: u64, at: ByteOffset) -> Result<u64> {
        let place = 1 + self.rows[..row].iter().sum::<u64>() + number;
        let below = self.rows[row - 1] - number * FENCES;
        let page = match self.fences.get(self, place) {
            Some(page) => page,
            None => {
                let mut page = Box::new([0; PAGE]);
                self.read(place, page.as_mut_slice())?;
                let page: Arc<Page> = Arc::from(page);
                layout::fences(&page, &self.head.run, number, below.min(FENCES))
                    .map_err(|why| self.bad(place, why))?;
                self.fences.keep(self, place, &page);
                page
            }
        };
        let fences = layout::fences(&page, &self.head.run, number, below.min(FENCES))
            .map_err(|why| self.bad(place, why))?;
        let begun = fences.partition_point(|fence| fence.get() <= at.get());
        Ok(number * FENCES + (begun as u64).saturating_sub(1))
    }

    fn read(&self, page: u64, pages: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(pages, page * PAGE as u64);
        read.at(READ, &self.path)
    }
}

/// The entries of a file that touch an extent, cut to it, by ascending offset. A piece's source is
/// the number of its log in the run. After an error it ends.
pub(in crate::store) struct LevelStream {
    file: Arc<LevelFile>,
    within: Extent,
    /// The page of entries to be read next.
    next: u64,
    /// Pages that were read, and the number of the first.
    held: Vec<u8>,
    held_first: u64,
    /// Which entry comes next, of all in the file.
    entry: u64,
    /// Where the last one ended.
    end: ByteOffset,
    /// How many pages the next read takes.
    ahead: u64,
}

impl LevelStream {
    pub(super) fn new(file: Arc<LevelFile>, within: Extent) -> Result<Self> {
        let page = file.find(within.offset())?;
        Ok(Self {
            file,
            within,
            next: page,
            held: Vec::new(),
            held_first: page,
            entry: page * ENTRIES,
            end: ByteOffset::ZERO,
            ahead: 1,
        })
    }

    pub(super) fn run(&self) -> Run {
        self.file.run()
    }

    /// Reads the next pages, and checks them.
    fn fill(&mut self) -> Result<()> {
        let file = &self.file;
        let count = self.ahead.min(file.rows[0] - self.next);
        self.held.resize(count as usize * PAGE, 0);
        file.read(1 + self.next, &mut self.held)?;
        for (number, page) in (self.next..).zip(self.held.as_chunks::<PAGE>().0) {
            let entries = (file.head.entries - number * ENTRIES).min(ENTRIES);
            layout::entries(page, &file.head.run, number, entries)
                .map_err(|why| file.bad(1 + number, why))?;
        }
        self.held_first = self.next;
        self.next += count;
        self.ahead = (self.ahead * 2).min(READ_PAGES);
        Ok(())
    }

    fn read(&mut self) -> Result<Option<Piece>> {
        loop {
            if self.entry >= self.file.head.entries {
                return Ok(None);
            }
            let (page, place) = (self.entry / ENTRIES, self.entry % ENTRIES);
            if page >= self.next {
                self.fill()?;
            }
            let head = &self.file.head;
            let start = (page - self.held_first) as usize * PAGE
                + place as usize * size_of::<layout::RawEntry>();
            let raw = self.held.get(start..).and_then(raw_entry);
            let piece = raw.and_then(|raw| raw.piece(head.logs, head.size));
            let piece = piece.filter(|piece| piece.extent().offset() >= self.end);
            let Some(piece) = piece else {
                let why = format!("entry {} is not what it may be", self.entry);
                return Err(self.file.bad(1 + page, &why));
            };
            self.end = piece.extent().end();
            self.entry += 1;
            if piece.extent().offset() >= self.within.end() {
                return Ok(None);
            }
            if let Some(entry) = piece.entry.clip(self.within) {
                return Ok(Some(Piece { entry, ..piece }));
            }
        }
    }
}

fn raw_entry(bytes: &[u8]) -> Option<layout::RawEntry> {
    let read = <layout::RawEntry as zerocopy::FromBytes>::read_from_prefix(bytes);
    read.ok().map(|(raw, _)| raw)
}

impl Iterator for LevelStream {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        let read = self.read();
        if !matches!(read, Ok(Some(_))) {
            self.entry = self.file.head.entries;
        }
        read.transpose()
    }
}
