//! What changed while the stream was broken off: which blocks, and as long as they are few
//! which extents of them, so that of a large block of which one sector changed only that
//! sector is shipped.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::bitmap::Bitmap;
use crate::geometry::Geometry;
use crate::units::{ByteOffset, Extent};

/// How well a gap is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exactness {
    /// By its extents.
    Extents,
    /// By its blocks.
    Blocks,
}

/// What changed in a gap of the stream.
#[derive(Debug)]
pub struct Gap {
    blocks: Bitmap,
    extents: Option<ExtentSet>,
    limit: usize,
}

impl Gap {
    /// Nothing yet; `blocks` is empty. At most `limit` extents are told apart.
    pub fn new(blocks: Bitmap, limit: usize) -> Self {
        Self {
            blocks,
            extents: Some(ExtentSet::default()),
            limit,
        }
    }

    /// One of which only the blocks are known.
    pub const fn of(blocks: Bitmap) -> Self {
        Self {
            blocks,
            extents: None,
            limit: 0,
        }
    }

    /// Adds a change.
    pub fn add(&mut self, geometry: &Geometry, extent: Extent) {
        if let Some(run) = geometry.run_of(extent) {
            self.blocks.set_run(run);
        }
        if let Some(extents) = &mut self.extents {
            extents.insert(extent);
            if extents.len() > self.limit {
                self.extents = None;
            }
        }
    }

    /// How well it is known.
    pub const fn exactness(&self) -> Exactness {
        match self.extents {
            Some(_) => Exactness::Extents,
            None => Exactness::Blocks,
        }
    }

    /// Its blocks.
    pub const fn blocks(&self) -> &Bitmap {
        &self.blocks
    }

    /// The parts of `extent`, which are whole blocks of it, that changed; in order.
    pub fn parts(&self, extent: Extent) -> Vec<Extent> {
        match &self.extents {
            None => vec![extent],
            Some(extents) => extents.within(extent),
        }
    }
}

/// Disjoint extents that do not touch each other: the end of each by its start.
#[derive(Debug, Default)]
pub struct ExtentSet(BTreeMap<u64, u64>);

impl ExtentSet {
    /// Adds an extent, which may be in there in part.
    pub fn insert(&mut self, extent: Extent) {
        if extent.is_empty() {
            return;
        }
        let (mut start, mut end) = (extent.offset().get(), extent.end().get());
        // The only one that begins before may reach this far; it takes in the others.
        if let Some((&before, &stop)) = self.0.range(..=start).next_back()
            && stop >= start
        {
            (start, end) = (before, end.max(stop));
        }
        while let Some((&next, &stop)) = self
            .0
            .range((Bound::Excluded(start), Bound::Included(end)))
            .next()
        {
            self.0.remove(&next);
            end = end.max(stop);
        }
        self.0.insert(start, end);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// What of `extent` is in there, in order.
    pub fn within(&self, extent: Extent) -> Vec<Extent> {
        let (start, end) = (extent.offset().get(), extent.end().get());
        let before = self.0.range(..start).next_back();
        before
            .into_iter()
            .chain(self.0.range(start..end))
            .filter_map(|(&from, &to)| {
                let (from, to) = (from.max(start), to.min(end));
                (from < to).then(|| Extent::between(ByteOffset::new(from), ByteOffset::new(to)))
            })
            .collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(start: u64, len: u64) -> Extent {
        Extent::between(ByteOffset::new(start), ByteOffset::new(start + len))
    }

    proptest! {
        #[test]
        fn an_extent_set_holds_what_was_put_into_it(
            added in prop::collection::vec((0u64..200, 0u64..30), 0..60),
            looked_at in (0u64..230, 1u64..60),
        ) {
            let mut set = ExtentSet::default();
            let mut model = [false; 300];
            for (start, len) in added {
                set.insert(extent(start, len));
                (start..start + len).for_each(|n| model[n as usize] = true);
            }
            let mut shown = [false; 300];
            let mut last = None;
            for part in set.within(extent(looked_at.0, looked_at.1)) {
                // In order, and no two touch.
                prop_assert!(last < Some(part.offset().get()));
                last = Some(part.end().get());
                (part.offset().get()..part.end().get()).for_each(|n| shown[n as usize] = true);
            }
            let inside = looked_at.0..looked_at.0 + looked_at.1;
            for n in 0..300 {
                prop_assert_eq!(shown[n as usize], model[n as usize] && inside.contains(&n));
            }
        }
    }

    #[test]
    fn too_many_extents_are_known_by_their_blocks() {
        let geometry = Geometry {
            size: crate::units::VolumeSize::new(1 << 20),
            block: crate::units::BlockSize::new(65536).unwrap(),
            sector: crate::units::SectorSize::B512,
        };
        let mut gap = Gap::new(Bitmap::new(geometry.blocks()), 2);
        gap.add(&geometry, extent(512, 512));
        gap.add(&geometry, extent(4096, 512));
        gap.add(&geometry, extent(1024, 512));
        let block = extent(0, 65536);
        assert_eq!(gap.exactness(), Exactness::Extents);
        assert_eq!(gap.parts(block), [extent(512, 1024), extent(4096, 512)]);
        gap.add(&geometry, extent(70000, 512));
        assert_eq!(gap.exactness(), Exactness::Blocks);
        assert_eq!(gap.parts(block), [block]);
        assert_eq!(gap.blocks().count(), 2);
    }
}
