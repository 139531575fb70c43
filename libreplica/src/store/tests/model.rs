//! The store against a model in memory: random epochs, points, retention, folds, reopenings and
//! restores; every point must be at any time what the model says it was. `REPLICA_CASES` says how
//! many histories are tried, `REPLICA_SEED` which is the first.

use hrl_format::VolumeKey;
use hrl_format::id::PointId;
use hrl_format::record::{Consistency, Record, Root, Tag};
use hrl_format::units::{ByteLen, ByteOffset, Extent, Timestamp, VolumeSize};

use super::moments::KnownMoment;
use super::random::Random;
use super::tiers::Branch;
use super::{Scratch, geometry};
use crate::digest::{LeafFunction, RootBuilder};
use crate::policy::Retention;
use crate::store::{
    Baseline, EpochLog, FoldStep, PointReader, PointSelector, RestoreOptions, RestoreProof, Store,
    VolumeReader, VolumeSpec, VolumeWriter,
};

const SECTOR: u64 = 512;

/// A recovery point as the model remembers it.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) id: PointId,
    pub(super) time: Timestamp,
    pub(super) label: String,
    pub(super) root: Option<Root>,
    pub(super) image: Vec<u8>,
}

/// What the store must hold.
#[derive(Clone, Debug, Default)]
pub(super) struct Model {
    pub(super) image: Vec<u8>,
    pub(super) points: Vec<Known>,
    /// What could be had between points, whether or not it was given up since.
    pub(super) moments: Vec<KnownMoment>,
}

/// A store with one volume, and its model.
pub(super) struct History {
    pub(super) store: Store,
    pub(super) volume: hrl_format::id::VolumeId,
    pub(super) key: Option<VolumeKey>,
    pub(super) model: Model,
    pub(super) random: Random,
    /// How long the logs grow that the store makes of its own.
    pub(super) log_bytes: ByteLen,
    /// How many indexes are merged into one; so few that a few epochs make several levels.
    pub(super) radix: usize,
    clock: i64,
    /// The moments of the epoch that is being written.
    pub(super) pending: Vec<KnownMoment>,
}

/// So short that a few epochs fill a log.
pub(super) const SHORT: ByteLen = ByteLen::new(192 << 10);

impl History {
    /// A new store in `path`, its volume still without a base.
    pub(super) fn begin(path: &std::path::Path, key: Option<VolumeKey>, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let store = Store::create(path).unwrap();
        let size = (128 + random.below(512)) * SECTOR;
        let mut spec = VolumeSpec::new("model", geometry(size)).unwrap();
        spec.key = key.as_ref().map(VolumeKey::key_id);
        let volume = store.create_volume(spec).unwrap();
        Self {
            store,
            volume,
            key,
            model: Model {
                image: vec![0; size as usize],
                points: Vec::new(),
                moments: Vec::new(),
            },
            random,
            log_bytes: ByteLen::new(256 << 20),
            radix: 2,
            clock: 1_000,
            pending: Vec::new(),
        }
    }

    pub(super) fn writer(&self) -> VolumeWriter {
        let writer = self.store.volume_writer(self.volume, self.key.clone());
        self.limited(writer.unwrap())
    }

    /// The writer that needs no key.
    pub(super) fn keeper(&self) -> VolumeWriter {
        self.limited(self.store.volume_keeper(self.volume).unwrap())
    }

    fn limited(&self, mut writer: VolumeWriter) -> VolumeWriter {
        writer.log_bytes = self.log_bytes;
        writer.levels.radix = self.radix;
        writer.levels.step = 64;
        writer
    }

    pub(super) fn reader(&self) -> VolumeReader {
        self.store.volume(self.volume, self.key.clone()).unwrap()
    }

    /// Why the volume cannot be opened for reading.
    pub(super) fn reader_error(&self) -> crate::Error {
        self.store
            .volume(self.volume, self.key.clone())
            .unwrap_err()
    }

    /// The time of what happened last.
    pub(super) fn time(&self) -> Timestamp {
        Timestamp::from_nanos(self.clock * 1_000_000_000)
    }

    pub(super) fn now(&mut self) -> Timestamp {
        self.clock += 1;
        Timestamp::from_nanos(self.clock * 1_000_000_000)
    }

    /// Lets time pass.
    pub(super) fn wait(&mut self, seconds: i64) {
        self.clock += seconds;
    }

    /// Random sectors of the volume as it is now.
    fn extent(&mut self) -> Extent {
        let sectors = self.model.image.len() as u64 / SECTOR;
        let start = self.random.below(sectors);
        let len = 1 + self.random.below((sectors - start).min(200));
        extent(start * SECTOR, len * SECTOR)
    }

