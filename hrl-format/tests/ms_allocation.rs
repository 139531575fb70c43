//! Reading an [MS-HRL] file never takes more memory than the file has bytes, plus a
//! constant: measured at the allocator, for logs whose every length field lies. One test
//! only, so that no other thread allocates meanwhile.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::env;
use std::io::Cursor;
use std::sync::atomic::{AtomicUsize, Ordering};

use hrl_format::ms::{self, Reader, Writer, WriterOptions};
use hrl_format::units::{ByteOffset, Timestamp};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// The reader's buffers, whatever the input.
const CONSTANT: usize = 512 << 10;

/// Counts what is allocated, and the most that ever was.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer came from `alloc` above, and so from the system's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn most_allocated_in(work: impl FnOnce()) -> usize {
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    work();
    MOST.load(Ordering::Relaxed) - before
}

fn read(file: &[u8]) -> Result<(), ms::Error> {
    let mut reader = Reader::open(Cursor::new(file))?;
    let mut buffer = [0; 4096];
    while let Some(write) = reader.next_write()? {
        let mut data = reader.data(&write)?;
        while data.read(&mut buffer)? > 0 {}
    }
    Ok(())
}

/// Sums a structure again, so that a field changed in it is believed.
fn resum(file: &mut [u8], start: usize, field: usize, len: usize) {
    let (before, behind) = (start..start + field, start + field + 4..start + len);
    let sum = ms::checksum(&[&file[before], &file[behind]]);
    file[start + field..start + field + 4].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn lying_lengths_allocate_no_more_than_the_input_has() {
    let cases = env::var("REPLICA_CASES").ok().and_then(|n| n.parse().ok());
    let mut runner = TestRunner::new(ProptestConfig::with_cases(cases.unwrap_or(64)));
    let word = prop_oneof![any::<u32>(), 0..200_u32, Just(512), Just(u32::MAX)];
    let fields = (0..300_usize, word.clone(), word.clone(), word);
    let result = runner.run(&fields, |(writes, metadata_size, entries, len)| {
        let options = WriterOptions::default();
        let mut writer = Writer::create(Cursor::new(Vec::new()), &options).unwrap();
        for n in 0..writes {
            let offset = ByteOffset::new(n as u64 * 512);
            writer
                .write(offset, &[1; 512], Timestamp::from_nanos(0))
                .unwrap();
        }
        let honest = writer.finish().unwrap().into_inner();

        let mut header = honest.clone();
        header[56..60].copy_from_slice(&metadata_size.to_le_bytes());
        resum(&mut header, 0, 40, 4096);

        let last = honest.len() - 4096;
        let mut count = honest.clone();
        count[last + 8..last + 12].copy_from_slice(&entries.to_le_bytes());
        resum(&mut count, last, 12, 32);

        let mut length = honest.clone();
        length[last + 32 + 12..last + 32 + 16].copy_from_slice(&len.to_le_bytes());
        resum(&mut length, last + 32, 8, 32);

        for file in [honest, header, count, length] {
            let most = most_allocated_in(|| {
                let _ = read(&file);
                let _ = ms::check(Cursor::new(&file));
            });
            prop_assert!(
                most <= file.len() + CONSTANT,
                "{most} for {} bytes",
                file.len()
            );
        }
        Ok(())
    });
    result.unwrap();
}
