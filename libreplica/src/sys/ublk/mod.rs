//! ublk: a block device of the kernel that this process serves (driver `ublk_drv`, used from
//! kernel 6.5 on). Here is what the driver is told and what it tells: commands to its
//! control device ([`Control`]), and a queue's requests ([`Requests`], [`fetch`],
//! [`commit`]), which are commands on the device `/dev/ublkcN` for the ring of the thread
//! that serves the queue.
//!
//! Everything here follows the kernel's header `include/uapi/linux/ublk_cmd.h` (6.12, and 7.3
//! for what is newer) and Documentation/block/ublk.rst. Data is copied between a request's
//! pages and our memory by reads and writes of `/dev/ublkcN` at [`data_offset`]
//! (`UBLK_F_USER_COPY`): so a driver's command never carries an address. Or it is not copied:
//! the driver lends the ring the request's pages ([`Tag::lent`], `UBLK_F_AUTO_BUF_REG`), for as
//! long as the request is ours. A device may have both, and each request goes one way.

mod abi;
mod control;
mod requests;

pub use abi::{DeviceState, Features, Parameters};
pub use control::{Added, Control, Device, DeviceNumber};
pub use requests::{
    Action, IoRequest, Pages, QueueNumber, Remains, Requests, Tag, commit, data_offset, fetch,
    inspect,
};

use std::io;

/// linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that what this thread does serves a block device: memory that it needs is
/// not made free by writing to block devices, which may be its own (`PR_SET_IO_FLUSHER`,
/// prctl(2), kernel 5.6).
///
/// # Errors
/// `EPERM` without `CAP_SYS_RESOURCE`; `EINVAL` before kernel 5.6.
pub fn serve_without_reclaim() -> io::Result<()> {
    // SAFETY: changes flags of the calling thread; takes no address.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1_u64, 0_u64, 0_u64, 0_u64) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
