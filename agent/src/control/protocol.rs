//! Requests and answers on the control socket. Both sides are the same binary, so there
//! is no version to negotiate: an unknown request is answered with an error.

use std::path::PathBuf;

use libreplica::primary::{Capture, PointSummary, Settled, VerifySummary, VolumeStatus};
use libreplica::replica::{AdoptedStatus, AdoptedVolume, ExportStatus};
use libreplica::{Error, ErrorKind};
use serde::{Deserialize, Serialize};

/// The longest request or answer, in bytes.
pub const MESSAGE_MAX: u64 = 16 << 20;

/// What a client asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Protect a device. Answered once tracking is attached.
    Protect(ProtectRequest),
    /// Wait until a volume's first copy, or its resync, has ended.
    Wait { volume: String },
    /// Forget a volume.
    Unprotect { volume: String },
    /// Forget a volume that is used elsewhere for good; its device stays read-only.
    Retire { volume: String },
    /// Remove what dead daemons left in the kernel.
    UnprotectStale,
    /// Stop shipping.
    Pause { volume: String },
    /// Ship again.
    Resume { volume: String },
    /// All volumes, or one.
    Status { volume: Option<String> },
    /// Make a point.
    Point(PointRequest),
    /// Where a volume's image is.
    Location { volume: String },
    /// Know a store's volume, or all that it has.
    Adopt {
        store: PathBuf,
        volume: Option<String>,
        key_file: Option<PathBuf>,
    },
    /// Let go of the device of a volume that was failed over.
    PrepareHomecoming { volume: String },
    /// Which generation it will be this machine's in.
    AnnounceHomecoming {
        volume: String,
        number: u64,
        generation: String,
    },
    /// The store says that it has come home.
    CameHome { volume: String },
    /// Open a state of a volume.
    Open(OpenRequest),
    /// Close what is open.
    Close { what: String, keep: bool },
    /// Compare source and image.
    Verify { volume: String },
    /// Find by checksums what differs.
    Resync { volume: String },
}

/// A device to protect.
#[derive(Debug, Serialize, Deserialize)]
pub struct ProtectRequest {
    pub device: PathBuf,
    pub store: PathBuf,
    pub name: Option<String>,
    pub every_ms: u64,
    pub retain: String,
    pub block_bytes: Option<u32>,
    pub key_file: Option<PathBuf>,
    pub group: Option<String>,
    pub exclude: Vec<Exclude>,
    pub spool: Option<PathBuf>,
    pub capture: Capture,
    pub force: bool,
}

/// Something left out of the copy.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exclude {
    /// A partition, by its path.
    Partition(PathBuf),
    /// A byte range: offset and length.
    Range { offset: u64, len: u64 },
}

/// A point to make.
#[derive(Debug, Serialize, Deserialize)]
pub struct PointRequest {
    pub volume: String,
    /// `crash`, `filesystem`, `application`; none: what the volume's state calls for.
    pub consistency: Option<String>,
    pub label: String,
    pub timeout_ms: u64,
}

/// A state to open.
#[derive(Debug, Serialize, Deserialize)]
pub struct OpenRequest {
    /// A volume of the daemon's, or of `store`.
    pub volume: String,
    pub store: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Which state; none: a branch.
    pub point: Option<String>,
    pub branch: Option<String>,
    pub read_only: bool,
    pub socket: PathBuf,
}

/// Where an image is, and what opens it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Location {
    pub id: String,
    pub store: PathBuf,
    pub key_file: Option<PathBuf>,
}

/// What the daemon answers.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Answer {
    /// It is done.
    Done,
    /// The volume that was protected.
    Protected {
        id: String,
        name: String,
        /// What its users are given, if they go through the agent.
        address: Option<String>,
    },
    /// A first copy or a resync has ended; without a point, why.
    Settled { without_point: Option<String> },
    /// The volumes, what is open, and what would be recovered here.
    Status {
        volumes: Vec<VolumeStatus>,
        open: Vec<ExportStatus>,
        adopted: Vec<AdoptedStatus>,
    },
    /// A volume's device.
    Device { path: PathBuf },
    /// What the daemon knows now.
    Adopted { volumes: Vec<AdoptedVolume> },
    /// What was opened, or closed.
    Export { export: ExportStatus },
    /// The new point.
    Point { point: PointSummary },
    /// Where the image is.
    Location(Location),
    /// What was compared.
    Verified { report: VerifySummary },
    /// What was removed.
    Stale { removed: Vec<String> },
    /// It failed.
    Failed { kind: String, message: String },
}

impl Answer {
    /// How a first copy or a resync has ended.
    pub fn settled(settled: Settled) -> Self {
        Self::Settled {
            without_point: match settled {
                Settled::WithPoint => None,
                Settled::WithoutPoint(why) => Some(why),
            },
        }
    }

    /// An error as an answer.
    pub fn failed(error: &Error) -> Self {
        Self::Failed {
            kind: error.kind().as_str().to_owned(),
            message: error.to_string(),
        }
    }
}

/// Whether an error that came over the socket means "resync needed or running": exit 3.
pub fn needs_resync(kind: &str) -> bool {
    kind == ErrorKind::ResyncNeeded.as_str()
}
