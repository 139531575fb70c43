//! What tells a volume's changes, whichever way they are captured: by the kernel's program,
//! which marks blocks, or by ourselves, who see every write. Both are drained in rounds, and
//! forget nothing before it is acknowledged.

use std::sync::Arc;

use crate::bitmap::Bitmap;
use crate::capture::inline::Service;
use crate::capture::{Observer, Tracker, WidenCause};
use crate::error::Result;
use crate::geometry::BlockNumber;
use crate::primary::status::VolumeStatus;
use crate::units::Extent;

/// Why a stream of changes is given up that could not be brought home.
pub const FAILED: &str = "changes could not be shipped: see last_error";

/// The tracking of one volume.
pub enum Tracking {
    /// By the kernel's program.
    Kernel(Tracker),
    /// By the interceptor that its users go through.
    Inline(Arc<Service>),
}

impl Tracking {
    /// The interceptor, if there is one.
    pub const fn inline(&self) -> Option<&Arc<Service>> {
        match self {
            Self::Kernel(_) => None,
            Self::Inline(service) => Some(service),
        }
    }

    /// Starts a round; why it is the whole volume, if it is.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn swap(&mut self) -> Result<Option<WidenCause>> {
        match self {
            Self::Kernel(tracker) => tracker.swap().map(|report| report.widened),
            Self::Inline(service) => {
                service.swap();
                Ok(None)
            }
        }
    }

    /// What the round took.
    pub fn round(&self) -> &Bitmap {
        match self {
            Self::Kernel(tracker) => tracker.round(),
            Self::Inline(service) => service.round(),
        }
    }

    /// What is dirty and in no round.
    pub fn pending(&self) -> &Bitmap {
        match self {
            Self::Kernel(tracker) => tracker.pending(),
            Self::Inline(service) => service.pending(),
        }
    }

    /// The round was read; it stays dirty until it is acknowledged.
    pub fn finish_round(&mut self) {
        match self {
            Self::Kernel(tracker) => tracker.finish_round(),
            Self::Inline(service) => service.finish_round(),
        }
    }

    /// What was drained and not brought home is dirty again.
    pub fn reclaim(&mut self) {
        match self {
            Self::Kernel(tracker) => tracker.reclaim(),
            Self::Inline(service) => service.reclaim(FAILED),
        }
    }

    /// All that was drained is durable in the store.
    ///
    /// # Errors
    /// [`ErrorKind::State`](crate::ErrorKind::State) while a round is under way.
    pub fn acknowledge(&mut self) -> Result<()> {
        match self {
            Self::Kernel(tracker) => tracker.acknowledge(),
            Self::Inline(service) => {
                service.acknowledge();
                Ok(())
            }
        }
    }

    /// The newest revision of the volume's settings that the kernel was told of; nothing
    /// where what is tracked is kept beside the settings.
    pub fn settings(&self) -> Option<u64> {
        match self {
            Self::Kernel(tracker) => Some(tracker.settings()),
            Self::Inline(_) => None,
        }
    }

    /// Notes the revision of the settings with what is tracked.
    pub fn note_settings(&mut self, revision: u64) {
        match self {
            Self::Kernel(tracker) => tracker.note_settings(revision),
            Self::Inline(_) => {}
        }
    }

    /// Makes `extent` dirty.
    pub fn mark(&mut self, extent: Extent) {
        match self {
            Self::Kernel(tracker) => tracker.mark(extent),
            Self::Inline(service) => service.mark(extent),
        }
    }

    /// Makes all of this round dirty again.
    pub fn mark_round_again(&mut self) {
        match self {
            Self::Kernel(tracker) => tracker.pending().merge_from(tracker.round()),
            Self::Inline(service) => service.mark_round_again(),
        }
    }

    /// Whether a write was submitted and has not ended.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`](crate::ErrorKind::Vanished) if the device is gone.
    pub fn has_in_flight(&self) -> Result<bool> {
        match self {
            Self::Kernel(tracker) => Ok(!tracker.in_flight()?.is_none()),
            Self::Inline(service) => Ok(service.has_in_flight()),
        }
    }

    /// How many blocks are not in the store.
    pub fn dirty_blocks(&self) -> u64 {
        match self {
            Self::Kernel(tracker) => tracker.dirty_blocks(),
            Self::Inline(service) => service.dirty_blocks(),
        }
    }

    /// Whether a difference of this block means nothing: it waits to be shipped, or what it
    /// holds is not defined.
    pub fn excuses(&self, block: BlockNumber) -> bool {
        match self {
            Self::Kernel(tracker) => tracker.pending().test(block),
            Self::Inline(service) => service.pending().test(block) || service.is_undefined(block),
        }
    }

    /// Ends the kernel's tracking. An interceptor is ended by who holds its front.
    ///
    /// # Errors
    /// What the system said.
    pub fn detach(self) -> Result<()> {
        match self {
            Self::Kernel(tracker) => tracker.detach(),
            Self::Inline(_) => Ok(()),
        }
    }

    /// What goes on in the kernel, to be asked without this.
    pub fn observer(&self) -> Option<Observer> {
        match self {
            Self::Kernel(tracker) => Some(tracker.observer()),
            Self::Inline(_) => None,
        }
    }

    /// Writes what is counted into `status`.
    pub fn describe(&self, status: &mut VolumeStatus) {
        match self {
            Self::Kernel(tracker) => {
                // A device that is gone has no counters; the last ones stay.
                if let Ok(counters) = tracker.counters() {
                    status.counters.writes_seen = counters.submitted;
                    status.counters.sectors_seen = counters.submitted_sectors;
                    status.counters.widened = counters.widened.iter().map(|(_, times)| times).sum();
                }
            }
            Self::Inline(service) => {
                let counters = service.counters();
                status.counters.writes_seen = counters.changes;
                status.counters.sectors_seen = counters.bytes / 512;
                status.mode = service.waiting().mode.as_str().to_owned();
            }
        }
    }
}
