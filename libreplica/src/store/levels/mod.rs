//! Levels: the sorted indexes of consecutive logs, merged, without data. A point may lie on
//! thousands of logs, and to find a byte among them their indexes would all have to be asked.
//! So the writer merges the indexes of a few neighbours into one file, the files of a few such
//! neighbours into a longer one, and so on; whoever reads asks the longest files that end
//! before the point, one behind the other, and the logs themselves only for the rest. The shorter
//! files stay, so that this holds for every point: with a radix of 16 it takes at most 15
//! files a level, and for ten thousand logs there are three levels (docs/store.md).
//!
//! They are a cache and never a truth. A file counts for exactly the logs it was made of, by
//! their ids and the digests of their seals, in order; anything missing, damaged, left over or
//! not understood is passed over, and the logs are read instead.

mod build;
mod file;
mod layout;
mod manifest;
mod plan;
#[cfg(test)]
mod tests;
mod tiles;
mod upkeep;

pub(super) use tiles::{Tile, TileStream, Tiles, Trouble};
pub(super) use upkeep::{Keeper, LevelStep};
