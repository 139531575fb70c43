//! The logs under a point, open for reading. A point may lie on thousands of logs, and a process
//! may have a thousand files open: so a log's file is opened when it is read, and of those open the one
//! not read for longest is closed to make room. That is safe because the reader's lease keeps
//! the files where they are.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

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
pub(super) struct OpenFiles(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    files: HashMap<PathBuf, (Arc<File>, u64)>,
    /// Counts uses, to find the file not used for longest.
    uses: u64,
}

impl OpenFiles {
    fn get(&self, path: &Path) -> io::Result<Arc<File>> {
        // A panic elsewhere leaves at worst a file more or less in the table.
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.uses += 1;
        let now = table.uses;
        if let Some((file, used)) = table.files.get_mut(path) {
            *used = now;
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(File::open(path)?);
        if table.files.len() >= OPEN_FILES {
            let oldest = table.files.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(path) = oldest.map(|(path, _)| path.clone()) {
                table.files.remove(&path);
            }
        }
        table
            .files
            .insert(path.to_owned(), (Arc::clone(&file), now));
        Ok(file)
    }
}

/// A log's file, opened when it is read.
#[derive(Clone, Debug)]
pub(super) struct LogFile {
    path: Arc<Path>,
    open: Arc<OpenFiles>,
}

impl LogFile {
    pub(super) fn new(path: impl Into<Arc<Path>>, open: &Arc<OpenFiles>) -> Self {
        let (path, open) = (path.into(), Arc::clone(open));
        Self { path, open }
    }
}

impl ReadAt for LogFile {
    fn size(&self) -> io::Result<u64> {
        self.open.get(&self.path)?.size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: FileOffset) -> io::Result<()> {
        self.open.get(&self.path)?.read_exact_at(buffer, at)
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

/// Opens a log that the catalogue lists, and checks that it is that one.
pub(super) fn open_log(
    folder: &VolumeFolder,
    entry: &LogEntry,
    files: &Arc<OpenFiles>,
    key: Option<&VolumeKey>,
) -> Result<StoredLog> {
    const OPEN: &str = "open a log of the store";
    let path: Arc<Path> = folder.log(&entry.name()).into();
    let file = LogFile::new(Arc::clone(&path), files);
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
