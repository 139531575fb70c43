//! The golden files: logs as this version of the format wrote them, which every later reader
//! must read the same. This is their recipe, too: `REPLICA_BLESS=1` makes those that are not
//! there yet. What no chance takes part in, it makes again, byte for byte.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::fs;
use std::io::Cursor;
use std::path::PathBuf;

use common::listing::{image_byte, listing, python_listing};
use common::{Flavour, KEY, Model, Timed, borrowed, extent};
use hrl_format::convert::{Loss, to_ms_hrl};
use hrl_format::id::{Generation, GenerationId, GroupId, LogId, PointId, VolumeId};
use hrl_format::layout::PAGE;
use hrl_format::record::{Consistency, Record, Root, Tag};
use hrl_format::units::{BlockSize, Epoch, GenerationNumber, SectorSize, Timestamp, VolumeSize};
use hrl_format::{
    EpochRange, Log, LogHeader, LogWriter, RecordOrder, VolumeKey, check, merge, ms, salvage,
};

/// 2026-01-02 03:04:05 UTC.
const TIME: i64 = 1_767_323_045_000_000_000;
const VOLUME: u64 = 256 << 10;

/// Whether the recipe makes the very bytes, or only what is to be read of them: where nonces
/// are drawn, or a new log gets an id.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Chance {
    None,
    Some,
}

struct Golden {
    name: &'static str,
    chance: Chance,
    key: Option<[u8; 32]>,
    file: Vec<u8>,
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_nanos(TIME + seconds * 1_000_000_000)
}

fn header() -> LogHeader {
    LogHeader {
        log: LogId::from_bytes([0x11; 16]),
        previous: Some(LogId::from_bytes([0x10; 16])),
        previous_seal: None,
        stands_for: None,
        volume: VolumeId::from_bytes([0x70; 16]),
        generation: Generation {
            number: GenerationNumber::new(1),
            id: GenerationId::from_bytes([0x60; 16]),
        },
        epochs: EpochRange::single(Epoch::new(5)),
        order: RecordOrder::AsRead,
        block: BlockSize::MIN,
        sector: SectorSize::B512,
        volume_size: VolumeSize::new(VOLUME),
        created: at(0),
        key: None,
    }
}

fn write(offset: u64, text: &str, times: usize) -> Record<Vec<u8>> {
    let data = text.repeat(times).into_bytes();
    Record::Write {
        extent: extent(offset, data.len() as u64),
        data,
    }
}

fn tag(n: u8, consistency: Consistency, label: &str) -> Record<Vec<u8>> {
    let even = n.is_multiple_of(2);
    Record::Tag(Tag {
        id: PointId::from_bytes([n; 16]),
        time: at(i64::from(n)),
        consistency,
        label: label.to_owned(),
        group: even.then(|| GroupId::from_bytes([0x50; 16])),
        root: even.then(|| Root::from_bytes([0x40; 32])),
    })
}

/// Two epochs with everything that there is in them. Every second has a record.
fn story() -> [Vec<Timed>; 2] {
    let zeroes = |offset, len| Record::Zeroes {
        extent: extent(offset, len),
    };
    let discard = |offset, len| Record::Discard {
        extent: extent(offset, len),
    };
    let resize = |size| Record::Resize {
        size: VolumeSize::new(size),
    };
    let first = vec![
        write(0, "all that is written ", 150),
        write(1500, "over", 25),
        zeroes(8192, 4096),
        write(9000, "a hole in zeroes", 1),
        discard(100_000, 50_000),
        tag(1, Consistency::Crash, ""),
        write(VOLUME - 7, "the end", 1),
        resize(VOLUME - 512),
        resize(VOLUME + 4096),
        write(VOLUME, "grown", 3),
        tag(2, Consistency::Filesystem, "before the loss \u{e9}"),
    ];
    let second = vec![
        write(2000, "the next epoch ", 40),
        discard(0, 100),
        write(65_530, "across two regions", 1),
        zeroes(120_000, 1000),
        tag(3, Consistency::Crash, "gone by the end"),
        write(9000, "another", 1),
        tag(4, Consistency::Application, "at the end"),
        tag(5, Consistency::Crash, ""),
    ];
    let mut seconds = 0;
    let mut timed = |record| {
        seconds += 1;
        (record, at(seconds))
    };
    [first, second].map(|records| records.into_iter().map(&mut timed).collect())
}

fn write_log(header: LogHeader, records: &[Timed], flavour: Flavour) -> Vec<u8> {
    let key = flavour.key();
    let options = flavour.options();
    let mut writer = LogWriter::create(Vec::new(), header, &options, key.as_ref()).unwrap();
    for (n, (record, time)) in records.iter().enumerate() {
        writer.append(&borrowed(record), *time).unwrap();
        if n == 4 {
            writer.flush().unwrap();
        }
    }
    writer.seal_at(at(60)).unwrap().0
}

