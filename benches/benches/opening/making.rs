//! The store that is measured: a base, the logs, written with the format's own writer, the catalogue
//! as text, and the levels, made by the store's own writer.

use std::fmt::Write as _;
use std::fs;
use std::io::BufWriter;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hrl_format::id::{LogId, PointId};
use hrl_format::record::{Consistency, Record, Tag};
use hrl_format::units::{
    BlockSize, ByteLen, ByteOffset, Epoch, Extent, SectorSize, Timestamp, VolumeSize,
};
use hrl_format::{EpochRange, Log, LogHeader, LogOptions, LogWriter, RecordOrder};
use libreplica::geometry::Geometry;
use libreplica::store::{FoldStep, Store, VolumeSpec, VolumeWriter};
use replica_bench::{Numbers, noise};

/// What the volume is called.
pub const NAME: &str = "bench";

/// A store of one volume without levels.
pub struct Shape {
    pub size: u64,
    pub logs: u64,
    pub extents: u64,
    pub extent: u64,
    /// Of so many extents one is data, the others zeroes.
    pub data_in: u64,
    /// How much of the base is data.
    pub base: usize,
    /// Up to how many logs the points go that are measured; the rest may be left sparse.
    pub measured: Vec<u64>,
}

/// How many files become one of the next level.
pub const RADIX: u64 = 16;
/// How many logs are made before the levels are, and what is not needed any more is let go of.
const BATCH: u64 = 1024;

pub fn volume_of(store: &Path) -> PathBuf {
    let mut volumes = fs::read_dir(store.join("volumes")).unwrap();
    volumes.next().unwrap().unwrap().path()
}

/// Point `n` is so many nanoseconds old.
pub fn point_time(n: u64) -> i64 {
    1_700_000_000_000_000_000 + n as i64 * 1_000_000_000
}

/// A store that grows.
struct Making<'a> {
    shape: &'a Shape,
    folder: PathBuf,
    /// The catalogue's body without logs and points but the base's.
    body: String,
    header: LogHeader,
    logs: String,
    points: String,
    numbers: Numbers,
    /// How many logs there are.
    count: u64,
}

/// Makes the store: a base, the logs, the catalogue that names them, and the levels. How long the
/// longest step of those took.
pub fn make(path: &Path, shape: &Shape) -> Duration {
    let store = Store::create(path).unwrap();
    let geometry = Geometry {
        size: VolumeSize::new(shape.size),
        block: BlockSize::MIN,
        sector: SectorSize::B512,
    };
    let id = store
        .create_volume(VolumeSpec::new(NAME, geometry).unwrap())
        .unwrap();
    let mut writer = store.volume_writer(id, None).unwrap();
    let mut baseline = writer.begin_baseline().unwrap();
    baseline
        .write(ByteOffset::ZERO, &noise(shape.base))
        .unwrap();
    baseline.finish().unwrap();
    let mut header = LogHeader::new(id, geometry.size, Epoch::ZERO).unwrap();
    let catalogue = writer.catalogue();
    header.generation = catalogue.generation.generation();
    header.block = geometry.block;
    header.epochs = EpochRange::single(catalogue.last_epoch().next());
    header.order = RecordOrder::AsRead;
    let base = catalogue.last_epoch().get();
    drop(writer);
    let folder = volume_of(path);
    let copy = fs::read_to_string(folder.join("catalogue.0")).unwrap();
    let (_, body) = copy.split_once('\n').unwrap();
    let mut making = Making {
        shape,
        body: body.to_owned(),
        folder,
        header,
        logs: String::new(),
        points: point(
            0,
            PointId::at(Timestamp::from_nanos(point_time(0))).unwrap(),
            base,
            shape,
        ),
        numbers: Numbers::default(),
        count: 0,
    };
    let mut longest = Duration::ZERO;
    while making.count < shape.logs {
        for _ in 0..BATCH.min(shape.logs - making.count) {
            making.log();
        }
        making.list();
        let mut writer = store.volume_writer(id, None).unwrap();
        longest = longest.max(levels(&mut writer));
        making.thin_out();
    }
    // What is not on the medium cannot be taken out of the page cache.
    nix::unistd::syncfs(fs::File::open(path).unwrap()).unwrap();
    longest
}

/// Has the levels made; how long the longest step took.
fn levels(writer: &mut VolumeWriter) -> Duration {
    let mut longest = Duration::ZERO;
    loop {
        let started = Instant::now();
        match writer.fold_step().unwrap() {
            FoldStep::Nothing => return longest,
            FoldStep::Indexed => longest = longest.max(started.elapsed()),
            other => panic!("nothing else was to be done: {other:?}"),
        }
    }
}

