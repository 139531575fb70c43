//! The way home of a volume that was failed over: what is written where it is used now becomes
//! its history, log by log, under the generation that the failover made; and at the end the first
//! side becomes its primary again, under one more. A branch's logs are ordinary ones and follow
//! the state that it stands on, so each is taken in as it is, by a second name for its file.

use std::fs::File;
use std::io::BufReader;
use std::time::Duration;

use hrl_format::record::{Record, Tag};
use hrl_format::units::{ByteLen, Timestamp};
use hrl_format::{Ending, Scanner};
use serde::{Deserialize, Serialize};

use super::branch::BranchLog;
use super::catalogue::CatalogueGeneration;
use super::epoch::SealedEpoch;
use super::layout::LogName;
use super::moment::{InOrder, LogOrder};
use super::recovery::{Promotion, Recovery};
use super::writer::{Committed, VolumeWriter};
use super::{durable, ingest, lease};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::policy::Retention;

const REVERSE: &str = "protect what the volume was failed over to";
const ADOPT: &str = "take a branch's log into the volume";
const RETURN: &str = "give the volume back to its first side";

/// How what is in use is protected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Reversal {
    /// What is in use.
    pub promotion: Promotion,
    /// The interval between recovery points, in milliseconds.
    pub every_ms: u64,
    /// Which of them are kept, as it was written.
    pub retain: String,
}

impl Reversal {
    /// The interval between recovery points.
    pub const fn every(&self) -> Duration {
        Duration::from_millis(self.every_ms)
    }
}

impl VolumeWriter {
    /// Lets what is written to the branch of a committed failover become the volume's history
    /// from now on. Done again it changes interval and policy.
    ///
    /// # Errors
    /// [`ErrorKind::State`] unless the failover is committed; the system's.
    pub fn reverse(&mut self, every: Duration, retain: &Retention) -> Result<()> {
        self.usable()?;
        let promotion = match &self.catalogue.recovery {
            Recovery::Committed(promotion) => promotion,
            Recovery::Reversing(reversal) => &reversal.promotion,
            Recovery::Replicating | Recovery::FailedOver(_) => {
                return Err(Error::new(ErrorKind::State, REVERSE)
                    .volume(self.catalogue.volume)
                    .detail("no failover of it is committed")
                    .advice("`replica failover`, then `replica commit`"));
            }
        };
        let reversal = Reversal {
            promotion: promotion.clone(),
            every_ms: u64::try_from(every.as_millis()).unwrap_or(u64::MAX),
            retain: retain.to_string(),
        };
        let mut next = self.catalogue.clone();
        next.recovery = Recovery::Reversing(reversal);
        self.save(next)
            .map_err(|e| lease::explain_full(&self.folder, e))
    }

    /// Takes a sealed log of the branch in, unless it is there; durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::State`] unless the volume is protected where it is used now;
    /// [`ErrorKind::Foreign`] if it does not follow what is here; [`ErrorKind::Damaged`]; the
    /// system's.
    pub fn adopt(&mut self, log: &BranchLog) -> Result<Option<Committed>> {
        self.usable()?;
        if !matches!(self.catalogue.recovery, Recovery::Reversing(_)) {
            return Err(Error::new(ErrorKind::State, ADOPT)
                .volume(self.catalogue.volume)
                .detail("it is not protected where it is used now"));
        }
        if log.header.epochs.last <= self.catalogue.last_epoch() {
            return Ok(None);
        }
        ingest::check_next(&self.catalogue, &log.header)?;
        let sealed = self.read_whole(log)?;
        let (entry, mut points) = ingest::added(&self.catalogue, &sealed)?;
        for point in &points {
            lease::prepare(&self.folder.point_lease(point.id))?;
        }
        let place = self.folder.log(&sealed.name);
        // A second name that an earlier try left says nothing.
        durable::remove(&place)?;
        durable::link(&log.path, &place)?;
        durable::sync_folder(&self.folder.logs())?;
        let mut next = self.catalogue.clone();
        next.size = entry.size;
        next.logs.push(entry);
        next.points.extend(points.iter().cloned());
        self.save(next)
            .map_err(|e| lease::explain_full(&self.folder, e))?;
        ingest::reveal(&mut points, &sealed.tags);
        Ok(Some(Committed {
            epoch: entry.last,
            log: Some(entry.log),
            points,
            bytes: entry.bytes,
        }))
    }

    /// Reads all of a log, which proves it, and what the catalogue is to say of it.
    fn read_whole(&self, log: &BranchLog) -> Result<SealedEpoch> {
        let path = &log.path;
        let file = File::open(path).at(ADOPT, path)?;
        let wrong = |e| Error::log(ADOPT, e).path(path);
        let mut scanner = Scanner::new(BufReader::with_capacity(1 << 20, file), self.key.as_ref())
            .map_err(wrong)?;
        let (mut records, mut covers, mut tags) = (0, 0_u64, Vec::<Tag>::new());
        let created = log.header.created;
        let (mut from, mut to) = (created, None::<Timestamp>);
        while let Some(entry) = scanner.next_record().map_err(wrong)? {
            records += 1;
            from = from.min(entry.time);
            to = to.max(Some(entry.time));
            match entry.record {
                Record::Write { extent, .. }
                | Record::Zeroes { extent }
                | Record::Discard { extent } => {
                    covers = covers.saturating_add(extent.len().get());
                }
                Record::Tag(tag) => tags.push(tag),
                Record::Resize { .. } => {}
            }
        }
        if let Some(Ending::Torn { at, cause }) = scanner.ending() {
            return Err(Error::new(ErrorKind::Damaged, ADOPT)
                .path(path)
                .detail(format!("it is torn at byte {at}: {cause}")));
        }
        Ok(SealedEpoch {
            name: LogName {
                first: log.header.epochs.first,
                log: log.header.log,
            },
            header: log.header.clone(),
            seal: log.seal.clone(),
            tags,
            covers: ByteLen::new(covers),
            order: LogOrder::AsCompleted(InOrder {
                records,
                from,
                to: to.unwrap_or(created),
            }),
        })
    }

    /// Makes the first side the volume's primary again, as `generation`: the volume is as if
    /// it had never been failed over.
    ///
    /// # Errors
    /// [`ErrorKind::State`] unless the volume is protected where it is used now, and if
    /// `generation` does not follow its own; the system's.
    pub fn return_home(&mut self, generation: CatalogueGeneration) -> Result<()> {
        self.usable()?;
        let own = self.catalogue.generation;
        let follows = generation.parent == Some(own.id) && generation.number > own.number;
        if !follows || !matches!(self.catalogue.recovery, Recovery::Reversing(_)) {
            return Err(Error::new(ErrorKind::State, RETURN)
                .volume(self.catalogue.volume)
                .detail("it is not protected towards its first side, or changed meanwhile"));
        }
        let mut next = self.catalogue.clone();
        next.generation = generation;
        next.recovery = Recovery::Replicating;
        self.save(next)
            .map_err(|e| lease::explain_full(&self.folder, e))
    }
}
