//! The kernel's counters of a disk. They count completions, whole disk, and only while
//! `queue/iostats` is 1.
//! Source: Documentation/block/stat.rst.

use std::path::Path;

use crate::device::sysfs;
use crate::error::{Error, ErrorKind, Result};

/// Counters since the disk appeared; sectors are 512 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskStats {
    /// Reads completed.
    pub reads: u64,
    /// Sectors read.
    pub read_sectors: u64,
    /// Writes completed (write-zeroes among them).
    pub writes: u64,
    /// Sectors written.
    pub write_sectors: u64,
    /// Requests now in flight, reads and writes.
    pub in_flight: u64,
    /// Discards completed.
    pub discards: u64,
    /// Sectors discarded.
    pub discard_sectors: u64,
    /// Flushes completed; 0 before kernel 5.5.
    pub flushes: u64,
}

/// Whether the kernel keeps the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoStats {
    /// `queue/iostats` is 1.
    Kept,
    /// `queue/iostats` is 0: the counters stand still, whatever is written.
    Off,
}

pub(super) fn read(folder: &Path) -> Result<DiskStats> {
    let line = sysfs::text(folder, "stat").ok_or_else(|| {
        Error::new(ErrorKind::Vanished, "read the disk's counters").path(folder.join("stat"))
    })?;
    parse(&line).ok_or_else(|| {
        Error::new(ErrorKind::Kernel, "read the disk's counters")
            .path(folder.join("stat"))
            .detail(format!("{line:?}"))
    })
}

/// Source: Documentation/ABI/stable/sysfs-block, `inflight`: reads, then writes.
pub(super) fn writes_in_flight(folder: &Path) -> Result<u64> {
    let file = folder.join("inflight");
    let line = sysfs::text(folder, "inflight")
        .ok_or_else(|| Error::new(ErrorKind::Vanished, "read the disk's counters").path(&file))?;
    let writes = line.split_ascii_whitespace().nth(1);
    writes.and_then(|word| word.parse().ok()).ok_or_else(|| {
        Error::new(ErrorKind::Kernel, "read the disk's counters")
            .path(&file)
            .detail(format!("{line:?}"))
    })
}

fn parse(line: &str) -> Option<DiskStats> {
    let mut fields = [0; 17];
    let mut seen = 0;
    for (field, word) in fields.iter_mut().zip(line.split_ascii_whitespace()) {
        *field = word.parse().ok()?;
        seen += 1;
    }
    (seen >= 11).then_some(DiskStats {
        reads: fields[0],
        read_sectors: fields[2],
        writes: fields[4],
        write_sectors: fields[6],
        in_flight: fields[8],
        discards: fields[11],
        discard_sectors: fields[13],
        flushes: fields[15],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_taken_from_their_places() {
        let stats = parse("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17").unwrap();
        assert_eq!((stats.reads, stats.read_sectors), (1, 3));
        assert_eq!((stats.writes, stats.write_sectors), (5, 7));
        assert_eq!(stats.in_flight, 9);
        assert_eq!((stats.discards, stats.discard_sectors), (12, 14));
        assert_eq!(stats.flushes, 16);
        assert_eq!(parse("1 2 3"), None);
        assert_eq!(parse("1 2 3 4 5 6 7 8 9 10 11").unwrap().flushes, 0);
    }
}
