//! Where a point is restored to: a file, written sparse under another name and renamed when it is
//! complete; or a block device, held exclusively, so that it is neither mounted nor in use.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hrl_format::units::{ByteLen, ByteOffset, Extent, SectorSize, VolumeSize};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::base::{StretchKind, Stretches};
use super::layout::StoreFolder;
use crate::error::{Error, ErrorKind, IoContext, Result};

const OPEN: &str = "open the target of the restore";
const WRITE: &str = "write the restored volume";
/// Ranges of a device are zeroed in steps of this, each one call that cannot be interrupted.
const ZERO_STEP: u64 = 1 << 30;

/// What to do with a file, or a device, that is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// Refuse.
    #[default]
    Refuse,
    /// Replace its content. Even so nothing that is in use is overwritten.
    Replace,
}

/// What will be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image {
    pub(super) size: VolumeSize,
    pub(super) sector: SectorSize,
}

/// A target that is open.
pub(super) struct Target {
    file: File,
    /// Where the bytes go now.
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    /// A new file, which gets this name when it is complete.
    File {
        name: PathBuf,
    },
    Device,
}

impl Target {
    pub(super) fn open(path: &Path, image: Image, overwrite: Overwrite) -> Result<Self> {
        let metadata = match fs::metadata(path) {
            Ok(metadata) => Some(metadata),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io(OPEN, e).path(path)),
        };
        let Some(metadata) = metadata else {
            return open_file(path, image);
        };
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::new(ErrorKind::Invalid, OPEN)
                .path(path)
                .detail("neither a file nor a block device"));
        }
        if overwrite == Overwrite::Refuse {
            return Err(Error::new(ErrorKind::Exists, OPEN)
                .path(path)
                .detail("it is there already")
                .advice("name another, or overwrite it with --force"));
        }
        if kind.is_block_device() {
            return open_device(path, image, metadata.rdev());
        }
        // What a link leads to is what is replaced.
        let path = path.canonicalize().at(OPEN, path)?;
        refuse_loop_backing(&path)?;
        open_file(&path, image)
    }

    /// Writes `data` at `offset`; a file stays sparse where it is zeroes.
    pub(super) fn write(&self, offset: ByteOffset, data: &[u8]) -> Result<()> {
        for stretch in Stretches::new(data) {
            let at = offset.get() + stretch.start as u64;
            match stretch.kind {
                StretchKind::Data => {
                    let data = &data[stretch.start..stretch.end];
                    let written = self.file.write_all_at(data, at);
                    written.map_err(|e| self.error(e, ByteOffset::new(at)))?;
                }
                StretchKind::Zeroes => {
                    let end = offset.get() + stretch.end as u64;
                    self.zeroes(Extent::between(ByteOffset::new(at), ByteOffset::new(end)))?;
                }
            }
        }
        Ok(())
    }

    /// Makes `extent` read as zeroes.
    pub(super) fn zeroes(&self, extent: Extent) -> Result<()> {
        if matches!(self.kind, Kind::File { .. }) {
            return Ok(());
        }
        let (mut at, end) = (extent.offset().get(), extent.end().get());
        while at < end {
            let until = end.min(at + ZERO_STEP);
            self.zero_device(Extent::between(ByteOffset::new(at), ByteOffset::new(until)))?;
            at = until;
        }
        Ok(())
    }

    /// By giving the range back where the device can, else by the device's own zeroing, else by
    /// writing zeroes.
    fn zero_device(&self, extent: Extent) -> Result<()> {
        let (offset, len) = (extent.offset().get(), extent.len().get());
        for mode in [
            FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            FallocateFlags::FALLOC_FL_ZERO_RANGE,
        ] {
            let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match fallocate(&self.file, mode, offset.cast_signed(), len.cast_signed()) {
                Ok(()) => return Ok(()),
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINVAL) => {}
                Err(errno) => return Err(self.error(errno.into(), extent.offset())),
            }
        }
        static ZEROES: [u8; 256 << 10] = [0; 256 << 10];
        let mut at = offset;
        while at < extent.end().get() {
            let len = (extent.end().get() - at).min(ZEROES.len() as u64);
            let written = self.file.write_all_at(&ZEROES[..len as usize], at);
            written.map_err(|e| self.error(e, ByteOffset::new(at)))?;
            at += len;
        }
        Ok(())
    }

    /// Makes what was written durable, and gives a file its name.
    pub(super) fn finish(self) -> Result<()> {
        self.file.sync_all().at(WRITE, &self.path)?;
        let Kind::File { name } = self.kind else {
            return Ok(());
        };
        fs::rename(&self.path, &name).at(WRITE, &name)?;
        let folder = folder_of(&name);
        File::open(folder)
            .and_then(|f| f.sync_all())
            .at(WRITE, folder)
    }

    /// Gives up: an incomplete file is removed.
    pub(super) fn abandon(self) {
        if let Kind::File { .. } = self.kind {
            // The error that led here is the one to report.
            let _ = fs::remove_file(&self.path);
        }
    }

    /// Where the bytes are that were written so far.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn error(&self, source: io::Error, at: ByteOffset) -> Error {
        Error::io(WRITE, source).path(&self.path).offset(at)
    }
}

