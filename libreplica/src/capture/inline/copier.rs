//! The copier: one thread a volume that copies blocks out of turn that are about to be
//! overwritten, while a moment is being read. Not the usher, for a disk may try for half a
//! minute to read a block: only changes of that block wait so long.

use std::sync::PoisonError;
use std::time::Duration;

use crate::capture::inline::copying::MomentNumber;
use crate::capture::inline::gate::Hurdle;
use crate::capture::inline::interceptor::{Interceptor, State, lock};
use crate::capture::inline::read_back::read;
use crate::error::Result;
use crate::geometry::{BlockNumber, Run};

/// Bytes that are copied at once, at most.
const COPY_MAX: u64 = 1 << 20;
/// How often it is looked whether there is something to do, besides when it is told.
const LOOK: Duration = Duration::from_secs(1);
/// The copier is no lane.
const NOBODY: usize = usize::MAX;

/// Runs until the interceptor stops.
pub(super) fn run(interceptor: &Interceptor) {
    let mut state = lock(&interceptor.state);
    loop {
        if let Some((moment, run)) = next(&state) {
            drop(state);
            let copied = copy(interceptor, moment, run);
            state = lock(&interceptor.state);
            if let Err(error) = copied {
                tracing::warn!("{error}");
                state.trouble = Some(error.to_string());
            }
        } else if state.stopping && state.gate.is_empty() {
            return;
        } else {
            let waited = interceptor.usher.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The blocks that a waiting change needs copied first.
fn next(state: &State) -> Option<(MomentNumber, Run)> {
    let copying = state.copying.as_ref()?;
    let mut held = state.gate.held_by(Hurdle::Copy);
    let run = held.find_map(|extent| copying.first_pending(extent))?;
    Some((copying.number(), run))
}

fn copy(interceptor: &Interceptor, moment: MomentNumber, run: Run) -> Result<()> {
    let blocks = (COPY_MAX / u64::from(interceptor.geometry.block.get())).max(1);
    let end = run.end.get().min(run.start.get() + blocks);
    let run = Run {
        start: run.start,
        end: BlockNumber::new(end),
    };
    let data = read(interceptor, interceptor.geometry.extent_of(run));
    let mut state = lock(&interceptor.state);
    let State {
        copying,
        gate,
        counters,
        ..
    } = &mut *state;
    // It may have been given up meanwhile, and what was read be older than the next.
    let Some(copying) = copying.as_mut().filter(|now| now.number() == moment) else {
        return Ok(());
    };
    counters.copied_out_of_turn += run.count();
    match &data {
        Ok(data) => {
            copying.save(run, data);
        }
        // No writer waits for a block that cannot be read: the moment is lost instead.
        Err(_) => copying.give_up(),
    }
    gate.lower(Hurdle::Copy, |extent| copying.may_change(extent));
    interceptor.release(&mut state, NOBODY);
    data.map(drop)
}
