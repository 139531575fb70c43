//! Which blocks of a volume: a bitmap of three levels, so that a volume of terabytes with a
//! few dirty blocks is looked through in microseconds. The first level has a bit for each
//! block, the second a bit for each word of the first, the third a bit for each word of the
//! second; one behind the other in one array of atomic words. BPF programs write the same
//! layout: see `capture/bpf/track.bpf.c`.
//!
//! A bit that is set below must be reachable from above, at every instant, for a process may
//! be killed between any two instructions and its mapped memory lives on. So bits are set
//! from the top down, and cleared from the bottom up. A bit above without one below it does
//! no harm.

mod runs;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use runs::Runs;

use crate::geometry::{BlockNumber, Run};
use crate::sys::memory::SharedWords;

/// Where the levels of a bitmap lie, in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    blocks: u64,
    level1: usize,
    level2: usize,
    words: usize,
}

impl Layout {
    /// For so many blocks.
    pub const fn for_blocks(blocks: u64) -> Self {
        let level0 = blocks.div_ceil(64) as usize;
        let level1 = level0.div_ceil(64);
        let level2 = level1.div_ceil(64);
        Self {
            blocks,
            level1: level0,
            level2: level0 + level1,
            words: level0 + level1 + level2,
        }
    }

    /// How many blocks there are.
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The word in which the second level begins.
    pub const fn level1(&self) -> usize {
        self.level1
    }

    /// The word in which the third level begins.
    pub const fn level2(&self) -> usize {
        self.level2
    }

    /// How many words all three levels take.
    pub const fn words(&self) -> usize {
        self.words
    }
}

#[derive(Debug)]
enum Words {
    Own(Box<[AtomicU64]>),
    Shared {
        region: Arc<SharedWords>,
        start: usize,
    },
}

/// A set of blocks. All changes go through `&self`, word by word and atomically; each
/// method says what may run beside it.
#[derive(Debug)]
pub struct Bitmap {
    layout: Layout,
    words: Words,
}

impl Bitmap {
    /// An empty set in memory of its own, for a volume of so many blocks.
    pub fn new(blocks: u64) -> Self {
        let layout = Layout::for_blocks(blocks);
        let words = (0..layout.words).map(|_| AtomicU64::new(0)).collect();
        Self {
            layout,
            words: Words::Own(words),
        }
    }

    /// The set that lies in `region` from word `start` on; `None` if it would not fit.
    pub fn shared(layout: Layout, region: Arc<SharedWords>, start: usize) -> Option<Self> {
        let end = start.checked_add(layout.words)?;
        let words = Words::Shared { region, start };
        (end <= words.region_len()).then_some(Self { layout, words })
    }

    /// Where its levels lie.
    pub const fn layout(&self) -> Layout {
        self.layout
    }

    /// How many blocks the volume has, set or not.
    pub const fn blocks(&self) -> u64 {
        self.layout.blocks
    }

    fn words(&self) -> &[AtomicU64] {
        match &self.words {
            Words::Own(words) => words,
            Words::Shared { region, start } => &region.words()[*start..*start + self.layout.words],
        }
    }

