//! The digest tree: what every block of a volume should be, in 16 bytes a block.
//!
//! A *leaf* is the digest of one block. 1024 leaves form a *region*, whose digest is
//! BLAKE3 over its number and its leaves; the *root* is BLAKE3 over the geometry and
//! all region digests. The root goes into a recovery point's tag, and whoever restores
//! the point computes it again from what was restored ([`RootBuilder`]).
//!
//! The [`DigestTree`] keeps the leaves in a file of the state folder, bound to volume
//! and generation, and is brought up to date by each epoch. A resync compares the
//! source with it and ships what differs. A leaf may be *unknown*: never read, or
//! known to be stale. An unknown leaf proves nothing, so a tree with one has no root.
//!
//! Leaves are XXH3-128 without a key: fast as memory, and against accidents only. With
//! a key they are keyed BLAKE3 over block number and content, so that neither content
//! nor the equality of two blocks shows to who has not the key.

mod builder;
mod header;
mod leaf;
mod preview;
mod region;
mod table;
mod tree;
mod update;

#[cfg(test)]
mod tests;

pub use builder::RootBuilder;
pub use leaf::{Leaf, LeafFunction};
pub use region::{LEAVES_PER_REGION, RegionDigest, RegionNumber};
pub use table::LeafTable;
pub use tree::{DigestTree, Leaves, Regions, TreeSpec, TreeState};
pub use update::Update;
