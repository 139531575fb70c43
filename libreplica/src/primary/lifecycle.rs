//! A volume's life: its thread decides what is to be done next, does it, and says in the
//! status what it did. A failure of any kind ends in the same place: the sides are
//! dropped, the state is `degraded` with the cause, and after a pause everything is
//! brought up again as after a restart. Tracking goes on in the kernel meanwhile.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Phase, Shipping, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::handover::{self, Attention, Questions};
use crate::primary::keeping::Keeping;
use crate::primary::member::Member;
use crate::primary::pace::{Cause, Pace};
use crate::primary::point::{Missed, Part};
use crate::primary::show;
use crate::primary::status::{PointSummary, VolumeState};
use crate::primary::volume::Volume;
use crate::primary::{copy, group, homecoming};

/// The pause while a resync becomes the volume's next job.
const AT_ONCE: Duration = Duration::from_millis(200);
/// How long another operation on the volume may take.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// How often to look whether the device is still there and anything is dirty, however long
/// the interval is.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// How long changes of a stream wait in memory, unless there are many.
const STREAM: Duration = Duration::from_millis(100);

/// The volume's thread. It leaves the sides as they are: to who ends the volume, or the daemon.
pub fn run(volume: &Arc<Volume>, environment: &Environment) {
    let mut keeping = Keeping::default();
    let mut questions = Questions::default();
    while let Some(pause) = turn(volume, || {
        step(volume, environment, &mut keeping, &mut questions)
    }) {
        if let Some(mut member) = volume.try_member() {
            member.rest();
        }
        rest(volume, pause);
    }
    show::keep_history(volume, environment);
}

/// Waits until there is something to do: for somebody's wish, and for a stream of changes
/// that is worth shipping.
fn rest(volume: &Volume, pause: Duration) {
    let inline = volume.inline();
    // While nothing is shipped, what waits to be is no reason to wake up.
    let ships = volume.config().shipping == Shipping::On && volume.pace(|pace| !pace.is_failing());
    match inline {
        Some(inline) if ships && !volume.is_woken() => inline.service().wait(pause.min(STREAM)),
        inline => {
            // Who is given the device meanwhile must not find it claimed.
            drop(inline);
            volume.sleep(pause);
        }
    }
}

/// One turn of the thread; returns how long it pauses, or nothing if it shall end. Whatever
/// happens in it, the volume does not lose its thread.
fn turn(volume: &Volume, step: impl FnOnce() -> Result<Duration>) -> Option<Duration> {
    if volume.is_stopping() {
        return None;
    }
    let done = catch_unwind(AssertUnwindSafe(step));
    volume.set_tried();
    match done {
        Ok(Ok(pause)) => {
            volume.pace(Pace::did);
            Some(pause)
        }
        _ if volume.is_stopping() => None,
        Ok(Err(error)) if error.kind() == ErrorKind::ResyncNeeded => Some(AT_ONCE),
        Ok(Err(_)) => Some(volume.pace(Pace::fail)),
        Err(panic) => {
            let error = panicked(volume, panic.as_ref());
            volume.publish_error(&error);
            volume.show_degraded(&error);
            Some(volume.pace(Pace::fail))
        }
    }
}

fn panicked(volume: &Volume, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    Error::new(ErrorKind::State, "run the volume's thread")
        .volume(volume.id())
        .detail(format!("it panicked: {}", text.unwrap_or_default()))
        .advice("it is brought up again by itself; this is a defect of the agent: report it")
}

