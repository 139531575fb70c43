//! What a volume tells of itself: the structures behind `replica status --json`. Fields
//! may be added, never renamed: scripts read them.

use hrl_format::id::VolumeId;
use hrl_format::units::Timestamp;
use serde::{Deserialize, Serialize};

use crate::capture::inline::ModeChange;
use crate::capture::ublk::{Features, UblkStatus};
use crate::error::Error;
use crate::store::{Holder, Point, Space};
use crate::time::rfc3339;

/// Changes of mode that are told of: the newest.
const MODES_SHOWN: usize = 32;

/// What a volume is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Not protected.
    Unprotected,
    /// The first full copy is under way.
    Baseline,
    /// Changes are tracked and shipped.
    Replicating,
    /// Checksums are finding what differs.
    Resync,
    /// Tracking goes on; shipping was stopped by the operator.
    Paused,
    /// Tracking goes on; shipping cannot, see the cause.
    Degraded,
    /// A drill is open on a recovery point.
    TestFailover,
    /// The image was opened for use in place of the source.
    FailedOver,
    /// The failover is final.
    Committed,
    /// Changes are going back to the first side.
    Reversing,
}

impl VolumeState {
    /// As it stands in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unprotected => "unprotected",
            Self::Baseline => "baseline",
            Self::Replicating => "replicating",
            Self::Resync => "resync",
            Self::Paused => "paused",
            Self::Degraded => "degraded",
            Self::TestFailover => "test_failover",
            Self::FailedOver => "failed_over",
            Self::Committed => "committed",
            Self::Reversing => "reversing",
        }
    }
}

/// How far a running resync or baseline is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncProgress {
    /// Why it runs.
    pub cause: String,
    /// Bytes of the source read so far.
    pub bytes_done: u64,
    /// Bytes of the source to read.
    pub bytes_total: u64,
}

/// A resync that ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncSummary {
    /// Why it ran.
    pub cause: String,
    /// When it started, RFC 3339.
    pub started: String,
    /// When it ended, RFC 3339.
    pub ended: String,
    /// Bytes that differed and were shipped.
    pub bytes: u64,
}

/// The newest error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// Its kind: a lower-case word, see [`crate::ErrorKind::as_str`].
    pub kind: String,
    /// What it said.
    pub message: String,
    /// When, RFC 3339.
    pub time: String,
}

impl LastError {
    /// `error`, at `time`.
    pub fn new(error: &Error, time: Timestamp) -> Self {
        Self {
            kind: error.kind().as_str().to_owned(),
            message: error.to_string(),
            time: rfc3339(time),
        }
    }
}

/// A change of what capture keeps of the changes to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModeChanged {
    /// When, RFC 3339.
    pub time: String,
    /// The mode from then on: `data`, `metadata` or `bitmap`.
    pub mode: String,
    /// Why.
    pub cause: String,
}

impl From<&ModeChange> for ModeChanged {
    fn from(change: &ModeChange) -> Self {
        Self {
            time: rfc3339(change.time),
            mode: change.mode.as_str().to_owned(),
            cause: change.cause.clone(),
        }
    }
}

/// Numbers that only rise.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StatusCounters {
    /// Operations that change data, seen since tracking was attached.
    pub writes_seen: u64,
    /// Sectors (512 bytes) they covered.
    pub sectors_seen: u64,
    /// How often an event could not be recorded exactly and more was taken as dirty.
    pub widened: u64,
    /// Resyncs started.
    pub resyncs: u64,
    /// Points made.
    pub points_made: u64,
    /// Points that could not be made.
    pub points_failed: u64,
    /// The longest freeze, in milliseconds.
    pub freeze_ms_max: u64,
    /// The newest freeze, in milliseconds.
    pub freeze_ms_last: u64,
    /// Bytes read from the source and written to the store.
    pub bytes_shipped: u64,
    /// Changes that the device refused, of one whose users go through the agent. They were
    /// told; what the device holds there was, or will be, read back.
    pub writes_refused: u64,
}

/// Logs of the store of which newer ones may have made much useless, and that wait to be
/// looked at and written anew: until enough has changed, and, of an encrypted volume, until
/// somebody with the key is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingLogs {
    /// How many.
    pub logs: u64,
    /// How long they are together.
    pub bytes: u64,
}

/// What a volume takes in the store, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SpaceSummary {
    /// The base: what the image occupies; with a key, its logs.
    pub base_bytes: u64,
    /// The logs over it.
    pub log_bytes: u64,
    /// Logs that are not needed any more, and wait for readers that began before that.
    pub retired_bytes: u64,
    /// Logs that are being written.
    pub incoming_bytes: u64,
    /// What waits to be compacted; part of the base and the logs.
    pub waiting_bytes: u64,
    /// What base, logs and retired logs come to at most, as long as nothing is written.
    pub bound_bytes: u64,
    /// Who keeps room from being given back.
    pub held: Vec<SpaceHolder>,
}

