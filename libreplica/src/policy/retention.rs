//! Which recovery points to keep: a list of tiers, written as one word
//! (`all:2h,1h:24h,1d:14d,#100`). It only names the points that have expired; dropping them, and
//! what must not be dropped because it is in use, is the store's matter.
//!
//! A spaced tier cuts time, UTC, into intervals of equal length, and keeps one point of each:
//! the best there is, by what it promises, and of those the oldest. Two things make that
//! stable. The intervals stand still, so a point is judged against the same neighbours whenever
//! it is looked at. And the best of an interval is the best of any part of it that it is in: so
//! nothing that was dropped is missed later, however often the policy is applied, and the outcome
//! is as if it had been applied only once, at the end. An interval expires as a whole, when
//! all of it is older than the tier goes back; else the second best would come to be wanted
//! when the best expires, and be gone.
//!
//! Only time and promise of a point count. The points that a group has in common agree in
//! both, so all its members that have the same policy keep the same ones.

use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use hrl_format::id::PointId;
use hrl_format::record::Consistency;
use hrl_format::units::Timestamp;

use super::duration::{Age, Interval, parse_duration, plain_number};
use crate::error::{Error, ErrorKind};

/// A recovery point, as a policy judges it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which one.
    pub id: PointId,
    /// When the volume was so.
    pub time: Timestamp,
    /// What it promises.
    pub consistency: Consistency,
}

/// A tier that thins points out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spaced {
    /// One point for each of these.
    interval: Duration,
    /// As far back.
    age: Duration,
}

/// One tier of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    /// Every point, until it is this old.
    All(Duration),
    /// One point per interval, until it is so old.
    Spaced(Spaced),
    /// At most so many points, the newest.
    Count(u32),
}

/// Which recovery points to keep.
///
/// - `all:2h`, or just `2h`: every point younger than two hours.
/// - `1h:24h`: one point an hour, for 24 hours. The hours are those of the clock, UTC, and a
///   point stays until all of its hour is older than that. Of an hour's points the one that
///   promises most stays, of several the oldest.
/// - `#100`: of all that the others keep, or of all there are, the hundred newest.
///
/// Several are separated by commas; a point stays if any tier keeps it, within the count. Of
/// several `all` tiers, and of several with one interval, the longest counts, of several counts the
/// smallest. Durations end in `s`, `m`, `h` or `d`.
///
/// The newest point never expires.
///
/// ```
/// use libreplica::policy::Retention;
/// let keep: Retention = "2h,1h:24h,#100".parse()?;
/// assert_eq!(keep.to_string(), "all:2h,1h:24h,#100");
/// assert!("yesterday".parse::<Retention>().is_err());
/// # Ok::<(), libreplica::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    all: Option<Duration>,
    /// By interval, the shortest first.
    spaced: Vec<Spaced>,
    count: Option<u32>,
}

impl Default for Retention {
    /// `all:2h,1h:24h`.
    fn default() -> Self {
        const HOUR: Duration = Duration::from_secs(60 * 60);
        Self {
            all: Some(2 * HOUR),
            spaced: vec![Spaced {
                interval: HOUR,
                age: 24 * HOUR,
            }],
            count: None,
        }
    }
}

impl Retention {
    /// Of `points`, in any order, those that have expired at `now`, oldest first. Points that
    /// lie in the future, after a clock was set back, do not expire by age.
    pub fn expired(&self, points: &[Candidate], now: Timestamp) -> Vec<PointId> {
        let mut points = points.to_vec();
        points.sort_unstable_by_key(|point| (point.time, point.id));
        let mut kept: Vec<bool> = points
            .iter()
            .map(|point| self.is_young(point.time, now))
            .collect();
        for tier in &self.spaced {
            tier.mark(&points, now, &mut kept);
        }
        if let Some(newest) = kept.last_mut() {
            *newest = true;
        }
        let keeps = kept.iter().filter(|kept| **kept).count();
        let limit = self.count.map_or(usize::MAX, |count| count as usize);
        let surplus = keeps.saturating_sub(limit);
        for kept in kept.iter_mut().filter(|kept| **kept).take(surplus) {
            *kept = false;
        }
        let expired = points.iter().zip(kept).filter(|(_, kept)| !kept);
        expired.map(|(point, _)| point.id).collect()
    }

