//! The root of an image that streams by, as when a point is restored: bytes and zeroes
//! in order, no tree on disk, one region's leaves in memory.

use hrl_format::record::Root;
use hrl_format::units::ByteLen;

use super::leaf::{Leaf, LeafFunction};
use super::region::{LEAVES_PER_REGION, RegionNumber, RootHasher};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Geometry};

/// Computes the root of a volume from its content, front to back.
///
/// ```
/// use libreplica::digest::{LeafFunction, RootBuilder};
/// use libreplica::geometry::Geometry;
/// use libreplica::units::{BlockSize, ByteLen, SectorSize, VolumeSize};
/// let geometry = Geometry { size: VolumeSize::new(10_000), block: BlockSize::MIN, sector: SectorSize::B512 };
/// let mut builder = RootBuilder::new(geometry, LeafFunction::plain());
/// builder.data(b"written here").unwrap();
/// builder.zeroes(ByteLen::new(10_000 - 12)).unwrap();
/// let root = builder.finish().unwrap();
/// # let _ = root;
/// ```
pub struct RootBuilder {
    geometry: Geometry,
    function: LeafFunction,
    root: RootHasher,
    /// Leaves of the region begun, as stored.
    leaves: Vec<u8>,
    /// How many blocks are done.
    next: u64,
    /// The start of a block whose rest is to come.
    partial: Vec<u8>,
    /// The leaf of a whole zero block, if all have the same.
    zero_leaf: Option<Leaf>,
}

impl RootBuilder {
    /// For a volume of `geometry` whose leaves are made by `function`.
    pub fn new(geometry: Geometry, function: LeafFunction) -> Self {
        let whole = ByteLen::new(u64::from(geometry.block.get()));
        let zero_leaf = function
            .zero_leaf_is_constant()
            .then(|| function.zero_leaf(BlockNumber::new(0), whole));
        Self {
            geometry,
            root: RootHasher::new(&geometry, &function),
            function,
            leaves: Vec::with_capacity(LEAVES_PER_REGION as usize * Leaf::LEN),
            next: 0,
            partial: Vec::new(),
            zero_leaf,
        }
    }

    /// The volume's next bytes: any number of them.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if they go past the volume's end.
    pub fn data(&mut self, mut data: &[u8]) -> Result<()> {
        self.must_fit(ByteLen::new(data.len() as u64))?;
        while !data.is_empty() {
            let len = self.block_len();
            if self.partial.is_empty() && data.len() >= len {
                let (block, rest) = data.split_at(len);
                self.leaf(self.function.leaf(BlockNumber::new(self.next), block));
                data = rest;
            } else {
                let (head, rest) = data.split_at(data.len().min(len - self.partial.len()));
                self.partial.extend_from_slice(head);
                self.end_partial(len);
                data = rest;
            }
        }
        Ok(())
    }

    /// The volume's next bytes are `len` zeroes.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if they go past the volume's end.
    pub fn zeroes(&mut self, len: ByteLen) -> Result<()> {
        self.must_fit(len)?;
        let mut left = len.get();
        while left > 0 {
            let block = self.block_len();
            if self.partial.is_empty() && left >= block as u64 {
                let leaf = self.zero_leaf_of(block);
                self.leaf(leaf);
                left -= block as u64;
            } else {
                let missing = (block - self.partial.len()).min(left as usize);
                self.partial.resize(self.partial.len() + missing, 0);
                self.end_partial(block);
                left -= missing as u64;
            }
        }
        Ok(())
    }

    /// The root, once every byte of the volume was given.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if bytes are missing.
    pub fn finish(mut self) -> Result<Root> {
        if self.done() != self.geometry.size.get() {
            return Err(
                Error::new(ErrorKind::Invalid, "compute the root").detail(format!(
                    "{} of {} bytes were given",
                    self.done(),
                    self.geometry.size
                )),
            );
        }
        self.end_region();
        Ok(self.root.finish())
    }

    /// How many bytes were given so far.
    fn done(&self) -> u64 {
        let whole = self.next << self.geometry.block.shift();
        whole.min(self.geometry.size.get()) + self.partial.len() as u64
    }

    fn must_fit(&self, len: ByteLen) -> Result<()> {
        if len.get() > self.geometry.size.get() - self.done() {
            return Err(
                Error::new(ErrorKind::Invalid, "compute the root").detail(format!(
                    "{len} bytes at byte {} go past the volume's end at {}",
                    self.done(),
                    self.geometry.size
                )),
            );
        }
        Ok(())
    }

    /// The length of the block begun or to begin.
    fn block_len(&self) -> usize {
        self.geometry.block_len(BlockNumber::new(self.next)).get() as usize
    }

    fn end_partial(&mut self, block: usize) {
        if self.partial.len() == block {
            let leaf = self
                .function
                .leaf(BlockNumber::new(self.next), &self.partial);
            self.partial.clear();
            self.leaf(leaf);
        }
    }

    fn zero_leaf_of(&self, len: usize) -> Leaf {
        match self.zero_leaf {
            Some(leaf) if len == self.geometry.block.get() as usize => leaf,
            _ => {
                let len = ByteLen::new(len as u64);
                self.function.zero_leaf(BlockNumber::new(self.next), len)
            }
        }
    }

    fn leaf(&mut self, leaf: Leaf) {
        self.leaves.extend_from_slice(leaf.as_bytes());
        self.next += 1;
        if self.next.is_multiple_of(LEAVES_PER_REGION) {
            self.end_region();
        }
    }

    fn end_region(&mut self) {
        if self.leaves.is_empty() {
            return;
        }
        let number = RegionNumber::of(BlockNumber::new(self.next - 1));
        self.root.region(&number.digest(&self.leaves));
        self.leaves.clear();
    }
}
