//! Reading attributes of sysfs: one value a file, with a newline.

use std::fs;
use std::path::{Path, PathBuf};

use crate::device::DevNo;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// The folder of a disk or partition, links resolved.
pub fn folder(device: DevNo) -> Result<PathBuf> {
    let link = format!("/sys/dev/block/{device}");
    fs::canonicalize(&link).map_err(|source| {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::Vanished,
            _ => ErrorKind::Io,
        };
        Error::new(kind, "find the device in sysfs")
            .path(link)
            .source(source)
    })
}

/// The attribute's text, trimmed; `None` if it is not there.
pub fn text(folder: &Path, name: &str) -> Option<String> {
    let text = fs::read(folder.join(name)).ok()?;
    Some(String::from_utf8_lossy(&text).trim().to_owned())
}

/// The attribute as a number.
pub fn number(folder: &Path, name: &str) -> Result<u64> {
    let path = folder.join(name);
    let text = fs::read_to_string(&path).at("read the device's attribute", &path)?;
    text.trim().parse().map_err(|source| {
        Error::new(ErrorKind::Kernel, "read the device's attribute")
            .path(path)
            .detail(format!("{:?}", text.trim()))
            .source(source)
    })
}

/// The device number in this folder's `dev`.
pub fn devno(folder: &Path) -> Option<DevNo> {
    text(folder, "dev")?.parse().ok()
}

/// Names in a folder, sorted; none if it is not there.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Partitions of a disk: the folders within its own that have a `partition` number.
pub fn partition_folders(disk: &Path) -> Vec<PathBuf> {
    names(disk)
        .into_iter()
        .map(|name| disk.join(name))
        .filter(|folder| folder.join("partition").exists())
        .collect()
}

/// What is stacked on a disk or partition: dm, md, bcache.
pub fn holders(folder: &Path) -> Vec<DevNo> {
    let list = folder.join("holders");
    names(&list)
        .iter()
        .filter_map(|name| devno(&list.join(name)))
        .collect()
}

/// The name in /dev: sysfs writes `!` for `/` (`cciss!c0d0`).
pub fn device_name(folder: &Path) -> String {
    folder
        .file_name()
        .map(|name| name.to_string_lossy().replace('!', "/"))
        .unwrap_or_default()
}
