//! Whether writes pass the programs unseen: the sectors that the kernel has counted on the
//! disk, beside those of the requests that were seen to end.
//!
//! The kernel announces the end of a request, or of a part of it, and counts its sectors a
//! moment later. So what it has counted beyond what was seen, its surplus, is at rest some
//! constant (it may have begun to count long before), and otherwise less: it never exceeds
//! the constant while nothing is missed, whatever is in flight, however late a CPU counts.
//! Read the kernel's counters first and what was seen second, and this holds though time
//! passes between the two. Every write that is missed raises the constant.
//!
//! The constant is not known, but a bound is: what the kernel has counted by now, less what
//! was seen a good while ago, for all of that is counted by now. If the disk was at rest in
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
    /// Sectors of the requests seen; read later than `counted`.
    seen: u64,
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
        let surplus = now.counted.wrapping_sub(now.seen);
        let upper = now.counted.wrapping_sub(earlier.seen);
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
    let seen = state.get(Word::RequestSectors);
    Ok(Reading {
        from,
        counted: stats.write_sectors.wrapping_add(stats.discard_sectors),
        seen,
        until: Instant::now(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A disk whose requests end at any time, and are counted up to `SETTLED` later.
    struct Model {
        random: u64,
        origin: Instant,
        now: Duration,
        late: Vec<(Duration, u64)>,
        counted: u64,
        seen: u64,
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
                seen: 0,
                bound: None,
                scales: Scales::default(),
            };
            model.counted = model.below(u64::MAX);
            model.seen = model.below(1000);
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

        fn write(&mut self) {
            let sectors = 1 + self.below(64);
            let delay = self.below(SETTLED.as_millis() as u64) as u32;
            self.seen = self.seen.wrapping_add(sectors);
            self.late.push((self.now + MS * delay, sectors));
        }

        fn some_writes(&mut self) {
            for _ in 0..self.below(4) {
                self.write();
                let pause = self.below(20) as u32;
                self.pass(MS * pause);
            }
        }

        fn swap(&mut self) -> Balance {
            let from = self.origin + self.now;
            let counted = self.counted;
            self.some_writes();
            let seen = self.seen;
            let until = self.origin + self.now;
            let reading = Reading {
                from,
                counted,
                seen,
                until,
            };
            let balance = self.scales.judge(self.bound, reading);
            self.bound = balance.bound().or(self.bound);
            balance
        }
    }

    #[test]
    fn nothing_missed_is_never_told_and_a_miss_after_rest_always() {
        for seed in 1..500 {
            let mut model = Model::new(seed);
            for _ in 0..200 {
                model.some_writes();
                let balance = model.swap();
                assert!(!matches!(balance, Balance::Missed(_)), "seed {seed}");
                match model.below(20) {
                    0 => model.scales = Scales::default(),
                    1 => model.pass(SETTLED),
                    2 => model.pass(SETTLED / 3),
                    _ => {}
                }
            }
            // At rest across two swaps: from here the bound is exact.
            model.late.push((model.now, 0));
            model.pass(SETTLED * 2);
            let counted = |model: &Model| model.counted.wrapping_sub(model.seen);
            for _ in 0..2 {
                let reading = still(&model);
                let balance = model.scales.judge(model.bound, reading);
                model.bound = balance.bound().or(model.bound);
                model.pass(SETTLED * 2);
            }
            let reading = still(&model);
            let balance = model.scales.judge(model.bound, reading);
            assert_eq!(balance, Balance::Within(counted(&model)), "seed {seed}");
            model.bound = balance.bound();
            model.counted = model.counted.wrapping_add(1);
            let reading = still(&model);
            let balance = model.scales.judge(model.bound, reading);
            assert!(matches!(balance, Balance::Missed(_)), "seed {seed}");
            model.bound = balance.bound();
            let balance = model.scales.judge(model.bound, reading);
            assert!(matches!(balance, Balance::Within(_)), "told once");
        }
    }

    fn still(model: &Model) -> Reading {
        let at = model.origin + model.now;
        Reading {
            from: at,
            counted: model.counted,
            seen: model.seen,
            until: at,
        }
    }

    #[test]
    fn misses_that_go_on_are_told_again_and_again() {
        let mut model = Model::new(7);
        model.pass(SETTLED);
        for _ in 0..2 {
            let reading = still(&model);
            let balance = model.scales.judge(model.bound, reading);
            model.bound = balance.bound();
            model.pass(SETTLED);
        }
        for _ in 0..10 {
            model.counted = model.counted.wrapping_add(8);
            model.pass(MS);
            let reading = still(&model);
            let balance = model.scales.judge(model.bound, reading);
            assert!(matches!(balance, Balance::Missed(_)));
            model.bound = balance.bound();
        }
    }

    #[test]
    fn even_without_rest_a_program_that_is_gone_is_told() {
        let mut model = Model::new(9);
        for _ in 0..40 {
            model.write();
            model.pass(MS * 50);
            model.swap();
        }
        assert!(model.bound.is_some());
        let told = (0..200).any(|_| {
            model.counted = model.counted.wrapping_add(64);
            model.pass(MS * 50);
            let reading = still(&model);
            let balance = model.scales.judge(model.bound, reading);
            model.bound = balance.bound().or(model.bound);
            matches!(balance, Balance::Missed(_))
        });
        assert!(told);
    }
}
