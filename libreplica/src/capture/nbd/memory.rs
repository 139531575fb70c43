//! Buffers of one connection, page-aligned and used again, and the limit on what all
//! connections of a server may hold together. Nothing is allocated in a steady state, and no
//! client can make the server take more than the limit and one request for each connection.
//!
//! Each buffer has a page before its data, so that a reply's header can stand right before
//! data that was read from the device, and both are sent as they are.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::sys::memory::AlignedMemory;
use crate::sys::uring::Part;

/// Bytes before a buffer's data.
pub const HEADROOM: usize = 4096;
/// The smallest buffer is of 2 to this power.
const SMALLEST: u32 = 12;
/// Sizes that are kept: up to 32 MiB.
const CLASSES: usize = 14;
/// Bytes that a connection keeps for later, at most.
const KEPT: usize = 8 << 20;
/// Bytes that a connection may hold without asking.
const OWN: u64 = 1 << 20;

/// What the connections of a server may hold together, each its own share besides.
#[derive(Debug)]
pub struct Allowance {
    limit: u64,
    used: AtomicU64,
}

impl Allowance {
    /// So many bytes.
    pub const fn new(limit: u64) -> Self {
        let used = AtomicU64::new(0);
        Self { limit, used }
    }

    fn take(&self, bytes: u64) -> bool {
        let room = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        let (set, fetch) = (Ordering::AcqRel, Ordering::Acquire);
        self.used.fetch_update(set, fetch, room).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// The buffers of one connection.
#[derive(Debug)]
pub struct Pool {
    free: [Vec<AlignedMemory>; CLASSES],
    /// Bytes in `free`.
    kept: usize,
    /// Bytes that are out, and which of them the allowance knows of.
    out: u64,
    charged: u64,
    allowance: Arc<Allowance>,
}

/// Which class of buffers `len` bytes need.
fn class_of(len: usize) -> usize {
    let power = len.max(1).next_power_of_two().trailing_zeros();
    (power.max(SMALLEST) - SMALLEST) as usize
}

const fn size_of_class(class: usize) -> usize {
    1 << (class as u32 + SMALLEST)
}

impl Pool {
    /// An empty one.
    pub fn new(allowance: &Arc<Allowance>) -> Self {
        Self {
            free: Default::default(),
            kept: 0,
            out: 0,
            charged: 0,
            allowance: Arc::clone(allowance),
        }
    }

    /// `len` bytes in a buffer, with whatever they hold; `None` while too many are out. If
    /// none are, there is one for any request.
    ///
    /// # Errors
    /// `ENOMEM`, if the system has none; `EINVAL` for more than any request has.
    pub fn take(&mut self, len: usize) -> io::Result<Option<Part>> {
        let class = class_of(len);
        if class >= CLASSES {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let size = size_of_class(class) as u64;
        let due = (self.out + size)
            .saturating_sub(OWN)
            .saturating_sub(self.charged);
        if due > 0 && self.allowance.take(due) {
            self.charged += due;
        } else if due > 0 && self.out > 0 {
            return Ok(None);
        }
        let buffer = match self.free[class].pop() {
            Some(buffer) => {
                self.kept -= size_of_class(class);
                buffer
            }
            None => AlignedMemory::new(HEADROOM + size_of_class(class)).inspect_err(|_| {
                self.settle();
            })?,
        };
        self.out += size;
        let range = HEADROOM..HEADROOM + len;
        Ok(Some(Part { buffer, range }))
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buffer: AlignedMemory) {
        let size = buffer.as_slice().len() - HEADROOM;
        self.out -= size as u64;
        self.settle();
        if self.kept + size <= KEPT {
            self.kept += size;
            self.free[class_of(size)].push(buffer);
        }
    }

    /// Gives back what the allowance knows of and is not needed.
    fn settle(&mut self) {
        let due = self.out.saturating_sub(OWN);
        if self.charged > due {
            self.allowance.give_back(self.charged - due);
            self.charged = due;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.allowance.give_back(self.charged);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_request_is_always_possible_and_no_more_than_the_limit_together() {
        let allowance = Arc::new(Allowance::new(8 << 20));
        let mut one = Pool::new(&allowance);
        let mut two = Pool::new(&allowance);
        let big = 32 << 20;
        let first = one.take(big).unwrap().unwrap();
        assert!(one.take(big).unwrap().is_none());
        // Its own share is used up by the first.
        assert!(one.take(16 << 20).unwrap().is_none());
        let second = two.take(big).unwrap().unwrap();
        one.give(first.buffer);
        let small: Vec<_> = (0..9)
            .map(|_| one.take(1 << 20).unwrap().unwrap())
            .collect();
        assert!(one.take(1 << 20).unwrap().is_none());
        small.into_iter().for_each(|part| one.give(part.buffer));
        two.give(second.buffer);
        assert_eq!(allowance.used.load(Ordering::Acquire), 0);
        assert!(one.take(big + 1).is_err());
    }

    #[test]
    fn buffers_are_used_again() {
        let allowance = Arc::new(Allowance::new(0));
        let mut pool = Pool::new(&allowance);
        let part = pool.take(4096).unwrap().unwrap();
        let start = part.bytes().as_ptr();
        assert_eq!(part.bytes().len(), 4096);
        pool.give(part.buffer);
        let again = pool.take(512).unwrap().unwrap();
        assert_eq!(again.bytes().as_ptr(), start);
        pool.give(again.buffer);
    }
}
