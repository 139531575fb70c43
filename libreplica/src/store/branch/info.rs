//! What a branch is, in `branch.json`: which state it stands on, and under which generation
//! it is written to. It is durable before the first write is taken, and for as long as it
//! lies there retention drops neither the point nor what the branch needs of it.

use std::fmt;
use std::str::FromStr;

use hrl_format::id::{BranchId, PointId, VolumeId};
use hrl_format::units::{Epoch, Timestamp, VolumeSize};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::store::catalogue::{CatalogueGeneration, LogLink};
use crate::store::durable::{self, Replaced, damaged, read_small};
use crate::store::json::{maybe_text, number, text};
use crate::store::layout::BranchFolder;
use crate::store::moment::Moment;

/// The version of `branch.json` that this library writes, and the newest that it reads.
const VERSION: u32 = 1;
const READ: &str = "read what a branch is";
const WRITE: &str = "write down what a branch is";

/// What a branch was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BranchPurpose {
    /// Somebody looks at a point, and may write to it.
    Open,
    /// A test failover.
    Test,
    /// A drill: nobody goes on with it.
    Drill,
    /// A failover.
    Failover,
}

impl fmt::Display for BranchPurpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Open => "open",
            Self::Test => "test",
            Self::Drill => "drill",
            Self::Failover => "failover",
        })
    }
}

/// The text was none of `open`, `test`, `drill`, `failover`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no purpose of a branch: open, test, drill or failover expected")]
pub struct ParsePurposeError(String);

impl FromStr for BranchPurpose {
    type Err = ParsePurposeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "open" => Ok(Self::Open),
            "test" => Ok(Self::Test),
            "drill" => Ok(Self::Drill),
            "failover" => Ok(Self::Failover),
            other => Err(ParsePurposeError(other.to_owned())),
        }
    }
}

/// What a branch is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BranchInfo {
    version: u32,
    /// Its id, also its folder's name.
    #[serde(with = "text")]
    pub id: BranchId,
    /// The volume.
    #[serde(with = "text")]
    pub volume: VolumeId,
    /// The recovery point that it stands on, or the newest before the moment that it does.
    #[serde(with = "text")]
    pub point: PointId,
    /// The moment between points that it stands on; `None`: on the point.
    #[serde(with = "maybe_text", rename = "state")]
    pub moment: Option<Moment>,
    /// When the volume was so.
    #[serde(with = "text")]
    pub time: Timestamp,
    /// How large it was, and is in the branch, in bytes.
    #[serde(with = "number", rename = "size_bytes")]
    pub size: VolumeSize,
    /// The epoch that the state ends or lies in: the first log has the next.
    #[serde(with = "number")]
    pub epoch: Epoch,
    /// The log that the first one names as the one before it: the last of the state, whole or
    /// not. `None` if the state is the first full copy.
    pub follows: Option<LogLink>,
    /// Under which generation it is written to.
    pub generation: CatalogueGeneration,
    /// When it was made.
    #[serde(with = "text")]
    pub created: Timestamp,
    /// What for.
    #[serde(with = "text")]
    pub purpose: BranchPurpose,
}

/// What a branch is to stand on.
pub(super) struct Standing {
    pub(super) point: PointId,
    pub(super) moment: Option<Moment>,
    pub(super) time: Timestamp,
    pub(super) size: VolumeSize,
    pub(super) epoch: Epoch,
    pub(super) follows: Option<LogLink>,
}

impl BranchInfo {
    pub(super) fn new(
        id: BranchId,
        volume: VolumeId,
        standing: &Standing,
        generation: CatalogueGeneration,
        purpose: BranchPurpose,
    ) -> Self {
        Self {
            version: VERSION,
            id,
            volume,
            point: standing.point,
            moment: standing.moment,
            time: standing.time,
            size: standing.size,
            epoch: standing.epoch,
            follows: standing.follows,
            generation,
            created: Timestamp::now(),
            purpose,
        }
    }

    /// Reads what lies in `folder`; `None` if that is no branch, or not one yet.
    pub(super) fn load(folder: &BranchFolder) -> Result<Option<Self>> {
        let path = folder.info();
        let Some(bytes) = read_small(&path)? else {
            return Ok(None);
        };
        let wrong = |e: serde_json::Error| damaged(READ, &path, "it is no branch").source(e);
        let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(wrong)?;
        let version = json.get("version").and_then(serde_json::Value::as_u64);
        if let Some(version) = version.filter(|&version| version > u64::from(VERSION)) {
            return Err(Error::new(ErrorKind::Unsupported, READ)
                .path(&path)
                .detail(format!("version {version}, {VERSION} is known here"))
                .advice("use the version that wrote it"));
        }
        let info: Self = serde_json::from_value(json).map_err(wrong)?;
        if info.id != folder.id() || info.volume != folder.volume() {
            let why = format!("it is branch {} of volume {}", info.id, info.volume);
            return Err(Error::new(ErrorKind::Foreign, READ).path(path).detail(why));
        }
        Ok(Some(info))
    }

    /// Makes it durable in `folder`.
    pub(super) fn save(&self, folder: &BranchFolder) -> Result<()> {
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(ErrorKind::Invalid, WRITE).source(e))?;
        let files = [(folder.info(), &bytes[..])];
        durable::replace_all(&files, folder.path()).map_err(Replaced::into_error)
    }
}
