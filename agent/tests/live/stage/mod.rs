//! What the stories share: devices, mounts and daemons that are taken away again however
//! a test ends, loads that know what they wrote, and comparisons that say where two
//! things differ.

mod compare;
mod daemon;
mod device;
mod guest;
mod load;
mod place;

pub use compare::{assert_restores, check_filesystem, check_vfat, restore};
pub use daemon::{Daemon, Reply, Volume, replica};
pub use device::{LoopDevice, Mount, Zram};
pub use guest::{BOOT_LIMIT, Guest, guest_disks, path_with_qemu, recovered};
pub use load::{Bank, Fio, write_random};
pub use place::{Place, number, run, until};

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
