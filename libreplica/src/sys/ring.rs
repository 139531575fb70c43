//! Reads of one file, many in flight: an io_uring, or plain pread(2) one by one where the
//! kernel or its administrator does not allow io_uring. Knows no order and no buffers; see
//! `reader.rs` for both.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use io_uring::{IoUring, opcode, types};

/// Which read has ended: whatever number its start gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token(pub u64);

enum Engine {
    Uring(Box<IoUring>),
    /// Results of reads that were done at once.
    Plain(VecDeque<(Token, i32)>),
}

/// Where a read goes and where it comes from.
#[derive(Clone, Copy)]
pub(super) struct Read {
    pub to: NonNull<u8>,
    pub len: u32,
    pub offset: u64,
}

pub(super) struct Ring {
    file: File,
    engine: Engine,
    /// Started and not yet returned by `wait`.
    in_flight: u32,
    /// Of those, not yet told to the kernel.
    unsubmitted: u32,
    depth: u32,
}

impl Ring {
    /// A ring for at most `depth` reads of `file` at a time.
    pub(super) fn new(file: File, depth: u32) -> io::Result<Self> {
        let engine = match IoUring::new(depth) {
            Ok(ring) => Engine::Uring(Box::new(ring)),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::ENOMEM) => {
                    Engine::Plain(VecDeque::new())
                }
                _ => return Err(error),
            },
        };
        Ok(Self {
            file,
            engine,
            in_flight: 0,
            unsubmitted: 0,
            depth,
        })
    }

    /// Makes the reads go one by one, without io_uring.
    pub(super) fn without_uring(&mut self) {
        debug_assert_eq!(self.in_flight, 0);
        self.engine = Engine::Plain(VecDeque::new());
    }

    /// Starts a read.
    ///
    /// # Safety
    /// `read.to` must be valid for writes of `read.len` bytes, and nobody else may touch
    /// them, until `wait` has returned `token`, or `drain` or drop have returned.
    pub(super) unsafe fn start(&mut self, token: Token, read: Read) -> io::Result<()> {
        debug_assert!(self.in_flight < self.depth);
        match &mut self.engine {
            Engine::Uring(ring) => {
                let fd = types::Fd(self.file.as_raw_fd());
                let entry = opcode::Read::new(fd, read.to.as_ptr(), read.len)
                    .offset(read.offset)
                    .build()
                    .user_data(token.0);
                // SAFETY: the caller's promise keeps the memory valid; `self.file` stays
                // open as long as the ring.
                unsafe { ring.submission().push(&entry) }
                    .map_err(|_| io::Error::from(io::ErrorKind::WouldBlock))?;
                self.unsubmitted += 1;
            }
            Engine::Plain(done) => {
                let fd = self.file.as_raw_fd();
                let at = read.offset as libc::off_t;
                // SAFETY: the caller's promise; the call returns before we do.
                let result =
                    unsafe { libc::pread(fd, read.to.as_ptr().cast(), read.len as usize, at) };
                let errno = || {
                    io::Error::last_os_error()
                        .raw_os_error()
                        .unwrap_or(libc::EIO)
                };
                done.push_back((token, if result < 0 { -errno() } else { result as i32 }));
            }
        }
        self.in_flight += 1;
        Ok(())
    }

    pub(super) const fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// How many were started that the kernel does not know of.
    pub(super) const fn unsubmitted(&self) -> u32 {
        self.unsubmitted
    }

    /// Tells the kernel what was started, and waits for `least` ends.
    pub(super) fn submit(&mut self, least: usize) -> io::Result<()> {
        let Engine::Uring(ring) = &mut self.engine else {
            return Ok(());
        };
        loop {
            match ring.submit_and_wait(least) {
                Ok(taken) => {
                    self.unsubmitted = self.unsubmitted.saturating_sub(taken as u32);
                    return Ok(());
                }
                // Interrupted, or short of memory for a moment with reads still to end.
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    Some(libc::EAGAIN | libc::EBUSY) if self.in_flight > self.unsubmitted => {
                        return Ok(());
                    }
                    Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => return Err(error),
                },
            }
        }
    }

    /// The next read that has ended, with the bytes read or the negative errno; `None` if
    /// nothing has yet.
    pub(super) fn ended(&mut self) -> Option<(Token, i32)> {
        let end = match &mut self.engine {
            Engine::Uring(ring) => {
                let entry = ring.completion().next()?;
                (Token(entry.user_data()), entry.result())
            }
            Engine::Plain(done) => done.pop_front()?,
        };
        self.in_flight -= 1;
        Some(end)
    }

    /// Waits for the next read to end. There must be one in flight.
    pub(super) fn wait(&mut self) -> io::Result<(Token, i32)> {
        loop {
            if let Some(end) = self.ended() {
                return Ok(end);
            }
            self.submit(1)?;
        }
    }

    /// Waits until nothing is in flight; whatever it was is thrown away.
    pub(super) fn drain(&mut self) {
        while self.in_flight > 0 {
            if self.wait().is_err() {
                // The ring itself is broken. The kernel holds the pages it still writes to
                // on its own, so that giving the memory back is sound.
                break;
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
    }
}
