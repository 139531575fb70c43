//! What a store knows of one volume: its geometry, the base, the chain of logs over it, and
//! the recovery points. The catalogue is the only truth; a file that it does not name is the
//! trace of something interrupted. How it is kept on disk: `catalogue_file.rs`.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;

use hrl_format::SealDigest;
use hrl_format::id::{Generation, GenerationId, GroupId, KeyId, LogId, PointId, VolumeId};
use hrl_format::record::{Consistency, Root};
use hrl_format::units::{
    BlockSize, ByteLen, Epoch, GenerationNumber, SectorSize, Timestamp, VolumeSize,
};
use serde::{Deserialize, Serialize};

use super::json::{maybe_text, number, text};
use super::layout::LogName;
use super::moment::LogOrder;
use super::recovery::Recovery;
use crate::geometry::Geometry;

/// One volume of a store: what there is, and which points can be had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Catalogue {
    /// The volume.
    #[serde(with = "text")]
    pub volume: VolumeId,
    /// What people call it; unique within the store. Readable also where the volume is encrypted.
    pub name: String,
    /// How large it is at the newest epoch, in bytes.
    #[serde(with = "number", rename = "size_bytes")]
    pub size: VolumeSize,
    /// What one dirty bit covers, in bytes.
    #[serde(with = "number", rename = "block_bytes")]
    pub block: BlockSize,
    /// The logical sector of the protected device, in bytes.
    #[serde(with = "number", rename = "sector_bytes")]
    pub sector: SectorSize,
    /// The key that it is encrypted with; `None`: it is not.
    #[serde(with = "maybe_text")]
    pub key: Option<KeyId>,
    /// Who may write to it.
    pub generation: CatalogueGeneration,
    /// What became of it at its last failover. What an older version wrote has nothing here.
    #[serde(default)]
    pub recovery: Recovery,
    /// Where the chain of logs begins; `None` until a first full copy is complete.
    pub base: Option<Base>,
    /// The logs, oldest first, each the successor of the one before it.
    pub logs: Vec<LogEntry>,
    /// The recovery points, oldest first.
    pub points: Vec<Point>,
    /// Which set of logs and base this is; see [`View`].
    pub(super) view: View,
    /// Logs that the current view does not need, kept for readers of an older one.
    pub(super) retired: Vec<RetiredLog>,
}

/// A generation and the one it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogueGeneration {
    /// How many promotions there were.
    #[serde(with = "number")]
    pub number: GenerationNumber,
    /// Which promotion it was.
    #[serde(with = "text")]
    pub id: GenerationId,
    /// The generation before the promotion; `None` for the first.
    #[serde(with = "maybe_text")]
    pub parent: Option<GenerationId>,
}

impl CatalogueGeneration {
    /// Number and id, as logs carry them.
    pub const fn generation(&self) -> Generation {
        Generation {
            number: self.number,
            id: self.id,
        }
    }
}

/// Where the chain begins. Without a key: a raw image, which holds the volume as it was at
/// the end of `epoch`. With a key there is no image: the base is the logs up to `epoch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The last epoch that went into it.
    #[serde(with = "number")]
    pub epoch: Epoch,
    /// How large the volume was then, in bytes.
    #[serde(with = "number", rename = "size_bytes")]
    pub size: VolumeSize,
    /// The last log that went into a raw base, which the next one must follow; `None` right
    /// after the first full copy, and always with a key.
    pub last: Option<LogLink>,
}

/// What the successor of a log names it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLink {
    /// Its id.
    #[serde(with = "text")]
    pub log: LogId,
    /// The digest of its seal.
    #[serde(with = "text")]
    pub seal: SealDigest,
}

