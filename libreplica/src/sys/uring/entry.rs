//! What the kernel is told of an operation, and what has to be kept until its end.

use std::ops::Range;
use std::os::fd::RawFd;

use io_uring::types::Fd;
use io_uring::{opcode, squeue};

use super::{Durability, Handle, LentPart, Operation, Part};

/// What the kernel may touch until the operation has ended.
pub(super) enum Held {
    Nothing,
    /// Nothing, and it ends when a driver says so: perhaps never.
    NothingForever,
    Part(Part),
    /// What a driver has lent, and holds itself.
    Lent(LentPart),
    /// What an eventfd counts.
    Count {
        _to: Box<u64>,
    },
}

/// How to start a read or a write anew.
///
/// The kernel asks devices not to wait for room in their queues, and starts what cannot be done
/// so from a thread of its own. But where a device is made of others (dm, md), and the one part
/// of a request was refused so and the other was not, that goes wrong: it ends with `EAGAIN`
/// (`io_rw_should_reissue` in io_uring/rw.c: not from the thread that started it).
#[derive(Clone, Copy)]
pub(super) struct Again {
    pub file: Handle,
    pub at: u64,
    pub way: Way,
}

/// Which of the two.
#[derive(Clone, Copy)]
pub(super) enum Way {
    Read,
    Write(Durability),
}

/// Whether the memory of an operation is there.
pub(super) fn is_within(operation: &Operation) -> bool {
    match operation {
        Operation::Read { to: part, .. }
        | Operation::Write { from: part, .. }
        | Operation::Receive { to: part }
        | Operation::Send { from: part } => {
            let Range { start, end } = part.range;
            start <= end && end <= part.buffer.as_slice().len() && end - start <= i32::MAX as usize
        }
        // The kernel knows what was lent.
        Operation::ReadLent { .. } | Operation::WriteLent { .. } => true,
        Operation::Flush | Operation::Sleep | Operation::Command { .. } => true,
    }
}

/// Where a part lies, and how long it is.
fn at_part(part: &Part) -> (*mut u8, u32) {
    // Within the buffer, as `is_within` has seen.
    let start = part.buffer.start().as_ptr().wrapping_add(part.range.start);
    (start, (part.range.end - part.range.start) as u32)
}

/// How to start an operation anew, if it is one that may have to be.
pub(super) const fn again(file: Handle, operation: &Operation) -> Option<Again> {
    let (at, way) = match *operation {
        Operation::Read { at, .. } | Operation::ReadLent { at, .. } => (at, Way::Read),
        Operation::Write { at, durability, .. } | Operation::WriteLent { at, durability, .. } => {
            (at, Way::Write(durability))
        }
        _ => return None,
    };
    Some(Again { file, at, way })
}

/// The kernel's entry for a read or a write.
pub(super) fn transfer(fd: RawFd, part: &Part, at: u64, way: Way) -> squeue::Entry {
    let (start, len) = at_part(part);
    match way {
        Way::Read => opcode::Read::new(Fd(fd), start, len).offset(at).build(),
        Way::Write(durability) => {
            let write = opcode::Write::new(Fd(fd), start, len).offset(at);
            write.rw_flags(flags_of(durability)).build()
        }
    }
}

/// The kernel's entry for a read into, or a write from, lent memory: it has no address, but
/// begins at zero.
pub(super) fn transfer_lent(fd: RawFd, part: LentPart, at: u64, way: Way) -> squeue::Entry {
    let (number, len) = (part.lent.0, part.len);
    let start = part.start as usize;
    match way {
        Way::Read => {
            let read = opcode::ReadFixed::new(Fd(fd), start as *mut u8, len, number);
            read.offset(at).build()
        }
        Way::Write(durability) => {
            let write = opcode::WriteFixed::new(Fd(fd), start as *const u8, len, number);
            write.offset(at).rw_flags(flags_of(durability)).build()
        }
    }
}

const fn flags_of(durability: Durability) -> i32 {
    match durability {
        Durability::Cached => 0,
        Durability::Durable => libc::RWF_DSYNC,
    }
}

/// The kernel's entry for an operation, and what has to be held until its end.
pub(super) fn entry(fd: RawFd, operation: Operation) -> (squeue::Entry, Held) {
    match operation {
        Operation::Read { to, at } => (transfer(fd, &to, at, Way::Read), Held::Part(to)),
        Operation::Write {
            from,
            at,
            durability,
        } => {
            let entry = transfer(fd, &from, at, Way::Write(durability));
            (entry, Held::Part(from))
        }
        Operation::ReadLent { to, at } => (transfer_lent(fd, to, at, Way::Read), Held::Lent(to)),
        Operation::WriteLent {
            from,
            at,
            durability,
        } => {
            let entry = transfer_lent(fd, from, at, Way::Write(durability));
            (entry, Held::Lent(from))
        }
        Operation::Flush => {
            let flush = opcode::Fsync::new(Fd(fd)).flags(io_uring::types::FsyncFlags::DATASYNC);
            (flush.build(), Held::Nothing)
        }
        Operation::Receive { to } => {
            let (start, len) = at_part(&to);
            (
                opcode::Recv::new(Fd(fd), start, len).build(),
                Held::Part(to),
            )
        }
        Operation::Send { from } => {
            let (start, len) = at_part(&from);
            let send =
                opcode::Send::new(Fd(fd), start, len).flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL);
            (send.build(), Held::Part(from))
        }
        Operation::Sleep => {
            let mut count = Box::new(0_u64);
            let to = std::ptr::from_mut(count.as_mut()).cast();
            (
                opcode::Read::new(Fd(fd), to, 8).build(),
                Held::Count { _to: count },
            )
        }
        Operation::Command { code, bytes, word } => {
            let command = opcode::UringCmd16::new(Fd(fd), code).cmd(bytes);
            let command = command.addr(Some(word));
            (command.build(), Held::NothingForever)
        }
    }
}
