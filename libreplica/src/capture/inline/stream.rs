//! What the shipper sees: the stream of changes in order, and moments. A moment is a cut
//! through bitmaps and backlog at once; of several volumes, at one instant, for their locks
//! are held together. In data mode a moment is an end in the stream. In a gap of it, it is the
//! set of blocks that are missing; they are read as they were then, while writes go on (see
//! `copying.rs`), and the stream goes on from there.

use std::sync::MutexGuard;
use std::time::Duration;

use crate::bitmap::Bitmap;
use crate::capture::inline::backlog::{Backlog, Batch, Closed, Forgotten, Read};
use crate::capture::inline::copying::{Copying, Taken};
use crate::capture::inline::gap::Gap;
use crate::capture::inline::gate::Hurdle;
use crate::capture::inline::interceptor::{InlineCounters, Interceptor, ModeChange, State, lock};
use crate::capture::inline::service::Service;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Run};
use crate::policy::Mode;
use crate::units::{ByteLen, Extent, Sequence, Timestamp};

/// An end in the stream of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The number of the first change that belongs behind it.
    pub upto: Sequence,
    /// How often the backlog had lost something before.
    losses: u64,
}

/// The blocks of a moment, to be read through [`Service::take_block`].
#[derive(Debug)]
pub struct Blocks(Gap);

/// What a moment is made of.
#[derive(Debug)]
pub enum Moment {
    /// The stream up to here.
    Stream(Cut),
    /// These blocks. All of the stream before is in the store.
    Blocks(Blocks),
}

/// What waits to be shipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// How much is kept of the changes to come.
    pub mode: Mode,
    /// Changes that are kept, in memory or in the spool.
    pub changes: u64,
    /// Bytes of memory that they take.
    pub held: ByteLen,
}

/// How long a moment waits for writes whose data nobody sees.
const SIGHT_LIMIT: Duration = Duration::from_secs(1);
/// How far the clock may have been set back without being taken for wrong before.
const CLOCK_TRUST: Duration = Duration::from_secs(3600);
const MOMENT: &str = "take a moment of the stream";

impl Service {
    /// Takes one moment of all `services`: in data mode a cut of the stream, else the blocks
    /// that are not in the store, which from then on are copied before they are written, and
    /// data is recorded again. All that is dirty is in the epoch's bitmap then.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while a moment is still being read, or where a write failed and
    /// its range could not be read back yet, or where changes wait that came before a gap:
    /// those must be in the store first. Also where writes whose data nobody sees do not end
    /// within a second.
    pub fn moment(services: &[&Self]) -> Result<(Timestamp, Vec<Moment>)> {
        let taken = services
            .iter()
            .try_for_each(|service| service.see_all())
            .and_then(|()| Self::moment_in_sight(services));
        if taken.is_err() {
            services.iter().for_each(|service| {
                let state = lock(&service.interceptor().state);
                service.interceptor().set_sight(state.backlog.mode());
            });
        }
        taken
    }

    /// Waits until the data of every change that is under way is seen, and of those to come.
    fn see_all(&self) -> Result<()> {
        let interceptor = self.interceptor();
        let state = lock(&interceptor.state);
        self.is_ready(&state)?;
        interceptor.unseen.forbid();
        drop(state);
        interceptor.unseen.wait_for_end(SIGHT_LIMIT);
        self.is_in_sight()
    }