/// A sealed log of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LogEntry {
    /// Its id.
    #[serde(with = "text")]
    pub log: LogId,
    /// The digest of its seal.
    #[serde(with = "text")]
    pub seal: SealDigest,
    /// The log whose place it takes for its successor, if it was merged: the last of those
    /// that it was merged from.
    pub stands_for: Option<LogLink>,
    /// The first epoch that it holds.
    #[serde(with = "number", rename = "first_epoch")]
    pub first: Epoch,
    /// The last epoch that it holds: the first, unless it was merged.
    #[serde(with = "number", rename = "last_epoch")]
    pub last: Epoch,
    /// How large the volume is at its end, in bytes.
    #[serde(with = "number", rename = "size_bytes")]
    pub size: VolumeSize,
    /// How long the file is, in bytes.
    #[serde(with = "number")]
    pub bytes: ByteLen,
    /// How many bytes of the volume it says something about, at most: so much of older logs
    /// it can have made useless.
    #[serde(with = "number", rename = "covers_bytes")]
    pub(super) covers: ByteLen,
    /// Whether every record of it is a moment that can be had. What an older version wrote has
    /// nothing here, and no such records.
    #[serde(default)]
    pub order: LogOrder,
    /// Whether it was looked what of older logs it made useless (`compact.rs`).
    pub(super) settled: bool,
}

impl LogEntry {
    pub(super) fn name(&self) -> LogName {
        LogName {
            first: self.first,
            log: self.log,
        }
    }

    /// What its successor must name as the log before it.
    pub fn link(&self) -> LogLink {
        self.stands_for.unwrap_or(LogLink {
            log: self.log,
            seal: self.seal,
        })
    }
}

/// A recovery point: the volume as it was at the end of an epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Point {
    /// Its id.
    #[serde(with = "text")]
    pub id: PointId,
    /// The epoch that it ends.
    #[serde(with = "number")]
    pub epoch: Epoch,
    /// When the volume was so.
    #[serde(with = "text")]
    pub time: Timestamp,
    /// What it promises.
    #[serde(with = "text")]
    pub consistency: Consistency,
    /// What the operator called it. In the catalogue of an encrypted volume it is empty;
    /// a reader with the key finds it in the log.
    pub label: String,
    /// The group's point that it is part of. Like the label, not in an encrypted volume's catalogue.
    #[serde(with = "maybe_text")]
    pub group: Option<GroupId>,
    /// The root of the digest tree. Like the label, not in an encrypted volume's catalogue.
    #[serde(with = "maybe_text")]
    pub root: Option<Root>,
    /// How large the volume was, in bytes.
    #[serde(with = "number", rename = "size_bytes")]
    pub size: VolumeSize,
    /// What was stored since the point before it, in bytes.
    #[serde(with = "number")]
    pub bytes: ByteLen,
}

/// Which moments between points a policy keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MomentsKept {
    /// Those since then; `None`: however old they are.
    pub(super) since: Option<Timestamp>,
    /// Of those, the ones of epochs behind this one; `None`: of any.
    pub(super) behind: Option<Epoch>,
}

/// Which set of base and logs a catalogue describes. It rises whenever logs leave the
/// chain (folded, or replaced by a merged one). Readers lock the view they read, and a log
/// that left is deleted when nobody reads a view that still needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct View(u64);

impl View {
    pub(super) fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// From the name of a lease file.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let number = (text.len() == 16).then(|| u64::from_str_radix(text, 16));
        number?.ok().map(Self)
    }
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A log that left the chain and waits for its last reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RetiredLog {
    #[serde(flatten)]
    pub(super) entry: LogEntry,
    /// The first view that does without it.
    pub(super) since: View,
}

impl Catalogue {
    /// Size and units of the volume, at the newest epoch.
    pub const fn geometry(&self) -> Geometry {
        Geometry {
            size: self.size,
            block: self.block,
            sector: self.sector,
        }
    }

    /// The newest epoch in the store; zero before the first full copy.
    pub fn last_epoch(&self) -> Epoch {
        let of_base = self.base.map_or(Epoch::ZERO, |base| base.epoch);
        self.logs.last().map_or(of_base, |log| log.last)
    }

    /// The log that the next one must name; `None` if there is none yet.
    pub fn head(&self) -> Option<LogLink> {
        let of_base = self.base.and_then(|base| base.last);
        self.logs.last().map(LogEntry::link).or(of_base)
    }

    /// The point of this id.
    pub fn point(&self, id: PointId) -> Option<&Point> {
        self.points.iter().find(|point| point.id == id)
    }

