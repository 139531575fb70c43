//! What nothing may be restored over: a device that is protected, by whatever daemon, alive
//! or not, or one through which a protected or a mounted one would be written. Its content
//! may be the only other copy of what is restored.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::capture::{self, AttachSpec};
use crate::device::{DevNo, Reach};
use crate::error::{Error, ErrorKind, Result};

const RESTORE: &str = "restore a recovery point";

/// Refuses `target`, a file or device there or yet to be made, if writing to it changes a
/// protected or a mounted device: itself, its disk, what lies over it, what shows the same
/// bytes. Protected is what is tracked in the kernel for any state folder, and the devices
/// `known` to be protected otherwise.
///
/// # Errors
/// [`ErrorKind::Busy`] if it does; what the system said if that cannot be told.
pub fn refuse_target(target: &Path, known: &[PathBuf]) -> Result<()> {
    let reach = Reach::of(target)?;
    if reach.is_empty() {
        return Ok(());
    }
    for pin in capture::list_pins(Path::new(AttachSpec::PINS))? {
        let Some(tracked) = pin.tracked else {
            continue;
        };
        if reach.has_disk(tracked.devno, tracked.diskseq) {
            let owner = format!("volume {} of state folder {}", pin.volume, tracked.folder);
            return Err(protected(target, &tracked.name, &owner));
        }
    }
    for device in known {
        if device_number(device).is_some_and(|number| reach.has(number)) {
            let name = device.display().to_string();
            return Err(protected(target, &name, "a volume of the running daemon"));
        }
    }
    match reach.mounted()? {
        None => Ok(()),
        Some(filesystem) => Err(Error::new(ErrorKind::Busy, RESTORE)
            .path(target)
            .detail(format!(
                "it is mounted, or something is that shows the same bytes: {}",
                filesystem.mount_point().display()
            ))
            .advice("unmount that, or restore to another one")),
    }
}

fn protected(target: &Path, device: &str, owner: &str) -> Error {
    let device = device.strip_prefix("/dev/").unwrap_or(device);
    Error::new(ErrorKind::Busy, RESTORE)
        .path(target)
        .detail(format!(
            "what is written there changes /dev/{device}, which is protected: {owner}"
        ))
        .advice(
            "restore to another one, or unprotect it first (`replica unprotect --stale` if \
             its agent is gone)",
        )
}

fn device_number(path: &Path) -> Option<DevNo> {
    let meta = fs::metadata(path).ok()?;
    let is_block = meta.file_type().is_block_device();
    is_block.then(|| DevNo::from_stat(meta.rdev()))
}
