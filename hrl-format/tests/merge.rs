//! A merge leaves the state that its sources leave, with the key and without; and whoever
//! has the key can tell a true keyless merge from any other.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::{Flavour, Model, Timed, VOLUME, cases, chain, flavour, forge, records, tags};
use hrl_format::layout::PAGE;
use hrl_format::record::{Record, Tag};
use hrl_format::units::{ByteLen, VolumeSize};
use hrl_format::{
    ErrorKind, ExtentKind, FrameBuffer, Gather, Log, MergeWay, Overlay, Proof, check, merge,
    salvage,
};
use proptest::prelude::*;

/// The tags behind the last change.
fn trailing(records: &[Timed]) -> Vec<Tag> {
    let tag = |(record, _): &Timed| match record {
        Record::Tag(tag) => Some(tag.clone()),
        _ => None,
    };
    let mut tags: Vec<Tag> = records.iter().rev().map_while(tag).collect();
    tags.reverse();
    tags
}

/// The same logs, opened without the key.
fn keyless(logs: &[Log<Vec<u8>>]) -> Vec<Log<&Vec<u8>>> {
    logs.iter()
        .map(|log| Log::open(log.source(), None).unwrap())
        .collect()
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_merge_is_what_its_sources_come_to(
        records in records(60), cuts in prop::collection::vec(0usize..60, 0..5), flavour in flavour(),
    ) {
        let logs = chain(&records, &cuts, flavour);
        let expected = Model::of(VolumeSize::new(VOLUME), &records);
        let last_log = logs.last().unwrap();
        let kept: Vec<Tag> = {
            // Tags of the last log alone can stay.
            let of_last = tags(last_log);
            let tags = trailing(&records);
            tags[tags.len() - tags.len().min(of_last.len())..].to_vec()
        };
        let (file, merged) = merge(&logs, Vec::new(), &flavour.options()).unwrap();
        prop_assert_eq!(merged.way, MergeWay::Recut);
        let log = Log::open(&file, flavour.key().as_ref()).unwrap();
        let report = log.check().unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.problems);
        prop_assert_eq!(Model::by_index(&log), expected.clone());
        prop_assert_eq!(tags(&log), kept.clone());
        let all = records.iter().filter(|(record, _)| matches!(record, Record::Tag(_))).count();
        prop_assert_eq!(merged.dropped.len() + kept.len(), all);
        prop_assert_eq!(merged.header.chain_end(merged.seal.digest),
            last_log.header().chain_end(last_log.seal().digest));

        let Some(key) = flavour.key() else { return Ok(()) };
        let (file, merged) = merge(&keyless(&logs), Vec::new(), &flavour.options()).unwrap();
        prop_assert_eq!(merged.way, MergeWay::Moved);
        let log = Log::open(&file, Some(&key)).unwrap();
        let report = log.check().unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.problems);
        prop_assert_eq!(report.proof, Proof::Whole);
        prop_assert_eq!(Model::by_index(&log), expected);
        prop_assert_eq!(tags(&log), kept);
        prop_assert_eq!(merged.dropped.len() + tags(&log).len(), all);
    }

    #[test]
    fn a_salvaged_log_merges_as_what_is_left_of_it(
        records in records(60), cuts in prop::collection::vec(0usize..60, 1..4),
        flavour in flavour(), torn in any::<prop::sample::Index>(), with_key in any::<bool>(),
    ) {
        let key = flavour.key();
        let mut logs = chain(&records, &cuts, flavour);
        // The newest is torn somewhere, as if its writer had died.
        let last = logs.pop().unwrap();
        let mut expected = Model::new(VolumeSize::new(VOLUME));
        for log in &logs {
            let (records, _) = common::scan(log.source(), key.as_ref());
            records.iter().for_each(|(record, _)| expected.apply(record));
        }
        let file = last.into_source();
        let whole = &file[..PAGE + torn.index(file.len() - 2 * PAGE + 1)];
        let (left, _) = common::scan(whole, key.as_ref());
        left.iter().for_each(|(record, _)| expected.apply(record));
        let salvager = key.as_ref().filter(|_| with_key);
        let (salvaged, _) = salvage(whole, Vec::new(), salvager).unwrap();
        logs.push(Log::open(salvaged, key.as_ref()).unwrap());

        let (file, _) = merge(&logs, Vec::new(), &flavour.options()).unwrap();
        let log = Log::open(&file, key.as_ref()).unwrap();
        let report = log.check().unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.problems);
        prop_assert_eq!(Model::by_index(&log), expected.clone());
        let (file, _) = merge(&keyless(&logs), Vec::new(), &flavour.options()).unwrap();
        let log = Log::open(&file, key.as_ref()).unwrap();
        let report = log.check().unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.problems);
        prop_assert_eq!(Model::by_index(&log), expected);
        // That no frame is missing is proved only by who had the key when it was torn.
        let proof = match (key, with_key) {
            (None, _) => Proof::None,
            (Some(_), true) => Proof::Whole,
            (Some(_), false) => Proof::Frames,
        };
        prop_assert_eq!(report.proof, proof);
    }

    #[test]
    fn merging_step_by_step_without_the_key_is_merging_at_once(
        records in records(60), cuts in prop::collection::vec(0usize..60, 1..5),
    ) {
        let flavour = Flavour::EncryptedLz4;
        let key = flavour.key();
        let logs = chain(&records, &cuts, flavour);
        let logs = keyless(&logs);
        let mut step = Vec::new();
        for log in &logs {
            let own = log.source().to_vec();
            if step.is_empty() {
                step = own;
                continue;
            }
            let pair = [Log::open(step, None).unwrap(), Log::open(own, None).unwrap()];
            step = merge(&pair, Vec::new(), &flavour.options()).unwrap().0;
        }
        let stepped = Log::open(&step, key.as_ref()).unwrap();
        let report = stepped.check().unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.problems);
        prop_assert_eq!(report.proof, Proof::Whole);
        let (once, _) = merge(&logs, Vec::new(), &flavour.options()).unwrap();
        let once = Log::open(&once, key.as_ref()).unwrap();
        let index = |log: &Log<&Vec<u8>>| log.index().map(Result::unwrap).collect::<Vec<_>>();
        prop_assert_eq!(index(&stepped), index(&once));
        prop_assert_eq!(stepped.seal().frames, once.seal().frames);
        // Whoever has the key makes an ordinary log of it.
        let (file, merged) = merge(&[stepped], Vec::new(), &flavour.options()).unwrap();
        prop_assert_eq!(merged.way, MergeWay::Recut);
        let log = Log::open(&file, key.as_ref()).unwrap();
        prop_assert_eq!(log.check().unwrap().proof, Proof::Whole);
        prop_assert_eq!(Model::by_index(&log), Model::of(VolumeSize::new(VOLUME), &records));
    }

    #[test]
    fn batches_hold_the_data_of_all_pieces(
        records in records(60), cuts in prop::collection::vec(0usize..60, 0..5),
        memory in 0u64..200_000, flavour in flavour(),
    ) {
        let logs = chain(&records, &cuts, flavour);
        let size = logs.last().unwrap().seal().volume_size;
        let overlay = || Overlay::new(logs.iter().map(Log::index).collect::<Vec<_>>(), size);
        let mut gather = Gather::new(&logs, overlay(), ByteLen::new(memory));
        let mut expected = overlay();
        let mut frame = FrameBuffer::new();
        while let Some(batch) = gather.next_batch().unwrap() {
            for (piece, data) in batch.iter() {
                prop_assert_eq!(piece, &expected.next().unwrap().unwrap());
                if piece.kind() == ExtentKind::Write {
                    logs[piece.source.get()].read_frame(piece.entry.frame, &mut frame).unwrap();
                    let len = piece.extent().len();
                    prop_assert_eq!(data, frame.slice(piece.entry.at, len).unwrap());
                } else {
                    prop_assert!(data.is_empty());
                }
            }
        }
        prop_assert!(expected.next().is_none());
    }
}

