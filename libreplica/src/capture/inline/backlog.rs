//! The changes that have ended on the device, as one stream in the order in which they
//! ended. Each has a number. From the first one that the store does not have on, the stream
//! is kept: its newest part here in memory, an older one in the spool, if there is one. What
//! was shipped stays until it is durable in the store, so that a store that fails costs
//! nothing but the wait.
//!
//! ```text
//!        stored            first                   end
//! ─────────┼─────────────────┼──────────────────────┼─ ─ ─ gap ─ ─ ─
//!  store   │      spool      │        memory        │  extents, or blocks
//! ```
//!
//! Where there is no room the stream ends, and what changes from then on is a gap: which
//! extents changed, while they are few enough, then only which blocks. The gap is closed by
//! reading those, once all before it is in the store. The dirty bits know every change in any
//! case; what a gap costs is the way back to each moment of it, never a write.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::bitmap::Bitmap;
use crate::capture::inline::gap::{Exactness, Gap};
use crate::geometry::Geometry;
use crate::policy::Mode;
use crate::record::Record;
use crate::units::{ByteLen, Extent, Sequence, Timestamp};

/// What a change did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Wrote this.
    Write(Bytes),
    /// Wrote zeroes.
    Zeroes,
    /// Gave the range up: what it reads as is not defined.
    Discard,
}

/// A change that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When it ended; never earlier than that of the entry before.
    pub time: Timestamp,
    /// Where.
    pub extent: Extent,
    /// What.
    pub change: Change,
}

/// Memory that several backlogs share.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
}

impl Budget {
    /// So many bytes in all.
    pub const fn new(limit: ByteLen) -> Self {
        let used = AtomicU64::new(0);
        Self {
            limit: limit.get(),
            used,
        }
    }

    fn take(&self, bytes: u64) -> bool {
        let room = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit);
        let (set, fetch) = (Ordering::AcqRel, Ordering::Acquire);
        self.used.fetch_update(set, fetch, room).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }
}

/// How much a backlog may hold.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of data, and of the entries themselves.
    pub bytes: ByteLen,
    /// Extents that are told apart in a gap, before only blocks are.
    pub extents: usize,
    /// What all backlogs of the process may hold together.
    pub shared: Arc<Budget>,
}

/// Bytes that an entry takes besides its data.
const ENTRY: u64 = size_of::<Entry>() as u64;
/// What is spooled at a time: so many parts of the buffer, at most so many bytes.
const BATCH_PARTS: u64 = 8;
const BATCH_MOST: u64 = 32 << 20;

/// What the stream goes on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    /// What the store has.
    Stored,
    /// The moment at which the last gap was closed, and the store does not have it yet.
    Moment,
}

/// What is not in the stream and not in the store.
#[derive(Debug)]
enum Missing {
    /// Nothing.
    Nothing,
    /// This.
    Gap(Gap),
    /// More than the backlog knows: all that is dirty.
    Unknown,
}

/// What closes a gap: the blocks that must be read.
#[derive(Debug)]
pub enum Closed {
    /// These.
    Gap(Gap),
    /// All that is dirty.
    Unknown,
}

/// What reading on in the stream comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// The next changes; none: the end was reached.
    Changes(Vec<Entry>),
    /// The next one is in the spool: it has this number.
    Spooled(Sequence),
    /// It is lost.
    Lost,
}

/// Entries of no more use. Their memory is freed when this is dropped, which takes its time:
/// not under the lock that the device's users wait for.
#[must_use]
#[derive(Debug, Default)]
pub struct Forgotten(#[expect(dead_code, reason = "dropped")] VecDeque<Entry>);

/// A part of the stream for the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The number of its first change.
    pub first: Sequence,
    /// Its changes.
    pub entries: Vec<Entry>,
}

