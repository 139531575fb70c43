//! A volume's life: its thread decides what is to be done next, does it, and says in the
//! status what it did. A failure of any kind ends in the same place: the sides are
//! dropped, the state is `degraded` with the cause, and after a pause everything is
//! brought up again as after a restart. Tracking goes on in the kernel meanwhile.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hrl_format::id::VolumeId;
use hrl_format::units::Timestamp;

use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Phase, Shipping, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::member::Member;
use crate::primary::point::Part;
use crate::primary::spec::PointOptions;
use crate::primary::state_dir::{read_json, write_json};
use crate::primary::status::{LastError, PointSummary, VolumeState, VolumeStatus};
use crate::primary::volume::Volume;
use crate::primary::{copy, group};

/// The pauses after failures in a row.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
];
/// How long a point that is due may take.
const POINT_LIMIT: Duration = Duration::from_secs(300);
/// How often to look whether the device is still there and anything is dirty, however long
/// the interval is.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A freeze that took over a quarter of its limit stretches the interval by this much, at
/// most.
const STRETCH_MAX: u32 = 16;
/// Failures in a row after which `--wait` no longer waits; the volume goes on trying.
const TRIES: u32 = 4;
/// In the volume's state folder: see [`History`](crate::primary::status::History).
const HISTORY: &str = "history.json";

/// What a volume's thread keeps between two things it does.
#[derive(Debug)]
struct Rhythm {
    stretch: u32,
}

/// The volume's thread.
pub fn run(volume: &Arc<Volume>, environment: &Environment) {
    let mut rhythm = Rhythm { stretch: 1 };
    while !volume.is_stopping() {
        let done = step(volume, environment, &mut rhythm);
        volume.set_tried();
        let pause = match done {
            Ok(pause) => pause,
            Err(_) if volume.is_stopping() => break,
            Err(failure) => after_failure(volume, &failure),
        };
        if let Some(mut member) = volume.try_member() {
            member.rest();
        }
        volume.sleep(pause);
    }
    if let Some(mut member) = volume.try_member() {
        member.drop_sides();
    }
    keep_history(volume, environment);
}

/// How something that the volume did by itself failed.
struct Failure {
    error: Error,
    /// Whether status and sides have been brought in line already.
    noted: Noted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Noted {
    No,
    ByThePoint,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let noted = Noted::No;
        Self { error, noted }
    }
}

/// Does what is to be done next; returns how long nothing is.
fn step(
    volume: &Arc<Volume>,
    environment: &Environment,
    rhythm: &mut Rhythm,
) -> Result<Duration, Failure> {
    {
        let mut member = volume.member_until(Instant::now() + POINT_LIMIT)?;
        member.bring_up(volume, environment)?;
        member.look_at_lag();
        volume.publish(|status| member.describe(status));
        has_image_already(volume, environment, &mut member)?;
        let config = volume.config();
        match &config.phase {
            Phase::Baseline => {
                volume.owe_point();
                copy::baseline(volume, &mut member)?;
                change_config(volume, environment, |config| {
                    config.phase = Phase::Replicating
                })?;
                volume.set_going_well();
                volume.publish(show_that_it_ships);
            }
            Phase::Resync { cause } => {
                volume.owe_point();
                volume.publish(|status| status.counters.resyncs += 1);
                copy::resync(volume, &mut member, cause)?;
                // A loss of tracking during the resync has put another cause there.
                let ended = config.phase.clone();
                change_config(volume, environment, |config| {
                    if config.phase == ended {
                        config.phase = Phase::Replicating;
                    }
                })?;
                volume.set_going_well();
                if volume.config().phase != Phase::Replicating {
                    return Ok(Duration::ZERO);
                }
                volume.publish(show_that_it_ships);
                keep_history(volume, environment);
            }
            Phase::Replicating => member.live()?.0.still_there()?,
        }
    }
    let config = volume.config();
    if config.shipping == Shipping::Paused {
        volume.publish(|status| show_shipping(status, Shipping::Paused));
        return Ok(LOOK_AGAIN);
    }
    due_point(volume, environment, rhythm, config.every)
}

/// Compares where the settings speak of a first copy and the store has one: whoever made it
/// was killed before that was written down, or somebody put back older settings. What was
/// tracked since is not known to be all.
fn has_image_already(
    volume: &Volume,
    environment: &Environment,
    member: &mut Member,
) -> Result<()> {
    let has_image = member.live()?.1.writer.catalogue().base.is_some();
    if volume.config().phase != Phase::Baseline || !has_image {
        return Ok(());
    }
    change_config(volume, environment, |config| {
        config.phase = Phase::Resync {
            cause: "the image was complete, and that was not written down".to_owned(),
        };
    })
}

