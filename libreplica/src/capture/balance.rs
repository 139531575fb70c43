//! Whether writes pass the programs unseen: the sectors that the kernel has counted on the
//! disk, beside those that were seen, of requests that ended and of writes in flight.
//!
//! The kernel announces the end of a request, or of a part of it, and counts its sectors a
//! moment later. So what it has counted beyond what was seen, its surplus, is at rest some
//! constant (it may have begun to count long before), and otherwise less: it never exceeds
//! the constant while nothing is missed, whatever is in flight, however late a CPU counts.
//! Read the kernel's counters first and what was seen second, and this holds though time
//! passes between the two. A write raises the constant if neither its beginning nor its end
//! was seen. If only its end was missed, it seems to be in flight until that is made up for
//! (see `flights`), and is known all the same.
//!
//! The constant is not known, but a bound is: what the kernel has counted by now, less what
//! had ended a good while ago, for all of that is counted by now. If the disk was at rest in
//! between, the bound is exact. The least that was ever found is kept, beside the marks, so
//! that it outlives this process. A surplus above it proves that something was missed; no
//! moment of rest is needed, which a disk in use may never have.
//!
//! Source: Linux, block/blk-mq.c, `blk_update_request` and `blk_complete_request`: first
//! `trace_block_rq_complete`, then `blk_account_io_completion`, of the same bytes.

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use crate::capture::state::{State, Word};
use crate::device::{BlockDevice, IoStats, Queue};
use crate::error::Result;

/// In how long the kernel has surely counted what it announced. Between two swaps lies a
/// grace period as well, so that a CPU which stood still was waited for; what remains is a
/// task that was preempted in that moment.
const SETTLED: Duration = Duration::from_secs(1);

/// Both counts, read one behind the other.
#[derive(Clone, Copy, Debug)]
struct Reading {
    from: Instant,
    /// Sectors by the kernel's count.
    counted: u64,
    /// Sectors that were seen to begin and not to end; read later than `counted`.
    in_flight: u64,
    /// Sectors that have ended; read later than `in_flight`.
    ended: u64,
    until: Instant,
}

/// What the two counts show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Balance {
    /// Nothing: the kernel does not count, or no bound is known yet.
    #[default]
    Unknown,
    /// That nothing was missed beyond this bound of the surplus.
    Within(u64),
    /// That something was missed; and the bound from here on.
    Missed(u64),
}

impl Balance {
    /// The bound to keep.
    pub(super) const fn bound(self) -> Option<u64> {
        match self {
            Self::Unknown => None,
            Self::Within(bound) | Self::Missed(bound) => Some(bound),
        }
    }
}

/// Compares the counts from swap to swap.
#[derive(Debug, Default)]
pub(super) struct Scales {
    /// An earlier reading, from which the next bound comes.
    earlier: Option<Reading>,
}

impl Scales {
    /// Reads both counts, and compares. What it shows is to be noted by the caller, once
    /// its consequence is in the bitmaps.
    pub(super) fn weigh(&mut self, disk: &BlockDevice, state: &State) -> Result<Balance> {
        if disk.queue() != Queue::Requests {
            return Ok(Balance::Unknown);
        }
        if disk.io_stats()? == IoStats::Off || disk.counts_commands() {
            state.set(Word::SurplusBounded, 0);
            self.earlier = None;
            return Ok(Balance::Unknown);
        }
        let now = read(disk, state)?;
        let known = state.get(Word::SurplusBounded) != 0;
        let bound = known.then(|| state.get(Word::SurplusBound));
        Ok(self.judge(bound, now))
    }

    fn judge(&mut self, bound: Option<u64>, now: Reading) -> Balance {
        let earlier = *self.earlier.get_or_insert(now);
        let settled = now.from.saturating_duration_since(earlier.until) >= SETTLED;
        if settled {
            self.earlier = Some(now);
        }
        // Differences of counters that may wrap around, and have begun anywhere.
        let seen = now.ended.wrapping_add(now.in_flight);
        let surplus = now.counted.wrapping_sub(seen);
        let upper = now.counted.wrapping_sub(earlier.ended);
        match bound {
            // Better a bound that has not settled than none: what is missed from now on
            // would be taken for part of it.
            Some(bound) if exceeds(surplus, bound) => Balance::Missed(upper),
            Some(bound) if settled && exceeds(bound, upper) => Balance::Within(upper),
            Some(bound) => Balance::Within(bound),
            None if settled => Balance::Within(upper),
            None => Balance::Unknown,
        }
    }
}

fn exceeds(a: u64, b: u64) -> bool {
    a.wrapping_sub(b).cast_signed() > 0
}

