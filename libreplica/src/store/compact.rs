//! Compaction: a log of which newer ones have made much useless is written anew, with what
//! of it is needed still. It stays where it is in the chain. So the room that an encrypted base
//! takes, and the logs between two points, stay within twice of what they hold, at the price of a
//! log's length of room at a time.
//!
//! What is needed is found from the indexes of all logs of a stretch without points. They are
//! looked through when the logs that came since the last time say something about an eighth as
//! many bytes as the stretch has; each log of which then a third is useless is written anew.
//! Without the key of an encrypted volume frames cannot be cut: such logs wait.

use std::io::Write;
use std::ops::Range;

use hrl_format::id::LogId;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, ByteOffset, Epoch, Extent, Timestamp};
use hrl_format::{
    ExtentKind, Gather, Log, LogHeader, LogWriter, Overlay, Piece, RecordOrder, Seal, SealProof,
    SourceNumber,
};

use super::catalogue::{Catalogue, LogEntry};
use super::fold::FoldStep;
use super::sources::{LogFile, StoredLog, blame, open_chain};
use super::writer::VolumeWriter;
use crate::error::{Error, ErrorKind, Result};

/// Data that is held at a time.
const MEMORY: ByteLen = ByteLen::new(32 << 20);

const LOOK: &str = "look which logs are needed";
const COMPACT: &str = "write a log of the store anew";

/// How much of a log's data is needed.
#[derive(Clone, Copy, Debug)]
struct Use {
    data: u64,
    needed: u64,
    proof: SealProof,
}

impl Use {
    /// A log that was merged without the key carries what vouches for it, until it is written anew.
    fn is_sparse(self) -> bool {
        self.proof == SealProof::None && self.data > 0 || self.needed * 3 < self.data * 2
    }
}

/// Logs of the store that wait to be compacted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// How many.
    pub logs: u64,
    /// How long they are together.
    pub bytes: ByteLen,
}

impl Catalogue {
    /// What waits to be compacted: logs of which it was not looked yet what newer ones made
    /// useless, because too little has changed since, or nobody with the key of an encrypted
    /// volume has been there; and those of which too much was found to be.
    pub fn waiting(&self) -> Waiting {
        let stretches = self.stretches().into_iter();
        let logs = stretches.flat_map(|stretch| &self.logs[stretch]);
        let mut waiting = Waiting::default();
        for log in logs.filter(|log| !log.settled) {
            waiting.logs += 1;
            waiting.bytes = ByteLen::new(waiting.bytes.get() + log.bytes.get());
        }
        waiting
    }
}

impl VolumeWriter {
    /// Writes the log anew of which the least is needed, if of any it is too little.
    pub(super) fn compact_step(&mut self) -> Result<FoldStep> {
        if self.catalogue.key.is_some() && self.key.is_none() {
            return Ok(FoldStep::Nothing);
        }
        if self.sparse.is_empty() {
            self.look()?;
        }
        while let Some(&log) = self.sparse.last() {
            let step = self.compact(log);
            // On a full store it comes first when there is room.
            if !matches!(&step, Err(e) if e.kind() == ErrorKind::Full) {
                self.sparse.pop();
            }
            match step? {
                FoldStep::Nothing => {}
                step => return Ok(step),
            }
        }
        Ok(FoldStep::Nothing)
    }

    /// Looks through the stretches that changed enough.
    fn look(&mut self) -> Result<()> {
        let mut sparse: Vec<(u64, Epoch, LogId)> = Vec::new();
        for stretch in self.catalogue.stretches() {
            let logs = &self.catalogue.logs[stretch.clone()];
            if !is_due(logs) {
                continue;
            }
            let uses = self.uses(logs)?;
            for (log, used) in self.catalogue.logs[stretch].iter_mut().zip(uses) {
                // What is sparse counts as not looked at until it is written anew, also if this
                // process ends before.
                log.settled = !used.is_sparse();
                if used.is_sparse() {
                    let permille = used.needed.saturating_mul(1000) / used.data.max(1);
                    sparse.push((permille, log.first, log.log));
                }
            }
        }
        sparse.sort_unstable();
        self.sparse = sparse.into_iter().rev().map(|(.., log)| log).collect();
        Ok(())
    }

    /// How much of each log is needed at the end of the last.
    fn uses(&self, entries: &[LogEntry]) -> Result<Vec<Use>> {
        let logs = open_chain(&self.folder, entries, self.key.as_ref())?;
        let unused = |log: &StoredLog| Use {
            data: log.log.seal().data.get(),
            needed: 0,
            proof: match self.key {
                Some(_) => log.log.seal().proof,
                None => SealProof::Proved,
            },
        };
        let mut uses: Vec<Use> = logs.iter().map(unused).collect();
        let size = entries.last().map(|log| log.size).unwrap_or_default();
        for piece in Overlay::new(logs.iter().map(|log| log.log.index()), size) {
            let piece = piece.map_err(|e| blame(&logs, LOOK, e))?;
            if piece.kind() == ExtentKind::Write
                && let Some(used) = uses.get_mut(piece.source.get())
            {
                used.needed += piece.extent().len().get();
            }
        }
        Ok(uses)
    }

