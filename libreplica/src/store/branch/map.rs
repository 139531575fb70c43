//! What each byte of a volume comes from, as the newest change to it says: extents that are
//! disjoint and in order, each with where its bytes are. The branch keeps two of these in
//! memory, one for its open log, with the data itself, and one for its sealed logs.

use std::collections::BTreeMap;
use std::ops::Bound;

use hrl_format::units::{ByteLen, ByteOffset, Extent};

/// Where bytes are.
pub(super) trait Place: Clone {
    /// Where those are that lie `skipped` bytes behind the first.
    fn behind(&self, skipped: ByteLen) -> Self;
}

/// Disjoint extents, each with the place of its bytes.
#[derive(Debug)]
pub(super) struct ExtentMap<P> {
    /// By where they begin: where they end, and the place of the first byte.
    entries: BTreeMap<ByteOffset, (ByteOffset, P)>,
}

impl<P> Default for ExtentMap<P> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
        }
    }
}

impl<P: Place> ExtentMap<P> {
    /// The bytes of `extent` are there from now on.
    pub(super) fn insert(&mut self, extent: Extent, place: P) {
        if extent.is_empty() {
            return;
        }
        self.remove(extent);
        self.entries.insert(extent.offset(), (extent.end(), place));
    }

    /// Nothing is known of `extent` any more.
    fn remove(&mut self, extent: Extent) {
        let (start, end) = (extent.offset(), extent.end());
        // One that begins before may reach into it, or over it.
        let before = self.entries.range_mut(..start).next_back();
        if let Some((&at, (until, place))) = before
            && *until > start
        {
            let old = std::mem::replace(until, start);
            if old > end {
                let rest = place.behind(Extent::between(at, end).len());
                self.entries.insert(end, (old, rest));
                return;
            }
        }
        while let Some((&at, &(until, _))) = self.entries.range(start..end).next() {
            let Some((_, place)) = self.entries.remove(&at) else {
                return;
            };
            if until > end {
                let rest = place.behind(Extent::between(at, end).len());
                self.entries.insert(end, (until, rest));
            }
        }
    }

    /// What is known of `extent`, in order and without a gap: `None` where it is nothing.
    pub(super) fn pieces(&self, extent: Extent) -> Vec<(Extent, Option<P>)> {
        let (start, end) = (extent.offset(), extent.end());
        let mut pieces = Vec::new();
        let mut at = start;
        let first = self.entries.range(..=start).next_back();
        let first = first.filter(|(_, (until, _))| *until > start);
        let others = (Bound::Excluded(start), Bound::Unbounded);
        for (&begin, (until, place)) in first.into_iter().chain(self.entries.range(others)) {
            let from = begin.max(at);
            if from >= end {
                break;
            }
            if from > at {
                pieces.push((Extent::between(at, from), None));
            }
            let to = (*until).min(end);
            let skipped = Extent::between(begin, from).len();
            pieces.push((Extent::between(from, to), Some(place.behind(skipped))));
            at = to;
        }
        if at < end {
            pieces.push((Extent::between(at, end), None));
        }
        pieces
    }

    /// How many extents there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::random::Random;

    /// Who wrote, and how far into what was written.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Byte(u64, u64);

    impl Place for Byte {
        fn behind(&self, skipped: ByteLen) -> Self {
            Self(self.0, self.1 + skipped.get())
        }
    }

    #[test]
    fn it_is_what_an_array_says() {
        for seed in 0..50 {
            let mut random = Random::new(seed);
            let mut map = ExtentMap::default();
            let mut array: Vec<Option<Byte>> = vec![None; 300];
            for n in 0..100 {
                let start = random.below(300);
                let len = random.below(301 - start);
                let extent = Extent::new(ByteOffset::new(start), ByteLen::new(len)).unwrap();
                map.insert(extent, Byte(n, 0));
                (0..len).for_each(|k| array[(start + k) as usize] = Some(Byte(n, k)));
                let from = random.below(300);
                let asked = Extent::between(
                    ByteOffset::new(from),
                    ByteOffset::new(from + random.below(301 - from)),
                );
                let mut at = asked.offset();
                for (extent, place) in map.pieces(asked) {
                    assert_eq!(extent.offset(), at);
                    assert!(!extent.is_empty());
                    for k in 0..extent.len().get() {
                        let place = place.map(|place| place.behind(ByteLen::new(k)));
                        assert_eq!(place, array[(extent.offset().get() + k) as usize]);
                    }
                    at = extent.end();
                }
                assert_eq!(at, asked.end());
            }
        }
    }
}
