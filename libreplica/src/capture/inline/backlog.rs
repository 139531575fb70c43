//! The changes that have ended on the device, in the order in which they ended, until they
//! are shipped: with their data while the buffer has room, without while it has not, and
//! then not at all. The dirty bits know every one of them in any case; what is lost here is
//! the way back to each moment, never a write.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::policy::Mode;
use crate::units::{ByteLen, Extent, Timestamp};

/// What a change did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Wrote this.
    Write(Bytes),
    /// Wrote something that is to be read back from the device.
    Unread,
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
    /// Entries without data, once there is no room for data.
    pub entries: usize,
    /// What all backlogs of the process may hold together.
    pub shared: Arc<Budget>,
}

/// Bytes that an entry takes besides its data.
const ENTRY: u64 = size_of::<Entry>() as u64;

/// The backlog of one volume.
#[derive(Debug)]
pub struct Backlog {
    entries: VecDeque<Entry>,
    /// How many of the oldest entries are paid for from the budget, and with how much. Those
    /// of metadata mode are not: there is a limit on their number.
    paid: usize,
    held: u64,
    limits: Limits,
    mode: Mode,
    last: Timestamp,
    /// How often entries were forgotten, or taken without their data.
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
    /// There are too many entries.
    TooManyEntries,
}

impl std::fmt::Display for FallCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::BufferFull => "the target is behind, and the volume's buffer is full",
            Self::BudgetSpent => "targets are behind, and the agent's memory for buffers is full",
            Self::TooManyEntries => "the target is behind, and too many changes wait",
        })
    }
}

impl Backlog {
    /// An empty one that keeps nothing yet.
    pub const fn new(limits: Limits) -> Self {
        Self {
            entries: VecDeque::new(),
            paid: 0,
            held: 0,
            limits,
            mode: Mode::Bitmap,
            last: Timestamp::from_nanos(i64::MIN),
            losses: 0,
        }
    }

    /// What it keeps.
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether data is worth being copied for it.
    pub fn wants_data(&self) -> bool {
        self.mode == Mode::Data
    }

    /// Forgets what it has, and keeps data from now on.
    pub fn climb(&mut self) {
        self.give_up();
        self.mode = Mode::Data;
    }

    /// How often something was forgotten: what was taken before and after a change of this
    /// number is not one unbroken stream.
    pub const fn losses(&self) -> u64 {
        self.losses
    }

    /// Keeps nothing from now on, and forgets what it has: returns how many entries.
    pub fn give_up(&mut self) -> usize {
        let lost = self.entries.len();
        self.entries.clear();
        self.limits.shared.give_back(self.held);
        (self.paid, self.held) = (0, 0);
        self.losses += 1;
        self.mode = Mode::Bitmap;
        lost
    }

    /// A change has ended now. Says if the backlog falls to a mode that knows less.
    pub fn push(&mut self, now: Timestamp, extent: Extent, change: Change) -> Option<Fall> {
        // The clock may be set back; the order of the entries may not.
        self.last = self.last.max(now);
        let time = self.last;
        let mut entry = Entry {
            time,
            extent,
            change,
        };
        let mut fall = None;
        if self.mode == Mode::Data {
            let bytes = entry.bytes();
            match self.make_room(bytes) {
                Ok(()) => {
                    self.entries.push_back(entry);
                    return None;
                }
                Err(cause) => {
                    let to = Mode::Metadata;
                    self.mode = to;
                    self.losses += 1;
                    fall = Some(Fall { to, cause });
                }
            }
        }
        if self.mode == Mode::Metadata {
            if matches!(entry.change, Change::Write(_)) {
                entry.change = Change::Unread;
            }
            if self.entries.len() < self.limits.entries {
                self.entries.push_back(entry);
                return fall;
            }
            self.give_up();
            let (to, cause) = (Mode::Bitmap, FallCause::TooManyEntries);
            fall = Some(Fall { to, cause });
        }
        fall
    }

    fn make_room(&mut self, bytes: u64) -> Result<(), FallCause> {
        if self.held + bytes > self.limits.bytes.get() {
            return Err(FallCause::BufferFull);
        }
        if !self.limits.shared.take(bytes) {
            return Err(FallCause::BudgetSpent);
        }
        self.held += bytes;
        self.paid += 1;
        Ok(())
    }

    /// Takes the oldest entries: at most `most`, and about `bytes` of them.
    pub fn take(&mut self, most: usize, bytes: ByteLen) -> Vec<Entry> {
        let (mut taken, mut count, mut paid) = (0, 0, 0);
        while taken < bytes.get()
            && count < most
            && let Some(entry) = self.entries.get(count)
        {
            taken += entry.bytes();
            count += 1;
            if count <= self.paid {
                paid += entry.bytes();
            }
        }
        let entries: Vec<_> = self.entries.drain(..count).collect();
        self.paid = self.paid.saturating_sub(count);
        self.held -= paid;
        self.limits.shared.give_back(paid);
        entries
    }

    /// How many entries wait.
    pub fn count(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of memory held.
    pub const fn held(&self) -> ByteLen {
        ByteLen::new(self.held)
    }

    /// When the oldest entry that waits was made.
    pub fn oldest(&self) -> Option<Timestamp> {
        self.entries.front().map(|entry| entry.time)
    }
}

impl Drop for Backlog {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Entry {
    fn bytes(&self) -> u64 {
        let data = match &self.change {
            Change::Write(data) => data.len() as u64,
            Change::Unread | Change::Zeroes | Change::Discard => 0,
        };
        ENTRY + data
    }
}
