//! Logs in order, and the state after any of their records: it is what a replay of the records
//! up to that one comes to, whoever reads it, with the key or without.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::{
    Flavour, Model, Timed, VOLUME, borrowed, cases, extent, flavour, header, records, scan,
    write_log,
};
use hrl_format::layout::PAGE;
use hrl_format::record::Record;
use hrl_format::units::{Sequence, Timestamp, VolumeSize};
use hrl_format::{
    ErrorKind, FrameBuffer, Log, LogHeader, LogWriter, MergeWay, Prefix, RecordOrder, merge,
    salvage,
};
use proptest::prelude::*;

fn in_order() -> LogHeader {
    LogHeader {
        order: RecordOrder::AsCompleted,
        ..header()
    }
}

fn model(log: &Log<&Vec<u8>>, prefix: &Prefix) -> Model {
    let mut model = Model::new(prefix.volume_size());
    let mut frame = FrameBuffer::new();
    for entry in prefix.entries() {
        model.put(log, entry, &mut frame);
    }
    model
}

/// A write of more than a frame, so that it becomes several records.
fn long() -> Timed {
    let len = 3 << 18;
    let record = Record::Write {
        extent: extent(1000, len),
        data: (0..len).map(|n| (n >> 10) as u8).collect(),
    };
    (record, Timestamp::from_nanos(0))
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn the_state_after_any_record_is_that_of_the_records_up_to_it(
        records in records(40), flavour in flavour(), ordered in any::<bool>(), far in any::<bool>(),
    ) {
        let header = if ordered { in_order() } else { header() };
        let mut records = records;
        if far {
            records.insert(0, long());
        }
        let (file, _) = write_log(header, &records, flavour);
        let key = flavour.key();
        let log = Log::open(&file, key.as_ref()).unwrap();
        let keyless = Log::open(&file, None).unwrap();
        let (found, _) = scan(&file, key.as_ref());
        let mut replayed = Model::new(VolumeSize::new(VOLUME));
        for (n, (record, time)) in (0..).zip(&found) {
            replayed.apply(record);
            let prefix = log.index_until(Sequence::new(n)).unwrap();
            prop_assert_eq!(&keyless.index_until(Sequence::new(n)).unwrap(), &prefix);
            prop_assert!(model(&log, &prefix) == replayed, "after record {}", n);
            prop_assert_eq!(keyless.time_of(Sequence::new(n)).unwrap(), *time);
        }
        let behind = Sequence::new(found.len() as u64);
        for error in [
            log.index_until(behind).map(|_| ()).unwrap_err(),
            log.time_of(behind).map(|_| ()).unwrap_err(),
        ] {
            prop_assert_eq!(error.kind(), ErrorKind::Invalid);
        }
        if let Some(last) = behind.get().checked_sub(1) {
            let sealed: Vec<_> = log.index().map(Result::unwrap).collect();
            let whole = log.index_until(Sequence::new(last)).unwrap();
            prop_assert_eq!(whole.entries(), &sealed[..]);
        }
    }

    #[test]
    fn a_part_of_a_prefix_is_that_part(
        records in records(40), at in 0..VOLUME, len in 1..VOLUME, cut in any::<prop::sample::Index>(),
    ) {
        let (file, seal) = write_log(in_order(), &records, Flavour::Plain);
        prop_assume!(seal.records > 0);
        let log = Log::open(&file, None).unwrap();
        let last = cut.index(seal.records as usize) as u64;
        let prefix = log.index_until(Sequence::new(last)).unwrap();
        let part = extent(at, len);
        let found: Vec<_> = prefix.entries_in(part).collect();
        let expected = prefix.entries().iter().filter_map(|entry| entry.clip(part));
        prop_assert_eq!(found, expected.collect::<Vec<_>>());
    }

    #[test]
    fn the_last_record_at_a_time_is_the_last_that_is_not_later(
        records in records(40), times in prop::collection::vec(any::<i64>(), 5), flavour in flavour(),
    ) {
        let (file, _) = write_log(in_order(), &records, flavour);
        let log = Log::open(&file, None).unwrap();
        let (found, _) = scan(&file, flavour.key().as_ref());
        let all = found.iter().map(|(_, time)| *time).chain(times.into_iter().map(Timestamp::from_nanos));
        for time in all {
            let expected = found.iter().rposition(|(_, at)| *at <= time);
            let expected = expected.map(|n| Sequence::new(n as u64));
            prop_assert_eq!(log.last_record_at(time).unwrap(), expected);
        }
    }

    #[test]
    fn times_of_changes_do_not_go_back(records in records(40), flavour in flavour()) {
        let (file, _) = write_log(in_order(), &records, flavour);
        let (found, _) = scan(&file, flavour.key().as_ref());
        let changes = found.iter().filter(|(record, _)| !matches!(record, Record::Tag(_)));
        let times: Vec<_> = changes.map(|(_, time)| *time).collect();
        prop_assert!(times.is_sorted());
    }

    #[test]
    fn a_salvaged_log_is_in_order_as_far_as_it_goes(
        records in records(40), flavour in flavour(), cut in any::<prop::sample::Index>(),
    ) {
        let (file, _) = write_log(in_order(), &records, flavour);
        let torn = &file[..(PAGE + cut.index(file.len() - 2 * PAGE + 1))];
        let key = flavour.key();
        let (salvaged, report) = salvage(torn, Vec::new(), None).unwrap();
        prop_assert_eq!(report.header.order, RecordOrder::AsCompleted);
        let log = Log::open(&salvaged, key.as_ref()).unwrap();
        prop_assert_eq!(log.header().order, RecordOrder::AsCompleted);
        prop_assert!(log.check().unwrap().is_sound());
        let (found, _) = scan(&file, key.as_ref());
        let mut replayed = Model::new(VolumeSize::new(VOLUME));
        for (n, (record, _)) in (0..report.seal.records).zip(&found) {
            replayed.apply(record);
            let prefix = log.index_until(Sequence::new(n)).unwrap();
            prop_assert!(model(&log, &prefix) == replayed, "after record {}", n);
        }
    }
}

