//! Folding: the oldest logs, which no point needs any more, go into the base, and their room is
//! given back. Never past the oldest point, and a point that is read stays listed, so never past
//! an open one either.
//!
//! Where there is no image, with a key, the logs up to the oldest point are the base, and folding
//! keeps them few and short: neighbours are merged (`merge.rs`), and logs of which much has
//! become useless written anew (`compact.rs`). So are the logs between two points, with a key
//! or without.
//!
//! Into an image logs go in this order: their final state is written and synced; the catalogue
//! that begins behind them is made durable; when no reader of an older view is left, they are
//! deleted. A crash before the catalogue leaves an image whose every changed byte is still
//! covered by the logs over it; a crash after it leaves files that the catalogue lists as retired.

use hrl_format::units::{ByteLen, VolumeSize};
use hrl_format::{ExtentKind, Overlay, Piece};

use super::base::BaseWriter;
use super::catalogue::{Base, LogEntry, RetiredLog};
use super::durable;
use super::frames::{Frames, Wanted};
use super::lease;
use super::levels::LevelStep;
use super::sources::{StoredLog, blame, open_chain};
use super::writer::VolumeWriter;
use crate::error::{ErrorKind, Result};

const FOLD: &str = "fold logs into the base";
/// How many bytes are read from logs at once, and then written.
const BATCH: usize = 4 << 20;

/// What a step of folding did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoldStep {
    /// Nothing: there is nothing to fold.
    Nothing,
    /// Logs left the chain.
    Folded {
        /// How many.
        logs: usize,
        /// How long they were, in bytes.
        bytes: ByteLen,
    },
    /// Logs became one.
    Merged {
        /// How many.
        logs: usize,
        /// How long they were, in bytes.
        bytes: ByteLen,
    },
    /// A log was written anew, without what is no longer needed of it.
    Compacted {
        /// How long it was, in bytes.
        bytes: ByteLen,
    },
    /// Indexes of logs were merged, or a part of that was done, so that points on thousands of
    /// logs open at once.
    Indexed,
}

impl VolumeWriter {
    /// Gives back room that no point needs, some 256 MiB at a time: folds the oldest logs into the
    /// base image, or merges and compacts those of an encrypted base; the same with logs between
    /// points that were dropped. Deletes logs that earlier steps replaced and the last reader has
    /// let go of. When there is no more of that, merges indexes, so that points open fast. To be
    /// called until it says [`FoldStep::Nothing`].
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if a log does not hold what it must, which then stays;
    /// the system's. The store stays as it was, whatever part of the work was done. Where the image
    /// has holes, folding needs room before it gives some back: [`ErrorKind::Full`].
    pub fn fold_step(&mut self) -> Result<FoldStep> {
        self.usable()?;
        let step = self.next_step();
        let step = step.map_err(|e| lease::explain_full(&self.folder, e))?;
        self.delete_retired()?;
        match step {
            FoldStep::Nothing => Ok(self.index_step()),
            step => Ok(step),
        }
    }

    fn index_step(&mut self) -> FoldStep {
        match self.level_step() {
            LevelStep::Nothing => FoldStep::Nothing,
            LevelStep::Worked => FoldStep::Indexed,
        }
    }

    /// What needs less room is tried where there is none: it may give some back.
    fn next_step(&mut self) -> Result<FoldStep> {
        let is_full =
            |step: &Result<FoldStep>| matches!(step, Err(e) if e.kind() == ErrorKind::Full);
        let foldable = self.foldable();
        if self.catalogue.key.is_none() && foldable > 0 {
            let folded = self.fold_into_image(foldable);
            if is_full(&folded) && foldable > 1 {
                return self.fold_into_image(1);
            }
            return folded;
        }
        let Some(range) = self.mergeable() else {
            return self.compact_step();
        };
        let merged = self.merge(range);
        if is_full(&merged)
            && let Ok(step @ FoldStep::Compacted { .. }) = self.compact_step()
        {
            return Ok(step);
        }
        merged
    }

    /// How many of the oldest logs no point needs.
    pub(super) fn foldable(&self) -> usize {
        let catalogue = &self.catalogue;
        let oldest = catalogue.points.first().map(|point| point.epoch);
        let limit = oldest.unwrap_or(catalogue.last_epoch());
        catalogue.logs.partition_point(|log| log.last <= limit)
    }

