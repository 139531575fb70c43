//! Any sequence of records round-trips: in order through the scanner, and as a final state
//! through the index; alone and under other logs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::{
    Byte, Model, VOLUME, any_header, borrowed, cases, chain, extent, flavour, header, records,
    rejoin, scan, tags, write_log,
};
use hrl_format::layout::MAX_RECORDS;
use hrl_format::record::Record;
use hrl_format::units::{Epoch, Timestamp, VolumeSize};
use hrl_format::{
    Ending, EpochRange, ErrorKind, FrameBuffer, Log, LogHeader, LogWriter, MarkDetail, Overlay,
    Scanner, SealProof,
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn records_come_back_in_order(records in records(40), flavour in flavour()) {
        let (file, seal) = write_log(header(), &records, flavour);
        let (found, ending) = scan(&file, flavour.key().as_ref());
        let Ending::Sealed(scanned) = ending else { panic!("{ending:?}") };
        prop_assert_eq!(scanned, seal);
        // A tag's time is its own.
        let expected = records.into_iter().map(|(record, time)| match &record {
            Record::Tag(tag) => { let time = tag.time; (record, time) }
            _ => (record, time),
        });
        prop_assert_eq!(rejoin(found), rejoin(expected.collect()));
    }

    #[test]
    fn headers_come_back(header in any_header(), records in records(10), flavour in flavour()) {
        let (file, seal) = write_log(header.clone(), &records, flavour);
        let log = Log::open(&file, flavour.key().as_ref()).unwrap();
        let expected = LogHeader { key: flavour.key().map(|key| key.key_id()), ..header };
        prop_assert_eq!(log.header(), &expected);
        let scanner = Scanner::new(&file[..], None).unwrap();
        prop_assert_eq!(scanner.header(), &expected);
        prop_assert_eq!(log.seal(), &seal);
        let report = log.check().unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.problems);
    }

    #[test]
    fn writes_longer_than_a_frame_come_back(
        writes in prop::collection::vec((0u64..2 << 20, 1u64..3 << 20, any::<u8>()), 1..4),
        flavour in flavour(),
    ) {
        let header = LogHeader { volume_size: VolumeSize::new(5 << 20), ..header() };
        let write = |(n, (at, len, fill)): (usize, (u64, u64, u8))| {
            let byte = |n: u64| (n >> 9) as u8 ^ fill;
            let data: Vec<u8> = (0..len).map(byte).collect();
            let record = Record::Write { extent: extent(at, len), data };
            (record, Timestamp::from_nanos(n as i64))
        };
        let records: Vec<_> = writes.into_iter().enumerate().map(write).collect();
        let (file, _) = write_log(header.clone(), &records, flavour);
        let (found, ending) = scan(&file, flavour.key().as_ref());
        prop_assert!(matches!(ending, Ending::Sealed(_)), "{ending:?}");
        prop_assert!(rejoin(found) == records);
        let log = Log::open(&file, flavour.key().as_ref()).unwrap();
        prop_assert!(Model::by_index(&log) == Model::of(header.volume_size, &records));
    }

    #[test]
    fn the_index_is_the_final_state(records in records(40), flavour in flavour()) {
        let (file, seal) = write_log(header(), &records, flavour);
        let log = Log::open(file, flavour.key().as_ref()).unwrap();
        prop_assert_eq!(log.seal(), &seal);
        prop_assert_eq!(Model::by_index(&log), Model::of(VolumeSize::new(VOLUME), &records));
    }

    #[test]
    fn tags_are_listed(records in records(40), flavour in flavour()) {
        let (file, _) = write_log(header(), &records, flavour);
        let log = Log::open(&file, flavour.key().as_ref()).unwrap();
        let expected: Vec<_> = records.iter().filter_map(|(record, _)| match record {
            Record::Tag(tag) => Some(tag.clone()),
            _ => None,
        }).collect();
        prop_assert_eq!(tags(&log), &expected[..]);
        // What is not secret of them, without the key.
        let keyless = Log::open(&file, None).unwrap();
        let ids: Vec<_> = keyless.marks().filter_map(|mark| match mark.unwrap().detail {
            MarkDetail::Tag(tag) => Some(tag.id),
            MarkDetail::Resize(_) => None,
        }).collect();
        prop_assert_eq!(ids, expected.iter().map(|tag| tag.id).collect::<Vec<_>>());
    }

    #[test]
    fn a_part_of_the_index_is_that_part(
        records in records(60), at in 0..VOLUME, len in 1..VOLUME, flavour in flavour(),
    ) {
        let (file, _) = write_log(header(), &records, flavour);
        let log = Log::open(file, None.or(flavour.key().as_ref())).unwrap();
        let part = extent(at, len);
        let found: Vec<_> = log.index_in(part).unwrap().map(Result::unwrap).collect();
        let expected: Vec<_> = log.index().filter_map(|entry| entry.unwrap().clip(part)).collect();
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn an_overlay_is_the_state_after_its_last_log(
        records in records(60), cuts in prop::collection::vec(0usize..60, 0..5), flavour in flavour(),
    ) {
        let logs = chain(&records, &cuts, flavour);
        let size = logs.last().unwrap().seal().volume_size;
        let mut found = Model::new(size);
        let mut frame = FrameBuffer::new();
        let mut end = 0;
        for piece in Overlay::new(logs.iter().map(Log::index), size) {
            let piece = piece.unwrap();
            prop_assert!(piece.extent().offset().get() >= end);
            end = piece.extent().end().get();
            found.put(&logs[piece.source.get()], &piece.entry, &mut frame);
        }
        prop_assert_eq!(found, Model::of(VolumeSize::new(VOLUME), &records));
    }
}