impl Making<'_> {
    /// Writes the next log, and its point.
    fn log(&mut self) {
        let (shape, header) = (self.shape, &self.header);
        let path = self.folder.join("logs").join(name_of(header));
        let file = fs::File::create(&path).unwrap();
        let out = BufWriter::with_capacity(1 << 20, file);
        let mut log = LogWriter::create(out, header.clone(), &LogOptions::default(), None).unwrap();
        let time = Timestamp::from_nanos(point_time(self.count + 1));
        let mut places: Vec<u64> = self.numbers.by_ref().take(shape.extents as usize).collect();
        for place in &mut places {
            *place = *place % (shape.size / shape.extent) * shape.extent;
        }
        // As an epoch is read from the device.
        let data_count = shape.extents.div_ceil(shape.data_in) as usize;
        let (written, zeroes) = places.split_at_mut(data_count);
        written.sort_unstable();
        zeroes.sort_unstable();
        let data = vec![self.count as u8 | 1; shape.extent as usize];
        let extent =
            |place: &u64| Extent::new(ByteOffset::new(*place), ByteLen::new(shape.extent)).unwrap();
        for extent in written.iter().map(extent) {
            log.append(
                &Record::Write {
                    extent,
                    data: &data[..],
                },
                time,
            )
            .unwrap();
        }
        let id = PointId::at(time).unwrap();
        let tag = Tag {
            id,
            time,
            consistency: Consistency::Crash,
            label: String::new(),
            group: None,
            root: None,
        };
        log.append(&Record::Tag(tag), time).unwrap();
        log.flush().unwrap();
        let sparse_from = log.bytes_written();
        for extent in zeroes.iter().map(extent) {
            log.append(&Record::Zeroes { extent }, time).unwrap();
        }
        let sparse_to = log.bytes_written() / 4096 * 4096;
        let (_, seal) = log.seal().unwrap();
        punch(&path, sparse_from, sparse_to);
        let epoch = header.epochs.first.get();
        let comma = if self.count == 0 { "" } else { "," };
        write!(
            self.logs,
            r#"{comma}{{"log":"{}","seal":"{}","stands_for":null,"first_epoch":{epoch},"last_epoch":{epoch},"size_bytes":{},"bytes":{},"covers_bytes":{},"order":"as-read","settled":true}}"#,
            header.log, seal.digest, shape.size, seal.file_len, shape.extents * shape.extent,
        )
        .unwrap();
        self.count += 1;
        self.points.push(',');
        self.points.push_str(&point(self.count, id, epoch, shape));
        self.header.previous = Some(self.header.log);
        self.header.previous_seal = Some(seal.digest);
        self.header.log = LogId::random().unwrap();
        self.header.epochs = EpochRange::single(self.header.epochs.first.next());
    }

    /// Puts logs and points into the catalogue.
    fn list(&self) {
        let (logs, points) = (&self.logs, &self.points);
        let body = self
            .body
            .replace(r#""logs":[]"#, &format!(r#""logs":[{logs}]"#));
        let body = body.replace(r#""points":[]"#, &format!(r#""points":[{points}]"#));
        let head = format!("replica-catalogue 1 {} {}", 99 + self.count, body.len());
        let crc = crc32fast::hash(format!("{head}{body}").as_bytes());
        for name in ["catalogue.0", "catalogue.1"] {
            fs::write(self.folder.join(name), format!("{head} {crc:08x}\n{body}")).unwrap();
        }
    }

    /// Makes holes of what was merged into a longer file, and no measured point is read through.
    fn thin_out(&self) {
        let begin = self.header.epochs.first.get() - self.count;
        for entry in fs::read_dir(self.folder.join("levels")).unwrap() {
            let path = entry.unwrap().path();
            let Some((level, first, logs)) = level_of(&path) else {
                continue;
            };
            let start = first - begin;
            if self.is_done_with(level, start, start + logs) {
                punch(&path, 4096, fs::metadata(&path).unwrap().len());
            }
        }
        for entry in fs::read_dir(self.folder.join("logs")).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            let start = u64::from_str_radix(&name[..16], 16).unwrap() - begin;
            if self.is_done_with(0, start, start + 1) {
                let log = Log::open(fs::File::open(&path).unwrap(), None).unwrap();
                // docs/hrl-format.md: the directory, 84 entries a page, then the index, 127 a page.
                let index =
                    log.frames_end().get() + u64::from(log.seal().frames).div_ceil(84) * 4096;
                punch(
                    &path,
                    index,
                    index + log.seal().index_len.div_ceil(127) * 4096,
                );
            }
        }
    }

    fn is_done_with(&self, level: u32, start: u64, end: u64) -> bool {
        let longer = RADIX.pow(level + 1);
        let merged = start / longer * longer + longer <= self.count;
        let needed = |&count: &u64| start >= count / longer * longer && end <= count;
        merged && !self.shape.measured.iter().any(needed)
    }
}

/// What a level file says of itself: its level, its first epoch, and how many logs it is of.
fn level_of(path: &Path) -> Option<(u32, u64, u64)> {
    if path.extension()? != "lvl" {
        return None;
    }
    let mut page = [0; 88];
    fs::File::open(path)
        .unwrap()
        .read_exact_at(&mut page, 0)
        .unwrap();
    let long = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    Some((long(64) as u32, long(80), long(72)))
}

fn name_of(header: &LogHeader) -> String {
    format!("{:016x}-{}.hrl", header.epochs.first.get(), header.log)
}

/// Gives back the room of these bytes of a file.
fn punch(path: &Path, from: u64, to: u64) {
    use nix::fcntl::{FallocateFlags, fallocate};
    if from < to {
        let file = fs::OpenOptions::new().write(true).open(path).unwrap();
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, mode, from as i64, (to - from) as i64).unwrap();
    }
}

/// The catalogue's words for the point behind `n` logs.
fn point(n: u64, id: PointId, epoch: u64, shape: &Shape) -> String {
    let time = rfc3339(point_time(n) / 1_000_000_000);
    format!(
        r#"{{"id":"{id}","epoch":{epoch},"time":"{time}","consistency":"crash","label":"","group":null,"root":null,"size_bytes":{},"bytes":4096}}"#,
        shape.size,
    )
}

/// Seconds since 1970, as the catalogue has them.
fn rfc3339(seconds: i64) -> String {
    // From 2023-11-14T22:13:20Z on, in days of March to February (Hinnant).
    let days = seconds / 86_400 + 719_468;
    let era = days / 146_097;
    let day = days % 146_097;
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let (day, month) = (
        of_year - (153 * shifted + 2) / 5 + 1,
        (shifted + 2) % 12 + 1,
    );
    let year = year + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}