fn read(disk: &BlockDevice, state: &State) -> Result<Reading> {
    let from = Instant::now();
    let stats = disk.stats()?;
    fence(Ordering::SeqCst);
    // What ends meanwhile is then in both of these, rather than in neither; and what is
    // found to have ended unseen, too.
    let completed = state.get(Word::CompletedSectors);
    let begun = state.get(Word::SubmittedSectors);
    let stale = state.get(Word::StaleSectors);
    let ended = state.get(Word::RequestSectors).wrapping_add(stale);
    Ok(Reading {
        from,
        counted: stats.write_sectors.wrapping_add(stats.discard_sectors),
        // What was found to have ended, and ended later, counts as complete twice.
        in_flight: if exceeds(begun, completed) {
            begun.wrapping_sub(completed)
        } else {
            0
        },
        ended,
        until: Instant::now(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A disk whose requests end at any time, and are counted up to `SETTLED` later. Of some,
    /// the beginning is not seen, of others the end.
    struct Model {
        random: u64,
        origin: Instant,
        now: Duration,
        late: Vec<(Duration, u64)>,
        counted: u64,
        /// Begun, seen, and not ended.
        begun: Vec<u64>,
        /// Begun, seen, and ended unseen.
        unseen: u64,
        ended: u64,
        bound: Option<u64>,
        scales: Scales,
    }

    impl Model {
        fn new(seed: u64) -> Self {
            let mut model = Self {
                random: seed,
                origin: Instant::now(),
                now: Duration::ZERO,
                late: Vec::new(),
                counted: 0,
                begun: Vec::new(),
                unseen: 0,
                ended: 0,
                bound: None,
                scales: Scales::default(),
            };
            model.counted = model.below(u64::MAX);
            model.ended = model.below(1000);
            // Announced before anybody looked.
            model.late = (0..model.below(5)).map(|i| (MS * 100, i)).collect();
            model
        }

        fn below(&mut self, bound: u64) -> u64 {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.random % bound
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
            let now = self.now;
            for (_, sectors) in self.late.extract_if(.., |(at, _)| *at <= now) {
                self.counted = self.counted.wrapping_add(sectors);
            }
        }

        fn end(&mut self, sectors: u64) {
            let delay = self.below(SETTLED.as_millis() as u64) as u32;
            self.late.push((self.now + MS * delay, sectors));
        }

        fn step(&mut self) {
            let sectors = 1 + self.below(64);
            match self.below(40) {
                // The beginning is missed.
                0 => {
                    self.end(sectors);
                    self.ended += sectors;
                }
                // The end is missed.
                1 => {
                    self.end(sectors);
                    self.unseen += sectors;
                }
                // What ended unseen is found.
                2 => self.ended += std::mem::take(&mut self.unseen),
                3..20 => self.begun.push(sectors),
                _ => {
                    if let Some(sectors) = self.begun.pop() {
                        self.end(sectors);
                        self.ended += sectors;
                    }
                }
            }
            let pause = self.below(20) as u32;
            self.pass(MS * pause);
        }

        fn steps(&mut self) {
            for _ in 0..self.below(8) {
                self.step();
            }
        }

        fn in_flight(&self) -> u64 {
            self.begun.iter().sum::<u64>() + self.unseen
        }

        fn judge(&mut self, reading: Reading) -> Balance {
            let balance = self.scales.judge(self.bound, reading);
            self.bound = balance.bound().or(self.bound);
            balance
        }

        fn swap(&mut self) -> Balance {
            let from = self.origin + self.now;
            let counted = self.counted;
            self.steps();
            let in_flight = self.in_flight();
            self.steps();
            let reading = Reading {
                from,
                counted,
                in_flight,
                ended: self.ended,
                until: self.origin + self.now,
            };
            self.judge(reading)
        }

        /// A swap while nothing happens.
        fn still(&mut self) -> Balance {
            let at = self.origin + self.now;
            let reading = Reading {
                from: at,
                counted: self.counted,
                in_flight: self.in_flight(),
                ended: self.ended,
                until: at,
            };
            self.judge(reading)
        }

        fn come_to_rest(&mut self) {
            while let Some(sectors) = self.begun.pop() {
                self.end(sectors);
                self.ended += sectors;
            }
            self.ended += std::mem::take(&mut self.unseen);
            for _ in 0..2 {
                self.pass(SETTLED * 2);
                self.still();
            }
        }

        fn miss(&mut self, sectors: u64) {
            self.counted = self.counted.wrapping_add(sectors);
        }
    }

    #[test]
    fn what_was_seen_at_one_end_is_never_told_and_a_miss_after_rest_always() {
        for seed in 1..500 {
            let mut model = Model::new(seed);
            for _ in 0..200 {
                model.steps();
                let balance = model.swap();
                assert!(!matches!(balance, Balance::Missed(_)), "seed {seed}");
                match model.below(20) {
                    0 => model.scales = Scales::default(),
                    1 => model.pass(SETTLED),
                    2 => model.pass(SETTLED / 3),
                    _ => {}
                }
            }
            model.come_to_rest();
            let exact = model.counted.wrapping_sub(model.ended);
            assert_eq!(model.bound, Some(exact), "seed {seed}");
            model.miss(1);
            assert!(matches!(model.still(), Balance::Missed(_)), "seed {seed}");
            assert!(matches!(model.still(), Balance::Within(_)), "told once");
        }
    }

    #[test]
    fn misses_that_go_on_are_told_again_and_again() {
        let mut model = Model::new(7);
        model.come_to_rest();
        for _ in 0..10 {
            model.miss(8);
            model.pass(MS);
            assert!(matches!(model.still(), Balance::Missed(_)));
        }
    }

    #[test]
    fn even_without_rest_programs_that_are_gone_are_told() {
        let mut model = Model::new(9);
        for _ in 0..40 {
            model.steps();
            model.pass(MS * 50);
            model.swap();
        }
        assert!(model.bound.is_some());
        let told = (0..400).any(|_| {
            model.miss(64);
            model.pass(MS * 50);
            matches!(model.still(), Balance::Missed(_))
        });
        assert!(told);
    }
}
