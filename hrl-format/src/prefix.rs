//! The first records of a log: what they leave behind, and which of them had completed at some
//! time. Found from the frames' tables alone, so that no data is read, and no key is needed.
//! Of a log in order that is what the volume was between two recovery points.
//!
//! Memory is bounded by what the log itself has: an entry or two for each record.

use crate::error::{Error, ErrorKind, Result};
use crate::extents::IndexEntry;
use crate::frame::{FrameBuffer, TableEntry};
use crate::layout::RawDirectoryEntry;
use crate::log::Log;
use crate::source::ReadAt;
use crate::state::{LogState, Standing};
use crate::units::{Extent, FrameNumber, Sequence, Timestamp, VolumeSize};

/// The state that a log leaves behind up to one of its records: an index as the sealed one, in
/// memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    entries: Vec<IndexEntry>,
    volume_size: VolumeSize,
}

impl Prefix {
    /// The state of each extent, by ascending offset.
    pub fn entries(&self) -> &[IndexEntry] {
        &self.entries
    }

    /// The part that touches `extent`, cut to it.
    pub fn entries_in(&self, extent: Extent) -> PrefixEntries<'_> {
        let first = self
            .entries
            .partition_point(|entry| entry.extent.end() <= extent.offset());
        PrefixEntries {
            rest: self.entries[first..].iter(),
            extent,
        }
    }

    /// The volume's size after the record.
    pub const fn volume_size(&self) -> VolumeSize {
        self.volume_size
    }
}

/// A part of a [`Prefix`], by ascending offset.
#[derive(Clone, Debug)]
pub struct PrefixEntries<'a> {
    rest: std::slice::Iter<'a, IndexEntry>,
    extent: Extent,
}

impl Iterator for PrefixEntries<'_> {
    type Item = IndexEntry;

    fn next(&mut self) -> Option<IndexEntry> {
        self.rest.next()?.clip(self.extent)
    }
}

impl<R: ReadAt> Log<R> {
    /// What the records up to `last`, that one included, leave behind: what the sealed index
    /// were had the log ended there.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the log has no such record, or does not number its records on,
    /// as one that was merged; [`ErrorKind::Damaged`], [`ErrorKind::Foreign`],
    /// [`ErrorKind::Io`].
    pub fn index_until(&self, last: Sequence) -> Result<Prefix> {
        let mut state = LogState::new(self.header().volume_size);
        let mut found = false;
        self.each_record(|frame, record, entry| {
            if entry.sequence > last {
                return Ok(Walk::Done);
            }
            let end = entry.shape.extent().map_or(0, |extent| extent.end().get());
            if end > state.volume_size.get() {
                let what = "a record reaches past the volume's end";
                return Err(Error::damaged(what).in_frame(frame));
            }
            found = entry.sequence == last;
            let standing = Standing {
                frame,
                record,
                sequence: entry.sequence,
                time: entry.time,
                at: entry.at,
            };
            state.apply(entry.shape, standing);
            Ok(Walk::On)
        })?;
        if !found {
            return Err(self.no_record(last));
        }
        Ok(Prefix {
            entries: state.extents.iter().collect(),
            volume_size: state.volume_size,
        })
    }

    /// The last record that bears a time not later than `time`; `None` if all are later. A
    /// tag bears the point's own time.
    ///
    /// # Errors
    /// As [`Self::index_until`].
    pub fn last_record_at(&self, time: Timestamp) -> Result<Option<Sequence>> {
        let mut last = None;
        self.each_record(|_, _, entry| {
            if entry.time <= time {
                last = Some(entry.sequence);
            }
            Ok(Walk::On)
        })?;
        Ok(last)
    }

    /// The time that a record bears.
    ///
    /// # Errors
    /// As [`Self::index_until`].
    pub fn time_of(&self, sequence: Sequence) -> Result<Timestamp> {
        let entry = |n| {
            let entry = self.trailer.directory.entry(&self.source, n)?;
            entry.ok_or_else(|| self.no_record(sequence))
        };
        // The last frame that begins at or before it.
        let (mut low, mut high) = (0, u64::from(self.seal().frames));
        while high.saturating_sub(low) > 1 {
            let middle = low + (high - low) / 2;
            if entry(middle)?.first_sequence.get() <= sequence.get() {
                low = middle;
            } else {
                high = middle;
            }
        }
        let mut buffer = FrameBuffer::new();
        let frame = FrameNumber::new(u32::try_from(low).unwrap_or(u32::MAX));
        self.load_table(frame, &entry(low)?, &mut buffer)?;
        let found = buffer.table().find(|entry| entry.sequence == sequence);
        found
            .map(|entry| entry.time)
            .ok_or_else(|| self.no_record(sequence))
    }

    fn no_record(&self, sequence: Sequence) -> Error {
        let records = self.seal().records;
        Error::invalid(format!(
            "the log has no record {sequence}, but {records} from 0 on"
        ))
    }

    /// Visits the records in order: each with its frame, and which of the frame's it is.
    fn each_record(
        &self,
        mut visit: impl FnMut(FrameNumber, u32, &TableEntry) -> Result<Walk>,
    ) -> Result<()> {
        let mut buffer = FrameBuffer::new();
        let mut next = 0;
        for (number, listed) in (0..).zip(self.directory()) {
            let (frame, listed): (_, RawDirectoryEntry) = (FrameNumber::new(number), listed?);
            self.load_table(frame, &listed, &mut buffer)?;
            if buffer.first_sequence().get() != next {
                let what = "the log does not number its records on: it was merged";
                return Err(Error::new(ErrorKind::Invalid, what).in_frame(frame));
            }
            next += buffer.records() as u64;
            for (record, entry) in (0..).zip(buffer.table()) {
                match visit(frame, record, &entry)? {
                    Walk::On => {}
                    Walk::Done => return Ok(()),
                }
            }
        }
        Ok(())
    }
}

/// Whether a walk over the records goes on.
enum Walk {
    On,
    Done,
}
