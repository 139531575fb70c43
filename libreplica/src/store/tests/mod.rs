//! Tests of the store as a whole: what is refused, what a crash leaves, and whether every point
//! is what it was.

mod branch;
mod by_hand;
mod crash;
mod damage;
mod failover;
mod fold;
mod folder;
mod levels;
mod machine;
mod model;
mod moments;
mod place;
mod power;
pub(in crate::store) mod random;
mod refuse;
mod tiers;

use std::path::Path;

use hrl_format::units::{BlockSize, SectorSize, VolumeSize};

pub(super) use crash::record;

use crate::geometry::Geometry;

/// A folder for one test.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// In memory, for tests that sync all the time.
    fn in_memory() -> Self {
        Self(
            tempfile::tempdir_in("/dev/shm")
                .or_else(|_| tempfile::tempdir())
                .unwrap(),
        )
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

fn geometry(bytes: u64) -> Geometry {
    Geometry {
        size: VolumeSize::new(bytes),
        block: BlockSize::MIN,
        sector: SectorSize::B512,
    }
}