    /// Since when the moments between points are kept, where there are any: as far back as every
    /// point is. `None`: as far back as there are points, for they are only counted.
    pub fn moments_since(&self, now: Timestamp) -> Option<Timestamp> {
        let ages = self.all.is_some() || !self.spaced.is_empty();
        let age = self.all.unwrap_or_default().as_nanos();
        let since = i64::try_from(age).map_or(i64::MIN, |age| now.as_nanos().saturating_sub(age));
        ages.then(|| Timestamp::from_nanos(since))
    }

    fn is_young(&self, time: Timestamp, now: Timestamp) -> bool {
        match self.all {
            Some(age) => lived(i128::from(time.as_nanos()), now) <= nanos(age),
            None => self.spaced.is_empty(),
        }
    }

    fn from_tiers(tiers: &[Tier]) -> Self {
        let mut policy = Self {
            all: None,
            spaced: Vec::new(),
            count: None,
        };
        for tier in tiers {
            match *tier {
                Tier::All(age) => policy.all = policy.all.max(Some(age)),
                Tier::Spaced(tier) => policy.spaced.push(tier),
                Tier::Count(count) => {
                    policy.count = Some(policy.count.map_or(count, |other| other.min(count)));
                }
            }
        }
        let spaced = &mut policy.spaced;
        spaced.sort_unstable_by_key(|tier| (tier.interval, Reverse(tier.age)));
        spaced.dedup_by_key(|tier| tier.interval);
        policy
    }
}

impl Spaced {
    /// Marks those of `points`, which are in the order of time, that it keeps.
    fn mark(&self, points: &[Candidate], now: Timestamp, kept: &mut [bool]) {
        let length = nanos(self.interval).max(1);
        let bucket = |point: &Candidate| i128::from(point.time.as_nanos()).div_euclid(length);
        let mut first = 0;
        for points in points.chunk_by(|a, b| bucket(a) == bucket(b)) {
            let end = points.first().map(|point| (bucket(point) + 1) * length);
            if end.is_some_and(|end| lived(end, now) <= nanos(self.age)) {
                // Of equal ones `min_by_key` takes the first: the oldest.
                let best = points
                    .iter()
                    .enumerate()
                    .min_by_key(|(_, point)| Reverse(point.consistency));
                if let Some(kept) = best.and_then(|(n, _)| kept.get_mut(first + n)) {
                    *kept = true;
                }
            }
            first += points.len();
        }
    }
}

/// How long ago a time was, in nanoseconds.
fn lived(time: i128, now: Timestamp) -> i128 {
    i128::from(now.as_nanos()) - time
}

fn nanos(duration: Duration) -> i128 {
    i128::try_from(duration.as_nanos()).unwrap_or(i128::MAX)
}

impl FromStr for Retention {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |why: String| {
            Error::new(ErrorKind::Invalid, "read the retention policy")
                .detail(why)
                .advice("write for instance `24h`, `all:2h,1h:24h` or `all:2h,1h:24h,1d:14d,#200`")
        };
        let tiers: Option<Vec<Tier>> = text.split(',').map(|t| parse_tier(t.trim())).collect();
        let tiers = tiers.ok_or_else(|| invalid(format!("`{text}` is not a list of tiers")))?;
        for tier in &tiers {
            if let Tier::Spaced(Spaced { interval, age }) = *tier
                && interval > age
            {
                let (interval, age) = (Interval(interval), Age(age));
                return Err(invalid(format!(
                    "`{interval}:{age}` keeps points for less than their interval"
                )));
            }
        }
        Ok(Self::from_tiers(&tiers))
    }
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.all.map(|age| format!("all:{}", Age(age)));
        let spaced = self
            .spaced
            .iter()
            .map(|tier| format!("{}:{}", Interval(tier.interval), Age(tier.age)));
        let count = self.count.map(|count| format!("#{count}"));
        let tiers: Vec<String> = all.into_iter().chain(spaced).chain(count).collect();
        f.write_str(&tiers.join(","))
    }
}

fn parse_tier(text: &str) -> Option<Tier> {
    if let Some(count) = text.strip_prefix('#') {
        let count = plain_number(count)?.try_into().ok()?;
        return (count > 0).then_some(Tier::Count(count));
    }
    match text.split_once(':') {
        None => Some(Tier::All(parse_duration(text)?)),
        Some(("all", age)) => Some(Tier::All(parse_duration(age)?)),
        Some((interval, age)) => Some(Tier::Spaced(Spaced {
            interval: parse_duration(interval)?,
            age: parse_duration(age)?,
        })),
    }
}
