//! A volume of a plan: failed over, or opened as a drill, and served by the daemon. What a run that was
//! killed has done already is to be seen in the store and at the daemon, and is not done again.

use std::time::Duration;

use hrl_format::id::BranchId;
use libreplica::Error;
use libreplica::ErrorKind;
use libreplica::failover::Event;
use libreplica::plan::{Mode, Outcome, PlannedVolume, PointPolicy};
use libreplica::replica::{Choice, FailedOver, Failover, Shutdown};
use libreplica::store::{PointSelector, Promotion, Recovery, Store};
use libreplica::time::rfc3339;

use crate::cli::DaemonArgs;
use crate::commands::failover::{clean_up, host};
use crate::commands::open_store::{read_key, store_path};
use crate::commands::serve_branch;
use crate::failure::Failure;

/// How volumes are failed over.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// What the plan is run for.
    pub mode: Mode,
    /// How long a source may take to come to rest, if nothing shall be lost.
    pub limit: Duration,
    /// Whether one that is replaced is asked to come to rest first.
    pub shutdown: Shutdown,
}

impl How {
    fn event(self) -> Event {
        match (self.mode, self.shutdown) {
            (Mode::Test, _) => Event::Test,
            (Mode::Planned, _) => Event::Planned,
            (Mode::Unplanned, Shutdown::Skip) => Event::Unplanned,
            (Mode::Unplanned, Shutdown::Try(_)) => Event::UnplannedAfterShutdown,
        }
    }
}

/// The failover of a planned volume, by this machine.
///
/// # Errors
/// When the store or the key cannot be read, or there is no such volume.
pub fn of(planned: &PlannedVolume) -> Result<Failover, Failure> {
    let store = Store::open(&store_path(&planned.store)?)?;
    let volume = store.find(&planned.volume)?;
    let key = read_key(planned.key_file.as_deref())?;
    Ok(Failover::new(store, volume, key, &host()?))
}

/// Whether it can be failed over now.
///
/// # Errors
/// Why not.
pub fn ready(planned: &PlannedVolume, how: How) -> Result<(), Failure> {
    of(planned)?.may(how.event())?;
    Ok(())
}

/// Whether the volume is in use in place of its source.
///
/// # Errors
/// Those of [`of`], and of reading the catalogue.
pub fn is_failed_over(planned: &PlannedVolume) -> Result<bool, Failure> {
    Ok(of(planned)?.situation()?.recovery != Recovery::Replicating)
}

/// Which state is meant.
pub const fn choice(policy: PointPolicy) -> Choice {
    match policy {
        PointPolicy::Latest => Choice::Latest,
        PointPolicy::LatestProcessed => Choice::LatestProcessed,
        PointPolicy::LatestApplication => Choice::LatestApplication,
    }
}

/// The recovery point that is meant, of those that can be drilled.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is none.
pub fn point(planned: &PlannedVolume) -> Result<PointSelector, Failure> {
    use hrl_format::record::Consistency;
    if planned.point != PointPolicy::LatestApplication {
        return Ok(PointSelector::Latest);
    }
    let store = Store::open(&store_path(&planned.store)?)?;
    let reader = store.volume(
        store.find(&planned.volume)?,
        read_key(planned.key_file.as_deref())?,
    )?;
    let points = reader.points()?;
    let mut newest_first = points.iter().rev();
    let found = newest_first.find(|point| point.consistency == Consistency::Application);
    let none = || {
        Error::new(ErrorKind::NotFound, "find the point")
            .detail("no recovery point is application-consistent")
    };
    Ok(PointSelector::Id(found.ok_or_else(none)?.id))
}

/// Fails a volume over, or opens a drill of it, and has the daemon serve it.
///
/// # Errors
/// Those of [`Failover`]; what the daemon says.
pub fn fail_over(
    daemon: &DaemonArgs,
    planned: &PlannedVolume,
    how: How,
    attempt: u32,
) -> Result<Outcome, Failure> {
    let failover = of(planned)?;
    if how.mode == Mode::Test {
        let open = failover.situation()?.drill.filter(|_| attempt > 1);
        let branch = match open {
            Some(branch) => branch,
            None => failover.test(choice(planned.point))?,
        };
        return Ok(Outcome::Opened {
            branch: branch.to_string(),
            uri: serve(daemon, &failover, planned, branch)?,
        });
    }
    let done = match attempt {
        1 => None,
        _ => happened(&failover)?,
    };
    let done = match (done, how.mode) {
        (Some(done), _) => done,
        (None, Mode::Planned) => failover.planned(how.limit)?,
        (None, _) => failover.unplanned(choice(planned.point), how.shutdown)?,
    };
    let uri = serve(daemon, &failover, planned, done.branch)?;
    Ok(outcome(done, uri))
}

/// What came of a failover that had been begun before, if it happened.
fn happened(failover: &Failover) -> Result<Option<FailedOver>, Failure> {
    let situation = failover.situation()?;
    let Some(promotion) = situation.recovery.promotion() else {
        return Ok(None);
    };
    let branch = failover.finish()?.ok_or_else(|| {
        Error::new(ErrorKind::State, "fail the volume over")
            .volume(failover.volume())
            .detail("it is not in use any more where it was failed over to")
            .advice("`replica status` tells where it is")
    })?;
    Ok(Some(FailedOver {
        promotion: promotion.clone(),
        branch,
        source: None,
    }))
}

fn outcome(done: FailedOver, uri: String) -> Outcome {
    let Promotion { point, loss, .. } = &done.promotion;
    Outcome::FailedOver {
        branch: done.branch.to_string(),
        uri,
        point: point.to_string(),
        as_of: rfc3339(loss.since),
        loss_seconds: loss.seconds(),
        loss_bytes: loss.bytes.get(),
        source_refused: done.source,
    }
}

fn serve(
    daemon: &DaemonArgs,
    failover: &Failover,
    planned: &PlannedVolume,
    branch: BranchId,
) -> Result<String, Failure> {
    let key_file = planned.key_file.as_deref();
    serve_branch::serve(daemon, failover, branch, key_file, &planned.socket)
}

/// Discards the drill of a volume, if one is open.
///
/// # Errors
/// Those of [`Failover`]; what the daemon says.
pub fn discard(daemon: &DaemonArgs, planned: &PlannedVolume) -> Result<Outcome, Failure> {
    let failover = of(planned)?;
    if failover.situation()?.drill.is_some() {
        clean_up(daemon, &planned.volume, &failover)?;
    }
    Ok(Outcome::CleanedUp)
}
