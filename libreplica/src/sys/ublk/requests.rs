//! A queue's requests: the memory in which the driver describes them, and the commands by
//! which the queue's thread takes them and says how they ended. Each of a queue's tags is
//! at any time the driver's (a fetch or a commit with fetch is in the ring) or ours (it has
//! ended with a request, until we commit).

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use zerocopy::IntoBytes;

use crate::sys::ublk::abi::{self, IoCommand, IoDescriptor};
use crate::sys::uring::{Durability, Lent, Operation};
use crate::units::{ByteLen, ByteOffset, Extent};

/// `UBLK_MAX_QUEUE_DEPTH`.
pub(super) const DEPTH_MAX: u16 = 4096;
/// `UBLKSRV_IO_BUF_OFFSET`.
const DATA: u64 = 0x8000_0000;
/// `UBLK_TAG_OFF`.
const TAG_SHIFT: u32 = 25;
/// `UBLK_QID_OFF`.
const QUEUE_SHIFT: u32 = 41;
const SECTOR: u64 = 512;
/// `UBLK_IO_F_FUA`.
const FORCED: u32 = 1 << 13;
/// `UBLK_IO_F_NOUNMAP`.
const KEEP: u32 = 1 << 15;
/// `UBLK_IO_F_NEED_REG_BUF`.
const NOT_LENT: u32 = 1 << 17;
/// `UBLK_AUTO_BUF_REG_FALLBACK`, where `struct ublk_auto_buf_reg` has its flags.
const OR_NOT_LENT: u64 = 1 << 16;

/// A queue of a device, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueueNumber(pub u16);

/// A place for a request in a queue, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(pub u16);

/// What a request asks for (`UBLK_IO_OP_*` with its flags).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To be read.
    Read,
    /// To be written.
    Write(Durability),
    /// Make durable what has ended.
    Flush,
    /// Give the range up.
    Discard,
    /// Write zeroes.
    Zeroes {
        /// The range is to stay allocated.
        keep: bool,
        /// When it has ended.
        durability: Durability,
    },
    /// What a device with our features is never asked for.
    Unknown(u8),
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoRequest {
    /// What.
    pub action: Action,
    /// Where; empty for a flush.
    pub extent: Extent,
    /// Whether its pages are lent to the ring, if they were to be.
    pub pages: Pages,
}

/// What becomes of a request's pages while it is ours, on a device that was granted
/// [`Features::AUTO_BUF_REG`](super::Features::AUTO_BUF_REG).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// They are lent to the ring, under the number of the tag.
    Lent,
    /// The ring could not take them.
    Kept,
}

impl Tag {
    /// Under which number the pages of this tag's requests are lent to the ring of its queue.
    pub const fn lent(self) -> Lent {
        Lent(self.0)
    }
}

impl IoRequest {
    fn decode(descriptor: IoDescriptor) -> Self {
        let flags = descriptor.op_flags & !0xff;
        let durability = if flags & FORCED == 0 {
            Durability::Cached
        } else {
            Durability::Durable
        };
        let action = match (descriptor.op_flags & 0xff) as u8 {
            0 => Action::Read,
            1 => Action::Write(durability),
            2 => Action::Flush,
            3 => Action::Discard,
            5 => Action::Zeroes {
                keep: flags & KEEP != 0,
                durability,
            },
            other => Action::Unknown(other),
        };
        let start = ByteOffset::new(descriptor.start_sector.saturating_mul(SECTOR));
        let len = ByteLen::new(u64::from(descriptor.nr_sectors) * SECTOR);
        let extent = match action {
            Action::Flush => Extent::default(),
            _ => Extent::new(start, len).unwrap_or_default(),
        };
        let pages = if flags & NOT_LENT == 0 {
            Pages::Lent
        } else {
            Pages::Kept
        };
        Self {
            action,
            extent,
            pages,
        }
    }
}

/// The descriptors of a queue's requests, which the driver writes.
#[derive(Debug)]
pub struct Requests {
    start: NonNull<IoDescriptor>,
    depth: u16,
    bytes: usize,
}

