//! The mounts of all processes. A filesystem that a container mounted is frozen like any
//! other, so every mount namespace that a process lives in is read, and each root
//! directory in it: a process in a chroot sees only a part.
//! Source: Documentation/filesystems/proc.rst, section 3.5.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::device::DevNo;
use crate::error::{IoContext, Result};

/// One line of mountinfo, and where it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// Unique on the machine while it is mounted.
    pub id: u64,
    /// `s_dev` of the superblock: the same for all its mounts; anonymous (major 0) for
    /// btrfs and filesystems without a device.
    pub superblock: DevNo,
    /// Which of its directories is mounted; `/` for all of it.
    pub root: PathBuf,
    /// The mount point, as its namespace names it.
    pub point: PathBuf,
    /// The path by which this process reaches the mount point.
    pub access: PathBuf,
    pub kind: String,
    pub source: OsString,
    /// Options of the superblock.
    pub options: String,
}

/// The mounts that this process sees.
pub(super) fn own() -> Result<Vec<Mount>> {
    const OWN: &str = "/proc/self/mountinfo";
    let own = fs::read(OWN).at("read the mounts", OWN)?;
    Ok(parse(&own, Path::new("/")))
}

/// All mounts, this process's own first. Processes that end meanwhile are skipped.
pub(super) fn all() -> Result<Vec<Mount>> {
    let mut mounts = own()?;
    let mut seen = HashSet::new();
    seen.extend(view(Path::new("/proc/self")));
    for entry in fs::read_dir("/proc")
        .at("list processes", "/proc")?
        .flatten()
    {
        let is_process = entry.file_name().as_bytes().iter().all(u8::is_ascii_digit);
        if !is_process {
            continue;
        }
        let process = entry.path();
        let fresh = view(&process).is_some_and(|view| seen.insert(view));
        if let (true, Ok(text)) = (fresh, fs::read(process.join("mountinfo"))) {
            mounts.extend(parse(&text, &process.join("root")));
        }
    }
    Ok(mounts)
}

/// What decides which mounts a process sees: its namespace and its root directory.
fn view(process: &Path) -> Option<(OsString, u64, u64)> {
    let namespace = fs::read_link(process.join("ns/mnt")).ok()?;
    let root = fs::metadata(process.join("root")).ok()?;
    Some((namespace.into_os_string(), root.dev(), root.ino()))
}

fn parse(text: &[u8], prefix: &Path) -> Vec<Mount> {
    text.split(|&b| b == b'\n')
        .filter_map(|line| parse_line(line, prefix))
        .collect()
}

fn parse_line(line: &[u8], prefix: &Path) -> Option<Mount> {
    let mut fields = line.split(|&b| b == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let superblock = std::str::from_utf8(fields.nth(1)?).ok()?.parse().ok()?;
    let root = PathBuf::from(unescape(fields.next()?));
    let point = PathBuf::from(unescape(fields.next()?));
    fields.find(|field| field == b"-")?;
    let kind = String::from_utf8_lossy(fields.next()?).into_owned();
    let source = unescape(fields.next()?);
    let options = unescape(fields.next().unwrap_or_default());
    Some(Mount {
        id,
        superblock,
        root,
        access: prefix.join(point.strip_prefix("/").unwrap_or(&point)),
        point,
        kind,
        source,
        options: options.to_string_lossy().into_owned(),
    })
}

/// Blank, tab, newline, backslash and `#` are written as three octal digits.
pub(super) fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, octal(tail)) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(bytes)
}

fn octal(digits: &[u8]) -> Option<u8> {
    let text = std::str::from_utf8(digits.get(..3)?).ok()?;
    u8::from_str_radix(text, 8).ok()
}

impl Mount {
    /// The value of `name=VALUE` among the superblock's options.
    pub(super) fn option(&self, name: &str) -> Option<&OsStr> {
        self.options.split(',').find_map(|option| {
            let (key, value) = option.split_once('=')?;
            (key == name).then_some(OsStr::new(value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_parsed_with_its_escapes_and_optional_fields() {
        let line = b"36 35 98:0 /sub\\040dir /mnt\\0402 rw,noatime master:1 shared:2 - xfs \
                     /dev/sda1 rw,logdev=/dev/sdb";
        let mount = parse_line(line, Path::new("/elsewhere")).unwrap();
        assert_eq!(mount.id, 36);
        assert_eq!(
            mount.superblock,
            DevNo {
                major: 98,
                minor: 0
            }
        );
        assert_eq!(mount.root, Path::new("/sub dir"));
        assert_eq!(mount.point, Path::new("/mnt 2"));
        assert_eq!(mount.access, Path::new("/elsewhere/mnt 2"));
        assert_eq!(
            (mount.kind.as_str(), mount.source.as_os_str()),
            ("xfs", OsStr::new("/dev/sda1"))
        );
        assert_eq!(mount.option("logdev"), Some(OsStr::new("/dev/sdb")));
        assert_eq!(mount.option("rtdev"), None);
    }

    #[test]
    fn lines_cut_short_are_no_mounts() {
        for line in [
            "",
            "36",
            "36 35 98:0 / /",
            "36 35 98:0 / / rw - ext4",
            "a b 98:0 / / rw - ext4 x y",
        ] {
            assert_eq!(parse_line(line.as_bytes(), Path::new("/")), None, "{line}");
        }
    }

    #[test]
    fn this_process_sees_its_root() {
        let mounts = all().unwrap();
        assert!(mounts.iter().any(|mount| mount.point == Path::new("/")));
    }
}
