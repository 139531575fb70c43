//! How the moment of a point is come by while the source is in use: rounds of reading until
//! little is left; then a freeze of what is mounted, or, where nothing is, a look for a
//! moment without writes.
//!
//! A member of a group whose device or image fails meanwhile drops out, and the others go
//! on: there is no point then, but what they have changed is shipped.

use std::time::{Duration, Instant};

use hrl_format::record::Consistency;
use hrl_format::units::Timestamp;

use crate::device::{BlockDevice, Filesystem, Layers};
use crate::error::{Error, ErrorKind, Result};
use crate::primary::environment::Environment;
use crate::primary::hooks::{HookSetup, Hooks};
use crate::primary::instant;
use crate::primary::pace::Cause;
use crate::primary::point::{Missed, Part, all_well, each};
use crate::primary::spec::PointOptions;
use crate::primary::tail::Tail;

/// Rounds before the freeze, at most; a source that changes faster than it is read is
/// frozen all the same, and the freeze's limit decides.
const ROUNDS_MAX: u32 = 8;
/// Little enough, over all members, to be read while frozen.
const FEW_BYTES: u64 = 4 << 20;
/// How long to look for a quiet moment of a source that has nothing to freeze.
const QUIET_LIMIT: Duration = Duration::from_secs(10);
/// The longest pause between two such looks: under load without a gap, every look ships
/// what changed since the last.
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(1);

/// What is mounted over the members, and what the point can promise therefore.
pub struct Plan {
    pub filesystems: Vec<Filesystem>,
    pub consistency: Consistency,
}

