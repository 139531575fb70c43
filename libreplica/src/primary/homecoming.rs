//! A volume that was failed over comes home. Another process brings the device up to date
//! (`replica::Failover::failback`); here it is given the device, of which nobody else may have
//! anything open for writing, and told which generation the volume will be then. That is
//! written down before the store says it, so that a daemon killed in between knows the volume for
//! its own; and what the store never says has no effect.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hrl_format::id::Generation;

use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Phase, Rest, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::pace::Pace;
use crate::primary::volume::Volume;
use crate::primary::{handover, lifecycle};
use crate::store::Store;

const RETURN: &str = "bring the volume home";
/// How long another operation on the volume may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether the device was let go.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
const CAUSE: &str = "the volume came home: its device was written by us";

/// Lets go of a fenced volume's device, so that it can be brought up to date; its path.
///
/// # Errors
/// [`ErrorKind::State`] if the volume is this side's; [`ErrorKind::Busy`] if the device is in
/// use; what the system says.
pub fn prepare(volume: &Volume) -> Result<PathBuf> {
    let config = volume.config();
    if config.refuse_fenced().is_ok() {
        return Err(Error::new(ErrorKind::State, RETURN)
            .volume(volume.id())
            .detail("it was not failed over: this side is its primary"));
    }
    if volume.inline().is_some() {
        handover::refuse_used(volume)?;
    }
    handover::refuse_mounted(volume)?;
    let served = volume.inline().as_ref().map(Arc::downgrade);
    let until = Instant::now() + PATIENCE;
    let mut member = volume.member_until(until)?;
    member.drop_sides();
    member.stop_serving(volume)?;
    drop(member);
    // Whoever still looks at it has the device claimed.
    while served
        .as_ref()
        .is_some_and(|served| served.strong_count() > 0)
    {
        if Instant::now() >= until {
            return Err(Error::new(ErrorKind::Busy, RETURN)
                .volume(volume.id())
                .detail("the device is still being let go")
                .advice("try again"));
        }
        volume.wake();
        std::thread::sleep(LOOK_AGAIN);
    }
    handover::make_writable(&config)?;
    Ok(config.device)
}

/// Writes down which generation the volume will be.
///
/// # Errors
/// When the state folder cannot be written.
pub fn announce(volume: &Volume, environment: &Environment, coming: Generation) -> Result<()> {
    lifecycle::change_config(volume, environment, |config| {
        config.coming_home = Some(coming.into());
    })
}

/// Takes a volume up that has come home.
///
/// # Errors
/// When the state folder cannot be written.
pub fn arrive(volume: &Volume, environment: &Environment) -> Result<()> {
    let config = volume.config();
    let Some(coming) = config.coming_home else {
        return Ok(());
    };
    if !is_in_force(&config, coming.into()) {
        return Ok(());
    }
    tracing::info!(volume = %volume.id(), "it came home");
    volume.pace(Pace::owe_point);
    lifecycle::change_config(volume, environment, |config| {
        config.generation = Some(coming);
        config.coming_home = None;
        config.rest = Rest::InUse;
        // What was tracked meanwhile is not all that was written.
        config.phase = Phase::Resync {
            cause: CAUSE.to_owned(),
        };
    })
}

/// Whether the store says so. One that cannot be read says nothing.
fn is_in_force(config: &VolumeConfig, generation: Generation) -> bool {
    let catalogue =
        Store::open(&config.store).and_then(|store| store.check_generation(config.id, generation));
    catalogue.is_ok()
}
