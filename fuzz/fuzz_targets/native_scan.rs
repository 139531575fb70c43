//! Native logs from front to back, sealed, open or torn. Invariants:
//!
//! - no input panics, and none takes more memory than it has bytes plus a constant;
//! - a scan ends, and says how;
//! - what a scan finds sealed can be read at any place.
#![no_main]

use hrl_format::units::VolumeSize;
use hrl_format::{Ending, FrameBuffer, Log, Result, Scanner, VolumeKey};
use libfuzzer_sys::fuzz_target;
use replica_fuzz::{bounded, file, resum, story};

fuzz_target!(|input: &[u8]| {
    let file = file(input, resum::native);
    bounded(file.len(), || {
        let _ = frames(&file);
        if let Ok(Ending::Sealed(_)) = records(&file, Some(&story::key())) {
            read(&file, Some(&story::key())).expect("sealed, so readable");
        }
        let _ = records(&file, None);
    });
});

fn records(file: &[u8], key: Option<&VolumeKey>) -> Result<Ending> {
    let mut scanner = Scanner::new(file, key)?;
    let mut size = scanner.header().volume_size;
    while let Some(entry) = scanner.next_record()? {
        if let Some(extent) = entry.record.extent() {
            assert!(!extent.is_empty() && extent.end().get() <= size.get());
        }
        if let hrl_format::record::Record::Resize { size: new } = entry.record {
            size = VolumeSize::new(new.get());
        }
    }
    Ok(scanner.ending().expect("it ended").clone())
}

fn frames(file: &[u8]) -> Result<()> {
    let mut scanner = Scanner::new(file, None)?;
    while let Some(frame) = scanner.next_frame()? {
        frame.shapes().for_each(drop);
    }
    assert!(scanner.ending().is_some());
    Ok(())
}

fn read(file: &[u8], key: Option<&VolumeKey>) -> Result<()> {
    let log = Log::open(file, key)?;
    let mut frame = FrameBuffer::new();
    for entry in log.index() {
        log.read_frame(entry?.frame, &mut frame)?;
    }
    Ok(())
}
