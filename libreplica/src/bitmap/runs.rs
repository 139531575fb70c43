//! Walks a bitmap: the runs of consecutive blocks in it, found through the upper levels, so
//! that empty stretches cost nothing.

use std::sync::atomic::Ordering;

use crate::bitmap::{Bitmap, Levels};
use crate::geometry::{BlockNumber, Run};

/// Ascending runs of the blocks in a [`Bitmap`]; made by [`Bitmap::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    bitmap: &'a Bitmap,
    at: u64,
}

impl<'a> Runs<'a> {
    pub(super) const fn new(bitmap: &'a Bitmap) -> Self {
        Self { bitmap, at: 0 }
    }

    /// The same, from block `at` on.
    #[must_use]
    pub const fn from(mut self, at: BlockNumber) -> Self {
        self.at = at.get();
        self
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let levels = self.bitmap.levels();
        let blocks = self.bitmap.blocks();
        let start = levels.next_set(self.at).filter(|&start| start < blocks)?;
        let end = levels.next_clear(start).min(blocks);
        self.at = end;
        Some(Run {
            start: BlockNumber::new(start),
            end: BlockNumber::new(end),
        })
    }
}

/// The first bit set in `word` from bit `from` on; 64 and more find nothing.
fn first_set(word: u64, from: usize) -> Option<usize> {
    let rest = word & u64::MAX.checked_shl(from as u32).unwrap_or(0);
    (rest != 0).then(|| rest.trailing_zeros() as usize)
}

impl Levels<'_> {
    /// The first block in the set that is `at` or behind it.
    fn next_set(&self, at: u64) -> Option<u64> {
        let word = (at / 64) as usize;
        let bits = self.level0.get(word)?.load(Ordering::Acquire);
        if let Some(bit) = first_set(bits, (at % 64) as usize) {
            return Some((word * 64 + bit) as u64);
        }
        let mut from = word + 1;
        // A word that level 1 names may be empty: it was cleared, or is about to be set.
        while let Some(word) = self.next_word(from) {
            let bits = self.level0[word].load(Ordering::Acquire);
            if let Some(bit) = first_set(bits, 0) {
                return Some((word * 64 + bit) as u64);
            }
            from = word + 1;
        }
        None
    }

    /// The first word of level 0, `from` or behind it, that level 1 names.
    fn next_word(&self, from: usize) -> Option<usize> {
        let middle = from / 64;
        let bits = self.level1.get(middle)?.load(Ordering::Acquire);
        if let Some(bit) = first_set(bits, from % 64) {
            return Some(middle * 64 + bit);
        }
        let mut from = middle + 1;
        while let Some(middle) = self.next_middle(from) {
            let bits = self.level1[middle].load(Ordering::Acquire);
            if let Some(bit) = first_set(bits, 0) {
                return Some(middle * 64 + bit);
            }
            from = middle + 1;
        }
        None
    }

    /// The first word of level 1, `from` or behind it, that level 2 names.
    fn next_middle(&self, from: usize) -> Option<usize> {
        let tops = self.level2.get(from / 64..)?;
        tops.iter().enumerate().find_map(|(i, top)| {
            let first = if i == 0 { from % 64 } else { 0 };
            let bit = first_set(top.load(Ordering::Acquire), first)?;
            Some((from / 64 + i) * 64 + bit)
        })
    }

    /// The first block that is not in the set, `at` or behind it.
    fn next_clear(&self, at: u64) -> u64 {
        let mut word = (at / 64) as usize;
        let mut from = (at % 64) as usize;
        while let Some(bits) = self.level0.get(word) {
            if let Some(bit) = first_set(!bits.load(Ordering::Acquire), from) {
                return (word * 64 + bit) as u64;
            }
            word += 1;
            from = 0;
        }
        (word * 64) as u64
    }
}
