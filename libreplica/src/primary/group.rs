//! Who makes a point together: the volumes of one `--group`, or a volume alone. A group's
//! point has one freeze, one group id, and exists only if every member has it.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::primary::config::{Phase, Shipping};
use crate::primary::environment::Environment;
use crate::primary::lifecycle;
use crate::primary::point;
use crate::primary::spec::PointOptions;
use crate::primary::status::PointSummary;
use crate::primary::volume::{Volume, locked};

/// The volumes of this daemon, as each volume's thread sees them.
#[derive(Clone, Default)]
pub struct Peers(Arc<Mutex<Vec<Arc<Volume>>>>);

impl Peers {
    /// Replaces the list.
    pub fn set(&self, volumes: Vec<Arc<Volume>>) {
        *locked(&self.0) = volumes;
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

/// Makes a point of `volume` and its group; returns `volume`'s own.
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
    let members: Vec<_> = environment
        .peers
        .group_of(volume)
        .into_iter()
        // A newcomer's first copy does not keep the others from making points.
        .filter(|member| member.id() == volume.id() || member.config().phase != Phase::Baseline)
        .collect();
    for member in &members {
        can_make_a_point(member)?;
    }
    let mut held = Vec::with_capacity(members.len());
    for member in &members {
        held.push(member.member_until(deadline)?);
    }
    // What was running may have ended in a resync.
    for member in &members {
        can_make_a_point(member)?;
    }
    let mut parts: Vec<_> = members
        .iter()
        .zip(&mut held)
        .map(|(volume, member)| point::Part {
            volume,
            member: &mut *member,
        })
        .collect();
    let made = point::make(&mut parts, environment, options, deadline);
    for (part, index) in parts.iter_mut().zip(0..) {
        lifecycle::after_point(
            part,
            environment,
            made.as_ref().map(|points| &points[index]),
        );
    }
    let points = made?;
    let own = members.iter().position(|member| member.id() == volume.id());
    own.and_then(|index| points.into_iter().nth(index))
        .ok_or_else(|| {
            Error::new(ErrorKind::State, "make a point")
                .volume(volume.id())
                .detail("not in its group")
        })
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
