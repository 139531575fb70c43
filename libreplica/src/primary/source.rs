//! The source side of a volume: the device, the tracker that marks what is written to it,
//! and the reader. Brought up, it has taken up the tracking that went on in the kernel,
//! or attached anew and says why the image can no longer be trusted to follow.

use std::sync::Arc;
use std::time::Instant;

use hrl_format::units::Extent;

use crate::capture::inline::Service;
use crate::capture::{AttachSpec, FolderId, Observer, Tracker};
use crate::device::{BlockDevice, OpenFor, Swap};
use crate::digest::DigestTree;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::{BlockNumber, Geometry};
use crate::primary::config::VolumeConfig;
use crate::primary::environment::Environment;
use crate::primary::exclusions::Exclusions;
use crate::primary::fingerprint;
use crate::primary::inline::Inline;
use crate::primary::lifecycle;
use crate::primary::status::VolumeStatus;
use crate::primary::tracking::Tracking;
use crate::primary::volume::Volume;
use crate::sys::reader::{Reader, ReaderOptions};

const OLDER_SETTINGS: &str =
    "the settings in the state folder are older than the tracking: an older copy was put back";

/// The source side of a volume.
pub struct Source {
    /// The device.
    pub device: BlockDevice,
    /// What is left out of the copy.
    pub exclusions: Exclusions,
    reader: Option<Reader>,
    /// The swap in use that `exclusions` goes by.
    swap: Swap,
    tracking: Tracking,
    shown: Option<BlockDevice>,
    geometry: Geometry,
    round_began: Instant,
    /// Why the whole volume must be compared, found and not yet dealt with.
    loss: Option<String>,
    /// Of the settings that this goes by.
    revision: u64,
}

impl Source {
    /// Opens the device and attaches to it for the first time.
    ///
    /// # Errors
    /// When the device cannot be read, or the kernel lacks what tracking needs.
    pub fn attach(
        config: &VolumeConfig,
        device: BlockDevice,
        environment: &Environment,
    ) -> Result<Self> {
        let tracker = Tracker::attach(&spec(config, &device, environment))?;
        Self::with(config, device, Tracking::Kernel(tracker))
    }

    /// The side of a device whose users go through us.
    ///
    /// # Errors
    /// When the device cannot be read.
    pub fn inline(config: &VolumeConfig, device: BlockDevice, inline: &Inline) -> Result<Self> {
        let service = Arc::clone(inline.service());
        let mut source = Self::with(config, device, Tracking::Inline(service))?;
        source.shown = inline.shown().cloned();
        Ok(source)
    }

    /// Opens the device and takes its tracking up again. If changes may have been missed,
    /// `note` is given the cause, and must make it durable, before anything is attached
    /// anew: a killed agent must not find new tracking and take it for the old. It returns
    /// the revision of the settings that say so.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] when the device is gone, or another is in its place;
    /// [`ErrorKind::Resized`] when its size changed; what `note` returned; else what failed.
    pub fn bring_up(
        config: &VolumeConfig,
        environment: &Environment,
        tree: &DigestTree,
        note: impl FnOnce(&str) -> Result<u64>,
    ) -> Result<Self> {
        let device = open(config)?;
        let spec = spec(config, &device, environment);
        let cause = match Tracker::adopt(&spec) {
            Ok(tracker) => {
                let mut source = Self::with(config, device, Tracking::Kernel(tracker))?;
                // What a killed agent had taken out of the bitmaps and not brought home.
                source.tracking.reclaim();
                if source
                    .tracking
                    .settings()
                    .is_some_and(|newest| newest > config.revision)
                {
                    // Newer ones may have said that something was not known.
                    source.revision = note(OLDER_SETTINGS)?;
                    source.tracking.note_settings(source.revision);
                }
                return Ok(source);
            }
            Err(error) => match error.kind() {
                ErrorKind::NotFound => {
                    "tracking was not attached: pins lost, or the machine was restarted".to_owned()
                }
                ErrorKind::Vanished => "the device was gone and has come back".to_owned(),
                ErrorKind::Damaged | ErrorKind::Unsupported => {
                    format!("tracking could not be taken up: {error}")
                }
                _ => return Err(error),
            },
        };
        must_be_the_same_disk(config, &device, tree, &|_| false)?;
        let revision = note(&cause)?;
        environment.remove_pins(config.id)?;
        let mut tracker = Tracker::attach(&spec)?;
        tracker.note_settings(revision);
        Self::with(config, device, Tracking::Kernel(tracker))
    }

