//! Exclusive locks: one writer for each volume, one maker of volumes for each store. The lock is
//! on an open file (flock), so that it ends with the process, however that ends; the file
//! holds the process id, for the error that another writer gets.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::Path;

use super::durable::read_small;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// An exclusive lock, held until dropped.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock at `path` without waiting.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] with the holder's process id.
    pub(super) fn take(path: &Path, what: &'static str) -> Result<Self> {
        let mut options = OpenOptions::new();
        let open = options.read(true).write(true).create(true).truncate(false);
        let mut file = open.open(path).at(what, path)?;
        match file.try_lock() {
            Ok(()) => {
                // Only for people; the lock holds without it, also on a full disk.
                let _ = file.set_len(0);
                let _ = writeln!(file, "{}", std::process::id());
                Ok(Self { _file: file })
            }
            Err(TryLockError::WouldBlock) => Err(held(path, what)),
            Err(TryLockError::Error(e)) => Err(Error::io(what, e).path(path)),
        }
    }
}

fn held(path: &Path, what: &'static str) -> Error {
    let holder = read_small(path).ok().flatten().unwrap_or_default();
    let holder = String::from_utf8_lossy(&holder);
    let holder = match holder.trim() {
        "" => "another process holds it".to_owned(),
        pid => format!("process {pid} holds it"),
    };
    Error::new(ErrorKind::Busy, what).path(path).detail(holder)
}
