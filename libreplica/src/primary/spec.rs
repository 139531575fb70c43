//! What callers ask of the primary: a device to protect, a point to make.

use std::path::PathBuf;
use std::time::Duration;

use hrl_format::record::Consistency;
use hrl_format::units::{BlockSize, ByteLen, Extent};

use crate::primary::config::Capture;

/// How the daemon is set up.
#[derive(Clone, Debug)]
pub struct PrimaryOptions {
    /// The state folder.
    pub state_dir: PathBuf,
    /// Where the mark of a freeze under way is kept: on a filesystem in memory.
    pub run_dir: PathBuf,
    /// Executables that run before and after an application-consistent point.
    pub hooks_dir: PathBuf,
    /// How long one hook may take.
    pub hook_limit: Duration,
    /// How long a freeze may last, from the start of the first call.
    pub freeze_limit: Duration,
    /// Where the sockets of volumes are made that are served over NBD.
    pub socket_dir: PathBuf,
    /// How much data of a volume may wait in memory to be shipped, in inline capture.
    pub buffer: ByteLen,
    /// How much that may be of all volumes together.
    pub buffers: ByteLen,
}

/// What to do about other disks that belong to the same volume group, array or filesystem
/// and are not protected in the same group; and about an image of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Siblings {
    /// Refuse to protect one without the others.
    Refuse,
    /// Leave the others out.
    LeaveOut,
}

/// Something to leave out of the copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// A partition of the device, by its path.
    Partition(PathBuf),
    /// A byte range of the device.
    Range(Extent),
}

/// A device to protect, and how.
#[derive(Clone, Debug)]
pub struct ProtectSpec {
    /// The device's path, absolute.
    pub device: PathBuf,
    /// The store's folder, absolute.
    pub store: PathBuf,
    /// What to call the volume; none: the device's base name.
    pub name: Option<String>,
    /// The interval between recovery points.
    pub every: Duration,
    /// Which points to keep.
    pub retain: String,
    /// The size of a block; none: by the volume's size.
    pub block: Option<BlockSize>,
    /// Where the volume key is; none: not encrypted.
    pub key_file: Option<PathBuf>,
    /// The consistency group.
    pub group: Option<String>,
    /// What to leave out.
    pub exclude: Vec<Exclusion>,
    /// How its changes are captured.
    pub capture: Capture,
    /// Where logs wait when the store falls behind.
    pub spool: Option<PathBuf>,
    /// What to do about disks that belong to it.
    pub siblings: Siblings,
}

/// A point to make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PointOptions {
    /// The least it must be; none: filesystem-consistent if something is mounted, else
    /// crash-consistent.
    pub minimum: Option<Consistency>,
    /// What to call it; empty: nothing.
    pub label: String,
}
