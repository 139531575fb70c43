//! No input panics, and none makes a reader take more memory than the input has bytes, plus
//! a constant; nor a salvage or a merge more than three times that. Noise, logs with fields
//! that lie, and logs whose checksums were made to agree with the lie. Measured at the
//! allocator; so one test only, that no other thread allocates meanwhile.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Flavour, cases, chain, forge, header, records, write_log};
use hrl_format::id::PointId;
use hrl_format::layout::PAGE;
use hrl_format::record::{Consistency, Record, Tag};
use hrl_format::units::{ByteLen, VolumeSize};
use hrl_format::{
    FrameBuffer, Gather, Log, LogHeader, LogWriter, Overlay, Result, Scanner, VolumeKey, check,
    merge, salvage,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

/// The buffers for one frame in its three states, for one batch of a gather, and a page
/// here and there.
const CONSTANT: usize = 6 << 20;

/// The data of one batch of a merge, and what it is gathered by.
const BATCH: usize = 48 << 20;

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

fn scan(file: &[u8], key: Option<&VolumeKey>) -> Result<()> {
    let mut scanner = Scanner::new(file, key)?;
    while scanner.next_record()?.is_some() {}
    Ok(())
}

fn read(file: &[u8], key: Option<&VolumeKey>) -> Result<()> {
    let log = Log::open(file, key)?;
    let _ = log.tags().try_for_each(|tag| tag.map(|_| ()));
    let _ = log
        .index_in(common::extent(70_000, 1000))
        .map(Iterator::count);
    let mut frame = FrameBuffer::new();
    for (n, entry) in log.index().enumerate() {
        let entry = entry?;
        if n < 1000 && log.read_frame(entry.frame, &mut frame).is_ok() {
            let _ = frame.slice(entry.at, entry.extent.len());
        }
    }
    let overlay = Overlay::new([log.index(), log.index()], VolumeSize::new(common::VOLUME));
    let logs = [&log, &log];
    let mut gather = Gather::new(&logs, overlay, ByteLen::new(1 << 20));
    while gather.next_batch()?.is_some() {}
    Ok(())
}

fn read_in_all_ways(
    file: &[u8],
    key: Option<&VolumeKey>,
) -> std::result::Result<(), TestCaseError> {
    let most = most_allocated_in(|| {
        for key in [key, None] {
            let _ = scan(file, key);
            let _ = read(file, key);
            let _ = check(file, key);
        }
    });
    prop_assert!(
        most <= file.len() + CONSTANT,
        "{most} for {} bytes",
        file.len()
    );
    // These write a log, and hold its index until it is sealed: that is not bounded by what
    // the input says of it, but by the entries it can have.
    let most = most_allocated_in(|| {
        for key in [key, None] {
            let _ = salvage(file, std::io::sink(), key);
        }
    });
    prop_assert!(
        most <= 3 * file.len() + CONSTANT,
        "{most} for {} bytes salvaged",
        file.len()
    );
    let most = most_allocated_in(|| {
        for key in [key, None] {
            let _ = Log::open(file, key)
                .and_then(|log| merge(&[log], std::io::sink(), &Flavour::Plain.options()));
        }
    });
    prop_assert!(
        most <= 3 * file.len() + CONSTANT + BATCH,
        "{most} for {} bytes merged",
        file.len()
    );
    Ok(())
}

/// A log whose frames were moved from others, so that it has provenance.
fn moved(logs: &[Vec<u8>]) -> Vec<u8> {
    let keyless: Vec<_> = logs
        .iter()
        .map(|log| Log::open(log, None).unwrap())
        .collect();
    let options = Flavour::Plain.options();
    merge(&keyless, Vec::new(), &options).unwrap().0
}

/// Many records in full frames, no two of which meet: the densest a log can be, and the most
/// that can be remembered of it.
fn dense(flavour: Flavour) -> Vec<u8> {
    let (options, key) = (flavour.options(), flavour.key());
    let header = LogHeader {
        volume_size: VolumeSize::new(1 << 40),
        ..header()
    };
    let mut writer = LogWriter::create(Vec::new(), header, &options, key.as_ref()).unwrap();
    for n in 0..200_000 {
        // Odd numbers reach every multiple of 512 once before any a second time.
        let extent = common::extent((n * 104_729 * 512) % (1 << 40), 1 + n % 500);
        let record = match n % 2 {
            0 => Record::Zeroes { extent },
            _ => Record::Discard { extent },
        };
        writer.append(&record, Default::default()).unwrap();
    }
    writer.seal().unwrap().0
}

/// Points whose labels say the same, which takes hardly any place if compressed.
fn points(flavour: Flavour) -> Vec<u8> {
    let (options, key) = (flavour.options(), flavour.key());
    let mut writer = LogWriter::create(Vec::new(), header(), &options, key.as_ref()).unwrap();
    for n in 0..100_000u128 {
        let tag = Tag {
            id: PointId::from_bytes(n.to_le_bytes()),
            time: Default::default(),
            consistency: Consistency::Crash,
            label: "a".repeat(200),
            group: None,
            root: None,
        };
        writer
            .append(&Record::Tag(tag), Default::default())
            .unwrap();
    }
    writer.seal().unwrap().0
}

#[test]
fn no_input_panics_or_takes_more_memory_than_it_has_bytes() {
    let mut runner = TestRunner::new(cases());
    runner
        .run(&prop::collection::vec(any::<u8>(), 0..3 * PAGE), |noise| {
            read_in_all_ways(&noise, None)
        })
        .unwrap();
    let told = (
        records(40),
        common::flavour(),
        prop::collection::vec(common::lie(), 0..4),
        0..4u8,
    );
    runner
        .run(&told, |(records, flavour, lies, way)| {
            let key = flavour.key();
            let mut file = if way % 2 == 0 {
                write_log(header(), &records, flavour).0
            } else {
                let logs = chain(&records, &[records.len() / 2], flavour);
                moved(&logs.into_iter().map(Log::into_source).collect::<Vec<_>>())
            };
            lies.iter().for_each(|lie| lie.tell(&mut file));
            if way < 3 {
                forge::mend(&mut file);
            }
            read_in_all_ways(&file, key.as_ref())
        })
        .unwrap();
    for flavour in [Flavour::Plain, Flavour::EncryptedLz4] {
        for file in [dense(flavour), points(flavour)] {
            let key = flavour.key();
            read_in_all_ways(&file, key.as_ref()).unwrap();
            if key.is_some() {
                read_in_all_ways(&moved(&[file]), key.as_ref()).unwrap();
            }
        }
    }
}
