//! What is left out of the copy: ranges the operator named, and active swap, whose
//! content is worth nothing after a restart. Only whole blocks are left out, so that a
//! block is either copied or not; in particular a swap area's header, in its first
//! block's head, is copied and the area is found again.

use hrl_format::units::{ByteOffset, Extent};

use crate::error::Result;
use crate::geometry::Geometry;
use crate::primary::copy::reads;
use crate::sys::reader::Reader;

/// Ranges left out of the copy: sorted, disjoint, whole blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exclusions(Vec<Extent>);

impl Exclusions {
    /// The whole blocks within `ranges`.
    pub fn new(geometry: &Geometry, ranges: impl IntoIterator<Item = Extent>) -> Self {
        let block = u64::from(geometry.block.get());
        let inward = |range: Extent| {
            let end = range.end().get().min(geometry.size.get());
            // The volume's short last block is whole if the range reaches the end.
            let end = if end == geometry.size.get() {
                end
            } else {
                end / block * block
            };
            let start = range.offset().get().next_multiple_of(block);
            Extent::between(ByteOffset::new(start), ByteOffset::new(end))
        };
        let mut inner: Vec<_> = ranges
            .into_iter()
            .map(inward)
            .filter(|range| !range.is_empty())
            .collect();
        inner.sort_unstable();
        Self(merge_sorted(inner))
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Extent] {
        &self.0
    }

    /// Calls `part` with each stretch of `extent`, in order, and whether it is left out.
    pub fn split(&self, extent: Extent, mut part: impl FnMut(Extent, Left)) {
        let mut at = extent.offset();
        let from = self.0.partition_point(|range| range.end() <= at);
        for range in &self.0[from..] {
            let Some(out) = range.intersect(extent) else {
                break;
            };
            if at < out.offset() {
                part(Extent::between(at, out.offset()), Left::In);
            }
            part(out, Left::Out);
            at = out.end();
        }
        if at < extent.end() {
            part(Extent::between(at, extent.end()), Left::In);
        }
    }

    /// Calls `part` with each stretch of `extent` that is not left out, in order.
    pub fn kept(&self, extent: Extent, mut part: impl FnMut(Extent)) {
        self.split(extent, |stretch, left| {
            if left == Left::In {
                part(stretch);
            }
        });
    }

    /// Reads `slice` of the source, piece by piece in order; what is left out comes as
    /// `None`, unread.
    ///
    /// # Errors
    /// What the source failed with, or `take` returned.
    pub fn read(
        &self,
        geometry: &Geometry,
        slice: Extent,
        reader: &mut Reader,
        mut take: impl FnMut(Extent, Option<&[u8]>) -> Result<()>,
    ) -> Result<()> {
        let mut stretches = Vec::new();
        self.split(slice, |extent, left| stretches.push((extent, left)));
        for (stretch, left) in stretches {
            match left {
                Left::Out => take(stretch, None)?,
                Left::In => {
                    let mut pieces = reader.pieces(reads(stretch));
                    while let Some((extent, data)) = pieces.next()? {
                        take(extent, Some(data))?;
                    }
                }
            }
        }
        debug_assert!(slice.end().get() <= geometry.size.get());
        Ok(())
    }
}

/// The whole blocks that `extents` touch: sorted, disjoint.
pub fn blocks_of(geometry: &Geometry, extents: Vec<Extent>) -> Vec<Extent> {
    let mut whole: Vec<_> = extents
        .into_iter()
        .filter_map(|extent| geometry.run_of(extent))
        .map(|run| geometry.extent_of(run))
        .collect();
    whole.sort_unstable();
    merge_sorted(whole)
}

fn merge_sorted(sorted: Vec<Extent>) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.offset() <= last.end() => {
                *last = Extent::between(last.offset(), last.end().max(range.end()));
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// Whether a stretch is copied or left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It is copied.
    In,
    /// It is left out.
    Out,
}

#[cfg(test)]
mod tests {
    use super::*;
    use hrl_format::units::{BlockSize, ByteLen, SectorSize, VolumeSize};

    fn extent(offset: u64, len: u64) -> Extent {
        Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap()
    }

    fn geometry() -> Geometry {
        let size = VolumeSize::new(100_000);
        Geometry {
            size,
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        }
    }

    #[test]
    fn only_whole_blocks_are_left_out() {
        let out = Exclusions::new(&geometry(), [extent(4097, 8192), extent(90_000, 50_000)]);
        assert_eq!(
            out.ranges(),
            [extent(8192, 4096), extent(90_112, 100_000 - 90_112)]
        );
    }

    #[test]
    fn a_split_covers_everything_once() {
        let out = Exclusions::new(&geometry(), [extent(4096, 4096), extent(12_288, 4096)]);
        let mut parts = Vec::new();
        out.split(extent(0, 20_480), |part, left| {
            parts.push((part.offset().get(), left))
        });
        let expected = [
            (0, Left::In),
            (4096, Left::Out),
            (8192, Left::In),
            (12_288, Left::Out),
            (16_384, Left::In),
        ];
        assert_eq!(parts, expected);
    }
}
