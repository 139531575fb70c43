//! Operations of many kinds through one io_uring, for a thread that serves a queue: reads
//! and writes of a device, a socket's bytes, another thread's wake-up, driver commands.
//!
//! An operation owns its memory while the kernel may touch it: a buffer is handed over with
//! the operation and comes back with its end. So nothing here can be called wrongly, and
//! nothing is copied.

mod entry;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::types::CancelBuilder;
use io_uring::{IoUring, squeue};

use self::entry::{Again, Held, again, entry, is_within, transfer, transfer_lent};
use crate::sys::memory::AlignedMemory;

/// A file, a device or a socket that operations go to, as [`Uring::add`] numbered it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(u32);

/// What the starter of an operation knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// When a write has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// When the device has it, perhaps in a volatile cache.
    #[default]
    Cached,
    /// When the device has it for good: force unit access, or a flush behind it.
    Durable,
}

/// A part of a buffer.
#[derive(Debug)]
pub struct Part {
    /// The buffer, whole.
    pub buffer: AlignedMemory,
    /// Which of its bytes take part.
    pub range: Range<usize>,
}

impl Part {
    /// All of `buffer`.
    pub fn whole(buffer: AlignedMemory) -> Self {
        let range = 0..buffer.as_slice().len();
        Self { buffer, range }
    }

    /// The first `len` bytes of `buffer`.
    pub const fn first(buffer: AlignedMemory, len: usize) -> Self {
        let range = 0..len;
        Self { buffer, range }
    }

    /// The bytes.
    ///
    /// # Panics
    /// If the range is not within the buffer.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer.as_slice()[self.range.clone()]
    }

    /// The bytes, to be changed.
    ///
    /// # Panics
    /// If the range is not within the buffer.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.as_mut_slice()[self.range.clone()]
    }
}

/// Memory that a driver lends the ring under this number, which is below the number that
/// [`Uring::make_room_for_lent`] was told: the pages of somebody's request. Nobody here sees
/// its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lent(pub u16);

/// A part of lent memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LentPart {
    /// Which memory.
    pub lent: Lent,
    /// The first byte of it that takes part.
    pub start: u32,
    /// How many do.
    pub len: u32,
}

/// An operation.
#[derive(Debug)]
pub enum Operation {
    /// Reads from byte `at` on.
    Read {
        /// Where to.
        to: Part,
        /// The first byte's offset.
        at: u64,
    },
    /// Writes from byte `at` on.
    Write {
        /// What.
        from: Part,
        /// The first byte's offset.
        at: u64,
        /// When it has ended.
        durability: Durability,
    },
    /// Reads from byte `at` on into lent memory; `EFAULT` if none is lent under that number, or
    /// less.
    ReadLent {
        /// Where to.
        to: LentPart,
        /// The first byte's offset.
        at: u64,
    },
    /// Writes lent memory from byte `at` on; errors as of [`Self::ReadLent`].
    WriteLent {
        /// What.
        from: LentPart,
        /// The first byte's offset.
        at: u64,
        /// When it has ended.
        durability: Durability,
    },
    /// Makes durable what was written: fdatasync(2), on a device a flush of its cache.
    Flush,
    /// Takes what a socket has, at least a byte; none at its end.
    Receive {
        /// Where to.
        to: Part,
    },
    /// Sends on a socket; ends when all is taken, or with fewer bytes and then an error.
    Send {
        /// What.
        from: Part,
    },
    /// Waits for another thread's [`Wake::wake`].
    Sleep,
    /// A driver's command of up to 16 bytes (io_uring_sqe.cmd), without memory.
    Command {
        /// Which (io_uring_sqe.cmd_op).
        code: u32,
        /// Its argument.
        bytes: [u8; 16],
        /// What it says besides (io_uring_sqe.addr): no address of memory.
        word: u64,
    },
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Ended {
    /// Which.
    pub token: Token,
    /// What the kernel said: mostly a number of bytes.
    pub result: io::Result<u32>,
    /// Its buffer.
    pub part: Option<Part>,
}

struct Slot {
    token: Token,
    held: Held,
    again: Option<Again>,
}

/// One ring and the operations in it. Used by one thread.
pub struct Uring {
    ring: IoUring,
    files: Vec<Option<Arc<OwnedFd>>>,
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    in_flight: u32,
    /// Of those, commands of a driver.
    commands: u32,
    /// Ended before they began.
    refused: VecDeque<Ended>,
}

impl Uring {
    /// A ring for `depth` operations at a time, to be used by the calling thread alone.
    ///
    /// # Errors
    /// Those of io_uring_setup(2): `ENOSYS` or `EPERM` where it is not allowed.
    pub fn new(depth: u32) -> io::Result<Self> {
        let depth = depth.next_power_of_two();
        // What completes is told when the thread asks (kernel 6.1), without interrupting it.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(depth)
            .or_else(|_| IoUring::new(depth))?;
        Ok(Self {
            ring,
            files: Vec::new(),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            in_flight: 0,
            commands: 0,
            refused: VecDeque::new(),
        })
    }

