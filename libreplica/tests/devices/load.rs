//! Writers that change a device in every way until they are told to stop.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libreplica::sys::memory::AlignedMemory;

use super::{Random, open_direct};

/// `_IO(0x12, 119)`: discard a range.
const BLKDISCARD: libc::c_ulong = 0x1277;

fn open_buffered(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

fn size_of(mut device: &File) -> u64 {
    device.seek(SeekFrom::End(0)).unwrap()
}

/// Changes the device in every way, without a pause.
pub fn load(path: &Path, sector: u64, seed: u64, stop: &AtomicBool) {
    let mut random = Random(seed);
    let (direct, buffered) = (open_direct(path), open_buffered(path));
    let size = size_of(&buffered);
    let mut memory = AlignedMemory::new(256 << 10).unwrap();
    while !stop.load(Ordering::Relaxed) {
        let long = if random.below(10) == 0 {
            (256 << 10) / sector
        } else {
            16
        };
        let len = (1 + random.below(long)) * sector;
        let at = random.below((size - len) / sector + 1) * sector;
        memory.as_mut_slice()[..len as usize].fill(random.next() as u8);
        let bytes = &memory.as_slice()[..len as usize];
        match random.below(20) {
            0 => {
                let range = [at, len];
                // SAFETY: the kernel reads two words, which live across the call.
                unsafe { libc::ioctl(direct.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
            }
            1 => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                // SAFETY: plain numbers and an open descriptor.
                unsafe { libc::fallocate(direct.as_raw_fd(), mode, at as i64, len as i64) };
            }
            2..=5 => buffered.write_all_at(bytes, at).unwrap(),
            // Fails when writes around the page cache have met dirty pages.
            6 => drop(buffered.sync_data()),
            _ => direct.write_all_at(bytes, at).unwrap(),
        }
    }
}

/// Writes a little and flushes it, and waits a little, so that the device comes to rest
/// between most of its writes.
pub fn pause_and_write(path: &Path, sector: u64, seed: u64, stop: &AtomicBool) {
    let mut random = Random(seed);
    let (direct, buffered) = (open_direct(path), open_buffered(path));
    let size = size_of(&buffered);
    let memory = AlignedMemory::new(8 * sector as usize).unwrap();
    while !stop.load(Ordering::Relaxed) {
        let len = (1 + random.below(8)) * sector;
        let at = random.below((size - len) / sector + 1) * sector;
        let bytes = &memory.as_slice()[..len as usize];
        if random.below(2) == 0 {
            direct.write_all_at(bytes, at).unwrap();
        } else {
            buffered.write_all_at(bytes, at).unwrap();
            drop(buffered.sync_data());
        }
        std::thread::sleep(Duration::from_micros(random.below(2000)));
    }
}
