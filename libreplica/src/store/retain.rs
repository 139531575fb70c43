//! Retention: points that have expired leave the catalogue, and moments that are older than the
//! policy keeps them. That alone gives no room back; it allows the logs between the points
//! that are left to be merged, and those up to the oldest to be folded (`fold.rs`).
//!
//! Points leave in small groups, for each is kept from new readers by a lock on its file until the
//! catalogue without it is durable, and a process has few files.

use std::collections::HashSet;

use hrl_format::id::PointId;
use hrl_format::units::Timestamp;

use super::catalogue::{Catalogue, MomentsKept, Point};
use super::durable;
use super::held::durable_leases;
use super::lease::{self, Withdrawn};
use super::machine;
use super::writer::VolumeWriter;
use crate::error::{Error, ErrorKind, Result};
use crate::policy::{Candidate, Retention};

/// So many points leave with one change of the catalogue, at most.
const AT_ONCE: usize = 128;

/// What retention did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retained {
    /// The points that are gone.
    pub dropped: Vec<PointId>,
    /// The points that have expired and stay, because somebody reads them now, or a branch
    /// stands on them.
    pub leased: Vec<PointId>,
}

impl From<&Point> for Candidate {
    fn from(point: &Point) -> Self {
        Self {
            id: point.id,
            time: point.time,
            consistency: point.consistency,
        }
    }
}

impl VolumeWriter {
    /// Drops the points that `policy` does not keep at `now`: never the newest, never one
    /// that is being read or that a branch stands on. Moments go where they are older than the
    /// policy keeps all points, or than the oldest point that it keeps. Durable when it
    /// returns. [`VolumeWriter::fold_step`] gives back the room.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if it cannot be told what a branch stands on; the system's. Some of
    /// the points may be gone then, each of them wholly.
    pub fn retain(&mut self, policy: &Retention, now: Timestamp) -> Result<Retained> {
        self.usable()?;
        let points = &self.catalogue.points;
        let candidates: Vec<_> = points.iter().map(Candidate::from).collect();
        let newest = points.last().map(|point| point.id);
        let mut expired = policy.expired(&candidates, now);
        expired.retain(|&id| Some(id) != newest);
        let gone: HashSet<PointId> = expired.iter().copied().collect();
        let kept = points.iter().filter(|point| !gone.contains(&point.id));
        let moments = MomentsKept {
            since: policy.moments_since(now),
            behind: kept.map(|point| point.epoch).min(),
        };
        let mut retained = Retained::default();
        for points in expired.chunks(AT_ONCE) {
            self.expire(points, &mut retained)?;
        }
        let mut next = self.catalogue.clone();
        if next.give_up_moments(&moments) {
            self.replace_catalogue(next)?;
        }
        Ok(retained)
    }

    /// Drops those of `points` that nothing holds.
    fn expire(&mut self, points: &[PointId], retained: &mut Retained) -> Result<()> {
        // Held until the catalogue is durable: no reader comes in between.
        let mut withdrawn: Vec<(PointId, Withdrawn)> = Vec::new();
        for &id in points {
            match lease::withdraw(&self.folder.point_lease(id))? {
                Some(lock) => withdrawn.push((id, lock)),
                None => retained.leased.push(id),
            }
        }
        let held: HashSet<PointId> = durable_leases(&self.folder)?
            .into_iter()
            .map(|held| held.point)
            .collect();
        let (stay, go): (Vec<_>, Vec<_>) = withdrawn
            .iter()
            .map(|(id, _)| *id)
            .partition(|id| held.contains(id));
        retained.leased.extend(stay);
        self.unlist(&go)?;
        retained.dropped.extend(go);
        Ok(())
    }

    /// Takes back one point, the newest or any other; for a point whose group did not come about,
    /// or by an operator's wish. Its log and what that brought stay, also as moments. Durable when
    /// it returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if somebody reads the point now, or a
    /// branch stands on it; it then stays; the system's.
    pub fn drop_point(&mut self, id: PointId) -> Result<()> {
        const DROP: &str = "drop a recovery point";
        self.usable()?;
        if self.catalogue.point(id).is_none() {
            return Err(lease::no_such_point(&self.folder, id));
        }
        let path = self.folder.point_lease(id);
        let Some(_withdrawn) = lease::withdraw(&path)? else {
            return Err(Error::new(ErrorKind::Busy, DROP)
                .path(&path)
                .detail(format!("somebody reads point {id}"))
                .advice("`lsof` of that file names who; try again when they have ended"));
        };
        let mut held = durable_leases(&self.folder)?.into_iter();
        if let Some(held) = held.find(|held| held.point == id) {
            return Err(Error::new(ErrorKind::Busy, DROP)
                .path(held.by)
                .detail(format!("a branch stands on point {id}"))
                .advice("discard the branch first"));
        }
        self.unlist(&[id])
    }

    /// Takes points off the catalogue, which nothing must hold.
    fn unlist(&mut self, points: &[PointId]) -> Result<()> {
        if points.is_empty() {
            return Ok(());
        }
        let mut next = self.catalogue.clone();
        next.drop_points(points);
        self.replace_catalogue(next)?;
        for id in points {
            durable::remove(&self.folder.point_lease(*id))?;
        }
        machine::remove_proofs(&self.folder, |id| self.catalogue.point(id).is_some())?;
        Ok(())
    }

    fn replace_catalogue(&mut self, next: Catalogue) -> Result<()> {
        self.save(next)
            .map_err(|e| lease::explain_full(&self.folder, e))
    }
}