/// Does what is to be done next; returns how long nothing is. What fails has been noted.
fn step(
    volume: &Arc<Volume>,
    environment: &Environment,
    keeping: &mut Keeping,
    questions: &mut Questions,
) -> Result<Duration> {
    homecoming::arrive(volume, environment)?;
    let attention = handover::attend(volume, environment, questions);
    match attention.inspect_err(|error| note_asked(volume, error))? {
        Attention::KeepStill => return Ok(LOOK_AGAIN),
        Attention::GoOn => {}
    }
    with_member(volume, |member| take_up(volume, environment, member))?;
    let config = volume.config();
    if config.phase != Phase::Replicating {
        // Tracking was lost during the resync.
        return Ok(Duration::ZERO);
    }
    if config.shipping == Shipping::Paused {
        show::shipping(volume, Shipping::Paused);
        return Ok(LOOK_AGAIN);
    }
    if let Some(kind) = volume.pace(|pace| pace.broken()) {
        if kind == ErrorKind::Full {
            keeping.make_room(volume);
        }
        group::ship(volume, environment)?;
    }
    with_member(volume, Member::ship_now)?;
    with_member(volume, Member::climb)?;
    let left = || volume.pace(|pace| pace.left(Instant::now()));
    if left().is_zero() {
        group::scheduled(volume, environment)?;
    }
    let rest = keeping.keep_points(volume, &|| !volume.is_stopping() && !left().is_zero());
    Ok(left().min(rest).min(LOOK_AGAIN))
}

fn note_asked(volume: &Volume, error: &Error) {
    volume.publish_error(error);
    volume.show_degraded(error);
}

/// Does something with the member held, and notes what fails before it is let go.
fn with_member<T>(volume: &Volume, work: impl FnOnce(&mut Member) -> Result<T>) -> Result<T> {
    let mut member = volume
        .member_until(Instant::now() + PATIENCE)
        .inspect_err(|error| volume.publish_error(error))?;
    work(&mut member).inspect_err(|error| {
        if volume.is_stopping() {
            // What was read and did not get home is shipped at the end, or by the next run.
            member.reclaim();
        } else {
            note_failure(volume, &mut member, error);
        }
    })
}

/// Brings the volume up, and copies or compares it if that is what it needs.
fn take_up(volume: &Volume, environment: &Environment, member: &mut Member) -> Result<()> {
    member.bring_up(volume, environment)?;
    member.look_at_lag();
    volume.publish(|status| member.describe(status));
    go_by_image(volume, environment, member)?;
    let phase = volume.config().phase;
    match &phase {
        Phase::Replicating => return member.live()?.0.still_there(),
        Phase::Baseline => {
            volume.pace(Pace::owe_point);
            copy::baseline(volume, member)?;
        }
        Phase::Resync { cause } => {
            volume.pace(Pace::owe_point);
            volume.publish(|status| status.counters.resyncs += 1);
            copy::resync(volume, member, cause)?;
            show::keep_history(volume, environment);
        }
    }
    change_config(volume, environment, |config| {
        // A loss of tracking during the resync has put another cause there.
        if config.phase == phase {
            config.phase = Phase::Replicating;
        }
    })?;
    volume.pace(Pace::copied);
    volume.store_is_known();
    if volume.config().phase == Phase::Replicating {
        volume.show_that_it_ships();
    }
    Ok(())
}

/// The store knows best whether a first copy has ended in it. Where the settings speak of one
/// to be made and it is there, whoever made it was killed before that was written down, or
/// somebody put back older settings; what was tracked since is not known to be all. Where they
/// take half a one for a whole, an earlier version let a resync be asked for in its middle.
fn go_by_image(volume: &Volume, environment: &Environment, member: &mut Member) -> Result<()> {
    let has_image = member.live()?.1.has_image();
    let next = match (volume.config().phase, has_image) {
        (Phase::Baseline, true) => Phase::Resync {
            cause: "the image was complete, and that was not written down".to_owned(),
        },
        (Phase::Resync { .. } | Phase::Replicating, false) => Phase::Baseline,
        _ => return Ok(()),
    };
    tracing::warn!(volume = %volume.id(), ?next, "the store says otherwise than the settings");
    volume.pace(Pace::owe_point);
    change_config(volume, environment, |config| config.phase = next)
}

/// Brings status and sides in line with a failure, whoever's wish it was that failed: what
/// may be broken is dropped, to be brought up anew, and the volume is shown degraded.
pub fn note_failure(volume: &Volume, member: &mut Member, error: &Error) {
    if error.kind() == ErrorKind::ResyncNeeded {
        member.reclaim();
        return;
    }
    volume.publish_error(error);
    if is_passing(error.kind()) && member.is_up() {
        member.reclaim();
        return;
    }
    member.drop_sides();
    volume.show_degraded(error);
}

