//! When a volume's thread makes its next point, how long it waits after a failure, and what
//! `status` says of both. Pure: the time is an argument.
//!
//! A freeze blocks writers, so one that failed is not repeated before the interval has
//! passed; what changed was shipped all the same. Only a first copy or a resync, whose end
//! is a point that somebody may wait for, tries a few times in a row; and so does a volume
//! that could not ship, once it ships again.

use std::time::{Duration, Instant};

use crate::error::ErrorKind;

/// The pauses after failures in a row.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
];
/// A freeze that took over a quarter of its limit stretches the interval by this much, at
/// most.
const STRETCH_MAX: u32 = 16;
/// Points tried at in a row without regard to the interval; and failures in a row after
/// which nobody waits any longer, while the volume goes on trying.
pub const TRIES: u32 = 4;

/// Why there was no point although all was shipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing could be frozen, and no moment was without writes.
    NeverQuiet,
    /// What was asked for cannot be; nothing was tried.
    Refused,
    /// Anything else.
    Failed,
}

/// A volume's rhythm, and how it has been doing.
#[derive(Clone, Debug)]
pub struct Pace {
    /// The next point is due when so much time has passed since then; none: at once.
    wait: Option<(Instant, Duration)>,
    stretch: u32,
    /// Points tried at in a row without regard to the interval.
    hurried: u32,
    owes_point: bool,
    /// What kind of failure keeps it from shipping, if one does.
    broken: Option<ErrorKind>,
    /// Failures in a row of the volume's thread: how long it pauses.
    setbacks: u32,
    /// The same, and points missed, since something went well.
    failures: u32,
    points: u64,
    missed: Option<(Cause, String)>,
    slow: Option<String>,
    untidy: Option<String>,
}

impl Pace {
    /// A point is due at once.
    pub const fn new() -> Self {
        Self {
            wait: None,
            stretch: 1,
            hurried: 0,
            owes_point: false,
            broken: None,
            setbacks: 0,
            failures: 0,
            points: 0,
            missed: None,
            slow: None,
            untidy: None,
        }
    }

    /// How long it is until the next point is due.
    pub fn left(&self, now: Instant) -> Duration {
        self.wait.map_or(Duration::ZERO, |(since, wait)| {
            wait.saturating_sub(now.saturating_duration_since(since))
        })
    }

    /// A point is due at once, whatever was before.
    pub fn make_due(&mut self) {
        self.wait = None;
    }

    /// A first copy or a resync is under way, or just over: its end shall be a point.
    pub fn owe_point(&mut self) {
        self.owes_point = true;
        self.missed = None;
        self.wait = None;
    }

    /// Somebody asks for a resync: what failed before does not count against it.
    pub fn begin_anew(&mut self) {
        self.went_well();
        self.owe_point();
    }

    /// Whether the point of a first copy or a resync is still to be made.
    pub const fn owes_point(&self) -> bool {
        self.owes_point
    }

    /// A first copy or a resync is durable.
    pub fn copied(&mut self) {
        self.broken = None;
        self.went_well();
    }

    fn went_well(&mut self) {
        (self.hurried, self.setbacks, self.failures) = (0, 0, 0);
    }

    /// Writers were blocked for `length` of at most `limit`; not at all if there was nothing
    /// to freeze. Freezes that come near their limit are made less often.
    pub fn froze(&mut self, length: Duration, limit: Duration) {
        if length * 4 <= limit {
            self.stretch = 1;
            self.slow = None;
            return;
        }
        self.stretch = (self.stretch * 2).min(STRETCH_MAX);
        self.slow = Some(format!(
            "the last freeze took {} ms of at most {} ms: points are made {} times less often",
            length.as_millis(),
            limit.as_millis(),
            self.stretch
        ));
    }

    /// Why points are made less often than asked for, if they are.
    pub fn slow(&self) -> Option<&str> {
        self.slow.as_deref()
    }

    /// A point was tried at: the next is due after the interval.
    pub fn tried(&mut self, now: Instant, every: Duration) {
        self.wait = Some((now, every.saturating_mul(self.stretch)));
    }

    /// A point was made.
    pub fn made(&mut self, now: Instant, every: Duration) {
        self.tried(now, every);
        self.points += 1;
        self.owes_point = false;
        self.broken = None;
        self.missed = None;
        self.went_well();
    }

    /// A point that was due could not be made, and what had changed is shipped.
    pub fn missed(&mut self, now: Instant, every: Duration, cause: Cause, why: String) {
        self.tried(now, every);
        self.note_missed(cause, why);
        self.failures += 1;
        self.setbacks = 0;
        self.broken = None;
        if self.owes_point {
            self.hurried += 1;
            if self.hurried < TRIES
                && let Some((_, wait)) = &mut self.wait
            {
                *wait = pause(self.hurried - 1).min(*wait);
            }
        }
    }

    /// A point that somebody asked for could not be made: when the next is due is as before.
    pub fn note_missed(&mut self, cause: Cause, why: String) {
        self.missed = Some((cause, why));
    }

    /// Why the newest point was not made, if it was not.
    pub fn newest_missed(&self) -> Option<(Cause, &str)> {
        self.missed
            .as_ref()
            .map(|(cause, why)| (*cause, why.as_str()))
    }

