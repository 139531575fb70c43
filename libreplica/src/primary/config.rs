//! What the operator asked for when a volume was protected, as it is kept in the state
//! folder. Everything else about a volume is known better elsewhere: its dirty bits by
//! the kernel, its epochs and points by the store.

use std::path::PathBuf;
use std::time::Duration;

use hrl_format::VolumeKey;
use hrl_format::id::{Generation, VolumeId};
use hrl_format::units::{BlockSize, ByteLen, ByteOffset, Extent, GenerationNumber};
use serde::{Deserialize, Serialize};

use crate::error::{ErrorKind, Result};
use crate::store::{Store, VolumeWriter};

/// A byte range that the operator leaves out of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExcludedRange {
    offset: u64,
    len: u64,
}

impl ExcludedRange {
    /// The range as an extent; `None` if the file was edited into nonsense.
    pub fn extent(self) -> Option<Extent> {
        Extent::new(ByteOffset::new(self.offset), ByteLen::new(self.len))
    }
}

impl From<Extent> for ExcludedRange {
    fn from(extent: Extent) -> Self {
        Self {
            offset: extent.offset().get(),
            len: extent.len().get(),
        }
    }
}

/// How far the first copy has come. Kept on disk, so that a baseline cut short by a
/// crash is never taken for one that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "phase")]
pub enum Phase {
    /// The first copy has not ended.
    Baseline,
    /// The image is complete; changes follow.
    Replicating,
    /// The image is complete, but what changed since is not known in full.
    Resync {
        /// Why.
        cause: String,
    },
}

/// How a volume's changes are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capture {
    /// By a BPF program, while the device's users go on as ever.
    #[default]
    Ebpf,
    /// By an NBD server that the device's users go through.
    Nbd,
    /// By a ublk device that they go through.
    Ublk,
}

impl Capture {
    /// As it stands in JSON: a lower-case word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Nbd => "nbd",
            Self::Ublk => "ublk",
        }
    }

    /// Whether the device's users go through us.
    pub const fn is_inline(self) -> bool {
        matches!(self, Self::Nbd | Self::Ublk)
    }
}

/// Whether the operator wants changes shipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shipping {
    /// Yes.
    #[default]
    On,
    /// No: tracking goes on, nothing is shipped.
    Paused,
}

/// Whether a device may be written to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rest {
    /// It may.
    #[default]
    InUse,
    /// It was made read-only, or is not served.
    AtRest,
    /// It was made read-only, and stays so: another one is used in its place, for good.
    Replaced,
}

/// A generation, as it stands in the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnGeneration {
    number: u64,
    #[serde(with = "id_text")]
    id: hrl_format::id::GenerationId,
}

impl From<Generation> for OwnGeneration {
    fn from(generation: Generation) -> Self {
        Self {
            number: generation.number.get(),
            id: generation.id,
        }
    }
}

impl From<OwnGeneration> for Generation {
    fn from(own: OwnGeneration) -> Self {
        Self {
            number: GenerationNumber::new(own.number),
            id: own.id,
        }
    }
}

/// One protected volume's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeConfig {
    /// The volume's id, in the store as here.
    #[serde(with = "crate::primary::config::id_text")]
    pub id: VolumeId,
    /// What the operator calls it.
    pub name: String,
    /// The device's path, absolute.
    pub device: PathBuf,
    /// Its size when it was protected, in bytes.
    pub size_bytes: u64,
    /// The size of a block, in bytes.
    pub block_bytes: u32,
    /// The store's folder, absolute.
    pub store: PathBuf,
    /// The interval between recovery points.
    pub every: Duration,
    /// Which points to keep, as it was written.
    pub retain: String,
    /// Where the volume key is, if the volume is encrypted.
    pub key_file: Option<PathBuf>,
    /// The consistency group.
    pub group: Option<String>,
    /// Ranges left out of the copy.
    #[serde(default)]
    pub exclude: Vec<ExcludedRange>,
    /// Ranges that were left out at the newest point, active swap included: what of them
    /// no longer is left out must be copied.
    #[serde(default)]
    pub left_out: Vec<ExcludedRange>,
    /// Where logs wait when the store falls behind; used by inline capture.
    #[serde(default)]
    pub spool: Option<PathBuf>,
    /// How its changes are captured.
    #[serde(default)]
    pub capture: Capture,
    /// How far the first copy has come.
    pub phase: Phase,
    /// Whether changes are shipped.
    #[serde(default)]
    pub shipping: Shipping,
    /// Which generation this is the primary of. What an older version protected has nothing
    /// here until it is first brought up.
    #[serde(default)]
    pub generation: Option<OwnGeneration>,
    /// Which generation this will be the primary of once the store says so: the volume is being
    /// brought home.
    #[serde(default)]
    pub coming_home: Option<OwnGeneration>,
    /// Whether the device was made to rest for another side that is to take over.
    #[serde(default)]
    pub rest: Rest,
    /// How often these settings have changed: so that an older copy of them, put back by
    /// somebody, is told from what the kernel's tracking goes by.
    #[serde(default)]
    pub revision: u64,
}

impl VolumeConfig {
    /// The block size; 1 MiB if the file was edited into nonsense.
    pub fn block(&self) -> BlockSize {
        BlockSize::new(self.block_bytes).unwrap_or(BlockSize::MAX)
    }

    /// Opens the image for writing, as the primary of this volume's generation.
    ///
    /// # Errors
    /// Those of [`Store::volume_writer_of`].
    pub fn writer(&self, store: &Store, key: Option<VolumeKey>) -> Result<VolumeWriter> {
        match self.generation {
            Some(own) => store.volume_writer_of(self.id, key, own.into()),
            None => store.volume_writer(self.id, key),
        }
    }

    /// Whether the volume was promoted elsewhere, as far as the store can be asked.
    ///
    /// # Errors
    /// [`ErrorKind::Fenced`] if it was.
    pub fn refuse_fenced(&self) -> Result<()> {
        let Some(own) = self.generation else {
            return Ok(());
        };
        let checked =
            Store::open(&self.store).and_then(|store| store.check_generation(self.id, own.into()));
        match checked {
            Err(error) if error.kind() == ErrorKind::Fenced => Err(error),
            _ => Ok(()),
        }
    }

    /// The excluded ranges as extents.
    pub fn excluded(&self) -> Vec<Extent> {
        self.exclude
            .iter()
            .filter_map(|range| range.extent())
            .collect()
    }

    /// What was left out at the newest point.
    pub fn left_out(&self) -> Vec<Extent> {
        self.left_out
            .iter()
            .filter_map(|range| range.extent())
            .collect()
    }

    /// Notes what is left out now.
    pub fn set_left_out(&mut self, ranges: &[Extent]) {
        self.left_out = ranges.iter().copied().map(ExcludedRange::from).collect();
    }
}

/// Ids as text in JSON.
pub(crate) mod id_text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<T: Display, S: Serializer>(id: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}