#[test]
fn a_log_without_records_is_a_log() {
    let (file, seal) = write_log(header(), &[], common::Flavour::Plain);
    assert_eq!((seal.frames, seal.records, file.len()), (0, 0, 8192));
    let log = Log::open(&file, None).unwrap();
    assert_eq!(log.index().count(), 0);
    assert!(matches!(scan(&file, None), (records, Ending::Sealed(_)) if records.is_empty()));
}

#[test]
fn a_frame_takes_4096_records_and_no_more() {
    for flavour in common::FLAVOURS {
        let (options, key) = (flavour.options(), flavour.key());
        let mut writer = LogWriter::create(Vec::new(), header(), &options, key.as_ref()).unwrap();
        let zeroes = |n| Record::Zeroes {
            extent: extent(n, 1),
        };
        for n in 0..2 * MAX_RECORDS as u64 + 1 {
            writer.append(&zeroes(n), Default::default()).unwrap();
        }
        let (file, seal) = writer.seal().unwrap();
        assert_eq!(seal.frames, 3);
        let log = Log::open(&file, key.as_ref()).unwrap();
        assert!(log.check().unwrap().is_sound());
        let mut frame = FrameBuffer::new();
        let mut records = |n| {
            log.read_frame(common::frame(n), &mut frame).unwrap();
            frame.records()
        };
        assert_eq!([0, 1, 2].map(&mut records), [MAX_RECORDS, MAX_RECORDS, 1]);
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_nothing_is_written() {
    let mut writer = LogWriter::create(
        Vec::new(),
        header(),
        &hrl_format::LogOptions::default(),
        None,
    )
    .unwrap();
    let bad = [
        Record::Write {
            extent: extent(0, 4),
            data: vec![0; 5],
        },
        Record::Write {
            extent: extent(0, 0),
            data: vec![],
        },
        Record::Write {
            extent: extent(VOLUME - 1, 2),
            data: vec![0; 2],
        },
        Record::Zeroes {
            extent: extent(0, VOLUME + 1),
        },
        Record::Discard {
            extent: extent(5, 0),
        },
    ];
    for record in bad {
        let error = writer
            .append(&borrowed(&record), Default::default())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{record:?}");
    }
    assert_eq!(writer.seal().unwrap().1.records, 0);
}

#[test]
fn growing_again_does_not_bring_old_bytes_back() {
    let write = Record::Write {
        extent: extent(VOLUME - 10, 10),
        data: vec![1; 10],
    };
    let resize = |size| Record::<Vec<u8>>::Resize {
        size: VolumeSize::new(size),
    };
    let records = [write, resize(VOLUME - 5), resize(VOLUME)].map(|r| (r, Default::default()));
    let logs = chain(&records, &[1, 2], common::Flavour::Plain);
    let mut found = Model::new(VolumeSize::new(VOLUME));
    let mut frame = FrameBuffer::new();
    for piece in Overlay::new(logs.iter().map(Log::index), VolumeSize::new(VOLUME)) {
        let piece = piece.unwrap();
        found.put(&logs[piece.source.get()], &piece.entry, &mut frame);
    }
    assert_eq!(
        found.bytes[VOLUME as usize - 10..][..5],
        [Byte::Written(1); 5]
    );
    assert_eq!(found.bytes[VOLUME as usize - 5..], [Byte::Undefined; 5]);
}

#[test]
fn keys_are_asked_for_and_compared() {
    let records = [(
        Record::Write {
            extent: extent(0, 4),
            data: vec![9; 4],
        },
        Default::default(),
    )];
    let flavour = common::Flavour::Encrypted;
    let (file, seal) = write_log(header(), &records, flavour);
    assert_eq!(seal.proof, SealProof::Proved);
    let other = hrl_format::VolumeKey::from_bytes([1; 32]);
    let kind = |key| Log::open(&file, key).map(|_| ()).unwrap_err().kind();
    assert_eq!(kind(Some(&other)), ErrorKind::KeyWrong);
    let keyless = Log::open(&file, None).unwrap();
    assert_eq!(keyless.seal().proof, SealProof::Untried);
    let mut frame = FrameBuffer::new();
    let error = keyless
        .read_frame(common::frame(0), &mut frame)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::KeyMissing);
    assert_eq!(frame.table().count(), 1);
    let (plain, _) = write_log(header(), &records, common::Flavour::Plain);
    let error = Log::open(&plain, flavour.key().as_ref())
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::KeyUnused);
}

#[test]
fn logs_that_do_not_follow_are_told_apart() {
    let logs = chain(&[], &[], common::Flavour::Plain);
    let (first, seal) = (logs[0].header(), logs[0].seal().digest);
    let next = LogHeader {
        previous: Some(first.log),
        previous_seal: Some(seal),
        epochs: EpochRange::single(Epoch::new(2)),
        ..header()
    };
    first.check_followed_by(seal, &next).unwrap();
    let other = hrl_format::SealDigest::from_bytes([1; 32]);
    let wrong = [
        LogHeader {
            previous: None,
            ..next.clone()
        },
        LogHeader {
            previous_seal: Some(other),
            ..next.clone()
        },
        LogHeader {
            epochs: EpochRange::single(Epoch::new(3)),
            ..next.clone()
        },
        LogHeader {
            volume: hrl_format::id::VolumeId::from_bytes([8; 16]),
            ..next.clone()
        },
    ];
    for next in wrong {
        let error = first.check_followed_by(seal, &next).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Chain);
    }
}
