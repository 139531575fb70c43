//! Which way the data of requests goes between their users' memory and the disk. It is copied
//! through memory of ours, or the kernel lends our ring the request's own pages, and the disk
//! reads or writes those: zero copy. That is good for every read, and for a write as long as
//! its data is not recorded; the log and the device must get the same bytes, whatever the
//! writer does to its pages meanwhile.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::capture::inline::{Entrance, Errno};
use crate::sys::ublk::Features;

/// When the data of requests is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Copying {
    /// Where it must be: where it is recorded, and where the kernel cannot do without.
    #[default]
    WhereNeeded,
    /// Always.
    Always,
}

/// Requests whose data was not copied, since the device was begun with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uncopied {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// What the disk, or the kernel, would not do so: it was copied then.
    pub refused: u64,
}

/// What a device needs to be granted for that: kernel 6.16. The driver has one of the two a
/// release earlier, and then takes a command more for each request, and another for its end.
pub(super) const ZERO_COPY: Features = Features::ZERO_COPY.and(Features::AUTO_BUF_REG);

impl Copying {
    /// Whether the device of these features copies nothing that need not be.
    pub(super) const fn is_spared_by(self, granted: Features) -> bool {
        matches!(self, Self::WhereNeeded) && granted.has(ZERO_COPY)
    }
}

/// How the data of one request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Copied,
    Lent,
}

impl Way {
    /// Whether a request may end otherwise on the other way: this one was refused, for what the
    /// disk wants of memory, say.
    pub const fn may_be_to_blame(self, errno: Errno) -> bool {
        matches!(self, Self::Lent)
            && matches!(
                errno.0,
                libc::EINVAL | libc::EFAULT | libc::EOPNOTSUPP | libc::ENOMEM
            )
    }
}

/// Counts, for all queues of a device.
#[derive(Debug, Default)]
pub(super) struct Tally {
    reads: AtomicU64,
    writes: AtomicU64,
    refused: AtomicU64,
}

impl Tally {
    pub fn add_read(&self) {
        self.reads.fetch_add(1, Ordering::Relaxed);
    }

    pub fn add_write(&self) {
        self.writes.fetch_add(1, Ordering::Relaxed);
    }

    pub fn add_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub fn now(&self) -> Uncopied {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Uncopied {
            reads: load(&self.reads),
            writes: load(&self.writes),
            refused: load(&self.refused),
        }
    }
}

/// What stands behind a device: the way to its disk, and how data is to go it.
#[derive(Clone, Debug)]
pub(super) struct Supply {
    pub entrance: Entrance,
    pub copying: Copying,
    pub tally: std::sync::Arc<Tally>,
}