    fn bytes(&mut self, len: u64) -> Vec<u8> {
        // Whole sectors of one value, a third of them zeroes.
        let mut bytes = Vec::with_capacity(len as usize);
        while (bytes.len() as u64) < len {
            let value = self.random.below(300).saturating_sub(100) as u8;
            bytes.resize(bytes.len() + SECTOR as usize, value);
        }
        bytes
    }

    pub(super) fn baseline(&mut self, writer: &mut VolumeWriter) {
        let mut baseline = writer.begin_baseline().unwrap();
        for _ in 0..self.random.below(5) {
            let extent = self.extent();
            if self.random.coin() {
                let data = self.bytes(extent.len().get());
                baseline.write(extent.offset(), &data).unwrap();
                self.put(extent, &data);
            } else {
                baseline.zeroes(extent).unwrap();
                self.put(extent, &vec![0; extent.len().get() as usize]);
            }
        }
        baseline.finish().unwrap();
    }

    fn put(&mut self, extent: Extent, data: &[u8]) {
        let range = extent.offset().get() as usize..extent.end().get() as usize;
        self.model.image[range].copy_from_slice(data);
    }

    /// Random changes, and a point behind them three times out of four.
    pub(super) fn fill(&mut self, epoch: &mut EpochLog) {
        for _ in 0..self.random.below(12) {
            self.change(epoch);
            self.remember(epoch);
        }
        if self.random.below(4) > 0 {
            self.point(epoch);
        }
    }

    pub(super) fn change(&mut self, epoch: &mut EpochLog) {
        let time = self.now();
        let extent = self.extent();
        let zeroes = vec![0; extent.len().get() as usize];
        match self.random.below(9) {
            0 => {
                let sectors = 64 + self.random.below(640);
                let size = VolumeSize::new(sectors * SECTOR);
                epoch.append(&Record::Resize { size }, time).unwrap();
                self.model.image.resize(size.get() as usize, 0);
            }
            1 => {
                epoch.append(&Record::Zeroes { extent }, time).unwrap();
                self.put(extent, &zeroes);
            }
            2 => {
                epoch.append(&Record::Discard { extent }, time).unwrap();
                self.put(extent, &zeroes);
            }
            _ => {
                let data = self.bytes(extent.len().get());
                epoch
                    .append(
                        &Record::Write {
                            extent,
                            data: &data,
                        },
                        time,
                    )
                    .unwrap();
                self.put(extent, &data);
            }
        }
    }

    /// One byte all over an extent.
    pub(super) fn write(&mut self, epoch: &mut EpochLog, extent: Extent, byte: u8) {
        let (time, data) = (self.now(), vec![byte; extent.len().get() as usize]);
        epoch
            .append(
                &Record::Write {
                    extent,
                    data: &data,
                },
                time,
            )
            .unwrap();
        self.put(extent, &data);
    }

    /// The same in the first full copy.
    pub(super) fn write_baseline(&mut self, baseline: &mut Baseline<'_>, extent: Extent, byte: u8) {
        let data = vec![byte; extent.len().get() as usize];
        baseline.write(extent.offset(), &data).unwrap();
        self.put(extent, &data);
    }

    fn point(&mut self, epoch: &mut EpochLog) {
        let root = (self.random.below(3) > 0).then(|| self.root());
        self.tag(epoch, root);
    }

    pub(super) fn point_if_none(&mut self, epoch: &mut EpochLog) {
        if !epoch.has_point() {
            self.point_with_root(epoch);
        }
    }

    pub(super) fn point_with_root(&mut self, epoch: &mut EpochLog) {
        let root = self.root();
        self.tag(epoch, Some(root));
    }

    fn tag(&mut self, epoch: &mut EpochLog, root: Option<Root>) {
        let time = self.now();
        let tag = Tag {
            id: PointId::at(time).unwrap(),
            time,
            consistency: Consistency::Filesystem,
            label: format!("point {}", self.model.points.len()),
            group: None,
            root,
        };
        self.model.points.push(Known {
            id: tag.id,
            time,
            label: tag.label.clone(),
            root,
            image: self.model.image.clone(),
        });
        epoch.append(&Record::Tag(tag), time).unwrap();
    }

    fn root(&self) -> Root {
        let geometry = geometry(self.model.image.len() as u64);
        let mut root = RootBuilder::new(geometry, LeafFunction::for_volume(self.key.as_ref()));
        root.data(&self.model.image).unwrap();
        root.finish().unwrap()
    }

