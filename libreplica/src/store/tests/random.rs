//! Random numbers of the tests: from a seed, so that a failure can be run again.

/// SplitMix64.
#[derive(Clone, Debug)]
pub(in crate::store) struct Random(u64);

impl Random {
    pub(in crate::store) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(in crate::store) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `end`.
    pub(in crate::store) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(in crate::store) fn coin(&mut self) -> bool {
        self.next() & 1 == 1
    }
}
