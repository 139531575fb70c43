//! Chains of logs, read as one and merged, with the key and without. Invariants:
//!
//! - a reader of all logs sees what the records come to;
//! - the merged log is sound, and leaves the same behind;
//! - a merge without the key is proved whole by who has it;
//! - logs of one chain in another order are refused.
#![no_main]

use hrl_format::{ErrorKind, Log, LogOptions, MergeWay, Proof, VolumeKey, check, merge};
use libfuzzer_sys::fuzz_target;
use replica_fuzz::story::{self, Flavour, Step};

fuzz_target!(|input: (Vec<Step>, Flavour)| {
    let (steps, flavour) = input;
    let story = story::tell(&steps, flavour);
    let key = flavour.key();
    merged(&story, key.as_ref(), key.as_ref(), MergeWay::Recut);
    if key.is_some() {
        merged(&story, None, key.as_ref(), MergeWay::Moved);
    }
    let mut logs = open(&story, key.as_ref());
    if logs.len() > 1 {
        logs.swap(0, 1);
        let refused = merge(&logs, Vec::new(), &LogOptions::default());
        assert_eq!(
            refused.map(drop).expect_err("not a chain").kind(),
            ErrorKind::Chain
        );
    }
});

fn open<'a>(story: &'a story::Story, key: Option<&VolumeKey>) -> Vec<Log<&'a Vec<u8>>> {
    let log = |file| Log::open(file, key).expect("a sealed log");
    story.logs.iter().map(log).collect()
}

fn merged(
    story: &story::Story,
    merges: Option<&VolumeKey>,
    reads: Option<&VolumeKey>,
    way: MergeWay,
) {
    let logs = open(story, merges);
    let (file, merged) = merge(&logs, Vec::new(), &LogOptions::default()).expect("a chain");
    assert_eq!(merged.way, way);
    let report = check(&file, reads).expect("memory is read");
    assert!(report.is_sound(), "{:?}", report.problems);
    if reads.is_some() {
        assert_eq!(report.proof, Proof::Whole);
    }
    let log = Log::open(file, reads).expect("a sealed log");
    let first = logs.first().expect("one at least").header();
    assert_eq!(log.header().volume_size, first.volume_size);
    for (at, (found, told)) in story::bytes_of(&log).iter().zip(&story.bytes).enumerate() {
        assert_eq!(found, told, "byte {at}");
    }
}
