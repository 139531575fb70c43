//! One volume's inline capture, from the device that it owns to the threads that serve it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::capture::inline::activity_file::ActivityFile;
use crate::capture::inline::backlog::{Backlog, Limits};
use crate::capture::inline::copier;
use crate::capture::inline::errands::{self, Errands};
use crate::capture::inline::interceptor::{Interceptor, lock};
use crate::capture::inline::lane::Lane;
use crate::capture::inline::ledger::{Ledger, Survived};
use crate::capture::inline::read_back;
use crate::capture::inline::traffic::{Traffic, Verdict};
use crate::capture::inline::usher;
use crate::device::{BlockDevice, Layers, OpenFor};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::Geometry;
use crate::id::VolumeId;
use crate::units::{BlockSize, ByteLen, Extent};

/// What to capture, and where what it needs is kept.
#[derive(Clone, Debug)]
pub struct InlineSpec {
    /// The folder of the ledger and the activity log, which must not lie behind the device.
    pub folder: PathBuf,
    /// The volume.
    pub volume: VolumeId,
    /// The device behind it.
    pub disk: BlockDevice,
    /// What one dirty bit covers.
    pub block: BlockSize,
    /// What the backlog may hold.
    pub limits: Limits,
}

impl InlineSpec {
    const fn geometry(&self) -> Geometry {
        Geometry {
            size: self.disk.size(),
            block: self.block,
            sector: self.disk.logical_sector(),
        }
    }
}

/// What an earlier process has kept.
#[derive(Debug)]
pub enum Kept {
    /// Nothing.
    Nothing,
    /// Every change, for the machine has run since.
    All,
    /// The same, but so much was written to the device by somebody else meanwhile, at least.
    Written(ByteLen),
    /// The same, but the device was gone meanwhile.
    Reattached,
    /// What was durable when the machine was restarted, orderly or not.
    Flushed,
    /// Something that cannot be trusted.
    Unusable(Error),
}

/// The device, taken for ourselves: nobody can mount it, or claim it otherwise.
#[derive(Debug)]
pub struct Claim(File);

/// What was found of an earlier process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumed {
    /// Nothing: it begins now.
    Begun,
    /// In this boot of the machine: every change since is dirty.
    Unbroken,
    /// The machine was restarted, orderly or not: what may differ is dirty.
    AfterRestart {
        /// What the ledger had as dirty: changed, and not yet in the store.
        kept: ByteLen,
        /// The regions in the activity log: what may have been written besides.
        compared: ByteLen,
    },
}

/// The capture at work.
#[derive(Debug)]
pub struct Service {
    interceptor: Arc<Interceptor>,
    /// Taken when it ends: then the errands' thread ends too.
    errands: Mutex<Option<Errands>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    disk: BlockDevice,
    copy_limit: ByteLen,
}

impl Service {
    /// Takes the device for itself and begins, or goes on where an earlier process ended.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if the device is mounted or held by somebody;
    /// [`ErrorKind::Vanished`], [`ErrorKind::Resized`]; [`ErrorKind::Damaged`],
    /// [`ErrorKind::Foreign`] if what was kept is not usable: then remove it with
    /// [`Self::forget`], begin anew, and compare the whole volume.
    pub fn start(spec: &InlineSpec) -> Result<(Self, Resumed)> {
        Self::start_on(spec, Self::claim(spec)?)
    }

    /// Takes the device for itself.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if the device is mounted or held by somebody, who is named;
    /// [`ErrorKind::Vanished`], [`ErrorKind::Resized`].
    pub fn claim(spec: &InlineSpec) -> Result<Claim> {
        spec.disk.still_there()?;
        let opened = spec.disk.open_node(OpenFor::Ownership);
        opened.map(Claim).map_err(|error| match error.kind() {
            ErrorKind::Busy => in_use(&spec.disk, error),
            _ => error,
        })
    }

