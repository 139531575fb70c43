//! A volume whose users reach the device through us: the capture and the front that serves
//! them. Unlike the sides of a volume it is never dropped when something fails: its users
//! wait for it. It begins when the volume is taken up, before anything else, and ends when
//! the daemon does or the volume is unprotected.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use hrl_format::id::VolumeId;
use hrl_format::record::Record;
use hrl_format::units::{Sequence, Timestamp};

use crate::capture::inline::{InlineSpec, Kept, Limits, Resumed, Service};
use crate::capture::nbd::{NbdOptions, NbdServer};
use crate::capture::ublk::{How, Leftover, State, UblkDevice, UblkSpec};
use crate::device::{BlockDevice, Layers};
use crate::error::{Error, ErrorKind, Result};
use crate::policy::Mode;
use crate::primary::config::{Capture, Phase, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::since::{Knowledge, Since};
use crate::primary::spooler::{Spooler, SpoolerSpec};
use crate::primary::status::{LastError, ModeChanged, UblkSummary, VolumeStatus};
use crate::primary::volume::locked;

/// Extents that are told apart in metadata mode.
const EXTENTS: usize = 1 << 17;

enum Front {
    Nbd(NbdServer),
    Ublk(UblkDevice),
}

/// Why the service of a device's users ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The daemon ends, and another will go on: where they can, users wait for it.
    Daemon,
    /// The volume is given up.
    Volume,
}

/// The capture of one volume, and its front.
pub struct Inline {
    service: Arc<Service>,
    front: Mutex<Option<Front>>,
    /// What its users are given: a URI, or a device's path.
    address: String,
    /// The same as a device of this machine, if it is one.
    shown: Option<BlockDevice>,
    /// What can be said of the time since the points.
    knowledge: Arc<Knowledge>,
    /// Where the stream waits for which memory has no room.
    spooler: Spooler,
    /// Why the mode is what it is.
    mode_cause: Mutex<String>,
    /// How many refused changes the status has been told of.
    refused: AtomicU64,
}

/// What is known of the time before a capture began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// It is the disk that was served before.
    SameDisk,
    /// The machine was restarted, or what was kept is lost: it may be another disk.
    MaybeAnother,
}

impl Inline {
    /// Takes the device and serves its users. If changes may have been missed, `note` is
    /// given the cause, and must make it durable, before anything begins anew.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] for a device that is mounted or held; what `note` returned; what
    /// the system said.
    pub fn begin(
        config: &VolumeConfig,
        device: &BlockDevice,
        environment: &Environment,
        note: impl FnOnce(&str) -> Result<()>,
    ) -> Result<(Self, Past)> {
        let spec = spec(config, device, environment);
        // First: what is found must not change any more.
        let claim = Service::claim(&spec).map_err(|error| error.volume(config.id))?;
        let kept = Service::look(&spec, &claim)?;
        let lost = lost(&kept, device);
        if let Some(cause) = &lost {
            note(cause)?;
        }
        if matches!(kept, Kept::Unusable(_)) {
            Service::forget(&spec)?;
        }
        let started = Service::start_on(&spec, claim);
        let (service, resumed) = started.map_err(|error| error.volume(config.id))?;
        let past = match resumed {
            Resumed::Unbroken if !matches!(kept, Kept::Reattached) => Past::SameDisk,
            _ => Past::MaybeAnother,
        };
        let cause = match resumed {
            Resumed::AfterRestart { kept, compared } => {
                let cause = format!(
                    "the machine was restarted; {kept} bytes were not yet in the store, and \
                     {compared} were being written or had been a moment before"
                );
                tracing::info!(volume = %config.id, "{cause}: they are read again");
                cause
            }
            _ => "the agent was started".to_owned(),
        };
        let service = Arc::new(service);
        if lost.is_some() {
            service.forget_undefined();
        }
        service.lose_stream(&cause);
        let spooler = Spooler::start(&service, spooler_spec(config, environment, &service))?;
        let knowledge = Arc::new(Knowledge::default());
        match open_front(config, environment, &service, &knowledge) {
            Ok(front) => Ok((Self::with(service, knowledge, spooler, front), past)),
            Err(error) => {
                // Else its threads would hold the device for ever.
                service.stop();
                spooler.stop();
                Err(error)
            }
        }
    }

    fn with(
        service: Arc<Service>,
        knowledge: Arc<Knowledge>,
        spooler: Spooler,
        opened: Opened,
    ) -> Self {
        Self {
            service,
            knowledge,
            front: Mutex::new(Some(opened.front)),
            address: opened.address,
            shown: opened.shown,
            spooler,
            mode_cause: Mutex::default(),
            refused: AtomicU64::new(0),
        }
    }

