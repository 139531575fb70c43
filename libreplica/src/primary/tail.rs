//! The last blocks of an epoch, read in the moment that becomes a recovery point. The
//! memory is there before the moment comes: while filesystems are frozen nothing may be
//! allocated, for memory may have to be won by writing to what is frozen.

use std::time::{Duration, Instant};

use hrl_format::units::Extent;

use crate::digest::LeafFunction;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::Geometry;
use crate::primary::draft::EpochDraft;
use crate::primary::source::Source;
use crate::sys::memory::AlignedMemory;

/// The most that is read in that moment, in bytes.
pub const TAIL_BYTES: usize = 32 << 20;
/// The most stretches it may be in.
const STRETCHES: usize = 64 << 10;
/// How often to look whether writes in flight have ended.
const LOOK_AGAIN: Duration = Duration::from_micros(200);

/// What is read in the moment of a point.
pub struct Tail {
    memory: AlignedMemory,
    extents: Vec<Extent>,
    outcome: Outcome,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// Nothing was taken out of the bitmap without being read.
    Whole,
    /// Some of `extents` was not read.
    Unread,
}

impl Tail {
    /// Takes the memory for a tail of `source`. It is given back with the tail: most of the
    /// time no volume needs any.
    ///
    /// # Errors
    /// When there is none.
    pub fn prepare(source: &mut Source) -> Result<Self> {
        source.reader()?;
        let memory = memory(source)?;
        Ok(Self {
            memory,
            extents: Vec::with_capacity(STRETCHES),
            outcome: Outcome::Whole,
        })
    }

    /// Waits until nothing is in flight, takes what is dirty and reads it.
    ///
    /// # Errors
    /// [`ErrorKind::TimedOut`] when writes are in flight until `until`, or more is dirty
    /// than there is memory; [`ErrorKind::ResyncNeeded`] when tracking was lost; else what
    /// the source failed with.
    pub fn read(&mut self, source: &mut Source, until: Instant) -> Result<()> {
        while source.has_in_flight()? {
            if Instant::now() >= until {
                return Err(Error::new(ErrorKind::TimedOut, "make a point")
                    .detail("writes stayed in flight longer than the limit"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        source.swap()?;
        self.outcome = Outcome::Unread;
        let mut fits = true;
        let taken: u64 = self
            .extents
            .iter()
            .map(|extent| source.room_for(*extent))
            .sum();
        let mut room = TAIL_BYTES as u64 - taken;
        let extents = &mut self.extents;
        source.each_dirty(|extent| {
            let needed = source.room_for(extent);
            if extents.len() < extents.capacity() && needed <= room {
                room -= needed;
                extents.push(extent);
            } else {
                fits = false;
            }
        });
        if !fits {
            // What found no room is dirty again at once; the rest follows below.
            source.mark_round_again();
            source.finish_round();
            return Err(Error::new(ErrorKind::TimedOut, "make a point")
                .detail(format!(
                    "more than {TAIL_BYTES} bytes changed during the last round"
                ))
                .advice("it is tried again at the next interval"));
        }
        let read = source
            .reader()
            .and_then(|reader| reader.read_into(&self.extents, &mut self.memory));
        if read.is_err() {
            source.mark_round_again();
        }
        source.finish_round();
        read?;
        self.outcome = Outcome::Whole;
        Ok(())
    }

    /// Puts what was read into the epoch; what was taken and not read becomes dirty again.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn hand_over(
        self,
        source: &mut Source,
        draft: &mut EpochDraft,
        geometry: &Geometry,
        function: &LeafFunction,
    ) -> Result<()> {
        if self.outcome == Outcome::Unread {
            self.extents.iter().for_each(|extent| source.mark(*extent));
        } else {
            let mut at = 0;
            for extent in &self.extents {
                let len = extent.len().get() as usize;
                let data = &self.memory.as_slice()[at..at + len];
                draft.add(geometry, function, *extent, data)?;
                at += source.room_for(*extent) as usize;
            }
        }
        Ok(())
    }
}

/// Memory for the last blocks of an epoch, locked where that is allowed.
fn memory(source: &Source) -> Result<AlignedMemory> {
    let memory =
        AlignedMemory::new(TAIL_BYTES).at("take memory for a point", source.device.path())?;
    // Best effort: without the right to lock, the memory is there all the same.
    if let Err(error) = memory.lock() {
        tracing::debug!(%error, "memory for points is not locked");
    }
    Ok(memory)
}