    /// Whether every change that is under way is seen: not if some did not end in time, nor if
    /// the backlog fell to another mode meanwhile, which allows them again.
    fn is_in_sight(&self) -> Result<()> {
        let interceptor = self.interceptor();
        if interceptor.unseen.is_over() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::State, MOMENT)
            .path(&interceptor.path)
            .detail("writes that were passed on without a copy have not ended yet"))
    }

    fn moment_in_sight(services: &[&Self]) -> Result<(Timestamp, Vec<Moment>)> {
        // In one order, whoever asks: two groups never wait for each other.
        let mut order: Vec<usize> = (0..services.len()).collect();
        order.sort_by_key(|&n| std::ptr::from_ref(services[n].interceptor()) as usize);
        let mut states: Vec<(usize, MutexGuard<'_, State>)> = order
            .into_iter()
            .map(|n| (n, lock(&services[n].interceptor().state)))
            .collect();
        for (n, state) in &states {
            services[*n].is_ready(state)?;
            services[*n].is_in_sight()?;
        }
        // The clock may have been set back.
        let now = states
            .iter_mut()
            .fold(Timestamp::now(), |now, (_, state)| state.backlog.tick(now));
        for (_, state) in &mut states {
            state.backlog.tick(now);
        }
        let mut moments: Vec<Option<Moment>> = services.iter().map(|_| None).collect();
        for (n, state) in &mut states {
            moments[*n] = Some(services[*n].cut(state));
        }
        Ok((now, moments.into_iter().flatten().collect()))
    }

    fn is_ready(&self, state: &State) -> Result<()> {
        let refused = |why: &str| {
            Err(Error::new(ErrorKind::State, MOMENT)
                .path(&self.interceptor().path)
                .detail(why))
        };
        if state.copying.is_some() {
            return refused("the one before is still being read");
        }
        if !state.unknown.is_empty() {
            return refused("what a failed change left could not be read back yet");
        }
        if state.backlog.mode() != Mode::Data && !state.backlog.is_drained() {
            return refused("the changes before a gap are not in the store yet");
        }
        Ok(())
    }

    fn cut(&self, state: &mut State) -> Moment {
        let interceptor = self.interceptor();
        interceptor.swap(state);
        if state.backlog.mode() == Mode::Data {
            return Moment::Stream(state.end());
        }
        let gap = match state.backlog.climb() {
            Closed::Gap(mut gap) => {
                // What is under way may be in what is read: it is shipped with it.
                let under_way = state.gate.extents();
                under_way.for_each(|extent| gap.add(&interceptor.geometry, extent));
                gap
            }
            Closed::Unknown => {
                let blocks = Bitmap::new(interceptor.geometry.blocks());
                // With what was taken by earlier moments, and is not in the store either.
                blocks.merge_from(interceptor.ledger.epoch());
                Gap::of(blocks)
            }
        };
        state.moments.0 += 1;
        let copying = Copying::of(
            state.moments,
            gap.blocks(),
            interceptor.ledger.undefined(),
            interceptor.geometry,
            self.copy_limit(),
        );
        state
            .gate
            .raise(Hurdle::Copy, |extent| !copying.may_change(extent));
        state.copying = Some(copying);
        interceptor.mode_changed(state, "all that was missed is being read");
        Moment::Blocks(Blocks(gap))
    }

    /// The store has changes of `time`: none is recorded as older from now on, though the clock
    /// was set back meanwhile. By more than an hour it was wrong before, and counts now; then
    /// times are ambiguous, and numbers are not.
    pub fn goes_on_from(&self, time: Timestamp) {
        let ahead = time.as_nanos().saturating_sub(Timestamp::now().as_nanos());
        let ahead = Duration::from_nanos(u64::try_from(ahead).unwrap_or(0));
        if ahead > CLOCK_TRUST {
            tracing::warn!(
                "{}: the store's newest change is of a time that is {} s ahead: the clock was \
                 set back; restore by EPOCH:SEQ what was written meanwhile",
                self.interceptor().path.display(),
                ahead.as_secs(),
            );
            return;
        }
        lock(&self.interceptor().state).backlog.tick(time);
    }

    /// The next changes before `cut`, about `bytes` of them.
    pub fn read(&self, cut: &Cut, bytes: ByteLen) -> Read {
        let mut state = lock(&self.interceptor().state);
        if state.backlog.losses() != cut.losses {
            return Read::Lost;
        }
        state.backlog.read(cut.upto, bytes)
    }

    /// What was read and is not stored will be read again; the stream is given up where it
    /// goes on from a moment that the store does not have.
    pub fn read_again(&self) {
        let interceptor = self.interceptor();
        let mut state = lock(&interceptor.state);
        let losses = state.backlog.losses();
        let forgotten = state.backlog.rewind();
        if losses != state.backlog.losses() {
            interceptor.mode_changed(&mut state, "a moment was not brought into the store");
        }
        drop(state);
        drop(forgotten);
    }

    /// Whether a moment could be taken now.
    ///
    /// # Errors
    /// As [`Self::moment`].
    pub fn has_moment(&self) -> Result<()> {
        self.is_ready(&lock(&self.interceptor().state))
    }

    /// What is before number `upto` was read from the spool.
    pub fn was_read(&self, upto: Sequence) {
        lock(&self.interceptor().state).backlog.was_read(upto);
    }

    /// The stream as far as it goes now: an end that is no moment of the bitmaps.
    pub fn end_now(&self) -> Cut {
        lock(&self.interceptor().state).end()
    }

    /// The store has the changes before `cut`, durably.
    pub fn stored(&self, cut: &Cut) {
        let mut state = lock(&self.interceptor().state);
        if state.backlog.losses() == cut.losses {
            let forgotten = state.backlog.stored(cut.upto);
            drop(state);
            drop(forgotten);
        }
    }

    /// The store has the blocks of the moment from which the stream goes on.
    pub fn moment_is_stored(&self) {
        lock(&self.interceptor().state).backlog.base_is_stored();
    }

    /// The first change that the store does not have: what the spool has before is of no use.
    pub fn stored_up_to(&self) -> Sequence {
        lock(&self.interceptor().state).backlog.stored_up_to()
    }

    /// Whether what was read of the stream should be made durable in the store, so that its
    /// memory is free.
    pub fn should_store(&self) -> bool {
        lock(&self.interceptor().state).backlog.should_store()
    }

    /// The oldest part of the stream that is in memory, once the target is so far behind that
    /// the spool shall have it; nothing after `time`, or when the service ends. Whoever asks
    /// says [`Self::spooled`] next.
    pub fn wait_to_spool(&self, time: Duration) -> Option<Batch> {
        let interceptor = self.interceptor();
        let state = lock(&interceptor.state);
        let idle = |state: &mut State| !state.stopping && !state.backlog.is_behind();
        let waited = interceptor.spooler.wait_timeout_while(state, time, idle);
        let (state, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        (!state.stopping)
            .then(|| state.backlog.to_spool())
            .flatten()
    }

    /// What is before number `end` is in the spool.
    pub fn spooled(&self, end: Sequence) {
        let mut state = lock(&self.interceptor().state);
        let forgotten = state.backlog.spooled(end);
        drop(state);
        drop(forgotten);
    }

    /// Waits until the service ends, at most for `time`.
    pub fn wait_for_end(&self, time: Duration) {
        let interceptor = self.interceptor();
        let state = lock(&interceptor.state);
        let lives = |state: &mut State| !state.stopping;
        drop(interceptor.spooler.wait_timeout_while(state, time, lives));
    }

    /// Whether the service ends.
    pub fn is_ending(&self) -> bool {
        lock(&self.interceptor().state).stopping
    }

    /// Of the blocks of a moment: one was read. If it was written since the moment, `data`
    /// is replaced by what it held then; by zeroes if it had been discarded.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the moment is lost: more was written than there was room to
    /// copy first.
    pub fn take_block(&self, block: BlockNumber, data: &mut [u8]) -> Result<()> {
        let interceptor = self.interceptor();
        let mut state = lock(&interceptor.state);
        let State { copying, gate, .. } = &mut *state;
        let Some(copying) = copying.as_mut().filter(|copying| !copying.is_broken()) else {
            return Err(Error::new(ErrorKind::State, MOMENT)
                .path(&interceptor.path)
                .detail("more was written meanwhile than could be copied first")
                .advice("it is tried again at the next interval"));
        };
        match copying.take(block) {
            Taken::Saved(saved) => data.copy_from_slice(&saved),
            Taken::Discarded => data.fill(0),
            Taken::AsRead => {
                gate.lower(Hurdle::Copy, |extent| copying.may_change(extent));
                interceptor.release(&mut state, usize::MAX);
            }
        }
        Ok(())
    }

    /// The moment is read, or of no use: nothing waits for it any more.
    pub fn end_moment(&self) {
        let interceptor = self.interceptor();
        let mut state = lock(&interceptor.state);
        if state.copying.take().is_some() {
            state.gate.lower(Hurdle::Copy, |_| true);
            interceptor.release(&mut state, usize::MAX);
        }
    }

    /// Takes what is dirty as the round; what changes from now on is the next one's. For
    /// reading without a moment.
    pub fn swap(&self) {
        let state = lock(&self.interceptor().state);
        self.interceptor().swap(&state);
    }

    /// The round of the last moment or swap.
    pub fn round(&self) -> &Bitmap {
        self.interceptor().ledger.round()
    }

    /// What is dirty and in no round.
    pub fn pending(&self) -> &Bitmap {
        self.interceptor().ledger.live()
    }

    /// The round has been dealt with; it stays in the epoch.
    pub fn finish_round(&self) {
        self.interceptor().ledger.finish_round();
    }

    /// All of the round is dirty again, and stays in the epoch too.
    pub fn mark_round_again(&self) {
        let _alone = lock(&self.interceptor().state);
        let ledger = &self.interceptor().ledger;
        ledger.live().merge_from(ledger.round());
    }

    /// The store has the epoch.
    pub fn acknowledge(&self) {
        self.interceptor().ledger.acknowledge();
    }

    /// The store will not get the epoch, because of `cause`: it is dirty again. The stream is
    /// read again from where the store ends, unless it went on from a moment that the store
    /// did not get.
    pub fn reclaim(&self, cause: &str) {
        self.go_back(cause, Backlog::rewind);
    }

    /// Gives the stream up, because of `cause`: what is not in the store is dirty, and known by
    /// its blocks only.
    pub fn give_up(&self, cause: &str) {
        self.go_back(cause, Backlog::give_up);
    }

    /// The same, for who does not ship: what is dirty stays where it is noted.
    pub fn lose_stream(&self, cause: &str) {
        self.end_moment();
        let mut state = lock(&self.interceptor().state);
        let forgotten = state.backlog.give_up();
        self.interceptor().mode_changed(&mut state, cause);
        drop(state);
        drop(forgotten);
    }

    fn go_back(&self, cause: &str, go: impl FnOnce(&mut Backlog) -> Forgotten) {
        self.end_moment();
        let interceptor = self.interceptor();
        let mut state = lock(&interceptor.state);
        let before = (state.backlog.mode(), state.backlog.losses());
        interceptor.ledger.reclaim();
        let forgotten = go(&mut state.backlog);
        if before != (state.backlog.mode(), state.backlog.losses()) {
            interceptor.mode_changed(&mut state, cause);
        }
        drop(state);
        drop(forgotten);
        interceptor.ledger.forget_epoch();
    }

    /// Whether a block was discarded and not written since.
    pub fn is_undefined(&self, block: BlockNumber) -> bool {
        self.interceptor().ledger.undefined().test(block)
    }

    /// How many blocks are not in the store.
    pub fn dirty_blocks(&self) -> u64 {
        self.interceptor().ledger.dirty_blocks()
    }

    /// Whether the store does not have what a block holds, or may not.
    pub fn is_dirty(&self, block: BlockNumber) -> bool {
        let _alone = lock(&self.interceptor().state);
        self.interceptor().ledger.is_dirty(block)
    }

    /// Adds the blocks of `run` that are not in the store to `set`.
    pub fn add_dirty(&self, set: &Bitmap, run: Run) {
        // A swap moves them between bitmaps. Who writes waits for this: it is short, for no
        // request asks for more than 4 GiB.
        let _alone = lock(&self.interceptor().state);
        self.interceptor().ledger.add_dirty(set, run);
    }

    /// Whether a change is under way.
    pub fn has_in_flight(&self) -> bool {
        !lock(&self.interceptor().state).gate.is_empty()
    }

    /// What waits to be shipped.
    pub fn waiting(&self) -> Waiting {
        let state = lock(&self.interceptor().state);
        Waiting {
            mode: state.backlog.mode(),
            changes: state.backlog.count(),
            held: state.backlog.held(),
        }
    }

    /// How what is kept has changed since this was last asked for.
    pub fn mode_changes(&self) -> Vec<ModeChange> {
        let mut state = lock(&self.interceptor().state);
        state.mode_changes.drain(..).collect()
    }

    /// What could not be done for the changes, last.
    pub fn trouble(&self) -> Option<String> {
        lock(&self.interceptor().state).trouble()
    }

    /// Its counters.
    pub fn counters(&self) -> InlineCounters {
        lock(&self.interceptor().state).counters
    }

    /// Waits until there is something worth shipping, or the backlog falls, or the service
    /// ends; at most for `time`.
    pub fn wait(&self, time: Duration) {
        let interceptor = self.interceptor();
        let state = lock(&interceptor.state);
        let idle = |state: &mut State| !Interceptor::is_worth_shipping(state);
        // Whether it was worth it is seen by who waited.
        drop(interceptor.shipper.wait_timeout_while(state, time, idle));
    }
}

impl Cut {
    /// An earlier end of the same stream.
    #[must_use]
    pub const fn at(self, upto: Sequence) -> Self {
        Self { upto, ..self }
    }
}

impl State {
    fn end(&self) -> Cut {
        Cut {
            upto: self.backlog.newest(),
            losses: self.backlog.losses(),
        }
    }
}

impl Blocks {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.blocks().is_empty()
    }

    /// Some that are worth being read together: of the run that begins with the first one
    /// behind `from`, at most `most`.
    pub fn next_run(&self, from: BlockNumber, most: u64) -> Option<Run> {
        let run = self.0.blocks().runs().from(from).next()?;
        let end = run.end.get().min(run.start.get() + most);
        Some(Run {
            start: run.start,
            end: BlockNumber::new(end),
        })
    }

    /// The parts of `extent`, which are blocks of the moment, that may have changed.
    pub fn parts(&self, extent: Extent) -> Vec<Extent> {
        self.0.parts(extent)
    }
}
