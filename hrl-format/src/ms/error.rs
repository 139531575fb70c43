//! What can be wrong with an [MS-HRL] file: reading stops at the first, a check collects.

use std::fmt;
use std::io;

use crate::units::{ByteLen, ByteOffset, FileOffset};

/// Why an [MS-HRL] file could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system failed to read or write.
    #[error("{operation}: {source}")]
    Io {
        /// During what.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It does not begin as an [MS-HRL] file does.
    #[error("not an [MS-HRL] file: it does not begin with `msctlog `")]
    NotMsHrl,
    /// Of a version, file type or with flags that this version does not know.
    #[error("{0} is not known to this version")]
    Unsupported(Unknown),
    /// It was never closed: nothing tells where its metadata ends.
    #[error("the log was not closed properly: its header does not say where it ends")]
    NotClosed,
    /// It does not hold what it must.
    #[error(transparent)]
    Damaged(Finding),
    /// A write too long for its 32-bit length field, or past the end of all addresses.
    #[error("a write of {len} bytes at byte {offset} cannot be told in this format")]
    TooLong {
        /// Where it goes on the volume.
        offset: ByteOffset,
        /// How long it is.
        len: ByteLen,
    },
}

impl Error {
    pub(super) const fn damaged(at: u64, damage: Damage) -> Self {
        Self::Damaged(Finding::new(at, damage))
    }
}

/// Something that a later version may have brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unknown {
    /// The field LogFormatVersion.
    Version(u32),
    /// The field FileType.
    FileType(u32),
    /// The field Flags.
    Flags(u16),
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Version(version) => write!(f, "format version {version:#010x}"),
            Self::FileType(kind) => write!(f, "file type {kind}"),
            Self::Flags(flags) => write!(f, "flags {flags:#06x}"),
        }
    }
}

/// One thing wrong, and where in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {damage}")]
pub struct Finding {
    /// The offset in the file.
    pub at: FileOffset,
    /// What is wrong there.
    pub damage: Damage,
}

impl Finding {
    pub(super) const fn new(at: u64, damage: Damage) -> Self {
        Self {
            at: FileOffset::new(at),
            damage,
        }
    }
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// The file ends before the header does.
    #[error("the file ends within its header")]
    ShortHeader,
    /// The file header's bytes do not add up.
    #[error("the header's checksum does not agree with it")]
    HeaderChecksum,
    /// MetadataSize is no multiple of 512 or zero.
    #[error("metadata blocks of {0} bytes: a multiple of 512 expected")]
    MetadataSize(u32),
    /// EOLLocation leaves no room for a metadata block or is past the file's end.
    #[error("the log ends at byte {eol}, which its file has not")]
    EndOfLog {
        /// What the header says.
        eol: FileOffset,
    },
    /// The distance to the block before leads into the header or into this block.
    #[error("the metadata block before this one would lie {0} bytes back, where none can be")]
    Distance(u64),
    /// A metadata header's bytes do not add up.
    #[error("the metadata header's checksum does not agree with it")]
    MetadataChecksum,
    /// More entries than a block has room for.
    #[error("a metadata block with {0} entries has no room for them")]
    TooManyEntries(u32),
    /// An entry's bytes do not add up.
    #[error("the entry's checksum does not agree with it")]
    EntryChecksum,
    /// The operation is not a write.
    #[error("the entry's operation is {0}: 1, a write, expected")]
    Operation(u8),
    /// The data is said to lie elsewhere.
    #[error("the entry's data is said to be at location {0}: 0 expected")]
    Location(u8),
    /// The end of the range on the volume is past 2^64.
    #[error("the entry's range on the volume ends past all addresses")]
    Range,
    /// The data runs into the metadata block behind it.
    #[error("the entry's {0} bytes of data run into the metadata that describes them")]
    DataOverlap(u32),
    /// The data's bytes do not add up.
    #[error("the data's checksum does not agree with it")]
    DataChecksum,
}
