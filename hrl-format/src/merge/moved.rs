//! Merging without the key: frames that still count for something move as they are, in
//! their order, so that the records in them, read one after the other, leave the state that
//! the merged index states.

use std::io::Write;

use super::live::{Live, kept_marks};
use super::overlay;
use crate::error::{Error, Result};
use crate::extents::IndexEntry;
use crate::frame::FrameBuffer;
use crate::header::{Features, LogHeader};
use crate::layout::PAGE;
use crate::log::Log;
use crate::mover::Mover;
use crate::seal::{Mark, Seal, SealProof};
use crate::source::ReadAt;
use crate::units::FileOffset;

pub(super) fn moved<R: ReadAt, W: Write>(
    logs: &[&Log<R>],
    out: W,
    header: &LogHeader,
    points: &[Mark],
) -> Result<(W, Seal)> {
    let Some(last) = logs.last() else {
        return Err(Error::invalid("there are no logs to merge"));
    };
    let live = Live::of(logs, points)?;
    let lz4 = logs.iter().any(|log| log.page.features.lz4);
    let mut mover = Mover::new(out, header, Features { lz4, moved: true })?;
    let mut frame = FrameBuffer::new();
    for (source, log) in logs.iter().enumerate() {
        for number in live.frames_of(source) {
            log.load_frame(number, &mut frame)?;
            mover.put(&frame)?;
        }
    }
    let index = overlay(logs).map(|piece| {
        let piece = piece?;
        let frame = live.number((piece.source.get(), piece.entry.frame))?;
        Ok(IndexEntry {
            frame,
            ..piece.entry
        })
    });
    let marks = kept_marks(logs, points).map(|kept| {
        kept.and_then(|(of, mark)| {
            Ok(Mark {
                frame: live.number(of)?,
                ..mark
            })
        })
    });
    let provenance = logs.iter().flat_map(|log| provenance_of(log));
    mover.seal(last.seal().volume_size, None, index, marks, provenance)
}

/// What vouches for a source: its own pages if its seal is proved by the key; else what it
/// has taken over from those it was made of.
fn provenance_of<R: ReadAt>(log: &Log<R>) -> impl Iterator<Item = Result<Box<[u8; PAGE]>>> + '_ {
    let taken_over = &log.trailer.provenance;
    let (header, at, pages) = if log.seal().proof == SealProof::None {
        (None, taken_over.position.get(), taken_over.pages)
    } else {
        let at = log.trailer.sections_at.get();
        let header = Some(Ok(log.page.page.clone()));
        (header, at, (log.seal().file_len.get() - at) / PAGE as u64)
    };
    let read = move |n: u64| {
        let mut page = Box::new([0; PAGE]);
        let at = FileOffset::new(at + n * PAGE as u64);
        log.source
            .read_exact_at(page.as_mut_slice(), at)
            .map(|()| page)
            .map_err(|error| Error::from_io("read the seal", error).at(at))
    };
    header.into_iter().chain((0..pages).map(read))
}
