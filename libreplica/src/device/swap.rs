//! Swap in use on a disk. What is swapped out means nothing to whoever restores the disk,
//! and is written as long as the machine runs: it is left out of what must be quiet for a
//! point, and of the copy. Its first page is kept, for it says that this is swap, and
//! carries its UUID.
//!
//! Leaving out a byte that is not swap would lose data, so an area counts only if its place
//! is known for as long as it is in use (the kernel pins partitions, and files of the
//! filesystems below), and if its header is found on the disk where it should be: whatever
//! the path in /proc/swaps leads to here, another namespace's file perhaps, these bytes are
//! swap. All other swap is copied like data.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hrl_format::units::{ByteLen, ByteOffset, Extent};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{SysconfVar, sysconf};

use crate::device::mountinfo::unescape;
use crate::device::{BlockDevice, DevNo, Layers, file_place, place, sysfs};
use crate::error::{Error, IoContext, Result};
use crate::sys::reader::{ReadEngine, Reader, ReaderOptions};

const SWAPS: &str = "/proc/swaps";
const OPERATION: &str = "find the swap in use";

/// A swap partition or file, and the bytes of the disk that it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapArea {
    /// As /proc/swaps names it.
    pub path: PathBuf,
    /// All of it, header included, in its own order.
    pub extents: Vec<Extent>,
    /// Its first page, of which a copy must hold what the disk holds.
    pub header: Extent,
}

impl SwapArea {
    /// What may be left out: all but the header.
    pub fn body(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.iter().filter_map(|extent| {
            let start = match extent.intersect(self.header) {
                Some(header) => header.end(),
                None => extent.offset(),
            };
            let body = Extent::between(start, extent.end());
            (!body.is_empty()).then_some(body)
        })
    }
}

/// The swap in use on one disk, and whether that is still so.
///
/// ```no_run
/// # fn main() -> libreplica::Result<()> {
/// use libreplica::device::{BlockDevice, Swap};
/// let disk = BlockDevice::open("/dev/sda")?;
/// let swap = Swap::on(&disk)?;
/// let left_out = swap.bodies();
/// // ... copy the rest ...
/// assert!(!swap.has_changed()? && Swap::on(&disk)?.bodies() == left_out);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Swap {
    areas: Vec<SwapArea>,
    unplaced: Vec<PathBuf>,
    table: Option<File>,
}

impl Swap {
    /// The swap now in use on `disk`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if /proc cannot be read.
    pub fn on(disk: &BlockDevice) -> Result<Self> {
        let mut swap = Self {
            areas: Vec::new(),
            unplaced: Vec::new(),
            table: None,
        };
        // Open before it is read, so that what changes from here on is told.
        let table = match File::open(SWAPS) {
            Ok(table) => table,
            // A kernel without swap.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(swap),
            Err(error) => return Err(Error::io(OPERATION, error).path(SWAPS)),
        };
        let rows = rows(&fs::read(SWAPS).at(OPERATION, SWAPS)?);
        swap.table = Some(table);
        if rows.is_empty() {
            return Ok(swap);
        }
        let layers = Layers::above(&[disk])?;
        let finder = Finder { disk, layers };
        for row in rows {
            // What cannot be looked at is data like any other.
            match finder.find(&row) {
                Ok(Found::Elsewhere) => {}
                Ok(Found::Here(area)) => swap.areas.push(area),
                Ok(Found::SomewhereHere) | Err(_) => swap.unplaced.push(row.path),
            }
        }
        Ok(swap)
    }

    /// The areas whose bytes are known.
    pub fn areas(&self) -> &[SwapArea] {
        &self.areas
    }

    /// Swap on this disk, or perhaps on it, where nobody can tell its bytes (over RAID,
    /// encryption or a loop device; on a filesystem that moves files): it is data like any
    /// other.
    pub fn unplaced(&self) -> &[PathBuf] {
        &self.unplaced
    }

