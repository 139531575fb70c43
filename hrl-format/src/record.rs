//! Records: what a log holds. One record is one captured change, or a mark in the
//! stream of changes (a recovery point, a new size).

use std::fmt;
use std::str::FromStr;

use crate::id::{GroupId, PointId};
use crate::units::{Extent, Timestamp, VolumeSize};

/// What a recovery point promises of what it holds. Ordered: each promises what those
/// before it do, and more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Consistency {
    /// As after pulling the plug: all writes up to one moment, none after it.
    Crash,
    /// Filesystems were frozen or unmounted: they mount without repair.
    Filesystem,
    /// Applications were asked to be consistent, too, by hooks before and after.
    Application,
}

impl Consistency {
    /// As it is written on the command line and in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Filesystem => "filesystem",
            Self::Application => "application",
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The text was none of `crash`, `filesystem`, `application`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a consistency: crash, filesystem or application expected")]
pub struct ParseConsistencyError(String);

impl FromStr for Consistency {
    type Err = ParseConsistencyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "crash" => Ok(Self::Crash),
            "filesystem" => Ok(Self::Filesystem),
            "application" => Ok(Self::Application),
            other => Err(ParseConsistencyError(other.to_owned())),
        }
    }
}

/// The root of a volume's digest tree: 32 bytes of BLAKE3. It says what every block of
/// the image must be at a point.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Root([u8; 32]);

impl Root {
    /// From its 32 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Root({self})")
    }
}

/// A recovery point, as it stands in the log: the state after all records before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Which point.
    pub id: PointId,
    /// When the state was so.
    pub time: Timestamp,
    /// What it promises.
    pub consistency: Consistency,
    /// What the operator called it; at most [`Tag::LABEL_MAX`] bytes.
    pub label: String,
    /// The point that other volumes share, if it is a group's.
    pub group: Option<GroupId>,
    /// The digest tree's root at the point, if it was known.
    pub root: Option<Root>,
}

impl Tag {
    /// The longest label, in bytes of UTF-8.
    pub const LABEL_MAX: usize = 1024;
}

/// One change to a volume, or a mark between changes. `D` is the data: borrowed when
/// written, owned or borrowed when read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record<D> {
    /// Bytes written. `data` is exactly as long as `extent`.
    Write {
        /// Where.
        extent: Extent,
        /// What.
        data: D,
    },
    /// The range reads as zeroes from here on.
    Zeroes {
        /// Where.
        extent: Extent,
    },
    /// The range's content no longer matters: it is undefined until written again, and
    /// an image reads zeroes there.
    Discard {
        /// Where.
        extent: Extent,
    },
    /// A recovery point.
    Tag(Tag),
    /// The volume has this size from here on.
    Resize {
        /// The new size.
        size: VolumeSize,
    },
}

impl<D> Record<D> {
    /// The range it changes; `None` for marks.
    pub const fn extent(&self) -> Option<Extent> {
        match self {
            Self::Write { extent, .. } | Self::Zeroes { extent } | Self::Discard { extent } => {
                Some(*extent)
            }
            Self::Tag(_) | Self::Resize { .. } => None,
        }
    }
}
