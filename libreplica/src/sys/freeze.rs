//! FIFREEZE and FITHAW: block and release writers of a mounted filesystem. Both take any
//! descriptor of a directory or file on it, and act on the whole superblock, whatever the
//! mount or its namespace.
//! Source: linux/fs.h, fs/ioctl.c (`ioctl_fsfreeze`), fs/super.c (`freeze_super`).

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

mod ioctl {
    use nix::libc::c_int;

    nix::ioctl_readwrite!(fifreeze, b'X', 119, c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, c_int);
}

/// Freezes the filesystem: what is dirty is written out, and writers wait until [`thaw`].
/// Returns only when that is done, be it seconds; nothing can interrupt it.
///
/// # Errors
/// `EBUSY` if it is frozen already, by whomever; `EOPNOTSUPP` if its type cannot freeze
/// (vfat); `EPERM` without `CAP_SYS_ADMIN`.
pub fn freeze(mount: impl AsFd) -> nix::Result<()> {
    let mut unused = 0;
    // SAFETY: the descriptor is open for the call; the kernel ignores the argument, and
    // `unused` is a live int in case it does not.
    unsafe { ioctl::fifreeze(mount.as_fd().as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Lets writers go on. Waits for a [`freeze`] that is still under way.
///
/// # Errors
/// `EINVAL` if it is not frozen; `EPERM` without `CAP_SYS_ADMIN`; what the filesystem says.
pub fn thaw(mount: impl AsFd) -> nix::Result<()> {
    let mut unused = 0;
    // SAFETY: as in `freeze`.
    unsafe { ioctl::fithaw(mount.as_fd().as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Whether this errno of [`freeze`] says that the filesystem's type cannot freeze.
pub const fn cannot_freeze(errno: Errno) -> bool {
    matches!(errno, Errno::EOPNOTSUPP | Errno::ENOTTY)
}
