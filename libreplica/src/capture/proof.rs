//! Proof that nothing was written while nobody was tracking: two readings of the kernel's
//! own counters, one kept from when tracking ended, one taken after it began again.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::device::{BlockDevice, BootId, IoStats};
use crate::error::Result;

/// A reading. The later of two must be taken after [`crate::capture::Tracker::attach`] has
/// returned, so that a write in between is seen by one or the other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// The kernel's id of this boot.
    pub boot: String,
    /// The disk's sequence number; a disk that is detached and attached gets another.
    pub diskseq: u64,
    /// Whether the kernel was counting (`queue/iostats`). Who turns it off and on again
    /// between two readings makes a proof of nothing.
    pub counting: bool,
    /// What it had counted.
    pub stats: WriteCounts,
}

/// What the kernel has counted of changes to a disk since it was attached; not reads, which
/// prove nothing. It stands still while `queue/iostats` is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteCounts {
    /// Writes completed.
    pub writes: u64,
    /// Sectors written, 512 bytes each.
    pub write_sectors: u64,
    /// Discards completed.
    pub discards: u64,
    /// Sectors discarded, 512 bytes each.
    pub discard_sectors: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Requests of any kind in flight.
    pub in_flight: u64,
}

impl WriteCounts {
    /// Of this moment.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Vanished`] if the disk is gone.
    pub fn now(disk: &BlockDevice) -> Result<Self> {
        let stats = disk.stats()?;
        Ok(Self {
            writes: stats.writes,
            write_sectors: stats.write_sectors,
            discards: stats.discards,
            discard_sectors: stats.discard_sectors,
            flushes: stats.flushes,
            in_flight: stats.in_flight,
        })
    }
}

/// Why two readings prove nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProofGap {
    /// The machine was started again.
    Rebooted,
    /// Another disk, or the same attached again.
    OtherDisk,
    /// The kernel was not counting.
    NotCounting,
    /// Something was in flight.
    InFlight,
    /// Something was written, discarded or flushed.
    Written,
}

impl fmt::Display for ProofGap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rebooted => "the machine was started again",
            Self::OtherDisk => "the disk was attached again, or is another",
            Self::NotCounting => "the kernel was not counting (queue/iostats is 0)",
            Self::InFlight => "something was in flight",
            Self::Written => "something was written",
        })
    }
}

impl Proof {
    /// Takes a reading.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Vanished`] if the disk is gone; what sysfs says.
    pub fn take(disk: &BlockDevice) -> Result<Self> {
        Ok(Self {
            boot: BootId::current()?.to_string(),
            diskseq: disk.diskseq_now()?.get(),
            counting: disk.io_stats()? == IoStats::Kept,
            stats: WriteCounts::now(disk)?,
        })
    }

    /// Whether nothing was written between this reading and `later`.
    ///
    /// # Errors
    /// Why that is not proved.
    pub fn holds_until(&self, later: &Self) -> Result<(), ProofGap> {
        if self.boot != later.boot {
            Err(ProofGap::Rebooted)
        } else if self.diskseq != later.diskseq {
            Err(ProofGap::OtherDisk)
        } else if !self.counting || !later.counting {
            Err(ProofGap::NotCounting)
        } else if self.stats.in_flight != 0 || later.stats.in_flight != 0 {
            Err(ProofGap::InFlight)
        } else if self.stats != later.stats {
            Err(ProofGap::Written)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_difference_is_a_gap() {
        let first = Proof {
            boot: "a".to_owned(),
            diskseq: 7,
            counting: true,
            stats: WriteCounts {
                writes: 3,
                ..WriteCounts::default()
            },
        };
        let gap = |change: fn(&mut Proof)| {
            let mut later = first.clone();
            change(&mut later);
            first.holds_until(&later).err()
        };
        assert_eq!(gap(|_| {}), None);
        assert_eq!(gap(|p| p.boot = "b".to_owned()), Some(ProofGap::Rebooted));
        assert_eq!(gap(|p| p.diskseq = 8), Some(ProofGap::OtherDisk));
        assert_eq!(gap(|p| p.counting = false), Some(ProofGap::NotCounting));
        assert_eq!(gap(|p| p.stats.in_flight = 1), Some(ProofGap::InFlight));
        assert_eq!(gap(|p| p.stats.writes = 4), Some(ProofGap::Written));
        assert_eq!(
            gap(|p| p.stats.discard_sectors = 8),
            Some(ProofGap::Written)
        );
        assert_eq!(gap(|p| p.stats.flushes = 1), Some(ProofGap::Written));
    }
}
