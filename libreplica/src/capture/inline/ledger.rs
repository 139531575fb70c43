//! Which blocks changed and are not yet in the store: three bitmaps in one file that is
//! mapped and shared, so that they outlive a process that is killed. They work as those in
//! the kernel do (see `capture/tracker.rs`): changes are marked in one of two; a swap makes
//! the other active and adds what the old one has to the third, the epoch's, which is
//! cleared only when the store has the epoch. So at every instant the union of the three is
//! all that was written since the last acknowledged epoch.
//!
//! After a loss of power the file holds what was flushed, and perhaps more: the kernel writes
//! the pages of a mapped file when it likes, each for itself. So a bit is cleared in one
//! bitmap because it is in another only once it is there durably. What the file lacks then is
//! in the activity log.
//!
//! A fourth bitmap beside them says which blocks are undefined: given up by a discard and not
//! written since. What the device reads there is no difference to the image, which has
//! zeroes. After a loss of power that holds but for the regions in the activity log: every other
//! was durable here before it left that.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bitmap::{Bitmap, Layout};
use crate::device::BootId;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::id::VolumeId;
use crate::sys::backing;
use crate::sys::memory::SharedWords;
use crate::units::{ByteLen, Extent};

/// The header: magic 8, version 4, block size 4, volume id 16, volume size 8, boot id 16,
/// CRC32 of what is before it 4; little-endian; zeroes to 4096. Then the four bitmaps.
const HEADER: usize = 4096;
const MAGIC: [u8; 8] = *b"\x89HRLDB\r\n";
const VERSION: u32 = 1;
const CRC_AT: usize = 56;
const OPEN: &str = "open the ledger of dirty blocks";

/// How the process that kept it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survived {
    /// In this run of the kernel: every bit is there.
    All,
    /// The machine was restarted: the bits that were flushed are there.
    Flushed,
}

/// The dirty blocks of one volume.
#[derive(Debug)]
pub struct Ledger {
    region: Arc<SharedWords>,
    file: File,
    path: PathBuf,
    volume: VolumeId,
    geometry: Geometry,
    live: [Bitmap; 2],
    epoch: Bitmap,
    undefined: Bitmap,
    active: AtomicUsize,
    #[cfg(test)]
    flushes: AtomicUsize,
}

impl Ledger {
    /// A new one, with nothing dirty. It has all the room that it will ever need.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; [`ErrorKind::Full`]; what the file system says. Nothing is left
    /// behind.
    pub fn create(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .at("make the ledger of dirty blocks", path)?;
        let made = give_blocks(&file, path, file_len(&geometry))
            .and_then(|()| write_header(&file, path, volume, &geometry))
            .and_then(|()| Self::map(file, path, volume, geometry));
        if made.is_err() {
            // Half a ledger would be taken for a damaged one.
            let _ = std::fs::remove_file(path);
        }
        made
    }