impl Plan {
    /// # Errors
    /// [`Cause::Refused`] for a point that cannot be what it is asked to be; else what the
    /// system said.
    pub fn new(parts: &mut [Part<'_>], options: &PointOptions) -> Result<Self, Missed> {
        let devices = parts
            .iter_mut()
            .map(|part| part.member.live().map(|(source, _)| source.shown()))
            .filter_map(Result::transpose)
            .collect::<Result<Vec<&BlockDevice>>>()?;
        let layers = Layers::above(&devices)?;
        let filesystems = layers.filesystems().to_vec();
        let consistency = match options.minimum {
            Some(Consistency::Filesystem) if filesystems.is_empty() => {
                return Err(Missed {
                    cause: Cause::Refused,
                    error: Error::new(ErrorKind::Invalid, "make a point")
                        .detail("no filesystem of it is mounted, so none can be frozen")
                        .advice("ask for --consistency crash, or mount it"),
                });
            }
            Some(Consistency::Application) => Consistency::Application,
            _ if filesystems.is_empty() => Consistency::Crash,
            _ => Consistency::Filesystem,
        };
        Ok(Self {
            filesystems,
            consistency,
        })
    }
}

/// A moment that was reached, or not, and what it cost.
pub struct Reached {
    pub moment: Result<Timestamp, Missed>,
    /// How long writers were blocked, if it came to that; zero if there was nothing to freeze.
    pub frozen: Option<Duration>,
}

/// Brings all members to one moment without writes, with what was dirty in their drafts.
pub fn reach(
    parts: &mut [Part<'_>],
    environment: &Environment,
    plan: &Plan,
    deadline: Instant,
) -> Reached {
    let hooks = match plan.consistency {
        Consistency::Application => match run_pre_hooks(parts, environment, deadline) {
            Ok(hooks) => Some(hooks),
            Err(error) => {
                let refused = Error::new(ErrorKind::State, "make a point");
                return Reached {
                    moment: Err(refused.source(error).into()),
                    frozen: None,
                };
            }
        },
        _ => None,
    };
    let mut reached = if instant::is_inline(parts) {
        instant::reach(parts, environment, &plan.filesystems)
    } else if plan.filesystems.is_empty() {
        Reached {
            moment: quiet_moment(parts, deadline),
            frozen: Some(Duration::ZERO),
        }
    } else {
        frozen_moment(parts, environment, plan)
    };
    if reached.moment.is_ok() {
        each(parts, still_settled);
        reached.moment = reached.moment.and_then(|it| all_well(parts).map(|()| it));
    }
    if let Some(Err(error)) = hooks.map(Hooks::post) {
        // The state was captured; what the application missed is the operator's to know.
        parts
            .iter()
            .for_each(|part| part.volume.publish_error(&error));
    }
    reached
}

fn run_pre_hooks(
    parts: &[Part<'_>],
    environment: &Environment,
    deadline: Instant,
) -> Result<Hooks> {
    let names: Vec<_> = parts.iter().map(|part| part.volume.config().name).collect();
    let setup = HookSetup {
        folder: &environment.options.hooks_dir,
        run_dir: &environment.options.run_dir,
        limit: environment.options.hook_limit,
        deadline,
    };
    Hooks::pre(&setup, &names)
}

/// Whether what is left out of the volume was the same thing from the first round on.
fn still_settled(part: &mut Part<'_>) -> Result<()> {
    let config = part.volume.config();
    part.member.live()?.0.is_settled(&config)
}

/// With nothing to freeze: rounds until one ends with nothing dirty and nothing in flight.
/// A write marks its blocks when it is submitted and again when it ends, so that none can
/// hide between the two looks.
fn quiet_moment(parts: &mut [Part<'_>], until: Instant) -> Result<Timestamp, Missed> {
    let until = until.min(Instant::now() + QUIET_LIMIT);
    let mut pause = Duration::from_micros(100);
    loop {
        let mut quiet = true;
        each(parts, |part| {
            quiet &= part.member.live()?.0.is_quiet()?;
            Ok(())
        });
        all_well(parts)?;
        if quiet {
            return Ok(Timestamp::now());
        }
        if Instant::now() >= until || parts.iter().any(|part| part.volume.is_stopping()) {
            return Err(no_quiet_moment());
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LOOK_AGAIN_MAX);
        each(parts, |part| part.round().map(drop));
        all_well(parts)?;
    }
}

fn no_quiet_moment() -> Missed {
    let error = Error::new(ErrorKind::TimedOut, "make a point")
        .detail("there was no moment without writes within the limit, and no filesystem to freeze")
        .advice("what changed is shipped; a point is tried again at the next interval");
    Missed {
        cause: Cause::NeverQuiet,
        error,
    }
}

/// Reads the rest while the filesystems are frozen. Between freeze and thaw nothing is
/// allocated, logged or written: what is frozen may hold our own state folder.
fn frozen_moment(parts: &mut [Part<'_>], environment: &Environment, plan: &Plan) -> Reached {
    let mut frozen = None;
    let moment = prepare(parts, plan).and_then(|mut tails| {
        let mut freezer = environment.freezer();
        let limit = environment.options.freeze_limit;
        let read = match freezer.freeze(&plan.filesystems, limit) {
            Ok(freeze) => {
                let read = read_tails(parts, &mut tails, freeze.deadline());
                let thawed = freeze.thaw();
                read.and_then(|moment| thawed.map(|_| moment).map_err(Broken::Moment))
            }
            Err(error) => Err(Broken::Moment(error)),
        };
        // Also when it failed: writers were blocked all the same.
        frozen = Some(freezer.blocked());
        drop(freezer);
        for (part, tail) in parts.iter_mut().zip(tails) {
            if part.failed.is_none()
                && let Err(error) = part.hand_over(tail)
            {
                part.failed = Some(error);
            }
        }
        all_well(parts)?;
        match read {
            Ok(moment) => Ok(moment),
            Err(Broken::Moment(error)) => Err(error.into()),
            Err(Broken::Part) => Err(Error::new(ErrorKind::State, "make a point").into()),
        }
    });
    Reached { moment, frozen }
}

/// All that allocates or may take long, before anything is frozen.
fn prepare(parts: &mut [Part<'_>], plan: &Plan) -> Result<Vec<Tail>, Missed> {
    let mut tails = Vec::with_capacity(parts.len());
    each(parts, |part| {
        tails.push(Tail::prepare(part.member.live()?.0)?);
        Ok(())
    });
    all_well(parts)?;
    sync(&plan.filesystems)?;
    Ok(tails)
}

fn sync(filesystems: &[Filesystem]) -> Result<()> {
    filesystems.iter().try_for_each(Filesystem::sync)
}

/// Rounds of reading while writes go on, until little is dirty. What cannot be synced keeps
/// the point from being made, not the rest from being shipped.
pub fn rounds(
    parts: &mut [Part<'_>],
    filesystems: &[Filesystem],
    deadline: Instant,
) -> Result<(), Missed> {
    let mut before = u64::MAX;
    for _ in 0..ROUNDS_MAX {
        let synced = sync(filesystems);
        let mut read = 0;
        each(parts, |part| part.member.live()?.0.sync());
        each(parts, |part| {
            read += part.round()?;
            Ok(())
        });
        synced?;
        // Little came, or as much as the last time: more rounds would not leave less.
        if read <= FEW_BYTES || read > before / 4 * 3 || Instant::now() >= deadline {
            break;
        }
        before = read;
    }
    Ok(())
}

/// Why what is frozen could not be read.
enum Broken {
    /// There was no moment; nothing is wrong with a volume.
    Moment(Error),
    /// A volume failed, and says so itself.
    Part,
}

/// Reads what is left of every volume, until nothing is dirty and nothing in flight.
fn read_tails(
    parts: &mut [Part<'_>],
    tails: &mut [Tail],
    until: Instant,
) -> Result<Timestamp, Broken> {
    loop {
        for (part, tail) in parts.iter_mut().zip(&mut *tails) {
            let read = part.source().and_then(|source| tail.read(source, until));
            match read {
                Err(error) if error.kind() == ErrorKind::TimedOut => {
                    return Err(Broken::Moment(error));
                }
                Err(error) => return Err(part.fail(error)),
                Ok(()) => {}
            }
        }
        let mut quiet = true;
        for part in parts.iter_mut() {
            match part.source().and_then(|source| source.is_quiet()) {
                Ok(now) => quiet &= now,
                Err(error) => return Err(part.fail(error)),
            }
        }
        if quiet {
            return Ok(Timestamp::now());
        }
        if Instant::now() >= until {
            return Err(Broken::Moment(
                Error::new(ErrorKind::TimedOut, "make a point")
                    .detail("writes went on under the freeze, past its limit")
                    .advice("it is tried again at the next interval"),
            ));
        }
    }
}

impl Part<'_> {
    fn fail(&mut self, error: Error) -> Broken {
        self.failed = Some(error);
        Broken::Part
    }
}