/// Whether a failure says nothing of the sides: they stay up.
fn is_passing(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::TimedOut | ErrorKind::Busy | ErrorKind::State | ErrorKind::Invalid
    )
}

/// Who wants a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Somebody, now.
    ByOperator,
    /// The volume's own interval.
    BySchedule,
}

/// How an epoch ended for one volume.
pub struct Ended<'a> {
    /// Its point, or nothing if it was only shipped, or what failed.
    pub outcome: &'a Result<Option<PointSummary>>,
    /// Why there is no point, if one was wished for.
    pub missed: Option<&'a Missed>,
    /// How long writers were blocked, if it came to that.
    pub frozen: Option<Duration>,
}

/// Brings status, pace and sides in line with how an epoch ended.
pub fn after_epoch(part: &mut Part<'_>, environment: &Environment, asked: Asked, end: &Ended<'_>) {
    let volume = part.volume;
    if let Some(length) = end.frozen {
        note_freeze(volume, environment, length);
    }
    match (end.outcome, end.missed) {
        (Ok(Some(point)), _) => after_point(volume, point),
        (Ok(None), Some(missed)) => after_missed(volume, asked, missed),
        (Ok(None), None) => after_recovery(volume),
        (Err(error), missed) => after_broken(part, environment, error, missed),
    }
    part.member.rest();
    volume.publish(|status| part.member.describe(status));
}

/// It ships again. Where a point follows at once, that shows it: who sees a volume recovered
/// finds what it holds among its points.
fn after_recovery(volume: &Volume) {
    volume.pace(Pace::ships);
    if !volume.pace(|pace| pace.left(Instant::now())).is_zero() {
        volume.show_that_it_ships();
    }
}

fn after_point(volume: &Volume, point: &PointSummary) {
    let every = volume.config().every;
    volume.pace(|pace| pace.made(Instant::now(), every));
    volume.publish(|status| {
        status.counters.points_made += 1;
        status.last_point = Some(point.clone());
    });
    volume.show_that_it_ships();
}

/// All is shipped, and there is no point: an event that the status of each volume tells
/// whose point it was.
fn after_missed(volume: &Volume, asked: Asked, missed: &Missed) {
    volume.publish(|status| status.counters.points_failed += 1);
    volume.publish_error(&missed.error);
    if missed.cause == Cause::Refused {
        return;
    }
    let (cause, why, every) = (
        missed.cause,
        missed.error.to_string(),
        volume.config().every,
    );
    volume.pace(|pace| match asked {
        Asked::ByOperator => pace.note_missed(cause, why),
        Asked::BySchedule => pace.missed(Instant::now(), every, cause, why),
    });
    volume.show_that_it_ships();
}

fn after_broken(
    part: &mut Part<'_>,
    environment: &Environment,
    error: &Error,
    missed: Option<&Missed>,
) {
    let volume = part.volume;
    if missed.is_some() {
        volume.publish(|status| status.counters.points_failed += 1);
    }
    if let Err(error) = part.member.note_loss(volume, environment) {
        volume.publish_error(&error);
    }
    let was_broken = volume.pace(|pace| pace.is_broken());
    note_failure(volume, part.member, error);
    if is_passing(error.kind()) {
        return;
    }
    let every = volume.config().every;
    if error.kind() != ErrorKind::ResyncNeeded {
        volume.pace(|pace| pace.tried(Instant::now(), every));
    }
    // Its thread goes on with a resync, or tries to bring it up again.
    if !was_broken {
        volume.wake();
    }
}

fn note_freeze(volume: &Volume, environment: &Environment, length: Duration) {
    let limit = environment.options.freeze_limit;
    volume.pace(|pace| {
        pace.froze(length, limit);
        if let Some(cause) = pace.slow() {
            tracing::warn!(volume = %volume.id(), "{cause}");
        }
    });
    if length.is_zero() {
        return;
    }
    let millis = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
    volume.publish(|status| {
        status.counters.freeze_ms_last = millis;
        status.counters.freeze_ms_max = status.counters.freeze_ms_max.max(millis);
    });
}

