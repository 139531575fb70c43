//! Block status of an opened state: which of its bytes are zeroes, and which were written.

use std::ops::ControlFlow;

use super::opened::Opened;
use crate::capture::nbd::HowMany;
use crate::error::Result;
use crate::store::{PieceKind, PointPiece};
use crate::units::Extent;

/// `base:allocation` of what is zeroes: a hole, and zeroes.
const HOLE: u32 = 3;
/// And of what is data.
const DATA: u32 = 0;
/// Stretches that are told in one reply at most.
const MOST: usize = 4096;

/// Length and state of each stretch of `extent`, from its first byte on, each unlike the one
/// before; not all of it, if there are too many.
pub(super) fn stretches(opened: &Opened, extent: Extent, many: HowMany) -> Result<Vec<(u32, u32)>> {
    let most = match many {
        HowMany::One => 1,
        HowMany::Many => MOST,
    };
    let mut list: Vec<(u32, u32)> = Vec::new();
    opened.pieces_in(extent, &mut |PointPiece { extent, kind }| {
        // No request is longer than 32 bits can say.
        let len = u32::try_from(extent.len().get()).unwrap_or(u32::MAX);
        let state = match kind {
            PieceKind::Data => DATA,
            PieceKind::Zeroes => HOLE,
        };
        let count = list.len();
        match list.last_mut() {
            Some((last, same)) if *same == state => *last = last.saturating_add(len),
            _ if count == most => return ControlFlow::Break(()),
            _ => list.push((len, state)),
        }
        ControlFlow::Continue(())
    })?;
    Ok(list)
}
