//! Who makes a point together: the volumes of one `--group`, or a volume alone. A group's
//! point has one freeze, one group id, and exists only if every member has it. While one
//! cannot take part the others go on shipping, and say why there is no point.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::device::BlockDevice;
use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Phase, Shipping};
use crate::primary::environment::Environment;
use crate::primary::lifecycle::{self, Asked, Ended};
use crate::primary::member::Member;
use crate::primary::point::{self, Missed, Part, Wish};
use crate::primary::spec::PointOptions;
use crate::primary::status::PointSummary;
use crate::primary::volume::{Volume, locked};

/// How long a point that is due may take.
const POINT_LIMIT: Duration = Duration::from_secs(300);
/// How long a point that is due waits for another member that is at something else.
const PEER_PATIENCE: Duration = Duration::from_secs(30);

/// The volumes of this daemon, as each volume's thread sees them.
#[derive(Clone, Default)]
pub struct Peers(Arc<Mutex<Vec<Arc<Volume>>>>);

impl Peers {
    /// Replaces the list.
    pub fn set(&self, volumes: Vec<Arc<Volume>>) {
        *locked(&self.0) = volumes;
    }

    /// The devices of this machine that users of these volumes see, and that we serve.
    pub fn served(&self) -> Vec<BlockDevice> {
        let volumes = locked(&self.0);
        let inlines = volumes.iter().filter_map(|volume| volume.inline());
        inlines
            .filter_map(|inline| inline.shown().cloned())
            .collect()
    }

    /// `volume` and those of its group, in the order in which their locks are taken.
    pub fn group_of(&self, volume: &Arc<Volume>) -> Vec<Arc<Volume>> {
        let Some(group) = volume.config().group else {
            return vec![Arc::clone(volume)];
        };
        let mut members: Vec<_> = locked(&self.0)
            .iter()
            .filter(|other| other.config().group.as_ref() == Some(&group))
            .cloned()
            .collect();
        if members.is_empty() {
            members.push(Arc::clone(volume));
        }
        members.sort_by_key(|member| member.id());
        members
    }
}

/// Makes a point of `volume` and its group, because somebody asks for it; returns
/// `volume`'s own.
///
/// # Errors
/// [`ErrorKind::ResyncNeeded`] when a member is in its first copy or a resync,
/// [`ErrorKind::State`] when one is paused, [`ErrorKind::TimedOut`] past `deadline`; else
/// what failed.
pub fn point(
    volume: &Arc<Volume>,
    environment: &Environment,
    options: &PointOptions,
    deadline: Instant,
) -> Result<PointSummary> {
    let asked = Asked::ByOperator;
    let outcome = attempt(volume, environment, asked, Wish::Point(options), deadline)?;
    own_point(volume, outcome)
}

/// Makes a point of `volume` without the others of its group: nobody can write to it any more,
/// and they may have been let go of already.
///
/// # Errors
/// As [`point`].
pub fn point_alone(
    volume: &Arc<Volume>,
    environment: &Environment,
    options: &PointOptions,
    deadline: Instant,
) -> Result<PointSummary> {
    let held = vec![(volume, take(volume, deadline)?)];
    let wish = (Wish::Point(options), deadline);
    let outcome = make(volume, environment, Asked::ByOperator, held, wish);
    own_point(volume, outcome)
}

fn own_point(volume: &Volume, (own, missed): Outcome) -> Result<PointSummary> {
    match (own?, missed) {
        (Some(point), _) => Ok(point),
        (None, Some(missed)) => Err(missed.error),
        (None, None) => Err(Error::new(ErrorKind::State, "make a point")
            .volume(volume.id())
            .detail("not in its group")),
    }
}

/// Makes the point that is due, or at least ships what there is. A point that could not be
/// made is no failure of the volume: the status of each member says why.
///
/// # Errors
/// What the volume failed with; noted already.
pub fn scheduled(volume: &Arc<Volume>, environment: &Environment) -> Result<()> {
    let options = PointOptions::default();
    let deadline = Instant::now() + POINT_LIMIT;
    let (asked, wish) = (Asked::BySchedule, Wish::Point(&options));
    let (own, _) = attempt(volume, environment, asked, wish, deadline).inspect_err(|error| {
        // Paused or lost its tracking just now: its thread will see.
        if error.kind() == ErrorKind::TimedOut {
            volume.publish_error(error);
        }
    })?;
    own.map(drop)
}

/// Ships what `volume` has, without a point and without the others: to see whether it can.
///
/// # Errors
/// What the volume failed with; noted already.
pub fn ship(volume: &Arc<Volume>, environment: &Environment) -> Result<()> {
    let deadline = Instant::now() + POINT_LIMIT;
    let member = volume
        .member_until(deadline)
        .inspect_err(|error| volume.publish_error(error))?;
    let held = vec![(volume, member)];
    let asked = Asked::BySchedule;
    let (own, _) = make(volume, environment, asked, held, (Wish::Epoch, deadline));
    own.map(drop)
}

