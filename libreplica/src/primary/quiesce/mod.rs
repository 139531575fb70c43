//! Bringing filesystems to rest for the last milliseconds of a point.
//!
//! A filesystem that is frozen with much dirty data writes it out with its users already
//! blocked, so it is synced first, and frozen when little is left. The limit counts from
//! the start of the first call and holds for all filesystems together. A call that comes
//! back late is undone at once: there is no point then, only a report.
//!
//! The calls are made by the watchdog, a process that survives the agent
//! ([`crate::primary::watchdog`]); so what is ours is known exactly, whoever dies.

mod marker;
mod set;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::mman::{MlockAllFlags, mlockall};

use crate::device::{Filesystem, Freezing};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::primary::watchdog::{Broken, Command, Watchdog};

use crate::primary::owner::Owner;
use marker::Marker;
pub use marker::{Recovered, Recovery, recover};
pub(super) use set::{Cause, Failure, FreezeSet};

const OPERATION: &str = "freeze the filesystems";

/// The most filesystems frozen at once.
const MAX_FILESYSTEMS: usize = 1024;

/// Freezes and thaws. One for an agent: freezes that overlap would be taken for somebody
/// else's.
///
/// ```no_run
/// # fn main() -> libreplica::Result<()> {
/// use std::time::Duration;
/// use libreplica::device::{BlockDevice, Layers};
/// use libreplica::primary::quiesce::Freezer;
/// let disk = BlockDevice::open("/dev/sda")?;
/// let layers = Layers::above(&[&disk])?;
/// let mut freezer = Freezer::guarded("/run/replica");
/// let frozen = freezer.freeze(layers.filesystems(), Duration::from_secs(2))?;
/// // Read what is left, allocating nothing.
/// let blocked = frozen.thaw()?;
/// println!("writers waited {} ms", blocked.as_millis());
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Freezer {
    run_dir: PathBuf,
    guard: Guard,
    blocked: Duration,
}

#[derive(Debug)]
enum Guard {
    /// A watchdog makes the calls; started when first needed, and again after a loss.
    Watchdog {
        command: Command,
        running: Option<Watchdog>,
    },
    /// This process makes them, and nobody thaws if it dies before the next start.
    None,
}

impl Freezer {
    /// Guarded by a watchdog: the running binary, started again with the hidden subcommand
    /// `watchdog`. Marks of freezes under way are kept in `run_dir`.
    pub fn guarded(run_dir: impl AsRef<Path>) -> Self {
        Self::guarded_by(Command::of_this_binary(), run_dir)
    }

    /// As [`Freezer::guarded`], with another command for the watchdog; it must call
    /// [`crate::primary::watchdog::run`].
    pub fn guarded_by(command: Command, run_dir: impl AsRef<Path>) -> Self {
        Self::new(
            Guard::Watchdog {
                command,
                running: None,
            },
            run_dir,
        )
    }

    /// Without a watchdog. If this process is killed in a freeze, the filesystems stay
    /// frozen until somebody calls [`recover`].
    pub fn unguarded(run_dir: impl AsRef<Path>) -> Self {
        Self::new(Guard::None, run_dir)
    }

    fn new(guard: Guard, run_dir: impl AsRef<Path>) -> Self {
        Self {
            run_dir: run_dir.as_ref().to_owned(),
            guard,
            blocked: Duration::ZERO,
        }
    }

    /// How long writers were blocked by the newest freeze, one that failed included.
    pub const fn blocked(&self) -> Duration {
        self.blocked
    }

    /// Starts the watchdog if it does not run yet; what it could not do to stay safe (a
    /// group of its own, locked memory), one line each. The first freeze does it too.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it cannot be started.
    pub fn start(&mut self) -> Result<Vec<String>> {
        Ok(match self.watchdog()? {
            Some(watchdog) => watchdog.shortcomings().to_vec(),
            None => Vec::new(),
        })
    }

    fn watchdog(&mut self) -> Result<Option<&mut Watchdog>> {
        let Guard::Watchdog { command, running } = &mut self.guard else {
            return Ok(None);
        };
        if running
            .as_mut()
            .is_some_and(|watchdog| !watchdog.is_alive())
        {
            *running = None;
        }
        if running.is_none() {
            *running = Some(Watchdog::start(command)?);
        }
        Ok(running.as_mut())
    }

