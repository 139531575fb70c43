//! The usher: one thread a volume that clears what most changes wait for. It writes the
//! activity log's transactions, many waiting changes at a time, and lets regions leave the
//! activity log when they have been quiet.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use crate::capture::inline::activity::{Region, Step};
use crate::capture::inline::activity_file::ActivityFile;
use crate::capture::inline::gate::Hurdle;
use crate::capture::inline::interceptor::{Interceptor, State, lock};
use crate::device::BlockDevice;
use crate::error::{IoContext, Result};

/// How long a region stays in the activity log without a write, at least.
const QUIET: Duration = Duration::from_secs(15);
/// How long after it failed the activity log is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// The usher is no lane.
const NOBODY: usize = usize::MAX;

enum Job {
    Activity(Step),
    Quiet(Vec<Region>),
}

/// Runs until the interceptor stops.
pub(super) fn run(interceptor: &Arc<Interceptor>, mut log: ActivityFile, disk: &BlockDevice) {
    let mut look_for_idle = Instant::now() + QUIET;
    let mut not_before = Instant::now();
    let mut state = lock(&interceptor.state);
    loop {
        if state.stopping && state.gate.is_empty() {
            break;
        }
        let now = Instant::now();
        let mut job = (now >= not_before).then(|| next_step(&mut state)).flatten();
        if job.is_none() && now >= look_for_idle {
            look_for_idle = now + QUIET;
            job = Some(Job::Quiet(idle_regions(&mut state)));
        }
        let Some(job) = job else {
            let pause = look_for_idle.saturating_duration_since(now).min(AGAIN);
            let waited = interceptor.usher.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        };
        drop(state);
        let trouble = perform(interceptor, &mut log, disk, job).err();
        if let Some(error) = &trouble {
            tracing::warn!("{error}");
            not_before = Instant::now() + AGAIN;
        }
        state = lock(&interceptor.state);
        state.trouble = trouble.map(|error| error.to_string());
    }
    drop(state);
    leave_clean(interceptor, &mut log, disk);
}

/// Nothing is under way any more: with device and bits durable, no region is active.
fn leave_clean(interceptor: &Interceptor, log: &mut ActivityFile, disk: &BlockDevice) {
    let flushed = interceptor
        .device
        .sync_data()
        .inspect_err(|error| interceptor.flush_failed(error))
        .at("flush the device", &interceptor.path);
    let left = flushed
        .and_then(|()| interceptor.ledger.flush())
        .and_then(|()| log.write(&[]))
        .and_then(|()| interceptor.traffic.settle_if(disk, || true));
    if let Err(error) = left {
        tracing::warn!("{error}");
    }
}

/// What the activity log is to do for a change that waits.
fn next_step(state: &mut State) -> Option<Job> {
    match state.activity.step() {
        Step::Rest | Step::Wait => None,
        step => Some(Job::Activity(step)),
    }
}

/// The regions that nobody has written for a while.
fn idle_regions(state: &mut State) -> Vec<Region> {
    state.activity.tick();
    state.activity.idle_regions()
}

fn perform(
    interceptor: &Interceptor,
    log: &mut ActivityFile,
    disk: &BlockDevice,
    job: Job,
) -> Result<()> {
    match job {
        Job::Activity(Step::Write(set)) => {
            log.write(&set)?;
            let mut state = lock(&interceptor.state);
            state.counters.transactions += 1;
            state.activity.written(&set);
            let State { gate, activity, .. } = &mut *state;
            gate.lower(Hurdle::Activity, |extent| activity.is_active(extent));
            interceptor.release(&mut state, NOBODY);
        }
        Job::Activity(Step::Retire(regions)) => retire(interceptor, &regions)?,
        Job::Activity(Step::Rest | Step::Wait) => {}
        Job::Quiet(regions) => {
            let is_quiet = || lock(&interceptor.state).gate.is_empty();
            interceptor.traffic.settle_if(disk, is_quiet)?;
            if regions.is_empty() {
                return Ok(());
            }
            retire(interceptor, &regions)?;
            let remaining = lock(&interceptor.state).activity.remaining();
            log.write(&remaining)?;
        }
    }
    Ok(())
}

/// What was written in these regions is on the device for good, and its dirty bits are in
/// the file: a loss of power would lose neither.
fn retire(interceptor: &Interceptor, regions: &[Region]) -> Result<()> {
    let path = &interceptor.path;
    interceptor
        .device
        .sync_data()
        .inspect_err(|error| interceptor.flush_failed(error))
        .at("flush the device", path)?;
    interceptor.ledger.flush()?;
    lock(&interceptor.state).activity.retire(regions);
    Ok(())
}
