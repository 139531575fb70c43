//! What to track, and where its pins are. Attaching and adopting take the same description,
//! so that an adopted tracker is known to be the one that was meant.

use std::fmt;
use std::path::PathBuf;

use crate::capture::pins;
use crate::device::BlockDevice;
use crate::geometry::Geometry;
use crate::id::VolumeId;
use crate::units::BlockSize;

/// The identity of the state folder that a tracker belongs to, so that two agents on one
/// machine never take each other's pins.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct FolderId([u8; 16]);

impl FolderId {
    /// From its 16 bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// From 32 hexadecimal digits, as it is shown; `None` for anything else.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let digit = |digit: u8| char::from(digit).to_digit(16);
        let bytes: Option<Vec<u8>> = pairs
            .iter()
            .map(|&[high, low]| u8::try_from(digit(high)? << 4 | digit(low)?).ok())
            .collect();
        let bytes = bytes.filter(|_| rest.is_empty())?;
        bytes.try_into().ok().map(Self)
    }
}

impl fmt::Display for FolderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FolderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FolderId({self})")
    }
}

/// What a tracker is for. Attach and adopt take the same, and compare it with the pins.
#[derive(Clone, Debug)]
pub struct AttachSpec {
    /// The folder in a BPF file system that holds a folder of pins for each volume.
    pub pins: PathBuf,
    /// Whose pins they are.
    pub folder: FolderId,
    /// The volume.
    pub volume: VolumeId,
    /// The disk it is on.
    pub disk: BlockDevice,
    /// What one dirty bit covers.
    pub block: BlockSize,
    /// How many writes can be noted as in flight at a time; 88 bytes of kernel memory each.
    /// One more, and the whole volume counts as dirty.
    pub in_flight: u32,
}

impl AttachSpec {
    /// Where pins are unless told otherwise.
    pub const PINS: &str = "/sys/fs/bpf/replica";
    /// How many writes in flight there is room for unless told otherwise: several times the
    /// requests that a queue of a fast device holds.
    pub const IN_FLIGHT: u32 = 32 << 10;

    /// Pins and table as by default.
    pub fn new(folder: FolderId, volume: VolumeId, disk: BlockDevice, block: BlockSize) -> Self {
        let pins = PathBuf::from(Self::PINS);
        Self {
            pins,
            folder,
            volume,
            disk,
            block,
            in_flight: Self::IN_FLIGHT,
        }
    }

    /// How the volume falls into blocks.
    pub const fn geometry(&self) -> Geometry {
        Geometry {
            size: self.disk.size(),
            block: self.block,
            sector: self.disk.logical_sector(),
        }
    }

    /// The folder of this volume's pins, there or to be made.
    pub fn pin_folder(&self) -> PathBuf {
        pins::folder_of(&self.pins, self.volume, self.folder)
    }
}
