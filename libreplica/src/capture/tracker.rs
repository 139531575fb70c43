//! One volume's tracker: attaches the programs or takes over those that run, and drains the
//! marks in rounds.
//!
//! Three bitmaps lie in pinned memory. The programs mark in one of two; `swap` makes the
//! other active, waits until no program holds the old one, and adds what that has to the
//! third, the epoch's, before the caller sees it. So at every instant the union of the
//! three is all that was written since the last acknowledged epoch, and a process that is
//! killed anywhere in here loses nothing: `adopt` finds the union again.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::bitmap::Bitmap;
use crate::capture::balance::Scales;
use crate::capture::counters::{Counters, InFlight, WidenCause};
use crate::capture::flights::{Skipped, Watch};
use crate::capture::instance::{Instance, Observer};
#[cfg(feature = "ebpf")]
use crate::capture::load::load;
use crate::capture::pins::{self, Pins};
use crate::capture::probe;
use crate::capture::spec::AttachSpec;
use crate::capture::state::{EPOCH, Identity, Word};
use crate::device::{BlockDevice, DiskSeq, Queue};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;
use crate::sys::bpf::Fence;
use crate::sys::membarrier;
use crate::units::Extent;

/// How a swap waits until no program holds the old bitmap.
#[derive(Debug)]
enum Grace {
    Membarrier,
    Maps(Fence),
}

impl Grace {
    fn pick() -> Result<Self> {
        if membarrier::offered() {
            return Ok(Self::Membarrier);
        }
        Fence::new().map(Self::Maps).map_err(|source| {
            Error::new(ErrorKind::Kernel, "prepare to swap bitmaps")
                .detail("the kernel offers neither membarrier (nohz_full?) nor maps of maps")
                .source(source)
                .advice(super::NO_OTHER_WAY)
        })
    }

    fn wait(&self) -> Result<()> {
        let waited = match self {
            Self::Membarrier => membarrier::global(),
            Self::Maps(fence) => fence.wait(),
        };
        waited.map_err(|source| {
            Error::new(ErrorKind::Kernel, "wait for running BPF programs").source(source)
        })
    }
}

/// Tracks one volume. Dropping it leaves the programs at work; [`Tracker::detach`] ends them.
#[derive(Debug)]
pub struct Tracker {
    instance: Arc<Instance>,
    grace: Grace,
    scales: Scales,
    watch: Watch,
    /// The part that is being drained.
    round: Option<usize>,
}

/// What a swap found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundReport {
    /// How many blocks are in the round.
    pub blocks: u64,
    /// Why the round is the whole volume, if it is; the first cause of several.
    pub widened: Option<WidenCause>,
}

const ATTACH: &str = "attach the tracker";
const ADOPT: &str = "adopt the tracker";

impl Tracker {
    /// Begins to track `spec`'s disk. Nothing is marked yet: what was written before is
    /// the caller's to know (see [`Self::mark_all`] and [`crate::capture::Proof`]).
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the state folder has pins of the volume already;
    /// [`ErrorKind::Vanished`] or [`ErrorKind::Resized`] if the disk is not as in `spec`;
    /// [`ErrorKind::Kernel`] with what the kernel lacks, or if the disk's reads and writes
    /// cannot be followed.
    pub fn attach(spec: &AttachSpec) -> Result<Self> {
        needs_sequence(&spec.disk)?;
        spec.disk.still_there()?;
        let grace = Grace::pick()?;
        pins::make_pin_root(&spec.pins)?;
        let folder = spec.pin_folder();
        if folder.exists() {
            return Err(Error::new(ErrorKind::Exists, ATTACH)
                .path(folder)
                .volume(spec.volume));
        }
        // What somebody left who was killed while attaching, or failed to.
        pins::clear_unfinished(&spec.pins, spec.volume, spec.folder)?;
        load(spec)?;
        let started = Self::open(spec, grace).and_then(|mut tracker| {
            tracker.begin()?;
            Ok(tracker)
        });
        if started.is_err() {
            // The error that matters is the first.
            let _ = pins::remove_pins(&spec.pins, spec.volume, spec.folder);
        }
        started
    }

