//! The activity log's file: two blocks of 4 KiB, each the whole set of active regions, that
//! are written in turn. The newest whole one counts. One that was torn by a loss of power
//! was not yet relied upon: the writes that waited for it had not begun.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::capture::inline::activity::{REGIONS_MAX, Region};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::id::VolumeId;

/// A block: magic 8, version 4, number of regions 4, volume id 16, sequence number 8, the
/// regions' numbers 4 each, zeroes, CRC32 of all before it 4; little-endian.
const BLOCK: usize = 4096;
const MAGIC: [u8; 8] = *b"\x89HRLAL\r\n";
const VERSION: u32 = 1;
const REGIONS_AT: usize = 40;
const CRC_AT: usize = BLOCK - 4;
const OPEN: &str = "open the activity log";

const _: () = assert!(REGIONS_AT + 4 * REGIONS_MAX <= CRC_AT);

/// The file of one volume.
#[derive(Debug)]
pub struct ActivityFile {
    file: File,
    path: PathBuf,
    volume: VolumeId,
    sequence: u64,
}

impl ActivityFile {
    /// A new one, with nothing active.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; what the file system says. Nothing is left behind.
    pub fn create(path: &Path, volume: VolumeId) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .at("make the activity log", path)?;
        let mut log = Self {
            file,
            path: path.to_owned(),
            volume,
            sequence: 0,
        };
        // Both places have their blocks: a transaction changes no metadata of the file.
        let made = log
            .write(&[])
            .and_then(|()| log.write(&[]))
            .and_then(|()| log.file.sync_all().at("make the activity log", path));
        if made.is_err() {
            // Half a log would be taken for a damaged one.
            let _ = std::fs::remove_file(path);
        }
        made.map(|()| log)
    }

    /// The one of an earlier process, and the regions that were active.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Damaged`] if neither block is whole;
    /// [`ErrorKind::Foreign`] or [`ErrorKind::Unsupported`] for one that is not ours.
    pub fn open(path: &Path, volume: VolumeId) -> Result<(Self, Vec<Region>)> {
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).open(path);
        let file = opened.at(OPEN, path)?;
        let mut newest: Option<Set> = None;
        for place in 0..2 {
            let mut block = [0; BLOCK];
            if file.read_exact_at(&mut block, place * BLOCK as u64).is_ok()
                && let Some(set) = parse(&block)
                && newest
                    .as_ref()
                    .is_none_or(|old| old.sequence < set.sequence)
            {
                newest = Some(set);
            }
        }
        let failed = |kind, what: String| Error::new(kind, OPEN).path(path).detail(what);
        let Some(set) = newest else {
            return Err(failed(ErrorKind::Damaged, "neither block is whole".into()));
        };
        if set.version != VERSION {
            let what = format!("version {}; this program knows {VERSION}", set.version);
            return Err(failed(ErrorKind::Unsupported, what));
        }
        if set.volume != *volume.as_bytes() {
            return Err(failed(ErrorKind::Foreign, "it is of another volume".into()));
        }
        let log = Self {
            file,
            path: path.to_owned(),
            volume,
            sequence: set.sequence,
        };
        Ok((log, set.regions))
    }

    /// Makes `set` the active regions, durably.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for more than there is room for; what the file system says.
    pub fn write(&mut self, set: &[Region]) -> Result<()> {
        const WRITE: &str = "write the activity log";
        if set.len() > REGIONS_MAX {
            return Err(Error::new(ErrorKind::Invalid, WRITE).path(&self.path));
        }
        let mut block = [0; BLOCK];
        let sequence = self.sequence + 1;
        block[..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        block[12..16].copy_from_slice(&(set.len() as u32).to_le_bytes());
        block[16..32].copy_from_slice(self.volume.as_bytes());
        block[32..40].copy_from_slice(&sequence.to_le_bytes());
        let places = block[REGIONS_AT..CRC_AT].chunks_exact_mut(4);
        for (place, region) in places.zip(set) {
            place.copy_from_slice(&region.0.to_le_bytes());
        }
        let crc = crc32fast::hash(&block[..CRC_AT]);
        block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        self.file
            .write_all_at(&block, sequence % 2 * BLOCK as u64)
            .and_then(|()| self.file.sync_data())
            .at(WRITE, &self.path)?;
        self.sequence = sequence;
        Ok(())
    }
}

struct Set {
    version: u32,
    volume: [u8; 16],
    sequence: u64,
    regions: Vec<Region>,
}

/// What a block says; `None` if it is not whole.
fn parse(block: &[u8; BLOCK]) -> Option<Set> {
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| block[at + i]));
    if block[..8] != MAGIC || word(CRC_AT) != crc32fast::hash(&block[..CRC_AT]) {
        return None;
    }
    let count = (word(12) as usize).min(REGIONS_MAX);
    Some(Set {
        version: word(8),
        volume: std::array::from_fn(|i| block[16 + i]),
        sequence: u64::from_le_bytes(std::array::from_fn(|i| block[32 + i])),
        regions: (0..count)
            .map(|n| Region(word(REGIONS_AT + 4 * n)))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_whole_set_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("activity");
        let volume = VolumeId::random().unwrap();
        let mut log = ActivityFile::create(&path, volume).unwrap();
        let full: Vec<_> = (0..REGIONS_MAX as u32).map(Region).collect();
        log.write(&full).unwrap();
        log.write(&[Region(7), Region(u32::MAX)]).unwrap();
        let place = log.sequence % 2 * BLOCK as u64;
        drop(log);
        let (log, set) = ActivityFile::open(&path, volume).unwrap();
        assert_eq!(set, [Region(7), Region(u32::MAX)]);
        // Torn: the one before counts.
        log.file.write_all_at(&[1], place + 41).unwrap();
        let (mut log, set) = ActivityFile::open(&path, volume).unwrap();
        assert_eq!(set, full);
        // And the next goes to the place of the torn one.
        log.write(&[Region(1)]).unwrap();
        let (log, set) = ActivityFile::open(&path, volume).unwrap();
        assert_eq!(set, [Region(1)]);

        let foreign = ActivityFile::open(&path, VolumeId::random().unwrap());
        assert_eq!(foreign.unwrap_err().kind(), ErrorKind::Foreign);
        for place in [0, BLOCK as u64] {
            log.file.write_all_at(&[1], place + 41).unwrap();
        }
        let damaged = ActivityFile::open(&path, volume);
        assert_eq!(damaged.unwrap_err().kind(), ErrorKind::Damaged);
    }
}