fn write(offset: u64, fill: u8) -> Timed {
    let record = Record::Write {
        extent: common::extent(offset, 4096),
        data: vec![fill; 4096],
    };
    (record, Default::default())
}

#[test]
fn frames_that_nothing_needs_are_dropped_without_the_key() {
    let records = [write(0, 1), write(1 << 17, 2), write(0, 3), write(4096, 4)];
    let logs = chain(&records, &[2], Flavour::Encrypted);
    assert_eq!(logs.iter().map(|log| log.seal().frames).sum::<u32>(), 3);
    let (file, merged) = merge(&keyless(&logs), Vec::new(), &Default::default()).unwrap();
    assert_eq!(merged.seal.frames, 2);
    assert!(file.len() as u64 <= merged.seal.file_len.get());
    let key = Flavour::Encrypted.key();
    let log = Log::open(&file, key.as_ref()).unwrap();
    // A moved frame still opens, under the key of the log that it was written in.
    let mut frame = FrameBuffer::new();
    log.read_frame(common::frame(0), &mut frame).unwrap();
    assert_eq!(frame.origin().log, logs[0].header().log);
    assert_eq!(frame.origin().frame, common::frame(1));
    assert_eq!(frame.data().unwrap(), [2; 4096]);
}

#[test]
fn logs_that_do_not_follow_are_not_merged() {
    let logs = chain(
        &[write(0, 1), write(0, 2), write(0, 3)],
        &[1, 2],
        Flavour::Plain,
    );
    let kind = |logs: &[&Log<Vec<u8>>]| {
        merge(logs, Vec::new(), &Default::default())
            .map(|_| ())
            .unwrap_err()
            .kind()
    };
    assert_eq!(kind(&[&logs[0], &logs[2]]), ErrorKind::Chain);
    assert_eq!(kind(&[&logs[1], &logs[0]]), ErrorKind::Chain);
    assert_eq!(kind(&[]), ErrorKind::Invalid);
}

/// Whoever has no key, but a way with files, merges otherwise than it should be.
#[test]
fn an_untrue_merge_is_told_by_the_key() {
    let records = [write(0, 1), write(1 << 17, 2), write(0, 3)];
    let key = Flavour::Encrypted.key();
    let logs = chain(&records, &[1, 2], Flavour::Encrypted);
    let logs = keyless(&logs);
    // The middle one is left out: the two others do not follow, so the header is made to
    // look as if they did, and all checksums are made to agree.
    let (whole, _) = merge(&logs, Vec::new(), &Default::default()).unwrap();
    let (short, _) = merge(&logs[..2], Vec::new(), &Default::default()).unwrap();
    let report = check(&whole, key.as_ref()).unwrap();
    assert_eq!((report.is_sound(), report.proof), (true, Proof::Whole));
    let report = check(&short, key.as_ref()).unwrap();
    assert_eq!((report.is_sound(), report.proof), (true, Proof::Whole));
    let untrue = forge::claim_to_be(&short, &whole);
    let report = check(&untrue, None).unwrap();
    assert!(
        report.is_sound(),
        "no checksum tells: {:?}",
        report.problems
    );
    let report = check(&untrue, key.as_ref()).unwrap();
    assert_eq!(
        report.problems.first().map(|problem| problem.kind()),
        Some(ErrorKind::Forged)
    );
}
