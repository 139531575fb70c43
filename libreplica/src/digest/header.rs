//! The header of the tree's file: whose tree it is, up to which epoch, and whether an
//! update was going on. It lies within the first 512 bytes, which a disk writes as one.

use hrl_format::id::{Generation, GenerationId, VolumeId};
use hrl_format::record::Root;
use hrl_format::units::{BlockSize, Epoch, GenerationNumber, SectorSize, VolumeSize};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::geometry::Geometry;

/// Bytes in front of the region entries; those behind the header proper are zeroes.
pub(super) const HEADER_SPACE: u64 = 4096;

const MAGIC: [u8; 8] = *b"\x8atree\r\n\x1a";
const VERSION: u32 = 1;
const CLEAN: u32 = 0;
const APPLYING: u32 = 1;

/// The header as decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub volume: VolumeId,
    pub generation: Generation,
    pub geometry: Geometry,
    /// Names the leaf function; see [`super::LeafFunction`].
    pub function: [u8; 16],
    /// The last epoch applied as a whole; zero if none.
    pub epoch: Epoch,
    /// The epoch being applied.
    pub applying: Option<Epoch>,
    /// The root after `epoch`, if every leaf was known.
    pub root: Option<Root>,
}

/// Why a header is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadHeader {
    /// The magic is another's.
    Magic,
    /// The checksum is wrong, or a field makes no sense.
    Damaged,
    /// A later version.
    Version(u32),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U32,
    state: U32,
    volume: [u8; 16],
    generation_id: [u8; 16],
    generation: U64,
    size: U64,
    block: U32,
    sector: U32,
    function: [u8; 16],
    epoch: U64,
    applying: U64,
    root_known: U32,
    root: [u8; 32],
    crc: U32,
}

const LEN: usize = size_of::<Raw>();
const _: () = assert!(LEN <= 512);

impl Header {
    /// How many bytes [`Self::encode`] gives.
    pub(super) const LEN: usize = LEN;

    pub(super) fn encode(&self) -> [u8; LEN] {
        let mut raw = Raw {
            magic: MAGIC,
            version: VERSION.into(),
            state: if self.applying.is_some() {
                APPLYING
            } else {
                CLEAN
            }
            .into(),
            volume: *self.volume.as_bytes(),
            generation_id: *self.generation.id.as_bytes(),
            generation: self.generation.number.get().into(),
            size: self.geometry.size.get().into(),
            block: self.geometry.block.get().into(),
            sector: self.geometry.sector.get().into(),
            function: self.function,
            epoch: self.epoch.get().into(),
            applying: self.applying.unwrap_or(Epoch::ZERO).get().into(),
            root_known: u32::from(self.root.is_some()).into(),
            root: self.root.map_or([0; 32], |root| *root.as_bytes()),
            crc: 0.into(),
        };
        raw.crc = crc32fast::hash(&raw.as_bytes()[..LEN - 4]).into();
        let mut bytes = [0; LEN];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; LEN]) -> Result<Self, BadHeader> {
        let raw = Raw::read_from_bytes(bytes).map_err(|_| BadHeader::Damaged)?;
        if raw.magic != MAGIC {
            return Err(BadHeader::Magic);
        }
        if crc32fast::hash(&bytes[..LEN - 4]) != raw.crc.get() {
            return Err(BadHeader::Damaged);
        }
        if raw.version.get() != VERSION {
            return Err(BadHeader::Version(raw.version.get()));
        }
        let (Some(block), Some(sector)) = (
            BlockSize::new(raw.block.get()),
            SectorSize::new(raw.sector.get()),
        ) else {
            return Err(BadHeader::Damaged);
        };
        Ok(Self {
            volume: VolumeId::from_bytes(raw.volume),
            generation: Generation {
                number: GenerationNumber::new(raw.generation.get()),
                id: GenerationId::from_bytes(raw.generation_id),
            },
            geometry: Geometry {
                size: VolumeSize::new(raw.size.get()),
                block,
                sector,
            },
            function: raw.function,
            epoch: Epoch::new(raw.epoch.get()),
            applying: (raw.state.get() == APPLYING).then(|| Epoch::new(raw.applying.get())),
            root: (raw.root_known.get() == 1).then(|| Root::from_bytes(raw.root)),
        })
    }
}