/// Makes a resync the volume's next job, durably; returns the revision of the settings that
/// say so.
///
/// # Errors
/// When the state folder cannot be written.
pub fn needs_resync(volume: &Volume, environment: &Environment, cause: &str) -> Result<u64> {
    tracing::warn!(volume = %volume.id(), cause, "a resync is needed");
    volume.pace(Pace::owe_point);
    change_config(volume, environment, |config| {
        if config.phase != Phase::Baseline {
            config.phase = Phase::Resync {
                cause: cause.to_owned(),
            };
        }
    })?;
    volume.publish(|status| {
        if status.state != VolumeState::Baseline {
            status.state = VolumeState::Resync;
            status.state_cause = Some(cause.to_owned());
        }
    });
    Ok(volume.config().revision)
}

/// Makes a resync the volume's next job because the operator asks for it, durably.
///
/// # Errors
/// [`ErrorKind::State`] in the first copy, and while a resync runs or waits, whose cause
/// stays; else when the state folder cannot be written.
pub fn ask_for_resync(volume: &Volume, environment: &Environment) -> Result<()> {
    const ASKED: &str = "asked for by the operator";
    let refuse = |detail: String| {
        Err(Error::new(ErrorKind::State, "start a resync")
            .volume(volume.id())
            .detail(detail)
            .advice("`replica status` shows how far it is"))
    };
    // Decided while nobody else can change the settings.
    decide_config(volume, environment, |config| match &config.phase {
        Phase::Baseline => refuse("the baseline (first copy) has not ended".to_owned()),
        Phase::Resync { cause } => refuse(format!("a resync is under way: {cause}")),
        Phase::Replicating => {
            config.phase = Phase::Resync {
                cause: ASKED.to_owned(),
            };
            Ok(())
        }
    })?;
    volume.pace(Pace::begin_anew);
    volume.publish(|status| {
        if status.state != VolumeState::Paused {
            status.state = VolumeState::Resync;
            status.state_cause = Some(ASKED.to_owned());
        }
    });
    volume.wake();
    Ok(())
}

/// Changes a volume's settings, durably first.
///
/// # Errors
/// When the state folder cannot be written; nothing is changed then.
pub fn change_config(
    volume: &Volume,
    environment: &Environment,
    change: impl FnOnce(&mut VolumeConfig),
) -> Result<()> {
    decide_config(volume, environment, |config| {
        change(config);
        Ok(())
    })
}

/// The same, if `decide` agrees when it has seen what they are.
fn decide_config(
    volume: &Volume,
    environment: &Environment,
    decide: impl FnOnce(&mut VolumeConfig) -> Result<()>,
) -> Result<()> {
    volume.update_config(|config| {
        let mut next = config.clone();
        decide(&mut next)?;
        next.revision += 1;
        environment.state.save(&next)?;
        *config = next;
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::primary::volume::tests::volume;

    #[test]
    fn a_panic_does_not_cost_the_volume_its_thread() {
        let volume = volume();
        let pause = turn(&volume, || {
            let _held = volume.try_member().unwrap();
            panic!("out of {}", "luck")
        });
        assert!(pause.is_some());
        let status = volume.status();
        assert_eq!(status.state, VolumeState::Degraded);
        assert!(status.state_cause.unwrap().contains("out of luck"));
        assert!(status.last_error.unwrap().message.contains("out of luck"));
        // What it held is there again, and the next turn goes on.
        assert!(volume.try_member().is_some());
        let pause = turn(&volume, || {
            volume.show_that_it_ships();
            Ok(LOOK_AGAIN)
        });
        assert_eq!(pause, Some(LOOK_AGAIN));
        assert_eq!(volume.status().state, VolumeState::Replicating);
        volume.request_stop();
        assert_eq!(turn(&volume, || Ok(LOOK_AGAIN)), None);
    }
}
