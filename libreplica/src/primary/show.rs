//! What `status` shows of a volume apart from its work: before its thread has looked, when
//! its settings cannot be read, when shipping is switched, and after a restart. And what who
//! waits for the end of a first copy or a resync is told.

use hrl_format::id::VolumeId;
use hrl_format::units::Timestamp;

use crate::error::{Error, ErrorKind, Result};
use crate::policy::Retention;
use crate::primary::config::{Phase, Shipping, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::pace::{Cause, TRIES};
use crate::primary::state_dir::{read_json, write_json};
use crate::primary::status::{LastError, Settled, VolumeState, VolumeStatus};
use crate::primary::volume::Volume;

/// In the volume's state folder: see [`History`](crate::primary::status::History).
const HISTORY: &str = "history.json";

/// Keeps for the next run of the daemon what status knows, as well as it can: nothing
/// depends on it.
pub fn keep_history(volume: &Volume, environment: &Environment) {
    let path = environment.state.volume_dir(volume.id()).join(HISTORY);
    if let Err(error) = write_json(&path, &volume.status().history()) {
        tracing::debug!(volume = %volume.id(), "{error}");
    }
}

/// The state that the settings call for, and why.
fn state_of(config: &VolumeConfig) -> (VolumeState, Option<String>) {
    match (&config.phase, config.shipping) {
        (_, Shipping::Paused) => (
            VolumeState::Paused,
            Some("paused by the operator".to_owned()),
        ),
        (Phase::Baseline, _) => (VolumeState::Baseline, None),
        (Phase::Resync { cause }, _) => (VolumeState::Resync, Some(cause.clone())),
        (Phase::Replicating, _) => (VolumeState::Replicating, None),
    }
}

/// What `status` shows before the volume's thread has looked.
pub fn at_first(config: &VolumeConfig, environment: &Environment) -> VolumeStatus {
    let (state, cause) = state_of(config);
    let mut status = VolumeStatus {
        name: config.name.clone(),
        device: config.device.display().to_string(),
        store: config.store.display().to_string(),
        group: config.group.clone(),
        size_bytes: config.size_bytes,
        block_bytes: config.block_bytes,
        capture: config.capture.as_str().to_owned(),
        retain: config
            .retain
            .parse()
            .map_or_else(|_| config.retain.clone(), |it: Retention| it.to_string()),
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
pub fn unreadable(id: VolumeId, error: &Error) -> VolumeStatus {
    VolumeStatus {
        state: VolumeState::Degraded,
        state_cause: Some(error.to_string()),
        last_error: Some(LastError::new(error, Timestamp::now())),
        ..VolumeStatus::unknown(id)
    }
}

/// Shows that shipping was paused or goes on.
pub fn shipping(volume: &Volume, shipping: Shipping) {
    let (state, cause) = state_of(&volume.config());
    volume.publish(|status| {
        if shipping == Shipping::Paused || status.state == VolumeState::Paused {
            status.state = state;
            status.state_cause = cause;
        }
    });
}

/// The status with the newest numbers, if the member can be asked.
pub fn fresh(volume: &Volume) -> VolumeStatus {
    if let Some(mut member) = volume.try_member() {
        member.look_at_lag();
        volume.publish(|status| member.describe(status));
    } else if let Some(inline) = volume.inline() {
        // A target that does not answer hides nothing of what capture does.
        volume.publish(|status| inline.describe(status));
    }
    volume.status()
}

/// How the first copy or the resync has ended, or why it cannot; `None`: not yet.
pub fn settled(volume: &Volume) -> Option<Result<Settled>> {
    let cannot = |kind, why: String, advice: &str| {
        let error = Error::new(kind, "wait for the volume").volume(volume.id());
        Some(Err(error.detail(why).advice(advice)))
    };
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
    let pace = volume.pace(|pace| pace.clone());
    let is_copied = config.phase == Phase::Replicating;
    if is_copied && !pace.owes_point() {
        return Some(Ok(Settled::WithPoint));
    }
    let missed = pace.newest_missed();
    if let (true, Some((Cause::NeverQuiet, why))) = (is_copied, missed) {
        return Some(Ok(Settled::WithoutPoint(why.to_owned())));
    }
    if pace.failures() < TRIES {
        return None;
    }
    let why = match missed {
        Some((_, why)) => format!("it is copied, and no point can be made: {why}"),
        None => volume
            .status()
            .last_error
            .map_or_else(String::new, |error| error.message),
    };
    cannot(
        ErrorKind::TimedOut,
        why,
        "it is tried again; see `replica status`",
    )
}
