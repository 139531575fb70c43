//! Devices that cannot be protected, and what to name or do instead. A write that no
//! tracepoint sees would be a write lost without being told, so these are refused by name.

use std::fs::Metadata;
use std::path::Path;

use crate::device::{BlockDevice, Layers, sysfs};
use crate::error::{Error, ErrorKind, Result};

const OPERATION: &str = "open the device";

pub(super) fn not_a_block_device(path: &Path, meta: &Metadata) -> Error {
    let error = Error::new(ErrorKind::Invalid, OPERATION)
        .path(path)
        .detail("not a block device");
    if meta.is_file() {
        error.advice("attach an image file first: losetup --find --show FILE")
    } else {
        error.advice("name a disk, such as /dev/sda")
    }
}

pub(super) fn partition(path: &Path, folder: &Path) -> Result<()> {
    let Some(number) = sysfs::text(folder, "partition") else {
        return Ok(());
    };
    let disk = folder.parent().map(sysfs::device_name).unwrap_or_default();
    Err(Error::new(ErrorKind::Invalid, OPERATION)
        .path(path)
        .detail(format!("it is partition {number} of /dev/{disk}"))
        .advice(format!(
            "name the whole disk, /dev/{disk}; --exclude leaves partitions out"
        )))
}

pub(super) fn unseen_writes(device: &BlockDevice) -> Result<()> {
    path_of_multipath(device)?;
    one_of_several_paths(device)?;
    page_io(device)?;
    dax(device)
}

fn path_of_multipath(device: &BlockDevice) -> Result<()> {
    for holder in device.holders() {
        let Ok(folder) = sysfs::folder(holder) else {
            continue;
        };
        let uuid = sysfs::text(&folder, "dm/uuid").unwrap_or_default();
        if uuid.starts_with("mpath-") {
            let name = sysfs::text(&folder, "dm/name").unwrap_or_default();
            return Err(Error::new(ErrorKind::Invalid, OPERATION)
                .path(device.path())
                .detail(format!(
                    "it is one path of the multipath disk {name}: writes take the others too"
                ))
                .advice(format!("name the multipath disk, /dev/mapper/{name}")));
        }
    }
    Ok(())
}

/// Two disks with one identity, and nothing that makes one disk of them: the kernel shows
/// each way to it, a port or a controller, as a disk of its own.
fn one_of_several_paths(device: &BlockDevice) -> Result<()> {
    let Some(identity) = identity(device.sysfs()) else {
        return Ok(());
    };
    let block = Path::new("/sys/block");
    let twin = sysfs::names(block).into_iter().find(|name| {
        let folder = block.join(name);
        // Those of NVMe multipath are hidden: the disk that it makes is the one to name.
        name != device.name()
            && sysfs::text(&folder, "hidden").as_deref() != Some("1")
            && self::identity(&folder).as_ref() == Some(&identity)
    });
    match twin {
        None => Ok(()),
        Some(twin) => Err(Error::new(ErrorKind::Invalid, OPERATION)
            .path(device.path())
            .detail(format!(
                "/dev/{twin} is another path to the same disk, {identity}: writes may take either"
            ))
            .advice(
                "make one disk of them and name it: multipathd, or nvme_core.multipath=Y for NVMe",
            )),
    }
}

/// What the disk itself says that it is, unique in the world: NVMe's, or SCSI's.
fn identity(folder: &Path) -> Option<String> {
    let own = sysfs::text(folder, "wwid").or_else(|| sysfs::text(&folder.join("device"), "wwid"));
    own.filter(|identity| !identity.is_empty())
}

/// Before 6.3 these drivers took swap and page-cache pages by `rw_page`, without a bio.
fn page_io(device: &BlockDevice) -> Result<()> {
    let affected = ["zram", "ram", "pmem", "btt"]
        .iter()
        .any(|driver| has_number_after(device.name(), driver));
    if !affected || kernel_version() >= (6, 3) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Kernel, OPERATION)
        .path(device.path())
        .detail("before kernel 6.3 this driver takes writes that no tracepoint sees")
        .advice("run kernel 6.3 or newer, or move the data to another kind of disk"))
}

fn dax(device: &BlockDevice) -> Result<()> {
    if sysfs::text(device.sysfs(), "queue/dax").as_deref() != Some("1") {
        return Ok(());
    }
    let layers = Layers::above(&[device])?;
    match layers.filesystems().iter().find(|fs| fs.may_use_dax()) {
        None => Ok(()),
        Some(filesystem) => Err(Error::new(ErrorKind::Unsupported, OPERATION)
            .path(device.path())
            .detail(format!(
                "{} is mounted so that files may bypass the block layer (DAX)",
                filesystem.mount_point().display()
            ))
            .advice("mount it with -o dax=never")),
    }
}

fn has_number_after(name: &str, driver: &str) -> bool {
    name.strip_prefix(driver)
        .and_then(|rest| rest.bytes().next())
        .is_some_and(|b| b.is_ascii_digit())
}

/// Major and minor of the running kernel; newest if it cannot be read.
fn kernel_version() -> (u32, u32) {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    version_of(&release).unwrap_or((u32::MAX, u32::MAX))
}

fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_compare_as_numbers() {
        assert_eq!(version_of("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(version_of("6.18.44-fc-v595"), Some((6, 18)));
        assert!(version_of("6.12") > version_of("6.3"));
        assert_eq!(version_of("next"), None);
    }

    #[test]
    fn drivers_are_told_by_the_number_that_follows() {
        assert!(has_number_after("zram0", "zram"));
        assert!(has_number_after("ram12", "ram"));
        assert!(!has_number_after("ramses", "ram"));
        assert!(!has_number_after("sda", "ram"));
    }
}
