//! The interceptor: every change of a device passes here, whatever front it came through.
//! It is let in (see `gate.rs`), marked dirty, passed on by the lane that brought it, and
//! when the device has it, marked again if the bitmaps were swapped meanwhile, and recorded
//! in the backlog. One lock holds all of that together, so that a cut of the stream is one
//! moment of bitmaps, backlog and copying alike; no input or output happens under it.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::capture::inline::activity::{Activity, Region};
use crate::capture::inline::backlog::{Backlog, Change};
use crate::capture::inline::copying::{Copying, MomentNumber};
use crate::capture::inline::gate::{Admission, Flight, Gate, Hurdle};
use crate::capture::inline::ledger::Ledger;
use crate::capture::inline::traffic::Traffic;
use crate::capture::inline::unknown::Unknown;
use crate::capture::inline::unseen::{Unseen, UnseenWrite};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::Geometry;
use crate::policy::Mode;
use crate::sys::uring::Wake;
use crate::units::{Extent, Timestamp};

/// Regions that changes under way may touch in all: fewer than the activity log has room
/// for, so that those which are being written can always be active together.
const REGIONS_ENTERED_MAX: usize = 800;
/// The shipper is woken when so many bytes wait.
const WORTH_SHIPPING: u64 = 4 << 20;

/// Changes of mode that wait to be told of: the newest.
const MODE_CHANGES_MAX: usize = 64;

/// The backlog keeps more, or less, than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModeChange {
    /// When.
    pub time: Timestamp,
    /// What it keeps from then on.
    pub mode: Mode,
    /// Why.
    pub cause: String,
}

/// Which lane a request is in, and where there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub lane: usize,
    pub slot: u32,
}

/// A change that was let in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Admitted {
    pub flight: Flight,
}

/// What a lane is told by others.
#[derive(Clone, Copy, Debug)]
pub(super) enum Message {
    /// A change that waited may begin.
    Begin { slot: u32, admitted: Admitted },
    /// An errand has been run.
    Errand { slot: u32, errno: i32 },
    /// There is nothing more to come.
    Stop,
}

/// How a change has ended.
pub(super) enum Outcome<'a> {
    /// The device has it.
    Done(Change),
    /// The device has a write whose data was not copied, for the backlog did not want it; it
    /// may want it by now.
    Uncopied(&'a mut dyn FnMut() -> Bytes),
    /// The device has a write whose data was never here.
    Unseen,
    /// The device refused it: nobody knows what it holds there.
    Failed,
}

/// Counters of one volume's interceptor, since it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InlineCounters {
    /// Changes that the device has taken.
    pub changes: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Changes that the device has refused.
    pub failed: u64,
    /// Changes that had to wait before they could begin.
    pub waited: u64,
    /// Times that the backlog fell to a mode that knows less.
    pub falls: u64,
    /// Transactions of the activity log.
    pub transactions: u64,
    /// Blocks that were copied out of turn.
    pub copied_out_of_turn: u64,
}

pub(super) struct State {
    pub gate: Gate<Owner>,
    pub backlog: Backlog,
    pub activity: Activity,
    pub copying: Option<Copying>,
    /// How many moments had blocks to be read.
    pub moments: MomentNumber,
    /// Changes that wait outside the gate, in the order of their arrival.
    outside: VecDeque<(Owner, Extent)>,
    regions_entered: usize,
    /// Where changes failed: to be read back.
    pub unknown: Unknown,
    /// What is being read back; `None` once a change was let in there.
    pub reading: Option<Extent>,
    /// Changes of what is kept that nobody was told of yet.
    pub mode_changes: VecDeque<ModeChange>,
    pub counters: InlineCounters,
    /// What the usher failed at last.
    pub trouble: Option<String>,
    pub stopping: bool,
}

/// The mailbox of one lane.
#[derive(Debug)]
pub(super) struct Mailbox {
    messages: Mutex<Vec<Message>>,
    wake: Wake,
}

impl Mailbox {
    pub fn wake_file(&self) -> Arc<OwnedFd> {
        self.wake.file()
    }

    pub fn take(&self) -> Vec<Message> {
        std::mem::take(&mut *lock(&self.messages))
    }

    pub fn post(&self, message: Message) {
        lock(&self.messages).push(message);
        self.wake.wake();
    }
}