/// Makes the point if it is due; returns the time until the next is.
fn due_point(
    volume: &Arc<Volume>,
    environment: &Environment,
    rhythm: &mut Rhythm,
    every: Duration,
) -> Result<Duration, Failure> {
    // A point that somebody asked for counts as well.
    let last = volume.last_point_made();
    let interval = every * rhythm.stretch;
    if let Some(left) = last.and_then(|last| interval.checked_sub(last.elapsed()))
        && !left.is_zero()
    {
        return Ok(left.min(LOOK_AGAIN));
    }
    group::point(
        volume,
        environment,
        &PointOptions::default(),
        Instant::now() + POINT_LIMIT,
    )
    .map_err(|error| Failure {
        error,
        noted: Noted::ByThePoint,
    })?;
    volume
        .member_until(Instant::now() + POINT_LIMIT)?
        .retain(&|| !volume.is_stopping())?;
    stretch(volume, environment, rhythm);
    Ok((every * rhythm.stretch).min(LOOK_AGAIN))
}

/// Freezes that come near their limit are made less often, and the status says so.
fn stretch(volume: &Volume, environment: &Environment, rhythm: &mut Rhythm) {
    let last = Duration::from_millis(volume.status().counters.freeze_ms_last);
    if last * 4 > environment.options.freeze_limit {
        rhythm.stretch = (rhythm.stretch * 2).min(STRETCH_MAX);
        let cause = format!(
            "the last freeze took {} ms of at most {} ms: points are made {} times less often",
            last.as_millis(),
            environment.options.freeze_limit.as_millis(),
            rhythm.stretch
        );
        tracing::warn!(volume = %volume.id(), "{cause}");
        volume.publish(|status| status.state_cause = Some(cause));
    } else {
        rhythm.stretch = 1;
    }
}

/// Notes what the volume's thread failed at; returns how long to wait before it tries again.
fn after_failure(volume: &Volume, failure: &Failure) -> Duration {
    let error = &failure.error;
    if failure.noted == Noted::No
        && let Some(mut member) = volume.try_member()
    {
        note_failure(volume, &mut member, error);
    }
    // Tracking was lost, which is noted when the volume is brought up next; or another
    // member of the group is not ready.
    if error.kind() == ErrorKind::ResyncNeeded {
        return Duration::from_millis(200);
    }
    PAUSES[(volume.count_failure() as usize).min(PAUSES.len() - 1)]
}

/// Brings status and sides in line with a failure, whoever's wish it was that failed: what
/// may be broken is dropped, to be brought up anew, and the volume is shown degraded.
pub fn note_failure(volume: &Volume, member: &mut Member, error: &Error) {
    if error.kind() == ErrorKind::ResyncNeeded {
        member.reclaim();
        return;
    }
    volume.publish_error(error);
    if is_passing(error.kind()) {
        member.reclaim();
        return;
    }
    member.drop_sides();
    volume.make_point_due();
    volume.publish(|status| {
        if status.state != VolumeState::Paused {
            status.state = VolumeState::Degraded;
            status.state_cause = Some(error.to_string());
        }
    });
}

/// Keeps for the next run of the daemon what status knows, as well as it can: nothing
/// depends on it.
fn keep_history(volume: &Volume, environment: &Environment) {
    let path = environment.state.volume_dir(volume.id()).join(HISTORY);
    if let Err(error) = write_json(&path, &volume.status().history()) {
        tracing::debug!(volume = %volume.id(), "{error}");
    }
}

/// Whether a failure says nothing of the sides: they stay up.
fn is_passing(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::TimedOut | ErrorKind::Busy | ErrorKind::State | ErrorKind::Invalid
    )
}

/// Brings status and sides in line with how a point went.
pub fn after_point(
    part: &mut Part<'_>,
    environment: &Environment,
    made: Result<&PointSummary, &Error>,
) {
    let volume = part.volume;
    match made {
        Ok(point) => {
            volume.set_point_made(Instant::now());
            volume.publish(|status| {
                status.counters.points_made += 1;
                status.last_point = Some(point.clone());
                status.state = VolumeState::Replicating;
                status.state_cause = None;
            });
        }
        Err(error) => {
            volume.publish(|status| status.counters.points_failed += 1);
            let noted = part.member.note_loss(volume, environment);
            if let Err(error) = noted {
                volume.publish_error(&error);
            }
            note_failure(volume, part.member, error);
            // Its thread goes on with a resync, or tries to bring it up again.
            if !is_passing(error.kind()) {
                volume.wake();
            }
        }
    }
    part.member.rest();
    volume.publish(|status| part.member.describe(status));
}