    /// The stretches of the chain of which nothing but the end is needed, in order: each up to
    /// the log that a point ends, or to where a window begins. The logs of windows are in none,
    /// nor are those behind the newest point: the next point may yet come.
    pub(super) fn stretches(&self) -> Vec<Range<usize>> {
        let no_point = self.points.is_empty().then(|| self.last_epoch());
        let ends = self.points.iter().map(|point| point.epoch).chain(no_point);
        let mut start = 0;
        let mut stretches = Vec::new();
        for epoch in ends {
            let end = self.logs.partition_point(|log| log.last <= epoch);
            let mut here = start..start;
            for at in start..end.max(start) {
                if self.window_log(&self.logs[at]).is_none() {
                    here.end = at + 1;
                    continue;
                }
                stretches.push(here);
                here = at + 1..at + 1;
            }
            stretches.push(here);
            start = end;
        }
        stretches.retain(|stretch| !stretch.is_empty());
        stretches
    }

    /// Takes points off the list. The logs behind each of them now follow what lies before it
    /// without a point in between. Moments stay.
    pub(super) fn drop_points(&mut self, dropped: &[PointId]) {
        let dropped: HashSet<PointId> = dropped.iter().copied().collect();
        let (gone, left) = std::mem::take(&mut self.points)
            .into_iter()
            .partition(|point| dropped.contains(&point.id));
        self.points = left;
        let gone: Vec<Point> = gone;
        for point in gone {
            let at = self.points.partition_point(|kept| kept.epoch < point.epoch);
            let next = self.points.get_mut(at);
            let end = next.as_ref().map(|next| next.epoch);
            // Of the oldest it is what was stored right before it.
            if let Some(next) = next.filter(|_| at > 0) {
                next.bytes = ByteLen::new(next.bytes.get().saturating_add(point.bytes.get()));
            }
            let first = self.logs.partition_point(|log| log.first <= point.epoch);
            let joined = self.logs[first..].iter_mut();
            joined
                .take_while(|log| end.is_none_or(|end| log.last <= end))
                .for_each(|log| log.settled = false);
        }
    }

    /// Gives up the moments of logs of which all are older than those kept; says whether there
    /// were any.
    pub(super) fn give_up_moments(&mut self, kept: &MomentsKept) -> bool {
        let mut given_up = false;
        for log in &mut self.logs {
            let Some(records) = log.in_order() else {
                continue;
            };
            let is_old = kept.since.is_some_and(|since| records.to < since);
            if is_old || kept.behind.is_some_and(|epoch| log.last <= epoch) {
                log.order = LogOrder::AsRead;
                given_up = true;
            }
        }
        given_up
    }

    /// What the volume's logs and retired logs take, in bytes; a raw base is not counted.
    pub fn log_bytes(&self) -> ByteLen {
        let retired = self.retired.iter().map(|retired| retired.entry.bytes);
        let all = self.logs.iter().map(|log| log.bytes).chain(retired);
        ByteLen::new(all.map(ByteLen::get).sum())
    }

    /// Why this cannot be a catalogue, though its checksum is right; `None` if it can.
    pub(super) fn fault(&self) -> Option<String> {
        let Some(base) = self.base else {
            let empty = self.logs.is_empty() && self.points.is_empty();
            return (!empty).then(|| "logs or points without a base".to_owned());
        };
        let mut next = match self.key {
            Some(_) => Epoch::ZERO.next(),
            None => base.epoch.next(),
        };
        for log in &self.logs {
            if log.first != next || log.last < log.first || log.last.get() == u64::MAX {
                return Some(format!(
                    "epoch {} expected, log {} holds another",
                    next, log.log
                ));
            }
            if log.in_order().is_some() && log.first != log.last {
                return Some(format!("log {} of several epochs is in order", log.log));
            }
            next = log.last.next();
        }
        // In order, as was just seen.
        let is_end = |epoch| {
            self.logs
                .binary_search_by_key(&epoch, |log| log.last)
                .is_ok()
        };
        let ends = |epoch| base.epoch == epoch || is_end(epoch);
        let stray = self.points.iter().find(|point| !ends(point.epoch));
        stray.map(|point| format!("no log ends where point {} does", point.id))
    }
}
