//! The document alone is enough to read a log: a reader in Python, written from nothing else,
//! reads of any log what the crate reads, and finds fault with the same files.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::io::Write;

use common::listing::{listing, python_listing};
use common::{Flavour, KEY, Lie, cases, chain, flavour, forge, header, records, write_log};
use hrl_format::layout::{FRAME_MAGIC, PAGE, RawFrame, RawRecord};
use hrl_format::{Log, VolumeKey, merge, salvage};
use proptest::prelude::*;
use zerocopy::FromBytes;

/// A process for every log: a few of them are enough for every day.
fn few() -> ProptestConfig {
    let all = cases();
    ProptestConfig {
        cases: all.cases.div_ceil(8),
        ..all
    }
}

/// Compares what the two make of `file`, with the key and without.
fn compare(file: &[u8], flavour: Flavour) -> Result<(), TestCaseError> {
    let mut on_disk = tempfile::NamedTempFile::new().unwrap();
    on_disk.write_all(file).unwrap();
    let keys: &[Option<[u8; 32]>] = match flavour.key() {
        Some(_) => &[Some(KEY), None],
        None => &[None],
    };
    for &key in keys {
        let opened = key.map(VolumeKey::from_bytes);
        let ours = listing(file, opened.as_ref());
        let theirs = python_listing(on_disk.path(), key);
        prop_assert_eq!(&theirs, &ours, "with the key: {}", key.is_some());
    }
    Ok(())
}

/// Where the data of the first frame lies, as it is stored.
fn stored_data(file: &[u8]) -> std::ops::Range<usize> {
    let Ok((frame, _)) = RawFrame::read_from_prefix(&file[PAGE..]) else {
        return 0..0;
    };
    let table = frame.records.get() as usize * size_of::<RawRecord>();
    let start = PAGE + size_of::<RawFrame>() + table;
    if frame.magic == FRAME_MAGIC {
        start..start + frame.stored.get() as usize
    } else {
        0..0
    }
}

proptest! {
    #![proptest_config(few())]

    #[test]
    fn both_read_the_same(
        records in records(30), flavour in flavour(), cut in any::<prop::sample::Index>(),
    ) {
        let (file, _) = write_log(header(), &records, flavour);
        compare(&file, flavour)?;
        compare(&file[..cut.index(file.len())], flavour)?;
        let (salvaged, _) = salvage(&file[..file.len() - PAGE], Vec::new(), None).unwrap();
        compare(&salvaged, flavour)?;
    }

    #[test]
    fn both_read_merged_logs(
        records in records(40), cuts in prop::collection::vec(0usize..40, 1..4), flavour in flavour(),
    ) {
        let logs = chain(&records, &cuts, flavour);
        let (recut, _) = merge(&logs, Vec::new(), &flavour.options()).unwrap();
        compare(&recut, flavour)?;
        let keyless: Vec<_> = logs.iter().map(|log| Log::open(log.source(), None).unwrap()).collect();
        let (moved, _) = merge(&keyless, Vec::new(), &flavour.options()).unwrap();
        compare(&moved, flavour)?;
    }

    #[test]
    fn both_decompress_alike(
        records in records(6), at in any::<prop::sample::Index>(), to in any::<[u8; 2]>(),
    ) {
        let (mut file, _) = write_log(header(), &records, Flavour::Lz4);
        let stored = stored_data(&file);
        prop_assume!(stored.len() > 2);
        let at = stored.start + at.index(stored.len() - 1);
        // An offset of zero is what decoders differ in most.
        let to = if to[0] < 100 { [0; 2] } else { to };
        file[at..at + 2].copy_from_slice(&to);
        forge::mend(&mut file);
        compare(&file, Flavour::Lz4)?;
    }

    #[test]
    fn both_find_fault_with_the_same(
        records in records(15), flavour in flavour(), lie in common::lie(), mended in any::<bool>(),
    ) {
        let (mut file, _) = write_log(header(), &records, flavour);
        Lie::tell(&lie, &mut file);
        if mended {
            forge::mend(&mut file);
        }
        // Not to be tried: an image as large as a lie.
        let key = flavour.key();
        prop_assume!(hrl_format::Scanner::new(&file[..], key.as_ref()).is_err()
            || listing(&file, key.as_ref()).is_some());
        compare(&file, flavour)?;
    }
}