    /// Makes room for memory that drivers lend this ring, under numbers below `count`; once.
    ///
    /// # Errors
    /// Those of io_uring_register(2): `EINVAL` before kernel 5.19, or above 16384; `ENOMEM`.
    pub fn make_room_for_lent(&self, count: u16) -> io::Result<()> {
        let count = u32::from(count);
        self.ring.submitter().register_buffers_sparse(count)
    }

    /// Lets operations go to `file`, which stays open as long as the ring, or until
    /// [`Self::remove`].
    pub fn add(&mut self, file: Arc<OwnedFd>) -> Handle {
        let free = self.files.iter().position(Option::is_none);
        let at = free.unwrap_or(self.files.len());
        if at == self.files.len() {
            self.files.push(None);
        }
        self.files[at] = Some(file);
        Handle(at as u32)
    }

    /// Lets go of the file. Operations that are in flight on it end as they do.
    pub fn remove(&mut self, file: Handle) {
        if let Some(slot) = self.files.get_mut(file.0 as usize) {
            *slot = None;
        }
    }

    /// How many operations have not ended.
    pub const fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// How many more may be started.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Starts an operation. It is told to the kernel by the next [`Self::submit`]. One that
    /// cannot be started ends with an error: `EBUSY` if there is no room, `EBADF` for a
    /// handle that was removed, `EINVAL` for a part that is not within its buffer.
    pub fn start(&mut self, token: Token, file: Handle, operation: Operation) {
        let Some(Some(fd)) = self.files.get(file.0 as usize).map(Option::as_ref) else {
            return self.refuse(token, libc::EBADF, operation);
        };
        let fd = fd.as_raw_fd();
        if !is_within(&operation) {
            return self.refuse(token, libc::EINVAL, operation);
        }
        // As many entries as slots, but those not yet told to the kernel take both.
        let full = self.ring.submission().is_full();
        if full && self.submit(0).is_err() {
            return self.refuse(token, libc::EIO, operation);
        }
        let Some(index) = self.free.pop() else {
            return self.refuse(token, libc::EBUSY, operation);
        };
        let again = again(file, &operation);
        let (entry, held) = entry(fd, operation);
        let entry = entry.user_data(u64::from(index));
        self.commands += u32::from(matches!(held, Held::NothingForever));
        self.slots[index as usize] = Some(Slot { token, held, again });
        self.in_flight += 1;
        // SAFETY: the memory that the entry names is held in the slot until its end is
        // taken from the completion queue, or for ever (see `drop`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "there was room");
    }

    fn refuse(&mut self, token: Token, errno: i32, operation: Operation) {
        let part = match operation {
            Operation::Read { to: part, .. }
            | Operation::Write { from: part, .. }
            | Operation::Receive { to: part }
            | Operation::Send { from: part } => Some(part),
            Operation::ReadLent { .. }
            | Operation::WriteLent { .. }
            | Operation::Flush
            | Operation::Sleep
            | Operation::Command { .. } => None,
        };
        let result = Err(io::Error::from_raw_os_error(errno));
        self.refused.push_back(Ended {
            token,
            result,
            part,
        });
    }

