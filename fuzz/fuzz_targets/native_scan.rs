//! Native logs from front to back, sealed, open or torn; checked and salvaged. Invariants:
//!
//! - no input panics, and none takes more memory than it has bytes plus a constant;
//! - a scan ends, and says how; its records are within the volume;
//! - what a check finds sound scans as sealed;
//! - a torn log is salvaged into a sound one with the same records, a sealed one never.
#![no_main]

use hrl_format::record::Record;
use hrl_format::{Ending, Result, Scanner, VolumeKey, check, salvage};
use libfuzzer_sys::fuzz_target;
use replica_fuzz::{bounded, file, resum, story};

fuzz_target!(|input: &[u8]| {
    let file = file(input, resum::native);
    for key in [None, Some(&story::key())] {
        bounded(file.len(), || {
            let scanned = scan(&file, key);
            let checked = check(&file[..], key);
            if checked.is_ok_and(|report| report.is_sound()) {
                assert!(matches!(scanned, Ok((_, Ending::Sealed(_)))), "{scanned:?}");
            }
        });
        restore(&file, key);
    }
});

/// How many records a log has, and how it ends.
fn scan(file: &[u8], key: Option<&VolumeKey>) -> Result<(u64, Ending)> {
    let mut scanner = Scanner::new(file, key)?;
    let mut records = 0;
    if scanner.header().key.is_some() && key.is_none() {
        while let Some(frame) = scanner.next_frame()? {
            records += frame.table().count() as u64;
        }
    } else {
        let mut size = scanner.header().volume_size;
        while let Some(entry) = scanner.next_record()? {
            records += 1;
            let end = entry.record.extent().map_or(0, |extent| extent.end().get());
            assert!(end <= size.get());
            if let Record::Resize { size: new } = entry.record {
                size = new;
            }
        }
    }
    Ok((records, scanner.ending().expect("it ended").clone()))
}

fn restore(file: &[u8], key: Option<&VolumeKey>) {
    match (scan(file, key), salvage(file, Vec::new(), key)) {
        (Ok((records, Ending::Torn { at, .. })), Ok((new, salvaged))) => {
            assert_eq!(salvaged.cut, at);
            assert_eq!(salvaged.seal.records, records);
            let report = check(&new[..], key).expect("memory is read");
            assert!(report.is_sound(), "{:?}", report.problems);
        }
        (Ok((_, Ending::Torn { .. })), Err(error)) => panic!("{error}"),
        (Ok((_, Ending::Sealed(_))) | Err(_), salvaged) => assert!(salvaged.is_err()),
    }
}
