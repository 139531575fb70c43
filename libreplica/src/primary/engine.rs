//! The primary: all volumes that this machine protects, and the operations that the
//! control socket, or a program that links this library, asks for.
//!
//! Each volume has a thread that brings it up, copies, resyncs and makes its points.
//! Whatever fails there is handled by one mechanism: drop what failed, wait, bring it up
//! again as after a restart. Tracking goes on in the kernel all the while.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hrl_format::id::{Generation, VolumeId};

use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Phase, Shipping, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::member::Member;
use crate::primary::pace::Pace;
use crate::primary::protect;
use crate::primary::spec::{PointOptions, PrimaryOptions, ProtectSpec};
use crate::primary::status::{PointSummary, Settled, VerifySummary, VolumeStatus};
use crate::primary::volume::{Volume, locked};
use crate::primary::{group, handover, homecoming, inline, lifecycle, show, verify};

/// How long a command waits for a volume's current slice of work to end.
const PATIENCE: Duration = Duration::from_secs(60);

struct Running {
    volume: Arc<Volume>,
    thread: Option<JoinHandle<()>>,
}

/// A volume that has just been protected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protected {
    /// Its id.
    pub id: VolumeId,
    /// Its name.
    pub name: String,
    /// What the device's users are given, if they go through the agent.
    pub address: Option<String>,
}

/// All volumes that this machine protects.
pub struct Primary {
    environment: Arc<Environment>,
    volumes: Mutex<BTreeMap<VolumeId, Running>>,
    /// Those whose settings cannot be read. They are shown, and can be unprotected.
    unreadable: Mutex<BTreeMap<VolumeId, VolumeStatus>>,
    /// One `protect` or `unprotect` at a time: each looks at all volumes first.
    changing: Mutex<()>,
}

impl Primary {
    /// Opens the state folder, thaws what a killed daemon left frozen, and takes every
    /// volume up again.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another daemon uses the folder; else what the system said.
    /// A volume that cannot be taken up is no error: its status says why.
    pub fn start(options: PrimaryOptions) -> Result<Arc<Self>> {
        let environment = Arc::new(Environment::open(options)?);
        let primary = Arc::new(Self {
            environment,
            volumes: Mutex::new(BTreeMap::new()),
            unreadable: Mutex::new(BTreeMap::new()),
            changing: Mutex::new(()),
        });
        let volumes = primary.environment.state.volumes()?;
        let known: Vec<_> = volumes.iter().map(|(id, _)| *id).collect();
        primary.environment.remove_orphans(&known);
        for (id, config) in volumes {
            match config {
                Ok(config) => primary.launch(config, None),
                Err(error) => {
                    tracing::error!("a volume is not taken up: {error}");
                    let status = show::unreadable(id, &error);
                    locked(&primary.unreadable).insert(id, status);
                }
            }
        }
        primary.environment.report_stale_pins();
        primary.first_look();
        Ok(primary)
    }