    /// Tells the kernel what was started, and waits until at least `least` operations have
    /// ended that [`Self::ended`] has not yet returned.
    ///
    /// # Errors
    /// Those of io_uring_enter(2) that do not pass by themselves.
    pub fn submit(&mut self, least: usize) -> io::Result<()> {
        let least = least.saturating_sub(self.refused.len());
        loop {
            match self.ring.submit_and_wait(least) {
                Ok(_) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Ends wait to be taken, which makes room.
                    Some(libc::EAGAIN | libc::EBUSY) if !self.ring.completion().is_empty() => {
                        return Ok(());
                    }
                    Some(libc::EAGAIN | libc::EBUSY) => std::thread::yield_now(),
                    _ => return Err(error),
                },
            }
        }
    }

    /// The next operation that has ended; `None` if none has.
    pub fn ended(&mut self) -> Option<Ended> {
        if let Some(refused) = self.refused.pop_front() {
            return Some(refused);
        }
        let (index, slot, result) = loop {
            let entry = self.ring.completion().next()?;
            let index = entry.user_data();
            let slot = self.slots.get_mut(index as usize)?.take()?;
            let Some((slot, result)) = self.settle(index, slot, entry.result()) else {
                continue;
            };
            break (index, slot, result);
        };
        self.free.push(index as u32);
        self.in_flight -= 1;
        self.commands -= u32::from(matches!(slot.held, Held::NothingForever));
        let part = match slot.held {
            Held::Part(part) => Some(part),
            Held::Lent(_) | Held::Nothing | Held::NothingForever | Held::Count { .. } => None,
        };
        Some(Ended {
            token: slot.token,
            result: u32::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)),
            part,
        })
    }

    /// Starts anew what the kernel gave up because it would have had to wait; once, and so that
    /// it does. Returns what has ended indeed.
    fn settle(&mut self, index: u64, mut slot: Slot, result: i32) -> Option<(Slot, i32)> {
        let again = slot.again.take();
        let (Some(again), true) = (again, result == -libc::EAGAIN) else {
            return Some((slot, result));
        };
        let file = self.files.get(again.file.0 as usize);
        let Some(Some(file)) = file else {
            return Some((slot, result));
        };
        let entry = match &slot.held {
            Held::Part(part) => transfer(file.as_raw_fd(), part, again.at, again.way),
            Held::Lent(part) => transfer_lent(file.as_raw_fd(), *part, again.at, again.way),
            _ => return Some((slot, result)),
        };
        let entry = entry.flags(squeue::Flags::ASYNC).user_data(index);
        let full = self.ring.submission().is_full();
        if full && self.submit(0).is_err() {
            return Some((slot, result));
        }
        self.slots[index as usize] = Some(slot);
        // SAFETY: as in `start`.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        debug_assert!(pushed.is_ok(), "there was room");
        None
    }

    /// Tells the kernel what was started, ends early what can be ended so, and waits for all
    /// that needs memory. Commands do not, and end with the ring, by their driver's hand.
    ///
    /// # Errors
    /// Those of io_uring_enter(2).
    pub fn finish(&mut self) -> io::Result<()> {
        // What is only queued must reach the kernel, for its end to come.
        self.submit(0)?;
        let submitter = self.ring.submitter();
        let _ = submitter.register_sync_cancel(None, CancelBuilder::any());
        while self.in_flight > self.commands {
            self.submit(1)?;
            while self.ended().is_some() {}
        }
        Ok(())
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        if self.in_flight > 0 && self.finish().is_err() && self.in_flight > self.commands {
            // The kernel may still write to that memory.
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let in_flight = self.in_flight;
        f.debug_struct("Uring")
            .field("in_flight", &in_flight)
            .finish_non_exhaustive()
    }
}

/// Wakes a thread that has [`Operation::Sleep`] in its ring. Cheap to call in vain.
#[derive(Clone, Debug)]
pub struct Wake(Arc<OwnedFd>);

