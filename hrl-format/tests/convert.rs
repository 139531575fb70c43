//! Conversion both ways: writes keep their order and their bytes, zeroes and discards
//! become zeroes, marks are named, and nothing is dropped in silence.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::io::Cursor;

use common::{
    Byte, FLAVOURS, Flavour, Model, Timed, VOLUME, cases, chain, extent, flavour, header, records,
    scan, write_log,
};
use hrl_format::convert::{Error, HrlOptions, Loss, Lost, MsReport, to_hrl, to_ms_hrl};
use hrl_format::id::VolumeId;
use hrl_format::ms::{self, MsTime, Reader, Writer, WriterOptions};
use hrl_format::record::Record;
use hrl_format::units::{ByteOffset, Extent, Timestamp, VolumeSize};
use hrl_format::{Ending, ErrorKind, Log, VolumeKey, merge};
use proptest::prelude::*;

fn to_ms(file: &[u8], key: Option<&VolumeKey>, loss: Loss) -> Result<(Vec<u8>, MsReport), Error> {
    let (out, report) = to_ms_hrl(file, key, Cursor::new(Vec::new()), loss)?;
    Ok((out.into_inner(), report))
}

fn to_native(file: &[u8], size: Option<u64>, flavour: Flavour) -> Result<Vec<u8>, Error> {
    let options = HrlOptions {
        volume_size: size.map(VolumeSize::new),
        log: flavour.options(),
        ..HrlOptions::new(VolumeId::from_bytes([7; 16]))
    };
    to_hrl(
        Cursor::new(file),
        flavour.key().as_ref(),
        Vec::new(),
        &options,
    )
    .map(|(out, _)| out)
}

/// What [MS-HRL] makes of a record: where, which bytes, in which second.
type Written = (ByteOffset, Vec<u8>, MsTime);

fn expected(records: &[Timed]) -> Vec<Written> {
    let write = |(record, time): &Timed| {
        let time = MsTime::from_timestamp(*time);
        match record {
            Record::Write { extent, data } => Some((extent.offset(), data.clone(), time)),
            Record::Zeroes { extent } | Record::Discard { extent } => {
                Some((extent.offset(), vec![0; extent.len().get() as usize], time))
            }
            Record::Tag(_) | Record::Resize { .. } => None,
        }
    };
    join(records.iter().filter_map(write))
}

fn found(file: &[u8]) -> Vec<Written> {
    let mut reader = Reader::open(Cursor::new(file)).unwrap();
    let mut writes = Vec::new();
    let mut buffer = [0; 4096];
    while let Some(write) = reader.next_write().unwrap() {
        let mut bytes = Vec::new();
        let mut data = reader.data(&write).unwrap();
        while let len @ 1.. = data.read(&mut buffer).unwrap() {
            bytes.extend_from_slice(&buffer[..len]);
        }
        writes.push((write.entry().extent.offset(), bytes, write.entry().time));
    }
    join(writes.into_iter())
}

/// Joins writes that go on where the one before ended: the native writer may have split them.
fn join(writes: impl Iterator<Item = Written>) -> Vec<Written> {
    let mut joined: Vec<Written> = Vec::new();
    for (offset, bytes, time) in writes {
        if let Some((start, held, last)) = joined.last_mut()
            && start.get() + held.len() as u64 == offset.get()
            && *last == time
        {
            held.extend_from_slice(&bytes);
        } else {
            joined.push((offset, bytes, time));
        }
    }
    joined
}

fn marks(records: &[Timed]) -> Vec<Lost> {
    let lost = |(record, _): &Timed| match record {
        Record::Tag(tag) => Some(Lost::Point(tag.id)),
        Record::Resize { size } => Some(Lost::Resize(*size)),
        _ => None,
    };
    records.iter().filter_map(lost).collect()
}