    /// What is needed to ship was lost. Whether it ships again is found out before anybody
    /// is made to wait in a freeze.
    pub fn breaks(&mut self, kind: ErrorKind) {
        self.broken = Some(kind);
    }

    /// The volume's thread did what there was to do.
    pub const fn did(&mut self) {
        self.setbacks = 0;
    }

    /// Whether the volume's thread failed at what it did last.
    pub const fn is_failing(&self) -> bool {
        self.is_broken() || self.setbacks > 0
    }

    /// Whether it is not known to ship.
    pub const fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// What kind of failure keeps it from shipping, if one does.
    pub const fn broken(&self) -> Option<ErrorKind> {
        self.broken
    }

    /// It ships again. A point follows at once, but not every time: what breaks over and
    /// over shall not freeze anything over and over.
    pub fn ships(&mut self) {
        self.broken = None;
        if self.hurried < TRIES {
            self.hurried += 1;
            self.wait = None;
        }
    }

    /// The volume's thread failed at something; returns how long it pauses.
    pub fn fail(&mut self) -> Duration {
        self.failures += 1;
        self.setbacks += 1;
        pause(self.setbacks - 1)
    }

    /// How much failed in a row.
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// Points made since the daemon was started.
    pub const fn points(&self) -> u64 {
        self.points
    }

    /// Notes why points that have expired take room still; nothing if they do not.
    pub fn note_retention(&mut self, failure: Option<String>) {
        self.untidy = failure;
    }

    /// What there is to say of a volume that ships.
    pub fn remark(&self) -> Option<String> {
        let missed = self.missed.as_ref();
        let missed = missed.map(|(_, why)| format!("no point was made: {why}"));
        let untidy = self.untidy.as_ref();
        let untidy = untidy.map(|why| format!("expired points take room still: {why}"));
        let remarks = [missed, self.slow.clone(), untidy];
        let remarks: Vec<_> = remarks.into_iter().flatten().collect();
        (!remarks.is_empty()).then(|| remarks.join("; "))
    }
}

fn pause(place: u32) -> Duration {
    PAUSES[(place as usize).min(PAUSES.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(3600);
    const LIMIT: Duration = Duration::from_millis(2000);
    const LONG: Duration = Duration::from_millis(501);

    fn late(pace: &mut Pace, now: Instant) {
        pace.froze(LIMIT, LIMIT);
        pace.missed(now, EVERY, Cause::Failed, "late".to_owned());
    }

    #[test]
    fn a_point_that_is_missed_waits_for_the_interval() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        assert_eq!(pace.left(now), Duration::ZERO);
        late(&mut pace, now);
        assert_eq!(pace.left(now), EVERY * 2);
        assert!(pace.remark().unwrap().contains("late"));
    }

    #[test]
    fn the_first_point_is_tried_a_few_times() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        pace.owe_point();
        for pause in &PAUSES[..TRIES as usize - 1] {
            late(&mut pace, now);
            assert_eq!(pace.left(now), *pause);
        }
        late(&mut pace, now);
        assert_eq!(pace.left(now), EVERY * STRETCH_MAX);
        assert_eq!(pace.failures(), TRIES);
        assert!(pace.owes_point());
    }

    #[test]
    fn a_pause_is_no_longer_than_the_interval() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        let every = Duration::from_millis(100);
        pace.owe_point();
        pace.missed(now, every, Cause::NeverQuiet, String::new());
        assert_eq!(pace.left(now), every);
    }

    #[test]
    fn long_freezes_stretch_the_interval_whoever_asked() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        for times in [2, 4, 8, 16, 16] {
            // Also the operator's: what it says stays said.
            pace.froze(LONG, LIMIT);
            pace.made(now, EVERY);
            assert_eq!(pace.left(now), EVERY * times);
            let remark = pace.remark().unwrap();
            assert!(remark.contains(&format!("{times} times")), "{remark}");
            assert!(remark.contains("501 ms of at most 2000 ms"), "{remark}");
        }
        // Neither a point without an attempt to freeze nor a failure ends that.
        pace.missed(now, EVERY, Cause::Failed, String::new());
        assert_eq!(pace.left(now), EVERY * 16);
        // Short ones do, and so does an unmounted filesystem.
        pace.froze(Duration::ZERO, LIMIT);
        pace.made(now, EVERY);
        assert_eq!((pace.left(now), pace.remark()), (EVERY, None));
    }

    #[test]
    fn what_breaks_over_and_over_is_not_frozen_over_and_over() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        let mut hurried = 0;
        for _ in 0..20 {
            pace.breaks(ErrorKind::Io);
            pace.tried(now, EVERY);
            pace.fail();
            pace.ships();
            hurried += u32::from(pace.left(now).is_zero());
        }
        assert_eq!(hurried, TRIES);
        assert_eq!(pace.fail(), PAUSES[5]);
        pace.made(now, EVERY);
        assert_eq!(pace.fail(), PAUSES[0]);
    }

    #[test]
    fn an_interval_of_ages_is_no_overflow() {
        let (mut pace, now) = (Pace::new(), Instant::now());
        pace.froze(LONG, LIMIT);
        pace.made(now, Duration::MAX);
        assert_eq!(pace.left(now), Duration::MAX);
    }
}