/// The backlog of one volume.
#[derive(Debug)]
pub struct Backlog {
    geometry: Geometry,
    /// In memory: those from `first` on.
    entries: VecDeque<Entry>,
    first: u64,
    /// The first that the store does not have.
    stored: u64,
    /// The first that was not read yet, to be shipped.
    next: u64,
    /// Bytes of memory that the entries take; and those of them that were not read yet.
    held: u64,
    unread: u64,
    base: Base,
    missing: Missing,
    limits: Limits,
    last: Timestamp,
    /// How often the stream was given up.
    losses: u64,
}

/// A fall to a mode that knows less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fall {
    /// The mode from now on.
    pub to: Mode,
    /// Why.
    pub cause: FallCause,
}

/// Why the backlog cannot keep on as it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallCause {
    /// The volume's buffer is full.
    BufferFull,
    /// The buffers of all volumes together are.
    BudgetSpent,
    /// A gap has too many extents.
    TooManyExtents,
}

impl std::fmt::Display for FallCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BufferFull => "the target is behind, and the volume's buffer is full",
            Self::BudgetSpent => "targets are behind, and the agent's memory for buffers is full",
            Self::TooManyExtents => "the target is behind, and too many extents have changed",
        })
    }
}

impl Backlog {
    /// An empty one that keeps nothing yet.
    pub const fn new(limits: Limits, geometry: Geometry) -> Self {
        Self {
            geometry,
            entries: VecDeque::new(),
            first: 0,
            stored: 0,
            next: 0,
            held: 0,
            unread: 0,
            base: Base::Stored,
            missing: Missing::Unknown,
            limits,
            last: Timestamp::from_nanos(i64::MIN),
            losses: 0,
        }
    }

    /// What it keeps of the changes to come.
    pub const fn mode(&self) -> Mode {
        match &self.missing {
            Missing::Nothing => Mode::Data,
            Missing::Gap(gap) => match gap.exactness() {
                Exactness::Extents => Mode::Metadata,
                Exactness::Blocks => Mode::Bitmap,
            },
            Missing::Unknown => Mode::Bitmap,
        }
    }

    /// Whether data is worth being copied for it.
    pub fn wants_data(&self) -> bool {
        self.mode() == Mode::Data
    }

