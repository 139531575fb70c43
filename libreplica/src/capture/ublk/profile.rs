//! What users see of the device: the units and limits of the disk behind it, as far as they
//! mean the same here.

use crate::device::BlockDevice;
use crate::geometry::Geometry;
use crate::sys::ublk::Parameters;
use crate::units::ByteLen;

/// Bytes of the longest read or write: each has a buffer of its own in this process.
pub(super) const LONGEST: ByteLen = ByteLen::new(512 << 10);
/// The longest discard, and the longest request to write zeroes. The lane passes them on in
/// pieces; this bounds how long one can take.
const LONGEST_RANGE: u64 = 1 << 30;
/// The unit of sizes and offsets in sysfs and in the driver's parameters.
const SECTOR: u64 = 512;
/// The driver takes nothing below, and no logical sector above.
const PAGE_SHIFT: u8 = 12;

/// The alignment of memory that disks want which do not say: that of the smallest sector.
const MEMORY_MASK: u32 = 511;
/// The driver takes no stricter one: a disk that wants it refuses some requests' pages, and
/// those are copied.
const MEMORY_MASK_MAX: u64 = 4095;

/// What users of a device with `disk` behind it see.
pub(super) fn of(disk: &BlockDevice, geometry: Geometry) -> Parameters {
    let limit = |name: &str| disk.queue_limit(name);
    let logical_shift = shift_of(u64::from(geometry.sector.get())).unwrap_or(PAGE_SHIFT);
    let physical = u64::from(disk.physical_sector().get());
    let physical_shift = shift_of(physical).unwrap_or(PAGE_SHIFT).max(logical_shift);
    let shift = |name: &str| limit(name).and_then(shift_of);
    let least_shift = shift("minimum_io_size")
        .unwrap_or(physical_shift)
        .max(physical_shift);
    let granularity = limit("discard_granularity").and_then(|bytes| u32::try_from(bytes).ok());
    let longest_range = LONGEST_RANGE / SECTOR;
    Parameters {
        sectors: geometry.size.get() / SECTOR,
        logical_shift,
        physical_shift,
        least_shift,
        best_shift: shift("optimal_io_size").unwrap_or(0).max(least_shift),
        rotational: disk.is_rotational(),
        longest: (LONGEST.get() / SECTOR) as u32,
        // A longer one is passed on in several, however short those of the disk must be.
        longest_discard: if disk.can_discard() {
            longest_range as u32
        } else {
            0
        },
        discard_granularity: granularity
            .filter(|bytes| *bytes > 0)
            .unwrap_or(1 << physical_shift),
        discard_alignment: 0,
        // Where the disk has no such command, the kernel writes zeroes to it.
        longest_zeroes: longest_range as u32,
        memory_mask: limit("dma_alignment").map_or(MEMORY_MASK, memory_mask),
    }
}

fn memory_mask(wanted: u64) -> u32 {
    let bytes = wanted.min(MEMORY_MASK_MAX) + 1;
    bytes.next_power_of_two() as u32 - 1
}

/// A power of two as such; `None` for what is none.
fn shift_of(bytes: u64) -> Option<u8> {
    bytes
        .is_power_of_two()
        .then_some(bytes.trailing_zeros() as u8)
}
