//! Is a disk that was out of sight the same disk? Its identity is what it holds: blocks
//! sampled all over it are compared with the digest tree. A disk that was in use
//! elsewhere differs in some; another disk differs in nearly all.

use hrl_format::units::ByteLen;

use crate::digest::DigestTree;
use crate::error::Result;
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::sys::reader::Reader;

/// Blocks looked at.
const SAMPLES: u64 = 256;
/// Blocks at the volume's start that are looked at besides: partition tables, superblocks.
const FIRST: u64 = 16;

/// Whether at least half of the sampled blocks that are not empty are as the tree says. A
/// volume that is all zeroes agrees with anything.
///
/// # Errors
/// When device or tree cannot be read.
pub fn agrees(reader: &mut Reader, geometry: &Geometry, tree: &DigestTree) -> Result<bool> {
    let blocks = geometry.blocks();
    let step = (blocks / SAMPLES).max(1);
    let sampled = (0..FIRST.min(blocks)).chain((FIRST..blocks).step_by(step as usize));
    let (mut looked, mut same) = (0_u32, 0_u32);
    for number in sampled.map(BlockNumber::new) {
        let Some(known) = tree.get(number)? else {
            continue;
        };
        let run = Run {
            start: number,
            end: BlockNumber::new(number.get() + 1),
        };
        let extent = geometry.extent_of(run);
        let empty = tree
            .function()
            .zero_leaf(number, ByteLen::new(extent.len().get()));
        if known == empty {
            continue;
        }
        let mut data = Vec::with_capacity(extent.len().get() as usize);
        let mut pieces = reader.pieces([extent]);
        while let Some((_, piece)) = pieces.next()? {
            data.extend_from_slice(piece);
        }
        looked += 1;
        same += u32::from(tree.function().leaf(number, &data) == known);
    }
    Ok(same * 2 >= looked)
}
