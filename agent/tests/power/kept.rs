//! What capture left of a volume in the state folder, read here by the description of its
//! files and not by its own code: what may differ between the disk and the store.

use std::fs;
use std::ops::Range;
use std::path::Path;

use hrl_format::Log;

/// The size of the regions in the activity log.
const REGION: u64 = 4 << 20;

/// What is known of a volume's changes.
#[derive(Debug)]
pub struct Kept {
    block: u64,
    /// For each block: the ledger has it as dirty.
    dirty: Vec<bool>,
    /// For each block: the activity log has its region.
    active: Vec<bool>,
}

impl Kept {
    /// Of the one volume whose files are in `folder`.
    pub fn read(folder: &Path) -> Self {
        let ledger = fs::read(folder.join("dirty")).unwrap();
        let block = u64::from(u32_at(&ledger, 12));
        let size = u64_at(&ledger, 32);
        let blocks = size.div_ceil(block) as usize;
        let words = blocks.div_ceil(64);
        // Each bitmap: a bit for each block, one for each word of those, and once more.
        let bitmap = words + words.div_ceil(64) + words.div_ceil(64).div_ceil(64);
        let is_dirty = |number: &usize| {
            (0..3).any(|part| {
                let word = 4096 + (part * bitmap + number / 64) * 8;
                u64_at(&ledger, word) >> (number % 64) & 1 == 1
            })
        };
        let log = fs::read(folder.join("activity")).unwrap();
        let newest = log
            .chunks_exact(4096)
            .filter(|set| u32_at(set, 4092) == crc32(&set[..4092]))
            .max_by_key(|set| u64_at(set, 32))
            .unwrap();
        let count = u32_at(newest, 12) as usize;
        let regions: Vec<_> = (0..count).map(|n| u32_at(newest, 40 + 4 * n)).collect();
        let is_active =
            |number: &usize| regions.contains(&((*number as u64 * block / REGION) as u32));
        Self {
            block,
            dirty: (0..blocks).map(|number| is_dirty(&number)).collect(),
            active: (0..blocks).map(|number| is_active(&number)).collect(),
        }
    }

    /// Bytes that are dirty.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.iter().filter(|dirty| **dirty).count() as u64 * self.block
    }

    /// Bytes of the regions that were active.
    pub fn active_bytes(&self) -> u64 {
        self.active.iter().filter(|active| **active).count() as u64 * self.block
    }

    /// Bytes that have to be read again.
    pub fn bytes(&self) -> u64 {
        let both = self.dirty.iter().zip(&self.active);
        both.filter(|(dirty, active)| **dirty || **active).count() as u64 * self.block
    }

    /// Whether all of `range` is among what has to be read again.
    pub fn covers(&self, range: Range<u64>) -> bool {
        let blocks = range.start / self.block..range.end.div_ceil(self.block);
        blocks
            .map(|n| n as usize)
            .all(|n| self.dirty[n] || self.active[n])
    }
}

/// What a log of the store changes.
pub fn changed_by(log: &Path) -> Vec<Range<u64>> {
    let log = Log::open(fs::File::open(log).unwrap(), None).unwrap();
    let entries = log.index().map(|entry| {
        let extent = entry.unwrap().extent;
        extent.offset().get()..extent.end().get()
    });
    entries.collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// As zlib's.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}