    /// Gives every volume a moment to be taken up, so that the first `status` is not blank.
    fn first_look(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        for volume in self.all() {
            while !volume.was_tried() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn launch(&self, config: VolumeConfig, member: Option<Member>) {
        let id = config.id;
        let status = show::at_first(&config, &self.environment);
        let member = member.unwrap_or_else(|| Member::new(&config));
        let is_complete = config.phase == Phase::Replicating;
        let volume = Arc::new(Volume::new(config, member, status));
        if !is_complete {
            volume.pace(Pace::owe_point);
        }
        locked(&self.volumes).insert(
            id,
            Running {
                volume: Arc::clone(&volume),
                thread: None,
            },
        );
        self.start_thread(&volume);
        self.refresh_peers();
    }

    fn start_thread(&self, volume: &Arc<Volume>) {
        let environment = Arc::clone(&self.environment);
        let worker = Arc::clone(volume);
        let thread = std::thread::Builder::new()
            .name(format!("vol-{}", &volume.id().to_string()[..8]))
            .spawn(move || lifecycle::run(&worker, &environment));
        match thread {
            Ok(thread) => {
                if let Some(running) = locked(&self.volumes).get_mut(&volume.id()) {
                    running.thread = Some(thread);
                }
            }
            Err(error) => {
                let error = Error::io("start the volume's thread", error);
                volume.publish_error(&error);
                volume.show_degraded(&error);
            }
        }
    }

    /// Tells every volume's thread which volumes there are, for groups.
    fn refresh_peers(&self) {
        self.environment.peers.set(self.all());
    }

    fn all(&self) -> Vec<Arc<Volume>> {
        locked(&self.volumes)
            .values()
            .map(|running| Arc::clone(&running.volume))
            .collect()
    }

    fn find(&self, name_or_id: &str) -> Result<Arc<Volume>> {
        let volumes = self.all();
        if let Ok(id) = name_or_id.parse::<VolumeId>()
            && let Some(volume) = volumes.iter().find(|volume| volume.id() == id)
        {
            return Ok(Arc::clone(volume));
        }
        let named: Vec<_> = volumes
            .iter()
            .filter(|volume| volume.config().name == name_or_id)
            .collect();
        match named.as_slice() {
            [one] => Ok(Arc::clone(one)),
            [] => Err(Error::new(ErrorKind::NotFound, "find the volume")
                .detail(format!("no volume `{name_or_id}` is protected here"))
                .advice("`replica status` lists those that are")),
            several => {
                let ids: Vec<_> = several
                    .iter()
                    .map(|volume| volume.id().to_string())
                    .collect();
                Err(Error::new(ErrorKind::Invalid, "find the volume")
                    .detail(format!(
                        "several are called `{name_or_id}`: {}",
                        ids.join(", ")
                    ))
                    .advice("name it by its id"))
            }
        }
    }

    /// Lets go of the device of a volume that was failed over, so that it can be brought up to
    /// date; its path.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the volume was not; [`ErrorKind::Busy`] if the device is in use;
    /// what the system says.
    pub fn prepare_homecoming(&self, volume: &str) -> Result<PathBuf> {
        homecoming::prepare(&*self.find(volume)?)
    }

    /// The volume will be this machine's again from `generation` on: it is taken up when the
    /// store says so, also after a restart.
    ///
    /// # Errors
    /// When the state folder cannot be written.
    pub fn announce_homecoming(&self, volume: &str, generation: Generation) -> Result<()> {
        let volume = self.find(volume)?;
        homecoming::announce(&volume, &self.environment, generation)
    }

    /// The store says that a volume has come home: nothing is waited for.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if it is not protected here.
    pub fn came_home(&self, volume: &str) -> Result<()> {
        self.find(volume)?.wake();
        Ok(())
    }

    /// Protects a device: returns what it is known by once its changes are captured.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] for a device or a name that is taken, [`ErrorKind::Invalid`]
    /// for a device that cannot be protected or a store that lies on it, and whatever the
    /// system said; nothing is left behind then.
    pub fn protect(&self, spec: ProtectSpec) -> Result<Protected> {
        let _changing = locked(&self.changing);
        let others: Vec<_> = self.all().iter().map(|volume| volume.config()).collect();
        let (config, member) = protect::protect(&self.environment, spec, &others)?;
        let protected = Protected {
            id: config.id,
            name: config.name.clone(),
            address: member.inline().map(|inline| inline.address().to_owned()),
        };
        self.launch(config, Some(member));
        Ok(protected)
    }

    /// Stops protecting a volume. When it returns, nothing of it is left in the kernel;
    /// its store is kept.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or what the system said while pins were removed.
    pub fn unprotect(&self, volume: &str) -> Result<()> {
        let _changing = locked(&self.changing);
        if let Ok(id) = volume.parse::<VolumeId>()
            && locked(&self.unreadable).contains_key(&id)
        {
            self.environment.remove_pins(id)?;
            inline::remove_leftover(id)?;
            self.environment.state.forget(id)?;
            locked(&self.unreadable).remove(&id);
            return Ok(());
        }
        let volume = self.find(volume)?;
        volume.request_stop();
        let thread = locked(&self.volumes)
            .get_mut(&volume.id())
            .and_then(|running| running.thread.take());
        if let Some(thread) = thread {
            let _ = thread.join();
        }
        if let Err(error) = self.release(&volume) {
            // It is a volume still: it goes on, with what it lost found out as ever.
            volume.publish_error(&error);
            volume.show_degraded(&error);
            volume.take_stop_back();
            self.start_thread(&volume);
            return Err(error);
        }
        locked(&self.volumes).remove(&volume.id());
        self.refresh_peers();
        Ok(())
    }

    /// Stops protecting a volume that is used elsewhere, for good. Its device stays read-only, until it
    /// is gone or somebody says otherwise.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it was not promoted elsewhere; those of [`Primary::unprotect`].
    pub fn retire(&self, volume: &str) -> Result<()> {
        handover::retire(&*self.find(volume)?, &self.environment)?;
        self.unprotect(volume)
    }

    /// Takes everything of a volume whose thread has ended out of kernel and state folder.
    fn release(&self, volume: &Volume) -> Result<()> {
        let mut member = volume.member_until(Instant::now() + PATIENCE)?;
        member.release(volume, &self.environment)?;
        self.environment.state.forget(volume.id())
    }

    /// Removes what dead daemons with other state folders left in the kernel; returns a
    /// line for each thing removed.
    ///
    /// # Errors
    /// What the system said.
    pub fn remove_stale(&self) -> Result<Vec<String>> {
        let _changing = locked(&self.changing);
        self.environment.remove_stale_pins()
    }

    /// Stops shipping a volume's changes; tracking goes on.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or what the system said.
    pub fn pause(&self, volume: &str) -> Result<()> {
        self.set_shipping(volume, Shipping::Paused)
    }

    /// Ships again, at once.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or what the system said.
    pub fn resume(&self, volume: &str) -> Result<()> {
        self.set_shipping(volume, Shipping::On)
    }

    fn set_shipping(&self, volume: &str, shipping: Shipping) -> Result<()> {
        let _changing = locked(&self.changing);
        let volume = self.find(volume)?;
        lifecycle::change_config(&volume, &self.environment, |config| {
            config.shipping = shipping;
        })?;
        show::shipping(&volume, shipping);
        if shipping == Shipping::On {
            volume.pace(Pace::make_due);
        }
        // What the group could not do without it, it does now.
        for member in self.environment.peers.group_of(&volume) {
            member.wake();
        }
        Ok(())
    }

    /// The status of all volumes, or of one.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such volume.
    pub fn status(&self, volume: Option<&str>) -> Result<Vec<VolumeStatus>> {
        let unreadable = locked(&self.unreadable);
        if let Some(status) = volume.and_then(|id| unreadable.get(&id.parse().ok()?)) {
            return Ok(vec![status.clone()]);
        }
        let volumes = match volume {
            Some(name) => vec![self.find(name)?],
            None => self.all(),
        };
        let shown = volumes.iter().map(|shown| show::fresh(shown));
        let others = unreadable.values().filter(|_| volume.is_none());
        Ok(shown.chain(others.cloned()).collect())
    }

    /// The settings of a volume.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when there is no such volume.
    pub fn config(&self, volume: &str) -> Result<VolumeConfig> {
        self.find(volume).map(|volume| volume.config())
    }

    /// Waits until a volume's first copy, or its resync, has ended and a point was made, or
    /// is known to be out of reach: see [`Settled`].
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; what stopped the first point from being made; a volume
    /// that is paused, or unprotected meanwhile.
    pub fn wait_until_replicating(&self, volume: &str) -> Result<Settled> {
        let volume = self.find(volume)?;
        loop {
            if let Some(outcome) = show::settled(&volume) {
                return outcome;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether what [`Primary::wait_until_replicating`] waits for has come: `None` if not yet.
    ///
    /// # Errors
    /// As there.
    pub fn settled(&self, volume: &str) -> Result<Option<Settled>> {
        show::settled(&*self.find(volume)?).transpose()
    }

    /// Makes a recovery point now, of the volume and of those in its group; returns when
    /// it is durable in the store.
    ///
    /// # Errors
    /// [`ErrorKind::ResyncNeeded`] during the first copy and a resync;
    /// [`ErrorKind::TimedOut`] when it could not be made within `limit`; else what failed.
    pub fn point(
        &self,
        volume: &str,
        options: &PointOptions,
        limit: Duration,
    ) -> Result<PointSummary> {
        let volume = self.find(volume)?;
        group::point(&volume, &self.environment, options, Instant::now() + limit)
    }

    /// Compares source and image.
    ///
    /// # Errors
    /// [`ErrorKind::ResyncNeeded`] during the first copy and a resync; else what failed.
    pub fn verify(&self, volume: &str) -> Result<VerifySummary> {
        let volume = self.find(volume)?;
        verify::verify(&volume, &self.environment)
    }

    /// Starts a resync: reads the whole source and ships what differs.
    ///
    /// # Errors
    /// [`ErrorKind::State`] in the first copy, and while a resync runs or waits; else what
    /// the system said.
    pub fn resync(&self, volume: &str) -> Result<()> {
        let volume = self.find(volume)?;
        lifecycle::ask_for_resync(&volume, &self.environment)
    }

    /// Ends all threads, with everything durable that can be. Tracking goes on.
    pub fn stop(&self) {
        let threads: Vec<_> = locked(&self.volumes)
            .values_mut()
            .map(|running| {
                running.volume.request_stop();
                running.thread.take()
            })
            .collect();
        for thread in threads.into_iter().flatten() {
            let _ = thread.join();
        }
        for volume in self.all() {
            match volume.member_until(Instant::now() + PATIENCE) {
                Ok(mut member) => member.end(&volume),
                Err(error) => volume.publish_error(&error),
            }
        }
        self.environment.end();
    }
}
