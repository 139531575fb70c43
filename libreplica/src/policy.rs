//! Policy: how much capture keeps when the target is behind, and which recovery points are
//! kept. A policy is a list of tiers, written as
//! one word (`all:24h,#100`). It only names the points that have expired; dropping them, and
//! what must not be dropped because it is in use, is the store's matter. Pure: the time
//! is an argument.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use hrl_format::id::PointId;
use hrl_format::units::Timestamp;

use crate::error::{Error, ErrorKind};

/// How much capture knows of what changed. It falls when the target is behind, and climbs
/// back by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Which blocks.
    #[default]
    Bitmap,
    /// Which extents, in which order.
    Metadata,
    /// Every write with its data, in order.
    Data,
}

impl Mode {
    /// As it stands in JSON: a lower-case word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bitmap => "bitmap",
            Self::Metadata => "metadata",
            Self::Data => "data",
        }
    }
}

/// One tier of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    /// Every point, until it is this old.
    All(Duration),
    /// At most so many points, the newest.
    Count(u32),
    /// One point per interval, until it is so old. Understood, not supported yet.
    Spaced { interval: Duration, age: Duration },
}

/// Which recovery points to keep.
///
/// `all:24h`, or just `24h`: every point younger than a day. `#100`: the hundred newest.
/// Both, `all:24h,#100`: those younger than a day, of them at most the hundred newest. Of
/// several `all` tiers the longest counts, of several counts the smallest. Durations end in
/// `s`, `m`, `h` or `d`. Tiers that thin points out (`1h:30d`: one an hour, for thirty days)
/// are read, and refused as [`ErrorKind::Unsupported`].
///
/// The newest point never expires.
///
/// ```
/// use libreplica::policy::Retention;
/// let keep: Retention = "24h,#100".parse()?;
/// assert_eq!(keep.to_string(), "all:24h,#100");
/// assert!("yesterday".parse::<Retention>().is_err());
/// # Ok::<(), libreplica::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    age: Option<Duration>,
    count: Option<u32>,
}

impl Default for Retention {
    /// `all:24h`.
    fn default() -> Self {
        Self {
            age: Some(Duration::from_secs(24 * 60 * 60)),
            count: None,
        }
    }
}

impl Retention {
    /// Of `points`, in any order, those that have expired at `now`, oldest first. Points that
    /// lie in the future, after a clock was set back, do not expire by age.
    pub fn expired(&self, points: &[(PointId, Timestamp)], now: Timestamp) -> Vec<PointId> {
        let mut points: Vec<_> = points.iter().map(|&(id, time)| (time, id)).collect();
        points.sort_unstable();
        let Some((_newest, older)) = points.split_last() else {
            return Vec::new();
        };
        let spare = match self.count {
            Some(count) => points.len().saturating_sub(count as usize),
            None => 0,
        };
        let too_old = |time: Timestamp| match self.age {
            Some(age) => {
                let lived = i128::from(now.as_nanos()) - i128::from(time.as_nanos());
                lived > i128::try_from(age.as_nanos()).unwrap_or(i128::MAX)
            }
            None => false,
        };
        let expired = older
            .iter()
            .enumerate()
            .filter(|(place, (time, _))| *place < spare || too_old(*time));
        expired.map(|(_, &(_, id))| id).collect()
    }

    fn from_tiers(tiers: &[Tier]) -> Result<Self, Error> {
        let mut policy = Self {
            age: None,
            count: None,
        };
        for tier in tiers {
            match *tier {
                Tier::All(age) => policy.age = policy.age.max(Some(age)),
                Tier::Count(count) => {
                    policy.count = Some(policy.count.map_or(count, |other| other.min(count)));
                }
                Tier::Spaced { interval, age } => {
                    return Err(
                        Error::new(ErrorKind::Unsupported, "read the retention policy")
                            .detail(format!(
                                "`{}:{}` thins points out, which this version cannot do yet",
                                Text(interval),
                                Text(age)
                            ))
                            .advice("use `all:AGE` and `#COUNT` only"),
                    );
                }
            }
        }
        Ok(policy)
    }
}

