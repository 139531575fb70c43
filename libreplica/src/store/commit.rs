//! Making a failover final. The chosen state stays alone: the other points leave the list, and
//! what lies behind it leaves the history, in one replacement of the catalogue. A moment between
//! two points becomes a point first: the log that it lies in is written anew up to there, ends in
//! the point, and stands for the old one, so that what was written since follows it.

use std::fs::File;
use std::io::BufReader;

use hrl_format::id::PointId;
use hrl_format::record::{Consistency, Record, Tag};
use hrl_format::units::{Sequence, Timestamp};
use hrl_format::{ChainEnd, EpochRange, LogHeader, RecordOrder, Scanner};

use super::catalogue::{Catalogue, LogEntry};
use super::epoch::{EpochLog, SealedEpoch};
use super::held::durable_leases;
use super::lease::Withdrawn;
use super::moment::Moment;
use super::recovery::{Promotion, Recovery};
use super::writer::VolumeWriter;
use super::{durable, ingest, lease, machine, state};
use crate::error::{Error, ErrorKind, IoContext, Result};

const COMMIT: &str = "commit the failover";

/// What the catalogue is to become.
struct Outcome {
    next: Catalogue,
    /// The logs that are needed no more.
    behind: Vec<LogEntry>,
    /// The new log, if the choice was a moment.
    made: Option<SealedEpoch>,
}

impl VolumeWriter {
    /// Makes the choice of a failover final: all points but the chosen one leave the list, and
    /// what lies behind it leaves the history. Of a moment the newest point before it stays, too,
    /// for as long as the branch stands on it. Returns how many points are gone. Done again it
    /// does nothing.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if the volume is not failed over; [`ErrorKind::Busy`] if somebody
    /// reads one of the points, or another branch stands on one; the system's.
    pub fn commit_failover(&mut self) -> Result<usize> {
        self.usable()?;
        let refuse = |why: &str| {
            Err(Error::new(ErrorKind::State, COMMIT)
                .volume(self.catalogue.volume)
                .detail(why))
        };
        let promotion = match &self.catalogue.recovery {
            Recovery::FailedOver(promotion) => promotion.clone(),
            Recovery::Committed(_) => return Ok(0),
            Recovery::Replicating => return refuse("it is not failed over"),
            Recovery::Reversing(_) => return refuse("it is committed, and protected again"),
        };
        let points = self.catalogue.points.iter().map(|point| point.id);
        let dropped: Vec<PointId> = points.filter(|id| *id != promotion.point).collect();
        let _withdrawn = self.withdraw(&dropped)?;
        let Outcome { next, behind, made } = self.outcome(promotion)?;
        if let Some(made) = &made {
            for point in &next.points {
                lease::prepare(&self.folder.point_lease(point.id))?;
            }
            self.place(made)?;
            durable::sync_folder(&self.folder.logs())?;
        }
        self.retire(next, &behind)
            .map_err(|e| lease::explain_full(&self.folder, e))?;
        for id in &dropped {
            durable::remove(&self.folder.point_lease(*id))?;
        }
        machine::remove_proofs(&self.folder, |id| self.catalogue.point(id).is_some())?;
        Ok(dropped.len())
    }

    /// Keeps readers away from points that are to go.
    fn withdraw(&self, points: &[PointId]) -> Result<Vec<Withdrawn>> {
        let mut withdrawn = Vec::new();
        for id in points {
            let path = self.folder.point_lease(*id);
            let Some(lock) = lease::withdraw(&path)? else {
                return Err(Error::new(ErrorKind::Busy, COMMIT)
                    .path(&path)
                    .detail(format!("somebody reads point {id}, which is to go"))
                    .advice("`lsof` of that file names who; close it, and try again"));
            };
            withdrawn.push(lock);
        }
        let mut held = durable_leases(&self.folder)?.into_iter();
        match held.find(|held| points.contains(&held.point)) {
            None => Ok(withdrawn),
            Some(held) => {
                let why = format!("a branch stands on point {}, which is to go", held.point);
                Err(Error::new(ErrorKind::Busy, COMMIT)
                    .path(held.by)
                    .detail(why)
                    .advice("discard the branch, and try again"))
            }
        }
    }

    fn outcome(&self, mut promotion: Promotion) -> Result<Outcome> {
        let mut next = self.catalogue.clone();
        let kept = promotion.point;
        let (behind, made) = match promotion.moment.take() {
            None => (next.cut_behind(kept), None),
            Some(moment) => {
                let time = promotion.loss.since;
                let (behind, made) = self.make_point(&mut next, moment, time)?;
                promotion.point = made.tags.first().map_or(kept, |tag| tag.id);
                (behind, Some(made))
            }
        };
        let stays = |id| id == kept || id == promotion.point;
        next.points.retain(|point| stays(point.id));
        next.recovery = Recovery::Committed(promotion);
        Ok(Outcome { next, behind, made })
    }

    /// Has the history in `next` end in a point at `moment`.
    fn make_point(
        &self,
        next: &mut Catalogue,
        moment: Moment,
        time: Timestamp,
    ) -> Result<(Vec<LogEntry>, SealedEpoch)> {
        let (at, _, _) = state::find(&self.folder, next, moment)?;
        // Before the first record of a log is behind the last one of the log before it.
        let (cut, until) = match moment.after {
            Some(after) => (at, Some(after)),
            None => (at.saturating_sub(1), None),
        };
        let old = next.logs[cut];
        let made = self.prefix(&old, until, time)?;
        let behind = next.logs.split_off(cut);
        let (entry, points) = ingest::added(next, &made)?;
        next.size = entry.size;
        next.logs.push(entry);
        let later = |epoch| epoch > old.last;
        next.points.retain(|point| !later(point.epoch));
        next.points.extend(points);
        Ok((behind, made))
    }

    /// Writes a log anew, up to a record, with a point at its end.
    fn prefix(
        &self,
        old: &LogEntry,
        until: Option<Sequence>,
        time: Timestamp,
    ) -> Result<SealedEpoch> {
        let path = self.folder.log(&old.name());
        let file = File::open(&path).at(COMMIT, &path)?;
        let wrong = |e| Error::log(COMMIT, e).path(&path);
        let mut scanner = Scanner::new(BufReader::with_capacity(1 << 20, file), self.key.as_ref())
            .map_err(wrong)?;
        let header = self.header_in_place_of(scanner.header(), old)?;
        let (options, key) = (&self.options, self.key.as_ref());
        let mut log = EpochLog::create(&self.folder, header, options, key)?;
        let mut number = 0;
        while until.is_none_or(|last| number <= last.get())
            && let Some(entry) = scanner.next_record().map_err(wrong)?
        {
            log.append(&entry.record, entry.time)?;
            number += 1;
        }
        let random = |e| Error::new(ErrorKind::Io, COMMIT).source(e);
        let tag = Tag {
            id: PointId::at(time).map_err(random)?,
            time,
            consistency: Consistency::Crash,
            label: "failed over to".to_owned(),
            group: None,
            root: None,
        };
        log.append(&Record::Tag(tag), time)?;
        log.seal()
    }

    fn header_in_place_of(&self, old: &LogHeader, entry: &LogEntry) -> Result<LogHeader> {
        let header = self.next_header(&self.catalogue, RecordOrder::AsCompleted)?;
        let link = entry.link();
        Ok(LogHeader {
            previous: old.previous,
            previous_seal: old.previous_seal,
            stands_for: Some(ChainEnd {
                log: link.log,
                seal: Some(link.seal),
            }),
            epochs: EpochRange::single(entry.last),
            volume_size: old.volume_size,
            created: old.created,
            ..header
        })
    }
}
