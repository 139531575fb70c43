//! Writes that were seen to begin, and whose end the kernel did not show the programs: it
//! skips one that is interrupted by itself, and may run none on behalf of some tasks. Such a
//! write would be in flight for ever; but what it covers was noted, so that its end can be
//! made up for: once the disk is at rest, whatever was noted well before has ended. It is
//! marked again, as its end would have done, and counted.
//!
//! Should one live after all (held back above the driver, where the kernel does not count
//! it as in flight), its request marks it when it does end. Nothing is lost.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::capture::instance::Instance;
use crate::capture::pins::FLIGHT;
use crate::capture::state::Word;
use crate::device::{IoStats, Queue};
use crate::error::{IoContext, Result};
use crate::units::{ByteLen, ByteOffset, Extent};

/// How long a disk is to be seen at rest. A write is noted a moment before the kernel itself
/// has it in flight.
const REST: Duration = Duration::from_millis(20);
/// How many noted writes are looked through at a time.
const MOST: usize = 1 << 16;
/// Bytes of the kernel's sectors.
const SECTOR: u64 = 512;
const OPERATION: &str = "look through the writes in flight";

/// A disk at rest, and writes that are noted all the same.
#[derive(Clone, Copy, Debug)]
struct Rest {
    since: Instant,
    /// How many writes had been noted by then.
    submitted: u64,
}

/// Since when a disk is at rest, as far as was seen.
#[derive(Debug, Default)]
pub(super) struct Watch {
    rest: Mutex<Option<Rest>>,
}

/// Whether the kernel has skipped one of the programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Skipped {
    /// Not that it knew.
    No,
    /// It has, and so the volume was widened.
    Yes,
}

/// A write as the programs note it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flight {
    key: u64,
    value: [u8; FLIGHT],
}

/// What a flight says of its place. Same order as in `bpf/track.bpf.c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Range,
    Whole,
    Probe,
}

impl Flight {
    fn word(&self, index: usize) -> u64 {
        u64::from_ne_bytes(std::array::from_fn(|i| self.value[index * 8 + i]))
    }

    fn kind(&self) -> Kind {
        let [.., a, b, c, d] = self.word(1).to_le_bytes();
        match u32::from_le_bytes([a, b, c, d]) {
            0 => Kind::Range,
            2 => Kind::Probe,
            _ => Kind::Whole,
        }
    }

    fn extent(&self) -> Option<Extent> {
        let sectors = self.word(1) & u64::from(u32::MAX);
        let offset = ByteOffset::new(self.word(0).checked_mul(SECTOR)?);
        Extent::new(offset, ByteLen::new(sectors * SECTOR))
    }

    fn serial(&self) -> u64 {
        self.word(2)
    }

    fn left(&self) -> u64 {
        self.word(3)
    }
}

impl Instance {
    /// Makes up for the ends of writes that were not seen, if the disk is at rest and was
    /// so when `watch` was last used, a while ago. Not to be called while parts are swapped.
    ///
    /// Only where the kernel surely counts what is in flight: on a disk of requests. On one
    /// of bios that is up to the driver, and a write that is forgotten too early would be
    /// found unmatched; there, only once the kernel has `skipped` a program.
    ///
    /// # Errors
    /// What sysfs and bpf(2) say.
    pub(super) fn settle(&self, watch: &Watch, skipped: Skipped) -> Result<()> {
        let mut rest = watch.rest.lock().unwrap_or_else(PoisonError::into_inner);
        let sure = self.disk.queue() == Queue::Requests || skipped == Skipped::Yes;
        if !sure || !self.has_noted() || !self.rests()? {
            *rest = None;
            return Ok(());
        }
        let submitted = self.pins.state.get(Word::Submitted);
        let since = *rest.get_or_insert(Rest {
            since: Instant::now(),
            submitted,
        });
        if since.since.elapsed() < REST && skipped == Skipped::No {
            return Ok(());
        }
        let noted = self.noted()?;
        let all = noted.len() <= MOST;
        if !self.rests()? {
            *rest = None;
            return Ok(());
        }
        let (old, new): (Vec<_>, Vec<_>) = noted
            .into_iter()
            .partition(|flight| flight.serial() < since.submitted);
        for flight in &old {
            self.land(flight)?;
        }
        // What was noted since then comes next time.
        *rest = Some(Rest {
            since: Instant::now(),
            submitted,
        });
        if all && new.is_empty() && self.pins.state.get(Word::Submitted) == since.submitted {
            self.balance_flights();
        }
        Ok(())
    }

    fn has_noted(&self) -> bool {
        let state = &self.pins.state;
        state.get(Word::Submitted) != state.get(Word::Completed)
    }

    /// Whether the kernel has nothing in flight on the disk, and would tell.
    fn rests(&self) -> Result<bool> {
        Ok(self.disk.io_stats()? == IoStats::Kept
            && self.disk.stats()?.in_flight == 0
            && self.disk.writes_in_flight()? == 0)
    }

    fn noted(&self) -> Result<Vec<Flight>> {
        let (flights, folder) = (&self.pins.flights, &self.pins.folder);
        let mut noted = Vec::new();
        let mut key = None;
        // Where keys come and go, the walk may begin again: it needs an end of its own.
        while let Some(next) = flights.next_key(key).at(OPERATION, folder)? {
            if let Some(value) = flights.get(next).at(OPERATION, folder)? {
                noted.push(Flight { key: next, value });
            }
            key = Some(next);
            if noted.len() > MOST {
                break;
            }
        }
        Ok(noted)
    }

    /// Does what the end of `flight` would have done. In an order in which this process may
    /// be killed anywhere: marked first, and counted as complete last.
    fn land(&self, flight: &Flight) -> Result<()> {
        let (flights, folder) = (&self.pins.flights, &self.pins.folder);
        let state = &self.pins.state;
        if flights.get(flight.key).at(OPERATION, folder)? != Some(flight.value) {
            return Ok(());
        }
        let add = |word, n| state.at(word, 0).fetch_add(n, Ordering::AcqRel);
        match flight.kind() {
            Kind::Range => {
                let run = flight
                    .extent()
                    .and_then(|extent| self.pins.identity.geometry.run_of(extent));
                if let Some(run) = run {
                    self.parts[state.active()].set_run(run);
                }
            }
            Kind::Whole => state.count_unknown_operation(),
            Kind::Probe => {
                if flights.remove(flight.key).at(OPERATION, folder)? {
                    add(Word::ProbeCompleted, 1);
                }
                return Ok(());
            }
        }
        add(Word::Stale, 1);
        add(Word::StaleSectors, flight.left());
        if flights.remove(flight.key).at(OPERATION, folder)? {
            add(Word::CompletedSectors, flight.left());
            add(Word::Completed, 1);
        }
        Ok(())
    }

    /// Nothing is noted and nothing is in flight: whatever was begun is complete. Somebody
    /// may have been killed before counting it so.
    fn balance_flights(&self) {
        let state = &self.pins.state;
        for (begun, complete) in [
            (Word::SubmittedSectors, Word::CompletedSectors),
            (Word::Submitted, Word::Completed),
        ] {
            let open = state.get(begun).wrapping_sub(state.get(complete));
            state.at(complete, 0).fetch_add(open, Ordering::AcqRel);
        }
    }
}
