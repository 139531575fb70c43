//! Durations as a policy writes them: whole numbers of one unit, `90s`, `5m`, `24h`, `7d`.

use std::fmt;
use std::time::Duration;

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
pub(super) fn plain_number(text: &str) -> Option<u64> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        text.parse().ok()
    } else {
        None
    }
}

/// How long something is kept, in the largest unit that expresses it exactly; days only from
/// two on, so that the common `24h` stays as it was written.
pub(super) struct Age(pub Duration);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_secs() {
            86_400 => f.write_str("24h"),
            _ => Interval(self.0).fmt(f),
        }
    }
}

/// How far apart things are, in the largest unit that expresses it exactly: one a day is `1d`.
pub(super) struct Interval(pub Duration);

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = self.0.as_secs();
        match s {
            _ if s.is_multiple_of(86_400) => write!(f, "{}d", s / 86_400),
            _ if s.is_multiple_of(3_600) => write!(f, "{}h", s / 3_600),
            _ if s.is_multiple_of(60) => write!(f, "{}m", s / 60),
            _ => write!(f, "{s}s"),
        }
    }
}
