//! The last pass of a check, with the key, of a log that was merged without it: the merge
//! is done again on paper, from the lists that the sources' seals vouch for, and must come
//! out as the log is. So whoever merged it left nothing out and put nothing in.

use super::Proof;
use super::leaf::{Leaf, LeafSource};
use crate::error::{Error, ErrorKind, Result};
use crate::extents::IndexEntry;
use crate::header::{LogHeader, RecordOrder};
use crate::log::Log;
use crate::merge::live::{FrameOf, Live, kept_marks};
use crate::merge::{Points, check_chain, overlay};
use crate::seal::{Mark, SealProof};
use crate::source::ReadAt;

/// What the leaves prove of `log`; an error if they prove it wrong.
pub(super) fn prove<R: ReadAt>(log: &Log<R>, leaves: &[Leaf]) -> Result<Proof> {
    let mut sources = Vec::new();
    for leaf in leaves {
        // A torn log has no seal that could vouch for its being complete.
        let Some(source) = LeafSource::new(&log.source, leaf) else {
            return Ok(Proof::Frames);
        };
        let source = Log::open(source, log.key.as_ref())?;
        if source.seal().proof != SealProof::Proved {
            return Err(forged(
                "a log it was merged from was not sealed with the key",
            ));
        }
        source.check_seal()?;
        sources.push(source);
    }
    let sources: Vec<&Log<_>> = sources.iter().collect();
    let (Some(first), Some(last)) = (sources.first(), sources.last()) else {
        return Ok(Proof::Frames);
    };
    check_chain(&sources)?;
    check_header(log.header(), first.header(), last)?;
    if log.seal().volume_size != last.seal().volume_size {
        return Err(forged(
            "the volume's size is not that of the logs it was merged from",
        ));
    }
    let points = Points::of(&sources)?.kept;
    let live = Live::of(&sources, &points)?;
    check_frames(log, &sources, &live)?;
    let index = overlay(&sources).map(|piece| {
        let piece = piece?;
        let frame = live.number((piece.source.get(), piece.entry.frame))?;
        Ok(IndexEntry {
            frame,
            ..piece.entry
        })
    });
    same(
        index,
        log.index(),
        "the index is not what the logs it was merged from come to",
    )?;
    let marks = kept_marks(&sources, &points).map(|kept: Result<(FrameOf, Mark)>| {
        kept.and_then(|(of, mark)| {
            Ok(Mark {
                frame: live.number(of)?,
                ..mark
            })
        })
    });
    same(
        marks,
        log.marks(),
        "the points are not those of the logs it was merged from",
    )?;
    Ok(Proof::Whole)
}

/// Whether the header is that of a merge of logs from `first` to `last`.
fn check_header<R: ReadAt>(merged: &LogHeader, first: &LogHeader, last: &Log<R>) -> Result<()> {
    let expected = LogHeader {
        log: merged.log,
        created: merged.created,
        previous: first.previous,
        previous_seal: first.previous_seal,
        stands_for: Some(last.header().chain_end(last.seal().digest)),
        epochs: crate::header::EpochRange {
            first: first.epochs.first,
            last: last.header().epochs.last,
        },
        order: RecordOrder::AsRead,
        volume_size: first.volume_size,
        ..last.header().clone()
    };
    if *merged != expected {
        return Err(forged(
            "the header is not that of the logs it was merged from",
        ));
    }
    Ok(())
}

/// Whether the frames are those that count for something, by the cipher's proof of each.
fn check_frames<R: ReadAt, S: ReadAt>(
    log: &Log<R>,
    sources: &[&Log<S>],
    live: &Live,
) -> Result<()> {
    let expected = sources.iter().enumerate().flat_map(|(source, log)| {
        live.frames_of(source).map(|frame| {
            let entry = log
                .trailer
                .directory
                .entry(&log.source, u64::from(frame.get()))?;
            Ok(entry.map(|entry| entry.cipher_tag))
        })
    });
    let found = log
        .directory()
        .map(|entry| entry.map(|entry| Some(entry.cipher_tag)));
    same(
        expected,
        found,
        "the frames are not those of the logs it was merged from",
    )
}

fn same<T: PartialEq>(
    expected: impl Iterator<Item = Result<T>>,
    found: impl Iterator<Item = Result<T>>,
    otherwise: &str,
) -> Result<()> {
    let mut found = found;
    for expected in expected {
        if Some(expected?) != found.next().transpose()? {
            return Err(forged(otherwise));
        }
    }
    found
        .next()
        .transpose()?
        .map_or(Ok(()), |_| Err(forged(otherwise)))
}

fn forged(what: &str) -> Error {
    Error::new(ErrorKind::Forged, what)
}
