//! An update of the tree, in place, such that a crash in the middle is seen: the file
//! is marked and flushed, regions are rewritten one by one and flushed, the mark is
//! taken off and flushed. While the mark stands, leaves may be of either epoch, and the
//! caller applies the epoch again, from its log, which is durable by then.

use hrl_format::units::Epoch;

use super::leaf::Leaf;
use super::region::{LEAVES_PER_REGION, RegionNumber};
use super::tree::{DigestTree, TreeState};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Run};

/// An update that has begun. Dropped before [`Self::finish`], it counts as interrupted.
#[derive(Debug)]
#[must_use = "an update that is not finished counts as interrupted"]
pub struct Update<'a> {
    tree: &'a mut DigestTree,
    epoch: Epoch,
    /// The same epoch was begun before and not finished: regions may be torn.
    redo: Redo,
    open: Option<OpenRegion>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Redo {
    No,
    Yes,
}

/// The region being changed.
#[derive(Debug)]
struct OpenRegion {
    number: RegionNumber,
    leaves: Vec<u8>,
}

impl<'a> Update<'a> {
    pub(super) fn begin(tree: &'a mut DigestTree, epoch: Epoch) -> Result<Self> {
        let refuse = |tree: &DigestTree, detail: String| {
            Err(Error::new(ErrorKind::State, "update the digest tree")
                .path(&tree.path)
                .volume(tree.header.volume)
                .detail(detail))
        };
        let redo = match tree.state() {
            TreeState::Clean { epoch: last } if epoch > last => Redo::No,
            TreeState::Clean { epoch: last } => {
                return refuse(
                    tree,
                    format!("it is at epoch {last} already, not before {epoch}"),
                );
            }
            TreeState::Interrupted { applying, .. } if epoch == applying => Redo::Yes,
            TreeState::Interrupted { applying, .. } => {
                return refuse(
                    tree,
                    format!("epoch {applying} must be applied again before {epoch}"),
                );
            }
        };
        tree.header.applying = Some(epoch);
        tree.write_header()?;
        tree.sync()?;
        Ok(Self {
            tree,
            epoch,
            redo,
            open: None,
        })
    }

    /// The leaf of `block` is `leaf` now; `None` makes it unknown.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the volume has no such block; [`ErrorKind::Damaged`] if the region
    /// is not what its digest says; [`ErrorKind::Full`] or [`ErrorKind::Io`] if the file cannot be
    /// read or written.
    pub fn set(&mut self, block: BlockNumber, leaf: Option<Leaf>) -> Result<()> {
        let blocks = self.tree.geometry().blocks();
        if block.get() >= blocks {
            return Err(Error::new(ErrorKind::Invalid, "update the digest tree")
                .path(&self.tree.path)
                .detail(format!("block {} of {blocks}", block.get())));
        }
        let number = RegionNumber::of(block);
        let within = (block.get() % LEAVES_PER_REGION) as usize * Leaf::LEN;
        let stored = leaf.map_or([0; Leaf::LEN], |leaf| *leaf.as_bytes());
        let leaves = self.region(number)?;
        leaves[within..within + Leaf::LEN].copy_from_slice(&stored);
        Ok(())
    }

    /// Makes the leaves of `run`, cut at the volume's end, unknown. A region that lies in it
    /// as a whole is not read: this is also the way out of a damaged region.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn forget(&mut self, run: Run) -> Result<()> {
        let geometry = self.tree.geometry();
        let end = run.end.get().min(geometry.blocks());
        let mut next = run.start.get();
        while next < end {
            let number = RegionNumber::of(BlockNumber::new(next));
            let blocks = number.blocks(&geometry);
            let stop = blocks.end.get().min(end);
            if blocks.range() == (next..stop) {
                self.close_region()?;
                let leaves = vec![0; blocks.count() as usize * Leaf::LEN];
                self.open = Some(OpenRegion { number, leaves });
            } else {
                let within = (next - blocks.start.get()) as usize * Leaf::LEN;
                let len = (stop - next) as usize * Leaf::LEN;
                self.region(number)?[within..within + len].fill(0);
            }
            next = stop;
        }
        Ok(())
    }

    /// Makes the update durable and computes the root.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if a region entry is; [`ErrorKind::Full`] or [`ErrorKind::Io`] if the
    /// file cannot be read or written. The update then counts as interrupted.
    pub fn finish(mut self) -> Result<()> {
        self.close_region()?;
        let root = self.tree.compute_root()?;
        self.tree.sync()?;
        let before = self.tree.header.clone();
        self.tree.header.epoch = self.epoch;
        self.tree.header.applying = None;
        self.tree.header.root = root;
        let done = self.tree.write_header().and_then(|()| self.tree.sync());
        if done.is_err() {
            self.tree.header = before;
        }
        done
    }

    /// The leaves of region `number`, to be changed; the one open before is written.
    fn region(&mut self, number: RegionNumber) -> Result<&mut [u8]> {
        let open = match self.open.take_if(|open| open.number == number) {
            Some(open) => open,
            None => {
                self.close_region()?;
                let leaves = match self.redo {
                    Redo::No => self.tree.read_region(number)?,
                    Redo::Yes => self.tree.read_region_unchecked(number)?,
                };
                OpenRegion { number, leaves }
            }
        };
        Ok(&mut self.open.insert(open).leaves)
    }

    fn close_region(&mut self) -> Result<()> {
        match self.open.take() {
            Some(open) => self.tree.write_region(open.number, &open.leaves),
            None => Ok(()),
        }
    }
}
