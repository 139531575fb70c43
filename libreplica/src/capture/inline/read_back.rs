//! Reading back what the device holds where nobody knows it: see `unknown.rs`. It has a
//! thread of its own, for a disk may try for half a minute to read a sector that is gone. No
//! change waits for it: one that is let in where it reads makes what it read worthless, and
//! when the change has ended that part is known, or is unknown anew.

use std::os::unix::fs::FileExt;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::capture::inline::backlog::Change;
use crate::capture::inline::interceptor::{Interceptor, State, lock};
use crate::error::{IoContext, Result};
use crate::sys::memory::AlignedMemory;
use crate::units::Extent;

/// How long after it failed a part is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// Runs until the interceptor stops. What could not be read back until then is dirty.
pub(super) fn run(interceptor: &Interceptor) {
    let mut state = lock(&interceptor.state);
    while !state.stopping {
        let now = Instant::now();
        let gate = &state.gate;
        let Some(extent) = state.unknown.due(now, |extent| !gate.touches(extent)) else {
            let pause = state.unknown.pause(now);
            let waited = interceptor.read_back.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            continue;
        };
        state.reading = Some(extent);
        drop(state);
        let content = read(interceptor, extent);
        state = lock(&interceptor.state);
        conclude(interceptor, &mut state, extent, content);
    }
}

fn conclude(interceptor: &Interceptor, state: &mut State, extent: Extent, content: Result<Bytes>) {
    // Nobody was let in there since: it is what the device holds.
    let is_current = state.reading.take().is_some();
    match content {
        Ok(data) if is_current => {
            interceptor.ledger.mark(extent);
            interceptor.record(state, extent, Some(Change::Write(data)));
        }
        Ok(_) => {}
        Err(error) => {
            tracing::warn!("{error}");
            let again = Instant::now() + AGAIN;
            state.unknown.postpone(extent, again, error.to_string());
        }
    }
}

/// What the device holds.
pub(super) fn read(interceptor: &Interceptor, extent: Extent) -> Result<Bytes> {
    const READ: &str = "read the device";
    let path = &interceptor.path;
    let len = extent.len().get() as usize;
    let mut memory = AlignedMemory::new(len).at(READ, path)?;
    let buffer = &mut memory.as_mut_slice()[..len];
    let offset = extent.offset();
    interceptor
        .device
        .read_exact_at(buffer, offset.get())
        .at(READ, path)
        .map_err(|error| error.offset(offset))?;
    Ok(Bytes::copy_from_slice(buffer))
}