    fn levels(&self) -> Levels<'_> {
        let (level0, above) = self.words().split_at(self.layout.level1);
        let (level1, level2) = above.split_at(self.layout.level2 - self.layout.level1);
        Levels {
            level0,
            level1,
            level2,
        }
    }

    /// Adds a block; one behind the end is left out. May run beside anything but clearing.
    pub fn set(&self, block: BlockNumber) {
        self.set_run(Run {
            start: block,
            end: BlockNumber::new(block.get().saturating_add(1)),
        });
    }

    /// Adds a run of blocks, cut at the end. May run beside anything but clearing.
    pub fn set_run(&self, run: Run) {
        let levels = self.levels();
        let end = run.end.get().min(self.layout.blocks);
        let mut at = run.start.get();
        while at < end {
            let next = (at / 64 + 1) * 64;
            levels.add((at / 64) as usize, mask(at, end.min(next)));
            at = next;
        }
    }

    /// Adds all blocks. May run beside anything but clearing.
    pub fn set_all(&self) {
        self.set_run(Run {
            start: BlockNumber::new(0),
            end: BlockNumber::new(self.layout.blocks),
        });
    }

    /// Whether a block is in the set.
    pub fn test(&self, block: BlockNumber) -> bool {
        let at = block.get();
        at < self.layout.blocks
            && self.levels().level0[(at / 64) as usize].load(Ordering::Acquire) >> (at % 64) & 1
                == 1
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.runs().next().is_none()
    }

    /// How many blocks are in the set.
    pub fn count(&self) -> u64 {
        self.levels()
            .dirty_words()
            .map(|(_, bits)| u64::from(bits.count_ones()))
            .sum()
    }

    /// How many blocks are in at least one of `sets`, which must be of the same volume.
    pub fn count_union(sets: &[&Self]) -> u64 {
        let mut total = 0;
        for (i, set) in sets.iter().enumerate() {
            let (before, after) = (&sets[..i], &sets[i + 1..]);
            for (word, bits) in set.levels().dirty_words() {
                // Each word counts where it is met first.
                let in_word = |other: &&Self| other.levels().level0[word].load(Ordering::Acquire);
                if before.iter().all(|other| in_word(other) == 0) {
                    let all = after.iter().fold(bits, |all, other| all | in_word(other));
                    total += u64::from(all.count_ones());
                }
            }
        }
        total
    }

    /// The runs of consecutive blocks in the set, in ascending order, each as long as can
    /// be. What is added meanwhile may or may not be met.
    pub const fn runs(&self) -> Runs<'_> {
        Runs::new(self)
    }

    /// Adds the blocks of `other`, a set of the same volume. May run beside anything but
    /// clearing.
    pub fn merge_from(&self, other: &Self) {
        debug_assert_eq!(self.layout, other.layout);
        let levels = self.levels();
        for (word, bits) in other.levels().dirty_words() {
            levels.add(word, bits);
        }
    }

    /// Adds those blocks of `other`, a set of the same volume, that are in `run`. May run beside
    /// anything but clearing.
    pub fn merge_run_from(&self, other: &Self, run: Run) {
        debug_assert_eq!(self.layout, other.layout);
        let found = other.runs().from(run.start);
        for found in found.take_while(|found| found.start < run.end) {
            let end = found.end.min(run.end);
            self.set_run(Run { end, ..found });
        }
    }

    /// Takes all blocks out. Nothing may be added meanwhile: it could get lost.
    pub fn clear(&self) {
        self.levels().clear();
    }

    /// Takes a run of blocks out. Nothing may be added meanwhile: it could get lost.
    pub fn clear_run(&self, run: Run) {
        let levels = self.levels();
        let end = run.end.get().min(self.layout.blocks);
        let mut at = run.start.get();
        while at < end {
            let next = (at / 64 + 1) * 64;
            levels.level0[(at / 64) as usize].fetch_and(!mask(at, end.min(next)), Ordering::AcqRel);
            at = next;
        }
    }

    /// Makes every block reachable that stands in the first level. For a mapped file whose
    /// pages reached the disk one by one before the power was lost.
    pub fn reconnect(&self) {
        let levels = self.levels();
        for (word, bits) in levels.level0.iter().enumerate() {
            let bits = bits.load(Ordering::Acquire);
            if bits != 0 {
                levels.add(word, bits);
            }
        }
    }

    /// Moves all blocks to `to`, a set of the same volume: they are there before they are
    /// gone here. Nothing may be added here meanwhile.
    pub fn take_into(&self, to: &Self) {
        to.merge_from(self);
        self.clear();
    }
}

/// The bits of the word of `from` that stand for `from` up to, not including, `to`, which
/// is in the same word or begins the next.
const fn mask(from: u64, to: u64) -> u64 {
    let low = u64::MAX << (from % 64);
    let high = u64::MAX >> (63 - (to - 1) % 64);
    low & high
}

impl Words {
    fn region_len(&self) -> usize {
        match self {
            Self::Own(words) => words.len(),
            Self::Shared { region, .. } => region.words().len(),
        }
    }
}

struct Levels<'a> {
    level0: &'a [AtomicU64],
    level1: &'a [AtomicU64],
    level2: &'a [AtomicU64],
}

/// Sets bits that are not all set yet; a plain read is cheaper than an atomic change.
fn or(word: &AtomicU64, bits: u64) {
    if word.load(Ordering::Acquire) & bits != bits {
        word.fetch_or(bits, Ordering::AcqRel);
    }
}

/// The numbers of the bits that are set in `bits`, from the lowest.
fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let one = bits.trailing_zeros() as usize;
        (bits != 0).then(|| {
            bits &= bits - 1;
            one
        })
    })
}

impl<'a> Levels<'a> {
    /// Adds `bits` to word `word` of the first level, from the top down.
    fn add(&self, word: usize, bits: u64) {
        or(&self.level2[word / 4096], 1 << (word / 64 % 64));
        or(&self.level1[word / 64], 1 << (word % 64));
        or(&self.level0[word], bits);
    }

    /// The words of the first level that are not zero, in ascending order.
    fn dirty_words(&self) -> impl Iterator<Item = (usize, u64)> + use<'a> {
        let (level0, level1) = (self.level0, self.level1);
        self.level2.iter().enumerate().flat_map(move |(i, top)| {
            ones(top.load(Ordering::Acquire)).flat_map(move |bit| {
                let middle = i * 64 + bit;
                ones(level1[middle].load(Ordering::Acquire)).filter_map(move |bit| {
                    let word = middle * 64 + bit;
                    let bits = level0[word].load(Ordering::Acquire);
                    (bits != 0).then_some((word, bits))
                })
            })
        })
    }

    /// Zeroes all that is reachable, from the bottom up.
    fn clear(&self) {
        for (i, top) in self.level2.iter().enumerate() {
            for middle in ones(top.load(Ordering::Acquire)).map(|bit| i * 64 + bit) {
                for bit in ones(self.level1[middle].load(Ordering::Acquire)) {
                    self.level0[middle * 64 + bit].store(0, Ordering::Release);
                }
                self.level1[middle].store(0, Ordering::Release);
            }
            top.store(0, Ordering::Release);
        }
    }
}
