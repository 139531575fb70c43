//! The second pass of a check: whether the index says what the records come to. The
//! frames are read backwards, tables only: what a record says first, coming from the end,
//! is final. So no more need be remembered than which bytes are accounted for, which is
//! never more than the index has entries.

use std::collections::BTreeMap;

use super::frames::SizeChange;
use crate::error::{Error, Result};
use crate::extents::{DataOffset, ExtentKind, IndexEntry};
use crate::frame::{FrameBuffer, Shape, TableEntry};
use crate::layout::RawIndexEntry;
use crate::log::Log;
use crate::seal::index_entry;
use crate::section::RawEntry;
use crate::source::ReadAt;
use crate::units::{ByteOffset, Extent, FrameNumber, VolumeSize};

/// What one look at the whole index gave.
pub(super) struct Survey {
    // Where each page's first entry begins.
    firsts: Vec<u64>,
    // How many bytes all entries cover.
    covered: u128,
}

/// Reads all of the index, which checks its order.
pub(super) fn survey<R: ReadAt>(log: &Log<R>) -> Result<Survey> {
    let mut survey = Survey {
        firsts: Vec::new(),
        covered: 0,
    };
    for (number, entry) in log.index().enumerate() {
        let entry = entry?;
        if number % RawIndexEntry::PER_PAGE == 0 {
            survey.firsts.push(entry.extent.offset().get());
        }
        survey.covered += u128::from(entry.extent.len().get());
    }
    Ok(survey)
}

/// Compares the index with the records of all frames, which are known to be sound.
pub(super) fn check<R: ReadAt>(log: &Log<R>, survey: &Survey, sizes: &[SizeChange]) -> Result<()> {
    let mut painter = Painter {
        log,
        survey,
        known: BTreeMap::new(),
        covered: 0,
        limit: log.seal().volume_size,
        page: (u64::MAX, Vec::new()),
    };
    let mut buffer = FrameBuffer::new();
    let mut table: Vec<TableEntry> = Vec::new();
    let mut sizes = sizes.iter().rev().peekable();
    for number in (0..log.seal().frames).rev() {
        let frame = FrameNumber::new(number);
        let listed = log
            .trailer
            .directory
            .entry(&log.source, u64::from(number))?;
        let listed = listed.ok_or_else(|| Error::damaged("the directory is too short"))?;
        log.load_table(frame, &listed, &mut buffer)?;
        table.clear();
        table.extend(buffer.table());
        for (record, entry) in table.iter().enumerate().rev() {
            if let Shape::Resize(size) = entry.shape {
                let change = sizes
                    .next_if(|change| (change.frame, change.record as usize) == (frame, record));
                let before = change.map_or(size, |change| change.before);
                painter.resize(before, size, frame)?;
            } else if let Some(state) = entry.shape.state(frame, entry.at) {
                painter.paint(state)?;
            }
        }
    }
    if painter.covered != survey.covered {
        return Err(Error::damaged("the index lists what no record says"));
    }
    Ok(())
}

struct Painter<'a, R> {
    log: &'a Log<R>,
    survey: &'a Survey,
    // The ranges that later records settled, by their starts: their ends. None touch.
    known: BTreeMap<u64, u64>,
    covered: u128,
    // The least size from here to the log's end: what lay past it is gone.
    limit: VolumeSize,
    // The page of the index that was looked at last.
    page: (u64, Vec<RawIndexEntry>),
}

impl<R: ReadAt> Painter<'_, R> {
    /// A resize, going backwards: the bytes it added began as undefined; those it cut off
    /// no longer count.
    fn resize(&mut self, before: VolumeSize, after: VolumeSize, frame: FrameNumber) -> Result<()> {
        let end = |size: VolumeSize| ByteOffset::new(size.get());
        self.paint(IndexEntry {
            extent: Extent::between(end(before), end(after)),
            kind: ExtentKind::Discard,
            frame,
            at: DataOffset::default(),
        })?;
        self.limit = self.limit.min(after);
        Ok(())
    }

    /// A record's range, going backwards: what is not settled yet is settled by it.
    fn paint(&mut self, state: IndexEntry) -> Result<()> {
        let Some(state) = state.clip(self.limit.extent()) else {
            return Ok(());
        };
        let (mut at, end) = (state.extent.offset().get(), state.extent.end().get());
        // What it will be one range with.
        let (mut from, mut to) = (at, end);
        if let Some((&start, &until)) = self.known.range(..=at).next_back()
            && until >= at
        {
            from = start;
            to = to.max(until);
            at = until;
        }
        loop {
            let next = self
                .known
                .range(from + 1..)
                .next()
                .map(|(&start, &until)| (start, until));
            let gap_end = next.map_or(end, |(start, _)| start.min(end));
            if at < gap_end {
                self.settle(
                    state,
                    Extent::between(ByteOffset::new(at), ByteOffset::new(gap_end)),
                )?;
            }
            match next {
                Some((start, until)) if start <= end => {
                    self.known.remove(&start);
                    at = at.max(until);
                    to = to.max(until);
                }
                _ => break,
            }
        }
        self.known.insert(from, to);
        Ok(())
    }

    /// The record says what `part` finally is: so must the index.
    fn settle(&mut self, state: IndexEntry, part: Extent) -> Result<()> {
        let found = self
            .lookup(part.offset())?
            .and_then(|entry| entry.clip(part));
        if found != state.clip(part) {
            let what = format!("the index does not say what the records come to at {part}");
            return Err(Error::damaged(what).in_frame(state.frame));
        }
        self.covered += u128::from(part.len().get());
        Ok(())
    }

    /// The entry of the index that holds `offset`.
    fn lookup(&mut self, offset: ByteOffset) -> Result<Option<IndexEntry>> {
        let page = self
            .survey
            .firsts
            .partition_point(|&first| first <= offset.get());
        let Some(page) = page.checked_sub(1) else {
            return Ok(None);
        };
        if self.page.0 != page as u64 {
            let entries = self.log.trailer.index.page(&self.log.source, page as u64)?;
            self.page = (page as u64, entries);
        }
        let entries = &self.page.1;
        let at = entries.partition_point(|entry| entry.offset.get() <= offset.get());
        at.checked_sub(1)
            .and_then(|at| entries.get(at))
            .map(index_entry)
            .transpose()
    }
}
