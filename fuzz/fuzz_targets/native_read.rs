//! Sealed native logs, read at any place, with the key and without. Invariants:
//!
//! - no input panics, and none takes more memory than it has bytes plus a constant;
//! - the index ascends, without overlaps, within the volume;
//! - a part of the index is that part of the whole.
#![no_main]

use hrl_format::units::{ByteLen, ByteOffset, Extent};
use hrl_format::{FrameBuffer, IndexEntry, Log, Result, VolumeKey};
use libfuzzer_sys::fuzz_target;
use replica_fuzz::{bounded, file, resum, story};

fuzz_target!(|input: &[u8]| {
    let file = file(input, resum::native);
    bounded(file.len(), || {
        let _ = read(&file, None);
        let _ = read(&file, Some(&story::key()));
    });
});

fn read(file: &[u8], key: Option<&VolumeKey>) -> Result<()> {
    let log = Log::open(file, key)?;
    let _ = log.marks().try_for_each(|mark| mark.map(|_| ()));
    let _ = log.tags();
    let mut frame = FrameBuffer::new();
    let mut end = ByteOffset::ZERO;
    for entry in log.index() {
        let entry = entry?;
        assert!(!entry.extent.is_empty() && entry.extent.offset() >= end);
        assert!(entry.extent.end().get() <= log.seal().volume_size.get());
        end = entry.extent.end();
        if log.load_frame(entry.frame, &mut frame).is_ok() {
            frame.shapes().for_each(drop);
        }
        if log.read_frame(entry.frame, &mut frame).is_ok() {
            let _ = frame.slice(entry.at, entry.extent.len());
            frame.entries().for_each(drop);
        }
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
