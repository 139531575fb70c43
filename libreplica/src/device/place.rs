//! From a device that lies over a disk down to the disk's own bytes: through partitions
//! and through the linear tables of dm, which is what LVM makes of a plain logical volume.
//! Other stacks (stripes, RAID, encryption) spread or change the bytes; they have no place.

use hrl_format::units::{ByteLen, ByteOffset, Extent};

use crate::device::{DevNo, sysfs};
use crate::sys::dm::{self, Target};

const SECTOR: u64 = 512;
/// Deeper stacks of dm are not followed.
const DEPTH: u32 = 8;

/// The bytes of `disk` that `extent` of `device` stands for, in the order of `extent`;
/// `None` if they are not all on it, or nobody can tell.
pub(super) fn on_disk(disk: DevNo, device: DevNo, extent: Extent) -> Option<Vec<Extent>> {
    follow(disk, device, extent, DEPTH)
}

fn follow(disk: DevNo, device: DevNo, extent: Extent, depth: u32) -> Option<Vec<Extent>> {
    if device == disk {
        return Some(vec![extent]);
    }
    let depth = depth.checked_sub(1)?;
    let folder = sysfs::folder(device).ok()?;
    if folder.join("partition").exists() {
        let start = sysfs::number(&folder, "start").ok()?.checked_mul(SECTOR)?;
        let whole = sysfs::devno(folder.parent()?)?;
        return follow(disk, whole, moved(extent, ByteOffset::ZERO, start)?, depth);
    }
    let name = sysfs::text(&folder, "dm/name")?;
    let mut places = Vec::new();
    let mut covered = 0;
    for Target {
        start,
        length,
        kind,
        parameters,
    } in dm::table(&name).ok()?
    {
        let span = Extent::new(
            ByteOffset::new(start.checked_mul(SECTOR)?),
            ByteLen::new(length.checked_mul(SECTOR)?),
        )?;
        let Some(part) = extent.intersect(span) else {
            continue;
        };
        let (under, at) = linear(&kind, &parameters)?;
        places.extend(follow(disk, under, moved(part, span.offset(), at)?, depth)?);
        covered += part.len().get();
    }
    (covered == extent.len().get()).then_some(places)
}

/// `extent` as it lies if `from` lies at byte `to`.
fn moved(extent: Extent, from: ByteOffset, to: u64) -> Option<Extent> {
    let offset = extent
        .offset()
        .get()
        .checked_sub(from.get())?
        .checked_add(to)?;
    Extent::new(ByteOffset::new(offset), extent.len())
}

/// Device and byte of a linear target's parameters: `MAJOR:MINOR SECTOR`.
fn linear(kind: &str, parameters: &str) -> Option<(DevNo, u64)> {
    let (device, sector) = parameters.trim().split_once(' ')?;
    let sector: u64 = sector.parse().ok()?;
    (kind == "linear").then_some((device.parse().ok()?, sector.checked_mul(SECTOR)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_linear_targets_have_a_place() {
        let device = DevNo { major: 8, minor: 2 };
        assert_eq!(linear("linear", "8:2 2048"), Some((device, 2048 * 512)));
        assert_eq!(linear("striped", "2 128 8:2 0 8:3 0"), None);
        assert_eq!(linear("crypt", "8:2 2048"), None);
    }

    #[test]
    fn an_extent_keeps_its_length_when_it_moves() {
        let extent = Extent::new(ByteOffset::new(5000), ByteLen::new(10)).unwrap();
        let there = moved(extent, ByteOffset::new(4096), 1 << 20).unwrap();
        assert_eq!(there.offset().get(), (1 << 20) + 904);
        assert_eq!(there.len().get(), 10);
        assert_eq!(moved(extent, ByteOffset::new(6000), 0), None);
    }
}