#[test]
fn logs_in_order_merge_into_one_that_is_not() {
    for key in [None, Flavour::Encrypted.key()] {
        let write = |header: LogHeader| {
            let mut writer =
                LogWriter::create(Vec::new(), header, &Default::default(), key.as_ref()).unwrap();
            for (at, byte) in [(0, 1), (4096, 2), (0, 3)] {
                let data = vec![byte; 4096];
                let record = Record::Write {
                    extent: extent(at, 4096),
                    data,
                };
                writer.append(&borrowed(&record), Timestamp::now()).unwrap();
                writer.flush().unwrap();
            }
            writer.seal().unwrap().0
        };
        let first = write(in_order());
        let first = Log::open(&first, None).unwrap();
        let second = write(LogHeader {
            previous: Some(first.header().log),
            previous_seal: Some(first.seal().digest),
            epochs: hrl_format::EpochRange::single(first.header().epochs.last.next()),
            ..in_order()
        });
        let second = Log::open(&second, None).unwrap();
        let (file, merged) = merge(&[first, second], Vec::new(), &Default::default()).unwrap();
        assert_eq!(merged.header.order, RecordOrder::AsRead);
        let log = Log::open(&file, key.as_ref()).unwrap();
        let report = log.check().unwrap();
        assert!(report.is_sound(), "{:?}", report.problems);
        if merged.way == MergeWay::Moved {
            // The first log's frames are dead; the second's still count their own records.
            assert_eq!(log.seal().frames, 2);
            let error = log.index_until(Sequence::new(1)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
}

#[test]
fn a_log_of_several_epochs_cannot_be_in_order() {
    let mut header = in_order();
    header.epochs.last = header.epochs.last.next();
    let error = LogWriter::create(Vec::new(), header, &Default::default(), None);
    assert_eq!(error.err().unwrap().kind(), ErrorKind::Invalid);
}
