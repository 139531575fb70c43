//! Where a point is restored to: a file, written sparse under another name and renamed when it is
//! complete; or a block device, held exclusively, so that it is neither mounted nor in use.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use hrl_format::units::{ByteLen, ByteOffset, Extent, SectorSize, VolumeSize};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::base::{StretchKind, Stretches};
use super::layout::StoreFolder;
use crate::error::{Error, ErrorKind, IoContext, Result};

const OPEN: &str = "open the target of the restore";
const WRITE: &str = "write the restored volume";
/// A device is compared in steps of this where it should be zeroes.
const UPDATE_STEP: u64 = 1 << 20;
/// What differs is written in blocks of so many bytes.
const BLOCK: usize = 4096;
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
    /// The same, of a device alone: it is read, and only what differs is written.
    Update,
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
    /// Bytes that were written, or given back.
    written: AtomicU64,
}

enum Kind {
    /// A new file, which gets this name when it is complete.
    File {
        name: PathBuf,
    },
    Device,
    /// A device of which only what differs is written.
    Update,
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
            let kind = match overwrite {
                Overwrite::Update => Kind::Update,
                Overwrite::Refuse | Overwrite::Replace => Kind::Device,
            };
            return open_device(path, image, metadata.rdev(), kind);
        }
        if overwrite == Overwrite::Update {
            return Err(Error::new(ErrorKind::Invalid, OPEN)
                .path(path)
                .detail("not a block device"));
        }
        // What a link leads to is what is replaced.
        let path = path.canonicalize().at(OPEN, path)?;
        refuse_loop_backing(&path)?;
        open_file(&path, image)
    }

    /// Writes `data` at `offset`; a file stays sparse where it is zeroes.
    pub(super) fn write(&self, offset: ByteOffset, data: &[u8]) -> Result<()> {
        if !matches!(self.kind, Kind::Update) {
            return self.write_all(offset, data);
        }
        let mut there = vec![0; data.len()];
        let read = self.file.read_exact_at(&mut there, offset.get());
        read.map_err(|e| self.error(e, offset))?;
        for (start, end) in differing(data, &there) {
            let at = ByteOffset::new(offset.get() + start as u64);
            self.write_all(at, &data[start..end])?;
        }
        Ok(())
    }

    fn write_all(&self, offset: ByteOffset, data: &[u8]) -> Result<()> {
        self.count(data.len() as u64);
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
                    self.zero_all(Extent::between(ByteOffset::new(at), ByteOffset::new(end)))?;
                }
            }
        }
        Ok(())
    }

    /// Makes `extent` read as zeroes.
    pub(super) fn zeroes(&self, extent: Extent) -> Result<()> {
        if !matches!(self.kind, Kind::Update) {
            return self.zero_all(extent);
        }
        let mut there = vec![0; UPDATE_STEP as usize];
        let (mut at, end) = (extent.offset().get(), extent.end().get());
        while at < end {
            let here = &mut there[..UPDATE_STEP.min(end - at) as usize];
            let offset = ByteOffset::new(at);
            let read = self.file.read_exact_at(here, at);
            read.map_err(|e| self.error(e, offset))?;
            if here.iter().any(|&byte| byte != 0) {
                let end = ByteOffset::new(at + here.len() as u64);
                self.count(here.len() as u64);
                self.zero_all(Extent::between(offset, end))?;
            }
            at += here.len() as u64;
        }
        Ok(())
    }

    /// How much was written.
    pub(super) fn written(&self) -> ByteLen {
        ByteLen::new(self.written.load(Ordering::Relaxed))
    }

    fn count(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    fn zero_all(&self, extent: Extent) -> Result<()> {
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
        written: AtomicU64::new(0),
    })
}

/// The ranges of `data` that are not what is `there`, in blocks, neighbours joined.
fn differing(data: &[u8], there: &[u8]) -> Vec<(usize, usize)> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    let blocks = data.chunks(BLOCK).zip(there.chunks(BLOCK)).enumerate();
    for (number, (data, there)) in blocks {
        if data == there {
            continue;
        }
        let (start, end) = (number * BLOCK, number * BLOCK + data.len());
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

fn open_device(path: &Path, image: Image, number: u64, kind: Kind) -> Result<Target> {
    let mut options = OpenOptions::new();
    // O_EXCL on a block device: nobody else has it, mounted, swapped to, or under a mapping.
    let reads = matches!(kind, Kind::Update);
    let open = options.read(reads).write(true).custom_flags(libc::O_EXCL);
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
            kind,
            written: AtomicU64::new(0),
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
