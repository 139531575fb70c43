//! The mark of a freeze under way: a small file in /run/replica that outlives both agent
//! and watchdog, so that the next start can thaw what they left frozen.
//!
//! Line 1: `replica freeze 1 BOOT PID START`, padded to a fixed length: the boot, and the
//! process that makes the calls with the time it started. Line 2: the status row, a byte a
//! mount. Then a line a mount: superblock, type, mount point.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::device::{BootId, DevNo, Filesystem, superblock_of};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::primary::owner::Owner;
use crate::primary::quiesce::set::AT_REST;
use crate::sys::freeze;

const MAGIC: &str = "replica freeze 1";
const PREFIX: &str = "frozen-";
/// Where the status row begins: behind line 1, which is always this long.
pub const STATUS_ROW: u64 = 16 + 1 + 36 + 1 + 10 + 1 + 20 + 1;

/// The file of one freeze; removed on drop unless it must stay.
pub struct Marker {
    file: File,
    path: Option<PathBuf>,
}

impl Marker {
    /// Writes the mark for `filesystems`, all at rest, into `folder`. Where that folder
    /// lies on one of them, nothing could be noted during the freeze: the status is then
    /// kept in memory only, and does not outlive both processes.
    pub fn create(folder: &Path, owner: Owner, filesystems: &[&Filesystem]) -> Result<Self> {
        const OPERATION: &str = "mark the freeze";
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .at(OPERATION, folder)?;
        let under = superblock_of(folder)?;
        let (mut file, path) = if filesystems.iter().any(|fs| fs.superblock() == under) {
            let memory = memfd_create("replica-freeze", MFdFlags::MFD_CLOEXEC);
            (File::from(memory.at(OPERATION, folder)?), None)
        } else {
            static NEXT: AtomicU64 = AtomicU64::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!("{PREFIX}{}-{number}", std::process::id()));
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .at(OPERATION, &path)?;
            (file, Some(path))
        };
        let text = text(owner, filesystems)?;
        file.write_all(&text).at(OPERATION, folder)?;
        Ok(Self { file, path })
    }

    /// The file, to note the status in.
    pub fn file(&self) -> Result<File> {
        self.file.try_clone().at("share the mark of the freeze", "")
    }

    /// Lets the file stay for the next start.
    pub fn keep(&mut self) {
        self.path = None;
    }
}

impl Drop for Marker {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

fn text(owner: Owner, filesystems: &[&Filesystem]) -> Result<Vec<u8>> {
    let boot = BootId::current()?;
    let mut text = owner.head(MAGIC, &boot).into_bytes();
    text.extend(filesystems.iter().map(|_| AT_REST));
    text.push(b'\n');
    for filesystem in filesystems {
        let (superblock, kind) = (filesystem.superblock(), filesystem.kind());
        text.extend_from_slice(format!("{superblock} {kind} ").as_bytes());
        text.extend_from_slice(filesystem.mount_point().as_os_str().as_bytes());
        text.push(b'\n');
    }
    Ok(text)
}

/// A filesystem that a dead agent had left frozen, or may have.
#[derive(Debug)]
pub struct Recovered {
    /// Where it was mounted.
    pub mount_point: PathBuf,
    /// What was found.
    pub outcome: Recovery,
}

/// What became of a filesystem named by a mark.
#[derive(Debug)]
pub enum Recovery {
    /// It was frozen, and is thawed.
    Thawed,
    /// It was not frozen, or is mounted no more.
    NotFrozen,
    /// It may be frozen still.
    Failed(Error),
}

/// Thaws what agents that are dead by now, and their watchdogs, left frozen; to be called
/// at start. Marks of processes that live are left alone, those of earlier boots removed.
///
/// # Errors
/// [`ErrorKind::Io`] if the folder is there and cannot be read.
pub fn recover(folder: &Path) -> Result<Vec<Recovered>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("look for marks of freezes", error).path(folder)),
    };
    let mut recovered = Vec::new();
    for entry in entries.flatten() {
        let path = entry.path();
        let is_mark = entry.file_name().as_bytes().starts_with(PREFIX.as_bytes());
        if !is_mark {
            continue;
        }
        let text = fs::read(&path).at("read the mark of a freeze", &path)?;
        let left = left_frozen(&text, &BootId::current()?);
        let Some(left) = left else { continue };
        let first = recovered.len();
        recovered.extend(left.into_iter().map(Left::thaw));
        let failed = |one: &Recovered| matches!(one.outcome, Recovery::Failed(_));
        if !recovered[first..].iter().any(failed) {
            fs::remove_file(&path).at("remove the mark of a freeze", &path)?;
        }
    }
    Ok(recovered)
}

