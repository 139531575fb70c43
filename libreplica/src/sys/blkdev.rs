//! What is asked of an open block device: its `diskseq`, what lies behind a loop device, to
//! discard a range or to zero it.
//! Source: linux/fs.h, linux/loop.h.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::units::Extent;

mod ioctl {
    nix::ioctl_read!(blkgetdiskseq, 0x12, 128, u64);
    nix::ioctl_read_bad!(loop_get_status64, 0x4c05, super::LoopInfo64);
    nix::ioctl_write_ptr_bad!(blkroset, nix::request_code_none!(0x12, 93), libc::c_int);
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(blkzeroout, nix::request_code_none!(0x12, 127), [u64; 2]);
}

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232);

/// What a loop device stands on, as numbers of `stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopBacking {
    /// `st_dev` of the backing file.
    pub device: u64,
    /// `st_ino` of the backing file.
    pub inode: u64,
    /// `st_rdev`, if the backing "file" is a block device itself; else 0.
    pub rdevice: u64,
}

/// The number that the kernel gave this disk when it appeared; never used twice in a boot.
///
/// # Errors
/// `ENOTTY` before kernel 5.15, or if it is no block device.
pub fn diskseq(device: impl AsFd) -> nix::Result<u64> {
    let mut sequence = 0;
    // SAFETY: the descriptor is open for the call; BLKGETDISKSEQ writes one u64, which lives.
    unsafe { ioctl::blkgetdiskseq(device.as_fd().as_raw_fd(), &raw mut sequence) }?;
    Ok(sequence)
}

/// What the loop device stands on.
///
/// # Errors
/// `ENXIO` if nothing is attached; `ENOTTY` if it is no loop device.
pub fn loop_backing(device: impl AsFd) -> nix::Result<LoopBacking> {
    let mut info = LoopInfo64 {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    // SAFETY: the descriptor is open for the call; LOOP_GET_STATUS64 writes one
    // loop_info64, whose layout `LoopInfo64` is and whose size is asserted above.
    unsafe { ioctl::loop_get_status64(device.as_fd().as_raw_fd(), &raw mut info) }?;
    Ok(LoopBacking {
        device: info.device,
        inode: info.inode,
        rdevice: info.rdevice,
    })
}

fn range_of(extent: Extent) -> [u64; 2] {
    [extent.offset().get(), extent.len().get()]
}

/// Whether a device may be opened for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It may.
    ReadWrite,
    /// It may not. Whoever has it open already may write on.
    ReadOnly,
}

/// Says whether a device may be opened for writing from now on, until it is gone.
///
/// # Errors
/// `EPERM`, `EACCES` without the right to say so.
pub fn set_access(device: impl AsFd, access: Access) -> io::Result<()> {
    let read_only = libc::c_int::from(access == Access::ReadOnly);
    // SAFETY: the descriptor is open for the call; BLKROSET reads one int, which lives.
    unsafe { ioctl::blkroset(device.as_fd().as_raw_fd(), &raw const read_only) }?;
    Ok(())
}

/// Gives a range up. It must be of whole sectors.
///
/// # Errors
/// `EOPNOTSUPP` if the device has no such thing; `EIO`, and what else it failed with.
pub fn discard(device: impl AsFd, extent: Extent) -> io::Result<()> {
    let range = range_of(extent);
    // SAFETY: the descriptor is open for the call; BLKDISCARD reads two u64, which live.
    unsafe { ioctl::blkdiscard(device.as_fd().as_raw_fd(), &raw const range) }?;
    Ok(())
}

/// Writes zeroes, with whatever command the device has for it, and keeps the range allocated.
///
/// # Errors
/// What the device failed with.
pub fn write_zeroes(device: impl AsFd, extent: Extent) -> io::Result<()> {
    let range = range_of(extent);
    // SAFETY: the descriptor is open for the call; BLKZEROOUT reads two u64, which live.
    unsafe { ioctl::blkzeroout(device.as_fd().as_raw_fd(), &raw const range) }?;
    Ok(())
}

/// Zeroes a range by giving it up, on a device that reads zeroes there.
///
/// # Errors
/// `EOPNOTSUPP` if it is not one.
pub fn free_zeroed(device: impl AsFd, extent: Extent) -> io::Result<()> {
    use nix::fcntl::FallocateFlags;
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let [offset, len] = range_of(extent).map(|n| n as libc::off_t);
    Ok(nix::fcntl::fallocate(device.as_fd(), how, offset, len)?)
}
