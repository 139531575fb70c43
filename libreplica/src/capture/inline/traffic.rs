//! Whether somebody else wrote to the device: what its users have written through us is
//! counted, and compared with what the kernel has counted for the disk. While we serve it the
//! disk is claimed; but between two processes of ours anybody may mount it, by a UUID that it
//! shares with the device that we serve.
//!
//! The account is a mapped file, so that it is there after a kill. A balance is struck while
//! nothing is under way: then both sides are known exactly. Later a write counts from its
//! begin, and the kernel may or may not have counted one that was cut off: more than all that
//! was begun is somebody else's. So after an orderly end every foreign sector is noticed;
//! after a kill those beyond what was under way.
//!
//! Sectors, not requests, for requests are split and merged; and the kernel counts sectors
//! before it tells us of the end. A disk of which it counts nothing proves nothing.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::capture::inline::ledger;
use crate::device::{BlockDevice, BootId, DiskStats, IoStats};
use crate::error::{IoContext, Result};
use crate::sys::memory::SharedWords;
use crate::units::ByteLen;

/// Words of the file: which balance counts, the counters, two balances.
const WORDS: usize = 512;
const CURRENT: usize = 0;
const BEGUN: usize = 1;
const ENDED: usize = 2;
const DISCARDED: usize = 3;
const BALANCES: [usize; 2] = [16, 32];
/// The kernel's sectors.
const SECTOR: u64 = 512;

/// What the kernel's counters say about the time since the last balance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody else has written, as far as can be said.
    Ours,
    /// Somebody else has.
    Foreign(ByteLen),
    /// It is not the disk of the last balance: it was gone meanwhile.
    OtherDisk,
    /// The kernel does not count, or nothing was noted in this boot.
    Unknown,
}

/// What we have begun and ended since the file was made; in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counted {
    begun: u64,
    ended: u64,
    discarded: u64,
}

/// Both sides at a moment when nothing was under way.
#[derive(Clone, Copy, Debug)]
struct Balance {
    boot: [u64; 2],
    diskseq: u64,
    written: u64,
    discarded: u64,
    ours: Counted,
    /// How much the disk zeroes at once; 0 once it has refused to.
    zeroes_max: u64,
}

/// The account of one volume.
#[derive(Debug)]
pub struct Traffic {
    words: SharedWords,
}

impl Traffic {
    /// The account at `path`; a new one if there is none.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Full`]; what the file system says.
    pub fn open(path: &Path) -> Result<Self> {
        const OPEN: &str = "open the account of what was written";
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .at(OPEN, path)?;
        let len = ByteLen::new(8 * WORDS as u64);
        file.set_len(len.get()).at(OPEN, path)?;
        // An empty account is as good as none: it may stay.
        ledger::give_blocks(&file, path, len)?;
        let words = SharedWords::map(file.as_fd(), WORDS).at(OPEN, path)?;
        Ok(Self { words })
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        &self.words.words()[at]
    }

    fn add(&self, at: usize, len: ByteLen) {
        let sectors = len.get() / SECTOR;
        self.word(at).fetch_add(sectors, Ordering::Relaxed);
    }

    /// A write, or zeroes, go to the device.
    pub fn begin_write(&self, len: ByteLen) {
        self.add(BEGUN, len);
    }

    /// The device has it.
    pub fn end_write(&self, len: ByteLen) {
        self.add(ENDED, len);
    }

    /// A discard goes to the device.
    pub fn begin_discard(&self, len: ByteLen) {
        self.add(DISCARDED, len);
    }

    fn counted(&self) -> Counted {
        let read = |at| self.word(at).load(Ordering::Acquire);
        // What has ended first: it has begun as well.
        let ended = read(ENDED);
        Counted {
            begun: read(BEGUN),
            ended,
            discarded: read(DISCARDED),
        }
    }

    /// Compares with what the kernel has counted. To be trusted only while nobody else can
    /// write, that is, while we have claimed the disk.
    ///
    /// # Errors
    /// When the disk is gone, or the boot's id cannot be read.
    pub fn verdict(&self, disk: &BlockDevice) -> Result<Verdict> {
        self.compare(disk, &disk.stats()?, self.counted())
    }

    fn compare(&self, disk: &BlockDevice, stats: &DiskStats, ours: Counted) -> Result<Verdict> {
        let balance = self.balance();
        if balance.boot != boot()? {
            return Ok(Verdict::Unknown);
        }
        if balance.diskseq != disk.diskseq().get() {
            return Ok(Verdict::OtherDisk);
        }
        // A refused attempt was counted, and then the writes that the kernel made of it.
        if balance.zeroes_max != zeroes_max(disk) {
            return Ok(Verdict::Unknown);
        }
        Ok(match disk.io_stats()? {
            IoStats::Kept => judge(&balance, stats, ours),
            IoStats::Off => Verdict::Unknown,
        })
    }

