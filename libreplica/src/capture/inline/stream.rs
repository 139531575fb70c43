//! What the shipper sees: the backlog's entries in order, and moments. A moment is a cut
//! through bitmaps and backlog at once; of several volumes, at one instant, for their locks
//! are held together. In data mode a moment is an end in the stream. In bitmap mode it is a
//! set of blocks that are read as they were then, while writes go on (see `copying.rs`).

use std::sync::MutexGuard;
use std::time::Duration;

use crate::bitmap::Bitmap;
use crate::capture::inline::backlog::{Entry, Fall};
use crate::capture::inline::copying::{Copying, Taken};
use crate::capture::inline::gate::Hurdle;
use crate::capture::inline::interceptor::{InlineCounters, Interceptor, State, lock};
use crate::capture::inline::service::Service;
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Run};
use crate::policy::Mode;
use crate::units::{ByteLen, Timestamp};

/// An end in the stream of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// How many entries wait that belong before it.
    pub entries: usize,
    /// How often the backlog had lost something before.
    losses: u64,
}

/// What a moment is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The backlog's entries up to here.
    Stream(Cut),
    /// The blocks of the round, read through [`Service::take_block`].
    Blocks,
}

/// What waits to be shipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// How much is kept.
    pub mode: Mode,
    /// Entries in the backlog.
    pub entries: usize,
    /// Bytes of memory that they take.
    pub held: ByteLen,
    /// When the oldest was made.
    pub oldest: Option<Timestamp>,
}

const MOMENT: &str = "take a moment of the stream";

impl Service {
    /// Takes one moment of all `services`: in data mode a cut of the stream, else the dirty
    /// blocks, which from then on are copied before they are written, and data is recorded
    /// again. What was dirty is the round; it is in the epoch's bitmap too.
    ///
    /// # Errors
    /// [`ErrorKind::State`] while a moment is still being read, or where a write failed and
    /// its range could not be read back yet.
    pub fn moment(services: &[&Self]) -> Result<(Timestamp, Vec<Moment>)> {
        // In one order, whoever asks: two groups never wait for each other.
        let mut order: Vec<usize> = (0..services.len()).collect();
        order.sort_by_key(|&n| std::ptr::from_ref(services[n].interceptor()) as usize);
        let mut states: Vec<(usize, MutexGuard<'_, State>)> = order
            .into_iter()
            .map(|n| (n, lock(&services[n].interceptor().state)))
            .collect();
        for (n, state) in &states {
            services[*n].is_ready(state)?;
        }
        let now = Timestamp::now();
        let mut moments = vec![Moment::Blocks; services.len()];
        for (n, state) in &mut states {
            moments[*n] = services[*n].cut(state);
        }
        Ok((now, moments))
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
            return refused("a write failed, and what it left could not be read back yet");
        }
        Ok(())
    }

    fn cut(&self, state: &mut State) -> Moment {
        let interceptor = self.interceptor();
        interceptor.swap(state);
        if state.backlog.mode() == Mode::Data {
            return Moment::Stream(Cut {
                entries: state.backlog.count(),
                losses: state.backlog.losses(),
            });
        }
        let copying = Copying::of(
            interceptor.ledger.round(),
            interceptor.geometry,
            self.copy_limit(),
        );
        state
            .gate
            .raise(Hurdle::Copy, |extent| !copying.may_change(extent));
        state.copying = Some(copying);
        state.backlog.climb();
        interceptor.mirror_mode(state);
        Moment::Blocks
    }

    /// The oldest entries, at most `most` and about `bytes` of them; `None` if some were
    /// lost since the cut that they belong to.
    pub fn take(&self, cut: &mut Cut, bytes: ByteLen) -> Option<Vec<Entry>> {
        let mut state = lock(&self.interceptor().state);
        if state.backlog.losses() != cut.losses {
            return None;
        }
        let entries = state.backlog.take(cut.entries, bytes);
        cut.entries -= entries.len();
        Some(entries)
    }

    /// The stream as far as it goes now: an end that is no moment of the bitmaps. Nothing,
    /// unless all changes are recorded with their data.
    pub fn end_now(&self) -> Cut {
        let state = lock(&self.interceptor().state);
        let is_whole = state.backlog.mode() == Mode::Data;
        Cut {
            entries: if is_whole { state.backlog.count() } else { 0 },
            losses: state.backlog.losses(),
        }
    }

    /// Of the blocks of a moment: one was read. If it was written since the moment, `data`
    /// is replaced by what it held then.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] when the moment is lost: more was written than there was room to
    /// copy first.
    pub fn take_block(&self, block: BlockNumber, data: &mut [u8]) -> Result<()> {
        let interceptor = self.interceptor();
        let mut state = lock(&interceptor.state);
        let State { copying, gate, .. } = &mut *state;
        let Some(copying) = copying.as_mut().filter(|copying| !copying.is_broken()) else {
            return Err(Error::new(ErrorKind::Full, MOMENT)
                .path(&interceptor.path)
                .detail("more was written meanwhile than could be copied first")
                .advice("it is tried again at the next interval"));
        };
        if let Taken::Saved(saved) = copying.take(block) {
            data.copy_from_slice(&saved);
        } else {
            gate.lower(Hurdle::Copy, |extent| copying.may_change(extent));
            interceptor.release(&mut state, usize::MAX);
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

    /// The store will not get the epoch: it is dirty again, and the backlog, which knows only
    /// what came after, is given up.
    pub fn reclaim(&self) {
        self.end_moment();
        let interceptor = self.interceptor();
        let mut state = lock(&interceptor.state);
        interceptor.ledger.reclaim();
        state.backlog.give_up();
        interceptor.mirror_mode(&state);
        drop(state);
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

    /// Adds the blocks that are not in the store to `set`.
    pub fn add_dirty(&self, set: &Bitmap) {
        // A swap moves them between bitmaps.
        let _alone = lock(&self.interceptor().state);
        self.interceptor().ledger.add_dirty(set);
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
            entries: state.backlog.count(),
            held: state.backlog.held(),
            oldest: state.backlog.oldest(),
        }
    }

    /// The falls to a mode that knows less since they were last asked for.
    pub fn falls(&self) -> Vec<Fall> {
        lock(&self.interceptor().state).falls.drain(..).collect()
    }

    /// What could not be done for the changes, last.
    pub fn trouble(&self) -> Option<String> {
        lock(&self.interceptor().state).trouble.clone()
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

    /// Blocks of a moment that are worth being read together: the run that begins with the
    /// round's first block behind `from`.
    pub fn next_run(&self, from: BlockNumber, blocks: u64) -> Option<Run> {
        let run = self.round().runs().from(from).next()?;
        let end = run.end.get().min(run.start.get() + blocks);
        Some(Run {
            start: run.start,
            end: BlockNumber::new(end),
        })
    }
}
