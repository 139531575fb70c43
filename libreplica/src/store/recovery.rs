//! What became of a volume at its last failover, as the catalogue keeps it, and the changes of
//! the catalogue by which it comes about. Each is one replacement of the catalogue, under the
//! volume's lock, and so happens whole or not at all: a promotion makes a new generation, and
//! with it every log of the old primary is refused from that moment on. What follows on it stands
//! in `commit.rs` and `reverse.rs`.
//!
//! Which of them may follow which is the state machine's matter (`failover/`); here they refuse
//! only what would lose something.

use std::fmt;
use std::sync::Arc;

use hrl_format::id::{GenerationId, PointId};
use hrl_format::units::{ByteLen, Epoch, Timestamp};
use serde::{Deserialize, Serialize};

use super::catalogue::{Catalogue, LogEntry, Point};
use super::json::{maybe_text, number, text};
use super::lease;
use super::moment::Moment;
use super::reader::{PointSelector, VolumeReader};
use super::reverse::Reversal;
use super::state::StateId;
use super::writer::VolumeWriter;
use crate::error::{Error, ErrorKind, Result};

/// What became of the volume at its last failover.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Recovery {
    /// Nothing, or it is over: the volume's changes come from its primary.
    #[default]
    Replicating,
    /// A state is in use in place of the source; another may still be chosen.
    FailedOver(Promotion),
    /// That choice is final.
    Committed(Promotion),
    /// What is in use is protected, towards the first side.
    Reversing(Reversal),
}

/// A state of the volume that was put in use in place of the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Promotion {
    /// The recovery point, or the newest one before the moment.
    #[serde(with = "text")]
    pub point: PointId,
    /// The moment, if it is not the point itself.
    #[serde(with = "maybe_text", default)]
    pub moment: Option<Moment>,
    /// Whether the source came to rest first.
    pub how: How,
    /// When it was put in use.
    #[serde(with = "text")]
    pub time: Timestamp,
    /// The machine that uses it, by its host name.
    pub host: String,
    /// What of the volume's history is not in it.
    pub loss: Loss,
    /// The generation that was in force before.
    #[serde(with = "text")]
    pub replaced: GenerationId,
}

/// How a failover went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// The source was at rest, and all that it held is there.
    Planned,
    /// Without the source, or past it.
    Unplanned,
}

/// What a failover leaves behind, as far as the store knows. What the source wrote after
/// `known_until` and did not ship is not known, unless it was at rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Loss {
    /// Bytes of changes that are in the store and behind the chosen state, as they are stored.
    #[serde(with = "number")]
    pub bytes: ByteLen,
    /// When the volume was as the chosen state has it.
    #[serde(with = "text")]
    pub since: Timestamp,
    /// Up to when the store knows what the source did: the newest point, or end of a window.
    #[serde(with = "text")]
    pub known_until: Timestamp,
}

impl Loss {
    /// The seconds between the chosen state and the newest that the store knows.
    pub fn seconds(&self) -> f64 {
        let nanos = self
            .known_until
            .as_nanos()
            .saturating_sub(self.since.as_nanos());
        nanos.max(0) as f64 / 1e9
    }
}

impl Recovery {
    /// What was put in use, if something was.
    pub const fn promotion(&self) -> Option<&Promotion> {
        match self {
            Self::Replicating => None,
            Self::FailedOver(promotion) | Self::Committed(promotion) => Some(promotion),
            Self::Reversing(reversal) => Some(&reversal.promotion),
        }
    }

    /// As it stands in JSON.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Replicating => "replicating",
            Self::FailedOver(_) => "failed-over",
            Self::Committed(_) => "committed",
            Self::Reversing(_) => "reversing",
        }
    }
}

impl Promotion {
    /// The state that was put in use.
    pub fn state(&self) -> StateId {
        match self.moment {
            Some(moment) => StateId::Moment(moment),
            None => StateId::Point(self.point),
        }
    }
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Planned => "planned",
            Self::Unplanned => "unplanned",
        })
    }
}

