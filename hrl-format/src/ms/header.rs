//! The file header: 4096 bytes at offset 0.

use zerocopy::little_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::{Damage, Error, Unknown};
use super::sum::checksum;
use super::time::MsTime;
use super::{Finding, HEADER_LEN};
use crate::units::{ByteLen, FileOffset};

const COOKIE: [u8; 8] = *b"msctlog ";
const CREATOR: [u8; 4] = *b"ct  ";
const CREATOR_VERSION: u32 = 0x000a_0000;
const VERSION_1: u32 = 0x0001_0000;
const VERSION_2: u32 = 0x0002_0000;
const LEN: usize = HEADER_LEN as usize;
/// Where the field Checksum lies.
const CHECKSUM_AT: usize = 40;

/// Which of the two versions of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatVersion {
    /// Local to Windows Server 2012; read only.
    V1,
    /// Published; what we write.
    V2,
}

/// The file header of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The version of the format.
    pub version: FormatVersion,
    /// When the log was created.
    pub created: MsTime,
    /// Its size when created; not verified.
    pub original_size: ByteLen,
    /// Its size now; not verified.
    pub current_size: ByteLen,
    /// Where the log ends: behind its last metadata block. Zero while it is open.
    pub end_of_log: FileOffset,
    /// The error that its writer met; no prose in the specification.
    pub error_code: i32,
    /// Bytes of a metadata block.
    pub metadata_size: u32,
    /// The id of this log.
    pub id: [u8; 16],
    /// The id of the log before it; zeroes if none.
    pub previous: [u8; 16],
    /// When it was last written; no prose in the specification.
    pub modified: MsTime,
    /// How many entries it has; no prose in the specification.
    pub entries: u64,
    /// The data-write id of the VHDX when the log was written: another one now means that
    /// the disk was changed offline. Zeroes in version 1.
    pub data_write: [u8; 16],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    cookie: [u8; 8],
    version: U32,
    created: U32,
    creator: [u8; 4],
    creator_version: U32,
    original_size: U64,
    current_size: U64,
    checksum: U32,
    end_of_log: U64,
    error_code: I32,
    metadata_size: U32,
    id: [u8; 16],
    previous: [u8; 16],
    modified: U32,
    entries: U64,
    file_type: U32,
    flags: U16,
    data_write: [u8; 16],
    reserved: [u8; 3970],
}

const _: () = assert!(size_of::<Raw>() == LEN);
const _: () = assert!(std::mem::offset_of!(Raw, checksum) == CHECKSUM_AT);

/// Whether a file that begins with these bytes, eight of them or more, is one of [MS-HRL].
pub fn is_ms_hrl(start: &[u8]) -> bool {
    start.starts_with(&COOKIE)
}

impl Header {
    /// The 4096 bytes.
    pub fn encode(&self) -> Box<[u8; LEN]> {
        let mut raw = Raw::new_zeroed();
        raw.cookie = COOKIE;
        raw.version = match self.version {
            FormatVersion::V1 => VERSION_1.into(),
            FormatVersion::V2 => VERSION_2.into(),
        };
        raw.created = self.created.seconds().into();
        raw.creator = CREATOR;
        raw.creator_version = CREATOR_VERSION.into();
        raw.original_size = self.original_size.get().into();
        raw.current_size = self.current_size.get().into();
        raw.end_of_log = self.end_of_log.get().into();
        raw.error_code = self.error_code.into();
        raw.metadata_size = self.metadata_size.into();
        raw.id = self.id;
        raw.previous = self.previous;
        raw.modified = self.modified.seconds().into();
        raw.entries = self.entries.into();
        if self.version == FormatVersion::V2 {
            raw.data_write = self.data_write;
        }
        raw.checksum = checksum(&[raw.as_bytes()]).into();
        let mut bytes = Box::new([0; LEN]);
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// The header as its fields say, its checksum not judged: reading does that, and
    /// checking.
    ///
    /// # Errors
    /// [`Error::NotMsHrl`], or [`Error::Unsupported`].
    pub fn decode(bytes: &[u8; LEN]) -> Result<Self, Error> {
        if !is_ms_hrl(bytes) {
            return Err(Error::NotMsHrl);
        }
        let raw = Raw::ref_from_bytes(bytes).map_err(|_| Error::NotMsHrl)?;
        let version = match raw.version.get() {
            VERSION_1 => FormatVersion::V1,
            VERSION_2 => FormatVersion::V2,
            other => return Err(Error::Unsupported(Unknown::Version(other))),
        };
        if raw.file_type.get() != 0 {
            return Err(Error::Unsupported(Unknown::FileType(raw.file_type.get())));
        }
        if raw.flags.get() != 0 {
            return Err(Error::Unsupported(Unknown::Flags(raw.flags.get())));
        }
        Ok(Self {
            version,
            created: MsTime::from_seconds(raw.created.get()),
            original_size: ByteLen::new(raw.original_size.get()),
            current_size: ByteLen::new(raw.current_size.get()),
            end_of_log: FileOffset::new(raw.end_of_log.get()),
            error_code: raw.error_code.get(),
            metadata_size: raw.metadata_size.get(),
            id: raw.id,
            previous: raw.previous,
            modified: MsTime::from_seconds(raw.modified.get()),
            entries: raw.entries.get(),
            data_write: match version {
                FormatVersion::V1 => [0; 16],
                FormatVersion::V2 => raw.data_write,
            },
        })
    }

    /// What is wrong if the checksum in `bytes` is not that of the header.
    pub(super) fn checksum_finding(bytes: &[u8; LEN]) -> Option<Finding> {
        let field = CHECKSUM_AT..CHECKSUM_AT + 4;
        let found = checksum(&[&bytes[..field.start], &bytes[field.end..]]);
        (bytes[field] != found.to_le_bytes())
            .then_some(Finding::new(CHECKSUM_AT as u64, Damage::HeaderChecksum))
    }

    /// What is wrong with the fields that lead to the metadata, for a file of `file_len` bytes.
    pub(super) const fn bounds(&self, file_len: u64) -> Result<(), Error> {
        if self.metadata_size == 0 || !self.metadata_size.is_multiple_of(512) {
            let damage = Damage::MetadataSize(self.metadata_size);
            return Err(Error::damaged(56, damage));
        }
        if self.end_of_log.get() == 0 {
            return Err(Error::NotClosed);
        }
        let least = HEADER_LEN + self.metadata_size as u64;
        if self.end_of_log.get() < least || self.end_of_log.get() > file_len {
            let eol = self.end_of_log;
            return Err(Error::damaged(44, Damage::EndOfLog { eol }));
        }
        Ok(())
    }
}
