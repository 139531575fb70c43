//! What holds for every [MS-HRL] log: any writes come back, any bit that a checksum covers
//! is missed when flipped, and no input makes the reader panic or hoard memory.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::env;
use std::io::Cursor;

use hrl_format::ms::{self, Damage, Error, Header, Reader, Writer, WriterOptions};
use hrl_format::units::{ByteLen, ByteOffset, Extent, FileOffset, Timestamp};
use proptest::prelude::*;

fn config() -> ProptestConfig {
    let cases = env::var("REPLICA_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig::with_cases(cases.unwrap_or(64))
}

/// Seconds of the year 2000 and later, so that they survive the format.
fn time() -> impl Strategy<Value = Timestamp> {
    (946_684_800_i64..5_000_000_000).prop_map(|s| Timestamp::from_nanos(s * 1_000_000_000))
}

#[derive(Clone, Debug)]
enum Change {
    Data(ByteOffset, Vec<u8>, Timestamp),
    Zeroes(Extent, Timestamp),
}

impl Change {
    fn expected(&self) -> (ByteOffset, Vec<u8>, Timestamp) {
        match self {
            Self::Data(offset, data, time) => (*offset, data.clone(), *time),
            Self::Zeroes(extent, time) => {
                (extent.offset(), vec![0; extent.len().get() as usize], *time)
            }
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    let offset = (0..1_u64 << 50).prop_map(ByteOffset::new);
    let data = prop::collection::vec(any::<u8>(), 0..700);
    let zeroes =
        |(offset, len, time)| Change::Zeroes(Extent::new(offset, ByteLen::new(len)).unwrap(), time);
    prop_oneof![
        4 => (offset.clone(), data, time()).prop_map(|(o, d, t)| Change::Data(o, d, t)),
        1 => (offset, 1..200_000_u64, time()).prop_map(zeroes),
    ]
}

fn log_of(changes: &[Change]) -> Vec<u8> {
    let mut writer = Writer::create(Cursor::new(Vec::new()), &WriterOptions::default()).unwrap();
    for change in changes {
        match change {
            Change::Data(offset, data, time) => writer.write(*offset, data, *time).unwrap(),
            Change::Zeroes(extent, time) => writer.zeroes(*extent, *time).unwrap(),
        }
    }
    writer.finish().unwrap().into_inner()
}

/// All that a log holds; the first error ends it.
fn read_all(file: &[u8], piece: usize) -> Result<Vec<(ByteOffset, Vec<u8>, Timestamp)>, Error> {
    let mut reader = Reader::open(Cursor::new(file))?;
    let mut buffer = vec![0; piece];
    let mut writes = Vec::new();
    while let Some(write) = reader.next_write()? {
        let mut bytes = Vec::new();
        let mut data = reader.data(&write)?;
        while let len @ 1.. = data.read(&mut buffer)? {
            bytes.extend_from_slice(&buffer[..len]);
        }
        let entry = write.entry();
        writes.push((entry.extent.offset(), bytes, entry.time.to_timestamp()));
    }
    Ok(writes)
}

/// Whether something is found wrong with a log.
fn is_refused(file: &[u8]) -> bool {
    ms::check(Cursor::new(file)).map_or(true, |report| !report.is_sound())
}

/// The bytes of a log that a checksum covers: all but what lies behind a block's entries.
fn covered(file: &[u8]) -> Vec<bool> {
    let mut covered = vec![true; file.len()];
    let mut at = file.len() - 4096;
    loop {
        let word = |from: usize| u64::from_le_bytes(file[from..from + 8].try_into().unwrap());
        let entries = (word(at + 8) & 0xffff_ffff) as usize;
        covered[at + 32 + entries * 32..at + 4096].fill(false);
        match word(at) as usize {
            0 => return covered,
            distance => at -= distance,
        }
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_writes_come_back(
        changes in prop::collection::vec(change(), 0..400),
        piece in 1..5000_usize,
    ) {
        let file = log_of(&changes);
        let expected: Vec<_> = changes.iter().map(Change::expected).collect();
        prop_assert_eq!(read_all(&file, piece).unwrap(), expected);
        let report = ms::check(Cursor::new(&file)).unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.findings);
        prop_assert_eq!(report.entries, changes.len() as u64);
        prop_assert_eq!(report.header.unwrap().entries, changes.len() as u64);
    }

    #[test]
    fn a_flipped_bit_is_found_where_a_checksum_covers_it(
        changes in prop::collection::vec(change(), 0..140),
        places in prop::collection::vec((any::<prop::sample::Index>(), 0..8_u8), 40),
    ) {
        let mut file = log_of(&changes);
        let covered = covered(&file);
        prop_assert!(!is_refused(&file));
        for (index, bit) in places {
            let at = index.index(file.len());
            file[at] ^= 1 << bit;
            prop_assert_eq!(is_refused(&file), covered[at], "byte {} bit {}", at, bit);
            // Reading stops before it hands out what the flip changed as if it were whole.
            prop_assert_eq!(read_all(&file, 4096).is_err(), covered[at]);
            file[at] ^= 1 << bit;
        }
    }

    #[test]
    fn a_cut_is_found(
        changes in prop::collection::vec(change(), 0..20),
        place in any::<prop::sample::Index>(),
    ) {
        let file = log_of(&changes);
        prop_assert!(is_refused(&file[..place.index(file.len())]));
    }

    #[test]
    fn bytes_behind_the_end_are_let_be(changes in prop::collection::vec(change(), 0..20)) {
        let mut file = log_of(&changes);
        file.extend_from_slice(&[7; 1000]);
        prop_assert!(!is_refused(&file));
    }

    #[test]
    fn random_bytes_never_panic(
        mut file in prop::collection::vec(any::<u8>(), 0..20_000),
        looks_like_one in any::<bool>(),
        eol in any::<u64>(),
        metadata_size in prop_oneof![Just(512), Just(1024), any::<u32>()],
    ) {
        if looks_like_one && file.len() >= 4096 {
            // Past the header's checksum, so that what lies behind it is reached.
            let mut header = Reader::open(Cursor::new(log_of(&[]))).unwrap().header().clone();
            header.end_of_log = FileOffset::new(eol % (file.len() as u64 + 2));
            header.metadata_size = metadata_size;
            file[..4096].copy_from_slice(&*header.encode());
        }
        let _ = read_all(&file, 512);
        let _ = ms::check(Cursor::new(&file));
    }

    #[test]
    fn a_garbled_log_never_panics(
        changes in prop::collection::vec(change(), 0..20),
        garbles in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..50),
    ) {
        let mut file = log_of(&changes);
        for (index, byte) in garbles {
            let at = 4096 + index.index(file.len() - 4096);
            file[at] = byte;
        }
        let _ = read_all(&file, 512);
        let _ = ms::check(Cursor::new(&file));
    }
}

fn at(offset: u64, len: u64) -> Change {
    let data = vec![3; len as usize];
    Change::Data(ByteOffset::new(offset), data, Timestamp::from_nanos(0))
}

#[test]
fn a_log_that_was_not_closed_says_so() {
    let mut file = log_of(&[at(0, 512)]);
    let mut header = Reader::open(Cursor::new(&file)).unwrap().header().clone();
    header.end_of_log = FileOffset::ZERO;
    file[..4096].copy_from_slice(&*header.encode());
    assert!(matches!(read_all(&file, 512), Err(Error::NotClosed)));
    assert!(matches!(
        ms::check(Cursor::new(&file)),
        Err(Error::NotClosed)
    ));
}

#[test]
fn version_1_is_read() {
    let mut file = log_of(&[at(512, 512)]);
    let mut header = Reader::open(Cursor::new(&file)).unwrap().header().clone();
    header.version = ms::FormatVersion::V1;
    file[..4096].copy_from_slice(&*header.encode());
    assert_eq!(read_all(&file, 512).unwrap().len(), 1);
    assert!(ms::check(Cursor::new(&file)).unwrap().is_sound());
}

#[test]
fn what_is_unknown_is_named() {
    let file = log_of(&[]);
    for (at, bytes, said) in [
        (
            8,
            &0x0003_0000_u32.to_le_bytes()[..],
            "format version 0x00030000",
        ),
        (104, &2_u32.to_le_bytes()[..], "file type 2"),
        (108, &1_u16.to_le_bytes()[..], "flags 0x0001"),
    ] {
        let mut file = file.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        let sum = ms::checksum(&[&file[..40], &file[44..4096]]);
        file[40..44].copy_from_slice(&sum.to_le_bytes());
        let error = ms::check(Cursor::new(&file)).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn absent_data_checksums_are_let_pass_and_counted() {
    let mut file = log_of(&[at(512, 512)]);
    // Behind header and empty block: 512 bytes of data, then the metadata.
    let entry = 8192 + 512 + 32;
    file[entry + 21..entry + 25].fill(0);
    let sum = ms::checksum(&[&file[entry..entry + 8], &file[entry + 12..entry + 32]]);
    file[entry + 8..entry + 12].copy_from_slice(&sum.to_le_bytes());
    file[8192] ^= 1;
    let report = ms::check(Cursor::new(&file)).unwrap();
    assert!(report.is_sound());
    assert_eq!(report.without_checksum, 1);
}

#[test]
fn a_check_goes_on_behind_damage() {
    let changes: Vec<_> = (0..300).map(|n| at(n * 512, 512)).collect();
    let mut file = log_of(&changes);
    file[200] ^= 1; // the header
    file[8192] ^= 1; // the first write's data
    let second_block = 8192 + 127 * 512 + 4096 + 127 * 512;
    file[second_block + 32 + 3 * 32] ^= 1; // its fourth entry
    file[second_block + 32 + 90 * 32] ^= 1; // its ninety-first
    let report = ms::check(Cursor::new(&file)).unwrap();
    let damages: Vec<_> = report
        .findings
        .iter()
        .map(|finding| finding.damage)
        .collect();
    assert_eq!(
        damages,
        [
            Damage::HeaderChecksum,
            Damage::DataChecksum,
            Damage::EntryChecksum,
            Damage::EntryChecksum
        ]
    );
    assert_eq!(report.entries, 127 + 3 + 46);
}

#[test]
fn a_length_that_runs_into_the_metadata_is_refused() {
    let mut file = log_of(&[at(0, 512), at(512, 512)]);
    let entry = 8192 + 1024 + 32 + 32;
    file[entry + 12..entry + 16].copy_from_slice(&513_u32.to_le_bytes());
    let sum = ms::checksum(&[&file[entry..entry + 8], &file[entry + 12..entry + 32]]);
    file[entry + 8..entry + 12].copy_from_slice(&sum.to_le_bytes());
    let report = ms::check(Cursor::new(&file)).unwrap();
    assert_eq!(report.findings[0].damage, Damage::DataOverlap(513));
    assert_eq!(report.findings[0].at.get(), entry as u64);
}

#[test]
fn a_write_past_the_last_address_is_refused() {
    let mut writer = Writer::create(Cursor::new(Vec::new()), &WriterOptions::default()).unwrap();
    let end = ByteOffset::new(u64::MAX);
    let error = writer
        .write(end, &[1, 2], Timestamp::from_nanos(0))
        .unwrap_err();
    assert!(matches!(error, Error::TooLong { .. }), "{error}");
}

/// Counts what is written and keeps the structures only, so that gigabytes cost nothing.
#[derive(Default)]
struct Sparse {
    position: u64,
    kept: Vec<(u64, Vec<u8>)>,
}

impl std::io::Write for Sparse {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.iter().any(|byte| *byte != 0) {
            self.kept.push((self.position, bytes.to_vec()));
        }
        self.position += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl std::io::Seek for Sparse {
    fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
        assert_eq!(to, std::io::SeekFrom::Start(0));
        self.position = 0;
        Ok(0)
    }
}

#[test]
fn zeroes_of_4_gib_and_more_are_split() {
    let mut writer = Writer::create(Sparse::default(), &WriterOptions::default()).unwrap();
    let extent = Extent::new(ByteOffset::new(4096), ByteLen::new(9 << 30)).unwrap();
    writer.zeroes(extent, Timestamp::from_nanos(0)).unwrap();
    let sparse = writer.finish().unwrap();
    let [.., (_, block), (0, header)] = &sparse.kept[..] else {
        panic!("{:?}", sparse.kept.len());
    };
    let entries = block[32..].chunks(32).take_while(|entry| entry[20] == 1);
    let mut next = 4096;
    for bytes in entries {
        let entry = ms::Entry::decode(bytes.try_into().unwrap()).unwrap();
        assert_eq!(entry.extent.offset().get(), next);
        next = entry.extent.end().get();
    }
    assert_eq!(next, extent.end().get());
    let header = Header::decode(header[..].try_into().unwrap()).unwrap();
    assert_eq!(header.entries, 3);
    assert_eq!(header.end_of_log.get(), 8192 + (9 << 30) + 4096);
}