    /// As [`Self::start`], on a device that was claimed. What [`Self::look`] found is not found
    /// again.
    ///
    /// # Errors
    /// As there.
    pub fn start_on(spec: &InlineSpec, claim: Claim) -> Result<(Self, Resumed)> {
        let (geometry, Claim(device)) = (spec.geometry(), claim);
        let (ledger, log, resumed) = take_up(spec, geometry, &device)?;
        let traffic = Traffic::open(&traffic_path(spec))?;
        traffic.settle(&spec.disk)?;
        let backlog = Backlog::new(spec.limits.clone(), geometry);
        let path = spec.disk.node().to_owned();
        let interceptor = Interceptor::new(device, path, geometry, ledger, traffic, backlog);
        let service = Self::launch(Arc::new(interceptor), log, spec)?;
        Ok((service, resumed))
    }

    /// What an earlier process has kept of a device that was claimed, and what has happened to
    /// it since. Nothing is changed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn look(spec: &InlineSpec, _: &Claim) -> Result<Kept> {
        let (ledger, log) = (ledger_path(spec), log_path(spec));
        if !ledger.exists() && !log.exists() {
            return Ok(Kept::Nothing);
        }
        let seen = Ledger::look(&ledger, spec.volume, spec.geometry())
            .and_then(|survived| ActivityFile::open(&log, spec.volume).map(|_| survived));
        match seen {
            Ok(Survived::All) => {
                let traffic = Traffic::open(&traffic_path(spec))?;
                Ok(match traffic.verdict(&spec.disk)? {
                    Verdict::Ours | Verdict::Unknown => Kept::All,
                    Verdict::Foreign(bytes) => Kept::Written(bytes),
                    Verdict::OtherDisk => Kept::Reattached,
                })
            }
            Ok(Survived::Flushed) => Ok(Kept::Flushed),
            Err(error) if error.kind() == ErrorKind::Io => Err(error),
            Err(error) => Ok(Kept::Unusable(error)),
        }
    }

    /// Removes what is kept for a volume.
    ///
    /// # Errors
    /// What the file system says.
    pub fn forget(spec: &InlineSpec) -> Result<()> {
        for path in [ledger_path(spec), log_path(spec), traffic_path(spec)] {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).at("remove what capture kept", path);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn launch(interceptor: Arc<Interceptor>, log: ActivityFile, spec: &InlineSpec) -> Result<Self> {
        let (errands, received) = Errands::new();
        let path = interceptor.path.clone();
        let builder = |name: &str| std::thread::Builder::new().name(name.to_owned());
        let (device, geometry) = (Arc::clone(&interceptor.device), interceptor.geometry);
        let runner = builder("errands").spawn(move || errands::run(&device, &geometry, &received));
        let service = Self {
            interceptor: Arc::clone(&interceptor),
            errands: Mutex::new(Some(errands)),
            threads: Mutex::new(vec![runner.at("start a thread", &path)?]),
            disk: spec.disk.clone(),
            copy_limit: spec.limits.bytes,
        };
        let reader = Arc::clone(&interceptor);
        let reading = builder("read-back").spawn(move || read_back::run(&reader));
        lock(&service.threads).push(reading.at("start a thread", &path)?);
        let copier = Arc::clone(&interceptor);
        let copying = builder("copier").spawn(move || copier::run(&copier));
        lock(&service.threads).push(copying.at("start a thread", &path)?);
        let disk = spec.disk.clone();
        let ushering = builder("usher").spawn(move || usher::run(&interceptor, log, &disk));
        lock(&service.threads).push(ushering.at("start a thread", &path)?);
        Ok(service)
    }

    /// A way to the device for the calling thread, for `depth` requests at a time.
    ///
    /// # Errors
    /// [`ErrorKind::Kernel`] where io_uring is not allowed; [`ErrorKind::State`] when the
    /// service ends.
    pub fn lane(&self, depth: u32) -> Result<Lane> {
        self.entrance().lane(depth)
    }

    /// What opens lanes, for a front's own threads.
    pub fn entrance(&self) -> Entrance {
        Entrance {
            interceptor: Arc::clone(&self.interceptor),
            errands: lock(&self.errands).clone(),
            disk: self.disk.clone(),
        }
    }

    /// The device's size and units.
    pub fn geometry(&self) -> Geometry {
        self.interceptor.geometry
    }

    pub(super) fn interceptor(&self) -> &Interceptor {
        &self.interceptor
    }

    pub(super) fn copy_limit(&self) -> u64 {
        self.copy_limit.get()
    }

    /// Makes an extent dirty, whoever wrote there.
    pub fn mark(&self, extent: Extent) {
        let _alone = lock(&self.interceptor.state);
        self.interceptor.ledger.mark(extent);
    }

    /// Changes may have been missed: what was discarded may have been written since.
    pub fn forget_undefined(&self) {
        let _alone = lock(&self.interceptor.state);
        self.interceptor.ledger.define_all();
    }

    /// Ends the service: lanes are told to stop, and what is under way ends. The ledger keeps
    /// what is dirty. The fronts' threads, and whoever has an [`Entrance`], must end for this
    /// to return.
    pub fn stop(&self) {
        self.interceptor.stop_lanes();
        drop(lock(&self.errands).take());
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Opens lanes for the threads of a front.
#[derive(Clone, Debug)]
pub struct Entrance {
    interceptor: Arc<Interceptor>,
    errands: Option<Errands>,
    disk: BlockDevice,
}

impl Entrance {
    /// As [`Service::lane`].
    ///
    /// # Errors
    /// As there.
    pub fn lane(&self, depth: u32) -> Result<Lane> {
        let Some(errands) = &self.errands else {
            return Err(Error::new(ErrorKind::State, "open a lane to the device"));
        };
        Lane::open(&self.interceptor, errands, depth)
    }

    /// The device.
    pub const fn disk(&self) -> &BlockDevice {
        &self.disk
    }

    /// The device's size and units.
    pub fn geometry(&self) -> Geometry {
        self.interceptor.geometry
    }
}

/// Names who has the device that cannot be had.
fn in_use(disk: &BlockDevice, error: Error) -> Error {
    let advice = "unmount it, and stop what uses it: its users go through the agent now";
    let mounts = Layers::above(&[disk]).ok();
    let mounted = mounts
        .as_ref()
        .and_then(|layers| layers.filesystems().first());
    let error = match mounted {
        Some(filesystem) => {
            let at = filesystem.mount_point().display();
            error.detail(format!("it is mounted on {at}"))
        }
        None => error,
    };
    error.advice(advice)
}

fn ledger_path(spec: &InlineSpec) -> PathBuf {
    spec.folder.join("dirty")
}

fn log_path(spec: &InlineSpec) -> PathBuf {
    spec.folder.join("activity")
}

fn traffic_path(spec: &InlineSpec) -> PathBuf {
    spec.folder.join("traffic")
}

/// Opens or makes what is kept of a volume. After a restart of the machine, what the activity
/// log names is dirty; in any case the log is empty then, and nothing is forgotten for it.
fn take_up(
    spec: &InlineSpec,
    geometry: Geometry,
    device: &File,
) -> Result<(Ledger, ActivityFile, Resumed)> {
    let (ledger_path, log_path) = (ledger_path(spec), log_path(spec));
    if !ledger_path.exists() && !log_path.exists() {
        // The log last: a ledger alone is one that was never used.
        let ledger = Ledger::create(&ledger_path, spec.volume, geometry)?;
        let log = ActivityFile::create(&log_path, spec.volume)?;
        return Ok((ledger, log, Resumed::Begun));
    }
    let (ledger, survived) = Ledger::open(&ledger_path, spec.volume, geometry)?;
    let (mut log, regions) = ActivityFile::open(&log_path, spec.volume)?;
    let doubt = || {
        let extents = regions
            .iter()
            .filter_map(|region| region.extent(geometry.size));
        let marked = extents.map(|extent| {
            ledger.mark(extent);
            // It may have been discarded, or written since: nobody knows.
            ledger.define(extent);
            extent.len().get()
        });
        marked.sum::<u64>()
    };
    let resumed = match survived {
        Survived::All => Resumed::Unbroken,
        Survived::Flushed => {
            let kept = ledger.dirty_blocks() * u64::from(geometry.block.get());
            Resumed::AfterRestart {
                kept: ByteLen::new(kept.min(geometry.size.get())),
                compared: ByteLen::new(doubt()),
            }
        }
    };
    let flushed = device.sync_data();
    if flushed.is_err() {
        // What the device had taken it may have lost, and the next flush would say nothing.
        doubt();
        ledger.flush()?;
    }
    flushed.at("flush the device", spec.disk.node())?;
    ledger.settle()?;
    log.write(&[])?;
    Ok((ledger, log, resumed))
}