/// What a reader of the volume sees: undefined reads as zeroes.
fn seen(model: &Model) -> Vec<Option<u8>> {
    let byte = |byte: &Byte| match byte {
        Byte::Untouched => None,
        Byte::Written(byte) => Some(*byte),
        Byte::Zero | Byte::Undefined => Some(0),
    };
    model.bytes.iter().map(byte).collect()
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn writes_keep_order_bytes_and_seconds(records in records(40), flavour in flavour()) {
        let (file, _) = write_log(header(), &records, flavour);
        let lost = marks(&records);
        let key = flavour.key();
        match to_ms(&file, key.as_ref(), Loss::Refused) {
            Ok(_) => prop_assert!(lost.is_empty()),
            Err(Error::Inexpressible(named)) => prop_assert_eq!(named.named(), &lost[..]),
            Err(other) => panic!("{other}"),
        }
        let (converted, report) = to_ms(&file, key.as_ref(), Loss::Accepted).unwrap();
        prop_assert_eq!(report.lost.named(), &lost[..]);
        prop_assert_eq!(found(&converted), expected(&records));
        let check = ms::check(Cursor::new(&converted)).unwrap();
        prop_assert!(check.is_sound(), "{:?}", check.findings);
        prop_assert_eq!(check.without_checksum, 0);
        prop_assert_eq!((check.entries, check.data_bytes), (report.records, report.bytes));
    }

    #[test]
    fn there_and_back_a_reader_sees_the_same(
        records in records(40), first in flavour(), second in flavour(),
    ) {
        let records: Vec<Timed> = records
            .into_iter()
            .filter(|(record, _)| !matches!(record, Record::Tag(_) | Record::Resize { .. }))
            // Those drawn behind a resize may lie past the size that now stays.
            .filter(|(record, _)| record.extent().is_none_or(|at| at.end().get() <= VOLUME))
            .collect();
        let (file, _) = write_log(header(), &records, first);
        let (converted, _) = to_ms(&file, first.key().as_ref(), Loss::Refused).unwrap();
        let back = to_native(&converted, Some(VOLUME), second).unwrap();
        let log = Log::open(&back, second.key().as_ref()).unwrap();
        let model = Model::of(VolumeSize::new(VOLUME), &records);
        prop_assert_eq!(seen(&Model::by_index(&log)), seen(&model));
        let (_, ending) = scan(&back, second.key().as_ref());
        prop_assert!(matches!(ending, Ending::Sealed(_)), "{:?}", ending);
        let original = Log::open(&file, None).unwrap();
        prop_assert_eq!(log.header().log, original.header().log);
    }
}

fn write(at: u64, len: u64) -> Timed {
    let data = vec![5; len as usize];
    let record = Record::Write {
        extent: extent(at, len),
        data,
    };
    (record, Timestamp::from_nanos(1_500_000_000_000_000_000))
}

/// An [MS-HRL] log of writes at these places.
fn ms_log(writes: &[Extent]) -> Vec<u8> {
    let options = WriterOptions {
        id: [1; 16],
        previous: [2; 16],
        ..WriterOptions::default()
    };
    let mut writer = Writer::create(Cursor::new(Vec::new()), &options).unwrap();
    for extent in writes {
        let data = vec![9; extent.len().get() as usize];
        writer
            .write(extent.offset(), &data, Timestamp::from_nanos(0))
            .unwrap();
    }
    writer.finish().unwrap().into_inner()
}

#[test]
fn the_volume_is_as_large_as_said_or_as_needed() {
    const MIB: u64 = 1 << 20;
    let size = |file: &[u8], given| {
        let native = to_native(file, given, Flavour::Plain)?;
        Ok::<u64, Error>(Log::open(native, None)?.header().volume_size.get())
    };
    let file = ms_log(&[extent(3 * MIB, 513), extent(0, 512)]);
    assert_eq!(size(&file, None).unwrap(), 4 * MIB);
    assert_eq!(size(&file, Some(3 * MIB + 513)).unwrap(), 3 * MIB + 513);
    let error = size(&file, Some(3 * MIB + 512)).unwrap_err();
    assert!(
        error.to_string().contains("ends at byte 3146241"),
        "{error}"
    );

    assert_eq!(size(&ms_log(&[extent(0, MIB)]), None).unwrap(), MIB);
    assert_eq!(size(&ms_log(&[]), None).unwrap(), 0);
    let error = size(&ms_log(&[extent(u64::MAX - 512, 512)]), None).unwrap_err();
    assert!(matches!(error, Error::VolumeTooLarge(_)), "{error}");
}

