//! Locks on open files (flock), so that they end with the process, however that ends. On them
//! stand the exclusive locks here, one writer for each volume and one maker of volumes for each
//! store, and the leases of readers (`lease.rs`).

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;

use super::durable::{advise, read_small};
use crate::error::{Error, ErrorKind, IoContext, Result};

/// A lock on an open file, held until dropped.
///
/// Dropping unlocks; closing the file would not be enough. A child that another thread of this process
/// forks has a copy of every open file until it calls exec, and the lock would live on
/// in that copy.
#[derive(Debug)]
pub(super) struct FileLock(File);

impl FileLock {
    /// Keeps everybody else away; `None` if somebody is there.
    pub(super) fn exclusive(file: File) -> io::Result<Option<Self>> {
        Self::held(file.try_lock(), file)
    }

    /// Keeps away those who want it for themselves; `None` if one is there.
    pub(super) fn shared(file: File) -> io::Result<Option<Self>> {
        Self::held(file.try_lock_shared(), file)
    }

    fn held(tried: Result<(), TryLockError>, file: File) -> io::Result<Option<Self>> {
        match tried {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // If this fails, closing the file frees the lock, only later.
        let _ = self.0.unlock();
    }
}

/// An exclusive lock, held until dropped. The file holds the process id, for the error that
/// another gets.
#[derive(Debug)]
pub(super) struct Lock {
    _held: FileLock,
}

impl Lock {
    /// Takes the lock at `path` without waiting.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] with the holder's process id.
    pub(super) fn take(path: &Path, what: &'static str) -> Result<Self> {
        // Held open for reading only: a file open for writing would keep the filesystem from
        // being remounted read-only as long as the daemon runs.
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        drop(options.open(path).at(what, path).map_err(advise)?);
        let file = File::open(path).at(what, path)?;
        match FileLock::exclusive(file).at(what, path)? {
            Some(held) => {
                // Only for people; the lock holds without it, also on a full disk.
                let _ = std::fs::write(path, format!("{}\n", std::process::id()));
                Ok(Self { _held: held })
            }
            None => Err(holder_of(path, what)),
        }
    }
}

impl Lock {
    /// Whether somebody holds the lock at `path` now.
    pub(super) fn is_held(path: &Path) -> Result<bool> {
        const LOOK: &str = "look who is writing";
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::io(LOOK, e).path(path)),
        };
        Ok(FileLock::shared(file).at(LOOK, path)?.is_none())
    }
}

fn holder_of(path: &Path, what: &'static str) -> Error {
    let holder = read_small(path).ok().flatten().unwrap_or_default();
    let holder = String::from_utf8_lossy(&holder);
    let holder = match holder.trim() {
        "" => "another process holds it".to_owned(),
        pid => format!("process {pid} holds it"),
    };
    Error::new(ErrorKind::Busy, what).path(path).detail(holder)
}

#[cfg(test)]
mod tests {
    use super::FileLock;

    #[test]
    fn an_inherited_copy_does_not_keep_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        std::fs::write(&path, "").unwrap();
        let open = || std::fs::File::open(&path).unwrap();
        for take in [FileLock::exclusive, FileLock::shared] {
            let file = open();
            // The same open file, as a forked child has it.
            let _copy = file.try_clone().unwrap();
            let held = take(file).unwrap().unwrap();
            assert!(FileLock::exclusive(open()).unwrap().is_none());
            drop(held);
            assert!(FileLock::exclusive(open()).unwrap().is_some());
        }
    }
}