/// Somebody who keeps room of a store from being given back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceHolder {
    /// The point that stays for his sake; null: retired logs.
    pub point: Option<String>,
    /// Who: a process, or the folder of a branch.
    pub by: String,
}

impl From<&Space> for SpaceSummary {
    fn from(space: &Space) -> Self {
        let holder = |holder: &Holder| SpaceHolder {
            point: holder.point.map(|point| point.to_string()),
            by: holder.by.clone(),
        };
        Self {
            base_bytes: space.base.get(),
            log_bytes: space.logs.get(),
            retired_bytes: space.retired.get(),
            incoming_bytes: space.incoming.get(),
            waiting_bytes: space.waiting.bytes.get(),
            bound_bytes: space.bound.get(),
            held: space.holders.iter().map(holder).collect(),
        }
    }
}

/// What `status` shall still know after the daemon was restarted. Kept in the state folder,
/// written when it changes and when the daemon ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct History {
    /// The last resync that ended.
    pub last_resync: Option<ResyncSummary>,
    /// The newest error.
    pub last_error: Option<LastError>,
    /// The newest recovery point.
    pub last_point: Option<PointSummary>,
    /// How the mode has changed.
    pub mode_changes: Vec<ModeChanged>,
    /// Numbers that only rise.
    pub counters: StatusCounters,
}

/// How a first copy or a resync has ended, for who waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settled {
    /// Durably, with a recovery point.
    WithPoint,
    /// Durably, and without a point: nothing is mounted that could be frozen, and there was
    /// no moment without writes. What that said.
    WithoutPoint(String),
}

/// The newest recovery point, in short.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointSummary {
    /// Its id.
    pub id: String,
    /// The epoch it ends.
    pub epoch: u64,
    /// When the state was so, RFC 3339.
    pub time: String,
    /// `crash`, `filesystem` or `application`.
    pub consistency: String,
    /// What the operator called it; empty if nothing.
    pub label: String,
    /// What it shares with the points of other volumes that were made in the same moment;
    /// null for a point of its own.
    pub group: Option<String>,
    /// Bytes that its epoch takes in the store.
    pub bytes: u64,
    /// By what a restore proves that it is what was captured: `root`, by the root of the
    /// digest tree; `chain`, by the seals and checksums of its logs. Null if that is not known:
    /// of an encrypted volume's point without the key, or from an older version.
    #[serde(default)]
    pub proof: Option<String>,
}

/// The ublk device that a volume's users see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UblkSummary {
    /// `serving`, `taking_over`, `waiting` for the next daemon, `stopped`: users get errors; or
    /// `removed`.
    pub state: String,
    /// Its queues, each with a thread.
    pub queues: u16,
    /// Requests that each can have.
    pub depth: u16,
    /// What the kernel's driver offers.
    pub offered: Vec<String>,
    /// What it has granted this device: with `zero-copy` and `auto-buf-reg`, data is copied only
    /// where it must be.
    pub granted: Vec<String>,
    /// Reads whose data was not copied, since the daemon's start.
    #[serde(default)]
    pub uncopied_reads: u64,
    /// Writes whose data was not copied: in the modes `metadata` and `bitmap`.
    #[serde(default)]
    pub uncopied_writes: u64,
    /// How often it was taken over since the daemon's start, as a thread had failed.
    pub failures: u32,
    /// What failed last.
    pub trouble: Option<String>,
}

impl From<&UblkStatus> for UblkSummary {
    fn from(status: &UblkStatus) -> Self {
        let names = |features: Features| features.names().iter().map(ToString::to_string).collect();
        Self {
            state: status.state.as_str().to_owned(),
            queues: status.queues,
            depth: status.depth,
            offered: names(status.offered),
            granted: names(status.granted),
            uncopied_reads: status.uncopied.reads,
            uncopied_writes: status.uncopied.writes,
            failures: status.failures,
            trouble: status.trouble.clone(),
        }
    }
}