/// Makes a resync the volume's next job, durably.
///
/// # Errors
/// When the state folder cannot be written.
pub fn needs_resync(volume: &Volume, environment: &Environment, cause: &str) -> Result<()> {
    tracing::warn!(volume = %volume.id(), cause, "a resync is needed");
    volume.owe_point();
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
    volume.update_config(|config| {
        let mut next = config.clone();
        change(&mut next);
        environment.state.save(&next)?;
        *config = next;
        Ok(())
    })
}

/// What `status` shows before the volume's thread has looked.
pub fn first_status(config: &VolumeConfig, environment: &Environment) -> VolumeStatus {
    let (state, cause) = match (&config.phase, config.shipping) {
        (_, Shipping::Paused) => (
            VolumeState::Paused,
            Some("paused by the operator".to_owned()),
        ),
        (Phase::Baseline, _) => (VolumeState::Baseline, None),
        (Phase::Resync { cause }, _) => (VolumeState::Resync, Some(cause.clone())),
        (Phase::Replicating, _) => (VolumeState::Replicating, None),
    };
    let mut status = VolumeStatus {
        name: config.name.clone(),
        device: config.device.display().to_string(),
        store: config.store.display().to_string(),
        group: config.group.clone(),
        size_bytes: config.size_bytes,
        block_bytes: config.block_bytes,
        state,
        state_cause: cause,
        ..VolumeStatus::unknown(config.id)
    };
    let history = environment.state.volume_dir(config.id).join(HISTORY);
    if let Ok(history) = read_json(&history) {
        status.recall(history);
    }
    status
}

/// What `status` shows of a volume whose settings cannot be read.
pub fn unreadable_status(id: VolumeId, error: &Error) -> VolumeStatus {
    VolumeStatus {
        state: VolumeState::Degraded,
        state_cause: Some(error.to_string()),
        last_error: Some(LastError::new(error, Timestamp::now())),
        ..VolumeStatus::unknown(id)
    }
}

/// Shows that what the volume waited for is over: the source is read and the store takes
/// what it holds.
pub fn show_that_it_ships(status: &mut VolumeStatus) {
    if status.state != VolumeState::Paused {
        status.state = VolumeState::Replicating;
        status.state_cause = None;
    }
}

/// Shows that shipping was paused or goes on.
pub fn show_shipping(status: &mut VolumeStatus, shipping: Shipping) {
    match shipping {
        Shipping::Paused => {
            status.state = VolumeState::Paused;
            status.state_cause = Some("paused by the operator".to_owned());
        }
        Shipping::On if status.state == VolumeState::Paused => {
            status.state = VolumeState::Replicating;
            status.state_cause = None;
        }
        Shipping::On => {}
    }
}

/// The status with the newest numbers, if the member can be asked.
pub fn fresh_status(volume: &Volume) -> VolumeStatus {
    if let Some(mut member) = volume.try_member() {
        member.look_at_lag();
        volume.publish(|status| member.describe(status));
    }
    volume.status()
}

/// Whether the first copy or the resync has ended with a point, or cannot; `None`: not yet.
pub fn has_settled(volume: &Volume) -> Option<Result<()>> {
    let cannot = |kind, why: String, advice: &str| {
        let error = Error::new(kind, "wait for the volume").volume(volume.id());
        Some(Err(error.detail(why).advice(advice)))
    };
    let status = volume.status();
    let config = volume.config();
    if volume.is_stopping() {
        return cannot(ErrorKind::State, "it is no longer protected".into(), "");
    }
    if config.shipping == Shipping::Paused {
        return cannot(
            ErrorKind::State,
            "it is paused".into(),
            "`replica resume` it",
        );
    }
    if config.phase == Phase::Replicating && !volume.owes_point() {
        return Some(Ok(()));
    }
    if volume.failures() < TRIES {
        return None;
    }
    if config.phase == Phase::Replicating && status.state == VolumeState::Replicating {
        // Copied, durably, and no moment yet for a point.
        return Some(Ok(()));
    }
    let why = status
        .last_error
        .map_or_else(String::new, |error| error.message);
    cannot(
        ErrorKind::TimedOut,
        why,
        "it is tried again; see `replica status`",
    )
}
