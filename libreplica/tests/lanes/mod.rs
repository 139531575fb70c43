//! Inline capture of a real loop device through its lanes, for the tests that write to one.
#![allow(dead_code, reason = "no test program uses all of it")]

#[path = "../shipper/mod.rs"]
mod shipper;

use std::path::Path;

use libreplica::capture::inline::{
    Cookie, Done, Durability, Errno, Event, InlineSpec, Lane, Request,
};
use libreplica::sys::memory::AlignedMemory;
use libreplica::sys::uring::Part;

use crate::devices::{Loop, extent};
pub use shipper::*;

/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;

/// The volume on `disk`, with what is kept of it in `folder`.
pub fn spec(disk: &Loop, folder: &Path, bytes: u64) -> InlineSpec {
    spec_of(&disk.path, folder, bytes)
}

/// Memory with this in it.
pub fn part(fill: &[u8]) -> Part {
    let mut memory = AlignedMemory::new(fill.len()).unwrap();
    memory.as_mut_slice()[..fill.len()].copy_from_slice(fill);
    Part::first(memory, fill.len())
}

/// Serves a lane until `wanted` requests have ended.
pub fn finish(lane: &mut Lane, wanted: usize) -> Vec<Done> {
    let mut done = Vec::new();
    while done.len() < wanted {
        lane.turn().unwrap();
        while let Some(event) = lane.event() {
            match event {
                Event::Done(one) => done.push(one),
                other => panic!("{other:?}"),
            }
        }
    }
    done
}

/// Carries one request out.
pub fn one(lane: &mut Lane, request: Request) -> Done {
    lane.begin(Cookie(1), request);
    finish(lane, 1).pop().unwrap()
}

/// Writes `data`.
pub fn write(lane: &mut Lane, offset: u64, data: &[u8]) -> Result<(), Errno> {
    let request = Request::Write {
        from: part(data),
        extent: extent(offset, data.len() as u64),
        durability: Durability::Cached,
    };
    one(lane, request).result
}

/// Gives an extent up.
pub fn discard(lane: &mut Lane, offset: u64, len: u64) -> Result<(), Errno> {
    let extent = extent(offset, len);
    one(lane, Request::Discard { extent }).result
}

/// What the disk holds.
pub fn content(disk: &Loop) -> Vec<u8> {
    std::fs::read(&disk.file).unwrap()
}
