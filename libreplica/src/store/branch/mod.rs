//! A branch: what is written to a state of a volume, beside what goes on in the volume itself. It is
//! a chain of ordinary logs on top of the state (docs/store.md). A drill throws it away;
//! a failover keeps it.
//!
//! ```text
//! reads   open log, in memory
//!           │ what it does not say
//!           ▼
//!         sealed logs of the branch, and of the volume between the point and the moment
//!           │ what they do not say
//!           ▼
//!         the recovery point
//! ```
//!
//! A change is in the log before it is answered, and in the file before a flush is: who is
//! killed loses nothing that was flushed. The records are in the order in which they were
//! made, so that later any moment of the branch can be had, too.

mod info;
mod make;
mod map;
mod rest;
mod sealed;
mod tail;
mod take_up;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;
use hrl_format::record::{Record, Tag};
use hrl_format::units::{ByteLen, ByteOffset, Extent};
use hrl_format::{LogHeader, Seal};

use super::lock::Lock;
use super::point_reader::{PieceKind, PointPiece};
use super::readers::SharedReader;
use crate::error::{Error, ErrorKind, Result};
pub use info::{BranchInfo, BranchPurpose, ParsePurposeError};
pub use make::BranchEntry;
use sealed::{KeptFrames, Sealed};
use tail::{Change, Held, HeldMap, LogSpec, Tail};

/// A state of a volume that can be written to. Any number of threads may use it at once.
pub struct Branch {
    spec: LogSpec,
    point: SharedReader,
    content: RwLock<Content>,
    tail: Mutex<Tail>,
    frames: KeptFrames,
    _lock: Lock,
}

struct Content {
    held: HeldMap,
    sealed: Sealed,
}

/// A sealed log of a branch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BranchLog {
    /// Its file.
    pub path: PathBuf,
    /// What it says of itself.
    pub header: LogHeader,
    /// How it is sealed.
    pub seal: Seal,
}

impl std::fmt::Debug for Branch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Branch")
            .field("info", &self.spec.info)
            .finish_non_exhaustive()
    }
}

impl Branch {
    /// What it is.
    pub const fn info(&self) -> &BranchInfo {
        &self.spec.info
    }

    /// Fills `buffer` with what the branch holds from `offset` on.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] past the end; [`ErrorKind::Damaged`] if what it needs of a log does
    /// not hold what it must; what the system refuses.
    pub fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> Result<()> {
        let extent = self.within(offset, buffer.len() as u64, "read a branch")?;
        let (mut gaps, mut frames) = (Vec::new(), Vec::new());
        {
            let content = self.content();
            for (extent, held) in content.held.pieces(extent) {
                match held {
                    Some(held) => fill(part(buffer, offset, extent), held.0.as_ref()),
                    None => gaps.push(extent),
                }
            }
            for (extent, place) in gaps.drain(..).flat_map(|gap| content.sealed.pieces(gap)) {
                let log = place.filter(|place| !place.is_zeroes());
                let log = log.and_then(|place| Some((place, content.sealed.log_of(place)?)));
                frames.push((extent, place, log));
            }
        }
        // Sealed logs do not change: nobody waits while they are read.
        for (extent, place, log) in frames {
            let part = part(buffer, offset, extent);
            match (place, log) {
                (Some(_), Some((place, log))) => self.frames.read(&log, place, part)?,
                (Some(_), None) => part.fill(0),
                (None, _) => self.read_point(extent.offset(), part)?,
            }
        }
        Ok(())
    }

    /// What lies below all that was written; where the point is shorter, zeroes.
    fn read_point(&self, offset: ByteOffset, buffer: &mut [u8]) -> Result<()> {
        let here = self.point.state().size().get().saturating_sub(offset.get());
        let here = usize::try_from(here)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let (data, zeroes) = buffer.split_at_mut(here);
        zeroes.fill(0);
        match data {
            [] => Ok(()),
            data => self.point.read_at(offset, data),
        }
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] past the end; [`ErrorKind::Full`] and others of the system's:
    /// after one of these nothing more can be written, and what was flushed before stays.
    pub fn write(&self, offset: ByteOffset, data: &[u8]) -> Result<()> {
        let extent = self.within(offset, data.len() as u64, "write to a branch")?;
        let held = Held(Some(Bytes::copy_from_slice(data)));
        self.change(extent, Change::Write(data), held)
    }

    /// Makes `extent` read as zeroes.
    ///
    /// # Errors
    /// As [`Branch::write`].
    pub fn zeroes(&self, extent: Extent) -> Result<()> {
        let extent = self.within(extent.offset(), extent.len().get(), "zero a branch")?;
        self.change(extent, Change::Zeroes, Held(None))
    }

    /// Gives `extent` up: it reads as zeroes.
    ///
    /// # Errors
    /// As [`Branch::write`].
    pub fn discard_extent(&self, extent: Extent) -> Result<()> {
        let extent = self.within(extent.offset(), extent.len().get(), "trim a branch")?;
        self.change(extent, Change::Discard, Held(None))
    }

