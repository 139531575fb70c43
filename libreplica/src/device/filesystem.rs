//! One mounted filesystem, whatever the number of its mounts, and the way to a descriptor
//! of it: through the mount namespaces of other processes where need be.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::device::DevNo;
use crate::device::mountinfo::Mount;
use crate::error::{Error, ErrorKind, IoContext, Result};

/// What can be done to bring a filesystem to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freezing {
    /// FIFREEZE is known to work, or not known to fail.
    Freezes,
    /// The type has no freeze (vfat): it is synced, and may be written again at once.
    SyncOnly,
}

/// A mounted filesystem.
#[derive(Clone, Debug)]
pub struct Filesystem {
    superblock: DevNo,
    kind: String,
    source: OsString,
    options: String,
    pub(super) devices: Vec<DevNo>,
    accesses: Vec<Access>,
    mount_point: PathBuf,
    pub(super) level: usize,
}

/// One of its mounts.
#[derive(Clone, Debug)]
struct Access {
    mount: u64,
    path: PathBuf,
}

/// Types without `freeze_fs` in the kernel's sources; others are asked.
const SYNC_ONLY: [&str; 17] = [
    "vfat", "msdos", "exfat", "ntfs3", "ntfs", "fuseblk", "udf", "hfs", "hfsplus", "minix", "ufs",
    "affs", "iso9660", "squashfs", "erofs", "cramfs", "romfs",
];

impl Filesystem {
    /// The filesystem of these mounts: all of one superblock, not none.
    pub(super) fn of(mounts: &[&Mount], devices: Vec<DevNo>) -> Option<Self> {
        let mut mounts = mounts.to_vec();
        // Whole filesystem before parts of it, this namespace before others, short paths first.
        mounts.sort_by_key(|mount| {
            (
                mount.root != Path::new("/"),
                mount.access != mount.point,
                mount.point.components().count(),
            )
        });
        let first = mounts.first()?;
        Some(Self {
            superblock: first.superblock,
            kind: first.kind.clone(),
            source: first.source.clone(),
            options: first.options.clone(),
            devices,
            mount_point: first.point.clone(),
            accesses: mounts
                .iter()
                .map(|mount| Access {
                    mount: mount.id,
                    path: mount.access.clone(),
                })
                .collect(),
            level: 0,
        })
    }

    /// Whether it is mounted so that nothing of it can change.
    pub fn is_read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }

    /// The superblock's number; of a block device, or anonymous (btrfs).
    pub const fn superblock(&self) -> DevNo {
        self.superblock
    }

    /// Its type: `ext4`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// What was mounted: `/dev/sda2`.
    pub fn source(&self) -> &Path {
        Path::new(&self.source)
    }

    /// Where it is mounted, in its own namespace's words; the first of several.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// The block devices that it lies on.
    pub fn devices(&self) -> &[DevNo] {
        &self.devices
    }

    /// What can be done to bring it to rest.
    pub fn freezing(&self) -> Freezing {
        if SYNC_ONLY.contains(&self.kind.as_str()) || self.kind.starts_with("fuse") {
            Freezing::SyncOnly
        } else {
            Freezing::Freezes
        }
    }

    /// Writes out what is dirty, and waits for it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it cannot be reached; [`ErrorKind::Io`] if it could not
    /// write, now or since the last time it was asked.
    pub fn sync(&self) -> Result<()> {
        nix::unistd::syncfs(self.open()?).at("sync the filesystem", &self.mount_point)
    }

    /// How deep it lies in the tree of mounts; the innermost is frozen first.
    pub(super) fn depth(&self) -> usize {
        self.mount_point.components().count()
    }

    /// Whether files may be mapped past the block layer, given a disk that can do it: all
    /// but `dax=never`, for with the default each file decides.
    pub(super) fn may_use_dax(&self) -> bool {
        matches!(self.kind.as_str(), "ext2" | "ext4" | "xfs")
            && !self.options.split(',').any(|option| option == "dax=never")
    }

    /// A descriptor of it, for syncing and freezing. While it is open the mount is busy:
    /// keep it for the length of a point, not longer.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if none of its mounts can be reached: unmounted meanwhile, or
    /// hidden below other mounts; why, for the last that was tried.
    pub fn open(&self) -> Result<OwnedFd> {
        let mut last = None;
        for access in &self.accesses {
            match access.open() {
                Ok(file) => return Ok(file.into()),
                Err(error) => last = Some(error),
            }
        }
        let error = Error::new(ErrorKind::State, "reach the mounted filesystem")
            .path(&self.mount_point)
            .detail(format!("{} of {}", self.kind, self.source().display()));
        Err(match last {
            Some(last) => error.source(last),
            None => error,
        })
    }
}

impl Access {
    /// Opens the mount's root, and makes sure that it is of this mount: another may lie
    /// over it. Only directories and plain files are opened for real (a bind mount may be
    /// of a device or a FIFO).
    fn open(&self) -> Result<File> {
        const OPERATION: &str = "open the mount";
        let place = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&self.path)
            .at(OPERATION, &self.path)?;
        if mount_id(&place) != Some(self.mount) {
            return Err(Error::new(ErrorKind::State, OPERATION)
                .path(&self.path)
                .detail("another mount lies over it, or it was unmounted"));
        }
        let meta = place.metadata().at(OPERATION, &self.path)?;
        if !meta.is_dir() && !meta.is_file() {
            return Err(Error::new(ErrorKind::State, OPERATION)
                .path(&self.path)
                .detail("neither a folder nor a plain file is mounted here"));
        }
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", place.as_raw_fd()))
            .at(OPERATION, &self.path)
    }
}

/// The mount that an open file was reached through.
pub(super) fn mount_id(file: &File) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
    line.trim().parse().ok()
}