struct Left {
    superblock: DevNo,
    kind: String,
    mount_point: PathBuf,
}

/// What a mark says was left frozen; nothing if it is of another boot or makes no sense;
/// `None` if its owner lives.
fn left_frozen(text: &[u8], boot: &BootId) -> Option<Vec<Left>> {
    let mut lines = text.split(|&b| b == b'\n');
    let head = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
    let Some((of_boot, owner)) = Owner::parse_head(MAGIC, &head) else {
        return Some(Vec::new());
    };
    if of_boot != *boot {
        return Some(Vec::new());
    }
    if owner.is_alive() {
        return None;
    }
    let statuses = lines.next().unwrap_or_default();
    let left = statuses
        .iter()
        .zip(lines)
        .filter(|(status, _)| **status != AT_REST)
        .filter_map(|(_, line)| parse_line(line))
        .collect();
    Some(left)
}

fn parse_line(line: &[u8]) -> Option<Left> {
    let mut words = line.splitn(3, |&b| b == b' ');
    Some(Left {
        superblock: std::str::from_utf8(words.next()?).ok()?.parse().ok()?,
        kind: String::from_utf8_lossy(words.next()?).into_owned(),
        mount_point: PathBuf::from(std::ffi::OsStr::from_bytes(words.next()?)),
    })
}

impl Left {
    fn thaw(self) -> Recovered {
        let outcome = self.try_thaw().unwrap_or_else(Recovery::Failed);
        Recovered {
            mount_point: self.mount_point,
            outcome,
        }
    }

    fn try_thaw(&self) -> Result<Recovery> {
        let Some(filesystem) = Filesystem::mounted(self.superblock)? else {
            return Ok(Recovery::NotFrozen);
        };
        if filesystem.kind() != self.kind {
            return Ok(Recovery::NotFrozen);
        }
        match freeze::thaw(filesystem.open()?) {
            Ok(()) => Ok(Recovery::Thawed),
            Err(nix::errno::Errno::EINVAL) => Ok(Recovery::NotFrozen),
            Err(errno) => Err(Error::new(ErrorKind::Io, "thaw what was left frozen")
                .path(&self.mount_point)
                .source(std::io::Error::from(errno))
                .advice("thaw it by hand: fsfreeze --unfreeze MOUNTPOINT")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(boot: BootId, owner: Owner) -> Vec<u8> {
        let mut text = owner.head(MAGIC, &boot).into_bytes();
        assert_eq!(text.len() as u64, STATUS_ROW);
        text.extend_from_slice(b"-F?\n8:1 ext4 /a\n8:2 xfs /b c\n8:3 ext4 /d\n");
        text
    }

    #[test]
    fn what_a_dead_owner_froze_or_was_freezing_is_left() {
        let boot = BootId::current().unwrap();
        let mut dead = Owner::of(std::process::id());
        dead.started += 1;
        let left = left_frozen(&mark(boot, dead), &boot).unwrap();
        let points: Vec<&Path> = left.iter().map(|one| one.mount_point.as_path()).collect();
        assert_eq!(points, [Path::new("/b c"), Path::new("/d")]);
        assert_eq!(
            (left[0].kind.as_str(), left[0].superblock.minor),
            ("xfs", 2)
        );
    }

    #[test]
    fn marks_of_the_living_and_of_other_boots_are_left_alone() {
        let boot = BootId::current().unwrap();
        let own = Owner::of(std::process::id());
        assert!(left_frozen(&mark(boot, own), &boot).is_none());
        let other = BootId::from_bytes([7; 16]);
        assert!(left_frozen(&mark(other, own), &boot).unwrap().is_empty());
        assert!(left_frozen(b"", &boot).unwrap().is_empty());
    }
}
