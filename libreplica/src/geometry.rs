//! Geometry: how a volume's bytes fall into blocks. All arithmetic between blocks and
//! bytes is done here, the short last block included.

use std::ops::Range;

use hrl_format::units::{BlockSize, ByteLen, ByteOffset, Extent, SectorSize, VolumeSize};

/// The number of a block on a volume, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockNumber(u64);

impl BlockNumber {
    /// Block `n`.
    pub const fn new(n: u64) -> Self {
        Self(n)
    }

    /// The plain number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Consecutive blocks: `start` up to, not including, `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Run {
    /// The first block.
    pub start: BlockNumber,
    /// The first block behind it.
    pub end: BlockNumber,
}

impl Run {
    /// How many blocks.
    pub const fn count(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// The numbers as a plain range.
    pub const fn range(self) -> Range<u64> {
        self.start.0..self.end.0
    }
}

/// A volume's size and the units it is tracked and read in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes on the volume.
    pub size: VolumeSize,
    /// Bytes that one dirty bit covers.
    pub block: BlockSize,
    /// Bytes that the device reads and writes at least.
    pub sector: SectorSize,
}

/// An extent cut where blocks begin and end; each part may be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Less than a block, or nothing.
    pub before: Extent,
    /// Whole blocks.
    pub whole: Extent,
    /// Less than a block, or nothing.
    pub behind: Extent,
}

impl Cut {
    /// The parts of blocks that there are.
    pub fn edges(&self) -> impl Iterator<Item = Extent> + use<> {
        let edges = [self.before, self.behind];
        edges.into_iter().filter(|edge| !edge.is_empty())
    }
}

impl Geometry {
    /// How many blocks the volume has; the last may be short.
    pub const fn blocks(&self) -> u64 {
        self.block.count_in(self.size)
    }

    /// The bytes of `run`, cut at the volume's end.
    pub fn extent_of(&self, run: Run) -> Extent {
        let shift = self.block.shift();
        let at = |n: u64| ByteOffset::new((n << shift).min(self.size.get()));
        Extent::between(at(run.start.0), at(run.end.0))
    }

    /// The blocks that `extent` touches, cut at the volume's end; `None` if it touches none.
    pub fn run_of(&self, extent: Extent) -> Option<Run> {
        let extent = extent.intersect(self.size.extent())?;
        let shift = self.block.shift();
        Some(Run {
            start: BlockNumber(extent.offset().get() >> shift),
            end: BlockNumber(((extent.end().get() - 1) >> shift) + 1),
        })
    }

    /// `extent` as whole blocks, and what lies before and behind them: parts of blocks. The
    /// volume's last block is whole however short it is.
    pub fn cut(&self, extent: Extent) -> Cut {
        let block = u64::from(self.block.get());
        let (start, end) = (extent.offset().get(), extent.end().get());
        let first = start.next_multiple_of(block).min(end);
        let last = if end == self.size.get() {
            end
        } else {
            (end / block * block).max(first)
        };
        let part = |from: u64, to: u64| Extent::between(ByteOffset::new(from), ByteOffset::new(to));
        Cut {
            before: part(start, first),
            whole: part(first, last),
            behind: part(last, end),
        }
    }

    /// How long block `n` is, in bytes: the block size, or less for the last; zero past the end.
    pub fn block_len(&self, n: BlockNumber) -> ByteLen {
        self.extent_of(Run {
            start: n,
            end: BlockNumber(n.0 + 1),
        })
        .len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(bytes: u64) -> Geometry {
        Geometry {
            size: VolumeSize::new(bytes),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        }
    }

    #[test]
    fn last_block_is_short() {
        let g = geometry(10_000);
        assert_eq!(g.blocks(), 3);
        assert_eq!(g.block_len(BlockNumber::new(1)).get(), 4096);
        assert_eq!(g.block_len(BlockNumber::new(2)).get(), 10_000 - 8192);
        assert_eq!(g.block_len(BlockNumber::new(3)).get(), 0);
    }

    #[test]
    fn an_extent_is_cut_where_blocks_begin_and_end() {
        let g = geometry(10_000);
        let cut = |start: u64, end: u64| {
            let extent = Extent::between(ByteOffset::new(start), ByteOffset::new(end));
            let Cut {
                before,
                whole,
                behind,
            } = g.cut(extent);
            [before, whole, behind].map(|part| part.len().get())
        };
        assert_eq!(cut(0, 8192), [0, 8192, 0]);
        assert_eq!(cut(512, 9000), [3584, 4096, 808]);
        assert_eq!(cut(512, 1024), [512, 0, 0]);
        assert_eq!(cut(4096, 4608), [0, 0, 512]);
        // The last block is short.
        assert_eq!(cut(8192, 10_000), [0, 1808, 0]);
    }

    #[test]
    fn a_run_covers_every_byte_of_its_extent() {
        let g = geometry(10_000);
        let extent = Extent::new(ByteOffset::new(4095), ByteLen::new(2)).unwrap();
        assert_eq!(g.run_of(extent).unwrap().range(), 0..2);
        let past = Extent::new(ByteOffset::new(10_000), ByteLen::new(2)).unwrap();
        assert_eq!(g.run_of(past), None);
    }
}