/// One volume's interceptor.
pub struct Interceptor {
    pub(super) device: Arc<File>,
    pub(super) path: PathBuf,
    pub(super) geometry: Geometry,
    pub(super) ledger: Ledger,
    pub(super) traffic: Traffic,
    pub(super) state: Mutex<State>,
    /// The usher, or the copier, has something to do.
    pub(super) usher: Condvar,
    /// There is something to be read back.
    pub(super) read_back: Condvar,
    /// Whoever ships has something to do.
    pub(super) shipper: Condvar,
    /// Whoever takes the backlog's oldest part out of memory has something to do.
    pub(super) spooler: Condvar,
    wants_data: AtomicBool,
    pub(super) unseen: Arc<Unseen>,
    /// Places are used again: a front may open and close lanes for ever.
    lanes: Mutex<Vec<Option<Arc<Mailbox>>>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A thread that panicked under it left every value valid: each change is made whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Interceptor {
    pub(super) fn new(
        device: File,
        path: PathBuf,
        geometry: Geometry,
        ledger: Ledger,
        traffic: Traffic,
        backlog: Backlog,
    ) -> Self {
        Self {
            device: Arc::new(device),
            path,
            geometry,
            ledger,
            traffic,
            state: Mutex::new(State {
                gate: Gate::default(),
                backlog,
                activity: Activity::default(),
                copying: None,
                moments: MomentNumber::default(),
                outside: VecDeque::new(),
                regions_entered: 0,
                unknown: Unknown::default(),
                reading: None,
                mode_changes: VecDeque::new(),
                counters: InlineCounters::default(),
                trouble: None,
                stopping: false,
            }),
            usher: Condvar::new(),
            read_back: Condvar::new(),
            shipper: Condvar::new(),
            spooler: Condvar::new(),
            wants_data: AtomicBool::new(false),
            unseen: Unseen::new(),
            lanes: Mutex::new(Vec::new()),
        }
    }

    /// The device's size and units.
    pub const fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether the data of changes is recorded now.
    pub fn wants_data(&self) -> bool {
        self.wants_data.load(Ordering::Acquire)
    }

    /// Leave for one write whose data is not seen here; none while data is recorded, or about
    /// to be.
    pub(super) fn begin_unseen(&self) -> Option<UnseenWrite> {
        self.unseen.begin()
    }

    /// A new lane's number and mailbox.
    pub(super) fn open_lane(&self) -> Result<(usize, Arc<Mailbox>)> {
        const OPEN: &str = "open a lane to the device";
        let wake = Wake::new().at(OPEN, &self.path)?;
        let mailbox = Arc::new(Mailbox {
            messages: Mutex::new(Vec::new()),
            wake,
        });
        // Held until the lane is among those that are told to stop.
        let state = lock(&self.state);
        if state.stopping {
            return Err(Error::new(ErrorKind::State, OPEN).path(&self.path));
        }
        let mut lanes = lock(&self.lanes);
        let number = lanes
            .iter()
            .position(Option::is_none)
            .unwrap_or(lanes.len());
        if number == lanes.len() {
            lanes.push(None);
        }
        lanes[number] = Some(Arc::clone(&mailbox));
        Ok((number, mailbox))
    }

    /// A lane has ended; none of its changes is under way.
    pub(super) fn close_lane(&self, number: usize) {
        if let Some(lane) = lock(&self.lanes).get_mut(number) {
            *lane = None;
        }
    }

    /// A change of `extent` arrives. With an answer it may begin; else a message follows.
    pub(super) fn admit(&self, owner: Owner, extent: Extent) -> Option<Admitted> {
        let mut state = lock(&self.state);
        if !state.outside.is_empty() || !state.has_room_for(extent) {
            state.outside.push_back((owner, extent));
            state.counters.waited += 1;
            return None;
        }
        self.let_in(&mut state, owner, extent)
    }

    fn let_in(&self, state: &mut State, owner: Owner, extent: Extent) -> Option<Admitted> {
        state.regions_entered += Region::of(extent).count();
        state.reading = state
            .reading
            .filter(|reading| reading.intersect(extent).is_none());
        let mut hurdles = [Hurdle::Activity; 2];
        let mut count = 0;
        if !state.activity.enter(extent) {
            count += 1;
        }
        let copying = state.copying.as_ref();
        if copying.is_some_and(|copying| !copying.may_change(extent)) {
            hurdles[count] = Hurdle::Copy;
            count += 1;
        }
        let (flight, admission) = state.gate.admit(extent, owner, &hurdles[..count]);
        // Marked before it can begin. One that waits is marked here too: it does no harm.
        self.ledger.mark(extent);
        if count > 0 {
            self.usher.notify_all();
        }
        if admission == Admission::Wait {
            state.counters.waited += 1;
            return None;
        }
        Some(Admitted { flight })
    }

    /// A change that was let in has ended; `here` is the lane that says so.
    pub(super) fn end(
        &self,
        here: usize,
        admitted: Admitted,
        extent: Extent,
        outcome: Outcome<'_>,
    ) {
        let mut state = lock(&self.state);
        state.gate.end(admitted.flight);
        state.activity.leave(extent);
        state.regions_entered -= Region::of(extent).count();
        match outcome {
            Outcome::Done(change) => self.record(&mut state, extent, Some(change)),
            Outcome::Uncopied(copy) => {
                let is_wanted = state.backlog.wants_data();
                let change = is_wanted.then(|| Change::Write(copy()));
                self.record(&mut state, extent, change);
            }
            // It had leave, and data is not recorded before it has ended; if it were, it would
            // have to be read back.
            Outcome::Unseen if !state.backlog.wants_data() => {
                self.record(&mut state, extent, None);
            }
            Outcome::Unseen => {
                self.record_as_unknown(&mut state, extent);
            }
            Outcome::Failed => {
                state.counters.failed += 1;
                self.record_as_unknown(&mut state, extent);
            }
        }
        self.let_more_in(&mut state, here);
        self.release(&mut state, here);
    }

    fn record_as_unknown(&self, state: &mut State, extent: Extent) {
        state.unknown.insert(extent);
        self.read_back.notify_one();
    }

    /// Lets those in for whom there is room now.
    fn let_more_in(&self, state: &mut State, here: usize) {
        while let Some(&(owner, extent)) = state.outside.front()
            && state.has_room_for(extent)
        {
            state.outside.pop_front();
            if let Some(admitted) = self.let_in(state, owner, extent) {
                self.tell(here, owner, admitted);
            }
        }
    }

    /// Takes back what a lane has brought and has not begun; gives where it is there.
    pub(super) fn withdraw(&self, lane: usize) -> Vec<u32> {
        let mut state = lock(&self.state);
        let mut slots = Vec::new();
        state.outside.retain(|(owner, _)| {
            let stays = owner.lane != lane;
            if !stays {
                slots.push(owner.slot);
            }
            stays
        });
        for (owner, extent) in state.gate.withdraw(|owner| owner.lane == lane) {
            state.activity.leave(extent);
            state.regions_entered -= Region::of(extent).count();
            slots.push(owner.slot);
        }
        self.let_more_in(&mut state, lane);
        self.release(&mut state, lane);
        slots
    }

    /// Puts a change into the backlog, as the newest; `None`: a write whose data was not
    /// copied.
    pub(super) fn record(&self, state: &mut State, extent: Extent, change: Option<Change>) {
        if !state.unknown.is_empty() {
            state.unknown.remove(extent);
        }
        if matches!(change, Some(Change::Discard)) {
            self.ledger.discard(extent);
        } else {
            self.ledger.define(extent);
        }
        state.counters.changes += 1;
        state.counters.bytes += extent.len().get();
        let (before, was_behind) = (state.backlog.unread().get(), state.backlog.is_behind());
        let fall = state.backlog.push(Timestamp::now(), extent, change);
        if before < WORTH_SHIPPING && state.backlog.unread().get() >= WORTH_SHIPPING {
            self.shipper.notify_all();
        }
        if !was_behind && state.backlog.is_behind() {
            self.spooler.notify_all();
        }
        if let Some(fall) = fall {
            state.counters.falls += 1;
            self.mode_changed(state, &fall.cause.to_string());
            self.shipper.notify_all();
        }
    }

    /// Whether there is something for the shipper.
    pub(super) fn is_worth_shipping(state: &State) -> bool {
        state.backlog.unread().get() >= WORTH_SHIPPING
            || state.backlog.goes_on_in_spool()
            || !state.mode_changes.is_empty()
            || state.stopping
    }

    /// The backlog keeps more or less than before, because of `cause`: notes it for who tells
    /// of it, and for the lanes, which look without the lock.
    pub(super) fn mode_changed(&self, state: &mut State, cause: &str) {
        let mode = state.backlog.mode();
        self.set_sight(mode);
        if state.mode_changes.len() == MODE_CHANGES_MAX {
            state.mode_changes.pop_front();
        }
        state.mode_changes.push_back(ModeChange {
            time: Timestamp::now(),
            mode,
            cause: cause.to_owned(),
        });
    }

    /// What lanes are to see of the data of changes in this mode.
    pub(super) fn set_sight(&self, mode: Mode) {
        self.wants_data.store(mode == Mode::Data, Ordering::Release);
        match mode {
            Mode::Data => self.unseen.forbid(),
            Mode::Metadata | Mode::Bitmap => self.unseen.allow(),
        }
    }

    /// The device could not make durable what it had taken, and may have lost it: the regions
    /// that are being written, or were since the last flush, are dirty.
    pub(super) fn flush_failed(&self, error: &std::io::Error) {
        let path = self.path.display();
        tracing::warn!("flush the device: {path}: {error}; what was being written is read again");
        let mut state = lock(&self.state);
        let size = self.geometry.size;
        let regions = state.activity.remaining();
        let extents = regions.iter().filter_map(|region| region.extent(size));
        let before = state.backlog.mode();
        state
            .backlog
            .doubt(extents.inspect(|extent| self.ledger.mark(*extent)));
        if state.backlog.mode() != before {
            self.mode_changed(&mut state, "a flush of the device failed");
        }
    }

    /// Tells the owners of those that may begin.
    pub(super) fn release(&self, state: &mut State, here: usize) {
        for (flight, owner) in state.gate.released() {
            self.tell(here, owner, Admitted { flight });
        }
    }

    fn tell(&self, here: usize, owner: Owner, admitted: Admitted) {
        let slot = owner.slot;
        let lanes = lock(&self.lanes);
        let Some(Some(mailbox)) = lanes.get(owner.lane) else {
            return;
        };
        lock(&mailbox.messages).push(Message::Begin { slot, admitted });
        // A lane looks into its own mailbox after every end.
        if owner.lane != here {
            mailbox.wake.wake();
        }
    }

    /// Takes what was dirty as the round; what changes from now on is the next one's.
    /// What is under way, or waits to be, is marked again at once: its bits have just been
    /// swapped away, and it may reach the device after the round was read.
    pub(super) fn swap(&self, state: &State) {
        self.ledger.swap();
        state
            .gate
            .extents()
            .for_each(|extent| self.ledger.mark(extent));
    }

    /// Ends every lane's service.
    pub(super) fn stop_lanes(&self) {
        lock(&self.state).stopping = true;
        for mailbox in lock(&self.lanes).iter().flatten() {
            mailbox.post(Message::Stop);
        }
        self.usher.notify_all();
        self.read_back.notify_all();
        self.shipper.notify_all();
        self.spooler.notify_all();
    }
}

impl std::fmt::Debug for Interceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Interceptor")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl State {
    /// What could not be done for the changes, last.
    pub fn trouble(&self) -> Option<String> {
        let unread = || self.unknown.trouble().map(str::to_owned);
        self.trouble.clone().or_else(unread)
    }

