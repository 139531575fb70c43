//! Quantities as operators write them: `30s`, `64KiB`, `/dev/sda2` or `4096+512`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use hrl_format::units::{BlockSize, ByteLen, ByteOffset, Extent};

/// What was written is not such a quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a duration.
    #[error("`{0}` is not a duration; write it as 500ms, 30s, 5m, 24h or 7d")]
    Duration(String),
    /// Not a size.
    #[error("`{0}` is not a size; write it as 4096, 64KiB or 1MiB")]
    Size(String),
    /// Not a block size.
    #[error("`{0}` is not a block size: a power of two from 4KiB to 1MiB expected")]
    Block(String),
    /// Not a range.
    #[error("`{0}` is not a range; write it as OFFSET+LENGTH, in bytes or with a unit")]
    Range(String),
}

/// A length of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DurationArg(pub Duration);

impl FromStr for DurationArg {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || QuantityError::Duration(text.to_owned());
        let (digits, unit) = split_unit(text);
        let count: u64 = digits.parse().map_err(|_| bad())?;
        let millis = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(bad()),
        };
        // A century is longer than any interval here, and far from overflow anywhere.
        let total = count
            .checked_mul(millis)
            .filter(|&ms| ms > 0 && ms < 100 * 366 * 86_400_000);
        total
            .map(|ms| Self(Duration::from_millis(ms)))
            .ok_or_else(bad)
    }
}

impl fmt::Display for DurationArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0.as_millis())
    }
}

/// A block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizeArg(pub BlockSize);

impl FromStr for BlockSizeArg {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = parse_bytes(text)?;
        let size = u32::try_from(bytes.get()).ok().and_then(BlockSize::new);
        size.map(Self)
            .ok_or_else(|| QuantityError::Block(text.to_owned()))
    }
}

/// Reads a number of bytes, with or without a unit.
///
/// # Errors
/// [`QuantityError::Size`] when it is none.
pub fn parse_bytes(text: &str) -> Result<ByteLen, QuantityError> {
    let bad = || QuantityError::Size(text.to_owned());
    let (digits, unit) = split_unit(text);
    let count: u64 = digits.parse().map_err(|_| bad())?;
    let scale: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(bad()),
    };
    count.checked_mul(scale).map(ByteLen::new).ok_or_else(bad)
}

/// Reads `OFFSET+LENGTH`.
///
/// # Errors
/// [`QuantityError::Range`] or [`QuantityError::Size`] when it is none.
pub fn parse_range(text: &str) -> Result<Extent, QuantityError> {
    let bad = || QuantityError::Range(text.to_owned());
    let (offset, len) = text.split_once('+').ok_or_else(bad)?;
    let offset = ByteOffset::new(parse_bytes(offset)?.get());
    Extent::new(offset, parse_bytes(len)?)
        .filter(|extent| !extent.is_empty())
        .ok_or_else(bad)
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let of = |text: &str| text.parse::<DurationArg>().map(|d| d.0);
        assert_eq!(of("30s").unwrap(), Duration::from_secs(30));
        assert_eq!(of("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(of("24h").unwrap(), Duration::from_secs(86_400));
        for bad in [
            "",
            "s",
            "30",
            "0s",
            "-1s",
            "1y",
            "99999999999999999999s",
            "200000d",
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_and_ranges() {
        assert_eq!(parse_bytes("64KiB").unwrap().get(), 65_536);
        assert_eq!(parse_bytes("1MB").unwrap().get(), 1_000_000);
        assert!(parse_bytes("99999999TiB").is_err());
        assert_eq!("64KiB".parse::<BlockSizeArg>().unwrap().0.get(), 65_536);
        assert!("5000".parse::<BlockSizeArg>().is_err());
        let range = parse_range("1MiB+4096").unwrap();
        assert_eq!((range.offset().get(), range.len().get()), (1 << 20, 4096));
        assert!(parse_range("5").is_err());
        assert!(parse_range("5+0").is_err());
    }
}
