//! Memory for the data of a queue's requests: page-aligned, in sizes of powers of two, used
//! again, so that nothing is allocated in a steady state. How many there can be is limited by
//! the queue's depth; what is kept while they are not used, here.

use std::io;

use crate::sys::memory::AlignedMemory;
use crate::sys::uring::Part;

/// The smallest is of 2 to this power.
const SMALLEST: u32 = 12;
/// Bytes that a queue keeps for later.
const KEPT_MAX: usize = 8 << 20;

/// The buffers of one queue.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// By size, the smallest first.
    free: Vec<Vec<AlignedMemory>>,
    kept: usize,
}

fn class_of(len: usize) -> usize {
    let power = len.max(1).next_power_of_two().trailing_zeros();
    (power.max(SMALLEST) - SMALLEST) as usize
}

impl Buffers {
    /// `len` bytes, with whatever they hold.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn take(&mut self, len: usize) -> io::Result<Part> {
        let class = class_of(len);
        let free = self.free.get_mut(class).and_then(Vec::pop);
        let buffer = match free {
            Some(buffer) => {
                self.kept -= buffer.as_slice().len();
                buffer
            }
            None => AlignedMemory::new(1 << (class as u32 + SMALLEST))?,
        };
        Ok(Part::first(buffer, len))
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buffer: AlignedMemory) {
        let size = buffer.as_slice().len();
        if self.kept + size > KEPT_MAX {
            return;
        }
        let class = class_of(size);
        if self.free.len() <= class {
            self.free.resize_with(class + 1, Vec::new);
        }
        self.kept += size;
        self.free[class].push(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_and_few_are_kept() {
        let mut buffers = Buffers::default();
        let part = buffers.take(3000).unwrap();
        assert_eq!(part.bytes().len(), 3000);
        let start = part.bytes().as_ptr();
        buffers.give(part.buffer);
        let again = buffers.take(4096).unwrap();
        assert_eq!(again.bytes().as_ptr(), start);
        assert_eq!(buffers.kept, 0);
        let big: Vec<_> = (0..20).map(|_| buffers.take(1 << 20).unwrap()).collect();
        big.into_iter().for_each(|part| buffers.give(part.buffer));
        assert_eq!(buffers.kept, KEPT_MAX);
    }
}
