//! A state of a volume, open for several threads at once: as many readers as are used at a
//! time, up to a limit, each with what it remembers of indexes and frames. The first is opened at once,
//! the others when all are in use.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use hrl_format::units::{ByteOffset, Extent};

use super::point_reader::{PointPiece, PointReader};
use super::reader::VolumeReader;
use super::state::{State, StateId};
use crate::error::Result;

/// Readers of one state, at most: each may remember some 64 MiB of frames.
const MOST: usize = 4;

/// A state of a volume, open for several threads. While it lives it is leased.
///
/// Made by [`VolumeReader::open_shared`].
pub struct SharedReader {
    volume: VolumeReader,
    state: State,
    readers: Mutex<Readers>,
    given_back: Condvar,
}

struct Readers {
    free: Vec<PointReader>,
    /// Those that are in use or free.
    count: usize,
}

impl std::fmt::Debug for SharedReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedReader")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl VolumeReader {
    /// Opens a state for reading by several threads, and leases it.
    ///
    /// # Errors
    /// As [`VolumeReader::open`].
    pub fn open_shared(&self, state: impl Into<StateId>) -> Result<SharedReader> {
        let first = self.open(state)?;
        Ok(SharedReader {
            volume: self.clone(),
            state: first.state().clone(),
            readers: Mutex::new(Readers {
                free: vec![first],
                count: 1,
            }),
            given_back: Condvar::new(),
        })
    }
}

impl SharedReader {
    /// What is open.
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// Fills `buffer` with what the volume held from `offset` on.
    ///
    /// # Errors
    /// As [`PointReader::read_at`].
    pub fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> Result<()> {
        self.with(|reader| reader.read_at(offset, buffer))
    }

    /// Tells `each` what the state holds in `extent`, in order and without a gap, until it says that
    /// it has enough.
    ///
    /// # Errors
    /// As [`PointReader::pieces_in`].
    pub fn pieces_in(
        &self,
        extent: Extent,
        each: &mut dyn FnMut(PointPiece) -> std::ops::ControlFlow<()>,
    ) -> Result<()> {
        self.with(|reader| {
            for piece in reader.pieces_in(extent)? {
                if each(piece?).is_break() {
                    break;
                }
            }
            Ok(())
        })
    }

    fn with<T>(&self, read: impl FnOnce(&mut PointReader) -> Result<T>) -> Result<T> {
        let mut reader = self.take()?;
        let done = read(&mut reader);
        self.lock().free.push(reader);
        self.given_back.notify_one();
        done
    }

    fn lock(&self) -> MutexGuard<'_, Readers> {
        // Nothing that panics is done under it.
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Result<PointReader> {
        let mut readers = self.lock();
        loop {
            if let Some(reader) = readers.free.pop() {
                return Ok(reader);
            }
            if readers.count < MOST {
                readers.count += 1;
                drop(readers);
                let opened = self.volume.open(self.state.id());
                if let Ok(reader) = opened {
                    return Ok(reader);
                }
                // Those that are there do: a moment that was given up meanwhile opens no more.
                readers = self.lock();
                readers.count -= 1;
                if readers.count == 0 {
                    return opened;
                }
            }
            let waited = self.given_back.wait(readers);
            readers = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}
