//! What the property tests share: sequences of records to try, and a model of the volume
//! that they leave behind, byte for byte.
#![allow(dead_code, reason = "each test uses a part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

pub mod forge;
pub mod listing;

use hrl_format::id::{Generation, GenerationId, GroupId, LogId, PointId, VolumeId};
use hrl_format::layout::PAGE;
use hrl_format::record::{Consistency, Record, Root, Tag};
use hrl_format::units::{
    BlockSize, ByteLen, ByteOffset, Epoch, Extent, FrameNumber, GenerationNumber, SectorSize,
    Timestamp, VolumeSize,
};
use hrl_format::{
    ChainEnd, Compression, Ending, EpochRange, ExtentKind, FrameBuffer, IndexEntry, Log, LogHeader,
    LogOptions, LogWriter, ReadAt, RecordOrder, Scanner, Seal, SealDigest, VolumeKey,
};
use proptest::prelude::*;

pub const VOLUME: u64 = 1 << 20;
/// The key of encrypted logs.
pub const KEY: [u8; 32] = [0x42; 32];

/// Property tests run as often as `REPLICA_CASES` says.
pub fn cases() -> ProptestConfig {
    let cases = std::env::var("REPLICA_CASES")
        .ok()
        .and_then(|text| text.parse().ok());
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases.unwrap_or(64))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    Plain,
    Lz4,
    Encrypted,
    EncryptedLz4,
}

pub const FLAVOURS: [Flavour; 4] = [
    Flavour::Plain,
    Flavour::Lz4,
    Flavour::Encrypted,
    Flavour::EncryptedLz4,
];

impl Flavour {
    pub fn key(self) -> Option<VolumeKey> {
        matches!(self, Self::Encrypted | Self::EncryptedLz4).then(|| VolumeKey::from_bytes(KEY))
    }

    pub fn options(self) -> LogOptions {
        let lz4 = matches!(self, Self::Lz4 | Self::EncryptedLz4);
        LogOptions {
            compression: if lz4 {
                Compression::Lz4
            } else {
                Compression::None
            },
        }
    }
}

pub fn flavour() -> impl Strategy<Value = Flavour> {
    prop::sample::select(&FLAVOURS[..])
}

/// A record with its data, and when.
pub type Timed = (Record<Vec<u8>>, Timestamp);

/// Sequences of records, in which resizes come now and then, and every extent is within
/// the size that holds where it stands.
pub fn records(most: usize) -> impl Strategy<Value = Vec<Timed>> {
    let step = (
        0u8..100,
        any::<u64>(),
        any::<u64>(),
        any::<u8>(),
        any::<i64>(),
    );
    prop::collection::vec(step, 0..most).prop_map(|steps| {
        let mut size = VOLUME;
        steps
            .into_iter()
            .map(|(kind, a, b, fill, time)| (record(kind, a, b, fill, &mut size), time))
            .map(|(record, time)| (record, Timestamp::from_nanos(time)))
            .collect()
    })
}

fn record(kind: u8, a: u64, b: u64, fill: u8, size: &mut u64) -> Record<Vec<u8>> {
    // Most extents are short and meet in the same few places; some are long.
    let longest = if b.is_multiple_of(16) {
        300 << 10
    } else {
        6 << 10
    };
    let offset = if a.is_multiple_of(4) {
        a >> 2
    } else {
        (a >> 2) % (96 << 10)
    } % *size;
    let len = (1 + (b >> 8) % longest).min(*size - offset);
    let extent = extent(offset, len);
    match kind {
        0..60 => {
            let noise = fill.is_multiple_of(2);
            let byte = |n: u64| if noise { mix(n ^ a) } else { fill };
            Record::Write {
                extent,
                data: (0..len).map(byte).collect(),
            }
        }
        60..75 => Record::Zeroes { extent },
        75..90 => Record::Discard { extent },
        90..96 => Record::Tag(tag(a, b, fill)),
        _ => {
            *size = 1 + b % VOLUME;
            Record::Resize {
                size: VolumeSize::new(*size),
            }
        }
    }
}

