//! The integrity check of a volume. First every log is read whole: it must be the one that
//! the catalogue names and follow the one before it, and all its checksums must hold; with the key
//! also its proofs, and those of what it was merged from. Then the points are followed from the oldest to the newest (`check_points.rs`).
//!
//! The volume may be written to meanwhile: a lease keeps the logs where they are.

use std::path::PathBuf;

use hrl_format::id::{LogId, PointId, VolumeId};
use hrl_format::units::{ByteLen, Epoch, Timestamp};

use super::catalogue::{Catalogue, LogEntry};
use super::catalogue_file;
use super::durable::damaged;
use super::lease::Wanted;
use super::output::Progress;
use super::reader::VolumeReader;
use super::sources::{OpenFiles, StoredLog, check_follows, open_log};
use crate::error::{Error, Result};

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// How many logs were read.
    pub logs: usize,
    /// How long they are, in bytes.
    pub log_bytes: ByteLen,
    /// The points, oldest first. One that retention dropped meanwhile is left out.
    pub points: Vec<PointCheck>,
    /// What is wrong with the store's files, whether or not a point needs it.
    pub faults: Vec<Fault>,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.faults.is_empty() && self.damaged().next().is_none()
    }

    /// The points that cannot be had as they were.
    pub fn damaged(&self) -> impl Iterator<Item = &PointCheck> {
        let damaged = |point: &&PointCheck| matches!(point.state, PointState::Damaged(_));
        self.points.iter().filter(damaged)
    }
}

/// What was found of one point.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PointCheck {
    /// The point.
    pub id: PointId,
    /// When the volume was so.
    pub time: Timestamp,
    /// What became of it.
    pub state: PointState,
}

/// What became of a point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PointState {
    /// It was read whole, and its root is what it must be.
    Proved,
    /// It was read whole. It carries no root; what came from logs passed their checksums.
    Readable,
    /// It is encrypted and was not read, for want of the key. Its logs passed their checksums.
    Unread,
    /// It cannot be had as it was, and why.
    Damaged(String),
}

/// Something that is wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub message: String,
}

/// A log with something wrong, and from which epoch on that may show.
#[derive(Clone, Debug)]
pub(super) struct BadLog {
    pub(super) log: LogId,
    pub(super) first: Epoch,
    /// Why nothing can be told of the points above it, unless only frames are damaged: those
    /// show where they are read.
    pub(super) unusable: Option<String>,
}

impl VolumeReader {
    /// Checks everything the store holds of the volume. Reads each log twice and the base once;
    /// takes some 16 bytes of memory for each block of the volume. `progress` is called some times a
    /// second.
    ///
    /// # Errors
    /// When nothing can be checked: neither copy of the catalogue can be used, or the
    /// store cannot be read. Damage is no error here, but in the report.
    pub fn check(&self, progress: &mut dyn FnMut(Progress)) -> Result<CheckReport> {
        let (_lease, catalogue) = self.lease(Wanted::View)?;
        let mut report = CheckReport {
            volume: catalogue.volume,
            name: catalogue.name.clone(),
            logs: catalogue.logs.len(),
            log_bytes: ByteLen::new(catalogue.logs.iter().map(|log| log.bytes.get()).sum()),
            points: Vec::new(),
            faults: self.catalogue_faults(),
        };
        let mut steps = Steps {
            done: 0,
            total: 2 * report.log_bytes.get() + catalogue.base.map_or(0, |base| base.size.get()),
            progress,
        };
        report.faults.extend(self.base_fault(&catalogue));
        let bad = self.check_logs(&catalogue, &mut report.faults, &mut steps);
        self.check_points(&catalogue, &bad, &mut report, &mut steps)?;
        steps.finish();
        Ok(report)
    }

    /// A copy of the catalogue that is damaged or gone. One that is only older is being replaced
    /// right now, or will be by the next writer.
    fn catalogue_faults(&self) -> Vec<Fault> {
        let copies = self.folder.catalogues();
        let faults = copies.iter().filter_map(|path| {
            let error = catalogue_file::check_copy(path, &self.folder).err()?;
            Some(Fault {
                path: path.clone(),
                message: error.to_string(),
            })
        });
        faults.collect()
    }

