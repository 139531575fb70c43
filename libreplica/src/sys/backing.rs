//! Blocks for every byte of a file, taken before it is mapped: a store to a page that has
//! none, on a file system that is full, is no error that could be handled but SIGBUS, the
//! end of the process. Nothing of what the file holds is changed.
//!
//! A file system that copies on write (btrfs, ZFS) may want new blocks at a later store all
//! the same: there this makes the end unlikely, not impossible.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::units::ByteLen;

/// Zeroes are written in pieces of this many bytes.
const PIECE: usize = 64 << 10;

/// Makes `file` at least `len` bytes long, with blocks behind all of them; what is new, or
/// was a hole, reads as zeroes. Nobody else may write to it meanwhile.
///
/// # Errors
/// `ENOSPC` or `EDQUOT` when there is no room; whatever else the file system says. The file
/// may be longer than before then.
pub fn give_blocks(file: &File, len: ByteLen) -> io::Result<()> {
    let end = i64::try_from(len.get()).map_err(|_| Errno::EFBIG)?;
    loop {
        return match fallocate(file, FallocateFlags::empty(), 0, end) {
            Err(Errno::EINTR) => continue,
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => fill_holes(file, len),
            done => Ok(done?),
        };
    }
}

/// The same by hand: writes zeroes where there is nothing.
fn fill_holes(file: &File, len: ByteLen) -> io::Result<()> {
    let old = file.metadata()?.len();
    let mut at = 0;
    while at < old.min(len.get()) {
        let hole = seek(file, at, Whence::SeekHole)?.unwrap_or(old);
        let data = match seek(file, hole, Whence::SeekData)? {
            Some(data) if hole < old => data,
            _ => old,
        };
        write_zeroes(file, hole, data.min(len.get()))?;
        at = data;
    }
    write_zeroes(file, old, len.get())?;
    file.sync_data()
}

/// Where the next hole, or the next data, is from `at` on.
fn seek(file: &File, at: u64, what: Whence) -> io::Result<Option<u64>> {
    let at = i64::try_from(at).map_err(|_| Errno::EFBIG)?;
    match lseek(file, at, what) {
        Ok(found) => Ok(u64::try_from(found).ok()),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn write_zeroes(file: &File, from: u64, to: u64) -> io::Result<()> {
    let zeroes = vec![0; PIECE];
    let mut at = from;
    while at < to {
        let len = (to - at).min(PIECE as u64);
        file.write_all_at(&zeroes[..len as usize], at)?;
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn holes_get_blocks_and_data_stays() {
        const LEN: u64 = 1 << 20;
        type Fill = fn(&File, ByteLen) -> io::Result<()>;
        for fill in [give_blocks as Fill, fill_holes] {
            let file = tempfile::tempfile().unwrap();
            let mut expected = vec![0; LEN as usize];
            for at in [4096, 300_000] {
                file.write_all_at(&[7; 5000], at).unwrap();
                expected[at as usize..][..5000].fill(7);
            }
            // Ends in a hole, and short of what is wanted.
            file.set_len(LEN / 2).unwrap();
            fill(&file, ByteLen::new(LEN)).unwrap();
            file.sync_all().unwrap();
            let metadata = file.metadata().unwrap();
            assert_eq!(metadata.len(), LEN);
            assert!(metadata.blocks() * 512 >= LEN, "{}", metadata.blocks());
            let mut found = vec![1; LEN as usize];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected);
        }
    }
}
