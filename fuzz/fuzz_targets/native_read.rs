//! Sealed native logs, read at any place, with the key and without. Invariants:
//!
//! - no input panics, and none takes more memory than it has bytes plus a constant;
//! - the index ascends, without overlaps, within the volume;
//! - a part of the index is that part of the whole;
//! - what a check with the key finds sound is read without an error.
#![no_main]

use hrl_format::units::{ByteLen, ByteOffset, Extent};
use hrl_format::{ExtentKind, FrameBuffer, IndexEntry, Log, Result, VolumeKey, check};
use libfuzzer_sys::fuzz_target;
use replica_fuzz::{bounded, file, resum, story};

fuzz_target!(|input: &[u8]| {
    let file = file(input, resum::native);
    bounded(file.len(), || {
        let _ = read(&file, None);
        let key = story::key();
        let read = read(&file, Some(&key));
        if check(&file[..], Some(&key)).is_ok_and(|report| report.is_sound()) {
            read.expect("sound, so readable");
        }
    });
});

fn read(file: &[u8], key: Option<&VolumeKey>) -> Result<()> {
    let log = Log::open(file, key)?;
    let _ = log.marks().try_for_each(|mark| mark.map(|_| ()));
    let _ = log.tags().try_for_each(|tag| tag.map(|_| ()));
    let mut frame = FrameBuffer::new();
    let mut end = ByteOffset::ZERO;
    for entry in log.index() {
        let entry = entry?;
        assert!(!entry.extent.is_empty() && entry.extent.offset() >= end);
        assert!(entry.extent.end().get() <= log.seal().volume_size.get());
        end = entry.extent.end();
        log.load_frame(entry.frame, &mut frame)?;
        frame.table().for_each(drop);
        log.read_frame(entry.frame, &mut frame)?;
        if entry.kind == ExtentKind::Write {
            frame.slice(entry.at, entry.extent.len())?;
        }
        frame.entries().try_for_each(|entry| entry.map(drop))?;
    }
    let part = Extent::new(ByteOffset::new(5000), ByteLen::new(20_000)).expect("small");
    let whole = log.index().filter_map(|entry| entry.ok()?.clip(part));
    let bisected: Result<Vec<IndexEntry>> = log.index_in(part)?.collect();
    // Bisection may meet a damaged page that the front-to-back reading also meets.
    if let Ok(bisected) = bisected {
        assert!(whole.eq(bisected));
    }
    Ok(())
}