    fn end(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// The end of the stream: the number that the next change would have.
    pub fn newest(&self) -> Sequence {
        Sequence::new(self.end())
    }

    /// The first change that the store does not have.
    pub const fn stored_up_to(&self) -> Sequence {
        Sequence::new(self.stored)
    }

    /// Whether the store has all of the stream.
    pub fn is_drained(&self) -> bool {
        self.stored == self.end()
    }

    /// How often the stream was given up: a number of a change means nothing after that.
    pub const fn losses(&self) -> u64 {
        self.losses
    }

    /// Goes on recording from this moment. What is not in the stream must be read as it is
    /// now. Of a stream that is not drained the rest is given up.
    pub fn climb(&mut self) -> Closed {
        if !self.is_drained() {
            drop(self.give_up());
        }
        self.base = Base::Moment;
        match std::mem::replace(&mut self.missing, Missing::Nothing) {
            Missing::Gap(gap) => Closed::Gap(gap),
            Missing::Nothing | Missing::Unknown => Closed::Unknown,
        }
    }

    /// The store has the moment from which the stream goes on.
    pub fn base_is_stored(&mut self) {
        self.base = Base::Stored;
    }

    /// Keeps nothing from now on, and forgets what it has.
    pub fn give_up(&mut self) -> Forgotten {
        let end = self.end();
        let forgotten = Forgotten(std::mem::take(&mut self.entries));
        (self.first, self.stored, self.next) = (end, end, end);
        self.limits.shared.give_back(self.held);
        (self.held, self.unread) = (0, 0);
        self.losses += 1;
        self.base = Base::Stored;
        self.missing = Missing::Unknown;
        forgotten
    }

    /// What was read and is not stored will be read again. It is given up where it goes on
    /// from a moment that the store does not have.
    pub fn rewind(&mut self) -> Forgotten {
        if self.base == Base::Moment {
            return self.give_up();
        }
        self.next = self.stored;
        self.unread = self.held;
        Forgotten::default()
    }

    /// A change has ended now; `None` for a write whose data was not copied. Says if the
    /// backlog falls to a mode that knows less.
    pub fn push(&mut self, now: Timestamp, extent: Extent, change: Option<Change>) -> Option<Fall> {
        // The clock may be set back; the order of the entries may not.
        self.last = self.last.max(now);
        let time = self.last;
        let mut fall = None;
        if matches!(self.missing, Missing::Nothing) {
            let entry = change.map(|change| Entry {
                time,
                extent,
                change,
            });
            match entry.map_or(Err(FallCause::BufferFull), |entry| self.keep(entry)) {
                Ok(()) => return None,
                Err(cause) => {
                    let blocks = Bitmap::new(self.geometry.blocks());
                    self.missing = Missing::Gap(Gap::new(blocks, self.limits.extents));
                    let to = Mode::Metadata;
                    fall = Some(Fall { to, cause });
                }
            }
        }
        if let Missing::Gap(gap) = &mut self.missing {
            let before = gap.exactness();
            gap.add(&self.geometry, extent);
            if before != gap.exactness() {
                let (to, cause) = (Mode::Bitmap, FallCause::TooManyExtents);
                fall = Some(Fall { to, cause });
            }
        }
        fall
    }

    /// What the device holds in `extents` is not what the stream says: that ends in a gap, in
    /// which they are.
    pub fn doubt(&mut self, extents: impl Iterator<Item = Extent>) {
        if matches!(self.missing, Missing::Nothing) {
            let blocks = Bitmap::new(self.geometry.blocks());
            self.missing = Missing::Gap(Gap::new(blocks, self.limits.extents));
        }
        if let Missing::Gap(gap) = &mut self.missing {
            extents.for_each(|extent| gap.add(&self.geometry, extent));
        }
    }

    /// Puts an entry at the end of the stream, if there is room.
    fn keep(&mut self, entry: Entry) -> Result<(), FallCause> {
        let bytes = entry.bytes();
        if self.held + bytes > self.limits.bytes.get() {
            return Err(FallCause::BufferFull);
        }
        if !self.limits.shared.take(bytes) {
            return Err(FallCause::BudgetSpent);
        }
        self.held += bytes;
        self.unread += bytes;
        self.entries.push_back(entry);
        Ok(())
    }

    /// The next changes to be shipped, before number `upto`: about `bytes` of them.
    pub fn read(&mut self, upto: Sequence, bytes: ByteLen) -> Read {
        if self.next < self.stored || upto.get() > self.end() {
            return Read::Lost;
        }
        if self.next >= upto.get() {
            return Read::Changes(Vec::new());
        }
        let Some(skip) = self.next.checked_sub(self.first) else {
            return Read::Spooled(Sequence::new(self.next));
        };
        let left = (upto.get() - self.next) as usize;
        let mut taken = 0;
        let entries: Vec<Entry> = self
            .entries
            .range(skip as usize..)
            .take(left)
            .take_while(|entry| {
                let go_on = taken < bytes.get();
                taken += if go_on { entry.bytes() } else { 0 };
                go_on
            })
            .cloned()
            .collect();
        self.next += entries.len() as u64;
        self.unread = self.unread.saturating_sub(taken);
        Read::Changes(entries)
    }

    /// What is before number `upto` was read from the spool.
    pub fn was_read(&mut self, upto: Sequence) {
        let upto = upto.get().min(self.end());
        if upto <= self.next {
            return;
        }
        let from = self.next.saturating_sub(self.first);
        let to = upto.saturating_sub(self.first);
        let passed = self.entries.range(from as usize..to.max(from) as usize);
        self.unread = self.unread.saturating_sub(passed.map(Entry::bytes).sum());
        self.next = upto;
    }

    /// The store has what is before number `upto`, durably.
    pub fn stored(&mut self, upto: Sequence) -> Forgotten {
        let upto = upto.get().clamp(self.stored, self.end());
        self.stored = upto;
        self.was_read(Sequence::new(upto));
        self.forget_before(upto)
    }

    /// Forgets what is in memory before number `upto`.
    fn forget_before(&mut self, upto: u64) -> Forgotten {
        let Some(count) = upto.checked_sub(self.first) else {
            return Forgotten::default();
        };
        let count = count.min(self.entries.len() as u64);
        let unread = self.next.saturating_sub(self.first).min(count);
        let (mut bytes, mut not_read) = (0, 0);
        let forgotten: VecDeque<_> = self.entries.drain(..count as usize).collect();
        for (n, entry) in (0..).zip(&forgotten) {
            bytes += entry.bytes();
            not_read += if n < unread { 0 } else { entry.bytes() };
        }
        self.first += count;
        self.held -= bytes;
        self.unread = self.unread.saturating_sub(not_read);
        self.limits.shared.give_back(bytes);
        Forgotten(forgotten)
    }

    /// The oldest part of what is in memory, if the target is so far behind that it should
    /// go to the spool. It stays here until it is [`spooled`](Self::spooled).
    pub fn to_spool(&self) -> Option<Batch> {
        if !self.is_behind() {
            return None;
        }
        let most = (self.limits.bytes.get() / BATCH_PARTS).min(BATCH_MOST);
        let mut bytes = 0;
        let entries = self.entries.iter().take_while(|entry| {
            let go_on = bytes < most;
            bytes += entry.bytes();
            go_on
        });
        let batch = Batch {
            first: Sequence::new(self.first),
            entries: entries.cloned().collect(),
        };
        (!batch.entries.is_empty()).then_some(batch)
    }

    /// What is before number `end` is in the spool.
    pub fn spooled(&mut self, end: Sequence) -> Forgotten {
        self.forget_before(end.get())
    }

    /// Whether half of the memory is in use, the volume's or that of all. The other half is for
    /// what comes while the spool is written.
    pub fn is_behind(&self) -> bool {
        self.is_filled(2)
    }

    /// Whether what was read should be made durable in the store, so that its memory is free.
    pub fn should_store(&self) -> bool {
        self.is_filled(4)
    }

    /// Whether more than one of so many parts of the memory is in use.
    fn is_filled(&self, parts: u64) -> bool {
        let shared = &self.limits.shared;
        let is_over = |used: u64, limit: u64| used > limit / parts;
        is_over(self.held, self.limits.bytes.get())
            || self.held > 0 && is_over(shared.used(), shared.limit)
    }

    /// The time of a moment that is taken now: not before what is recorded, nor after what will
    /// be.
    pub fn tick(&mut self, now: Timestamp) -> Timestamp {
        self.last = self.last.max(now);
        self.last
    }

    /// How many entries are not in the store.
    pub fn count(&self) -> u64 {
        self.end() - self.stored
    }

    /// Bytes of memory held.
    pub const fn held(&self) -> ByteLen {
        ByteLen::new(self.held)
    }

    /// Bytes of memory held by what was not read yet.
    pub const fn unread(&self) -> ByteLen {
        ByteLen::new(self.unread)
    }

    /// Whether what is to be read next is in the spool.
    pub const fn goes_on_in_spool(&self) -> bool {
        self.next < self.first
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        drop(self.give_up());
    }
}

impl Entry {
    /// As a record of a log.
    pub fn record(&self) -> Record<&[u8]> {
        let extent = self.extent;
        match &self.change {
            Change::Write(data) => Record::Write {
                extent,
                data: &data[..],
            },
            Change::Zeroes => Record::Zeroes { extent },
            Change::Discard => Record::Discard { extent },
        }
    }

    fn bytes(&self) -> u64 {
        let data = match &self.change {
            Change::Write(data) => data.len() as u64,
            Change::Zeroes | Change::Discard => 0,
        };
        ENTRY + data
    }
}

#[cfg(test)]
mod tests;