    /// Syncs all of `filesystems`, then freezes those that can freeze, in their order
    /// (innermost first, as [`crate::device::Layers`] gives them). None at all is fine:
    /// there is nothing to freeze then.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] if `limit` passed before all were frozen;
    /// [`ErrorKind::Busy`] if somebody else holds one frozen (it stays so);
    /// [`ErrorKind::State`] if one cannot be reached or the watchdog not be started;
    /// else what the call failed with. In every case what we froze is thawed.
    pub fn freeze(&mut self, filesystems: &[Filesystem], limit: Duration) -> Result<Frozen<'_>> {
        let mut session = self.prepare(filesystems)?;
        session.started = Instant::now();
        let outcome = match &mut self.guard {
            Guard::Watchdog {
                running: Some(watchdog),
                ..
            } => watchdog.freeze(limit),
            _ => session
                .set
                .freeze(session.started, limit)
                .map_err(Broken::Failed),
        };
        match outcome {
            Ok(()) => Ok(Frozen {
                limit,
                session: Some(session),
                freezer: self,
            }),
            Err(broken) => Err(self.undo(session, broken)),
        }
    }

    /// All that allocates or waits, before the clock starts.
    fn prepare(&mut self, filesystems: &[Filesystem]) -> Result<Session> {
        self.blocked = Duration::ZERO;
        if filesystems.len() > MAX_FILESYSTEMS {
            return Err(Error::new(ErrorKind::Invalid, OPERATION)
                .detail(format!("{} of them at once", filesystems.len())));
        }
        self.sync(filesystems)?;
        let freezing: Vec<&Filesystem> = filesystems
            .iter()
            .filter(|filesystem| filesystem.freezing() == Freezing::Freezes)
            .collect();
        let run_dir = self.run_dir.clone();
        let watchdog = self.watchdog()?;
        let pid = watchdog
            .as_ref()
            .map_or_else(std::process::id, |dog| dog.pid());
        let marker = Marker::create(&run_dir, Owner::of(pid), &freezing)?;
        let mut set = FreezeSet::new(marker.file()?);
        for filesystem in &freezing {
            set.push(filesystem.open()?);
        }
        if let Some(watchdog) = watchdog {
            watchdog.load(&marker.file()?, &set)?;
        }
        Ok(Session {
            names: freezing
                .iter()
                .map(|filesystem| name_of(filesystem))
                .collect(),
            set,
            marker,
            started: Instant::now(),
        })
    }

    /// Writes out what is dirty, so that little is left for the freeze.
    fn sync(&mut self, filesystems: &[Filesystem]) -> Result<()> {
        let Some(watchdog) = self.watchdog()? else {
            return filesystems.iter().try_for_each(Filesystem::sync);
        };
        let mounts = filesystems.iter().map(Filesystem::open);
        let mounts = mounts.collect::<Result<Vec<_>>>()?;
        let synced = watchdog.sync(&mounts);
        if let Guard::Watchdog { running, .. } = &mut self.guard
            && !matches!(synced, Ok(()) | Err(Broken::Failed(_)))
        {
            *running = None;
        }
        synced.map_err(|broken| {
            let error = |kind| Error::new(kind, "sync the filesystem");
            match broken {
                Broken::Failed(failure) => {
                    let failed = filesystems.get(failure.member as usize);
                    let name = failed.map(name_of).unwrap_or_default();
                    let error = error(ErrorKind::Io).detail(name);
                    match failure.cause {
                        Cause::System(errno) => error.source(std::io::Error::from(errno)),
                        _ => error,
                    }
                }
                Broken::Lost(errno) => error(ErrorKind::State)
                    .detail("the watchdog died")
                    .source(std::io::Error::from(errno)),
                Broken::Stuck => error(ErrorKind::TimedOut)
                    .advice("make points when less is written; look for a disk that hangs"),
            }
        })
    }

    /// After a freeze or thaw that failed: makes sure nothing of ours stays frozen, then
    /// says what happened.
    fn undo(&mut self, mut session: Session, broken: Broken) -> Error {
        let thawed = if broken == Broken::Stuck {
            // The kernel would make us wait too; the watchdog thaws when it comes back.
            session.marker.keep();
            Ok(())
        } else {
            session.set.take_over();
            session.set.thaw()
        };
        self.blocked = session.started.elapsed();
        if let Guard::Watchdog { running, .. } = &mut self.guard
            && !matches!(broken, Broken::Failed(_))
        {
            *running = None;
        }
        let error = session.error(broken, self.blocked);
        match thawed {
            Err(Failure {
                cause: Cause::System(errno),
                member,
            }) => {
                session.marker.keep();
                let name = session.name(member);
                error.advice(format!(
                    "{name} may be frozen still ({errno}): fsfreeze --unfreeze"
                ))
            }
            _ => error,
        }
    }
}