/// Nothing is restored into a store, be it another one: it would replace a file that points need,
/// or lie among such files.
pub(super) fn refuse_store(output: &Path) -> Result<()> {
    // What a link leads to is what is replaced; what is not there yet is made in its folder.
    let place = output
        .canonicalize()
        .or_else(|_| folder_of(output).canonicalize());
    let Ok(place) = place else {
        // Opening it says what is missing.
        return Ok(());
    };
    let around = |folder: &&Path| StoreFolder::new(folder).marker().exists();
    match place.ancestors().find(around) {
        None => Ok(()),
        Some(store) => Err(Error::new(ErrorKind::Invalid, OPEN)
            .path(output)
            .detail(format!("it lies within the store {}", store.display()))
            .advice("name a file or device outside of every store")),
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn open_file(name: &Path, image: Image) -> Result<Target> {
    let Some(last) = name.file_name() else {
        return Err(Error::new(ErrorKind::Invalid, OPEN)
            .path(name)
            .detail("not the name of a file"));
    };
    let mut partial = std::ffi::OsString::from(".");
    partial.push(last);
    partial.push(".restoring");
    let path = folder_of(name).join(partial);
    let mut options = OpenOptions::new();
    // A copy of a disk must not be easier to read than the disk.
    let open = options.write(true).create(true).truncate(true).mode(0o600);
    let file = open.open(&path).at(OPEN, &path)?;
    file.set_len(image.size.get()).at(OPEN, &path)?;
    Ok(Target {
        file,
        path,
        kind: Kind::File {
            name: name.to_owned(),
        },
    })
}

fn open_device(path: &Path, image: Image, number: u64) -> Result<Target> {
    let mut options = OpenOptions::new();
    // O_EXCL on a block device: nobody else has it, mounted, swapped to, or under a mapping.
    let open = options.write(true).custom_flags(libc::O_EXCL);
    let mut file = open.open(path).map_err(|e| {
        let busy = e.raw_os_error() == Some(libc::EBUSY);
        let error = Error::io(OPEN, e).path(path);
        if busy {
            error.advice("it is mounted or in use; free it first (see `lsblk`)")
        } else {
            error
        }
    })?;
    let size = file.seek(SeekFrom::End(0)).at(OPEN, path)?;
    let refuse = |why: String| Err(Error::new(ErrorKind::Invalid, OPEN).path(path).detail(why));
    if size < image.size.get() {
        return refuse(format!(
            "the device has {size} bytes, the volume {}",
            image.size
        ));
    }
    match device_sector(number) {
        Some(sector) if sector > u64::from(image.sector.get()) => refuse(format!(
            "the device has sectors of {sector} bytes, the volume of {}: partition tables and \
             filesystems count in sectors, and would not be found on it",
            image.sector.get()
        )),
        _ => Ok(Target {
            file,
            path: path.to_owned(),
            kind: Kind::Device,
        }),
    }
}

/// The logical sector size of a device, as sysfs says; of a partition, that of its disk.
fn device_sector(number: u64) -> Option<u64> {
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let device = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let of = |folder: &Path| fs::read_to_string(folder.join("queue/logical_block_size")).ok();
    let text = of(&device).or_else(|| of(device.canonicalize().ok()?.parent()?))?;
    text.trim().parse().ok()
}

/// A file that a loop device lies on may be mounted through it.
fn refuse_loop_backing(path: &Path) -> Result<()> {
    let Ok(devices) = fs::read_dir("/sys/block") else {
        return Ok(());
    };
    for device in devices.flatten() {
        let backing = fs::read_to_string(device.path().join("loop/backing_file"));
        if backing.is_ok_and(|backing| Path::new(backing.trim_end_matches('\n')) == path) {
            let name = device.file_name();
            return Err(Error::new(ErrorKind::Busy, OPEN)
                .path(path)
                .detail(format!("/dev/{} lies on it", name.to_string_lossy()))
                .advice("detach that, or name another file"));
        }
    }
    Ok(())
}

/// How far a restore or a check is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: ByteLen,
    /// Bytes in all.
    pub total: ByteLen,
}
