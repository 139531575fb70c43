//! The part of a volume that does the work: its source side (device, tracker, reader)
//! and its sink side (the image in the store, the digest tree). Either is brought up when
//! it is needed and dropped when it fails; what matters of it lives in the kernel and in
//! the store, so that bringing it up again is the one way to recover from anything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hrl_format::id::VolumeId;
use hrl_format::units::{BlockSize, ByteLen, Epoch, SectorSize, VolumeSize};

pub use crate::primary::sink::Sink;
pub use crate::primary::source::Source;

use crate::capture::Observer;
use crate::digest::DigestTree;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;
use crate::primary::config::{Capture, Phase, Shipping, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::handover;
use crate::primary::inline::{self, Ending, Inline, Past};
use crate::primary::lifecycle;
use crate::primary::source;
use crate::primary::status::VolumeStatus;
use crate::primary::stream::{Brings, StreamDraft};
use crate::primary::tracking::FAILED;
use crate::primary::volume::Volume;
use crate::store::FoldStep;

/// How long what waits is shipped when the daemon ends: while users are served, and after.
const SHIP_FIRST: Duration = Duration::from_secs(10);
const SHIP_LAST: Duration = Duration::from_secs(1);

/// The working part of one volume.
pub struct Member {
    id: VolumeId,
    geometry: Geometry,
    source: Option<Source>,
    sink: Option<Sink>,
    /// What goes on in the kernel while the source side is down.
    observer: Option<Observer>,
    /// What serves the device's users, if they go through us. It is there whatever fails.
    inline: Option<Arc<Inline>>,
    /// It may be another disk than the image is of.
    past: Past,
    /// The epoch that the stream of changes is put into.
    pub(super) stream: Option<StreamDraft>,
    /// What the store has when it has the epoch that was gathered last.
    pub(super) brings: Option<Brings>,
    /// Whether the image is a state that the volume had.
    pub(super) is_at_a_point: bool,
    /// The epoch that is being committed, or was when that failed.
    pub(super) committing: Option<Epoch>,
    /// Since when something may be dirty that the store does not have.
    behind_since: Instant,
}

impl Member {
    /// A volume that is not brought up yet.
    pub fn new(config: &VolumeConfig) -> Self {
        let geometry = Geometry {
            size: VolumeSize::new(config.size_bytes),
            block: config.block(),
            sector: SectorSize::B512,
        };
        Self {
            id: config.id,
            geometry,
            source: None,
            sink: None,
            observer: None,
            inline: None,
            past: Past::SameDisk,
            stream: None,
            brings: None,
            is_at_a_point: false,
            committing: None,
            behind_since: Instant::now(),
        }
    }

    /// A volume whose device was just attached to, and whose image was just made.
    pub fn with(config: &VolumeConfig, source: Source, sink: Sink) -> Self {
        let geometry = source.geometry();
        let behind_since = Instant::now();
        Self {
            id: config.id,
            geometry,
            source: Some(source),
            sink: Some(sink),
            observer: None,
            inline: None,
            past: Past::SameDisk,
            stream: None,
            brings: None,
            is_at_a_point: false,
            committing: None,
            behind_since,
        }
    }

    /// What serves the volume's users goes with it.
    #[must_use]
    pub fn served(mut self, inline: Option<Arc<Inline>>) -> Self {
        self.inline = inline;
        self
    }

    /// What serves the device's users, if they go through us.
    pub const fn inline(&self) -> Option<&Arc<Inline>> {
        self.inline.as_ref()
    }

    /// Serves the device's users, if they go through us, before anything else.
    fn serve(&mut self, volume: &Volume, environment: &Environment) -> Result<()> {
        let config = volume.config();
        if self.inline.is_some() || !config.capture.is_inline() {
            return Ok(());
        }
        let note = |cause: &str| lifecycle::needs_resync(volume, environment, cause).map(drop);
        // An old primary's device is behind: nobody shall go on with it unawares.
        config.refuse_fenced()?;
        let device = source::open(&config)?;
        let (inline, past) = Inline::begin(&config, &device, environment, note)?;
        self.geometry = inline.service().geometry();
        self.past = past;
        let inline = Arc::new(inline);
        volume.set_inline(Some(Arc::clone(&inline)));
        self.inline = Some(inline);
        Ok(())
    }

    /// The source side, taken up from what went on while it was down.
    fn source(
        &mut self,
        volume: &Volume,
        environment: &Environment,
        tree: &DigestTree,
    ) -> Result<Source> {
        let config = volume.config();
        let Some(inline) = &self.inline else {
            let note = |cause: &str| lifecycle::needs_resync(volume, environment, cause);
            return Source::bring_up(&config, environment, tree, note);
        };
        let device = source::open(&config)?;
        if self.past == Past::MaybeAnother && config.phase != Phase::Baseline {
            let differs = |block| inline.service().is_dirty(block);
            source::must_be_the_same_disk(&config, &device, tree, &differs)?;
        }
        self.past = Past::SameDisk;
        Source::inline(&config, device, inline)
    }

    /// The volume's size and units.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Brings up whichever side is down. A loss of tracking becomes the volume's phase,
    /// durably, before anything else is done.
    ///
    /// # Errors
    /// Why a side cannot be brought up; the other stays.
    pub fn bring_up(&mut self, volume: &Volume, environment: &Environment) -> Result<()> {
        if volume.is_stopping() {
            // It may just have been unprotected: nothing is attached again.
            return Err(Error::new(ErrorKind::State, "use the volume")
                .volume(self.id)
                .detail("it is being stopped"));
        }
        self.serve(volume, environment)?;
        let sink = match self.sink {
            Some(_) => Ok(()),
            None => self.bring_up_sink(volume, environment),
        };
        if self.source.is_none() {
            // Without the image nobody can say whether it is the same disk.
            let Some(up) = self.sink.take() else {
                return sink;
            };
            let source = self.source(volume, environment, &up.tree);
            let newest = up.newest_moment();
            self.sink = Some(up);
            let source = source?;
            self.geometry = source.geometry();
            self.source = Some(source);
            self.observer = None;
            self.behind_since = newest;
        }
        self.note_loss(volume, environment)?;
        if let Some(source) = &mut self.source {
            source.settle(volume, environment)?;
        }
        if volume.config().phase != Phase::Replicating {
            // What follows on the image is nothing that the volume ever was.
            (self.stream, self.is_at_a_point) = (None, false);
        }
        if sink.is_ok() {
            volume.store_is_known();
        }
        sink
    }

    fn bring_up_sink(&mut self, volume: &Volume, environment: &Environment) -> Result<()> {
        let note = |cause: &str| lifecycle::needs_resync(volume, environment, cause).map(drop);
        let config = volume.config();
        let sink = Sink::bring_up(&config, self.geometry, environment, note)?;
        if config.generation.is_none() {
            let own = sink.writer.catalogue().generation.generation();
            lifecycle::change_config(volume, environment, |config| {
                config.generation = Some(own.into());
            })?;
        }
        self.look_at_commit(sink.writer.catalogue().last_epoch());
        (self.brings, self.committing) = (None, None);
        if let (Some(inline), Some(newest)) = (&self.inline, sink.newest_time()) {
            inline.service().goes_on_from(newest);
        }
        self.sink = Some(sink);
        Ok(())
    }

    /// A loss that the kernel reports becomes the volume's phase.
    ///
    /// # Errors
    /// When the state folder cannot be written; the kernel goes on reporting it then.
    pub fn note_loss(&mut self, volume: &Volume, environment: &Environment) -> Result<()> {
        if let Some(source) = &mut self.source
            && let Some(loss) = source.loss().map(str::to_owned)
        {
            let noted = lifecycle::needs_resync(volume, environment, &loss)?;
            source.loss_is_noted(noted)?;
        }
        match self
            .inline
            .as_ref()
            .and_then(|inline| inline.take_overflow())
        {
            Some(cause) => lifecycle::needs_resync(volume, environment, &cause).map(drop),
            None => Ok(()),
        }
    }

    /// Both sides.
    ///
    /// # Errors
    /// [`ErrorKind::State`] unless both are up.
    pub fn live(&mut self) -> Result<(&mut Source, &mut Sink)> {
        match (&mut self.source, &mut self.sink) {
            (Some(source), Some(sink)) => Ok((source, sink)),
            _ => Err(Error::new(ErrorKind::State, "use the volume")
                .volume(self.id)
                .detail("it is not brought up")),
        }
    }

    /// Lets go of both sides after a failure, so that they are brought up anew. Tracking
    /// goes on in the kernel.
    pub fn drop_sides(&mut self) {
        if let Some(source) = self.source.take() {
            self.observer = source.observer();
        }
        self.look_at_own_commit();
        self.sink = None;
        self.rewind();
    }

    /// A commit has failed, perhaps behind the store's part of it.
    fn look_at_own_commit(&mut self) {
        if let Some(sink) = &self.sink {
            let newest = sink.writer.catalogue().last_epoch();
            self.look_at_commit(newest);
        }
    }

    /// The stream is read again from where the store ends.
    fn rewind(&mut self) {
        self.stream = None;
        if let Some(inline) = &self.inline {
            inline.service().reclaim(FAILED);
        }
    }

    /// The daemon ends: so does the service of the device's users. What waits in memory would
    /// be lost and known by its blocks only: it is shipped first, for a while, and what comes
    /// meanwhile when nobody is served any more, for a moment.
    pub fn end(&mut self, volume: &Volume) {
        if let Some(inline) = self.inline.clone() {
            let config = volume.config();
            let ships = config.shipping == Shipping::On && config.phase == Phase::Replicating;
            let home = |member: &mut Self, limit| match ships {
                true => member.bring_home(Instant::now() + limit),
                false => Ok(()),
            };
            let done = home(self, SHIP_FIRST);
            let ended = inline.end(Ending::Daemon);
            let done = done.and(ended).and_then(|()| home(self, SHIP_LAST));
            if let Err(error) = done {
                tracing::warn!(volume = %self.id, "{error}");
            }
        }
        self.drop_sides();
        if let Some(inline) = self.inline.take() {
            inline.close();
        }
    }

    /// Nobody is served any more, until the volume is taken up again.
    ///
    /// # Errors
    /// What the kernel says of a device that cannot be removed.
    pub fn stop_serving(&mut self, volume: &Volume) -> Result<()> {
        volume.set_inline(None);
        let Some(inline) = self.inline.take() else {
            return Ok(());
        };
        let ended = inline.end(Ending::Volume);
        inline.close();
        ended
    }

    /// What is in the stream and not in the store is known by its blocks only.
    pub fn break_off(&mut self, cause: &str) {
        self.stream = None;
        self.is_at_a_point = false;
        if let Some(inline) = &self.inline {
            inline.service().give_up(cause);
            inline.trim_spool();
        }
    }

    /// Lets go of the device until it is read again.
    pub fn rest(&mut self) {
        if let Some(source) = &mut self.source {
            source.rest();
        }
    }

    /// What was read and not brought home is dirty again.
    pub fn reclaim(&mut self) {
        if let Some(source) = &mut self.source {
            source.reclaim();
        }
        self.look_at_own_commit();
        (self.brings, self.committing) = (None, None);
        self.rewind();
    }

    /// Whether both sides are up.
    pub fn is_up(&self) -> bool {
        self.source.is_some() && self.sink.is_some()
    }

    /// Drops points that the policy no longer keeps.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn retain(&mut self) -> Result<()> {
        self.sink.as_mut().map_or(Ok(()), Sink::retain)
    }

    /// Folds some of what only dropped points needed.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn fold_step(&mut self) -> Result<FoldStep> {
        match &mut self.sink {
            Some(sink) => sink.writer.fold_step(),
            None => Ok(FoldStep::Nothing),
        }
    }

    /// How long the logs of the store are.
    pub fn log_bytes(&self) -> ByteLen {
        let sink = self.sink.as_ref();
        sink.map_or(ByteLen::ZERO, |sink| sink.writer.catalogue().log_bytes())
    }

    /// From now on nothing older than `moment` is missing in the store.
    pub fn caught_up_to(&mut self, moment: Instant) {
        self.behind_since = moment;
    }

    /// Takes everything of this volume out of the kernel.
    ///
    /// # Errors
    /// What the system said.
    pub fn release(&mut self, volume: &Volume, environment: &Environment) -> Result<()> {
        if let Some(inline) = &self.inline {
            inline.is_free()?;
        }
        handover::unprotected(&volume.config())?;
        self.sink = None;
        self.stream = None;
        let source = self.source.take();
        volume.set_inline(None);
        match self.inline.take() {
            Some(inline) => {
                inline.end(Ending::Volume)?;
                inline.close();
            }
            None if volume.config().capture == Capture::Ublk => inline::remove_leftover(self.id)?,
            None => {}
        }
        match source {
            Some(source) => source.release(),
            None => environment.remove_pins(self.id),
        }
    }

    /// Writes what only this side knows into `status`.
    pub fn describe(&self, status: &mut VolumeStatus) {
        match (&self.source, &self.observer) {
            (Some(source), _) => source.describe(status),
            (None, Some(observer)) => {
                let bytes = observer.dirty_blocks() * u64::from(self.geometry.block.get());
                status.dirty_bytes = bytes.min(self.geometry.size.get());
            }
            (None, None) => {}
        }
        if let Some(inline) = &self.inline {
            inline.describe(status);
        }
        if let Some(sink) = &self.sink {
            sink.describe(status);
        }
        let behind = self.behind_since.elapsed().as_secs_f64();
        status.lag_seconds = if status.dirty_bytes == 0 { 0.0 } else { behind };
    }

    /// Notes whether anything waits to be shipped: what is dirty later is no older than now.
    pub fn look_at_lag(&mut self) {
        if let Some(source) = &self.source
            && source.dirty_bytes() == 0
        {
            self.behind_since = Instant::now();
        }
    }
}

/// The block size that `asked` means on a volume of `size`.
pub fn block_size(asked: Option<BlockSize>, size: VolumeSize) -> BlockSize {
    asked.unwrap_or_else(|| BlockSize::default_for(size))
}