fn name_of(filesystem: &Filesystem) -> String {
    let point = filesystem.mount_point().display();
    format!("{point} ({})", filesystem.kind())
}

/// What one freeze needs, from before the first call until after the last.
struct Session {
    // Thawed before its mark is removed.
    set: FreezeSet,
    marker: Marker,
    names: Vec<String>,
    started: Instant,
}

impl Session {
    fn name(&self, member: u32) -> &str {
        self.names.get(member as usize).map_or("", String::as_str)
    }

    fn error(&self, broken: Broken, blocked: Duration) -> Error {
        let millis = blocked.as_millis();
        let failure = match broken {
            Broken::Failed(failure) => failure,
            Broken::Lost(errno) => {
                return Error::new(ErrorKind::State, OPERATION)
                    .detail("the watchdog died; all is thawed")
                    .source(std::io::Error::from(errno));
            }
            Broken::Stuck => {
                return Error::new(ErrorKind::TimedOut, OPERATION)
                    .detail(format!("the kernel did not come back within {millis} ms"))
                    .advice("the watchdog thaws as soon as it does; look for a disk that hangs");
            }
        };
        let name = self.name(failure.member);
        match failure.cause {
            Cause::Late => Error::new(ErrorKind::TimedOut, OPERATION)
                .detail(format!("{name} took until {millis} ms; all is thawed"))
                .advice("make points when less is written, or allow a longer freeze"),
            Cause::Foreign => Error::new(ErrorKind::Busy, OPERATION)
                .detail(format!(
                    "{name} is frozen by somebody else, and was left so"
                ))
                .advice("wait for the other backup, or thaw it: fsfreeze --unfreeze MOUNTPOINT"),
            Cause::System(errno) => Error::new(ErrorKind::Io, OPERATION)
                .detail(name)
                .source(std::io::Error::from(errno)),
            Cause::ThawedByOther => Error::new(ErrorKind::State, OPERATION).detail(format!(
                "somebody else thawed {name} while it had to stay frozen"
            )),
            Cause::Expired => Error::new(ErrorKind::TimedOut, OPERATION)
                .detail(format!(
                    "the limit passed; the watchdog thawed all of it ({millis} ms)"
                ))
                .advice("make points when less is written, or allow a longer freeze"),
        }
    }
}

/// The filesystems are frozen: until [`Frozen::thaw`] allocate nothing, log nothing, write
/// nothing. Thawed on drop.
pub struct Frozen<'a> {
    freezer: &'a mut Freezer,
    session: Option<Session>,
    limit: Duration,
}

impl Frozen<'_> {
    /// When it must be thawed; a little later the watchdog does it.
    pub fn deadline(&self) -> Instant {
        let started = self
            .session
            .as_ref()
            .map_or_else(Instant::now, |session| session.started);
        started + self.limit
    }

    /// Thaws; how long writers were blocked, from the start of the first freeze.
    ///
    /// # Errors
    /// If any was not frozen all the time, and what was read is no point:
    /// [`ErrorKind::TimedOut`] if the watchdog thawed it, [`ErrorKind::State`] if somebody
    /// else did or the watchdog died. [`ErrorKind::Io`] if one could not be thawed.
    pub fn thaw(mut self) -> Result<Duration> {
        match self.session.take() {
            Some(session) => self.finish(session),
            None => Ok(Duration::ZERO),
        }
    }

    fn finish(&mut self, mut session: Session) -> Result<Duration> {
        let outcome = match &mut self.freezer.guard {
            Guard::Watchdog {
                running: Some(watchdog),
                ..
            } => watchdog.thaw(),
            _ => session.set.thaw().map_err(Broken::Failed),
        };
        match outcome {
            Ok(()) => {
                self.freezer.blocked = session.started.elapsed();
                Ok(self.freezer.blocked)
            }
            Err(broken) => Err(self.freezer.undo(session, broken)),
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            let _ = self.finish(session);
        }
    }
}

/// Keeps this process's memory from being paged out, now and later: a page that must be
/// brought back during a freeze could wait for the filesystem that is frozen.
///
/// # Errors
/// [`ErrorKind::Io`] if the limit on locked memory does not allow it.
pub fn lock_memory() -> Result<()> {
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
        .at("lock the memory", "/proc/self/limits")
}