    /// Writes a log anew with what is needed of it. Nothing, if it is gone or behind the newest
    /// point now.
    fn compact(&mut self, id: LogId) -> Result<FoldStep> {
        let Some(at) = self.catalogue.logs.iter().position(|log| log.log == id) else {
            return Ok(FoldStep::Nothing);
        };
        let stretches = self.catalogue.stretches();
        let Some(stretch) = stretches.into_iter().find(|range| range.contains(&at)) else {
            return Ok(FoldStep::Nothing);
        };
        let bytes = self.catalogue.logs[at].bytes;
        self.write_needed(at..stretch.end)?;
        // Known to be needed, in what it holds now.
        if let Some(log) = self.catalogue.logs.get_mut(at) {
            log.settled = true;
        }
        Ok(FoldStep::Compacted { bytes })
    }

    /// Replaces the first of these logs by what the others leave of it.
    fn write_needed(&mut self, logs: Range<usize>) -> Result<()> {
        let entries = self.catalogue.logs[logs.clone()].to_vec();
        let stored = open_chain(&self.folder, &entries, self.key.as_ref())?;
        let (Some(first), Some(last)) = (stored.first(), entries.last()) else {
            return Ok(());
        };
        self.prove(first)?;
        let span = span_of(first)?;
        let mut indexes = Vec::with_capacity(stored.len());
        for log in &stored {
            indexes.push(log.log.index_in(span).map_err(|e| log.error(COMPACT, e))?);
        }
        let own = |piece: &hrl_format::Result<Piece>| {
            piece
                .as_ref()
                .map_or(true, |piece| piece.source == SourceNumber::default())
        };
        let pieces = Overlay::new(indexes, last.size).filter(own);
        let id = LogId::random().map_err(|e| Error::new(ErrorKind::Io, COMPACT).source(e))?;
        let (options, key) = (self.options.clone(), self.key.clone());
        self.remake(logs.start..logs.start + 1, |out| {
            let header = LogHeader {
                log: id,
                stands_for: Some(first.log.header().chain_end(first.log.seal().digest)),
                created: Timestamp::now(),
                order: RecordOrder::AsRead,
                ..first.log.header().clone()
            };
            let begun = LogWriter::create(out, header.clone(), &options, key.as_ref());
            let written = begun.and_then(|writer| write_pieces(writer, &first.log, pieces));
            let (out, seal) = written.map_err(|e| blame(&stored, COMPACT, e))?;
            Ok((out, header, seal))
        })
    }
}

/// Whether much may have become useless since the logs were looked through.
fn is_due(logs: &[LogEntry]) -> bool {
    let unsettled = logs.iter().filter(|log| !log.settled);
    let covers = unsettled.fold(0, |sum: u64, log| sum.saturating_add(log.covers.get()));
    let bytes: u64 = logs.iter().map(|log| log.bytes.get()).sum();
    covers > 0 && covers >= bytes / 8
}

/// From the first to the last byte that a log says something about.
fn span_of(log: &StoredLog) -> Result<Extent> {
    let mut span: Option<Extent> = None;
    for entry in log.log.index() {
        let extent = entry.map_err(|e| log.error(COMPACT, e))?.extent;
        let start = span.map_or(extent.offset(), |span| span.offset());
        span = Some(Extent::between(start, extent.end()));
    }
    Ok(span.unwrap_or(Extent::between(ByteOffset::ZERO, ByteOffset::ZERO)))
}

/// Writes `pieces` of `log`, and the points that it ends in.
fn write_pieces<W: Write>(
    mut writer: LogWriter<W>,
    log: &Log<LogFile>,
    pieces: impl Iterator<Item = hrl_format::Result<Piece>>,
) -> hrl_format::Result<(W, Seal)> {
    let time = log.seal().sealed;
    let size = log.seal().volume_size;
    if size != log.header().volume_size {
        writer.append(&Record::Resize { size }, time)?;
    }
    let logs = [log];
    let mut gather = Gather::new(&logs, pieces, MEMORY);
    while let Some(batch) = gather.next_batch()? {
        for (piece, data) in batch.iter() {
            let extent = piece.extent();
            let record = match piece.kind() {
                ExtentKind::Write => Record::Write { extent, data },
                ExtentKind::Zeroes => Record::Zeroes { extent },
                ExtentKind::Discard => Record::Discard { extent },
            };
            writer.append(&record, time)?;
        }
    }
    for tag in log.tags() {
        let tag = tag?;
        let time = tag.time;
        writer.append(&Record::Tag(tag), time)?;
    }
    writer.seal()
}