impl Wake {
    /// A new one.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        // SAFETY: makes a descriptor, touches no memory.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and owned by nobody else.
        let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
        Ok(Self(Arc::new(fd)))
    }

    /// What [`Operation::Sleep`] is started on.
    pub fn file(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.0)
    }

    /// Ends the thread's sleep, now or when it begins the next.
    pub fn wake(&self) {
        let one = 1_u64.to_ne_bytes();
        // A counter that is full wakes as well.
        let _ = nix::unistd::write(&*self.0, &one);
    }
}

/// A file for [`Uring::add`].
pub fn shared(file: File) -> Arc<OwnedFd> {
    Arc::new(file.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn next(uring: &mut Uring) -> Ended {
        loop {
            if let Some(ended) = uring.ended() {
                return ended;
            }
            uring.submit(1).unwrap();
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut uring = Uring::new(4).unwrap();
        let file = uring.add(shared(tempfile::tempfile().unwrap()));
        let mut buffer = AlignedMemory::new(8192).unwrap();
        buffer.as_mut_slice()[4096..].fill(7);
        let from = Part {
            buffer,
            range: 4096..8192,
        };
        let durability = Durability::Durable;
        let write = Operation::Write {
            from,
            at: 512,
            durability,
        };
        uring.start(Token(1), file, write);
        let ended = next(&mut uring);
        assert_eq!((ended.token, ended.result.unwrap()), (Token(1), 4096));
        uring.start(Token(2), file, Operation::Flush);
        assert_eq!(next(&mut uring).token, Token(2));
        let mut to = Part::whole(ended.part.unwrap().buffer);
        to.bytes_mut().fill(1);
        uring.start(Token(3), file, Operation::Read { to, at: 0 });
        let ended = next(&mut uring);
        assert_eq!(ended.result.unwrap(), 4608);
        let part = ended.part.unwrap();
        assert!(part.bytes()[..512].iter().all(|byte| *byte == 0));
        assert!(part.bytes()[512..4608].iter().all(|byte| *byte == 7));
        assert!(part.bytes()[4608..].iter().all(|byte| *byte == 1));
    }

    #[test]
    fn what_cannot_be_started_ends_with_its_buffer() {
        let mut uring = Uring::new(1).unwrap();
        let wake = Wake::new().unwrap();
        let sleep = uring.add(wake.file());
        let gone = uring.add(wake.file());
        uring.remove(gone);
        uring.start(Token(1), gone, Operation::Sleep);
        assert_eq!(
            next(&mut uring).result.unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
        let to = Part {
            buffer: AlignedMemory::new(10).unwrap(),
            range: 0..11,
        };
        uring.start(Token(2), sleep, Operation::Read { to, at: 0 });
        assert!(next(&mut uring).part.is_some());
        uring.start(Token(3), sleep, Operation::Sleep);
        uring.start(Token(4), sleep, Operation::Sleep);
        let refused = next(&mut uring);
        assert_eq!(refused.token, Token(4));
        assert_eq!(
            refused.result.unwrap_err().raw_os_error(),
            Some(libc::EBUSY)
        );
        wake.wake();
        assert_eq!(next(&mut uring).token, Token(3));
        assert_eq!(uring.in_flight(), 0);
    }

    #[test]
    fn a_ring_that_is_dropped_ends_what_would_never_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut uring = Uring::new(4).unwrap();
        let socket = uring.add(Arc::new(ours.into()));
        let whole = || Part::whole(AlignedMemory::new(4096).unwrap());
        uring.start(Token(1), socket, Operation::Send { from: whole() });
        assert_eq!(next(&mut uring).result.unwrap(), 4096);
        theirs.read_exact(&mut [0; 4096]).unwrap();
        theirs.write_all(&[9; 3]).unwrap();
        uring.start(Token(2), socket, Operation::Receive { to: whole() });
        let ended = next(&mut uring);
        assert_eq!(ended.result.unwrap(), 3);
        assert_eq!(ended.part.unwrap().bytes()[..4], [9, 9, 9, 0]);
        uring.start(Token(3), socket, Operation::Receive { to: whole() });
        uring.submit(0).unwrap();
        drop(uring);
        // The last holder of our end is gone with it.
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    }
}