    /// What may be left out of a copy of the disk: the areas without their headers, sorted.
    pub fn bodies(&self) -> Vec<Extent> {
        let mut bodies: Vec<Extent> = self.areas.iter().flat_map(SwapArea::body).collect();
        bodies.sort_unstable();
        bodies
    }

    /// Whether any swap, of this disk or another, was switched on or off since. The kernel
    /// tells each caller once: after the first yes, ask anew with [`Swap::on`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] if the kernel cannot be asked.
    pub fn has_changed(&self) -> Result<bool> {
        let Some(table) = &self.table else {
            return Ok(false);
        };
        let mut asked = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
        poll(&mut asked, PollTimeout::ZERO).at(OPERATION, SWAPS)?;
        let told = asked[0].revents().unwrap_or(PollFlags::empty());
        Ok(told.contains(PollFlags::POLLPRI))
    }
}

/// A row of /proc/swaps.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    path: PathBuf,
    /// What can be swapped to, without header and bad pages, in units of 1024 bytes.
    kibibytes: u64,
}

/// The rows below the heading.
fn rows(text: &[u8]) -> Vec<Row> {
    text.split(|&b| b == b'\n')
        .skip(1)
        .filter_map(|line| {
            let mut words = line
                .split(u8::is_ascii_whitespace)
                .filter(|word| !word.is_empty());
            let path = PathBuf::from(unescape(words.next()?));
            let size = std::str::from_utf8(words.nth(1)?).ok()?;
            let kibibytes = size.parse().ok()?;
            Some(Row { path, kibibytes })
        })
        .collect()
}

enum Found {
    Elsewhere,
    Here(SwapArea),
    SomewhereHere,
}

struct Finder<'a> {
    disk: &'a BlockDevice,
    layers: Layers,
}

impl Finder<'_> {
    fn find(&self, row: &Row) -> Result<Found> {
        let path = &row.path;
        let meta = fs::metadata(path).at(OPERATION, path)?;
        let places = if meta.file_type().is_block_device() {
            let device = DevNo::from_stat(meta.rdev());
            if !self.layers.has_device(device) {
                return Ok(Found::Elsewhere);
            }
            self.of_device(device)
        } else {
            if !self.layers.hold(path)? {
                return Ok(Found::Elsewhere);
            }
            let file = File::options()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
                .open(path)
                .at(OPERATION, path)?;
            self.of_file(path, &file)
        };
        let Some((header, places)) = places.and_then(|places| Some((header(&places)?, places)))
        else {
            return Ok(Found::SomewhereHere);
        };
        Ok(match self.size_in(header)? {
            Some(size) if size.get() > row.kibibytes.saturating_mul(1024) => {
                Found::Here(SwapArea {
                    path: path.clone(),
                    extents: first(places, size),
                    header,
                })
            }
            _ => Found::SomewhereHere,
        })
    }

    fn of_device(&self, device: DevNo) -> Option<Vec<Extent>> {
        let folder = sysfs::folder(device).ok()?;
        let bytes = sysfs::number(&folder, "size").ok()?.checked_mul(512)?;
        let whole = Extent::new(ByteOffset::ZERO, ByteLen::new(bytes))?;
        place::on_disk(self.disk.devno(), device, whole)
    }

    fn of_file(&self, path: &Path, file: &File) -> Option<Vec<Extent>> {
        let superblock = self.layers.superblock_of(path)?;
        let mut filesystems = self.layers.filesystems().iter();
        let filesystem = filesystems.find(|fs| fs.superblock() == superblock)?;
        // Over several devices (btrfs, a realtime device of XFS) nothing says which is meant.
        let [device] = filesystem.devices() else {
            return None;
        };
        let mut places = Vec::new();
        for extent in file_place::on_device(file, filesystem.kind())? {
            places.extend(place::on_disk(self.disk.devno(), *device, extent)?);
        }
        Some(places)
    }

    /// How long the swap area is, by the header that the disk has there; `None` if it has
    /// none.
    fn size_in(&self, header: Extent) -> Result<Option<ByteLen>> {
        let sector = self.disk.logical_sector();
        let page = u32::try_from(header.len().get()).unwrap_or(u32::MAX);
        let options = ReaderOptions {
            depth: 1,
            piece: page.max(sector.get()),
            engine: ReadEngine::Plain,
        };
        let mut reader = Reader::open(self.disk.node(), sector, options)?;
        let mut pieces = reader.pieces([header]);
        let mut bytes = Vec::new();
        while let Some((_, piece)) = pieces.next()? {
            bytes.extend_from_slice(piece);
        }
        Ok(size_by(&bytes))
    }
}

