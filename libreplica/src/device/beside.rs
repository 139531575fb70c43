//! What belongs together with a disk without lying over it alone: the other disks of a
//! stacked device (dm, md) and of a filesystem over several. A copy of one without the
//! others is worth little.

use super::layers::Layers;
use super::{DevNo, sysfs};

impl Layers {
    /// The block devices that carry what lies here too, and are not among these: other
    /// members of an array or volume group, other devices of a filesystem.
    pub fn beside(&self) -> Vec<DevNo> {
        let stacked = self.devices().flat_map(below);
        let spanned = self
            .filesystems()
            .iter()
            .flat_map(|filesystem| filesystem.devices().to_vec());
        let mut beside: Vec<_> = stacked
            .chain(spanned)
            .filter(|device| !self.has_device(*device))
            .collect();
        beside.sort_unstable();
        beside.dedup();
        beside
    }
}

/// The devices that a stacked one is made of.
pub(super) fn below(device: DevNo) -> Vec<DevNo> {
    let Ok(folder) = sysfs::folder(device) else {
        return Vec::new();
    };
    let slaves = folder.join("slaves");
    sysfs::names(&slaves)
        .iter()
        .filter_map(|name| sysfs::devno(&slaves.join(name)))
        .collect()
}
