//! Every change the store makes to its folder goes through here: files made and written,
//! holes punched, renames, removals, and the syncs that make them last. One narrow door has
//! two uses. Errors name the file and what was done to it; and the tests stand in it: they
//! record each step, and rebuild the folder as a crash behind any of them could leave it
//! (`store/tests/crash.rs`).
//!
//! Data before the pointer to it: callers sync a file before they rename it into place, and the
//! folder after.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hrl_format::units::{ByteLen, ByteOffset, Extent};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::pwritev;

use crate::error::{Error, ErrorKind, IoContext, Result};

/// One step, as the tests record it, before it is done.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(
    not(test),
    expect(dead_code, reason = "only the tests' recorder reads it")
)]
pub(super) enum Step<'a> {
    CreateFolder(&'a Path),
    CreateFile(&'a Path),
    Write(&'a Path, ByteOffset, &'a [u8]),
    Punch(&'a Path, Extent),
    SetLen(&'a Path, ByteLen),
    SyncFile(&'a Path),
    Rename(&'a Path, &'a Path),
    Link(&'a Path, &'a Path),
    Remove(&'a Path),
    SyncFolder(&'a Path),
}

#[cfg(test)]
use super::tests::record;

/// Nobody watches outside of tests.
#[cfg(not(test))]
#[inline]
fn record(_: Step<'_>) {}

/// A file of the store, open for writing.
#[derive(Debug)]
pub(super) struct StoreFile {
    file: File,
    path: PathBuf,
    /// Where the next sequential write goes.
    position: ByteOffset,
}

impl StoreFile {
    /// A new, empty file; one of that name is emptied.
    pub(super) fn create(path: PathBuf) -> Result<Self> {
        record(Step::CreateFile(&path));
        let mut options = OpenOptions::new();
        let open = options.write(true).read(true).create(true).truncate(true);
        let file = open.open(&path).at("make a file of the store", &path);
        let file = file.map_err(advise)?;
        Ok(Self {
            file,
            path,
            position: ByteOffset::ZERO,
        })
    }

    /// A file that is there.
    pub(super) fn open(path: PathBuf) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.write(true).read(true).open(&path);
        Ok(Self {
            file: file.at("open a file of the store", &path).map_err(advise)?,
            path,
            position: ByteOffset::ZERO,
        })
    }

    /// Writes all of `data` at `offset`.
    pub(super) fn write_at(&self, offset: ByteOffset, data: &[u8]) -> Result<()> {
        record(Step::Write(&self.path, offset, data));
        let written = self.file.write_all_at(data, offset.get());
        written.map_err(|e| {
            Error::io("write to the store", e)
                .path(&self.path)
                .offset(offset)
        })
    }

    /// Makes `extent` read as zeroes and gives its space back. Where the filesystem cannot,
    /// zeroes are written. Beyond the file's end nothing happens.
    pub(super) fn punch(&self, extent: Extent) -> Result<()> {
        let end = self.len()?.get().min(extent.end().get());
        let extent = Extent::between(extent.offset(), ByteOffset::new(end));
        if extent.is_empty() {
            return Ok(());
        }
        record(Step::Punch(&self.path, extent));
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (offset, len) = (extent.offset().get(), extent.len().get());
        match fallocate(&self.file, mode, offset.cast_signed(), len.cast_signed()) {
            Ok(()) => Ok(()),
            Err(nix::errno::Errno::EOPNOTSUPP | nix::errno::Errno::ENOSYS) => {
                self.write_zeroes(extent)
            }
            Err(errno) => Err(Error::io("punch a hole", errno.into())
                .path(&self.path)
                .offset(extent.offset())),
        }
    }

    fn write_zeroes(&self, extent: Extent) -> Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let (mut at, end) = (extent.offset().get(), extent.end().get());
        while at < end {
            let len = (end - at).min(ZEROES.len() as u64);
            self.file
                .write_all_at(&ZEROES[..len as usize], at)
                .at("write zeroes to the store", &self.path)?;
            at += len;
        }
        Ok(())
    }

    /// How long the file is.
    pub(super) fn len(&self) -> Result<ByteLen> {
        let metadata = self.file.metadata();
        Ok(ByteLen::new(
            metadata
                .at("look at a file of the store", &self.path)?
                .len(),
        ))
    }

    /// Cuts the file, or lengthens it by a hole.
    pub(super) fn set_len(&self, len: ByteLen) -> Result<()> {
        record(Step::SetLen(&self.path, len));
        self.file
            .set_len(len.get())
            .at("set the length of a file of the store", &self.path)
    }

    /// Returns when the file's data, and what is needed to find them, are on the medium.
    pub(super) fn sync(&self) -> Result<()> {
        record(Step::SyncFile(&self.path));
        self.file
            .sync_data()
            .at("sync a file of the store", &self.path)
    }
}

impl Write for StoreFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        record(Step::Write(&self.path, self.position, data));
        self.file.write_all_at(data, self.position.get())?;
        self.position = ByteOffset::new(self.position.get() + data.len() as u64);
        Ok(data.len())
    }

    /// A frame's parts in one call.
    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut at = self.position;
        for part in parts {
            record(Step::Write(&self.path, at, part));
            at = ByteOffset::new(at.get() + part.len() as u64);
        }
        let written = pwritev(&self.file, parts, self.position.get().cast_signed())?;
        self.position = ByteOffset::new(self.position.get() + written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Makes a folder; one that is there is fine.
pub(super) fn create_folder(path: &Path) -> Result<()> {
    record(Step::CreateFolder(path));
    match std::fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.at("make a folder of the store", path).map_err(advise),
    }
}

/// Puts a synced file in its place, over what was there.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    record(Step::Rename(from, to));
    let renamed = std::fs::rename(from, to).at("rename a file of the store", from);
    renamed.map_err(advise)
}

/// Gives a file that is never written again a second name. Where the filesystem has none, it is
/// copied, and synced.
pub(super) fn link(from: &Path, to: &Path) -> Result<()> {
    const LINK: &str = "link a file of the store";
    record(Step::Link(from, to));
    match std::fs::hard_link(from, to) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(e)
            if matches!(
                e.raw_os_error(),
                Some(libc::EPERM | libc::EOPNOTSUPP | libc::EMLINK | libc::EXDEV)
            ) =>
        {
            std::fs::copy(from, to).at(LINK, to)?;
            File::open(to)
                .and_then(|copy| copy.sync_data())
                .at(LINK, to)
        }
        linked => linked.at(LINK, from).map_err(advise),
    }
}

/// Removes a file; one that is gone already is fine.
pub(super) fn remove(path: &Path) -> Result<()> {
    record(Step::Remove(path));
    match std::fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        gone => gone.at("remove a file of the store", path).map_err(advise),
    }
}

/// Returns when the names in `folder` are on the medium.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    record(Step::SyncFolder(folder));
    let open = File::open(folder).at("open a folder of the store", folder)?;
    open.sync_all().at("sync a folder of the store", folder)
}

