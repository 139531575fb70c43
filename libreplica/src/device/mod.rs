//! What the kernel says about disks: which one a path names, whether it is still the same
//! one, what lies over it (partitions, holders, filesystems, loop devices over files,
//! swap), and whether a path lies on it.
//!
//! All of it is read from sysfs and /proc at the moment of the question and never cached:
//! mounts come and go under a protected disk. Nothing here opens a partition, or anything
//! exclusively.

mod beside;
mod block_device;
mod boot;
mod file_place;
mod filesystem;
mod layers;
mod loops;
mod mountinfo;
mod numbers;
mod place;
mod reach;
mod refuse;
mod stats;
mod swap;
mod sysfs;

pub use block_device::{BlockDevice, OpenFor, Partition, Queue};
pub use boot::BootId;
pub use filesystem::{Filesystem, Freezing};
pub use layers::{Layers, superblock_of};
pub use numbers::{DevNo, DiskSeq};
pub use reach::Reach;
pub use stats::{DiskStats, IoStats};
pub use swap::{Swap, SwapArea};
