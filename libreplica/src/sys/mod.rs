//! The only room with unsafe code: what the kernel offers, behind functions that cannot
//! be called wrongly. Nothing here knows volumes, epochs or stores.
#![allow(unsafe_code)]

pub mod backing;
pub mod blkdev;
pub mod bpf;
pub mod btrfs;
pub mod child;
pub mod dm;
pub mod fds;
pub mod fiemap;
pub mod freeze;
pub mod membarrier;
pub mod memory;
pub mod program;
pub mod reader;
pub mod ring;
pub mod ublk;
pub mod uring;