    pub(super) fn epoch(&mut self, writer: &mut VolumeWriter) {
        let order = self.order();
        let mut epoch = writer.begin_epoch_in(order).unwrap();
        self.fill(&mut epoch);
        let before = writer.catalogue().points.len();
        let committed = writer.commit(epoch).unwrap();
        self.keep_moments(writer);
        assert_eq!(writer.catalogue().last_epoch(), committed.epoch);
        assert_eq!(
            writer.catalogue().points.len(),
            before + committed.points.len()
        );
    }

    /// An epoch of which only the end counts, with a point.
    pub(super) fn epoch_as_read(&mut self, writer: &mut VolumeWriter) {
        let mut epoch = writer.begin_epoch().unwrap();
        self.fill(&mut epoch);
        self.forget();
        self.point_if_none(&mut epoch);
        writer.commit(epoch).unwrap();
    }

    /// Takes back the point that the last epoch brought, if it did.
    pub(super) fn take_back(&mut self, writer: &mut VolumeWriter) {
        let last = writer.catalogue().last_epoch();
        let newest = writer.catalogue().points.last();
        if let Some(id) = newest.filter(|point| point.epoch == last).map(|p| p.id) {
            writer.drop_point(id).unwrap();
            self.model.points.retain(|known| known.id != id);
        }
    }

    /// Opens one of the points, if there is one.
    pub(super) fn hold_a_point(&mut self) -> Option<PointReader> {
        let count = self.model.points.len() as u64;
        let pick = self.random.below(count.max(1)) as usize;
        let known = self.model.points.get(pick)?;
        Some(self.reader().open_point(known.id).unwrap())
    }

    /// Keeps some of the points, by a policy of tiers as often as by a count.
    pub(super) fn retain(&mut self, writer: &mut VolumeWriter) -> Vec<PointId> {
        let count = 1 + self.random.below(6);
        let (all, interval) = (1 + self.random.below(40), 1 + self.random.below(60));
        let age = interval + self.random.below(200);
        let policy = match self.random.below(4) {
            0 => format!("all:{all}s,{interval}s:{age}s"),
            1 => format!("{all}s,{interval}s:{age}s,{}s:{}s", 2 * interval, 2 * age),
            _ => format!("#{count}"),
        };
        self.retain_by(writer, &policy)
    }

    pub(super) fn retain_by(&mut self, writer: &mut VolumeWriter, policy: &str) -> Vec<PointId> {
        let policy: Retention = policy.parse().unwrap();
        let now = self.now();
        let before = writer.catalogue().points.clone();
        let retained = writer.retain(&policy, now).unwrap();
        self.model
            .points
            .retain(|known| !retained.dropped.contains(&known.id));
        self.give_up(&before, &retained, policy.moments_since(now));
        retained.leased
    }

    /// All points are there, and each is what it was.
    pub(super) fn check(&mut self) {
        let reader = self.reader();
        let points = reader.points().unwrap();
        let ids: Vec<_> = points.iter().map(|point| point.id).collect();
        let known: Vec<_> = self.model.points.iter().map(|known| known.id).collect();
        assert_eq!(ids, known);
        for (point, known) in points.iter().zip(&self.model.points) {
            assert_eq!((&point.label, point.root), (&known.label, known.root));
            assert_eq!(point.size.get() as usize, known.image.len());
            let mut open = reader.open_point(point.id).unwrap();
            same(&mut open, &known.image);
        }
    }

    /// Reads somewhere.
    pub(super) fn probe(&mut self, open: &mut PointReader, image: &[u8]) {
        for _ in 0..4 {
            let start = self.random.below(image.len() as u64) as usize;
            let len = 1 + self.random.below((image.len() - start) as u64) as usize;
            let mut bytes = vec![0xee; len];
            open.read_at(ByteOffset::new(start as u64), &mut bytes)
                .unwrap();
            assert!(bytes == image[start..start + len], "{len} bytes at {start}");
        }
    }
}

pub(super) fn extent(offset: u64, len: u64) -> Extent {
    Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap()
}

/// The whole of an open point is `image`.
pub(super) fn same(open: &mut PointReader, image: &[u8]) {
    let mut bytes = vec![0xee; image.len()];
    open.read_at(ByteOffset::ZERO, &mut bytes).unwrap();
    if let Some(at) = bytes.iter().zip(image).position(|(a, b)| a != b) {
        let state = open.state();
        panic!(
            "{state} differs at byte {at}: {} not {}",
            bytes[at], image[at]
        );
    }
    let mut at = ByteOffset::ZERO;
    for piece in open.pieces().unwrap() {
        let piece = piece.unwrap();
        assert_eq!(piece.extent.offset(), at, "no gap, no overlap");
        at = piece.extent.end();
    }
    assert_eq!(at.get() as usize, image.len());
}