    fn change(&self, extent: Extent, change: Change<'_>, held: Held) -> Result<()> {
        if extent.is_empty() {
            return Ok(());
        }
        let mut tail = self.tail();
        tail.append(&self.spec, extent, change)?;
        self.content_mut().held.insert(extent, held);
        if tail.is_full() {
            self.seal_in(&mut tail)?;
        }
        Ok(())
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// As [`Branch::write`]: what was written since the last flush may be lost.
    pub fn flush(&self) -> Result<()> {
        let Some(due) = self.tail().cut(&self.spec)? else {
            return Ok(());
        };
        // Others write meanwhile.
        let done = due.file.sync();
        self.tail().synced(&due, &done);
        done
    }

    /// Seals the open log: all that was written is durable, and in sealed logs.
    ///
    /// # Errors
    /// As [`Branch::write`].
    pub fn seal(&self) -> Result<()> {
        self.seal_in(&mut self.tail())
    }

    /// Ends the open log in a recovery point: the branch as it is now. Durable when it returns.
    ///
    /// # Errors
    /// As [`Branch::write`].
    pub fn seal_as_point(&self, tag: Tag) -> Result<()> {
        let mut tail = self.tail();
        let time = tag.time;
        tail.append_record(&self.spec, &Record::Tag(tag), time)?;
        self.seal_in(&mut tail)
    }

    /// Whether something was written that is in no sealed log yet.
    pub fn has_news(&self) -> bool {
        self.tail().has_news()
    }

    fn seal_in(&self, tail: &mut Tail) -> Result<()> {
        let Some(path) = tail.seal(&self.spec)? else {
            return Ok(());
        };
        let key = self.spec.key.as_ref();
        let log = self.content().sealed.open(&path, key)?;
        let end = log.end();
        let mut content = self.content_mut();
        content.sealed.push(log, None)?;
        content.held.clear();
        drop(content);
        tail.follow(end);
        Ok(())
    }

    /// The sealed logs, oldest first: each follows the one before it, and the first what
    /// [`BranchInfo::follows`] names.
    pub fn logs(&self) -> Vec<BranchLog> {
        let content = self.content();
        let logs = content.sealed.logs_from(self.spec.info.epoch.next());
        logs.map(|log| BranchLog {
            path: log.path.clone(),
            header: log.header().clone(),
            seal: log.seal().clone(),
        })
        .collect()
    }

    /// How many extents were written that the branch keeps the places of in memory.
    pub fn extents(&self) -> usize {
        let content = self.content();
        content.held.len() + content.sealed.extents()
    }

    /// Tells `each` what the branch holds in `extent`, in order and without a gap, until it says
    /// that it has enough.
    ///
    /// # Errors
    /// As [`Branch::read_at`].
    pub fn pieces_in(
        &self,
        extent: Extent,
        each: &mut dyn FnMut(PointPiece) -> ControlFlow<()>,
    ) -> Result<()> {
        let extent = extent
            .intersect(self.spec.info.size.extent())
            .unwrap_or_default();
        // Copied: the point is read below, and nobody waits for that.
        let known: Vec<(Extent, Option<PieceKind>)> = {
            let content = self.content();
            let kind = |data: bool| match data {
                true => PieceKind::Data,
                false => PieceKind::Zeroes,
            };
            let held = content.held.pieces(extent).into_iter();
            held.flat_map(|(extent, held)| match held {
                Some(held) => vec![(extent, Some(kind(held.0.is_some())))],
                None => {
                    let sealed = content.sealed.pieces(extent).into_iter();
                    let sealed =
                        sealed.map(|(extent, place)| (extent, place.map(|p| kind(!p.is_zeroes()))));
                    sealed.collect()
                }
            })
            .collect()
        };
        let mut enough = false;
        for (extent, kind) in known {
            match kind {
                Some(kind) => enough = each(PointPiece { extent, kind }).is_break(),
                None => self.point_pieces(extent, &mut |piece| {
                    let told = each(piece);
                    enough = told.is_break();
                    told
                })?,
            }
            if enough {
                break;
            }
        }
        Ok(())
    }

    fn point_pieces(
        &self,
        extent: Extent,
        each: &mut dyn FnMut(PointPiece) -> ControlFlow<()>,
    ) -> Result<()> {
        let end = ByteOffset::new(self.point.state().size().get());
        let here = Extent::between(extent.offset(), extent.end().min(end));
        let behind = Extent::between(extent.offset().max(end), extent.end());
        let mut enough = false;
        if !here.is_empty() {
            self.point.pieces_in(here, &mut |piece| {
                let told = each(piece);
                enough = told.is_break();
                told
            })?;
        }
        if !enough && !behind.is_empty() {
            let kind = PieceKind::Zeroes;
            let _ = each(PointPiece {
                extent: behind,
                kind,
            });
        }
        Ok(())
    }

    /// Removes the branch, with all that was written to it.
    ///
    /// # Errors
    /// What the system refuses; the branch may be gone all the same.
    pub fn discard(self) -> Result<()> {
        make::remove(&self.spec.folder)
    }

    fn within(&self, offset: ByteOffset, len: u64, operation: &'static str) -> Result<Extent> {
        let size = self.spec.info.size;
        let extent = Extent::new(offset, ByteLen::new(len));
        let extent = extent.filter(|extent| extent.end().get() <= size.get());
        extent.ok_or_else(|| {
            Error::new(ErrorKind::Invalid, operation)
                .offset(offset)
                .detail(format!("{len} bytes there end past the volume's {size}"))
        })
    }

    // What a panic leaves is whole: both are changed by single steps, the file before the map.
    fn content(&self) -> RwLockReadGuard<'_, Content> {
        self.content.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn content_mut(&self) -> RwLockWriteGuard<'_, Content> {
        self.content.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Branch {
    fn drop(&mut self) {
        // Who wants to know whether all is durable has flushed. This saves the next a little work.
        let _ = self.flush();
    }
}

/// The part of `buffer`, which begins at `offset`, that `extent` is.
fn part(buffer: &mut [u8], offset: ByteOffset, extent: Extent) -> &mut [u8] {
    let start = (extent.offset().get() - offset.get()) as usize;
    &mut buffer[start..start + extent.len().get() as usize]
}

fn fill(buffer: &mut [u8], held: Option<&Bytes>) {
    match held {
        Some(data) => buffer.copy_from_slice(&data[..buffer.len()]),
        None => buffer.fill(0),
    }
}
