//! The root that the tree would have after an epoch, before the epoch is applied. A
//! point's tag carries the root and is sealed with the log; the tree follows only once
//! the log is durable, so that it is never ahead of the image it speaks for.

use std::collections::BTreeMap;

use hrl_format::record::Root;

use super::leaf::Leaf;
use super::region::{RegionEntry, RootHasher};
use super::tree::DigestTree;
use crate::error::Result;
use crate::geometry::BlockNumber;

impl DigestTree {
    /// The root if `changes` were applied, `None` among them for a leaf that is no longer
    /// known; `None` if a leaf would be unknown, or an update was interrupted.
    ///
    /// # Errors
    /// As [`DigestTree::leaves`].
    pub fn preview_root(
        &self,
        changes: &BTreeMap<BlockNumber, Option<Leaf>>,
    ) -> Result<Option<Root>> {
        if self.header.applying.is_some() {
            return Ok(None);
        }
        let geometry = self.header.geometry;
        let mut hasher = RootHasher::new(&geometry, self.function());
        let mut changes = changes.iter().peekable();
        for region in self.regions() {
            let (number, mut digest) = region?;
            let blocks = number.blocks(&geometry);
            if changes
                .peek()
                .is_some_and(|(block, _)| **block < blocks.end)
            {
                let mut leaves = self.read_region(number)?;
                while let Some((block, leaf)) = changes.next_if(|(block, _)| **block < blocks.end) {
                    let at = (block.get() - blocks.start.get()) as usize * Leaf::LEN;
                    // Zeroes, as in a new file: not known.
                    let stored = leaf.map_or([0; Leaf::LEN], |leaf| *leaf.as_bytes());
                    leaves[at..at + Leaf::LEN].copy_from_slice(&stored);
                }
                let entry = RegionEntry::of(number, &leaves);
                digest = (u64::from(entry.known) == blocks.count()).then_some(entry.digest);
            }
            match digest {
                Some(digest) => hasher.region(&digest),
                None => return Ok(None),
            }
        }
        Ok(Some(hasher.finish()))
    }
}