const PROMOTE: &str = "promote the volume";

impl VolumeWriter {
    /// Puts a state in use in place of the source: makes a new generation, and refuses from then
    /// on what older ones ship. Nothing of the volume's history changes. Done again it chooses
    /// another state.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the store does not have that state (any more);
    /// [`ErrorKind::State`] after a commit; the system's.
    pub fn promote(
        &mut self,
        state: impl Into<StateId>,
        how: How,
        host: &str,
    ) -> Result<Promotion> {
        self.usable()?;
        let refused = match &self.catalogue.recovery {
            Recovery::Replicating | Recovery::FailedOver(_) => None,
            Recovery::Committed(_) => Some("its failover is committed: the other points are gone"),
            Recovery::Reversing(_) => Some("it is failed over, and protected again"),
        };
        if let Some(why) = refused {
            return Err(Error::new(ErrorKind::State, PROMOTE)
                .volume(self.catalogue.volume)
                .detail(why));
        }
        let (point, moment, since) = self.find_state(state.into())?;
        let now = Timestamp::now();
        let promotion = Promotion {
            point,
            moment,
            how,
            time: now,
            host: host.to_owned(),
            loss: self.catalogue.loss(moment.map(|m| m.epoch), point, since),
            replaced: self.catalogue.generation.id,
        };
        let mut next = self.catalogue.clone();
        next.generation = self.catalogue.next_generation()?;
        next.recovery = Recovery::FailedOver(promotion.clone());
        self.save(next)
            .map_err(|e| lease::explain_full(&self.folder, e))?;
        Ok(promotion)
    }

    fn reader(&self) -> VolumeReader {
        VolumeReader {
            folder: self.folder.clone(),
            key: self.key.clone(),
            known: Arc::default(),
        }
    }

    /// The point that holds a state, its moment, and when the volume was so.
    fn find_state(&self, state: StateId) -> Result<(PointId, Option<Moment>, Timestamp)> {
        match state {
            StateId::Point(id) => {
                let listed = self.catalogue.point(id);
                let point = listed.ok_or_else(|| lease::no_such_point(&self.folder, id))?;
                Ok((id, None, point.time))
            }
            StateId::Moment(moment) => {
                let found = self.reader().state(PointSelector::Moment(moment))?;
                let mut before = self.catalogue.points.iter().rev();
                let point = before.find(|point| point.epoch < moment.epoch);
                let point = point.ok_or_else(|| {
                    Error::new(ErrorKind::NotFound, PROMOTE)
                        .volume(self.catalogue.volume)
                        .detail(format!("no recovery point lies before {moment}"))
                })?;
                Ok((point.id, Some(moment), found.time()))
            }
        }
    }
}

impl Catalogue {
    /// What is behind a state: of whole logs, all that lie behind the epoch that it is in.
    fn loss(&self, moment: Option<Epoch>, point: PointId, since: Timestamp) -> Loss {
        let epoch = moment.or(self.point(point).map(|point| point.epoch));
        let behind = |log: &&LogEntry| Some(log.first) > epoch;
        let bytes = self
            .logs
            .iter()
            .filter(behind)
            .map(|log| log.bytes.get())
            .sum();
        Loss {
            bytes: ByteLen::new(bytes),
            since,
            known_until: self.known_until().max(since),
        }
    }

    /// Up to when it is known what the source did.
    pub fn known_until(&self) -> Timestamp {
        let point = self.points.last().map(|point: &Point| point.time);
        let window = self.windows().last().map(|window| window.to.time);
        point.max(window).unwrap_or(Timestamp::from_nanos(0))
    }

    /// Takes the logs behind a point off the chain; returns them.
    pub(super) fn cut_behind(&mut self, point: PointId) -> Vec<LogEntry> {
        let Some(point) = self.point(point).cloned() else {
            return Vec::new();
        };
        let kept = self.logs.partition_point(|log| log.last <= point.epoch);
        self.size = point.size;
        self.logs.split_off(kept)
    }
}