/// The two epochs as two logs.
fn chain(flavour: Flavour) -> [Vec<u8>; 2] {
    let [first, second] = story();
    let first = write_log(header(), &first, flavour);
    let log = Log::open(&first, None).unwrap();
    let next = LogHeader {
        log: LogId::from_bytes([0x12; 16]),
        previous: Some(log.header().log),
        previous_seal: Some(log.seal().digest),
        epochs: EpochRange::single(Epoch::new(6)),
        volume_size: log.seal().volume_size,
        ..header()
    };
    let second = write_log(next, &second, flavour);
    [first, second]
}

fn merged(flavour: Flavour) -> Vec<u8> {
    let files = chain(flavour);
    let logs: Vec<_> = files
        .iter()
        .map(|file| Log::open(file, None).unwrap())
        .collect();
    merge(&logs, Vec::new(), &flavour.options()).unwrap().0
}

fn recipe() -> Vec<Golden> {
    let golden = |name, chance, key, file| Golden {
        name,
        chance,
        key,
        file,
    };
    let [plain, _] = chain(Flavour::Plain);
    let [lz4, _] = chain(Flavour::Lz4);
    let [encrypted, _] = chain(Flavour::EncryptedLz4);
    let (salvaged, _) = salvage(&encrypted[..encrypted.len() - PAGE], Vec::new(), None).unwrap();
    let torn = plain[..3 * PAGE - 1].to_vec();
    let ms_hrl = to_ms_hrl(&plain[..], None, Cursor::new(Vec::new()), Loss::Accepted).unwrap();
    let ordered = LogHeader {
        order: RecordOrder::AsCompleted,
        ..header()
    };
    let [first, _] = story();
    let in_order = write_log(ordered, &first, Flavour::Plain);
    vec![
        golden("plain", Chance::None, None, plain),
        golden("lz4", Chance::None, None, lz4),
        golden("in-order", Chance::None, None, in_order),
        golden("torn", Chance::None, None, torn),
        golden("encrypted", Chance::Some, Some(KEY), encrypted),
        golden("salvaged", Chance::Some, Some(KEY), salvaged),
        golden("merged", Chance::Some, None, merged(Flavour::Lz4)),
        golden(
            "moved",
            Chance::Some,
            Some(KEY),
            merged(Flavour::EncryptedLz4),
        ),
        golden("ms-hrl", Chance::None, None, ms_hrl.0.into_inner()),
    ]
}

fn folder() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "golden"]
        .iter()
        .collect()
}

/// What a file holds, but for its own id and what follows from it.
fn content(text: &str) -> Vec<&str> {
    let own = |line: &&str| !line.starts_with("log ") && !line.starts_with("sealed ");
    text.lines().filter(own).collect()
}

/// As the listing of a native log: writes, and the image.
fn ms_listing(file: &[u8]) -> String {
    let mut reader = ms::Reader::open(Cursor::new(file)).unwrap();
    let mut text = String::new();
    let mut model = Model::new(VolumeSize::new(VOLUME + 4096));
    while let Some(write) = reader.next_write().unwrap() {
        let entry = *write.entry();
        let mut data = vec![0; entry.extent.len().get() as usize];
        let len = reader.data(&write).unwrap().read(&mut data).unwrap();
        assert_eq!(len, data.len());
        text += &format!("write {} {}\n", entry.time, entry.extent);
        model.apply(&Record::Write {
            extent: entry.extent,
            data,
        });
    }
    let image: Vec<u8> = model.bytes.iter().map(|&byte| image_byte(byte)).collect();
    let sum = ms::checksum(&[&image]);
    text + &format!("image {} sum {sum:08x}\n", image.len())
}

fn listed(golden: &Golden, file: &[u8]) -> String {
    match golden.name {
        "ms-hrl" => ms_listing(file),
        _ => listing(file, golden.key.map(VolumeKey::from_bytes).as_ref()).unwrap(),
    }
}

#[test]
fn golden_files_read_as_ever_and_their_recipe_still_makes_them() {
    for golden in recipe() {
        let path = folder().join(golden.name);
        let (log, text) = (path.with_extension("hrl"), path.with_extension("txt"));
        if std::env::var_os("REPLICA_BLESS").is_some() && !log.exists() {
            fs::write(&log, &golden.file).unwrap();
            fs::write(&text, listed(&golden, &golden.file)).unwrap();
        }
        let file = fs::read(&log).unwrap();
        let expected = fs::read_to_string(&text).unwrap();
        assert_eq!(listed(&golden, &file), expected, "{}", golden.name);
        let made = listed(&golden, &golden.file);
        assert_eq!(content(&made), content(&expected), "{}", golden.name);
        if golden.chance == Chance::None {
            let same = file == golden.file;
            assert!(same, "{}: the recipe makes other bytes", golden.name);
        }
        let key = golden.key.map(VolumeKey::from_bytes);
        let sound = if golden.name == "ms-hrl" {
            ms::check(Cursor::new(&file)).unwrap().is_sound()
        } else {
            let read = python_listing(&log, golden.key).unwrap();
            assert_eq!(read, expected, "{}: the reader in Python", golden.name);
            check(&file, key.as_ref()).unwrap().is_sound()
        };
        assert_eq!(sound, golden.name != "torn", "{}", golden.name);
    }
}