/// The first page of an area at these places; `None` if it is not in one piece, as may be
/// where a filesystem's blocks are smaller than a page.
fn header(places: &[Extent]) -> Option<Extent> {
    let page = u64::try_from(sysconf(SysconfVar::PAGE_SIZE).ok()??).ok()?;
    let header = Extent::new(places.first()?.offset(), ByteLen::new(page))?;
    (places.first()?.len() >= header.len()).then_some(header)
}

/// The first `len` bytes of `places`: what follows an area in its partition or file is not
/// the kernel's to swap to.
fn first(places: Vec<Extent>, len: ByteLen) -> Vec<Extent> {
    let mut left = len.get();
    let mut first = Vec::new();
    for place in places {
        let len = place.len().get().min(left);
        first.extend(Extent::new(place.offset(), ByteLen::new(len)));
        left -= len;
    }
    first.retain(|extent| !extent.is_empty());
    first
}

/// The bytes of the swap area that begins with this page, itself included.
/// Source: linux/swap.h, `union swap_header`.
fn size_by(page: &[u8]) -> Option<ByteLen> {
    let number = |at: usize| {
        let bytes = page.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes))
    };
    let (version, last) = (number(1024)?, number(1028)?);
    let pages = u64::from(last) + 1;
    (page.ends_with(b"SWAPSPACE2") && version == 1).then(|| ByteLen::new(pages * page.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, len: u64) -> Extent {
        Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap()
    }

    fn row(path: &str, kibibytes: u64) -> Row {
        let path = PathBuf::from(path);
        Row { path, kibibytes }
    }

    #[test]
    fn names_with_blanks_are_read() {
        let text = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
            /dev/sda3                               partition\t1020\t\t0\t\t-2\n\
            /a\\040b                                 file\t\t8188\t\t4\t\t-3\n";
        assert_eq!(rows(text), [row("/dev/sda3", 1020), row("/a b", 8188)]);
        assert!(rows(b"").is_empty());
        assert!(rows(b"Filename\n/dev/sda3 partition many").is_empty());
    }

    #[test]
    fn the_body_is_what_the_kernel_uses_without_the_header() {
        let places = vec![extent(1 << 30, 1 << 20), extent(0, 1 << 20)];
        let header = header(&places).unwrap();
        let page = header.len().get();
        let area = SwapArea {
            path: PathBuf::new(),
            extents: first(places, ByteLen::new(3 << 19)),
            header,
        };
        let body: Vec<Extent> = area.body().collect();
        let behind = extent((1 << 30) + page, (1 << 20) - page);
        assert_eq!(body, [behind, extent(0, 1 << 19)]);
    }

    #[test]
    fn a_header_in_pieces_has_no_place() {
        assert_eq!(header(&[extent(1 << 30, 1024), extent(0, 1 << 20)]), None);
        assert_eq!(header(&[]), None);
    }

    #[test]
    fn a_header_is_told_by_signature_and_version() {
        let mut page = vec![0; 4096];
        page[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
        page[1028..1032].copy_from_slice(&200_u32.to_ne_bytes());
        assert_eq!(size_by(&page), None);
        page[4086..].copy_from_slice(b"SWAPSPACE2");
        assert_eq!(size_by(&page), Some(ByteLen::new(201 * 4096)));
        page[1024] = 2;
        assert_eq!(size_by(&page), None);
        assert_eq!(size_by(b"SWAPSPACE2"), None);
    }
}