    /// Takes over the tracker that an earlier process attached. Nothing is lost that was
    /// marked since its last [`Self::acknowledge`]; what it had drained into an epoch that
    /// it did not acknowledge comes back with [`Self::reclaim`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the state folder has no pins of the volume;
    /// [`ErrorKind::Foreign`] if they are another volume's; [`ErrorKind::Vanished`] if the
    /// disk was detached since, though it may be back; [`ErrorKind::Resized`] if its size or
    /// the block size differ; [`ErrorKind::Unsupported`] for pins of another version;
    /// [`ErrorKind::Damaged`].
    pub fn adopt(spec: &AttachSpec) -> Result<Self> {
        let mut tracker = Self::open(spec, Grace::pick()?)?;
        spec.disk.still_there()?;
        if tracker.instance.pins.state.get(Word::Probing) != probe::OFF {
            // Somebody was killed between attaching and the proof.
            tracker.begin()?;
        }
        // Somebody may have been killed between making a part inactive and draining it.
        tracker.grace.wait()?;
        let inactive = tracker.instance.pins.state.active() ^ 1;
        tracker.part(inactive).take_into(tracker.part(EPOCH));
        Ok(tracker)
    }

    fn open(spec: &AttachSpec, grace: Grace) -> Result<Self> {
        let pins = Pins::open(&spec.pin_folder())?;
        compare(&pins, spec)?;
        let layout = pins.identity.layout();
        let part = |i: usize| Bitmap::shared(layout, Arc::clone(&pins.bits), i * layout.words());
        let (Some(first), Some(second), Some(epoch)) = (part(0), part(1), part(EPOCH)) else {
            return Err(Error::new(ErrorKind::Damaged, ADOPT).path(&pins.folder));
        };
        let parts = [first, second, epoch];
        let instance = Arc::new(Instance {
            pins,
            parts,
            disk: spec.disk.clone(),
        });
        Ok(Self {
            instance,
            grace,
            scales: Scales::default(),
            watch: Watch::default(),
            round: None,
        })
    }