// SAFETY: a mapping that is only read, and lives as long as this value.
unsafe impl Send for Requests {}

impl Requests {
    /// Those of `queue` of the device behind `file` (/dev/ublkcN), whose queues have `depth`
    /// tags. The mapping holds the file open.
    ///
    /// # Errors
    /// Those of mmap(2): `EINVAL` if another process has mapped them since the device was
    /// made or its recovery began.
    pub fn map(file: &File, queue: QueueNumber, depth: u16) -> io::Result<Self> {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
        let size_of = |depth: u16| {
            (usize::from(depth) * size_of::<IoDescriptor>()).next_multiple_of(page as usize)
        };
        // The driver leaves room for the deepest queue before the next one's.
        let offset = usize::from(queue.0) * size_of(DEPTH_MAX);
        let bytes = size_of(depth);
        let len = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_SHARED;
        let offset = offset as libc::off_t;
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours.
        let start = unsafe { mmap(None, len, ProtFlags::PROT_READ, flags, file.as_fd(), offset) }?;
        Ok(Self {
            start: start.cast(),
            depth,
            bytes,
        })
    }

    /// The request that a fetch of this tag has ended with. Of no meaning, but safe to ask
    /// for, while the tag is the driver's.
    pub fn get(&self, tag: Tag) -> Option<IoRequest> {
        if tag.0 >= self.depth {
            return None;
        }
        // SAFETY: within the mapping, which has `depth` descriptors.
        let at = unsafe { self.start.add(usize::from(tag.0)) };
        // SAFETY: mapped, aligned, and any bytes are a descriptor; the driver wrote it before
        // the fetch ended, and does so again only after the commit. Volatile, for in between
        // others' bytes are not ours to assume.
        let descriptor = unsafe { at.read_volatile() };
        Some(IoRequest::decode(descriptor))
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made above; nothing borrows from it.
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}

/// Takes the first request of a tag: ends with 0 when there is one, with `ENODEV` when the
/// device is being stopped or recovered. Once for each tag of a queue, by the thread that
/// will serve it (`UBLK_U_IO_FETCH_REQ`). Where the driver lends pages it lends this ring those
/// of the request, if the ring has room for them.
pub fn fetch(queue: QueueNumber, tag: Tag) -> Operation {
    command(abi::io::FETCH_REQ, queue, tag, 0)
}

/// Says how a tag's request has ended, and takes the next one: `Ok` with the bytes that were
/// read or written, 0 for anything else; or an error's number
/// (`UBLK_U_IO_COMMIT_AND_FETCH_REQ`).
pub fn commit(queue: QueueNumber, tag: Tag, result: Result<u32, i32>) -> Operation {
    let result = match result {
        Ok(bytes) => i32::try_from(bytes).unwrap_or(i32::MAX),
        Err(errno) => -errno.saturating_abs().max(1),
    };
    command(abi::io::COMMIT_AND_FETCH_REQ, queue, tag, result)
}

/// How far a queue is that nobody serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remains {
    /// A thread that has ended served it: a recovery can begin.
    Served,
    /// A recovery has begun, and no request was fetched.
    Bare,
    /// A recovery has begun, and whoever fetched requests has ended before all were.
    Broken,
}

/// Asks how far the first tag of a queue is, and changes nothing: a command that is none of
/// the driver's, which tells by the error that it ends with ([`Remains::of`]). For drivers
/// without [`Features::PER_IO_DAEMON`](super::Features::PER_IO_DAEMON): the order of their
/// checks is that of `__ublk_ch_uring_cmd`, kernel 6.12.
pub fn inspect(queue: QueueNumber) -> Operation {
    command(abi::io::FOREIGN, queue, Tag(0), 0)
}

impl Remains {
    /// What the end of [`inspect`] tells; `None` for what it cannot end with.
    pub fn of(ended: &io::Result<u32>) -> Option<Self> {
        match ended.as_ref().err()?.raw_os_error()? {
            libc::EINVAL => Some(Self::Served),
            libc::EOPNOTSUPP => Some(Self::Bare),
            libc::EBUSY => Some(Self::Broken),
            _ => None,
        }
    }
}