pub(super) fn cases() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    let first = number("REPLICA_SEED").unwrap_or(1);
    first..first + number("REPLICA_CASES").unwrap_or(25)
}

fn live(seed: u64, key: Option<VolumeKey>) {
    let scratch = Scratch::in_memory();
    let mut history = History::begin(&scratch.path().join("store"), key, seed);
    if !seed.is_multiple_of(4) {
        history.log_bytes = SHORT;
    }
    let mut writer = history.writer();
    history.baseline(&mut writer);
    let mut held: Vec<(PointReader, Vec<u8>)> = Vec::new();
    let mut holding = Vec::new();
    let mut branches: Vec<Branch> = Vec::new();
    for _ in 0..40 {
        match history.random.below(14) {
            0 | 1 => {
                let leased = history.retain(&mut writer);
                let stands = |id| branches.iter().any(|branch: &Branch| branch.point == id);
                let is_held = |id: &PointId| holding.contains(id) || stands(*id);
                assert!(leased.iter().all(is_held));
                let points = &writer.catalogue().points;
                let is_listed = |id| points.iter().any(|point| point.id == id);
                assert!(branches.iter().all(|branch| is_listed(branch.point)));
            }
            2 => while writer.fold_step().unwrap() != FoldStep::Nothing {},
            3 => {
                drop(writer);
                writer = history.writer();
            }
            4 if !history.model.points.is_empty() => {
                let pick = history.random.below(history.model.points.len() as u64);
                let known = history.model.points[pick as usize].clone();
                held.push((history.reader().open_point(known.id).unwrap(), known.image));
                holding.push(known.id);
            }
            5 => {
                held.truncate(1);
                holding.truncate(1);
            }
            11 => {
                if let Some((open, image, point)) = history.hold_a_moment() {
                    held.push((open, image));
                    holding.push(point);
                }
            }
            12 => history.check_some_moments(),
            13 => match branches.pop() {
                Some(branch) if history.random.coin() => drop(branch),
                branch => branches.extend(branch.into_iter().chain(history.stand_on_a_point())),
            },
            6 => {
                drop(writer);
                let mut keeper = history.keeper();
                history.retain(&mut keeper);
                while keeper.fold_step().unwrap() != FoldStep::Nothing {}
                drop(keeper);
                writer = history.writer();
            }
            7 if held.is_empty() && branches.is_empty() => history.take_back(&mut writer),
            7 => {
                // An epoch that fails leaves no trace.
                let mut epoch = writer.begin_epoch().unwrap();
                let model = history.model.clone();
                history.fill(&mut epoch);
                history.forget();
                history.model = model;
            }
            _ => history.epoch(&mut writer),
        }
        for (open, image) in &mut held {
            history.probe(open, image);
        }
    }
    history.check();
    for (mut open, image) in held {
        same(&mut open, &image);
    }
    while writer.fold_step().unwrap() != FoldStep::Nothing {}
    history.check();
    history.check_moments();
    restore_all(&history, scratch.path());
    assert!(
        writer.catalogue().retired.is_empty(),
        "nobody reads any more"
    );
    let listed = writer.catalogue().logs.len();
    let logs = writer.folder.logs();
    assert_eq!(std::fs::read_dir(logs).unwrap().count(), listed);
    super::levels::no_file_is_left_over(&writer);
    // The same without the levels.
    std::fs::remove_dir_all(writer.folder.levels()).unwrap();
    history.check();
}

fn restore_all(history: &History, folder: &std::path::Path) {
    let reader = history.reader();
    for known in &history.model.points {
        let point = reader.point(PointSelector::AtOrBefore(known.time)).unwrap();
        assert_eq!(point.id, known.id);
        let output = folder.join(known.id.to_string());
        let mut last = 0;
        let restored = reader
            .restore(
                point.id,
                &output,
                &RestoreOptions::default(),
                &mut |progress| {
                    last = progress.done.get();
                },
            )
            .unwrap();
        assert_eq!(restored.proof == RestoreProof::Root, known.root.is_some());
        assert_eq!(last as usize, known.image.len());
        assert!(std::fs::read(&output).unwrap() == known.image);
    }
}

#[test]
fn a_plain_volume_is_what_the_model_says() {
    for seed in cases() {
        println!("REPLICA_SEED={seed}");
        live(seed, None);
    }
}

#[test]
fn an_encrypted_volume_is_what_the_model_says() {
    for seed in cases() {
        println!("REPLICA_SEED={seed}");
        live(seed, Some(VolumeKey::from_bytes([seed as u8; 32])));
    }
}
