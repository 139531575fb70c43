//! The logs under a point, open for reading. A point may lie on thousands of logs, and a process
//! may have a thousand files open: so a log's file is opened when it is read, and of those open the one
//! not read for longest is closed to make room. That is safe because the reader's lease keeps
//! the files where they are.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hrl_format::units::FileOffset;
use hrl_format::{Log, ReadAt, RecordOrder, VolumeKey};

use super::catalogue::LogEntry;
use super::durable::damaged;
use super::layout::VolumeFolder;
use crate::error::{Error, ErrorKind, Result};

/// How many log files one reader keeps open: a quarter of the usual limit of a process.
const OPEN_FILES: usize = 256;

/// Files that are open now.
#[derive(Debug, Default)]
pub(super) struct OpenFiles {
    table: Mutex<Table>,
    /// How many files have been named so far.
    named: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    files: HashMap<u64, (Arc<File>, u64)>,
    /// Counts uses, to find the file not used for longest.
    uses: u64,
}

impl OpenFiles {
    /// The file that bears this number, and lies at `path`.
    fn get(&self, number: u64, path: &Path) -> io::Result<Arc<File>> {
        if let Some(file) = self.lock().get(number) {
            return Ok(file);
        }
        // Others may open theirs meanwhile.
        let file = Arc::new(File::open(path)?);
        self.lock().keep(number, Arc::clone(&file));
        Ok(file)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // A panic elsewhere leaves at worst a file more or less in the table.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn get(&mut self, number: u64) -> Option<Arc<File>> {
        self.uses += 1;
        let (file, used) = self.files.get_mut(&number)?;
        *used = self.uses;
        Some(Arc::clone(file))
    }

    fn keep(&mut self, number: u64, file: Arc<File>) {
        if self.files.len() >= OPEN_FILES {
            // A quarter at once, so that it is seldom looked which.
            let mut uses: Vec<u64> = self.files.values().map(|(_, used)| *used).collect();
            let (_, &mut limit, _) = uses.select_nth_unstable(OPEN_FILES / 4);
            self.files.retain(|_, (_, used)| *used > limit);
        }
        self.files.insert(number, (file, self.uses));
    }
}

/// A log's file, opened when it is read.
#[derive(Clone, Debug)]
pub(super) struct LogFile {
    number: u64,
    path: Arc<Path>,
    open: Arc<OpenFiles>,
}

impl LogFile {
    pub(super) fn new(path: impl Into<Arc<Path>>, open: &Arc<OpenFiles>) -> Self {
        let number = open.named.fetch_add(1, Ordering::Relaxed);
        let (path, open) = (path.into(), Arc::clone(open));
        Self { number, path, open }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self) -> io::Result<Arc<File>> {
        self.open.get(self.number, &self.path)
    }
}

impl ReadAt for LogFile {
    fn size(&self) -> io::Result<u64> {
        self.file()?.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()> {
        self.file()?.read_exact_at(buffer, at)
    }
}

/// A log of the store, open for reading.
pub(super) struct StoredLog {
    pub(super) log: Log<LogFile>,
    pub(super) path: Arc<Path>,
}

impl StoredLog {
    /// An error of this log.
    pub(super) fn error(&self, operation: &'static str, error: hrl_format::Error) -> Error {
        Error::log(operation, error).path(&self.path)
    }
}

/// The file of a log, whatever it holds.
pub(super) fn log_file(folder: &VolumeFolder, entry: &LogEntry, files: &Arc<OpenFiles>) -> LogFile {
    LogFile::new(folder.log(&entry.name()), files)
}

/// Opens a log that the catalogue lists, and checks that it is that one.
pub(super) fn open_log(
    folder: &VolumeFolder,
    entry: &LogEntry,
    files: &Arc<OpenFiles>,
    key: Option<&VolumeKey>,
) -> Result<StoredLog> {
    open_file(log_file(folder, entry, files), folder, entry, key)
}

/// The same, in its file.
pub(super) fn open_file(
    file: LogFile,
    folder: &VolumeFolder,
    entry: &LogEntry,
    key: Option<&VolumeKey>,
) -> Result<StoredLog> {
    const OPEN: &str = "open a log of the store";
    let path = Arc::clone(&file.path);
    let log = Log::open(file, key).map_err(|e| match e.io().map(io::Error::kind) {
        Some(io::ErrorKind::NotFound) => damaged(OPEN, &path, "it is not there"),
        _ => Error::log(OPEN, e).path(&path),
    })?;
    let header = log.header();
    if header.log != entry.log || header.volume != folder.id() {
        let why = format!("it is log {} of volume {}", header.log, header.volume);
        return Err(damaged(OPEN, &path, why));
    }
    if log.seal().digest != entry.seal {
        let why = "its seal is not the one that the catalogue names";
        return Err(damaged(OPEN, &path, why));
    }
    let records = Some(log.seal().records).filter(|_| header.order == RecordOrder::AsCompleted);
    if let Some(listed) = entry.in_order()
        && records != Some(listed.records)
    {
        let why = "its records are not in order, or not as many as the catalogue says";
        return Err(damaged(OPEN, &path, why));
    }
    Ok(StoredLog { log, path })
}

/// Opens consecutive logs, and checks that each follows the one before it.
pub(super) fn open_chain(
    folder: &VolumeFolder,
    entries: &[LogEntry],
    key: Option<&VolumeKey>,
) -> Result<Vec<StoredLog>> {
    let files = Arc::new(OpenFiles::default());
    let mut chain: Vec<StoredLog> = Vec::with_capacity(entries.len());
    for entry in entries {
        let log = open_log(folder, entry, &files, key)?;
        if let Some(before) = chain.last() {
            check_follows(before, &log)?;
        }
        chain.push(log);
    }
    Ok(chain)
}

/// An error of reading several logs as one, which does not say whose it is: of the log that is
/// damaged, if one is.
pub(super) fn blame(
    logs: &[StoredLog],
    operation: &'static str,
    error: hrl_format::Error,
) -> Error {
    let first = |log: &StoredLog| log.log.check().ok()?.problems.into_iter().next();
    let generic = Error::log(operation, error);
    if generic.kind() != ErrorKind::Damaged {
        return generic;
    }
    let found = logs
        .iter()
        .find_map(|log| Some(log.error(operation, first(log)?)));
    found.unwrap_or(generic)
}

/// Whether `log` is the successor of `before`.
pub(super) fn check_follows(before: &StoredLog, log: &StoredLog) -> Result<()> {
    before
        .log
        .check_followed_by(log.log.header())
        .map_err(|e| damaged("follow the chain of logs", &log.path, e.to_string()))
}
