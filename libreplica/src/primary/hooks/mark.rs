//! The mark of applications at rest: a small file in /run/replica that outlives the agent,
//! beside those of freezes. A daemon that is killed between `pre` and `post` would leave a
//! database at rest for ever; the next start finds the mark and runs `post`.
//!
//! Line 1: `replica hooks 1 BOOT PID START`, padded to a fixed length. Then the volumes'
//! names and the path of each program, in the order in which they were started, each
//! followed by a zero byte. A program's path is there before it is started.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::device::BootId;
use crate::error::{Error, IoContext, Result};
use crate::primary::owner::Owner;

const MAGIC: &str = "replica hooks 1";
const PREFIX: &str = "hooks-";
const OPERATION: &str = "mark that applications are at rest";

/// The file of one run of hooks.
#[derive(Debug)]
pub(super) struct Mark {
    file: File,
    path: PathBuf,
}

impl Mark {
    pub(super) fn create(folder: &Path, volumes: &str) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .at(OPERATION, folder)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let path = folder.join(format!("{PREFIX}{pid}-{number}"));
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .at(OPERATION, &path)?;
        let mut text = Owner::of(pid).head(MAGIC, &BootId::current()?).into_bytes();
        text.extend_from_slice(volumes.as_bytes());
        text.push(0);
        file.write_all(&text).at(OPERATION, &path)?;
        Ok(Self { file, path })
    }

    /// `program` is about to be run with `pre`.
    pub(super) fn add(&mut self, program: &Path) -> Result<()> {
        let mut text = program.as_os_str().as_bytes().to_vec();
        text.push(0);
        self.file.write_all(&text).at(OPERATION, &self.path)
    }

    /// Nothing is owed any more.
    pub(super) fn remove(&self) {
        // One that stays makes the next start run a `post` too many, which does no harm.
        let _ = fs::remove_file(&self.path);
    }
}

/// A program that was run with `post` for a daemon that died before it could.
#[derive(Debug)]
pub struct Released {
    /// The program.
    pub program: PathBuf,
    /// What became of it.
    pub outcome: Result<()>,
}

/// Runs the `post` that dead daemons owe, each program for at most `limit`; to be called at
/// start. Marks of processes that live are left alone; those of earlier boots, which have
/// ended the applications, too, are removed.
///
/// # Errors
/// [`crate::ErrorKind::Io`] if the folder is there and cannot be read.
pub fn recover(run_dir: &Path, limit: Duration) -> Result<Vec<Released>> {
    const OPERATION: &str = "look for marks of hooks";
    let entries = match fs::read_dir(run_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(OPERATION, error).path(run_dir)),
    };
    let mut released = Vec::new();
    for entry in entries.flatten() {
        if !entry.file_name().as_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let path = entry.path();
        let text = fs::read(&path).at(OPERATION, &path)?;
        let Some(owed) = owed(&text, &BootId::current()?) else {
            continue;
        };
        for program in owed.programs.into_iter().rev() {
            let outcome = super::runnable(&program)
                .and_then(|()| super::run(&program, super::Phase::Post, &owed.volumes, limit));
            released.push(Released { program, outcome });
        }
        fs::remove_file(&path).at(OPERATION, &path)?;
    }
    Ok(released)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Owed {
    volumes: String,
    programs: Vec<PathBuf>,
}

/// What a mark says is owed; nothing if it is of another boot or makes no sense; `None` if
/// its owner lives.
fn owed(text: &[u8], boot: &BootId) -> Option<Owed> {
    let mut parts = text.splitn(2, |&byte| byte == b'\n');
    let head = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let Some((of_boot, owner)) = Owner::parse_head(MAGIC, &head) else {
        return Some(Owed::default());
    };
    if of_boot != *boot {
        return Some(Owed::default());
    }
    if owner.is_alive() {
        return None;
    }
    let mut words = parts.next().unwrap_or_default().split(|&byte| byte == 0);
    let volumes = words.next().unwrap_or_default();
    Some(Owed {
        volumes: String::from_utf8_lossy(volumes).into_owned(),
        programs: words
            .filter(|word| !word.is_empty())
            .map(|word| PathBuf::from(std::ffi::OsString::from_vec(word.to_vec())))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_owner_began_is_owed() {
        let boot = BootId::current().unwrap();
        let mut owner = Owner::of(std::process::id());
        let text = |owner: Owner, boot: &BootId| {
            let head = owner.head(MAGIC, boot);
            [head.as_bytes(), b"a b\0/hooks/1\n\0/hooks/2\0"].concat()
        };
        assert_eq!(owed(&text(owner, &boot), &boot), None);
        owner.started += 1;
        let found = owed(&text(owner, &boot), &boot).unwrap();
        assert_eq!(found.volumes, "a b");
        assert_eq!(
            found.programs,
            [Path::new("/hooks/1\n"), Path::new("/hooks/2")]
        );
        let other = BootId::from_bytes([7; 16]);
        assert_eq!(owed(&text(owner, &other), &boot), Some(Owed::default()));
        assert_eq!(owed(b"", &boot), Some(Owed::default()));
    }
}
