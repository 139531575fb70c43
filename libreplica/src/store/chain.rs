//! The chain of logs below a point, each opened when it is first needed: it must be the one
//! that the catalogue lists, and follow the one before it. Those not used for longest are closed again
//! when there are many, so that what is held follows what is read, not how many logs there are.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use hrl_format::units::FileOffset;
use hrl_format::{ReadAt, SourceNumber, VolumeKey};

use super::catalogue::LogEntry;
use super::durable::damaged;
use super::layout::VolumeFolder;
use super::sources::{LogFile, OpenFiles, StoredLog, log_file, open_file};
use crate::error::{Error, ErrorKind, IoContext, Result};

/// How many logs are held open; each takes some 5 KiB.
const HELD: usize = 1024;

/// Logs that can be asked for by their number.
pub(super) trait Logs {
    /// One of them.
    type Log<'a>: Deref<Target = StoredLog>
    where
        Self: 'a;

    /// The log of this number, the oldest being 0.
    fn log(&self, number: SourceNumber) -> Result<Self::Log<'_>>;

    /// Fills `buffer` from its file, of which that part was checked before.
    fn read_at(&self, number: SourceNumber, at: FileOffset, buffer: &mut [u8]) -> Result<()>;
}

const READ: &str = "read a log of the store";

impl Logs for [StoredLog] {
    type Log<'a> = &'a StoredLog;

    fn log(&self, number: SourceNumber) -> Result<&StoredLog> {
        self.get(number.get()).ok_or_else(none)
    }

    fn read_at(&self, number: SourceNumber, at: FileOffset, buffer: &mut [u8]) -> Result<()> {
        let log = self.log(number)?;
        let read = log.log.source().read_exact_at(buffer, at);
        read.at(READ, &log.path)
    }
}

impl Logs for Chain {
    type Log<'a> = Arc<StoredLog>;

    fn log(&self, number: SourceNumber) -> Result<Arc<StoredLog>> {
        self.get(number.get())
    }

    /// The log itself need not be open for it.
    fn read_at(&self, number: SourceNumber, at: FileOffset, buffer: &mut [u8]) -> Result<()> {
        let file = self.file(number.get())?;
        let read = file.read_exact_at(buffer, at);
        read.map_err(|e| Error::io(READ, e).path(file.path()))
    }
}

fn none() -> Error {
    Error::new(ErrorKind::Invalid, READ).detail("a piece of a log that is not there")
}

/// Consecutive logs of a volume.
pub(super) struct Chain {
    folder: VolumeFolder,
    entries: Vec<LogEntry>,
    key: Option<VolumeKey>,
    /// The logs' files, each named when it is first read.
    files: Vec<OnceLock<LogFile>>,
    open_files: Arc<OpenFiles>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    logs: HashMap<usize, (Arc<StoredLog>, u64)>,
    /// Counts uses, to find the log not used for longest.
    uses: u64,
}

impl Chain {
    pub(super) fn new(
        folder: &VolumeFolder,
        entries: &[LogEntry],
        key: Option<&VolumeKey>,
    ) -> Self {
        Self {
            folder: folder.clone(),
            entries: entries.to_vec(),
            key: key.cloned(),
            files: vec![OnceLock::new(); entries.len()],
            open_files: Arc::default(),
            open: Mutex::default(),
        }
    }

    pub(super) fn folder(&self) -> &VolumeFolder {
        &self.folder
    }

    /// What the catalogue says of them, the oldest first.
    pub(super) fn entries(&self) -> &[LogEntry] {
        &self.entries
    }

    /// The log of this number, opened and checked.
    pub(super) fn get(&self, number: usize) -> Result<Arc<StoredLog>> {
        if let Some(log) = self.lock().get(number) {
            return Ok(log);
        }
        // Others may open theirs meanwhile.
        let log = Arc::new(self.open(number)?);
        self.lock().keep(number, Arc::clone(&log));
        Ok(log)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // A panic elsewhere leaves at worst a log more or less in the table.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self, number: usize) -> Result<&LogFile> {
        let file = self.files.get(number).ok_or_else(none)?;
        let entry = self.entries.get(number).ok_or_else(none)?;
        Ok(file.get_or_init(|| log_file(&self.folder, entry, &self.open_files)))
    }

    fn open(&self, number: usize) -> Result<StoredLog> {
        let entry = self.entries.get(number).ok_or_else(none)?;
        let file = self.file(number)?.clone();
        let log = open_file(file, &self.folder, entry, self.key.as_ref())?;
        let before = number.checked_sub(1).and_then(|n| self.entries.get(n));
        match before.and_then(|before| not_behind(before, &log)) {
            Some(why) => Err(damaged("follow the chain of logs", &log.path, why)),
            None => Ok(log),
        }
    }
}

impl Open {
    fn get(&mut self, number: usize) -> Option<Arc<StoredLog>> {
        self.uses += 1;
        let (log, used) = self.logs.get_mut(&number)?;
        *used = self.uses;
        Some(Arc::clone(log))
    }

    fn keep(&mut self, number: usize, log: Arc<StoredLog>) {
        if self.logs.len() >= HELD {
            // A quarter at once, so that it is seldom looked which.
            let mut uses: Vec<u64> = self.logs.values().map(|(_, used)| *used).collect();
            let (_, &mut limit, _) = uses.select_nth_unstable(HELD / 4);
            self.logs.retain(|_, (_, used)| *used > limit);
        }
        self.logs.insert(number, (log, self.uses));
    }
}

/// Why a log is not the successor of the one that the catalogue lists before it.
fn not_behind(before: &LogEntry, log: &StoredLog) -> Option<String> {
    let (header, link) = (log.log.header(), before.link());
    let seal = header.previous_seal.unwrap_or(link.seal);
    if header.previous != Some(link.log) || seal != link.seal {
        return Some(format!("it does not follow log {}", link.log));
    }
    if header.epochs.first != before.last.next() {
        let first = header.epochs.first;
        return Some(format!("epoch {first} follows epoch {}", before.last));
    }
    (header.volume_size != before.size).then(|| {
        let (theirs, ours) = (header.volume_size, before.size);
        format!("a volume of {theirs} bytes follows one of {ours}")
    })
}