    /// How the one that an earlier process kept would be found; nothing is changed.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn look(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<Survived> {
        let file = File::open(path).at(OPEN, path)?;
        check(&file, path, volume, &geometry)
    }

    /// The one that an earlier process kept.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Damaged`], [`ErrorKind::Unsupported`],
    /// [`ErrorKind::Foreign`] or [`ErrorKind::Resized`] if it cannot be trusted;
    /// [`ErrorKind::Full`] if it has holes, and there is no room to fill them.
    pub fn open(path: &Path, volume: VolumeId, geometry: Geometry) -> Result<(Self, Survived)> {
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).open(path);
        let file = opened.at(OPEN, path)?;
        let survived = check(&file, path, volume, &geometry)?;
        // One that was copied, or made by an earlier version, may have holes.
        give_blocks(&file, path, file_len(&geometry))?;
        let ledger = Self::map(file, path, volume, geometry)?;
        if survived == Survived::Flushed {
            ledger.live.iter().for_each(Bitmap::reconnect);
            ledger.epoch.reconnect();
            ledger.undefined.reconnect();
        }
        ledger.reclaim();
        ledger.forget_epoch();
        Ok((ledger, survived))
    }

    /// Says durably that from now on every bit is there: what a loss of power took away has
    /// been marked again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn settle(&self) -> Result<()> {
        self.flush()?;
        write_header(&self.file, &self.path, self.volume, &self.geometry)
    }

    fn map(file: File, path: &Path, volume: VolumeId, geometry: Geometry) -> Result<Self> {
        let layout = Layout::for_blocks(geometry.blocks());
        let region = SharedWords::map(file.as_fd(), HEADER / 8 + 4 * layout.words());
        let region = Arc::new(region.at(OPEN, path)?);
        let part = |n: usize| {
            let start = HEADER / 8 + n * layout.words();
            Bitmap::shared(layout, Arc::clone(&region), start)
                .ok_or_else(|| damaged(path, "its bitmaps do not fit"))
        };
        Ok(Self {
            live: [part(0)?, part(1)?],
            epoch: part(2)?,
            undefined: part(3)?,
            region: Arc::clone(&region),
            file,
            path: path.to_owned(),
            volume,
            geometry,
            active: AtomicUsize::new(0),
            #[cfg(test)]
            flushes: AtomicUsize::new(0),
        })
    }

    /// The bitmap that changes are marked in.
    pub fn live(&self) -> &Bitmap {
        &self.live[self.active.load(Ordering::Acquire)]
    }

    /// The bitmap that the last swap took.
    pub fn round(&self) -> &Bitmap {
        &self.live[1 - self.active.load(Ordering::Acquire)]
    }

    /// What swaps took and the store does not have.
    pub const fn epoch(&self) -> &Bitmap {
        &self.epoch
    }

    /// Marks the blocks of `extent`. Not while [`Self::swap`] runs.
    pub fn mark(&self, extent: Extent) {
        if let Some(run) = self.geometry.run_of(extent) {
            self.live().set_run(run);
        }
    }

    /// Blocks that were discarded and not written since.
    pub const fn undefined(&self) -> &Bitmap {
        &self.undefined
    }

    /// The device has discarded `extent`, and zeroed the parts of blocks in it. Not beside
    /// another change of it.
    pub fn discard(&self, extent: Extent) {
        // A block of which a part is zeroed is as defined as it was.
        if let Some(run) = self.geometry.run_of(self.geometry.cut(extent).whole) {
            self.undefined.set_run(run);
        }
    }

    /// The device has written `extent`: it is defined. Not beside another change of it.
    pub fn define(&self, extent: Extent) {
        if let Some(run) = self.geometry.run_of(extent)
            && self
                .undefined
                .runs()
                .from(run.start)
                .next()
                .is_some_and(|next| next.start < run.end)
        {
            self.undefined.clear_run(run);
        }
    }

    /// Somebody else has written to the device: nothing is taken for undefined.
    pub fn define_all(&self) {
        self.undefined.clear();
    }

    /// Makes the other bitmap the live one; what was live is the round, and the epoch's.
    /// The round before must be finished, or its blocks are dirty again; and nobody may mark
    /// meanwhile.
    pub fn swap(&self) {
        let old = self.active.load(Ordering::Acquire);
        self.active.store(1 - old, Ordering::Release);
        self.epoch.merge_from(&self.live[old]);
    }

    /// The round has been dealt with; its blocks stay in the epoch. If they cannot be made
    /// durable there, they stay in the round too, and are the next one's as well.
    pub fn finish_round(&self) {
        if self.round().is_empty() {
            return;
        }
        match self.flush() {
            Ok(()) => self.round().clear(),
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// The store has the epoch, and with it the round.
    pub fn acknowledge(&self) {
        self.round().clear();
        self.epoch.clear();
    }

    /// The store will not get the epoch: all of it is dirty again. [`Self::forget_epoch`] is
    /// to follow.
    pub fn reclaim(&self) {
        let live = self.live();
        live.merge_from(self.round());
        live.merge_from(&self.epoch);
    }

    /// After [`Self::reclaim`]: what is dirty again need not be the epoch's as well. If it
    /// cannot be made durable before, it stays the epoch's too. Not beside a swap.
    pub fn forget_epoch(&self) {
        match self.flush() {
            Ok(()) => self.acknowledge(),
            Err(error) => tracing::warn!("{error}"),
        }
    }

    /// Whether a block is not yet in the store. Not beside a swap.
    pub fn is_dirty(&self, block: BlockNumber) -> bool {
        let mut all = self.live.iter().chain([&self.epoch]);
        all.any(|part| part.test(block))
    }

    /// How many blocks are not yet in the store.
    pub fn dirty_blocks(&self) -> u64 {
        Bitmap::count_union(&[&self.live[0], &self.live[1], &self.epoch])
    }

    /// Adds the blocks that are not in the store to `set`. Not beside a swap.
    pub fn add_dirty(&self, set: &Bitmap, run: Run) {
        let all = self.live.iter().chain([&self.epoch]);
        all.for_each(|part| set.merge_run_from(part, run));
    }

    /// Makes every bit durable that was set before the call.
    ///
    /// # Errors
    /// What the file system says.
    pub fn flush(&self) -> Result<()> {
        #[cfg(test)]
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.region
            .flush()
            .at("write the ledger of dirty blocks", &self.path)
    }
}

fn file_len(geometry: &Geometry) -> ByteLen {
    ByteLen::new((HEADER + 32 * Layout::for_blocks(geometry.blocks()).words()) as u64)
}

/// Takes the room that a file needs before it is mapped: see `sys/backing.rs`.
pub(super) fn give_blocks(file: &File, path: &Path, len: ByteLen) -> Result<()> {
    let given = backing::give_blocks(file, len).at("take room for what capture keeps", path);
    given.map_err(|error| match error.kind() {
        ErrorKind::Full => error.advice(format!(
            "free {len} bytes on the file system of the state folder, and start again"
        )),
        _ => error,
    })
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::new(ErrorKind::Damaged, OPEN).path(path).detail(what)
}

fn write_header(file: &File, path: &Path, volume: VolumeId, geometry: &Geometry) -> Result<()> {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&geometry.block.get().to_le_bytes());
    header[16..32].copy_from_slice(volume.as_bytes());
    header[32..40].copy_from_slice(&geometry.size.get().to_le_bytes());
    header[40..56].copy_from_slice(BootId::current()?.as_bytes());
    let crc = crc32fast::hash(&header[..CRC_AT]);
    header[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&header, 0)
        .and_then(|()| file.sync_all())
        .at("write the ledger of dirty blocks", path)
}

