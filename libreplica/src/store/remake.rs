//! Logs that the store makes of its own ones: of several one that leaves the same behind, or of
//! one the part that is needed still. The new log takes the place of the old ones in the
//! chain, and stands for the last of them.
//!
//! In this order: the new log is written and synced, put in its place, and the folder synced; the
//! catalogue that names it, and lists the old ones as retired, is made durable; when no reader
//! of an older view is left, the old ones are deleted. A crash in between leaves files that the
//! catalogue does not name, or that it lists as retired.

use std::io::BufWriter;
use std::ops::Range;

use hrl_format::id::LogId;
use hrl_format::units::{ByteLen, Epoch};
use hrl_format::{LogHeader, Proof, Seal, SealProof};

use super::catalogue::LogEntry;
use super::durable::{self, StoreFile, damaged};
use super::epoch::BUFFER;
use super::ingest;
use super::layout::LogName;
use super::sources::{OpenFiles, StoredLog, open_log};
use super::writer::VolumeWriter;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// Where a remade log is written to.
pub(super) type Out = BufWriter<StoreFile>;

const REMAKE: &str = "write logs of the store anew";

impl VolumeWriter {
    /// Puts what `write` writes in the place of the logs of this range.
    pub(super) fn remake(
        &mut self,
        range: Range<usize>,
        write: impl FnOnce(Out) -> Result<(Out, LogHeader, Seal)>,
    ) -> Result<()> {
        let old = self.catalogue.logs[range.clone()].to_vec();
        let first = old.first().map_or(Epoch::ZERO, |log| log.first);
        let log = LogId::random().map_err(|e| Error::new(ErrorKind::Io, REMAKE).source(e))?;
        // The log's own id is known only once it is written.
        let incoming = self.folder.incoming_log(&LogName { first, log });
        let written = self.write_incoming(&incoming, write);
        let (header, seal) = written.inspect_err(|_| {
            // It may be what filled the disk.
            let _ = durable::remove(&incoming);
        })?;
        let mut entry = ingest::entry_of(&header, &seal, ByteLen::ZERO);
        let place = self.folder.log(&entry.name());
        durable::rename(&incoming, &place)?;
        let replaced = durable::sync_folder(&self.folder.logs())
            .and_then(|()| self.covers(&entry))
            .and_then(|covers| {
                entry.covers = covers;
                entry.settled = old.iter().all(|log| log.settled);
                self.replace(range, entry, &old)
            });
        replaced.inspect_err(|_| {
            if self.usable().is_ok() {
                let _ = durable::remove(&place);
            }
        })
    }

    fn write_incoming(
        &self,
        path: &std::path::Path,
        write: impl FnOnce(Out) -> Result<(Out, LogHeader, Seal)>,
    ) -> Result<(LogHeader, Seal)> {
        let file = StoreFile::create(path.to_owned())?;
        let (out, header, seal) = write(BufWriter::with_capacity(BUFFER, file))?;
        let file = out
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .at(REMAKE, path)?;
        file.sync()?;
        Ok((header, seal))
    }

    /// How much of the volume a log says something about.
    fn covers(&self, entry: &LogEntry) -> Result<ByteLen> {
        let files = OpenFiles::default().into();
        let log = open_log(&self.folder, entry, &files, self.key.as_ref())?;
        let mut covers = 0;
        for item in log.log.index() {
            covers += item.map_err(|e| log.error(REMAKE, e))?.extent.len().get();
        }
        Ok(ByteLen::new(covers))
    }

    fn replace(&mut self, range: Range<usize>, entry: LogEntry, old: &[LogEntry]) -> Result<()> {
        let mut next = self.catalogue.clone();
        let is_base = range.end <= self.foldable();
        next.logs.splice(range, [entry]);
        if let Some(base) = &mut next.base
            && is_base
            && base.epoch < entry.last
        {
            base.epoch = entry.last;
            base.size = entry.size;
        }
        self.retire(next, old)
    }

    /// Whoever has the key and writes data anew vouches for it. So a log that was merged without the
    /// key is first proved, from what it took over of those it was made of.
    pub(super) fn prove(&self, log: &StoredLog) -> Result<()> {
        if self.key.is_none() || log.log.seal().proof == SealProof::Proved {
            return Ok(());
        }
        let report = log.log.check().map_err(|e| log.error(REMAKE, e))?;
        match report.problems.into_iter().next() {
            Some(problem) => Err(log.error(REMAKE, problem)),
            None if report.proof == Proof::Whole => Ok(()),
            None => {
                let why = "it was merged without the key, and what it was made of is not proved";
                Err(damaged(REMAKE, &log.path, why))
            }
        }
    }
}