    fn has_room_for(&self, extent: Extent) -> bool {
        // One alone is always let in.
        let more = Region::of(extent).count();
        self.regions_entered == 0 || self.regions_entered + more <= REGIONS_ENTERED_MAX
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::capture::inline::backlog::Closed;
    use crate::capture::inline::backlog::{Budget, Limits};
    use crate::geometry::BlockNumber;
    use crate::id::VolumeId;
    use crate::units::{BlockSize, ByteLen, ByteOffset, SectorSize, VolumeSize};

    #[test]
    fn what_a_failed_flush_may_have_lost_is_dirty() {
        let folder = tempfile::tempdir().unwrap();
        let geometry = Geometry {
            size: VolumeSize::new(64 << 20),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        };
        let bytes = ByteLen::new(1 << 20);
        let limits = Limits {
            bytes,
            extents: 10,
            shared: Arc::new(Budget::new(bytes)),
        };
        let volume = VolumeId::from_bytes([3; 16]);
        let interceptor = Interceptor::new(
            tempfile::tempfile().unwrap(),
            "device".into(),
            geometry,
            Ledger::create(&folder.path().join("dirty"), volume, geometry).unwrap(),
            Traffic::open(&folder.path().join("traffic")).unwrap(),
            Backlog::new(limits, geometry),
        );
        let written = Extent::new(ByteOffset::new(9 << 20), ByteLen::new(512)).unwrap();
        {
            let mut state = lock(&interceptor.state);
            state.activity.enter(written);
            state.activity.written(&[Region(2)]);
            state.activity.leave(written);
            drop(state.backlog.climb());
            state.backlog.base_is_stored();
            interceptor.record(&mut state, written, Some(Change::Zeroes));
        }
        interceptor.flush_failed(&std::io::Error::from_raw_os_error(libc::EIO));
        let dirty = |block| interceptor.ledger.live().test(BlockNumber::new(block));
        // All of the third region, of 1024 blocks.
        assert!(!dirty(2047) && dirty(2048) && dirty(3071) && !dirty(3072));
        // The stream is shipped, and then they are read.
        let mut state = lock(&interceptor.state);
        assert_eq!(state.backlog.mode(), Mode::Metadata);
        assert_eq!(state.backlog.count(), 1);
        let end = state.backlog.newest();
        drop(state.backlog.stored(end));
        let Closed::Gap(gap) = state.backlog.climb() else {
            panic!("nothing is known")
        };
        assert_eq!(gap.blocks().count(), 1024);
    }
}