/// Everything `status` tells of one volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// The volume's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The device's path.
    pub device: String,
    /// Where it is replicated to.
    pub store: String,
    /// The consistency group it belongs to, if any.
    pub group: Option<String>,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The size of a block, in bytes.
    pub block_bytes: u32,
    /// What it is doing.
    pub state: VolumeState,
    /// Why it is in that state, where there is something to say.
    pub state_cause: Option<String>,
    /// `data`, `metadata` or `bitmap`.
    pub mode: String,
    /// Why it is in that mode.
    pub mode_cause: Option<String>,
    /// How the mode has changed: the newest 32 times, the newest last.
    #[serde(default)]
    pub mode_changes: Vec<ModeChanged>,
    /// Bytes of memory that changes take which are not durable in the store.
    #[serde(default)]
    pub buffered_bytes: u64,
    /// Bytes of the spool that such changes take.
    #[serde(default)]
    pub spooled_bytes: u64,
    /// `ebpf`, `ublk` or `nbd`.
    pub capture: String,
    /// What inline capture cannot do, and tries again: writes wait while the activity log
    /// cannot be written, and points while what failed writes have left cannot be read back.
    #[serde(default)]
    pub capture_trouble: Option<String>,
    /// The ublk device, if that is how it is captured.
    #[serde(default)]
    pub ublk: Option<UblkSummary>,
    /// What the device's users are given, if they go through the agent: a URI or a path.
    #[serde(default)]
    pub address: Option<String>,
    /// How often the volume was promoted.
    pub generation: u64,
    /// The newest epoch that the store has durably.
    pub epoch: u64,
    /// Bytes changed and not yet durable in the store.
    pub dirty_bytes: u64,
    /// The age of the oldest change not yet durable in the store, in seconds.
    pub lag_seconds: f64,
    /// The newest recovery point.
    pub last_point: Option<PointSummary>,
    /// The running resync or baseline.
    pub resync: Option<ResyncProgress>,
    /// The last resync that ended.
    pub last_resync: Option<ResyncSummary>,
    /// The newest error.
    pub last_error: Option<LastError>,
    /// What waits to be compacted in the store.
    #[serde(default)]
    pub compaction_waits: WaitingLogs,
    /// Which recovery points are kept: the tiers of its policy.
    #[serde(default)]
    pub retain: String,
    /// What it takes in the store; null until that was looked at.
    #[serde(default)]
    pub space: Option<SpaceSummary>,
    /// Numbers that only rise.
    pub counters: StatusCounters,
}

impl VolumeStatus {
    /// A volume of which nothing is known but its id.
    pub fn unknown(id: VolumeId) -> Self {
        Self {
            id: id.to_string(),
            name: id.to_string(),
            device: String::new(),
            store: String::new(),
            group: None,
            size_bytes: 0,
            block_bytes: 0,
            state: VolumeState::Degraded,
            state_cause: None,
            mode: "bitmap".to_owned(),
            mode_cause: None,
            mode_changes: Vec::new(),
            buffered_bytes: 0,
            spooled_bytes: 0,
            capture: "ebpf".to_owned(),
            capture_trouble: None,
            ublk: None,
            address: None,
            generation: 1,
            epoch: 0,
            dirty_bytes: 0,
            lag_seconds: 0.0,
            last_point: None,
            resync: None,
            last_resync: None,
            last_error: None,
            compaction_waits: WaitingLogs::default(),
            retain: String::new(),
            space: None,
            counters: StatusCounters::default(),
        }
    }

    /// What of it outlives the daemon.
    pub fn history(&self) -> History {
        History {
            last_resync: self.last_resync.clone(),
            last_error: self.last_error.clone(),
            last_point: self.last_point.clone(),
            mode_changes: self.mode_changes.clone(),
            counters: self.counters.clone(),
        }
    }

    /// Takes up what an earlier run knew.
    pub fn recall(&mut self, history: History) {
        self.epoch = history.last_point.as_ref().map_or(0, |point| point.epoch);
        self.last_resync = history.last_resync;
        self.last_error = history.last_error;
        self.last_point = history.last_point;
        self.mode_changes = history.mode_changes;
        self.counters = history.counters;
    }

    /// Adds a change of mode.
    pub fn mode_changed(&mut self, change: ModeChanged) {
        self.mode_changes.push(change);
        let past = self.mode_changes.len().saturating_sub(MODES_SHOWN);
        self.mode_changes.drain(..past);
    }
}

/// A byte range that differs, in a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DifferingRange {
    /// Its first byte.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// What `replica verify` found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifySummary {
    /// Bytes of source and image that were compared.
    pub bytes_compared: u64,
    /// Bytes that changed meanwhile, or wait to be shipped: left out of the comparison.
    pub bytes_in_motion: u64,
    /// Bytes in blocks that differ.
    pub bytes_differing: u64,
    /// Where: the first 1000 ranges.
    pub differing: Vec<DifferingRange>,
}

impl From<&Point> for PointSummary {
    fn from(point: &Point) -> Self {
        Self {
            id: point.id.to_string(),
            epoch: point.epoch.get(),
            time: rfc3339(point.time),
            consistency: point.consistency.as_str().to_owned(),
            label: point.label.clone(),
            group: point.group.map(|group| group.to_string()),
            bytes: point.bytes.get(),
            proof: Some(
                if point.root.is_some() {
                    "root"
                } else {
                    "chain"
                }
                .to_owned(),
            ),
        }
    }
}
