//! Retention: points that have expired leave the catalogue. That alone gives no room back; it
//! allows the logs up to the oldest point that is left to be folded (`fold.rs`).

use hrl_format::id::PointId;
use hrl_format::units::Timestamp;

use super::catalogue::MomentsAround;
use super::durable;
use super::lease;
use super::writer::VolumeWriter;
use crate::error::{Error, ErrorKind, Result};
use crate::policy::Retention;

/// What retention did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retained {
    /// The points that are gone.
    pub dropped: Vec<PointId>,
    /// The points that have expired and stay, because somebody reads them now.
    pub leased: Vec<PointId>,
}

impl VolumeWriter {
    /// Drops the points that `policy` does not keep at `now`: never the newest, never one
    /// that is being read. The moments between a dropped point and its neighbours cannot be had
    /// any more. Durable when it returns. [`VolumeWriter::fold_step`] gives back the room.
    ///
    /// # Errors
    /// The system's; the points are then as before.
    pub fn retain(&mut self, policy: &Retention, now: Timestamp) -> Result<Retained> {
        self.usable()?;
        let points = &self.catalogue.points;
        let times: Vec<_> = points.iter().map(|point| (point.id, point.time)).collect();
        let newest = points.last().map(|point| point.id);
        let mut retained = Retained::default();
        // Held until the catalogue is durable: no reader comes in between.
        let mut withdrawn = Vec::new();
        for id in policy.expired(&times, now) {
            if Some(id) == newest {
                continue;
            }
            match lease::withdraw(&self.folder.point_lease(id))? {
                Some(lock) => {
                    withdrawn.push(lock);
                    retained.dropped.push(id);
                }
                None => retained.leased.push(id),
            }
        }
        self.unlist(&retained.dropped, MomentsAround::GivenUp)?;
        Ok(retained)
    }

    /// Takes back one point, the newest or any other; for a point whose group did not come about,
    /// or by an operator's wish. Its log and what that brought stay, also as moments. Durable when
    /// it returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if somebody reads the point now, which then
    /// stays; the system's.
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
        self.unlist(&[id], MomentsAround::Kept)
    }

    /// Takes points off the catalogue, which no reader must hold.
    fn unlist(&mut self, points: &[PointId], moments: MomentsAround) -> Result<()> {
        if points.is_empty() {
            return Ok(());
        }
        let mut next = self.catalogue.clone();
        next.drop_points(points, moments);
        self.save(next)
            .map_err(|e| lease::explain_full(&self.folder, e))?;
        for id in points {
            durable::remove(&self.folder.point_lease(*id))?;
        }
        Ok(())
    }
}