    fn with(config: &VolumeConfig, device: BlockDevice, tracking: Tracking) -> Result<Self> {
        let geometry = geometry(config, &device);
        let swap = Swap::on(&device)?;
        Ok(Self {
            exclusions: exclusions(config, &swap, &geometry),
            swap,
            shown: Some(device.clone()),
            device,
            reader: None,
            tracking,
            geometry,
            round_began: Instant::now(),
            loss: None,
            revision: config.revision,
        })
    }

    /// Reads the device, which is held open until [`Self::rest`].
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] or [`ErrorKind::Resized`] when it is not the disk that was
    /// attached to; else as open(2).
    pub fn reader(&mut self) -> Result<&mut Reader> {
        if self.reader.is_none() {
            self.reader = Some(open_reader(&self.device)?);
        }
        self.reader
            .as_mut()
            .ok_or_else(|| Error::new(ErrorKind::State, "read the device").path(self.device.path()))
    }

    /// Lets go of the device until it is read again. A disk that somebody holds open can
    /// be neither detached nor reset, and a detached one would live on unseen.
    pub fn rest(&mut self) {
        self.reader = None;
    }

    /// Writes what the kernel holds of the device in memory: what was written to the
    /// device itself, through no filesystem.
    ///
    /// # Errors
    /// What the device failed with.
    pub fn sync(&self) -> Result<()> {
        if self.tracking.inline().is_some() {
            // Nobody else writes to it.
            return Ok(());
        }
        let node = self.device.open_node(OpenFor::BufferedRead)?;
        node.sync_all().at("flush the device", self.device.path())
    }

    /// The volume's size and units.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether the device is the one that was attached to, of the same size.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] or [`ErrorKind::Resized`] if not.
    pub fn still_there(&self) -> Result<()> {
        self.device.still_there()
    }

    /// Looks again at what is left out; what no longer is becomes dirty.
    ///
    /// # Errors
    /// When swap areas cannot be found, or the state folder cannot be written.
    pub fn settle(&mut self, volume: &Volume, environment: &Environment) -> Result<()> {
        let config = volume.config();
        self.revision = config.revision;
        let before = Exclusions::new(&self.geometry, config.left_out());
        self.swap = Swap::on(&self.device)?;
        self.exclusions = exclusions(&config, &self.swap, &self.geometry);
        if before == self.exclusions {
            return Ok(());
        }
        for range in before.ranges() {
            let tracking = &mut self.tracking;
            self.exclusions.kept(*range, |part| tracking.mark(part));
        }
        for path in self.swap.unplaced() {
            tracing::info!(volume = %volume.id(), path = %path.display(), "swap is copied like data");
        }
        let now = self.exclusions.ranges().to_vec();
        lifecycle::change_config(volume, environment, |config| config.set_left_out(&now))?;
        self.revision = volume.config().revision;
        Ok(())
    }

    /// Whether what is left out has been swap, or excluded, ever since [`Source::settle`].
    /// A file that took the place of swap meanwhile would be missing in a point.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if not; or when swap areas cannot be found.
    pub fn is_settled(&self, config: &VolumeConfig) -> Result<()> {
        if self.swap.areas().is_empty() {
            return Ok(());
        }
        // First what has changed and changed back, then what the kernel tells nobody: LVM
        // has moved it.
        if !self.swap.has_changed()? {
            let now = exclusions(config, &Swap::on(&self.device)?, &self.geometry);
            if now == self.exclusions {
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::State, "make a point")
            .path(self.device.path())
            .detail("swap was switched on or off meanwhile")
            .advice("it is tried again by itself"))
    }

    /// Starts a round: what was dirty is this round's; what is written from now on is the
    /// next one's.
    ///
    /// # Errors
    /// [`ErrorKind::ResyncNeeded`] when tracking was lost, with the cause.
    pub fn swap(&mut self) -> Result<()> {
        self.round_began = Instant::now();
        let Some(cause) = self.tracking.swap()? else {
            return Ok(());
        };
        self.loss = Some(cause.to_string());
        Err(Error::new(ErrorKind::ResyncNeeded, "collect what changed")
            .path(self.device.path())
            .detail(cause.to_string())
            .advice("a resync by checksums follows by itself"))
    }

    /// A round begins that is not started here: a moment of the stream.
    pub fn begin_round(&mut self) {
        self.round_began = Instant::now();
    }

    /// Why the whole volume must be compared, if it must.
    pub fn loss(&self) -> Option<&str> {
        self.loss.as_deref()
    }

    /// A resync has been made the volume's next job, durably, in the settings of this
    /// revision: what the kernel marked in place of what it did not know is forgotten.
    ///
    /// # Errors
    /// What the tracker says.
    pub fn loss_is_noted(&mut self, revision: u64) -> Result<()> {
        self.revision = revision;
        self.tracking.finish_round();
        self.acknowledge()?;
        self.loss = None;
        Ok(())
    }

    /// When the current round began.
    pub fn round_began(&self) -> Instant {
        self.round_began
    }

    /// Calls `take` with each stretch of this round that is not left out.
    pub fn each_dirty(&self, mut take: impl FnMut(Extent)) {
        for run in self.tracking.round().runs() {
            let extent = self.geometry.extent_of(run);
            self.exclusions.kept(extent, &mut take);
        }
    }

    /// Reads what is dirty in this round.
    ///
    /// # Errors
    /// What the device failed with, or `take` returned.
    pub fn read_round(&mut self, mut take: impl FnMut(Extent, &[u8]) -> Result<()>) -> Result<()> {
        self.reader()?;
        let (tracking, exclusions, geometry) = (&self.tracking, &self.exclusions, &self.geometry);
        let extents = tracking.round().runs().flat_map(|run| {
            let mut parts = Vec::new();
            exclusions.kept(geometry.extent_of(run), |part| parts.push(part));
            parts
        });
        let Some(reader) = &mut self.reader else {
            return Ok(());
        };
        let mut pieces = reader.pieces(extents);
        while let Some((extent, data)) = pieces.next()? {
            take(extent, data)?;
        }
        Ok(())
    }

    /// This round was read; it stays dirty until it is acknowledged.
    pub fn finish_round(&mut self) {
        self.tracking.finish_round();
    }

    /// What was read and not brought home is dirty again.
    pub fn reclaim(&mut self) {
        self.tracking.reclaim();
    }

    /// All that was read is durable in the store.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while a round is under way.
    pub fn acknowledge(&mut self) -> Result<()> {
        self.tracking.note_settings(self.revision);
        self.tracking.acknowledge()
    }

    /// Makes `extent` dirty.
    pub fn mark(&mut self, extent: Extent) {
        self.tracking.mark(extent);
    }

    /// Makes all of this round dirty again.
    pub fn mark_round_again(&mut self) {
        self.tracking.mark_round_again();
    }

    /// Whether a write was submitted and has not ended.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the device is gone.
    pub fn has_in_flight(&self) -> Result<bool> {
        self.tracking.has_in_flight()
    }

    /// Whether nothing that counts was written since the round began, and nothing is in
    /// flight.
    ///
    /// # Errors
    /// [`ErrorKind::Vanished`] if the device is gone.
    pub fn is_quiet(&self) -> Result<bool> {
        Ok(!self.has_in_flight()? && !self.has_dirty())
    }

    fn has_dirty(&self) -> bool {
        self.tracking.pending().runs().any(|run| {
            let mut counts = false;
            let extent = self.geometry.extent_of(run);
            self.exclusions.kept(extent, |_| counts = true);
            counts
        })
    }

    /// What waits to be shipped. Between two epochs all of that is in the next round.
    pub fn dirty_bytes(&self) -> u64 {
        if self.exclusions.ranges().is_empty() {
            let blocks = self.tracking.dirty_blocks();
            let bytes = blocks * u64::from(self.geometry.block.get());
            return bytes.min(self.geometry.size.get());
        }
        let mut bytes = 0;
        for run in self.tracking.pending().runs() {
            let extent = self.geometry.extent_of(run);
            self.exclusions
                .kept(extent, |part| bytes += part.len().get());
        }
        bytes
    }

    /// Whether a difference of this block means nothing: it waits to be shipped, or what it
    /// holds is not defined.
    pub fn excuses(&self, block: BlockNumber) -> bool {
        self.tracking.excuses(block)
    }

    /// The device that its users see, if it is one of this machine.
    pub const fn shown(&self) -> Option<&BlockDevice> {
        self.shown.as_ref()
    }

    /// The interceptor, if the device's users go through one.
    pub const fn service(&self) -> Option<&Arc<Service>> {
        self.tracking.inline()
    }

    /// Bytes of memory that an extent takes when it is read.
    pub fn room_for(&self, extent: Extent) -> u64 {
        let sector = u64::from(self.geometry.sector.get());
        extent.len().get().next_multiple_of(sector)
    }

    /// Takes everything of this volume out of the kernel.
    ///
    /// # Errors
    /// What the system said.
    pub fn release(self) -> Result<()> {
        self.tracking.detach()
    }

    /// What goes on in the kernel, to be asked also when this side is down.
    pub fn observer(&self) -> Option<Observer> {
        self.tracking.observer()
    }

    /// Writes what the tracking knows into `status`.
    pub fn describe(&self, status: &mut VolumeStatus) {
        status.dirty_bytes = self.dirty_bytes();
        self.tracking.describe(status);
    }
}

