//! What a tracker knows beside the marks: causes to take the whole volume for dirty, writes
//! in flight, counters. Shared with observers in other threads, which only look on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::bitmap::Bitmap;
use crate::capture::balance::Balance;
use crate::capture::counters::{Counters, InFlight, WidenCause};
use crate::capture::flights::Skipped;
use crate::capture::pins::{PROGRAMS, Pins};
use crate::capture::state::{PARTS, PROGRAM_CAUSES, Word};
use crate::device::BlockDevice;
use crate::error::{IoContext, Result};
use crate::geometry::Geometry;
use crate::sys::bpf;

/// What tracker and observers share.
#[derive(Debug)]
pub(super) struct Instance {
    pub pins: Pins,
    pub parts: [Bitmap; PARTS],
    pub disk: BlockDevice,
}

/// Causes as counted at one moment, and which of them grew since they were last noted.
#[derive(Debug, Default)]
pub(super) struct Causes {
    counted: [u64; PROGRAM_CAUSES],
    misses: [u64; PROGRAMS.len()],
    balance: Balance,
    grown: Vec<WidenCause>,
}

impl Causes {
    pub(super) fn first(&self) -> Option<WidenCause> {
        self.grown.first().copied()
    }

    /// Whether the kernel has skipped a program, now or before.
    pub(super) fn skipped(&self) -> Skipped {
        let any = self.grown.contains(&WidenCause::MissedEvents)
            || self.misses.iter().any(|&misses| misses != 0);
        if any { Skipped::Yes } else { Skipped::No }
    }
}

impl Instance {
    /// Reads all causes beside `balance`. To be called when no program holds the bitmap
    /// being drained.
    pub(super) fn causes(&self, balance: Balance) -> Result<Causes> {
        let state = &self.pins.state;
        let mut causes = Causes {
            balance,
            ..Causes::default()
        };
        for (i, &cause) in WidenCause::ALL.iter().take(PROGRAM_CAUSES).enumerate() {
            causes.counted[i] = state.at(Word::Causes, i).load(Ordering::Acquire);
            if causes.counted[i] != state.at(Word::NotedCauses, i).load(Ordering::Acquire) {
                causes.grown.push(cause);
            }
        }
        causes.misses = self.misses()?;
        let missed =
            causes.misses.iter().enumerate().any(|(i, &misses)| {
                misses != state.at(Word::NotedMisses, i).load(Ordering::Acquire)
            });
        if missed {
            causes.grown.push(WidenCause::MissedEvents);
        }
        if matches!(balance, Balance::Missed(_)) {
            causes.grown.push(WidenCause::StatsDiffer);
        }
        Ok(causes)
    }

    /// Takes note of `causes`, whose consequence is in the bitmaps by now.
    pub(super) fn note(&self, causes: &Causes) {
        let state = &self.pins.state;
        for &cause in &causes.grown {
            state.count_widening(cause);
        }
        for (i, &counted) in causes.counted.iter().enumerate() {
            state
                .at(Word::NotedCauses, i)
                .store(counted, Ordering::Release);
        }
        for (i, &misses) in causes.misses.iter().enumerate() {
            state
                .at(Word::NotedMisses, i)
                .store(misses, Ordering::Release);
        }
        if let Some(bound) = causes.balance.bound() {
            state.set(Word::SurplusBound, bound);
            state.set(Word::SurplusBounded, 1);
        }
    }

    /// How often the kernel skipped each program.
    fn misses(&self) -> Result<[u64; PROGRAMS.len()]> {
        let mut misses = [0; PROGRAMS.len()];
        for (count, program) in misses.iter_mut().zip(&self.pins.programs) {
            let read = bpf::recursion_misses(std::os::fd::AsFd::as_fd(program));
            *count = read
                .at("ask for missed events", &self.pins.folder)?
                .unwrap_or(0);
        }
        Ok(misses)
    }

    pub(super) fn dirty_blocks(&self) -> u64 {
        let [first, second, epoch] = &self.parts;
        Bitmap::count_union(&[first, second, epoch])
    }

    pub(super) fn in_flight(&self) -> Result<InFlight> {
        let state = &self.pins.state;
        // Completions first: what ends in between is then counted as in flight.
        let completed = state.get(Word::Completed);
        let completed_sectors = state.get(Word::CompletedSectors);
        let submitted_sectors = state.get(Word::SubmittedSectors);
        let submitted = state.get(Word::Submitted);
        Ok(InFlight {
            writes: submitted.saturating_sub(completed),
            sectors: submitted_sectors.saturating_sub(completed_sectors),
            requests: self.disk.writes_in_flight()?,
        })
    }

    pub(super) fn counters(&self) -> Result<Counters> {
        let state = &self.pins.state;
        let widened = WidenCause::ALL
            .iter()
            .enumerate()
            .filter_map(|(i, &cause)| {
                let count = state.at(Word::Widened, i).load(Ordering::Acquire);
                (count != 0).then_some((cause, count))
            });
        Ok(Counters {
            submitted: state.get(Word::Submitted),
            submitted_sectors: state.get(Word::SubmittedSectors),
            completed: state.get(Word::Completed),
            completed_sectors: state.get(Word::CompletedSectors),
            requests: state.get(Word::Requests),
            request_sectors: state.get(Word::RequestSectors),
            stale: state.get(Word::Stale),
            missed_events: self.misses()?.iter().sum(),
            widened: widened.collect(),
        })
    }
}

/// Looks on while a [`crate::capture::Tracker`] works in another thread.
#[derive(Clone, Debug)]
pub struct Observer {
    pub(super) instance: Arc<Instance>,
}

impl Observer {
    /// How many blocks are marked, in a round, or in an epoch that was not acknowledged.
    pub fn dirty_blocks(&self) -> u64 {
        self.instance.dirty_blocks()
    }

    /// What is on its way to the disk. Ask this before [`Self::dirty_blocks`]: a write is
    /// marked before it counts as complete.
    ///
    /// # Errors
    /// [`Vanished`](crate::ErrorKind::Vanished) if the disk is gone.
    pub fn in_flight(&self) -> Result<InFlight> {
        self.instance.in_flight()
    }

    /// What was counted since the tracker was attached.
    ///
    /// # Errors
    /// What the kernel says when asked for a program's misses.
    pub fn counters(&self) -> Result<Counters> {
        self.instance.counters()
    }

    /// How the volume falls into blocks.
    pub fn geometry(&self) -> Geometry {
        self.instance.pins.identity.geometry
    }

    /// Whether the disk is still there, and as long.
    ///
    /// # Errors
    /// [`Vanished`](crate::ErrorKind::Vanished) or [`Resized`](crate::ErrorKind::Resized) if not.
    pub fn check(&self) -> Result<()> {
        self.instance.disk.still_there()
    }
}
