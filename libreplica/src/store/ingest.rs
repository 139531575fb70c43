//! Taking a sealed log into the chain, in this order: the log is synced; it is put in its place
//! and the folder synced; the catalogue that names it is made durable. Only then is the
//! epoch acknowledged. A crash in between leaves a file that no catalogue names.

use hrl_format::record::Tag;
use hrl_format::units::ByteLen;
use hrl_format::{LogHeader, Seal};

use super::catalogue::{Catalogue, LogEntry, LogLink, Point};
use super::epoch::SealedEpoch;
use super::moment::LogOrder;
use crate::error::{Error, ErrorKind, Result};

const INGEST: &str = "take a log into the store";

/// Why a log is not the next of a volume's chain, if it is not.
pub(super) fn check_next(catalogue: &Catalogue, header: &LogHeader) -> Result<()> {
    let refuse = |kind, why: String| {
        Err(Error::new(kind, INGEST)
            .volume(catalogue.volume)
            .detail(format!("log {}: {why}", header.log)))
    };
    if header.volume != catalogue.volume {
        return refuse(
            ErrorKind::Foreign,
            format!("it is of volume {}", header.volume),
        );
    }
    let (ours, theirs) = (catalogue.generation.generation(), header.generation);
    if theirs.number != ours.number || theirs.id != ours.id {
        let why = format!(
            "it is of generation {} {}, the store holds generation {} {}",
            theirs.number, theirs.id, ours.number, ours.id
        );
        let kind = if theirs.number < ours.number {
            "stale"
        } else if theirs.number == ours.number {
            "a fork"
        } else {
            "not known here"
        };
        return refuse(ErrorKind::Foreign, format!("{kind}: {why}"));
    }
    if header.key != catalogue.key {
        return refuse(
            ErrorKind::Key,
            "it is encrypted otherwise than the volume".to_owned(),
        );
    }
    check_place(catalogue, header).or_else(|why| refuse(ErrorKind::Foreign, why))
}

/// Whether it follows the last log: by epoch, id and seal.
fn check_place(catalogue: &Catalogue, header: &LogHeader) -> Result<(), String> {
    let expected = catalogue.last_epoch().next();
    let head = catalogue.head();
    if header.epochs.first != expected {
        return Err(format!(
            "it begins with epoch {}, expected {expected}",
            header.epochs.first
        ));
    }
    if header.previous != head.map(|link| link.log) {
        let name = |log: Option<_>| {
            log.map_or("none".to_owned(), |log: hrl_format::id::LogId| {
                log.to_string()
            })
        };
        let (theirs, ours) = (name(header.previous), name(head.map(|link| link.log)));
        return Err(format!(
            "a fork: it follows log {theirs}, the last one here is {ours}"
        ));
    }
    match (header.previous_seal, head) {
        (Some(theirs), Some(link)) if theirs != link.seal => Err(format!(
            "a fork: it follows log {} sealed as {theirs}, here it is sealed as {}",
            link.log, link.seal
        )),
        _ => Ok(()),
    }
}

/// What an ingested log adds to the catalogue.
pub(super) fn added(catalogue: &Catalogue, log: &SealedEpoch) -> Result<(LogEntry, Vec<Point>)> {
    let entry = LogEntry {
        order: log.order,
        ..entry_of(&log.header, &log.seal, log.covers)
    };
    let mut points: Vec<Point> = Vec::new();
    for tag in &log.tags {
        let known = catalogue.point(tag.id).is_some() || points.iter().any(|p| p.id == tag.id);
        if known {
            return Err(Error::new(ErrorKind::Exists, INGEST)
                .volume(catalogue.volume)
                .detail(format!("point {} is there already", tag.id)));
        }
        points.push(point_of(catalogue, &entry, tag));
    }
    if let Some(first) = points.first_mut() {
        first.bytes = ByteLen::new(entry.bytes.get() + since_last_point(catalogue));
    }
    Ok((entry, points))
}

/// What the catalogue says of a log that says something about `covers` bytes of the volume, and
/// of which only the end is of interest.
pub(super) fn entry_of(header: &LogHeader, seal: &Seal, covers: ByteLen) -> LogEntry {
    let stands_for = header.stands_for.and_then(|end| {
        let seal = end.seal?;
        Some(LogLink { log: end.log, seal })
    });
    LogEntry {
        log: header.log,
        seal: seal.digest,
        stands_for,
        first: header.epochs.first,
        last: header.epochs.last,
        size: seal.volume_size,
        bytes: seal.file_len,
        covers,
        order: LogOrder::AsRead,
        settled: false,
    }
}

/// Of an encrypted volume nothing is listed that the log keeps secret.
fn point_of(catalogue: &Catalogue, entry: &LogEntry, tag: &Tag) -> Point {
    let open = catalogue.key.is_none();
    Point {
        id: tag.id,
        epoch: entry.last,
        time: tag.time,
        consistency: tag.consistency,
        label: if open {
            tag.label.clone()
        } else {
            String::new()
        },
        group: tag.group.filter(|_| open),
        root: tag.root.filter(|_| open),
        size: entry.size,
        bytes: ByteLen::ZERO,
    }
}

/// Fills in what an encrypted volume's catalogue leaves out, for who wrote the tags.
pub(super) fn reveal(points: &mut [Point], tags: &[Tag]) {
    for (point, tag) in points.iter_mut().zip(tags) {
        point.label.clone_from(&tag.label);
        point.group = tag.group;
        point.root = tag.root;
    }
}

/// Bytes of the logs behind the newest point: epochs without one.
fn since_last_point(catalogue: &Catalogue) -> u64 {
    let base = catalogue.base.map(|base| base.epoch);
    let last = catalogue.points.last().map(|point| point.epoch).max(base);
    let behind = |log: &&LogEntry| Some(log.first) > last;
    catalogue
        .logs
        .iter()
        .rev()
        .take_while(behind)
        .map(|log| log.bytes.get())
        .sum()
}
