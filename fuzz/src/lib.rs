//! What the fuzz targets share: an allocator that holds the work to its bound, and the
//! repair of checksums, without which hardly a mutation would get past the first of them.

use std::alloc::System;

use cap::Cap;

pub mod resum;
pub mod story;

/// Memory that reading takes whatever the input: a few frames of at most a MiB each.
const CONSTANT: usize = 16 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Runs `work`, which may hold as much memory as the input has bytes, plus a constant. One
/// byte more ends the process.
pub fn bounded<T>(input_len: usize, work: impl FnOnce() -> T) -> T {
    let limit = ALLOCATOR.allocated() + input_len + CONSTANT;
    ALLOCATOR.set_limit(limit).expect("less is allocated now");
    let done = work();
    ALLOCATOR.set_limit(usize::MAX).expect("any amount is less");
    done
}

/// The file in an input: all but its first byte. If that byte is odd, the file's checksums
/// are made right by `resum`, so that what lies behind them is reached.
pub fn file(input: &[u8], resum: fn(&mut [u8])) -> Vec<u8> {
    let Some((first, file)) = input.split_first() else {
        return Vec::new();
    };
    let mut file = file.to_vec();
    if first % 2 == 1 {
        resum(&mut file);
    }
    file
}