#[test]
fn a_chain_stays_a_chain() {
    let (file, _) = write_log(header(), &[write(0, 512)], Flavour::Plain);
    let (first, _) = to_ms(&file, None, Loss::Refused).unwrap();
    let log = Log::open(&file, None).unwrap();
    let mut next = header();
    next.previous = Some(log.header().log);
    let (file, _) = write_log(next, &[write(512, 512)], Flavour::Plain);
    let (second, _) = to_ms(&file, None, Loss::Refused).unwrap();
    let header = |file| Reader::open(Cursor::new(file)).unwrap().header().clone();
    let (first, second) = (header(&first), header(&second));
    assert_eq!(second.previous, first.id);
    assert_eq!(first.previous, [0; 16]);

    let native = to_native(&ms_log(&[]), None, Flavour::Plain).unwrap();
    let log = Log::open(&native, None).unwrap();
    assert_eq!(log.header().log.as_bytes(), &[1; 16]);
    assert_eq!(log.header().previous.unwrap().as_bytes(), &[2; 16]);
}

#[test]
fn a_torn_log_is_refused() {
    let (file, _) = write_log(
        header(),
        &[write(0, 4096), write(8192, 4096)],
        Flavour::Plain,
    );
    let error = to_ms(&file[..file.len() - 4096], None, Loss::Accepted).unwrap_err();
    assert!(matches!(error, Error::Torn { .. }), "{error}");
}

#[test]
fn an_encrypted_log_needs_its_key() {
    let (file, _) = write_log(header(), &[write(0, 4096)], Flavour::Encrypted);
    let kind = |key: Option<&VolumeKey>| match to_ms(&file, key, Loss::Accepted) {
        Err(Error::Native(error)) => error.kind(),
        other => panic!("{other:?}"),
    };
    assert_eq!(kind(None), ErrorKind::KeyMissing);
    assert_eq!(
        kind(Some(&VolumeKey::from_bytes([1; 32]))),
        ErrorKind::KeyWrong
    );
}

#[test]
fn a_damaged_log_is_refused() {
    for flavour in FLAVOURS {
        let mut file = ms_log(&[extent(0, 4096)]);
        file[8192 + 100] ^= 1;
        let error = to_native(&file, None, flavour).unwrap_err();
        assert!(matches!(error, Error::Ms(ms::Error::Damaged(_))), "{error}");
    }
}

#[test]
fn losses_are_named() {
    let resize = (
        Record::Resize {
            size: VolumeSize::new(4096),
        },
        Timestamp::from_nanos(0),
    );
    let (file, _) = write_log(header(), &[resize.clone(), write(0, 512)], Flavour::Plain);
    let error = to_ms(&file, None, Loss::Refused).unwrap_err();
    assert_eq!(
        error.to_string(),
        "[MS-HRL] has no change of size (to 4096 bytes)"
    );

    let many: Vec<Timed> = (0..150).map(|_| resize.clone()).collect();
    let (file, _) = write_log(header(), &many, Flavour::Plain);
    let (_, report) = to_ms(&file, None, Loss::Accepted).unwrap();
    assert_eq!((report.lost.named().len(), report.lost.more()), (100, 50));
    assert!(report.lost.to_string().ends_with(", and 50 more"));
}

proptest! {
    #![proptest_config(cases())]

    /// A merge without the key moves frames whole, with records in them that no longer
    /// count: played in their order they still come to the same.
    #[test]
    fn a_merged_log_converts_to_the_state_it_leaves(
        records in records(40), cuts in prop::collection::vec(0usize..40, 1..4), flavour in flavour(),
    ) {
        let records: Vec<Timed> = records
            .into_iter()
            .filter(|(record, _)| record.extent().is_some_and(|at| at.end().get() <= VOLUME))
            .collect();
        let keyless: Vec<_> = chain(&records, &cuts, flavour)
            .into_iter()
            .map(|log| Log::open(log.into_source(), None).unwrap())
            .collect();
        let (merged, _) = merge(&keyless, Vec::new(), &flavour.options()).unwrap();
        let (converted, _) = to_ms(&merged, flavour.key().as_ref(), Loss::Refused).unwrap();
        let back = to_native(&converted, Some(VOLUME), Flavour::Plain).unwrap();
        let log = Log::open(&back, None).unwrap();
        let model = Model::of(VolumeSize::new(VOLUME), &records);
        prop_assert_eq!(seen(&Model::by_index(&log)), seen(&model));
    }
}
