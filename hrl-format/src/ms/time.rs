//! Times of [MS-HRL]: seconds since the year 2000, in 32 bits.

use std::fmt;

use crate::units::Timestamp;

/// Unix time of 2000-01-01 00:00:00 UTC, in seconds.
const YEAR_2000: i64 = 946_684_800;
const NANOS: i64 = 1_000_000_000;

/// Seconds since 2000-01-01 00:00:00 UTC; the last is in February 2136.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MsTime(u32);

impl MsTime {
    /// From the number in the file.
    pub const fn from_seconds(seconds: u32) -> Self {
        Self(seconds)
    }

    /// The number in the file.
    pub const fn seconds(self) -> u32 {
        self.0
    }

    /// The second that `time` is in; the first or last there is if it lies outside.
    pub fn from_timestamp(time: Timestamp) -> Self {
        let seconds = time.as_nanos().div_euclid(NANOS) - YEAR_2000;
        Self(seconds.clamp(0, i64::from(u32::MAX)) as u32)
    }

    /// The start of the second.
    pub const fn to_timestamp(self) -> Timestamp {
        Timestamp::from_nanos((self.0 as i64 + YEAR_2000) * NANOS)
    }
}

impl fmt::Display for MsTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_sample_is_of_2017() {
        // 539842381 s after 2000-01-01 is 2017-02-08 04:33:01 UTC.
        let time = MsTime::from_seconds(539_842_381);
        assert_eq!(time.to_timestamp().as_nanos() / NANOS, 1_486_527_181);
        assert_eq!(MsTime::from_timestamp(time.to_timestamp()), time);
    }

    #[test]
    fn times_outside_are_the_nearest_there_is() {
        let of = |nanos| MsTime::from_timestamp(Timestamp::from_nanos(nanos)).seconds();
        assert_eq!(of(0), 0);
        assert_eq!(of(i64::MIN), 0);
        assert_eq!(of((YEAR_2000 + 1) * NANOS - 1), 0);
        assert_eq!(of(i64::MAX), u32::MAX);
        let last = MsTime::from_seconds(u32::MAX);
        assert_eq!(MsTime::from_timestamp(last.to_timestamp()), last);
    }
}
