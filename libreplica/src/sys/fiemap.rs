//! Where the bytes of a file lie on its filesystem's device.
//! Source: linux/fiemap.h, Documentation/filesystems/fiemap.rst.

use std::os::fd::{AsFd, AsRawFd};

/// Extents asked for in one call.
const BATCH: usize = 64;

/// The place is not known, or not yet chosen.
pub const UNKNOWN: u32 = 0x2;
/// No more extents follow.
const LAST: u32 = 0x1;
/// Its blocks are taken, and read as zeroes until written through the file.
const UNWRITTEN: u32 = 0x800;
/// Put together from smaller ones.
const MERGED: u32 = 0x1000;
/// What may be said of an extent that lies at its place as it is, for this file alone; all
/// other flags speak of data encoded, inline, not aligned, or shared with other files.
pub const HARMLESS: u32 = LAST | UNWRITTEN | MERGED;

mod ioctl {
    nix::ioctl_readwrite!(fiemap, b'f', 11, super::FiemapHead);
}

/// `struct fiemap` without the extents that follow it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapHead {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

/// `struct fiemap_extent`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct Fiemap {
    head: FiemapHead,
    extents: [FiemapExtent; BATCH],
}

const _: () = assert!(size_of::<FiemapHead>() == 32);
const _: () = assert!(size_of::<FiemapExtent>() == 56);
const _: () = assert!(size_of::<Fiemap>() == 32 + BATCH * 56);

/// A piece of a file that lies in one piece on the device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// Where in the file.
    pub logical: u64,
    /// Where on the device; on btrfs an address of its own, that is on no device.
    pub physical: u64,
    /// How long.
    pub length: u64,
    /// The kernel's flags: [`UNKNOWN`], those in [`HARMLESS`], and others.
    pub flags: u32,
}

/// All extents of the file, in its order. Holes have none.
///
/// # Errors
/// `EOPNOTSUPP` if the filesystem cannot tell; what it says.
pub fn extents(file: impl AsFd) -> nix::Result<Vec<FileExtent>> {
    let fd = file.as_fd().as_raw_fd();
    let mut found = Vec::new();
    let mut start = 0;
    loop {
        let mut map = Fiemap {
            head: FiemapHead {
                start,
                length: u64::MAX - start,
                extent_count: BATCH as u32,
                ..FiemapHead::default()
            },
            extents: [FiemapExtent::default(); BATCH],
        };
        // SAFETY: the descriptor is open for the call. The kernel writes the head and at
        // most `extent_count` extents behind it: `map` has room for exactly these.
        unsafe { ioctl::fiemap(fd, (&raw mut map).cast()) }?;
        let count = (map.head.mapped_extents as usize).min(BATCH);
        let batch = &map.extents[..count];
        found.extend(batch.iter().map(|extent| FileExtent {
            logical: extent.logical,
            physical: extent.physical,
            length: extent.length,
            flags: extent.flags,
        }));
        match batch.last() {
            Some(last) if last.flags & LAST == 0 => {
                let next = last.logical.saturating_add(last.length);
                if next <= start {
                    return Ok(found);
                }
                start = next;
            }
            _ => return Ok(found),
        }
    }
}
