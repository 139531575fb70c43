//! Memory that others see too, or that a device writes into: a file or a BPF map mapped as
//! atomic words, and page-aligned buffers for direct I/O. Both are given back on drop.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

fn map(len: usize, flags: libc::c_int, fd: libc::c_int) -> io::Result<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours.
    let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(at.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))
}

/// A file or a BPF map, mapped and shared, seen as 64-bit words that whoever else has it
/// mapped, and BPF programs, read and change at the same time.
///
/// Words are in the machine's byte order. The mapped file must not be cut shorter.
#[derive(Debug)]
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the words are atomic, and the mapping lives as long as this value.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps the first `words` words behind `fd`.
    ///
    /// # Errors
    /// Those of mmap(2): `EPERM` for a BPF map not made for it, `ENOMEM`.
    pub fn map(fd: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        let len = words * size_of::<u64>();
        let start = map(len, libc::MAP_SHARED, fd.as_raw_fd())?.cast();
        Ok(Self { start, words })
    }

    /// The words.
    pub const fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped at this length, page-aligned, until drop.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }

    /// Writes what was changed to the file, and waits for it.
    ///
    /// # Errors
    /// Those of msync(2): what the file system could not write.
    pub fn flush(&self) -> io::Result<()> {
        let len = self.words * size_of::<u64>();
        // SAFETY: exactly the mapping made above.
        let result = unsafe { libc::msync(self.start.as_ptr().cast(), len, libc::MS_SYNC) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made above; no borrow of it is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<u64>()) };
    }
}

/// Page-aligned memory for direct I/O, zero at first.
#[derive(Debug)]
pub struct AlignedMemory {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory of its own; access follows the borrow of this value.
unsafe impl Send for AlignedMemory {}
// SAFETY: as above.
unsafe impl Sync for AlignedMemory {}

impl AlignedMemory {
    /// `len` bytes, not yet backed by pages; at least one page is taken.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new(len: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let len = len.max(1);
        Ok(Self {
            start: map(len, flags, -1)?,
            len,
        })
    }

    /// Backs every byte with a page now, and keeps the pages from being swapped out, so that
    /// nothing has to be allocated when the memory is used.
    ///
    /// # Errors
    /// Those of mlock(2): `ENOMEM` or `EPERM` past the limit on locked memory.
    pub fn lock(&self) -> io::Result<()> {
        // SAFETY: exactly the mapping made above.
        let result = unsafe { libc::mlock(self.start.as_ptr().cast(), self.len) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// The bytes.
    pub const fn as_slice(&self) -> &[u8] {
        // SAFETY: mapped at this length until drop, and initialised (zero) by the kernel.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The bytes, to be changed.
    pub const fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    /// Where it starts, for reads that the kernel does on its own.
    pub(super) const fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for AlignedMemory {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made above; no borrow of it is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