    /// The volume's phase is this: it says whether what changed since the points is known.
    pub fn follows(&self, phase: &Phase) {
        self.knowledge.follows(phase);
    }

    /// The capture.
    pub const fn service(&self) -> &Arc<Service> {
        &self.service
    }

    /// What its users are given.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The device that its users see, if it is one of this machine.
    pub const fn shown(&self) -> Option<&BlockDevice> {
        self.shown.as_ref()
    }

    /// Gives `put` spooled changes: see [`Spooler::read`].
    ///
    /// # Errors
    /// As there.
    pub fn read_spool(
        &self,
        from: Sequence,
        upto: Sequence,
        put: impl FnMut(&Record<&[u8]>, Timestamp) -> Result<()>,
    ) -> Result<Sequence> {
        self.spooler.read(from, upto, put)
    }

    /// Removes what the store has from the spool.
    pub fn trim_spool(&self) {
        self.spooler.trim();
    }

    /// Why the volume must be compared, if the spool has passed its limit since this was last
    /// asked.
    pub fn take_overflow(&self) -> Option<String> {
        self.spooler.take_overflow()
    }

    /// Writes what capture knows into `status`, and tells the log how its mode has changed.
    pub fn describe(&self, status: &mut VolumeStatus) {
        let waiting = self.service.waiting();
        let mut newest = locked(&self.mode_cause);
        for change in self.service.mode_changes() {
            let (mode, cause) = (change.mode.as_str(), &change.cause);
            match change.mode {
                Mode::Data => tracing::info!("capture goes over to {mode} mode: {cause}"),
                _ => tracing::warn!("capture falls to {mode} mode: {cause}"),
            }
            newest.clone_from(cause);
            status.mode_changed(ModeChanged::from(&change));
        }
        status.mode = waiting.mode.as_str().to_owned();
        status.mode_cause = (waiting.mode != Mode::Data).then(|| match self.spooler.trouble() {
            Some(trouble) => format!("{newest}; the spool cannot be used: {trouble}"),
            None => newest.clone(),
        });
        status.buffered_bytes = waiting.held.get();
        status.spooled_bytes = self.spooler.bytes().get();
        let bytes = self.service.dirty_blocks() * u64::from(self.service.geometry().block.get());
        status.dirty_bytes = bytes.min(self.service.geometry().size.get());
        status.address = Some(self.address.clone());
        status.capture_trouble = self.service.trouble();
        if let Some(Front::Ublk(device)) = &*locked(&self.front) {
            let device = device.status();
            status.ublk = Some(UblkSummary::from(&device));
            if device.state == State::Stopped {
                let why = device.trouble.unwrap_or_default();
                status.capture_trouble = Some(format!(
                    "{} was stopped, and its users get errors: {why}",
                    self.address
                ));
            }
        }
        self.tell_refused(status);
    }

    /// Tells of changes that the device has refused since the last time.
    fn tell_refused(&self, status: &mut VolumeStatus) {
        let refused = self.service.counters().failed;
        let new = refused - self.refused.swap(refused, Ordering::Relaxed);
        if new == 0 {
            return;
        }
        let error = Error::new(ErrorKind::Io, "write to the device")
            .path(&status.device)
            .detail(format!("it refused {new} changes; who made them was told"))
            .advice("what it holds there is read back by itself; look at the disk");
        tracing::warn!(volume = status.id, "{error}");
        status.counters.writes_refused += new;
        status.last_error = Some(LastError::new(&error, Timestamp::now()));
    }

    /// Ends the service of its users: what they have begun ends, what is dirty stays noted.
    ///
    /// # Errors
    /// What the kernel says of a device that cannot be removed; it is no longer served.
    pub fn end(&self, why: Ending) -> Result<()> {
        let front = locked(&self.front).take();
        let ended = match (front, why) {
            (Some(Front::Nbd(server)), _) => {
                server.stop();
                Ok(())
            }
            (Some(Front::Ublk(device)), Ending::Daemon) => device.stop(How::Detach),
            (Some(Front::Ublk(device)), Ending::Volume) => device.stop(How::Remove),
            (None, _) => Ok(()),
        };
        self.service.stop();
        ended
    }

    /// Takes away what users reach the device by. Capture goes on, with nothing to capture.
    ///
    /// # Errors
    /// What the kernel says of a device that cannot be removed.
    pub fn close_front(&self) -> Result<()> {
        match locked(&self.front).take() {
            Some(Front::Nbd(server)) => {
                server.stop();
                Ok(())
            }
            Some(Front::Ublk(device)) => device.stop(How::Remove),
            None => Ok(()),
        }
    }

    /// How many users are connected, where that is known.
    pub fn clients(&self) -> usize {
        match &*locked(&self.front) {
            Some(Front::Nbd(server)) => server.clients(),
            Some(Front::Ublk(_)) | None => 0,
        }
    }

