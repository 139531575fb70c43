//! Copy before write: a set of blocks is being read for an epoch, and must be read as it was
//! at one moment. Blocks that are still to be read may not be changed before their old
//! content is taken: a change of one waits until it has been, by the reader or, out of turn,
//! into memory. So a consistent point needs no freeze, and the writes to each block wait for
//! at most one read of it.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::bitmap::Bitmap;
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::units::Extent;

/// What became of a block that the reader has read.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// What was read is the content of the moment.
    AsRead,
    /// It was changed since; this is the content of the moment.
    Saved(Bytes),
    /// It had been discarded: whatever was read, it is restored as zeroes.
    Discarded,
}

/// Which moment of a service: what was read for one is of no use to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MomentNumber(pub u64);

/// One moment's blocks.
#[derive(Debug)]
pub struct Copying {
    number: MomentNumber,
    geometry: Geometry,
    /// Not yet taken.
    pending: Bitmap,
    /// Of no content at the moment, whoever changes them since.
    discarded: Bitmap,
    /// Taken out of turn.
    saved: BTreeMap<BlockNumber, Bytes>,
    saved_bytes: u64,
    limit: u64,
    is_broken: bool,
}

impl Copying {
    /// Of the blocks in `round`, of which those in `undefined` were discarded; at most `limit`
    /// bytes of them are saved out of turn.
    pub fn of(
        number: MomentNumber,
        round: &Bitmap,
        undefined: &Bitmap,
        geometry: Geometry,
        limit: u64,
    ) -> Self {
        let pending = Bitmap::new(geometry.blocks());
        let discarded = Bitmap::new(geometry.blocks());
        pending.merge_from(round);
        for run in undefined.runs() {
            discarded.merge_run_from(round, run);
            pending.clear_run(run);
        }
        Self {
            number,
            geometry,
            pending,
            discarded,
            saved: BTreeMap::new(),
            saved_bytes: 0,
            limit,
            is_broken: false,
        }
    }

    /// Which moment it is.
    pub const fn number(&self) -> MomentNumber {
        self.number
    }

    /// Whether `extent` may be changed.
    pub fn may_change(&self, extent: Extent) -> bool {
        self.first_pending(extent).is_none()
    }

    /// The first stretch of blocks in `extent` that must be taken before it is changed.
    pub fn first_pending(&self, extent: Extent) -> Option<Run> {
        let run = self.geometry.run_of(extent)?;
        let pending = self.pending.runs().from(run.start).next()?;
        let end = pending.end.get().min(run.end.get());
        (pending.start < run.end).then(|| Run {
            start: pending.start,
            end: BlockNumber::new(end),
        })
    }

    /// Takes the content of `run` out of turn; `data` was read from the device while the
    /// blocks were pending. Says whether there was room: if not, the moment is lost.
    pub fn save(&mut self, run: Run, data: &Bytes) -> bool {
        let base = self.geometry.extent_of(run).offset().get();
        for n in run.range() {
            let block = BlockNumber::new(n);
            if !self.pending.test(block) {
                continue;
            }
            let one = Run {
                start: block,
                end: BlockNumber::new(n + 1),
            };
            let extent = self.geometry.extent_of(one);
            let start = (extent.offset().get() - base) as usize;
            let content = data.slice(start..start + extent.len().get() as usize);
            self.saved_bytes += content.len() as u64;
            self.saved.insert(block, content);
            self.pending.clear_run(one);
        }
        if self.saved_bytes > self.limit {
            self.give_up();
        }
        !self.is_broken
    }

    /// The reader has read block `n`.
    pub fn take(&mut self, n: BlockNumber) -> Taken {
        if let Some(data) = self.saved.remove(&n) {
            self.saved_bytes -= data.len() as u64;
            return Taken::Saved(data);
        }
        if self.discarded.test(n) {
            return Taken::Discarded;
        }
        let end = BlockNumber::new(n.get() + 1);
        self.pending.clear_run(Run { start: n, end });
        Taken::AsRead
    }

    /// The moment is lost: nothing waits any more.
    pub fn give_up(&mut self) {
        self.is_broken = true;
        self.pending.clear();
        self.saved.clear();
        self.saved_bytes = 0;
    }

    /// Whether the moment was lost.
    pub const fn is_broken(&self) -> bool {
        self.is_broken
    }
}