/// Whether the others wait for it: neither for a newcomer's first copy nor for one that is
/// being unprotected.
fn counts(member: &Volume) -> bool {
    member.config().phase != Phase::Baseline && !member.is_stopping()
}

type Held<'a> = (&'a Arc<Volume>, MutexGuard<'a, Member>);
/// What came of it for the volume that was asked for, and why there is no point.
type Outcome = (Result<Option<PointSummary>>, Option<Missed>);

/// Finds out who of the group can take part, and makes an epoch of those.
///
/// # Errors
/// Why `volume` itself cannot; nothing was done then.
fn attempt(
    volume: &Arc<Volume>,
    environment: &Environment,
    asked: Asked,
    wish: Wish<'_>,
    deadline: Instant,
) -> Result<Outcome> {
    let members: Vec<_> = environment
        .peers
        .group_of(volume)
        .into_iter()
        .filter(|member| member.id() == volume.id() || counts(member))
        .collect();
    let mut held: Vec<Held<'_>> = Vec::with_capacity(members.len());
    let mut absent = None;
    for member in &members {
        let own = member.id() == volume.id();
        let taken = if own {
            take(member, deadline)
        } else {
            take_peer(member, asked, deadline)
        };
        match taken {
            Ok(guard) => held.push((member, guard)),
            Err(error) if own => return Err(error),
            Err(error) => absent = absent.or(Some(error)),
        }
    }
    let wish = match absent {
        Some(error) => Wish::NoPoint(error),
        None => wish,
    };
    Ok(make(volume, environment, asked, held, (wish, deadline)))
}

/// The member of a volume that can make a point.
fn take(volume: &Volume, deadline: Instant) -> Result<MutexGuard<'_, Member>> {
    can_make_a_point(volume)?;
    let member = volume.member_until(deadline)?;
    // What was running may have ended in a resync.
    can_make_a_point(volume)?;
    Ok(member)
}

fn take_peer(volume: &Volume, asked: Asked, deadline: Instant) -> Result<MutexGuard<'_, Member>> {
    let deadline = match asked {
        Asked::ByOperator => deadline,
        Asked::BySchedule => deadline.min(Instant::now() + PEER_PATIENCE),
    };
    can_make_a_point(volume)?;
    // Its own thread tries to mend that, not as often as others would ask.
    if asked == Asked::BySchedule && volume.pace(|pace| pace.is_broken()) {
        let cause = volume.status().state_cause.unwrap_or_default();
        return Err(Error::new(ErrorKind::State, "make a point of the group")
            .detail(format!("{} is degraded: {cause}", volume.config().name)));
    }
    take(volume, deadline)
}

fn make(
    volume: &Arc<Volume>,
    environment: &Environment,
    asked: Asked,
    mut held: Vec<Held<'_>>,
    (wish, deadline): (Wish<'_>, Instant),
) -> Outcome {
    let mut parts: Vec<_> = held
        .iter_mut()
        .map(|(volume, member)| Part::new(volume, member))
        .collect();
    let made = point::make(&mut parts, environment, wish, deadline);
    let mut own = Ok(None);
    for (part, outcome) in parts.iter_mut().zip(made.outcomes) {
        let ended = Ended {
            outcome: &outcome,
            missed: made.missed.as_ref(),
            frozen: made.frozen,
        };
        lifecycle::after_epoch(part, environment, asked, &ended);
        if part.volume.id() == volume.id() {
            own = outcome;
        }
    }
    (own, made.missed)
}

fn can_make_a_point(volume: &Volume) -> Result<()> {
    let config = volume.config();
    let refuse = |kind, detail: String, advice: &str| {
        Err(Error::new(kind, "make a point")
            .volume(volume.id())
            .detail(detail)
            .advice(advice))
    };
    match (&config.phase, config.shipping) {
        (Phase::Baseline, _) => refuse(
            ErrorKind::ResyncNeeded,
            format!("the baseline (first copy) of {} has not ended", config.name),
            "its end is the first point; `replica status` shows how far it is",
        ),
        (Phase::Resync { cause }, _) => refuse(
            ErrorKind::ResyncNeeded,
            format!("{} is being resynced ({cause})", config.name),
            "its end is a point; `replica status` shows how far it is",
        ),
        (Phase::Replicating, Shipping::Paused) => refuse(
            ErrorKind::State,
            format!("{} is paused", config.name),
            "`replica resume` it",
        ),
        (Phase::Replicating, Shipping::On) => Ok(()),
    }
}
