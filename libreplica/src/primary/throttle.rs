//! How fast a store is tidied while nothing hurries: folding and merging have a quarter of the
//! time, so that three quarters of what the store's disk can do are left to the epochs to
//! come and to who reads. Where that does not suffice, the logs grow; once they have by two
//! steps' worth, there are no pauses until all is done. Pure: the time is an argument.

use std::time::{Duration, Instant};

use hrl_format::units::ByteLen;

/// After work it rests so many times as long.
const RESTS: u32 = 3;
/// Logs that have grown by so much since it began show that it is too slow.
const BEHIND: u64 = 512 << 20;

/// When the next piece of work may be done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Throttle {
    /// How long the logs were when the work began; none is under way else.
    begun: Option<ByteLen>,
    rest: Option<(Instant, Duration)>,
}

impl Throttle {
    /// There is something to do; the logs are so long. What is under way goes on as it is.
    pub fn begin(&mut self, logs: ByteLen) {
        self.begun.get_or_insert(logs);
    }

    /// Some of it was done, and took so long; the logs are so long now.
    pub fn worked(&mut self, now: Instant, took: Duration, logs: ByteLen) {
        let begun = self.begun.unwrap_or(logs);
        let is_behind = logs.get() > begun.get().saturating_add(BEHIND);
        self.rest = (!is_behind).then(|| (now, took.saturating_mul(RESTS)));
    }

    /// All is done.
    pub fn end(&mut self) {
        self.begun = None;
    }

    /// How long it still rests.
    pub fn left(&self, now: Instant) -> Duration {
        self.rest.map_or(Duration::ZERO, |(since, rest)| {
            rest.saturating_sub(now.saturating_duration_since(since))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const LOGS: ByteLen = ByteLen::new(10 << 30);

    #[test]
    fn a_quarter_of_the_time_is_worked() {
        let (mut throttle, mut now) = (Throttle::default(), Instant::now());
        let began = now;
        let mut worked = Duration::ZERO;
        throttle.begin(LOGS);
        for n in 1..=20 {
            assert_eq!(throttle.left(now), Duration::ZERO);
            let took = SECOND / n;
            (now, worked) = (now + took, worked + took);
            throttle.worked(now, took, LOGS);
            assert!(throttle.left(now) > Duration::ZERO);
            now += throttle.left(now);
        }
        assert_eq!((now - began).as_millis() / 4, worked.as_millis());
    }

    #[test]
    fn who_falls_behind_does_not_rest_until_all_is_done() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        let longer = ByteLen::new(LOGS.get() + BEHIND + 1);
        throttle.begin(LOGS);
        throttle.worked(now, SECOND, LOGS);
        assert_eq!(throttle.left(now), RESTS * SECOND);
        // A point was made meanwhile.
        throttle.begin(longer);
        throttle.worked(now, SECOND, longer);
        assert_eq!(throttle.left(now), Duration::ZERO);
        throttle.end();
        throttle.begin(longer);
        throttle.worked(now, SECOND, longer);
        assert_eq!(throttle.left(now), RESTS * SECOND);
    }
}
