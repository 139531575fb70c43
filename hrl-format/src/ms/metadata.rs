//! Metadata blocks: a header of 32 bytes, then entries of 32 bytes, each one write.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::error::Damage;
use super::sum::checksum;
use super::time::MsTime;
use crate::units::{ByteLen, ByteOffset, Extent};

/// Bytes of a metadata block's header, and of an entry.
pub(super) const UNIT: usize = 32;
/// The only operation there is.
const WRITE: u8 = 1;

/// The head of a metadata block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockHeader {
    /// How far back the block before it begins; zero for the first.
    pub distance: u64,
    /// How many entries follow.
    pub entries: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    distance: U64,
    entries: U32,
    checksum: U32,
    reserved: [u8; 16],
}

impl BlockHeader {
    pub(super) fn encode(self) -> [u8; UNIT] {
        let mut raw = RawHeader::new_zeroed();
        raw.distance = self.distance.into();
        raw.entries = self.entries.into();
        raw.checksum = checksum(&[raw.as_bytes()]).into();
        zerocopy::transmute!(raw)
    }

    /// The header, and whether its checksum agrees.
    pub(super) fn decode(bytes: &[u8; UNIT]) -> (Self, Option<Damage>) {
        let raw: &RawHeader = zerocopy::transmute_ref!(bytes);
        let header = Self {
            distance: raw.distance.get(),
            entries: raw.entries.get(),
        };
        let agrees = raw.checksum.get() == checksum(&[&bytes[..12], &bytes[16..]]);
        (header, (!agrees).then_some(Damage::MetadataChecksum))
    }
}

/// One write, as its metadata tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where on the volume.
    pub extent: Extent,
    /// When.
    pub time: MsTime,
    /// The checksum of the data; zero if there is none.
    pub data_checksum: u32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    offset: U64,
    checksum: U32,
    len: U32,
    time: U32,
    operation: u8,
    data_checksum: [u8; 4],
    location: u8,
    reserved: [u8; 6],
}

impl Entry {
    /// Its 32 bytes; `None` if it is longer than a 32-bit length field can say.
    pub fn encode(&self) -> Option<[u8; UNIT]> {
        let mut raw = RawEntry::new_zeroed();
        raw.offset = self.extent.offset().get().into();
        raw.len = u32::try_from(self.extent.len().get()).ok()?.into();
        raw.time = self.time.seconds().into();
        raw.operation = WRITE;
        raw.data_checksum = self.data_checksum.to_le_bytes();
        raw.checksum = checksum(&[raw.as_bytes()]).into();
        Some(zerocopy::transmute!(raw))
    }

    /// The entry.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8; UNIT]) -> Result<Self, Damage> {
        let raw: &RawEntry = zerocopy::transmute_ref!(bytes);
        if raw.checksum.get() != checksum(&[&bytes[..8], &bytes[12..]]) {
            return Err(Damage::EntryChecksum);
        }
        if raw.operation != WRITE {
            return Err(Damage::Operation(raw.operation));
        }
        if raw.location != 0 {
            return Err(Damage::Location(raw.location));
        }
        let offset = ByteOffset::new(raw.offset.get());
        let len = ByteLen::new(u64::from(raw.len.get()));
        Ok(Self {
            extent: Extent::new(offset, len).ok_or(Damage::Range)?,
            time: MsTime::from_seconds(raw.time.get()),
            data_checksum: u32::from_le_bytes(raw.data_checksum),
        })
    }
}
