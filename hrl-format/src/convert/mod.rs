//! From one `.hrl` format to the other.
//!
//! Writes go both ways as they are, in their order. [MS-HRL] knows nothing else: zeroes
//! and discards become writes of zeroes there, and what it cannot say at all, a recovery
//! point or a new size, is named, and refused unless the caller accepts the loss. Times
//! become whole seconds. The ids of a log and of the one before it are kept, so that a
//! chain stays a chain.

mod to_hrl;
mod to_ms;

use std::fmt;

use crate::id::PointId;
use crate::ms;
use crate::units::{ByteOffset, FileOffset, VolumeSize};

pub use to_hrl::{HrlOptions, HrlReport, to_hrl};
pub use to_ms::{Loss, MsReport, to_ms_hrl};

/// How many losses are named; further ones are only counted.
const NAMED: usize = 100;

/// Why a log could not be converted. What was written of the output is to be thrown away.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The native log could not be read or written.
    #[error(transparent)]
    Native(#[from] crate::Error),
    /// The [MS-HRL] log could not be read or written.
    #[error(transparent)]
    Ms(#[from] ms::Error),
    /// The native log is torn.
    #[error("the log is torn at byte {at}: {cause}")]
    Torn {
        /// Where.
        at: FileOffset,
        /// What is wrong there.
        cause: crate::Error,
    },
    /// The native log holds what [MS-HRL] cannot say.
    #[error("[MS-HRL] has no {0}")]
    Inexpressible(Losses),
    /// A write reaches past the size that the volume was said to have.
    #[error("a write ends at byte {needed} of the volume, which was said to have {given}")]
    VolumeTooSmall {
        /// What the writes need.
        needed: ByteOffset,
        /// What was given.
        given: VolumeSize,
    },
    /// A write ends so far out that no size can be rounded up to.
    #[error("a write ends at byte {0} of the volume: no volume is so large")]
    VolumeTooLarge(ByteOffset),
}

/// Something of a native log that [MS-HRL] cannot say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// A recovery point.
    Point(PointId),
    /// A new size of the volume.
    Resize(VolumeSize),
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Point(id) => write!(f, "recovery point ({id})"),
            Self::Resize(size) => write!(f, "change of size (to {size} bytes)"),
        }
    }
}

/// All that is lost by a conversion: the first hundred by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    named: Vec<Lost>,
    more: u64,
}

impl Losses {
    /// The first hundred.
    pub fn named(&self) -> &[Lost] {
        &self.named
    }

    /// How many there are behind those.
    pub const fn more(&self) -> u64 {
        self.more
    }

    /// Whether nothing is lost.
    pub const fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    fn add(&mut self, lost: Lost) {
        if self.named.len() < NAMED {
            self.named.push(lost);
        } else {
            self.more += 1;
        }
    }
}

impl fmt::Display for Losses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, lost) in self.named.iter().enumerate() {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{lost}")?;
        }
        match self.more {
            0 => Ok(()),
            more => write!(f, ", and {more} more"),
        }
    }
}
