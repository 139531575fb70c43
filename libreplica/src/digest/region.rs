//! Regions and the root: how leaves become a region's digest, and region digests the
//! root. The same code serves the tree in the file and the one computed while
//! restoring, so that the two cannot differ.

use std::fmt;

use hrl_format::record::Root;

use super::leaf::{Leaf, LeafFunction};
use crate::geometry::{BlockNumber, Geometry, Run};

/// How many leaves make a region: 4 MiB of a volume of 4-KiB blocks, 64 MiB of 64-KiB
/// blocks. The last region may have fewer.
pub const LEAVES_PER_REGION: u64 = 1024;

/// The number of a region in the tree, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionNumber(u64);

impl RegionNumber {
    /// Region `n`.
    pub const fn new(n: u64) -> Self {
        Self(n)
    }

    /// The plain number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The region that block `number` is in.
    pub const fn of(number: BlockNumber) -> Self {
        Self(number.get() / LEAVES_PER_REGION)
    }

    /// How many regions a volume has.
    pub(super) const fn count(geometry: &Geometry) -> u64 {
        geometry.blocks().div_ceil(LEAVES_PER_REGION)
    }

    /// The blocks in it, cut at the volume's end.
    pub fn blocks(self, geometry: &Geometry) -> Run {
        let at =
            |n: u64| BlockNumber::new(n.saturating_mul(LEAVES_PER_REGION).min(geometry.blocks()));
        Run {
            start: at(self.0),
            end: at(self.0.saturating_add(1)),
        }
    }

    /// The digest of its leaves: BLAKE3 of `replica region 1`, number and leaves.
    pub(super) fn digest(self, leaves: &[u8]) -> RegionDigest {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"replica region 1");
        hasher.update(&self.0.to_le_bytes());
        RegionDigest(*hasher.update(leaves).finalize().as_bytes())
    }
}

impl fmt::Display for RegionNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The digest of a region's leaves: 32 bytes of BLAKE3.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RegionDigest([u8; 32]);

impl RegionDigest {
    /// From its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for RegionDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RegionDigest(")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(")")
    }
}

/// Makes the root of region digests that come in order.
pub(super) struct RootHasher(blake3::Hasher);

impl RootHasher {
    /// BLAKE3 of `replica root 1`, `plain` or `keyed`, volume size and block size, to be
    /// followed by the region digests.
    pub(super) fn new(geometry: &Geometry, function: &LeafFunction) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"replica root 1");
        hasher.update(if function.zero_leaf_is_constant() {
            b"plain"
        } else {
            b"keyed"
        });
        hasher.update(&geometry.size.get().to_le_bytes());
        hasher.update(&geometry.block.get().to_le_bytes());
        Self(hasher)
    }

    pub(super) fn region(&mut self, digest: &RegionDigest) {
        self.0.update(&digest.0);
    }

    pub(super) fn finish(self) -> Root {
        Root::from_bytes(*self.0.finalize().as_bytes())
    }
}

/// A region as its entry in the file tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegionEntry {
    /// How many of its leaves are known.
    pub known: u32,
    /// The digest over all of them; unknown leaves count as zeroes.
    pub digest: RegionDigest,
}

impl RegionEntry {
    /// Bytes of an entry: known leaves u32, CRC32 of the other fields and the region's
    /// number u32, digest.
    pub(super) const LEN: usize = 40;

    /// What `leaves`, as stored, add up to.
    pub(super) fn of(number: RegionNumber, leaves: &[u8]) -> Self {
        let (each, _) = leaves.as_chunks::<{ Leaf::LEN }>();
        Self {
            known: each.iter().filter(|leaf| **leaf != [0; Leaf::LEN]).count() as u32,
            digest: number.digest(leaves),
        }
    }

    pub(super) fn encode(&self, number: RegionNumber) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.known.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.crc(number).to_le_bytes());
        bytes[8..].copy_from_slice(&self.digest.0);
        bytes
    }

    /// The entry, or `None` if damaged. Zeroes, as a new file holds them, say that
    /// nothing of the region is known.
    pub(super) fn decode(number: RegionNumber, bytes: &[u8; Self::LEN]) -> Option<Stored> {
        if *bytes == [0; Self::LEN] {
            return Some(Stored::Blank);
        }
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let mut digest = [0; 32];
        digest.copy_from_slice(&bytes[8..]);
        let entry = Self {
            known: word(0),
            digest: RegionDigest(digest),
        };
        (entry.crc(number) == word(4)).then_some(Stored::Entry(entry))
    }

    fn crc(&self, number: RegionNumber) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&number.0.to_le_bytes());
        hasher.update(&self.known.to_le_bytes());
        hasher.update(&self.digest.0);
        hasher.finalize()
    }
}

/// What stands in a region's place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// Nothing was ever known of it: all its leaves are zeroes, too.
    Blank,
    /// Its digest.
    Entry(RegionEntry),
}

impl Stored {
    /// Whether `leaves`, as read from the file, are what this says.
    pub(super) fn agrees_with(&self, number: RegionNumber, leaves: &[u8]) -> bool {
        match self {
            Self::Blank => leaves.iter().all(|byte| *byte == 0),
            Self::Entry(entry) => *entry == RegionEntry::of(number, leaves),
        }
    }
}