/// The names in `folder`. Names that are not UTF-8 are none of ours and left out.
pub(super) fn names_in(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).at("list a folder of the store", folder)? {
        let entry = entry.at("list a folder of the store", folder)?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort_unstable();
    Ok(names)
}

/// The whole of a small file; `None` if there is none.
pub(super) fn read_small(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read a file of the store", e).path(path)),
    }
}

/// Replaces small files as one: all are written and synced under other names, which is all
/// that can run out of space, then renamed, then their folder is synced.
///
/// The error says whether some may have been replaced.
pub(super) fn replace_all(files: &[(PathBuf, &[u8])], folder: &Path) -> Result<(), Replaced> {
    let scratch = |path: &Path| path.with_added_extension("new");
    let write = |path: &Path, bytes: &[u8]| {
        let mut file = StoreFile::create(scratch(path))?;
        file.write_all(bytes).at("write to the store", path)?;
        file.sync()
    };
    for (path, bytes) in files {
        if let Err(error) = write(path, bytes) {
            for (path, _) in files {
                // The first error is the one to report.
                let _ = remove(&scratch(path));
            }
            return Err(Replaced::None(error));
        }
    }
    for (path, _) in files {
        rename(&scratch(path), path).map_err(Replaced::Unknown)?;
    }
    sync_folder(folder).map_err(Replaced::Unknown)
}

/// Why [`replace_all`] failed, and what it left.
#[derive(Debug)]
pub(super) enum Replaced {
    /// Every file is as before.
    None(Error),
    /// Some may be new; what is on the medium is unknown.
    Unknown(Error),
}

impl Replaced {
    pub(super) fn into_error(self) -> Error {
        match self {
            Self::None(error) | Self::Unknown(error) => error,
        }
    }
}

/// Says what to do about a store that cannot be written to.
pub(super) fn advise(error: Error) -> Error {
    match error.errno() {
        Some(libc::EROFS) => error.advice(
            "the filesystem is read-only: points can be restored from it; to write, mount it \
             anew (if the kernel made it so, `dmesg` says why)",
        ),
        Some(libc::EACCES | libc::EPERM) => {
            error.advice("this user may not write there: become root, or the store's owner")
        }
        Some(libc::ENOENT | libc::ESTALE) => {
            error.advice("is the filesystem of the store still mounted?")
        }
        Some(libc::EIO) => error.advice(
            "the medium fails (`dmesg`): `replica store check` says what can still be restored",
        ),
        _ => error,
    }
}

/// An error that says which file does not hold what it must.
pub(super) fn damaged(operation: &'static str, path: &Path, why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Damaged, operation)
        .path(path)
        .detail(why)
}