    /// The first moments: proves that the disk is seen, and lets go by what was in flight
    /// when the programs were attached.
    fn begin(&mut self) -> Result<()> {
        let Instance { pins, disk, .. } = &*self.instance;
        probe::probe(disk, &pins.state)?;
        if disk.queue() == Queue::Bios {
            for _ in 0..100 {
                if disk.writes_in_flight()? == 0 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let balance = self.scales.weigh(disk, &pins.state)?;
        let causes = self.instance.causes(balance)?;
        self.instance.note(&causes);
        Ok(())
    }

    fn part(&self, index: usize) -> &Bitmap {
        &self.instance.parts[index]
    }

    fn active(&self) -> &Bitmap {
        self.part(self.instance.pins.state.active())
    }

    /// Begins a round: what was marked until now is [`Self::round`], new marks go to the
    /// other bitmap. A write in flight across the swap is marked again when it completes.
    /// Takes as long as the kernel's grace period: milliseconds.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the last round is not finished; [`ErrorKind::Vanished`] and
    /// [`ErrorKind::Resized`] if the disk is gone or has another size; [`ErrorKind::Kernel`]
    /// if waiting failed. Nothing is lost then.
    pub fn swap(&mut self) -> Result<RoundReport> {
        const OPERATION: &str = "begin a round";
        if self.round.is_some() {
            return Err(Error::new(ErrorKind::State, OPERATION).detail("one is under way"));
        }
        self.instance.disk.still_there()?;
        self.instance.settle(&self.watch, Skipped::No)?;
        let state = &self.instance.pins.state;
        let old = state.active();
        state.set(Word::Active, (old ^ 1) as u64);
        self.grace.wait()?;

        let balance = self.scales.weigh(&self.instance.disk, state)?;
        let causes = self.instance.causes(balance)?;
        let widened = causes.first();
        let drained = self.part(old);
        if widened.is_some() {
            drained.set_all();
        }
        self.part(EPOCH).merge_from(drained);
        let blocks = drained.count();
        self.instance.note(&causes);
        if causes.skipped() == Skipped::Yes {
            self.instance.settle(&self.watch, Skipped::Yes)?;
        }
        self.round = Some(old);
        Ok(RoundReport { blocks, widened })
    }

    /// The blocks of the round that [`Self::swap`] began, to be read from the disk; after
    /// [`Self::finish_round`], none.
    pub fn round(&self) -> &Bitmap {
        let inactive = self.instance.pins.state.active() ^ 1;
        self.part(self.round.unwrap_or(inactive))
    }

    /// Ends the round: its blocks were read. They stay in the epoch.
    pub fn finish_round(&mut self) {
        if let Some(part) = self.round.take() {
            self.part(part).clear();
        }
    }

    /// What was marked since the last swap, and will be in the next round.
    pub fn pending(&self) -> &Bitmap {
        self.active()
    }

    /// Takes back an epoch that the target will not get: whatever was drained since the
    /// last [`Self::acknowledge`] is marked again. Ends a round that is under way.
    pub fn reclaim(&mut self) {
        self.active().merge_from(self.part(EPOCH));
        self.finish_round();
        self.part(EPOCH).clear();
    }

    /// The target has durably what was drained: the epoch's blocks are forgotten.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if a round is under way: its blocks belong to an epoch that
    /// nobody has yet.
    pub fn acknowledge(&mut self) -> Result<()> {
        if self.round.is_some() {
            let error = Error::new(ErrorKind::State, "acknowledge an epoch");
            return Err(error.detail("a round is under way"));
        }
        self.part(EPOCH).clear();
        Ok(())
    }

    /// The newest settings by which blocks were forgotten, see [`Self::note_settings`]; 0 if
    /// nobody said.
    pub fn settings(&self) -> u64 {
        self.instance.pins.state.get(Word::Settings)
    }

    /// Notes which of the caller's settings, numbered as they change, are durable, so that
    /// whoever adopts this with older ones knows that they are older.
    pub fn note_settings(&mut self, revision: u64) {
        self.instance.pins.state.set(Word::Settings, revision);
    }

    /// Marks the blocks of `extent`.
    pub fn mark(&mut self, extent: Extent) {
        if let Some(run) = self.geometry().run_of(extent) {
            self.active().set_run(run);
        }
    }

    /// Marks the whole volume, and counts why.
    pub fn mark_all(&mut self, cause: WidenCause) {
        self.active().set_all();
        self.instance.pins.state.count_widening(cause);
    }

    /// How the volume falls into blocks.
    pub fn geometry(&self) -> Geometry {
        self.instance.pins.identity.geometry
    }

    /// The disk, as it was given.
    pub fn disk(&self) -> &BlockDevice {
        &self.instance.disk
    }

    /// See [`Observer::dirty_blocks`].
    pub fn dirty_blocks(&self) -> u64 {
        self.instance.dirty_blocks()
    }

    /// See [`Observer::in_flight`]. Asked again and again while the disk is at rest, it also
    /// finds the writes that have ended without being seen to, and marks them.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the disk is gone.
    pub fn in_flight(&self) -> Result<InFlight> {
        self.instance.settle(&self.watch, Skipped::No)?;
        self.instance.in_flight()
    }

    /// See [`Observer::counters`].
    ///
    /// # Errors
    /// What the kernel says when asked for a program's misses.
    pub fn counters(&self) -> Result<Counters> {
        self.instance.counters()
    }

    /// A handle that looks on, for another thread.
    pub fn observer(&self) -> Observer {
        Observer {
            instance: Arc::clone(&self.instance),
        }
    }

    /// Ends tracking and removes the pins.
    ///
    /// # Errors
    /// What the file system says.
    pub fn detach(self) -> Result<()> {
        let Pins {
            folder, identity, ..
        } = &self.instance.pins;
        let pins = folder.parent().unwrap_or(Path::new("/"));
        pins::remove_pins(pins, identity.volume, identity.folder)
    }
}

#[cfg(not(feature = "ebpf"))]
fn load(spec: &AttachSpec) -> Result<()> {
    Err(Error::new(ErrorKind::Unsupported, ATTACH)
        .path(spec.disk.path())
        .detail("built without the feature `ebpf`"))
}

/// Pins outlive a disk: without its number, another one in its place would be taken for it.
fn needs_sequence(disk: &BlockDevice) -> Result<()> {
    if disk.diskseq() != DiskSeq::new(0) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Kernel, ATTACH)
        .path(disk.path())
        .detail("the kernel gives disks no sequence number (it came with 5.15)")
        .advice(super::NO_OTHER_WAY))
}

/// Whether `pins` are what `spec` asks for.
fn compare(pins: &Pins, spec: &AttachSpec) -> Result<()> {
    let (found, wanted) = (&pins.identity, Identity::of(spec));
    let differ = |kind, what: String| Err(Error::new(kind, ADOPT).path(&pins.folder).detail(what));
    if found.volume != wanted.volume || found.folder != wanted.folder {
        let what = format!(
            "volume {} of state folder {}, not volume {} of {}",
            found.volume, found.folder, wanted.volume, wanted.folder
        );
        return differ(ErrorKind::Foreign, what);
    }
    let device = |id: &Identity| (id.devno, id.diskseq);
    if device(found) != device(&wanted) {
        let what = format!(
            "they track {} ({}, sequence {}); now it is {} ({}, sequence {})",
            found.name, found.devno, found.diskseq, wanted.name, wanted.devno, wanted.diskseq
        );
        return differ(ErrorKind::Vanished, what);
    }
    if found.geometry != wanted.geometry {
        let what = format!("{:?}, wanted {:?}", found.geometry, wanted.geometry);
        return differ(ErrorKind::Resized, what);
    }
    Ok(())
}