    /// A raw base that is gone or too short. What it holds is judged by the points' roots.
    fn base_fault(&self, catalogue: &Catalogue) -> Option<Fault> {
        let size = catalogue.base.filter(|_| catalogue.key.is_none())?.size;
        let path = self.folder.base();
        let message = match std::fs::metadata(&path) {
            Ok(metadata) if metadata.len() >= size.get() => return None,
            Ok(metadata) => format!("it has {} bytes, and must have {size}", metadata.len()),
            Err(error) => error.to_string(),
        };
        Some(Fault { path, message })
    }

    /// Reads every log whole.
    fn check_logs(
        &self,
        catalogue: &Catalogue,
        faults: &mut Vec<Fault>,
        steps: &mut Steps<'_>,
    ) -> Vec<BadLog> {
        let mut bad = Vec::new();
        let mut before: Option<StoredLog> = None;
        for entry in &catalogue.logs {
            let (log, errors) = self.check_log(catalogue, entry, before.as_ref());
            let unusable = self.unusable(before.as_ref(), log.as_ref(), &errors);
            before = log;
            let path = self.folder.log(&entry.name());
            if !errors.is_empty() {
                bad.push(BadLog {
                    log: entry.log,
                    first: entry.first,
                    unusable,
                });
            }
            faults.extend(errors.into_iter().map(|error| Fault {
                path: path.clone(),
                message: error.to_string(),
            }));
            steps.add(entry.bytes.get());
        }
        bad
    }

    /// Why a log says nothing that can be relied on: it cannot be opened, is of another place, or
    /// its index cannot be read. Whoever reads may not notice, for the levels have the same index.
    fn unusable(
        &self,
        before: Option<&StoredLog>,
        log: Option<&StoredLog>,
        errors: &[Error],
    ) -> Option<String> {
        let Some(log) = log else {
            return errors.first().map(ToString::to_string);
        };
        let stray = before.and_then(|before| check_follows(before, log).err());
        let index = || {
            let error = log.log.index().find_map(std::result::Result::err)?;
            Some(log.error("read the index of a log", error))
        };
        stray.or_else(index).map(|error| error.to_string())
    }

    /// The log, if it can be opened, and all that is wrong with it.
    fn check_log(
        &self,
        catalogue: &Catalogue,
        entry: &LogEntry,
        before: Option<&StoredLog>,
    ) -> (Option<StoredLog>, Vec<Error>) {
        const READ: &str = "check a log of the store";
        let files = OpenFiles::default().into();
        let log = match open_log(&self.folder, entry, &files, self.key.as_ref()) {
            Ok(log) => log,
            Err(error) => return (None, vec![error]),
        };
        let mut errors = Vec::new();
        if let Some(before) = before {
            errors.extend(check_follows(before, &log).err());
        } else if let Some(last) = catalogue.base.and_then(|base| base.last)
            && catalogue.logs.first() == Some(entry)
            && log.log.header().previous != Some(last.log)
        {
            let why = format!("it does not follow log {}, the last in the base", last.log);
            errors.push(damaged(READ, &log.path, why));
        }
        match log.log.check() {
            Ok(report) => {
                let more = report.more_problems;
                errors.extend(report.problems.into_iter().map(|e| log.error(READ, e)));
                if more > 0 {
                    errors.push(damaged(
                        READ,
                        &log.path,
                        format!("and {more} more problems"),
                    ));
                }
            }
            Err(error) => errors.push(log.error(READ, error)),
        }
        (Some(log), errors)
    }
}

/// How far the check is.
pub(super) struct Steps<'a> {
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl Steps<'_> {
    pub(super) fn add(&mut self, bytes: u64) {
        self.done = (self.done + bytes).min(self.total);
        self.report();
    }

    fn finish(&mut self) {
        self.done = self.total;
        self.report();
    }

    fn report(&mut self) {
        (self.progress)(Progress {
            done: ByteLen::new(self.done),
            total: ByteLen::new(self.total),
        });
    }
}
