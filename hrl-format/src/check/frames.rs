//! The first pass of a check: all frames in order, and what the seal says of them.

use super::CheckReport;
use crate::error::{Error, Result};
use crate::frame::{FrameBuffer, MarkDetail, Shape, TableEntry, TagMark};
use crate::header::RecordOrder;
use crate::layout::RawDirectoryEntry;
use crate::log::Log;
use crate::seal::Mark;
use crate::source::ReadAt;
use crate::units::{FrameNumber, VolumeSize};

/// A resize, and the size that the volume had before.
#[derive(Clone, Copy, Debug)]
pub(super) struct SizeChange {
    pub frame: FrameNumber,
    pub record: u32,
    pub before: VolumeSize,
}

/// Checks all frames, and the marks; returns the resizes in order.
pub(super) fn check<R: ReadAt>(log: &Log<R>, report: &mut CheckReport) -> Result<Vec<SizeChange>> {
    let mut pass = Pass {
        log,
        marks: Some(Box::new(log.marks())),
        next_mark: None,
        frame: FrameBuffer::new(),
        volume_size: log.header().volume_size,
        changes: Vec::new(),
        records: 0,
        data: 0,
    };
    report.note(pass.advance_mark())?;
    let mut position = crate::layout::PAGE as u64;
    let mut complete = true;
    for (number, entry) in (0..).zip(log.directory()) {
        let frame = FrameNumber::new(number);
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                complete = false;
                report.note(Err(error))?;
                break;
            }
        };
        if entry.position.get() != position {
            let what = "the directory does not list the frames one behind the other";
            report.note(Err(Error::damaged(what).in_frame(frame)))?;
            complete = false;
            break;
        }
        position = position.saturating_add(u64::from(entry.span.get()));
        let found = log
            .load_listed(frame, &entry, &mut pass.frame)
            .and_then(|()| pass.check_frame(frame));
        match found {
            Ok(()) => {
                report.frames += 1;
                report.records += pass.frame.records() as u64;
            }
            Err(error) => {
                complete = false;
                report.note(Err(error))?;
                let skipped = pass.skip_marks(frame);
                report.note(skipped)?;
            }
        }
        // A frame that is not whole is no reproach to those behind it.
        pass.records = pass.records_behind(&entry);
    }
    if complete {
        report.note(pass.check_totals(position))?;
    }
    Ok(pass.changes)
}

struct Pass<'a, R> {
    log: &'a Log<R>,
    marks: Option<Box<dyn Iterator<Item = Result<Mark>> + 'a>>,
    next_mark: Option<Mark>,
    frame: FrameBuffer,
    volume_size: VolumeSize,
    changes: Vec<SizeChange>,
    records: u64,
    data: u64,
}

impl<R: ReadAt> Pass<'_, R> {
    fn advance_mark(&mut self) -> Result<()> {
        self.next_mark = None;
        let Some(marks) = &mut self.marks else {
            return Ok(());
        };
        match marks.next().transpose() {
            Ok(mark) => self.next_mark = mark,
            Err(error) => {
                // Said once; then nothing is known of the marks.
                self.marks = None;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Leaves out the marks of a frame that is not whole, but for what they say of the
    /// frames behind it: how large the volume is.
    fn skip_marks(&mut self, frame: FrameNumber) -> Result<()> {
        while let Some(mark) = self.next_mark.filter(|mark| mark.frame <= frame) {
            if let MarkDetail::Resize(size) = mark.detail {
                self.volume_size = size;
            }
            self.advance_mark()?;
        }
        Ok(())
    }

    /// How many records there are up to the end of a listed frame. Frames that were moved
    /// keep the numbers that they had elsewhere.
    fn records_behind(&self, entry: &RawDirectoryEntry) -> u64 {
        let before = match self.log.page.features.moved {
            true => self.records,
            false => entry.first_sequence.get(),
        };
        before.saturating_add(u64::from(entry.records.get()))
    }

    fn check_frame(&mut self, frame: FrameNumber) -> Result<()> {
        let header = self.log.header();
        let numbered_on = !self.log.page.features.moved || header.order == RecordOrder::AsCompleted;
        if numbered_on && self.frame.first_sequence().get() != self.records {
            let what = "a frame's records are not numbered on";
            let at = self.frame.position();
            return Err(Error::damaged(what).in_frame(frame).at(at));
        }
        if self.log.key.is_some() || self.log.header().key.is_none() {
            self.frame.open(self.log.key.as_ref())?;
            self.frame
                .entries()
                .try_for_each(|entry| entry.map(|_| ()))?;
        }
        let table: Vec<TableEntry> = self.frame.table().collect();
        for (record, entry) in (0..).zip(&table) {
            self.check_record(frame, record, entry)
                .map_err(|error| error.in_frame(frame).at(self.frame.position()))?;
        }
        self.data += self.frame.data_len() as u64;
        Ok(())
    }

    fn check_record(&mut self, frame: FrameNumber, record: u32, entry: &TableEntry) -> Result<()> {
        let end = entry.shape.extent().map_or(0, |extent| extent.end().get());
        if end > self.volume_size.get() {
            return Err(Error::damaged("a record reaches past the volume's end"));
        }
        let TableEntry { sequence, time, .. } = *entry;
        let detail = match entry.shape {
            Shape::Tag { id, consistency } => MarkDetail::Tag(TagMark {
                id,
                consistency,
                time,
            }),
            Shape::Resize(size) => {
                let before = std::mem::replace(&mut self.volume_size, size);
                self.changes.push(SizeChange {
                    frame,
                    record,
                    before,
                });
                MarkDetail::Resize(size)
            }
            Shape::Write(_) | Shape::Zeroes(_) | Shape::Discard(_) => return Ok(()),
        };
        if self.marks.is_none() {
            return Ok(());
        }
        let expected = Mark {
            detail,
            frame,
            record,
            sequence,
            time,
        };
        if self.next_mark == Some(expected) {
            return self.advance_mark();
        }
        // A merge drops points; their records may remain in frames that moved whole.
        let may_lack = self.log.page.features.moved && matches!(detail, MarkDetail::Tag(_));
        if may_lack
            && self
                .next_mark
                .is_none_or(|mark| (mark.frame, mark.record) > (frame, record))
        {
            return Ok(());
        }
        Err(Error::damaged(
            "the seal does not list a tag or a resize as it is",
        ))
    }

    fn check_totals(&mut self, end: u64) -> Result<()> {
        let seal = self.log.seal();
        let agrees = end == self.log.trailer.sections_at.get()
            && self.records == seal.records
            && self.data == seal.data.get()
            && self.volume_size == seal.volume_size
            && self.next_mark.is_none();
        agrees
            .then_some(())
            .ok_or_else(|| Error::damaged("the seal does not agree with what it seals"))
    }
}
