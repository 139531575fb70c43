//! The journal of a plan on disk: lines are appended, and each is durable before anything else is done.
//! Who has it open holds a lock on it, so that two runs never do the same thing at once. For its owner
//! alone: scripts may have said what is nobody else's business.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use libreplica::plan::{Entry, Journal};
use libreplica::time::rfc3339;
use libreplica::units::Timestamp;
use libreplica::{Error, ErrorKind, IoContext, Result};

const OPEN: &str = "open the plan's journal";
const WRITE: &str = "write the plan's journal";
/// More than any plan says: what is longer is no journal.
const LONGEST: u64 = 64 << 20;

/// A journal that is written to by this process alone.
pub struct JournalFile {
    file: File,
    path: PathBuf,
}

impl JournalFile {
    /// The journal at `path`, and what it says; none if there is none. A last line that was cut off
    /// is removed.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another run has it; those of [`Journal::parse`]; the system's.
    pub fn open(path: &Path) -> Result<Option<(Self, Vec<Entry>)>> {
        let mut options = OpenOptions::new();
        let mut file = match options.read(true).write(true).open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.at(OPEN, path)?,
        };
        lock(&file, path)?;
        let mut bytes = Vec::new();
        let read = (&file).take(LONGEST + 1).read_to_end(&mut bytes);
        read.at(OPEN, path)?;
        if bytes.len() as u64 > LONGEST {
            return Err(Error::new(ErrorKind::Damaged, OPEN)
                .path(path)
                .detail("it is longer than any journal"));
        }
        let journal = Journal::parse(&bytes).map_err(|error| error.path(path))?;
        let whole = journal.whole as u64;
        let cut = file.set_len(whole).and_then(|()| {
            file.seek(SeekFrom::Start(whole))?;
            file.sync_all()
        });
        cut.at(OPEN, path)?;
        let path = path.to_owned();
        Ok(Some((Self { file, path }, journal.entries)))
    }

    /// A new one.
    ///
    /// # Errors
    /// The system's; also if there is one.
    pub fn create(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        let options = options.write(true).create_new(true).mode(0o600);
        let file = options.open(path).at("make the plan's journal", path)?;
        lock(&file, path)?;
        sync_folder(path)?;
        let path = path.to_owned();
        Ok(Self { file, path })
    }

    /// Notes what happened; it is durable when this returns.
    ///
    /// # Errors
    /// The system's.
    pub fn append(&mut self, entry: &Entry) -> Result<()> {
        let line = entry.line()?;
        let written = self.file.write_all(line.as_bytes());
        written
            .and_then(|()| self.file.sync_data())
            .at(WRITE, &self.path)
    }

    /// Puts it aside, for the next run begins anew; where it is then.
    ///
    /// # Errors
    /// The system's.
    pub fn put_aside(self) -> Result<PathBuf> {
        let now = rfc3339(Timestamp::now());
        let aside = self.path.with_added_extension(now);
        std::fs::rename(&self.path, &aside).at("put the plan's journal aside", &self.path)?;
        sync_folder(&self.path)?;
        Ok(aside)
    }
}

fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(Error::new(ErrorKind::Busy, OPEN)
            .path(path)
            .detail("another run of the plan has it")
            .advice("wait for that one to end")),
        Err(TryLockError::Error(error)) => Err(error).at(OPEN, path),
    }
}

fn sync_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|path| !path.as_os_str().is_empty());
    let folder = folder.unwrap_or_else(|| Path::new("."));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.at(WRITE, folder)
}