    fn fold_into_image(&mut self, foldable: usize) -> Result<FoldStep> {
        let mut bytes = 0;
        let fits = |log: &&LogEntry| {
            bytes += log.bytes.get();
            bytes <= self.log_bytes.get()
        };
        let logs = &self.catalogue.logs[..foldable];
        let count = logs.iter().take_while(fits).count().max(1);
        let logs = logs[..count].to_vec();
        let Some(last) = logs.last() else {
            return Ok(FoldStep::Nothing);
        };
        let mut base = BaseWriter::open(&self.folder)?;
        self.write_final_state(&logs, last.size, &mut base)?;
        base.sync()?;
        let mut next = self.catalogue.clone();
        next.base = Some(Base {
            epoch: last.last,
            size: last.size,
            last: Some(last.link()),
        });
        next.logs.drain(..count);
        self.retire(next, &logs)?;
        // Only now: until then the image must be as long as the catalogue says.
        base.cut(last.size)?;
        Ok(FoldStep::Folded {
            logs: count,
            bytes: ByteLen::new(logs.iter().map(|log| log.bytes.get()).sum()),
        })
    }

    /// Writes into the image what the logs leave behind.
    fn write_final_state(
        &self,
        entries: &[LogEntry],
        size: VolumeSize,
        base: &mut BaseWriter,
    ) -> Result<()> {
        let logs = open_chain(&self.folder, entries, self.key.as_ref())?;
        let indexes = logs.iter().map(|log| log.log.index());
        let mut frames = Frames::default();
        base.grow(size)?;
        let mut batch = Vec::new();
        let mut len = 0;
        for piece in Overlay::new(indexes, size) {
            let piece = piece.map_err(|e| blame(&logs, FOLD, e))?;
            match piece.kind() {
                ExtentKind::Write => {
                    len += piece.extent().len().get() as usize;
                    batch.push(piece);
                }
                ExtentKind::Zeroes | ExtentKind::Discard => base.zeroes(piece.extent())?,
            }
            if len >= BATCH {
                write_pieces(&logs, &mut frames, &batch, base)?;
                batch.clear();
                len = 0;
            }
        }
        write_pieces(&logs, &mut frames, &batch, base)
    }

    /// Makes `next` the catalogue, of a new view that does without `logs`.
    pub(super) fn retire(
        &mut self,
        mut next: super::catalogue::Catalogue,
        logs: &[LogEntry],
    ) -> Result<()> {
        next.view = next.view.next();
        let since = next.view;
        let retired = logs.iter().map(|&entry| RetiredLog { entry, since });
        next.retired.extend(retired);
        lease::prepare(&self.folder.view_lease(since))?;
        self.save(next)
    }

    /// Deletes the logs that nobody needs. The catalogue on disk may go on listing them as
    /// retired until its next change.
    pub(super) fn delete_retired(&mut self) -> Result<()> {
        if self.catalogue.retired.is_empty() {
            return Ok(());
        }
        let oldest = lease::oldest_view(&self.folder, self.catalogue.view)?;
        for retired in &self.catalogue.retired {
            if retired.since <= oldest {
                durable::remove(&self.folder.log(&retired.entry.name()))?;
            }
        }
        self.catalogue
            .retired
            .retain(|retired| retired.since > oldest);
        Ok(())
    }
}

/// Reads the data of pieces, all at once, and writes what adjoins in one go.
fn write_pieces(
    logs: &[StoredLog],
    frames: &mut Frames,
    pieces: &[Piece],
    base: &mut BaseWriter,
) -> Result<()> {
    let lens = pieces.iter().map(|piece| piece.extent().len().get());
    let mut buffer = vec![0; lens.sum::<u64>() as usize];
    let mut rest = &mut buffer[..];
    let mut wanted = Vec::with_capacity(pieces.len());
    for &piece in pieces {
        let (into, behind) = rest.split_at_mut(piece.extent().len().get() as usize);
        rest = behind;
        wanted.push(Wanted { piece, into });
    }
    frames.read_all(logs, wanted)?;
    let mut data = &buffer[..];
    let adjoin = |a: &Piece, b: &Piece| a.extent().end() == b.extent().offset();
    for run in pieces.chunk_by(adjoin) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            continue;
        };
        let start = first.extent().offset();
        let len = last.extent().end().get() - start.get();
        let (bytes, behind) = data.split_at(len as usize);
        base.write(start, bytes)?;
        data = behind;
    }
    Ok(())
}
