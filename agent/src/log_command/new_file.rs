//! A file that is whole or not there: written under another name beside its own, flushed,
//! and renamed at the end. Dropped before that, it leaves nothing behind.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use hrl_format::id::LogId;
use libreplica::{Error, ErrorKind, IoContext, Result};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// The log to be made.
#[derive(Args, Debug)]
pub struct OutputArgs {
    /// The new log
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// Replace OUT if it exists
    #[arg(long)]
    pub force: bool,
}

impl OutputArgs {
    /// Begins it.
    ///
    /// # Errors
    /// As [`NewFile::create`].
    pub fn create(&self) -> Result<NewFile> {
        let existing = if self.force {
            Existing::Replaced
        } else {
            Existing::Kept
        };
        NewFile::create(&self.output, existing)
    }
}

/// Whether a file that is there already may be replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// No.
    Kept,
    /// Yes, if it is a plain file.
    Replaced,
}

/// A file in the making.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    /// Its name so far; empty once it has its own.
    temporary: PathBuf,
    file: File,
    existing: Existing,
}

impl NewFile {
    /// Begins the file that is to be at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if something is there and is kept; [`ErrorKind::Invalid`] if it is
    /// no plain file; else what the system says.
    pub fn create(path: &Path, existing: Existing) -> Result<Self> {
        let operation = "create the log";
        match (fs::symlink_metadata(path), existing) {
            (Err(error), _) if error.kind() == Io::NotFound => {}
            (Err(error), _) => return Err(Error::io(operation, error).path(path)),
            (Ok(_), Existing::Kept) => return Err(exists(path)),
            (Ok(found), Existing::Replaced) if found.is_file() => {}
            (Ok(_), Existing::Replaced) => {
                return Err(Error::new(ErrorKind::Invalid, operation)
                    .path(path)
                    .detail("it is no plain file, and only such are replaced")
                    .advice("name another output"));
            }
        }
        let Some(name) = path.file_name() else {
            return Err(Error::new(ErrorKind::Invalid, operation)
                .path(path)
                .detail("the path names no file"));
        };
        let unique =
            LogId::random().map_err(|error| Error::new(ErrorKind::Io, operation).source(error))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{unique}.new"));
        let temporary = path.with_file_name(hidden);
        // What a disk holds is not for everybody to read.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .at(operation, &temporary)?;
        let path = path.to_owned();
        Ok(Self {
            path,
            temporary,
            file,
            existing,
        })
    }

    /// Where to write.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Where it is going to be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes it and gives it its name.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if something has taken the name meanwhile and is kept; else what
    /// the system says.
    pub fn finish(mut self) -> Result<()> {
        let operation = "finish the log";
        self.file.sync_all().at(operation, &self.temporary)?;
        self.rename()?;
        self.temporary = PathBuf::new();
        let folder = self
            .path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        File::open(folder)
            .and_then(|handle| handle.sync_all())
            .at(operation, folder)
    }

    fn rename(&self) -> Result<()> {
        let (from, to) = (&self.temporary, &self.path);
        if self.existing == Existing::Kept {
            match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
                Ok(()) => return Ok(()),
                Err(Errno::EEXIST) => return Err(exists(to)),
                // Not every filesystem can refuse by itself: look, then rename.
                Err(Errno::EINVAL | Errno::ENOSYS) if fs::symlink_metadata(to).is_ok() => {
                    return Err(exists(to));
                }
                Err(Errno::EINVAL | Errno::ENOSYS) => {}
                Err(errno) => return Err(Error::io("finish the log", errno.into()).path(to)),
            }
        }
        fs::rename(from, to).at("finish the log", to)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.temporary.as_os_str().is_empty() {
            // It is gone already, or stays as a hidden file: there is nobody to tell.
            let _: io::Result<()> = fs::remove_file(&self.temporary);
        }
    }
}

fn exists(path: &Path) -> Error {
    Error::new(ErrorKind::Exists, "create the log")
        .path(path)
        .detail("there is a file of that name")
        .advice("name another, or replace it with --force")
}
