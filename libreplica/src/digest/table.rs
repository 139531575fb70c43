//! The leaves of a volume in memory, 16 bytes a block: for whoever follows an image through
//! its epochs and needs its root at each, as the check of a store does, and writes no file.

use hrl_format::record::Root;
use hrl_format::units::{ByteLen, VolumeSize};

use super::leaf::{Leaf, LeafFunction};
use super::region::{LEAVES_PER_REGION, RegionDigest, RegionNumber, RootHasher};
use crate::geometry::{BlockNumber, Geometry, Run};

/// All leaves of a volume, to be changed block by block.
///
/// ```
/// use libreplica::digest::{LeafFunction, LeafTable, RootBuilder};
/// use libreplica::geometry::{BlockNumber, Geometry};
/// use libreplica::units::{BlockSize, ByteLen, SectorSize, VolumeSize};
/// let geometry = Geometry { size: VolumeSize::new(8192), block: BlockSize::MIN, sector: SectorSize::B512 };
/// let mut table = LeafTable::zeroes(geometry, LeafFunction::plain());
/// table.set(BlockNumber::new(1), &[7; 4096]);
/// let mut builder = RootBuilder::new(geometry, LeafFunction::plain());
/// builder.zeroes(ByteLen::new(4096))?;
/// builder.data(&[7; 4096])?;
/// assert_eq!(table.root(), Some(builder.finish()?));
/// # Ok::<(), libreplica::Error>(())
/// ```
pub struct LeafTable {
    geometry: Geometry,
    function: LeafFunction,
    /// As stored in the tree: zeroes where unknown.
    leaves: Vec<u8>,
    /// The regions whose leaves did not change since their digest was computed.
    regions: Vec<Option<RegionDigest>>,
}

impl LeafTable {
    /// Of a volume that is all zeroes.
    pub fn zeroes(geometry: Geometry, function: LeafFunction) -> Self {
        let mut table = Self {
            geometry,
            function,
            leaves: Vec::new(),
            regions: Vec::new(),
        };
        table.make_room();
        table.set_zeroes(Run {
            start: BlockNumber::new(0),
            end: BlockNumber::new(geometry.blocks()),
        });
        table
    }

    /// Size and units of the volume.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn make_room(&mut self) {
        let blocks = self.geometry.blocks() as usize;
        self.leaves.resize(blocks * Leaf::LEN, 0);
        self.regions
            .resize(RegionNumber::count(&self.geometry) as usize, None);
    }

    /// The volume has another size. Leaves of blocks that are new, or whose length changed, are
    /// unknown.
    pub fn resize(&mut self, size: VolumeSize) {
        let (before, blocks) = (self.geometry, self.geometry.blocks());
        self.geometry.size = size;
        self.make_room();
        for last in [blocks.checked_sub(1), self.geometry.blocks().checked_sub(1)] {
            let Some(last) = last.map(BlockNumber::new) else {
                continue;
            };
            if before.block_len(last) != self.geometry.block_len(last) {
                self.forget(last);
            }
            self.changed(last);
        }
    }

    /// Block `number` holds `data`, which is as long as the block. Past the end nothing happens.
    pub fn set(&mut self, number: BlockNumber, data: &[u8]) {
        let leaf = self.function.leaf(number, data);
        self.put(number, leaf.as_bytes());
    }

    /// The content of block `number` cannot be known.
    pub fn forget(&mut self, number: BlockNumber) {
        self.put(number, &[0; Leaf::LEN]);
    }

    /// The blocks of `run` hold zeroes.
    pub fn set_zeroes(&mut self, run: Run) {
        let whole = ByteLen::new(u64::from(self.geometry.block.get()));
        let constant = self.function.zero_leaf_is_constant();
        let same = constant.then(|| self.function.zero_leaf(run.start, whole));
        for number in run.range().map(BlockNumber::new) {
            let len = self.geometry.block_len(number);
            let leaf = match same {
                Some(leaf) if len == whole => leaf,
                _ => self.function.zero_leaf(number, len),
            };
            self.put(number, leaf.as_bytes());
        }
    }

    fn put(&mut self, number: BlockNumber, leaf: &[u8; Leaf::LEN]) {
        let at = number.get() as usize * Leaf::LEN;
        if let Some(place) = self.leaves.get_mut(at..at + Leaf::LEN) {
            place.copy_from_slice(leaf);
            self.changed(number);
        }
    }

    fn changed(&mut self, number: BlockNumber) {
        let region = RegionNumber::of(number).get() as usize;
        if let Some(digest) = self.regions.get_mut(region) {
            *digest = None;
        }
    }

    /// The root; `None` if a leaf is unknown.
    pub fn root(&mut self) -> Option<Root> {
        let mut root = RootHasher::new(&self.geometry, &self.function);
        let regions = self.leaves.chunks(LEAVES_PER_REGION as usize * Leaf::LEN);
        for ((number, leaves), known) in (0..).zip(regions).zip(&mut self.regions) {
            let digest = match known {
                Some(digest) => digest,
                None => {
                    let (each, _) = leaves.as_chunks::<{ Leaf::LEN }>();
                    if each.contains(&[0; Leaf::LEN]) {
                        return None;
                    }
                    known.insert(RegionNumber::new(number).digest(leaves))
                }
            };
            root.region(digest);
        }
        Some(root.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::RootBuilder;
    use hrl_format::units::{BlockSize, SectorSize};

    fn geometry(bytes: u64) -> Geometry {
        Geometry {
            size: VolumeSize::new(bytes),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        }
    }

    fn streamed(content: &[u8], function: &LeafFunction) -> Root {
        let mut builder = RootBuilder::new(geometry(content.len() as u64), function.clone());
        builder.data(content).unwrap();
        builder.finish().unwrap()
    }

    #[test]
    fn the_root_is_the_streamed_one_through_changes_and_sizes() {
        for function in [LeafFunction::plain(), LeafFunction::keyed(&[3; 32])] {
            // Three regions and a short last block.
            let mut content = vec![0; (2 * 1024 + 5) * 4096 + 512];
            let mut table = LeafTable::zeroes(geometry(content.len() as u64), function.clone());
            assert_eq!(table.root(), Some(streamed(&content, &function)));
            for block in [0, 1023, 1024, 2053] {
                let end = content.len().min((block + 1) * 4096);
                content[block * 4096..end].fill(block as u8 | 1);
                let data = &content[block * 4096..end];
                table.set(BlockNumber::new(block as u64), data);
                assert_eq!(table.root(), Some(streamed(&content, &function)));
            }
            table.forget(BlockNumber::new(7));
            assert_eq!(table.root(), None);
            table.set_zeroes(Run {
                start: BlockNumber::new(7),
                end: BlockNumber::new(8),
            });
            for len in [
                1025 * 4096 + 1024,
                1025 * 4096 + 4096,
                1024 * 4096,
                1030 * 4096,
            ] {
                let before = content.len();
                content.resize(len, 0);
                table.resize(VolumeSize::new(len as u64));
                let from = before.min(len) / 4096;
                for (block, data) in content.chunks(4096).enumerate().skip(from) {
                    table.set(BlockNumber::new(block as u64), data);
                }
                assert_eq!(table.root(), Some(streamed(&content, &function)), "{len}");
            }
        }
    }

    #[test]
    fn a_block_that_became_longer_or_shorter_is_unknown() {
        let mut table = LeafTable::zeroes(geometry(8192 + 512), LeafFunction::plain());
        table.resize(VolumeSize::new(8192));
        assert!(table.root().is_some());
        table.resize(VolumeSize::new(8192 - 512));
        assert_eq!(table.root(), None);
    }
}
