//! Moments as people and scripts write them: RFC 3339, always in UTC.

use std::str::FromStr;

use hrl_format::units::Timestamp;

use crate::error::{Error, ErrorKind, Result};

/// `2026-11-21T10:00:00.123456789Z`: RFC 3339 in UTC, the fraction as long as needed.
pub fn rfc3339(time: Timestamp) -> String {
    jiff::Timestamp::from_nanosecond(i128::from(time.as_nanos()))
        .map_or_else(|_| "unknown".to_owned(), |t| t.to_string())
}

/// Reads RFC 3339, any offset, any fraction down to nanoseconds.
///
/// # Errors
/// [`ErrorKind::Invalid`] when the text is not a time, or lies outside the years 1678 to 2262.
pub fn parse_rfc3339(text: &str) -> Result<Timestamp> {
    let invalid = || {
        Error::new(ErrorKind::Invalid, "read the time")
            .detail(format!("`{text}` is not RFC 3339"))
            .advice("write it as 2026-11-21T10:00:00Z")
    };
    let time = jiff::Timestamp::from_str(text).map_err(|source| invalid().source(source))?;
    i64::try_from(time.as_nanosecond())
        .map(Timestamp::from_nanos)
        .map_err(|_| invalid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_round_trip_to_the_nanosecond() {
        let time = Timestamp::from_nanos(1_795_255_200_123_456_789);
        assert_eq!(parse_rfc3339(&rfc3339(time)).unwrap(), time);
        assert!(parse_rfc3339("yesterday").is_err());
    }

    #[test]
    fn an_offset_is_taken_into_account() {
        let utc = parse_rfc3339("2026-11-21T10:00:00Z").unwrap();
        assert_eq!(parse_rfc3339("2026-11-21T12:00:00+02:00").unwrap(), utc);
    }
}
