//! What all volumes of a daemon share: the state folder, the settings, the freezer with
//! its watchdog, the list of peers.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use hrl_format::id::VolumeId;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::capture::inline::Budget;
use crate::capture::{self, AttachSpec, FolderId, PinInfo, PinStage};
use crate::device::Layers;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::primary::group::Peers;
use crate::primary::hooks;
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
    /// The memory for data that waits to be shipped, of all volumes.
    pub budget: Arc<Budget>,
    freezer: Mutex<Freezer>,
    /// Held for as long as this daemon lives, so that others see that it does.
    _alive: Flock<File>,
}

/// Where daemons show that they live: one locked file each, named by the state folder's id.
/// Fixed, for pins in bpffs are the whole machine's, too.
const OWNERS: &str = "/run/replica/owners";

/// How long the thaw of what an earlier daemon left frozen is waited for.
const THAW: Duration = Duration::from_secs(2);

impl Environment {
    /// Opens the state folder, thaws what a killed daemon left frozen, runs the hooks that it
    /// owes, and starts the watchdog.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] when another daemon uses the folder; else what the
    /// system said.
    pub fn open(options: PrimaryOptions) -> Result<Self> {
        let state = StateDir::open(&options.state_dir)?;
        let alive = show_life(&owner_file(FolderId::from_bytes(state.id())))?;
        remove_dead_owners();
        thaw_what_was_left(options.run_dir.clone())?;
        for released in hooks::recover(&options.run_dir, options.hook_limit)? {
            let program = released.program.display();
            match released.outcome {
                Ok(()) => tracing::warn!("an earlier daemon owed {program} its `post`: it was run"),
                Err(error) => {
                    tracing::error!("an earlier daemon owed {program} its `post`: {error}")
                }
            }
        }
        let mut freezer = Freezer::guarded(&options.run_dir);
        for shortcoming in freezer.start()? {
            tracing::warn!("the watchdog of freezes: {shortcoming}");
        }
        let freezer = Mutex::new(freezer);
        let budget = Arc::new(Budget::new(options.buffers));
        Ok(Self {
            state,
            options,
            budget,
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

    /// Refuses a place that lies behind a device which this agent serves: killed while it
    /// writes there, it could not end, and no other could serve the device again.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], naming the device.
    pub fn refuse_served(&self, what: &str, path: &Path) -> Result<()> {
        for device in self.peers.served() {
            if Layers::above(&[&device])?.hold(path)? {
                return Err(Error::new(ErrorKind::Invalid, "use a folder")
                    .path(path)
                    .detail(format!(
                        "{what} lies on {}, which this agent serves",
                        device.path().display()
                    ))
                    .advice("move it to a disk that does not depend on the agent"));
            }
        }
        Ok(())
    }

    fn folder(&self) -> FolderId {
        FolderId::from_bytes(self.state.id())
    }

    /// Removes the pins that this state folder has of a volume; none is no error.
    ///
    /// # Errors
    /// What the system said.
    pub fn remove_pins(&self, volume: VolumeId) -> Result<()> {
        match capture::remove_pins(Path::new(AttachSpec::PINS), volume, self.folder()) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// The daemon ends: nothing is left to show.
    pub fn end(&self) {
        // Held until the process is gone; one that stays is removed by the next start.
        let _ = fs::remove_file(owner_file(self.folder()));
    }

    fn is_stale(&self, pin: &PinInfo) -> bool {
        pin.owner
            .is_some_and(|owner| owner != self.folder() && !lives(&owner_file(owner)))
    }

    /// Removes the pins of this folder that are not whole, or whose volume it does not know:
    /// those of a `protect` or an `unprotect` that was cut short.
    pub fn remove_orphans(&self, known: &[VolumeId]) {
        for pin in capture::list_pins(Path::new(AttachSpec::PINS)).unwrap_or_default() {
            let is_cut_short = pin.stage == PinStage::Unfinished || !known.contains(&pin.volume);
            if pin.owner == Some(self.folder()) && is_cut_short {
                let removed = pin.remove();
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
                state_folder = ?pin.owner,
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
                pin.remove()?;
                let owner = pin
                    .owner
                    .map_or_else(String::new, |owner| owner.to_string());
                let volume = pin.volume;
                removed.push(format!(
                    "the tracking of volume {volume} for state folder {owner}"
                ));
            }
        }
        Ok(removed)
    }
}

fn owner_file(folder: FolderId) -> PathBuf {
    Path::new(OWNERS).join(folder.to_string())
}

fn show_life(path: &Path) -> Result<Flock<File>> {
    const SHOW: &str = "show that this daemon lives";
    let until = Instant::now() + Duration::from_secs(5);
    fs::create_dir_all(OWNERS).at("make the folder of owners", OWNERS)?;
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path);
        let locked = Flock::lock(file.at(SHOW, path)?, FlockArg::LockExclusiveNonblock);
        match locked {
            // Somebody who took it for a dead one's may just have removed it.
            Ok(file) if is_at(&file, path) => return Ok(file),
            Err((_, errno)) if errno != Errno::EWOULDBLOCK => return Err(errno).at(SHOW, path),
            // The state folder is ours, so this is only somebody who looks whether we live.
            _ if Instant::now() < until => std::thread::sleep(Duration::from_millis(10)),
            _ => return Err(Errno::EWOULDBLOCK).at(SHOW, path),
        }
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let of = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => of(ours) == of(there),
        _ => false,
    }
}

/// Removes the files of dead daemons that have left nothing in the kernel.
fn remove_dead_owners() {
    let (Ok(pins), Ok(entries)) = (
        capture::list_pins(Path::new(AttachSpec::PINS)),
        fs::read_dir(OWNERS),
    ) else {
        return;
    };
    let needed: Vec<PathBuf> = pins
        .iter()
        .filter_map(|pin| pin.owner.map(owner_file))
        .collect();
    for path in entries.flatten().map(|entry| entry.path()) {
        if needed.contains(&path) {
            continue;
        }
        // Removed while it is locked: who opens it now finds out when it has the lock.
        let locked = File::open(&path)
            .ok()
            .and_then(|file| Flock::lock(file, FlockArg::LockExclusiveNonblock).ok());
        if locked.is_some() {
            let _ = fs::remove_file(&path);
        }
    }
}

/// Whether the daemon of that file lives. What cannot be told counts as alive: nothing of
/// it is removed then.
fn lives(path: &Path) -> bool {
    match File::open(path) {
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
        Ok(file) => Flock::lock(file, FlockArg::LockSharedNonblock).is_err(),
    }
}

/// Thaws what an earlier daemon left frozen. Only for a while is it waited for: a thaw writes,
/// and the device below may be one that this daemon is yet to serve.
fn thaw_what_was_left(run_dir: PathBuf) -> Result<()> {
    let (done, ended) = channel();
    let path = run_dir.clone();
    let work = move || {
        let recovered = quiesce::recover(&run_dir).map(|all| {
            for one in all {
                let (point, outcome) = (one.mount_point.display(), one.outcome);
                tracing::warn!("an earlier daemon left {point} frozen: {outcome:?}");
            }
        });
        let _ = done.send(recovered);
    };
    let thread = std::thread::Builder::new().name("thaw".to_owned());
    thread.spawn(work).at("start a thread", &path)?;
    ended.recv_timeout(THAW).unwrap_or(Ok(()))
}
