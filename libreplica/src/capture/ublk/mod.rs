//! The front for users on this machine: a block device of the kernel's, `/dev/ublkbN`, that
//! the agent serves through io_uring alone (driver `ublk_drv`; from kernel 6.5 on). What is
//! read and written there passes through the volume's interceptor (`capture/inline/`).
//!
//! ```text
//! device       the device: added, or taken over from a dead process; let go, or removed
//! watch        the thread that watches over those who serve it
//! host         commands to the driver, with what to do where they fail
//! crew         the threads of all queues
//! queue        one queue, its thread and its lane
//! transfers    which way the data of requests goes: copied, or not
//! buffers      memory of requests, used again
//! spec         what is to be served, and what is to be known of it
//! profile      what users see of the device: that of the disk behind it
//! ```
//!
//! The data of a write is copied from the request's pages into memory of ours before it begins,
//! so that the device and the log get the same bytes whatever the writer does to its pages
//! meanwhile. Reads go without a copy, where the kernel can do that (6.16), and so do writes
//! while no data is recorded: see `transfers.rs`. What was granted is reported
//! ([`UblkStatus::granted`]), and how often it was of use.
//!
//! When the process dies, however it dies, the device stays, its users wait, and the next
//! process goes on; what was in hand comes again. The kernel's driver does that
//! (`UBLK_F_USER_RECOVERY_REISSUE`), and it does the same for a single queue thread that
//! fails: so a device whose thread fails is recovered at once, by this process itself, and
//! stopped, with errors for its users, when that happens again and again. Nobody waits for a
//! thread that is gone.
//!
//! The driver of kernel 6.12 has faults that have to be gone round (those that come with
//! 6.15 and 6.16 mend them): a recovery that a dying process has half done must not be begun
//! again, or the kernel goes down (`host::Host::inspect`); the end of a server is noticed late
//! if all of a queue's requests were under way (`host::Host::launch`); what it cancels may be
//! the next server's (`host::SETTLE`); and it may lose requests of a thread that closes its
//! ring and lives on (`crew`).

mod buffers;
mod crew;
mod device;
mod host;
mod leftover;
mod profile;
mod queue;
mod spec;
mod transfers;
mod watch;

pub use crate::sys::ublk::{DeviceNumber, Features};
pub use device::UblkDevice;
pub use leftover::Leftover;
pub use spec::{How, Started, State, UblkSpec, UblkStatus};
pub use transfers::{Copying, Uncopied};
