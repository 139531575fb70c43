//! What is to be served as a block device, and what is to be known of one.

use std::num::NonZeroU16;
use std::time::Duration;

use crate::capture::ublk::transfers::{Copying, Uncopied, ZERO_COPY};
use crate::capture::ublk::{host, profile};
use crate::id::VolumeId;
use crate::sys::ublk::{Added, DeviceNumber, Features};

/// Requests that a queue can have, unless it is said otherwise.
const DEPTH: u16 = 128;
/// Queues, unless it is said otherwise, and if there are as many processors.
const QUEUES_MAX: usize = 4;

/// What is to be served.
#[derive(Clone, Debug)]
pub struct UblkSpec {
    /// The volume: a device that another process has left is known by it.
    pub volume: VolumeId,
    /// The number that a new device is to have, if it is free.
    pub number: Option<DeviceNumber>,
    /// Queues, each with a thread; as many as processors, but no more than four, if it is not
    /// said. A device that is taken over keeps those it has.
    pub queues: Option<NonZeroU16>,
    /// Requests that each queue can have, at most 4096. Kept, too.
    pub depth: u16,
    /// How long to wait for the process that served it before to be gone.
    pub patience: Duration,
    /// When data is copied. A device that is taken over was granted what it was granted.
    pub copying: Copying,
}

impl UblkSpec {
    /// The usual.
    pub const fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            number: None,
            queues: None,
            depth: DEPTH,
            patience: Duration::from_secs(30),
            copying: Copying::WhereNeeded,
        }
    }

    /// What a driver is to add that offers this.
    pub(super) fn to_add(&self, mark: u64, offered: Features) -> Added {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let usual = processors.min(QUEUES_MAX) as u16;
        Added {
            number: self.number,
            queues: self.queues.map_or(usual, NonZeroU16::get),
            depth: self.depth,
            longest: profile::LONGEST.get() as u32,
            features: if self.copying.is_spared_by(offered) {
                host::NEEDED.and(ZERO_COPY)
            } else {
                host::NEEDED
            },
            mark,
        }
    }
}

/// How a device was begun with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// It is new.
    Added,
    /// It was there, and its users waited.
    TakenOver,
}

/// What becomes of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It stays, and its users wait for the next process, for ever if need be.
    Detach,
    /// It goes. Users that it still has get errors, and what they have not yet written is lost:
    /// so unmount it first.
    Remove,
}

/// What a device does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// It is served.
    Serving,
    /// A thread that serves it has failed; users wait until others do.
    TakingOver,
    /// Nobody serves it; users wait for the next process.
    Waiting,
    /// It was stopped, by us for what [`UblkStatus::trouble`] says, or by somebody else: users
    /// get errors.
    Stopped,
    /// It is deleted.
    Removed,
}

/// What is to be known of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UblkStatus {
    /// Its number: to be remembered for [`UblkSpec::number`].
    pub number: DeviceNumber,
    /// Its queues.
    pub queues: u16,
    /// Requests that each can have.
    pub depth: u16,
    /// What the kernel offers.
    pub offered: Features,
    /// What it has granted this device.
    pub granted: Features,
    /// Requests whose data was not copied, since this process serves it.
    pub uncopied: Uncopied,
    /// What it does.
    pub state: State,
    /// How often it was taken over since the start, as a thread had failed.
    pub failures: u32,
    /// What failed last.
    pub trouble: Option<String>,
}

impl State {
    /// As it stands in JSON: a lower-case word.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::TakingOver => "taking_over",
            Self::Waiting => "waiting",
            Self::Stopped => "stopped",
            Self::Removed => "removed",
        }
    }
}

impl UblkStatus {
    /// Whether data is copied only where it must be, as the kernel has granted zero copy (6.16).
    pub const fn has_zero_copy(&self) -> bool {
        self.granted.has(ZERO_COPY)
    }
}
