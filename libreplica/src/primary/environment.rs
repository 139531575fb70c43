//! What all volumes of a daemon share: the state folder, the settings, the freezer with
//! its watchdog, the list of peers.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use hrl_format::id::VolumeId;

use nix::fcntl::{Flock, FlockArg};

use crate::capture::{self, AttachSpec, FolderId, PinInfo};
use crate::error::{ErrorKind, IoContext, Result};
use crate::primary::group::Peers;
use crate::primary::quiesce::{self, Freezer};
use crate::primary::spec::PrimaryOptions;
use crate::primary::state_dir::StateDir;
use crate::primary::volume::locked;

/// What all volumes of a daemon share.
pub struct Environment {
    /// The state folder, locked.
    pub state: StateDir,
    /// How the daemon is set up.
    pub options: PrimaryOptions,
    /// All volumes.
    pub peers: Peers,
    freezer: Mutex<Freezer>,
    /// Held for as long as this daemon lives, so that others see that it does.
    _alive: Flock<File>,
}

/// Where daemons show that they live: one locked file each, named by the state folder's id.
/// Fixed, for pins in bpffs are the whole machine's, too.
const OWNERS: &str = "/run/replica/owners";

impl Environment {
    /// Opens the state folder, thaws what a killed daemon left frozen, and starts the
    /// watchdog.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] when another daemon uses the folder; else what the
    /// system said.
    pub fn open(options: PrimaryOptions) -> Result<Self> {
        let state = StateDir::open(&options.state_dir)?;
        let alive = show_life(&owner_file(FolderId::from_bytes(state.id())))?;
        for recovered in quiesce::recover(&options.run_dir)? {
            let (point, outcome) = (recovered.mount_point.display(), recovered.outcome);
            tracing::warn!("an earlier daemon left {point} frozen: {outcome:?}");
        }
        let mut freezer = Freezer::guarded(&options.run_dir);
        for shortcoming in freezer.start()? {
            tracing::warn!("the watchdog of freezes: {shortcoming}");
        }
        let freezer = Mutex::new(freezer);
        Ok(Self {
            state,
            options,
            peers: Peers::default(),
            freezer,
            _alive: alive,
        })
    }

    /// The freezer. One point freezes at a time: freezes of several volumes would only
    /// wait for each other's writes.
    pub fn freezer(&self) -> MutexGuard<'_, Freezer> {
        locked(&self.freezer)
    }

    /// Removes a volume's pins from bpffs; none is no error.
    ///
    /// # Errors
    /// What the system said.
    pub fn remove_pins(&self, volume: VolumeId) -> Result<()> {
        match capture::remove_pins(Path::new(AttachSpec::PINS), volume) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    fn is_stale(&self, pin: &PinInfo) -> bool {
        pin.tracked.as_ref().is_some_and(|tracked| {
            *tracked.folder.as_bytes() != self.state.id() && !lives(&owner_file(tracked.folder))
        })
    }

    /// Removes the pins of this folder whose volume it does not know: those of a `protect`
    /// or an `unprotect` that was cut short.
    pub fn remove_orphans(&self, known: &[VolumeId]) {
        for pin in capture::list_pins(Path::new(AttachSpec::PINS)).unwrap_or_default() {
            let ours = pin.tracked.as_ref().is_some_and(|tracked| {
                *tracked.folder.as_bytes() == self.state.id() && !known.contains(&pin.volume)
            });
            if ours {
                let removed = self.remove_pins(pin.volume);
                tracing::warn!(volume = %pin.volume, ?removed, "tracking of no known volume");
            }
        }
    }

    /// Logs what dead daemons with other state folders left in the kernel.
    pub fn report_stale_pins(&self) {
        let pins = match capture::list_pins(Path::new(AttachSpec::PINS)) {
            Ok(pins) => pins,
            Err(error) => {
                tracing::warn!("the pins in bpffs cannot be listed: {error}");
                return;
            }
        };
        for pin in pins.iter().filter(|pin| self.is_stale(pin)) {
            tracing::warn!(
                volume = %pin.volume,
                "a dead daemon with another state folder left tracking attached; \
                 `replica unprotect --stale` removes it"
            );
        }
    }

    /// Removes what dead daemons with other state folders left in the kernel; returns a
    /// line for each.
    ///
    /// # Errors
    /// What the system said.
    pub fn remove_stale_pins(&self) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for pin in capture::list_pins(Path::new(AttachSpec::PINS))? {
            if self.is_stale(&pin) {
                self.remove_pins(pin.volume)?;
                removed.push(format!("the tracking of volume {}", pin.volume));
            }
        }
        Ok(removed)
    }
}

fn owner_file(folder: FolderId) -> PathBuf {
    Path::new(OWNERS).join(folder.to_string())
}

fn show_life(path: &Path) -> Result<Flock<File>> {
    fs::create_dir_all(OWNERS).at("make the folder of owners", OWNERS)?;
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path);
    let file = file.at("show that this daemon lives", path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| errno)
        .at("show that this daemon lives", path)
}

/// Whether the daemon of that file lives. What cannot be told counts as alive: nothing of
/// it is removed then.
fn lives(path: &Path) -> bool {
    match File::open(path) {
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        Ok(file) => Flock::lock(file, FlockArg::LockSharedNonblock).is_err(),
    }
}