fn field<const N: usize>(header: &[u8; HEADER], at: usize) -> [u8; N] {
    std::array::from_fn(|i| header[at + i])
}

/// Whether the file is a ledger of this volume, and since when.
fn check(file: &File, path: &Path, volume: VolumeId, geometry: &Geometry) -> Result<Survived> {
    let mut header = [0; HEADER];
    let read = file.read_exact_at(&mut header, 0);
    read.map_err(|source| damaged(path, "it is too short").source(source))?;
    let boot = check_header(&header, path, volume, geometry)?;
    if file.metadata().at(OPEN, path)?.len() != file_len(geometry).get() {
        return Err(damaged(path, "its length does not fit its header"));
    }
    Ok(if boot == *BootId::current()?.as_bytes() {
        Survived::All
    } else {
        Survived::Flushed
    })
}

/// The boot id of a header that is of this volume.
fn check_header(
    header: &[u8; HEADER],
    path: &Path,
    volume: VolumeId,
    geometry: &Geometry,
) -> Result<[u8; 16]> {
    if header[..8] != MAGIC {
        return Err(damaged(path, "the magic is wrong"));
    }
    if u32::from_le_bytes(field(header, CRC_AT)) != crc32fast::hash(&header[..CRC_AT]) {
        return Err(damaged(path, "the header's CRC32 is wrong"));
    }
    let version = u32::from_le_bytes(field(header, 8));
    if version != VERSION {
        return Err(Error::new(ErrorKind::Unsupported, OPEN)
            .path(path)
            .detail(format!("version {version}; this program knows {VERSION}")));
    }
    if field(header, 16) != *volume.as_bytes() {
        let error = Error::new(ErrorKind::Foreign, OPEN).path(path);
        return Err(error.detail("it is of another volume"));
    }
    let block = u32::from_le_bytes(field(header, 12));
    let size = u64::from_le_bytes(field(header, 32));
    if (block, size) != (geometry.block.get(), geometry.size.get()) {
        return Err(Error::new(ErrorKind::Resized, OPEN)
            .path(path)
            .detail(format!(
                "for {size} bytes in blocks of {block}, the volume has {} in blocks of {}",
                geometry.size,
                geometry.block.get()
            )));
    }
    Ok(field(header, 40))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    use crate::units::ByteOffset;
    use crate::units::{BlockSize, SectorSize, VolumeSize};

    const VOLUME: VolumeId = VolumeId::from_bytes([5; 16]);
    /// So large that each bitmap has pages of its own.
    const BLOCKS: u64 = 200_000;
    const PAGE: usize = 4096;

    fn geometry() -> Geometry {
        Geometry {
            size: VolumeSize::new(BLOCKS * 4096),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        }
    }

    fn block(number: u64) -> Extent {
        Extent::new(ByteOffset::new(number * 4096), ByteLen::new(4096)).unwrap()
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Mark(u64),
        Flush,
        Swap,
        FinishRound,
        Acknowledge,
        Reclaim,
        ForgetEpoch,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            5 => prop::sample::select(vec![0, 70, 40_000, 199_999]).prop_map(Step::Mark),
            2 => Just(Step::Flush),
            3 => Just(Step::Swap),
            3 => Just(Step::FinishRound),
            1 => Just(Step::Acknowledge),
            1 => Just(Step::Reclaim),
        ]
    }

    /// A set of blocks, and those of them that were marked before the last flush.
    #[derive(Default)]
    struct Marks {
        all: BTreeSet<u64>,
        durable: BTreeSet<u64>,
    }

    impl Marks {
        fn append(&mut self, other: &mut Self) {
            self.all.append(&mut other.all);
            self.durable.append(&mut other.durable);
        }
    }

    /// A ledger, what it must know, and what the disk may have of it.
    struct Machine {
        folder: tempfile::TempDir,
        ledger: Ledger,
        live: Marks,
        epoch: Marks,
        /// The file as it was at each moment since the last flush.
        versions: Vec<Vec<u8>>,
    }

    impl Machine {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let ledger = Ledger::create(&folder.path().join("l"), VOLUME, geometry()).unwrap();
            let versions = vec![std::fs::read(folder.path().join("l")).unwrap()];
            Self {
                folder,
                ledger,
                live: Marks::default(),
                epoch: Marks::default(),
                versions,
            }
        }

        fn step(&mut self, step: Step) {
            let flushes = self.ledger.flushes.load(Ordering::Relaxed);
            match step {
                Step::Mark(number) => {
                    self.ledger.mark(block(number));
                    self.live.all.insert(number);
                }
                Step::Flush => {
                    self.ledger.flush().unwrap();
                    for marks in [&mut self.live, &mut self.epoch] {
                        marks.durable = marks.all.clone();
                    }
                }
                Step::Swap => {
                    self.ledger.swap();
                    self.epoch.append(&mut self.live);
                }
                Step::FinishRound => self.ledger.finish_round(),
                Step::Acknowledge => {
                    self.ledger.acknowledge();
                    self.epoch = Marks::default();
                }
                Step::Reclaim => {
                    self.ledger.reclaim();
                    self.live.append(&mut self.epoch);
                }
                Step::ForgetEpoch => self.ledger.forget_epoch(),
            }
            // What flushes does so before it clears anything.
            if self.ledger.flushes.load(Ordering::Relaxed) > flushes {
                self.versions.drain(..self.versions.len() - 1);
            }
            let now = std::fs::read(self.folder.path().join("l")).unwrap();
            self.versions.push(now);
        }

        /// What the next boot finds: of each page any version since the last flush.
        fn cut(&self, mut pick: impl FnMut(usize) -> usize) -> (tempfile::TempDir, Ledger) {
            let mut file = self.versions[0].clone();
            for at in (HEADER..file.len()).step_by(PAGE) {
                let version = &self.versions[pick(self.versions.len())];
                let end = (at + PAGE).min(file.len());
                file[at..end].copy_from_slice(&version[at..end]);
            }
            file[40..56].fill(1);
            let crc = crc32fast::hash(&file[..CRC_AT]);
            file[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("l");
            std::fs::write(&path, file).unwrap();
            let (ledger, survived) = Ledger::open(&path, VOLUME, geometry()).unwrap();
            assert_eq!(survived, Survived::Flushed);
            (folder, ledger)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever the kernel had written of the mapped file when the power went: a block
        /// that was marked before the last flush, and is not in the store, is dirty.
        #[test]
        fn what_was_flushed_outlives_a_loss_of_power(
            steps in prop::collection::vec(step(), 1..60),
            picks in prop::collection::vec(any::<prop::sample::Index>(), 64),
        ) {
            let mut machine = Machine::new();
            for step in steps {
                machine.step(step);
                if matches!(step, Step::Reclaim) {
                    machine.step(Step::ForgetEpoch);
                }
            }
            let mut picks = picks.iter().cycle();
            let (_folder, ledger) = machine.cut(|n| picks.next().unwrap().index(n));
            for number in machine.live.durable.iter().chain(&machine.epoch.durable) {
                prop_assert!(ledger.live().test(BlockNumber::new(*number)), "{number}");
            }
        }
    }
}
