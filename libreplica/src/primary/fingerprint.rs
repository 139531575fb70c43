//! Is a disk that was out of sight the same disk? Its identity is what it holds: blocks
//! sampled all over it are compared with the digest tree, or with the image where there is
//! no tree yet. A disk that was in use elsewhere differs in some; another disk differs in
//! nearly all.

use hrl_format::units::{ByteLen, Extent};

use crate::digest::DigestTree;
use crate::error::Result;
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::primary::draft::is_zero;
use crate::store::TipReader;
use crate::sys::reader::Reader;

/// Blocks looked at.
const SAMPLES: u64 = 256;
/// Blocks at the volume's start that are looked at besides: partition tables, superblocks.
const FIRST: u64 = 16;

/// How many of the blocks that were looked at are not empty in the copy, and how many of
/// those are the same on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Likeness {
    /// Blocks that hold something in the copy.
    pub looked: u32,
    /// Those of them that the disk has too.
    pub same: u32,
}

impl Likeness {
    /// Whether at least half are the same. A copy that is all zeroes agrees with anything.
    pub const fn agrees(self) -> bool {
        self.same * 2 >= self.looked
    }
}

/// Whether the disk is the one that `tree` was made from. Blocks that `differs` names are known
/// to be otherwise since, and say nothing.
///
/// # Errors
/// When device or tree cannot be read.
pub fn agrees(
    reader: &mut Reader,
    geometry: &Geometry,
    tree: &DigestTree,
    differs: &dyn Fn(BlockNumber) -> bool,
) -> Result<bool> {
    let mut found = Likeness::default();
    for (number, extent) in sampled(geometry).filter(|(number, _)| !differs(*number)) {
        let Some(known) = tree.get(number)? else {
            continue;
        };
        let empty = tree
            .function()
            .zero_leaf(number, ByteLen::new(extent.len().get()));
        if known == empty {
            continue;
        }
        let data = read(reader, extent)?;
        found.looked += 1;
        found.same += u32::from(tree.function().leaf(number, &data) == known);
    }
    Ok(found.agrees())
}

/// How far the disk is like an image that no tree is known of.
///
/// # Errors
/// When device or image cannot be read.
pub fn compare(
    reader: &mut Reader,
    geometry: &Geometry,
    image: &mut TipReader,
) -> Result<Likeness> {
    let mut found = Likeness::default();
    for (_, extent) in sampled(geometry) {
        let mut known = vec![0; extent.len().get() as usize];
        image.read_at(extent.offset(), &mut known)?;
        if is_zero(&known) {
            continue;
        }
        found.looked += 1;
        found.same += u32::from(read(reader, extent)? == known);
    }
    Ok(found)
}

/// The blocks that are looked at.
fn sampled(geometry: &Geometry) -> impl Iterator<Item = (BlockNumber, Extent)> {
    let geometry = *geometry;
    let blocks = geometry.blocks();
    let step = (blocks / SAMPLES).max(1);
    let numbers = (0..FIRST.min(blocks)).chain((FIRST..blocks).step_by(step as usize));
    numbers.map(move |number| {
        let run = Run {
            start: BlockNumber::new(number),
            end: BlockNumber::new(number + 1),
        };
        (run.start, geometry.extent_of(run))
    })
}

fn read(reader: &mut Reader, extent: Extent) -> Result<Vec<u8>> {
    let mut data = Vec::with_capacity(extent.len().get() as usize);
    let mut pieces = reader.pieces([extent]);
    while let Some((_, piece)) = pieces.next()? {
        data.extend_from_slice(piece);
    }
    Ok(data)
}
