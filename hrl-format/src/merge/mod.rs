//! Merge: consecutive logs into one that leaves the same state behind, the last writer
//! winning. Who can read the data cuts new frames, by ascending offset; who lacks the key
//! moves frames whole, drops those that nothing needs any more, and takes over what the
//! sources' seals vouched for, so that the key's owner can prove the result.
//!
//! Memory is bounded by the result's index, its directory and one batch of data; each
//! source is read once, frame by frame, if its frames are in the order of the volume.

pub(crate) mod live;
mod moved;
mod recut;

use std::borrow::Borrow;
use std::io::Write;

use crate::error::{Error, ErrorKind, Result};
use crate::frame::MarkDetail;
use crate::header::{EpochRange, LogHeader, RecordOrder};
use crate::id::{LogId, PointId};
use crate::log::Log;
use crate::overlay::Overlay;
use crate::seal::{Mark, Seal};
use crate::source::ReadAt;
use crate::units::{Timestamp, VolumeSize};
use crate::writer::LogOptions;

/// How logs were merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MergeWay {
    /// New frames, with nothing in them but what counts.
    Recut,
    /// Frames as they were, with what no longer counts still in them.
    Moved,
}

/// What a merge brought.
#[derive(Clone, Debug)]
pub struct Merged {
    /// The new log.
    pub header: LogHeader,
    /// Its seal.
    pub seal: Seal,
    /// How it was made.
    pub way: MergeWay,
    /// The points that are gone: those before the state in which the last source ends.
    pub dropped: Vec<PointId>,
}

/// Merges consecutive logs, the oldest first, into a new one in `out`. The result takes the
/// place of all of them in the chain; its records are in no order of time. The points at the end of the last log stay; earlier
/// ones are dropped, for the states that they name are gone. Records that are cut anew bear
/// the time at which their log was sealed.
///
/// `options` count where frames are cut anew.
///
/// # Errors
/// [`ErrorKind::Chain`] if the logs do not follow one another; [`ErrorKind::KeyWrong`] if
/// they have several keys; [`ErrorKind::Invalid`] if there are none; else as
/// [`Log::read_frame`].
pub fn merge<L, R, W>(logs: &[L], out: W, options: &LogOptions) -> Result<(W, Merged)>
where
    L: Borrow<Log<R>>,
    R: ReadAt,
    W: Write,
{
    let logs: Vec<&Log<R>> = logs.iter().map(Borrow::borrow).collect();
    let (Some(first), Some(last)) = (logs.first(), logs.last()) else {
        return Err(Error::invalid("there are no logs to merge"));
    };
    check_chain(&logs)?;
    let points = Points::of(&logs)?;
    let header = LogHeader {
        log: LogId::random()?,
        previous: first.header().previous,
        previous_seal: first.header().previous_seal,
        stands_for: Some(last.header().chain_end(last.seal().digest)),
        epochs: EpochRange {
            first: first.header().epochs.first,
            last: last.header().epochs.last,
        },
        order: RecordOrder::AsRead,
        volume_size: first.header().volume_size,
        created: Timestamp::now(),
        ..last.header().clone()
    };
    let readable = |log: &&Log<R>| log.header().key.is_none() || log.key.is_some();
    let (way, (out, seal)) = if logs.iter().all(readable) {
        (
            MergeWay::Recut,
            recut::recut(&logs, out, header.clone(), options, &points.kept)?,
        )
    } else {
        (
            MergeWay::Moved,
            moved::moved(&logs, out, &header, &points.kept)?,
        )
    };
    Ok((
        out,
        Merged {
            header,
            seal,
            way,
            dropped: points.dropped,
        },
    ))
}

pub(crate) fn check_chain<R: ReadAt>(logs: &[&Log<R>]) -> Result<()> {
    for pair in logs.windows(2) {
        let [before, after] = pair else { continue };
        before.check_followed_by(after.header())?;
        if before.header().key != after.header().key {
            let what = "logs under several keys cannot be merged";
            return Err(Error::new(ErrorKind::KeyWrong, what));
        }
    }
    Ok(())
}

/// All that the logs say, as one; without what lies past the last one's end.
pub(crate) fn overlay<'a, R: ReadAt>(
    logs: &[&'a Log<R>],
) -> Overlay<impl Iterator<Item = Result<crate::extents::IndexEntry>> + use<'a, R>> {
    let size = logs
        .last()
        .map_or(VolumeSize::default(), |last| last.seal().volume_size);
    Overlay::new(logs.iter().map(|log| log.index()).collect::<Vec<_>>(), size)
}

/// The points of the sources: those that the result ends in, and all others.
pub(crate) struct Points {
    pub kept: Vec<Mark>,
    dropped: Vec<PointId>,
}

impl Points {
    pub(crate) fn of<R: ReadAt>(logs: &[&Log<R>]) -> Result<Self> {
        let mut dropped = Vec::new();
        let mut kept = Vec::new();
        for (number, log) in (1..).zip(logs) {
            let marks = log.trailer.marks.entries;
            let end = if number == logs.len() {
                trailing_tags(log)?
            } else {
                0
            };
            kept.reserve_exact(end as usize);
            for (n, mark) in (0..).zip(log.marks()) {
                let mark = mark?;
                match mark.detail {
                    _ if n >= marks - end => kept.push(mark),
                    MarkDetail::Tag(tag) => dropped.push(tag.id),
                    MarkDetail::Resize(_) => {}
                }
            }
        }
        Ok(Self { kept, dropped })
    }
}

/// How many of the last marks are tags behind which no change follows.
fn trailing_tags<R: ReadAt>(log: &Log<R>) -> Result<u64> {
    let mut count = 0;
    // Where a record would stand that follows the last tag at once.
    let mut next = (0, 0);
    for mark in log.marks() {
        let mark = mark?;
        let here = (u64::from(mark.frame.get()), mark.record);
        count = match mark.detail {
            MarkDetail::Tag(_) if here == next => count + 1,
            MarkDetail::Tag(_) => 1,
            MarkDetail::Resize(_) => 0,
        };
        next = behind(log, here)?;
    }
    let end = (u64::from(log.seal().frames), 0);
    Ok(if next == end { count } else { 0 })
}

/// The frame and the record in it that come behind a record.
fn behind<R: ReadAt>(log: &Log<R>, (frame, record): (u64, u32)) -> Result<(u64, u32)> {
    let entry = log.trailer.directory.entry(&log.source, frame)?;
    let records = entry.map_or(0, |entry| entry.records.get());
    Ok(match record.checked_add(1) {
        Some(next) if next < records => (frame, next),
        _ => (frame + 1, 0),
    })
}