fn mix(n: u64) -> u8 {
    (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn tag(a: u64, b: u64, fill: u8) -> Tag {
    let mut id = [fill; 16];
    id[..8].copy_from_slice(&a.to_le_bytes());
    Tag {
        id: PointId::from_bytes(id),
        time: Timestamp::from_nanos(b as i64),
        consistency: [
            Consistency::Crash,
            Consistency::Filesystem,
            Consistency::Application,
        ][fill as usize % 3],
        label: "é".repeat(fill as usize),
        group: a
            .is_multiple_of(2)
            .then(|| GroupId::from_bytes([fill | 1; 16])),
        root: b
            .is_multiple_of(2)
            .then(|| Root::from_bytes([fill | 1; 32])),
    }
}

pub fn extent(offset: u64, len: u64) -> Extent {
    Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap()
}

pub fn borrowed(record: &Record<Vec<u8>>) -> Record<&[u8]> {
    match record {
        Record::Write { extent, data } => Record::Write {
            extent: *extent,
            data,
        },
        Record::Zeroes { extent } => Record::Zeroes { extent: *extent },
        Record::Discard { extent } => Record::Discard { extent: *extent },
        Record::Tag(tag) => Record::Tag(tag.clone()),
        Record::Resize { size } => Record::Resize { size: *size },
    }
}

pub fn owned(record: &Record<&[u8]>) -> Record<Vec<u8>> {
    match record {
        Record::Write { extent, data } => Record::Write {
            extent: *extent,
            data: data.to_vec(),
        },
        Record::Zeroes { extent } => Record::Zeroes { extent: *extent },
        Record::Discard { extent } => Record::Discard { extent: *extent },
        Record::Tag(tag) => Record::Tag(tag.clone()),
        Record::Resize { size } => Record::Resize { size: *size },
    }
}

pub fn header() -> LogHeader {
    let volume = VolumeId::from_bytes([7; 16]);
    LogHeader::new(volume, VolumeSize::new(VOLUME), Epoch::new(1)).unwrap()
}

/// Headers of all kinds, of a volume of that size.
pub fn any_header() -> impl Strategy<Value = LogHeader> {
    let ids = prop::array::uniform5(any::<[u8; 16]>());
    let numbers = (any::<u64>(), 0..u64::MAX, any::<u64>(), any::<i64>());
    let seals = prop::array::uniform2(any::<Option<[u8; 32]>>());
    let sizes = (12u32..=20, 9u32..=16);
    (ids, numbers, seals, sizes).prop_map(|(ids, numbers, seals, (block, sector))| {
        let [log, previous, stands_for, volume, generation] = ids;
        let (first, more, number, created) = numbers;
        let [previous_seal, stands_for_seal] = seals.map(|seal| seal.map(SealDigest::from_bytes));
        // An even byte decides whether there is one.
        let some = |id: [u8; 16]| id[0].is_multiple_of(2).then_some(LogId::from_bytes(id));
        let (low, high) = (Epoch::new(first.min(more)), Epoch::new(first.max(more)));
        // An odd epoch is in order, and the log's only one.
        let (order, last) = if first.is_multiple_of(2) {
            (RecordOrder::AsRead, high)
        } else {
            (RecordOrder::AsCompleted, low)
        };
        let epochs = EpochRange { first: low, last };
        LogHeader {
            log: LogId::from_bytes(log),
            previous: some(previous),
            previous_seal,
            stands_for: some(stands_for).map(|log| ChainEnd {
                log,
                seal: stands_for_seal,
            }),
            volume: VolumeId::from_bytes(volume),
            generation: Generation {
                number: GenerationNumber::new(number),
                id: GenerationId::from_bytes(generation),
            },
            epochs,
            order,
            block: BlockSize::new(1 << block).unwrap(),
            sector: SectorSize::new(1 << sector).unwrap(),
            volume_size: VolumeSize::new(VOLUME),
            created: Timestamp::from_nanos(created),
            key: None,
        }
    })
}

/// Writes and seals a log.
pub fn write_log(header: LogHeader, records: &[Timed], flavour: Flavour) -> (Vec<u8>, Seal) {
    let key = flavour.key();
    let mut writer =
        LogWriter::create(Vec::new(), header, &flavour.options(), key.as_ref()).unwrap();
    for (n, (record, time)) in records.iter().enumerate() {
        writer.append(&borrowed(record), *time).unwrap();
        // Frames of all lengths.
        if n % 7 == 3 {
            writer.flush().unwrap();
        }
    }
    writer.seal().unwrap()
}

/// Consecutive logs over `records`, cut behind those that `cuts` names.
pub fn chain(records: &[Timed], cuts: &[usize], flavour: Flavour) -> Vec<Log<Vec<u8>>> {
    let mut cuts: Vec<_> = cuts.iter().map(|&cut| cut.min(records.len())).collect();
    cuts.extend([0, records.len()]);
    cuts.sort_unstable();
    let mut logs: Vec<Log<Vec<u8>>> = Vec::new();
    for window in cuts.windows(2) {
        let mut next = header();
        if let Some(last) = logs.last() {
            let end = last.header().chain_end(last.seal().digest);
            (next.previous, next.previous_seal) = (Some(end.log), end.seal);
            next.epochs = EpochRange::single(last.header().epochs.last.next());
            next.volume_size = last.seal().volume_size;
        }
        let (file, _) = write_log(next, &records[window[0]..window[1]], flavour);
        let log = Log::open(file, flavour.key().as_ref()).unwrap();
        if let Some(last) = logs.last() {
            last.header()
                .check_followed_by(last.seal().digest, log.header())
                .unwrap();
        }
        logs.push(log);
    }
    logs
}

/// What a volume is, byte by byte, as far as logs say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    pub bytes: Vec<Byte>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Byte {
    Untouched,
    Written(u8),
    Zero,
    Undefined,
}

impl Model {
    pub fn new(size: VolumeSize) -> Self {
        Self {
            bytes: vec![Byte::Untouched; size.get() as usize],
        }
    }

    pub fn apply<D: AsRef<[u8]>>(&mut self, record: &Record<D>) {
        let range = |extent: Extent| extent.offset().get() as usize..extent.end().get() as usize;
        match record {
            Record::Write { extent, data } => {
                for (byte, &new) in self.bytes[range(*extent)].iter_mut().zip(data.as_ref()) {
                    *byte = Byte::Written(new);
                }
            }
            Record::Zeroes { extent } => self.bytes[range(*extent)].fill(Byte::Zero),
            Record::Discard { extent } => self.bytes[range(*extent)].fill(Byte::Undefined),
            Record::Resize { size } => self.bytes.resize(size.get() as usize, Byte::Undefined),
            Record::Tag(_) => {}
        }
    }

    /// Puts what an index entry of `log` says.
    pub fn put<R: ReadAt>(&mut self, log: &Log<R>, entry: &IndexEntry, frame: &mut FrameBuffer) {
        let (start, len) = (entry.extent.offset().get() as usize, entry.extent.len());
        let bytes = &mut self.bytes[start..start + len.get() as usize];
        match entry.kind {
            ExtentKind::Zeroes => bytes.fill(Byte::Zero),
            ExtentKind::Discard => bytes.fill(Byte::Undefined),
            ExtentKind::Write => {
                log.read_frame(entry.frame, frame).unwrap();
                let data = frame.slice(entry.at, len).unwrap();
                for (byte, &new) in bytes.iter_mut().zip(data) {
                    *byte = Byte::Written(new);
                }
            }
        }
    }

    pub fn of(size: VolumeSize, records: &[Timed]) -> Self {
        let mut model = Self::new(size);
        records.iter().for_each(|(record, _)| model.apply(record));
        model
    }

    /// As a sealed log's index says it is.
    pub fn by_index<R: ReadAt>(log: &Log<R>) -> Self {
        let mut model = Self::new(log.seal().volume_size);
        let mut frame = FrameBuffer::new();
        let mut end = ByteOffset::ZERO;
        for entry in log.index() {
            let entry = entry.unwrap();
            assert!(entry.extent.offset() >= end, "ascending and disjoint");
            end = entry.extent.end();
            model.put(log, &entry, &mut frame);
        }
        model
    }
}

/// A sealed log's recovery points.
pub fn tags<R: ReadAt>(log: &Log<R>) -> Vec<Tag> {
    log.tags().map(Result::unwrap).collect()
}

/// All records of a log, and how it ends.
pub fn scan(file: &[u8], key: Option<&VolumeKey>) -> (Vec<Timed>, Ending) {
    let mut scanner = Scanner::new(file, key).unwrap();
    let mut records = Vec::new();
    let mut next = 0;
    while let Some(entry) = scanner.next_record().unwrap() {
        assert_eq!(entry.sequence.get(), next);
        next += 1;
        records.push((owned(&entry.record), entry.time));
    }
    (records, scanner.ending().unwrap().clone())
}

/// Joins writes that follow one another at once, as the writer may have split them; of the
/// same time, so that others stay apart.
pub fn rejoin(records: Vec<Timed>) -> Vec<Timed> {
    let mut joined: Vec<Timed> = Vec::new();
    for (record, time) in records {
        if let (
            Record::Write { extent, data },
            Some((
                Record::Write {
                    extent: before,
                    data: held,
                },
                at,
            )),
        ) = (&record, joined.last_mut())
            && before.end() == extent.offset()
            && *at == time
        {
            *before = Extent::between(before.offset(), extent.end());
            held.extend_from_slice(data);
            continue;
        }
        joined.push((record, time));
    }
    joined
}

pub fn frame(n: u32) -> FrameNumber {
    FrameNumber::new(n)
}

/// A change to a file: where, and to what. Most are aimed at what is not data.
#[derive(Clone, Debug)]
pub struct Lie {
    page: prop::sample::Index,
    within: usize,
    value: u64,
    len: usize,
}

impl Lie {
    pub fn tell(&self, file: &mut [u8]) {
        let page = self.page.index(file.len().div_ceil(PAGE));
        let at = (page * PAGE + self.within).min(file.len());
        let end = (at + self.len).min(file.len());
        let value = self.value.to_le_bytes();
        file[at..end].copy_from_slice(&value[..end - at]);
    }
}

pub fn lie() -> impl Strategy<Value = Lie> {
    let value = prop_oneof![
        any::<u64>(),
        0..8u64,
        4000..5000u64,
        Just(u64::MAX),
        Just(u64::MAX - 4095),
        (0..64u32).prop_map(|shift| 1 << shift),
        (0..64u64).prop_map(|n| n * PAGE as u64),
    ];
    let within = prop_oneof![0..256usize, 4000..PAGE, 0..PAGE];
    let len = prop::sample::select(vec![1usize, 2, 4, 8]);
    (any::<prop::sample::Index>(), within, value, len).prop_map(|(page, within, value, len)| Lie {
        page,
        within,
        value,
        len,
    })
}