/// A disk that was out of sight is taken for the same only if it looks the same.
pub fn must_be_the_same_disk(
    config: &VolumeConfig,
    device: &BlockDevice,
    tree: &DigestTree,
    differs: &dyn Fn(BlockNumber) -> bool,
) -> Result<()> {
    let mut reader = open_reader(device)?;
    if fingerprint::agrees(&mut reader, &geometry(config, device), tree, differs)? {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Vanished, "take up the device")
        .path(&config.device)
        .volume(config.id)
        .detail("another disk is in its place: almost nothing on it is as it was")
        .advice("bring the disk back; or unprotect the volume and protect what is there now"))
}

fn geometry(config: &VolumeConfig, device: &BlockDevice) -> Geometry {
    Geometry {
        size: device.size(),
        block: config.block(),
        sector: device.logical_sector(),
    }
}

/// Reads a device past the page cache.
///
/// # Errors
/// [`ErrorKind::Vanished`] or [`ErrorKind::Resized`] if it is not the disk it was; else as
/// open(2).
pub fn open_reader(device: &BlockDevice) -> Result<Reader> {
    let options = ReaderOptions::default();
    let reader = Reader::open(device.node(), device.logical_sector(), options)?;
    // Once it is open it stays the same disk.
    device.still_there()?;
    Ok(reader)
}

fn spec(config: &VolumeConfig, device: &BlockDevice, environment: &Environment) -> AttachSpec {
    let folder = FolderId::from_bytes(environment.state.id());
    AttachSpec::new(folder, config.id, device.clone(), config.block())
}

/// Opens the device and refuses one of another size.
pub fn open(config: &VolumeConfig) -> Result<BlockDevice> {
    let device = BlockDevice::open(&config.device).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(ErrorKind::Vanished, "take up the device")
            .volume(config.id)
            .source(error)
            .advice("replication goes on when it is back"),
        _ => error.volume(config.id),
    })?;
    if device.size().get() != config.size_bytes {
        return Err(Error::new(ErrorKind::Resized, "take up the device")
            .path(&config.device)
            .volume(config.id)
            .detail(format!(
                "it has {} bytes, and had {}",
                device.size(),
                config.size_bytes
            ))
            .advice("give it its size back; or unprotect the volume and protect it anew"));
    }
    Ok(device)
}

/// What the operator named, and the swap in use.
fn exclusions(config: &VolumeConfig, swap: &Swap, geometry: &Geometry) -> Exclusions {
    let named = config.excluded().into_iter();
    Exclusions::new(geometry, named.chain(swap.bodies()))
}
