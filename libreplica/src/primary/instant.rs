//! How the moment of a point is come by where the device's users go through us: it is a cut
//! of the stream of changes, at once and without a freeze, or, while capture knew only which
//! blocks changed, a copy of those as they were at one moment, while writes go on.

use std::time::{Duration, Instant};

use hrl_format::units::Timestamp;

use crate::capture::inline::{Moment, Service};
use crate::device::Filesystem;
use crate::error::{ErrorKind, Result};
use crate::primary::environment::Environment;
use crate::primary::point::{Missed, Part, all_well, each};
use crate::primary::still::Reached;

/// How long to wait until what failed writes have left was read back.
const SETTLE: Duration = Duration::from_secs(5);
/// The same, while everybody waits.
const SETTLE_FROZEN: Duration = Duration::from_millis(50);

/// Whether the parts' users go through us. All of a group's do, or none's.
pub fn is_inline(parts: &mut [Part<'_>]) -> bool {
    let mut inline = false;
    each(parts, |part| {
        inline |= part.source()?.service().is_some();
        Ok(())
    });
    inline
}

/// Takes one moment of all parts, frozen if something is mounted, and puts what it is made
/// of into their drafts.
pub fn reach(parts: &mut [Part<'_>], environment: &Environment, frozen: &[Filesystem]) -> Reached {
    let mut blocked = Duration::ZERO;
    let taken = if frozen.is_empty() {
        settle(SETTLE, || drain(parts).and_then(|()| take(parts)))
    } else if let Err(missed) = settle(SETTLE, || drain(parts).map(|()| is_ready(parts))) {
        // Nobody waits in a freeze for that.
        Err(missed)
    } else {
        let mut freezer = environment.freezer();
        let taken = match freezer.freeze(frozen, environment.options.freeze_limit) {
            Ok(freeze) => {
                let taken = settle(SETTLE_FROZEN, || take(parts));
                let thawed = freeze.thaw();
                taken.and_then(|taken| thawed.map(|_| taken).map_err(Missed::from))
            }
            Err(error) => Err(error.into()),
        };
        // Also when it failed: writers were blocked all the same.
        blocked = freezer.blocked();
        taken
    };
    let moment = taken.and_then(|(time, moments)| {
        let mut moments = moments.into_iter();
        each(parts, |part| {
            let moment = moments.next();
            moment.map_or(Ok(()), |moment| part.gather(&moment))
        });
        all_well(parts).map(|()| time)
    });
    if moment.is_err() {
        // What was taken and not put into a draft is dirty again.
        each(parts, |part| {
            part.member_without_draft().map_or(Ok(()), |member| {
                member.reclaim();
                Ok(())
            })
        });
    }
    Reached {
        moment,
        frozen: Some(blocked),
    }
}

/// Makes what came before gaps durable in the store.
fn drain(parts: &mut [Part<'_>]) -> Result<(), Missed> {
    each(parts, |part| part.member.drain());
    all_well(parts)
}

/// Whether a moment of all parts could be taken now.
fn is_ready(parts: &mut [Part<'_>]) -> Result<()> {
    let mut services = Vec::with_capacity(parts.len());
    each(parts, |part| {
        services.extend(part.source()?.service().cloned());
        Ok(())
    });
    services.iter().try_for_each(|service| service.has_moment())
}

/// Tries again while it does not take long: what keeps a moment from being taken passes.
fn settle<T>(
    limit: Duration,
    mut attempt: impl FnMut() -> Result<Result<T>, Missed>,
) -> Result<T, Missed> {
    let deadline = Instant::now() + limit;
    loop {
        match attempt()? {
            Ok(done) => return Ok(done),
            Err(error) if error.kind() == ErrorKind::State && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes one moment of all parts, or says why it could not be taken just now.
///
/// # Errors
/// Who of the parts has failed.
fn take(parts: &mut [Part<'_>]) -> Result<Result<(Timestamp, Vec<Moment>)>, Missed> {
    let mut services = Vec::with_capacity(parts.len());
    each(parts, |part| {
        let source = part.source()?;
        source.begin_round();
        services.extend(source.service().cloned());
        Ok(())
    });
    all_well(parts)?;
    let services: Vec<&Service> = services.iter().map(AsRef::as_ref).collect();
    Ok(Service::moment(&services))
}
