//! The id of a mounted btrfs, by which /sys/fs/btrfs lists its devices: its mounts carry
//! an anonymous device number that leads to none of them.
//! Source: linux/btrfs.h (`BTRFS_IOC_FS_INFO`).

use std::os::fd::{AsFd, AsRawFd};

mod ioctl {
    nix::ioctl_read!(fs_info, 0x94, 31, super::FsInfo);
}

/// The head of `struct btrfs_ioctl_fs_info_args`, and the rest of its 1024 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct FsInfo {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    rest: [u64; 124],
}

const _: () = assert!(size_of::<FsInfo>() == 1024);

/// The 16 bytes of the filesystem's UUID.
///
/// # Errors
/// `ENOTTY` if the descriptor is not on a btrfs.
pub fn filesystem_id(mount: impl AsFd) -> nix::Result<[u8; 16]> {
    let mut info = FsInfo {
        max_id: 0,
        num_devices: 0,
        fsid: [0; 16],
        rest: [0; 124],
    };
    // SAFETY: the descriptor is open for the call; the ioctl copies exactly the 1024 bytes
    // of `FsInfo`, asserted above.
    unsafe { ioctl::fs_info(mount.as_fd().as_raw_fd(), &raw mut info) }?;
    Ok(info.fsid)
}