    /// Strikes a balance. Nothing may be under way, and if somebody else has written, that
    /// must have been noted durably.
    ///
    /// # Errors
    /// As [`Self::verdict`].
    pub fn settle(&self, disk: &BlockDevice) -> Result<()> {
        self.strike(disk, &disk.stats()?, self.counted())
    }

    /// Strikes a balance, unless that would hide what somebody else has written; what cannot
    /// be known it does hide. `is_quiet` says whether nothing is under way.
    ///
    /// # Errors
    /// As [`Self::verdict`].
    pub fn settle_if(&self, disk: &BlockDevice, is_quiet: impl Fn() -> bool) -> Result<()> {
        let ours = self.counted();
        if ours == self.balance().ours || !is_quiet() {
            return Ok(());
        }
        let stats = disk.stats()?;
        let verdict = self.compare(disk, &stats, ours)?;
        let hides = matches!(verdict, Verdict::Foreign(_) | Verdict::OtherDisk);
        // What was begun and ended meanwhile was counted.
        if !hides && is_quiet() && self.counted() == ours {
            self.strike(disk, &stats, ours)?;
        }
        Ok(())
    }

    fn strike(&self, disk: &BlockDevice, stats: &DiskStats, ours: Counted) -> Result<()> {
        let boot = boot()?;
        let words = [
            boot[0],
            boot[1],
            disk.diskseq().get(),
            stats.write_sectors,
            stats.discard_sectors,
            ours.begun,
            ours.ended,
            ours.discarded,
            zeroes_max(disk),
        ];
        // The other one, so that there is always a whole one.
        let next = 1 - self.word(CURRENT).load(Ordering::Acquire) % 2;
        for (n, word) in words.iter().enumerate() {
            let at = BALANCES[next as usize] + n;
            self.word(at).store(*word, Ordering::Relaxed);
        }
        self.word(CURRENT).store(next, Ordering::Release);
        Ok(())
    }

    fn balance(&self) -> Balance {
        let current = self.word(CURRENT).load(Ordering::Acquire) % 2;
        let at = BALANCES[current as usize];
        let read = |n| self.word(at + n).load(Ordering::Relaxed);
        Balance {
            boot: [read(0), read(1)],
            diskseq: read(2),
            written: read(3),
            discarded: read(4),
            ours: Counted {
                begun: read(5),
                ended: read(6),
                discarded: read(7),
            },
            zeroes_max: read(8),
        }
    }
}

fn judge(balance: &Balance, stats: &DiskStats, now: Counted) -> Verdict {
    let since = |now: u64, then: u64| now.saturating_sub(then);
    let written = since(stats.write_sectors, balance.written);
    let discarded = since(stats.discard_sectors, balance.discarded);
    let begun = since(now.begun, balance.ours.begun);
    let ended = since(now.ended, balance.ours.ended);
    let given_up = since(now.discarded, balance.ours.discarded);
    let foreign = since(written, begun) + since(discarded, given_up);
    if foreign > 0 {
        Verdict::Foreign(ByteLen::new(foreign * SECTOR))
    } else if written < ended {
        Verdict::Unknown
    } else {
        Verdict::Ours
    }
}

fn zeroes_max(disk: &BlockDevice) -> u64 {
    disk.queue_limit("write_zeroes_max_bytes").unwrap_or(0)
}

fn boot() -> Result<[u64; 2]> {
    let id = BootId::current()?;
    let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| id.as_bytes()[at + i]));
    Ok([half(0), half(8)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(write_sectors: u64, discard_sectors: u64) -> DiskStats {
        DiskStats {
            write_sectors,
            discard_sectors,
            ..DiskStats::default()
        }
    }

    #[test]
    fn what_nobody_of_ours_began_is_foreign() {
        let folder = tempfile::tempdir().unwrap();
        let traffic = Traffic::open(&folder.path().join("traffic")).unwrap();
        let mut balance = traffic.balance();
        balance.written = 1000;
        balance.discarded = 50;
        let judged =
            |written, discarded| judge(&balance, &stats(written, discarded), traffic.counted());
        let foreign = |sectors| Verdict::Foreign(ByteLen::new(sectors * SECTOR));
        assert_eq!(judged(1000, 50), Verdict::Ours);
        assert_eq!(judged(1001, 50), foreign(1));
        assert_eq!(judged(1000, 58), foreign(8));
        traffic.begin_write(ByteLen::new(4096));
        // Cut off, or not.
        assert_eq!(judged(1000, 50), Verdict::Ours);
        assert_eq!(judged(1008, 50), Verdict::Ours);
        assert_eq!(judged(1009, 50), foreign(1));
        traffic.end_write(ByteLen::new(4096));
        // It is the kernel that did not count.
        assert_eq!(judged(1000, 50), Verdict::Unknown);
        traffic.begin_discard(ByteLen::new(65536));
        assert_eq!(judged(1008, 178), Verdict::Ours);
        assert_eq!(judged(1008, 179), foreign(1));
    }
}