impl FromStr for Retention {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let tiers: Option<Vec<Tier>> = text.split(',').map(|t| parse_tier(t.trim())).collect();
        match tiers {
            Some(tiers) => Self::from_tiers(&tiers),
            None => Err(Error::new(ErrorKind::Invalid, "read the retention policy")
                .detail(format!("`{text}` is not a list of tiers"))
                .advice("write for instance `24h`, `all:7d` or `all:24h,#100`")),
        }
    }
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.age, self.count) {
            (Some(age), Some(count)) => write!(f, "all:{},#{count}", Text(age)),
            (Some(age), None) => write!(f, "all:{}", Text(age)),
            (None, Some(count)) => write!(f, "#{count}"),
            (None, None) => Ok(()),
        }
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
        Some((interval, age)) => Some(Tier::Spaced {
            interval: parse_duration(interval)?,
            age: parse_duration(age)?,
        }),
    }
}

/// A whole number of seconds, minutes, hours or days (`90s`, `5m`, `24h`, `7d`), not zero;
/// `None` if it is written otherwise or does not fit.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        _ => return None,
    };
    let number = plain_number(text.strip_suffix(unit)?)?;
    let duration = Duration::from_secs(number.checked_mul(seconds)?);
    (!duration.is_zero()).then_some(duration)
}

/// Digits only: `u64::from_str` would take a plus sign, too.
fn plain_number(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

/// A duration in the largest unit that expresses it exactly; days only from two on, so that
/// the common `24h` stays as it was written.
struct Text(Duration);

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0.as_secs();
        match s {
            _ if s.is_multiple_of(86_400) && s > 86_400 => write!(f, "{}d", s / 86_400),
            _ if s.is_multiple_of(3_600) => write!(f, "{}h", s / 3_600),
            _ if s.is_multiple_of(60) => write!(f, "{}m", s / 60),
            _ => write!(f, "{s}s"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_nanos(seconds * 1_000_000_000)
    }

    fn points(times: &[i64]) -> Vec<(PointId, Timestamp)> {
        let point = |s: &i64| (PointId::at(at(*s)).unwrap(), at(*s));
        times.iter().map(point).collect()
    }

    fn kept(policy: &str, times: &[i64], now: i64) -> Vec<i64> {
        let points = points(times);
        let gone = policy
            .parse::<Retention>()
            .unwrap()
            .expired(&points, at(now));
        let kept = points.iter().filter(|(id, _)| !gone.contains(id));
        kept.map(|(_, time)| time.as_nanos() / 1_000_000_000)
            .collect()
    }

    #[test]
    fn every_spelling_means_what_it_prints() {
        for (text, printed) in [
            ("24h", "all:24h"),
            ("all:24h", "all:24h"),
            ("1d", "all:24h"),
            ("#100", "#100"),
            ("90s,#3", "all:90s,#3"),
            ("all:2h,all:7d,#9,#3", "all:7d,#3"),
            (" 5m , #1", "all:5m,#1"),
        ] {
            let policy: Retention = text.parse().unwrap();
            assert_eq!(policy.to_string(), printed, "{text}");
            assert_eq!(printed.parse::<Retention>().unwrap(), policy);
        }
        assert_eq!(Retention::default(), "24h".parse().unwrap());
    }

    #[test]
    fn nonsense_is_invalid_and_thinning_is_unsupported() {
        for bad in [
            "",
            "24",
            "h",
            "24h,",
            "all",
            "all:",
            "#0",
            "#",
            "#-1",
            "0h",
            "+1h",
            "-1h",
            "1.5h",
            "24H",
            "1h:",
            ":1h",
            "every:1h",
            "99999999999999999999d",
            "213503982334602d",
            "1h:2h:3h",
            "\u{661}h",
        ] {
            let error = bad.parse::<Retention>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}: {error}");
        }
        let error = "all:2h,1h:24h".parse::<Retention>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("`1h:24h`"), "{error}");
    }

    #[test]
    fn age_and_count_drop_the_oldest_and_never_the_newest() {
        assert_eq!(kept("10s", &[100, 89, 90, 95], 100), [100, 90, 95]);
        assert_eq!(kept("#2", &[1, 2, 3, 4], 100), [3, 4]);
        assert_eq!(kept("10s,#1", &[95, 96, 97], 100), [97]);
        assert_eq!(kept("#5,10s", &[1, 2, 95], 100), [95]);
        assert_eq!(kept("1s", &[1, 2, 3], 1_000_000), [3]);
        assert_eq!(kept("1s", &[500, 90], 100), [500]);
        assert_eq!(kept("1s", &[], 100), [] as [i64; 0]);
    }
}