    /// Nothing is shipped any more: forgets what is spooled.
    pub fn close(&self) {
        self.spooler.stop();
    }

    /// A device that is mounted, or held by another, is not taken away from its users.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming who uses it.
    pub fn is_free(&self) -> Result<()> {
        let shown = self.shown.as_ref();
        shown.map_or(Ok(()), |shown| {
            is_free(shown, "unmount it, or end what uses it, first")
        })
    }
}

/// Removes the device that users of a volume are left with whom nobody serves: one whose
/// removal has failed, or whose disk cannot be taken again.
///
/// # Errors
/// [`ErrorKind::Busy`] if it is mounted, or held; what the kernel says.
pub fn remove_leftover(volume: VolumeId) -> Result<()> {
    let Some(left) = Leftover::find(volume)? else {
        return Ok(());
    };
    let device = BlockDevice::open(left.path())?;
    is_free(
        &device,
        "nobody serves it: bring the disk back, or give up what is not written there \
         (`umount --lazy`)",
    )?;
    left.remove()
}

fn is_free(device: &BlockDevice, advice: &str) -> Result<()> {
    let layers = Layers::above(&[device])?;
    let mounted = layers.filesystems().first();
    let user = mounted.map(|filesystem| filesystem.mount_point().display().to_string());
    let user = user.or_else(|| device.holders().first().map(ToString::to_string));
    match user {
        None => Ok(()),
        Some(user) => Err(Error::new(ErrorKind::Busy, "remove the device")
            .path(device.path())
            .detail(format!("{user} uses it"))
            .advice(advice)),
    }
}

fn spooler_spec(
    config: &VolumeConfig,
    environment: &Environment,
    service: &Service,
) -> SpoolerSpec {
    let folder = match &config.spool {
        Some(folder) => folder.clone(),
        None => environment.state.path().join("spool"),
    };
    SpoolerSpec {
        folder: folder.join(config.id.to_string()),
        volume: config.id,
        geometry: service.geometry(),
        key_file: config.key_file.clone(),
    }
}

fn spec(config: &VolumeConfig, device: &BlockDevice, environment: &Environment) -> InlineSpec {
    InlineSpec {
        folder: environment.state.volume_dir(config.id),
        volume: config.id,
        disk: device.clone(),
        block: config.block(),
        limits: Limits {
            bytes: environment.options.buffer,
            extents: EXTENTS,
            shared: Arc::clone(&environment.budget),
        },
    }
}

/// Why changes may have been missed, if they may.
fn lost(kept: &Kept, device: &BlockDevice) -> Option<String> {
    // Since the machine was started, and before we were there to see it.
    let written = || {
        device
            .stats()
            .map_or(0, |stats| stats.writes + stats.discards)
    };
    match kept {
        Kept::All => None,
        Kept::Written(bytes) => Some(format!(
            "the device was written to by somebody else while the agent did not serve it: \
             {bytes} bytes at least"
        )),
        Kept::Reattached => Some("the device was gone and has come back".to_owned()),
        Kept::Nothing => Some("what capture kept of the volume is gone".to_owned()),
        Kept::Unusable(error) => Some(format!("what capture kept is not usable: {error}")),
        Kept::Flushed if written() > 0 => Some(
            "the device was written to after the restart, before the agent served it".to_owned(),
        ),
        Kept::Flushed => None,
    }
}

struct Opened {
    front: Front,
    address: String,
    shown: Option<BlockDevice>,
}

fn open_front(
    config: &VolumeConfig,
    environment: &Environment,
    service: &Arc<Service>,
    knowledge: &Arc<Knowledge>,
) -> Result<Opened> {
    match config.capture {
        Capture::Nbd => {
            let options = NbdOptions::new(socket(config, environment));
            let since = Since::new(config.store.clone(), config.id, service, knowledge);
            let server = NbdServer::start(service.entrance(), options, Arc::new(since))?;
            let address = server.uri();
            Ok(Opened {
                front: Front::Nbd(server),
                address,
                shown: None,
            })
        }
        Capture::Ublk => {
            let device = UblkDevice::start(service.entrance(), &UblkSpec::new(config.id))?;
            let address = device.path().display().to_string();
            let shown = Some(BlockDevice::open(device.path())?);
            Ok(Opened {
                front: Front::Ublk(device),
                address,
                shown,
            })
        }
        Capture::Ebpf => Err(Error::new(ErrorKind::Unsupported, "serve the device")
            .volume(config.id)
            .detail(format!("not as {}", config.capture.as_str()))),
    }
}

/// The socket, beside the control socket.
fn socket(config: &VolumeConfig, environment: &Environment) -> PathBuf {
    environment
        .options
        .socket_dir
        .join(format!("{}.nbd", config.id))
}