fn command(code: u32, queue: QueueNumber, tag: Tag, result: i32) -> Operation {
    let command = IoCommand {
        q_id: queue.0,
        tag: tag.0,
        result,
        addr: 0,
    };
    let mut bytes = [0; 16];
    bytes.copy_from_slice(command.as_bytes());
    // `struct ublk_auto_buf_reg`; other devices' drivers do not look at it.
    let word = u64::from(tag.lent().0) | OR_NOT_LENT;
    Operation::Command { code, bytes, word }
}

/// Where in /dev/ublkcN the data of a tag's request begins: reads there give what is to be
/// written, writes there are what was read.
pub const fn data_offset(queue: QueueNumber, tag: Tag) -> u64 {
    DATA + ((tag.0 as u64) << TAG_SHIFT) + ((queue.0 as u64) << QUEUE_SHIFT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(op_flags: u32, nr_sectors: u32, start_sector: u64) -> IoRequest {
        IoRequest::decode(IoDescriptor {
            op_flags,
            nr_sectors,
            start_sector,
            addr: 0,
        })
    }

    #[test]
    fn requests_are_decoded() {
        let read = decode(0, 8, 16);
        assert_eq!(read.action, Action::Read);
        assert_eq!(read.extent.offset(), ByteOffset::new(8192));
        assert_eq!(read.extent.len(), ByteLen::new(4096));
        let cached = Action::Write(Durability::Cached);
        // Hints (FAILFAST_*, META, SWAP) say nothing about what is to be done.
        assert_eq!(decode(1 | 7 << 8 | 1 << 11 | 1 << 16, 1, 0).action, cached);
        let forced = Action::Write(Durability::Durable);
        assert_eq!(decode(1 | FORCED, 1, 0).action, forced);
        let flush = decode(2, 0, u64::MAX);
        assert_eq!(flush.action, Action::Flush);
        assert_eq!(flush.extent, Extent::default());
        assert_eq!(decode(3, 1, 0).action, Action::Discard);
        let keep = Action::Zeroes {
            keep: true,
            durability: Durability::Durable,
        };
        assert_eq!(decode(5 | KEEP | FORCED, 1, 0).action, keep);
        assert_eq!(decode(4, 1, 0).action, Action::Unknown(4));
        assert_eq!(decode(1, 1, 0).pages, Pages::Lent);
        assert_eq!(decode(1 | NOT_LENT, 1, 0).pages, Pages::Kept);
        // What cannot be is empty, and will be refused.
        assert_eq!(decode(0, 1, u64::MAX / 2).extent, Extent::default());
    }

    #[test]
    fn results_are_what_the_driver_expects() {
        let result = |result| match commit(QueueNumber(1), Tag(2), result) {
            Operation::Command { bytes, .. } => bytes,
            other => panic!("{other:?}"),
        };
        assert_eq!(result(Ok(4096))[..8], [1, 0, 2, 0, 0, 16, 0, 0]);
        assert_eq!(result(Err(5))[4..8], (-5_i32).to_ne_bytes());
        assert_eq!(result(Err(-5))[4..8], (-5_i32).to_ne_bytes());
        assert_eq!(result(Ok(0))[8..], [0; 8]);
        let Operation::Command { word, .. } = fetch(QueueNumber(1), Tag(0x102)) else {
            panic!("not a command")
        };
        // index, flags and two fields that are zero, as `struct ublk_auto_buf_reg` has them.
        assert_eq!(word.to_le_bytes(), [2, 1, 1, 0, 0, 0, 0, 0]);
        assert_eq!(data_offset(QueueNumber(0), Tag(0)), 0x8000_0000);
        let far = data_offset(QueueNumber(3), Tag(127));
        assert_eq!((far - DATA) >> 41, 3);
        assert_eq!((far - DATA) >> 25 & 0xffff, 127);
    }
}
