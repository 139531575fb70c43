//! Units: a type for each, so that an offset is never taken for a length, nor an
//! epoch for a sequence number. All are plain integers underneath; conversions
//! that can lose or overflow return `Option`.

use std::fmt;

macro_rules! unit {
    ($(#[$doc:meta])* $name:ident, $int:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name($int);

        impl $name {
            /// Zero of this unit.
            pub const ZERO: Self = Self(0);

            /// Wraps the plain number.
            pub const fn new(value: $int) -> Self {
                Self(value)
            }

            /// The plain number.
            pub const fn get(self) -> $int {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

unit!(
    /// A position on a volume, in bytes from its start.
    ByteOffset, u64
);
unit!(
    /// A number of bytes.
    ByteLen, u64
);
unit!(
    /// A position in a log file, in bytes from its start.
    FileOffset, u64
);
unit!(
    /// The number of an epoch: the changes between two barriers. The first is 1.
    Epoch, u64
);
unit!(
    /// The number of a record within its epoch, from 0, in order of completion.
    Sequence, u64
);
unit!(
    /// The number of a frame within its log, from 0.
    FrameNumber, u32
);
unit!(
    /// How often a volume was promoted; the first is 1.
    GenerationNumber, u64
);

impl ByteOffset {
    /// The position `len` bytes further on, or `None` past 2^64.
    pub fn checked_add(self, len: ByteLen) -> Option<Self> {
        self.0.checked_add(len.0).map(Self)
    }
}

impl Epoch {
    /// The epoch that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A byte range on a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    offset: ByteOffset,
    len: ByteLen,
}

impl Extent {
    /// A range of `len` bytes at `offset`; `None` if its end is past 2^64 - 1.
    pub fn new(offset: ByteOffset, len: ByteLen) -> Option<Self> {
        offset.checked_add(len).map(|_| Self { offset, len })
    }

    /// The range from `start` up to, not including, `end`; empty if `end` is not after `start`.
    pub fn between(start: ByteOffset, end: ByteOffset) -> Self {
        Self {
            offset: start,
            len: ByteLen(end.0.saturating_sub(start.0)),
        }
    }

    /// Where it begins.
    pub const fn offset(self) -> ByteOffset {
        self.offset
    }

    /// How long it is, in bytes.
    pub const fn len(self) -> ByteLen {
        self.len
    }

    /// Whether it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len.0 == 0
    }

    /// The first byte behind it.
    pub const fn end(self) -> ByteOffset {
        ByteOffset(self.offset.0 + self.len.0)
    }

    /// What this range and `other` have in common; `None` if nothing.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (start < end).then(|| Self::between(start, end))
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.offset, self.len)
    }
}

/// Bytes that one dirty bit covers: a power of two from 4 KiB to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockSize(u32);

impl BlockSize {
    /// The smallest block: 4 KiB.
    pub const MIN: Self = Self(4 << 10);
    /// The largest block: 1 MiB.
    pub const MAX: Self = Self(1 << 20);

    /// A block of `bytes`; `None` unless a power of two from 4 KiB to 1 MiB.
    pub const fn new(bytes: u32) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= Self::MIN.0 && bytes <= Self::MAX.0 {
            Some(Self(bytes))
        } else {
            None
        }
    }

    /// What a volume of this size gets unless told otherwise: 4 KiB up to 16 GiB,
    /// 16 KiB up to 256 GiB, 64 KiB above.
    pub const fn default_for(volume: VolumeSize) -> Self {
        const GIB: u64 = 1 << 30;
        match volume.get() {
            0..=0x4_0000_0000 => Self(4 << 10),
            n if n <= 256 * GIB => Self(16 << 10),
            _ => Self(64 << 10),
        }
    }

    /// In bytes.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The exponent: `1 << shift()` bytes.
    pub const fn shift(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// How many blocks cover `volume`; the last may be partial.
    pub const fn count_in(self, volume: VolumeSize) -> u64 {
        volume.get().div_ceil(self.0 as u64)
    }
}

/// The logical sector size of a device: the unit it reads and writes; a power of two
/// from 512 bytes to 64 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectorSize(u32);

impl SectorSize {
    /// 512 bytes.
    pub const B512: Self = Self(512);
    /// 4096 bytes: a "4Kn" device.
    pub const B4096: Self = Self(4096);

    /// A sector of `bytes`; `None` unless a power of two from 512 to 65536.
    pub const fn new(bytes: u32) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= 512 && bytes <= 65536 {
            Some(Self(bytes))
        } else {
            None
        }
    }

    /// In bytes.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// The size of a volume, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeSize(u64);

impl VolumeSize {
    /// A volume of `bytes`.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// In bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The whole of it as an extent.
    pub const fn extent(self) -> Extent {
        Extent {
            offset: ByteOffset::ZERO,
            len: ByteLen(self.0),
        }
    }
}

impl fmt::Display for VolumeSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A moment: nanoseconds since 1970-01-01 00:00:00 UTC, leap seconds not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From nanoseconds since the Unix epoch.
    pub const fn from_nanos(nanos: i64) -> Self {
        Self(nanos)
    }

    /// Nanoseconds since the Unix epoch.
    pub const fn as_nanos(self) -> i64 {
        self.0
    }

    /// The machine's clock now.
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self(since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_block_size_follows_volume_size() {
        const GIB: u64 = 1 << 30;
        let of = |bytes| BlockSize::default_for(VolumeSize::new(bytes)).get();
        assert_eq!(of(0), 4 << 10);
        assert_eq!(of(16 * GIB), 4 << 10);
        assert_eq!(of(16 * GIB + 1), 16 << 10);
        assert_eq!(of(256 * GIB), 16 << 10);
        assert_eq!(of(256 * GIB + 1), 64 << 10);
    }

    #[test]
    fn extent_refuses_an_end_past_the_address_space() {
        assert!(Extent::new(ByteOffset::new(u64::MAX), ByteLen::new(1)).is_none());
        assert!(Extent::new(ByteOffset::new(u64::MAX), ByteLen::ZERO).is_some());
    }

    #[test]
    fn intersection_is_what_both_hold() {
        let extent = |o, l| Extent::new(ByteOffset::new(o), ByteLen::new(l)).unwrap();
        assert_eq!(extent(0, 10).intersect(extent(5, 10)), Some(extent(5, 5)));
        assert_eq!(extent(0, 10).intersect(extent(10, 10)), None);
    }
}
