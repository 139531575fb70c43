//! What users of a device ask of it, and how it ends: the same for every front.

use crate::capture::inline::unseen::UnseenWrite;
use crate::error::Error;
pub use crate::sys::uring::Durability;
pub use crate::sys::uring::Lent;
use crate::sys::uring::Part;
use crate::units::Extent;

/// Whether zeroes may be written by giving the range up, where the device reads zeroes there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// It may be given up.
    MayBeFreed,
    /// It stays allocated.
    Kept,
}

/// One request.
#[derive(Debug)]
pub enum Request {
    /// Fill the part from `offset` on.
    Read {
        /// Where to; as long as the extent.
        to: Part,
        /// From where.
        extent: Extent,
    },
    /// Write the part.
    Write {
        /// What; as long as the extent.
        from: Part,
        /// Where to.
        extent: Extent,
        /// When it has ended.
        durability: Durability,
    },
    /// As a read, into all of the memory that was lent to the lane's ring.
    ReadLent {
        /// Where to; as long as the extent.
        to: Lent,
        /// From where.
        extent: Extent,
    },
    /// As a write, of all of the memory that was lent to the lane's ring, whose data nobody
    /// here sees.
    WriteLent {
        /// What; as long as the extent.
        from: Lent,
        /// The leave to do so.
        leave: UnseenWrite,
        /// Where to.
        extent: Extent,
        /// When it has ended.
        durability: Durability,
    },
    /// Write zeroes.
    Zeroes {
        /// Where.
        extent: Extent,
        /// How.
        room: Room,
        /// When it has ended.
        durability: Durability,
    },
    /// Give a range up: what it reads as then is not defined.
    Discard {
        /// Which.
        extent: Extent,
    },
    /// Make durable what has ended.
    Flush,
}

/// What the front knows a request by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cookie(pub u64);

/// The number of an error as errno(3) has it, which a front passes to its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// Input or output failed.
    pub const EIO: Self = Self(libc::EIO);

    /// The number that `error` carries; `EIO` if none.
    pub fn of(error: &Error) -> Self {
        error.errno().map_or(Self::EIO, Self)
    }

    /// The number of `error`; `EIO` if it has none.
    pub fn of_io(error: &std::io::Error) -> Self {
        error.raw_os_error().map_or(Self::EIO, Self)
    }
}

/// A request that has ended.
#[derive(Debug)]
pub struct Done {
    /// Which.
    pub cookie: Cookie,
    /// How: of a change that failed, any part may be on the device.
    pub result: Result<(), Errno>,
    /// Its memory, if it was ours.
    pub part: Option<Part>,
}
