//! The way home: `reprotect` lets what is written where the volume is used now become its
//! history, and `failback` gives the volume back to its first side. What that side's disk holds
//! is not trusted: it is read and compared, and what differs is written; twice, for most of it
//! goes while the other side is in use.

use std::path::Path;
use std::time::Duration;

use super::failover::{AtRest, Failover};
use crate::error::{Error, ErrorKind, Result};
use crate::failover::Event;
use crate::id::{BranchId, Generation, PointId};
use crate::policy::Retention;
use crate::store::{
    BranchEntry, BranchPurpose, Overwrite, PointSelector, Progress, RestoreOptions, RestoreProof,
    Restored,
};
use crate::units::ByteLen;

const FAIL_BACK: &str = "bring the volume home";

/// A device that a volume is brought home to.
pub trait Home {
    /// What of it is to be done, and how far that is.
    fn progress(&mut self, pass: Pass, progress: Progress);

    /// The volume will be this side's from `generation` on: a daemon that protects the device
    /// writes that down, and goes on by itself once the store says so.
    ///
    /// # Errors
    /// If that cannot be; nothing is changed then.
    fn comes(&mut self, generation: Generation) -> Result<()>;
}

/// What is done to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// It is brought to the newest point, while the other side is in use.
    First,
    /// The other side is at rest: the device is brought to its last point, and proved.
    Last,
}

/// What a failback came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CameHome {
    /// The point that holds everything.
    pub point: PointId,
    /// How much of the device was written while the other side was in use.
    pub before: ByteLen,
    /// How much was, while nobody was.
    pub at_rest: ByteLen,
    /// How long nobody could use the volume: since the other side was asked to come to rest.
    pub downtime: Duration,
}

impl Failover {
    /// Protects what the volume was failed over to: from now on what is written there is its
    /// history. Returns the branch, for who serves it.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where the table has none; those of making the branch again, if it is
    /// not there, and of [`VolumeWriter::reverse`](crate::store::VolumeWriter::reverse).
    pub fn reprotect(&self, every: Duration, retain: &Retention) -> Result<BranchId> {
        let situation = self.may(Event::Reprotect)?;
        let branch = situation.branch.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "protect what is in use")
                .volume(self.volume())
                .detail("what was written since the failover is not in this store")
        })?;
        self.take_lock()?.reverse(every, retain)?;
        Ok(branch)
    }

    /// Brings `device` to what the other side has, has that come to rest, and makes this side the
    /// primary again. `limit` is how long the other side may take to come to rest, reading all
    /// that it has.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where the table has none, and if the other side refuses;
    /// [`ErrorKind::TimedOut`] if it does not answer; [`ErrorKind::Busy`] if the device is in
    /// use; those of restoring a point. Until all is done the other side goes on.
    pub fn failback(
        &self,
        device: &Path,
        limit: Duration,
        home: &mut dyn Home,
    ) -> Result<CameHome> {
        let situation = self.may(Event::Failback)?;
        self.refuse_unserved(situation.branch)?;
        let newest = self.reader()?.point(PointSelector::Latest)?;
        let before = self.bring(newest.id, device, Pass::First, home)?;
        let began = std::time::Instant::now();
        let AtRest {
            mut writer,
            point,
            asking,
        } = self.take_over_at_rest(limit)?;
        let brought = self
            .bring(point, device, Pass::Last, home)
            .and_then(|last| {
                let generation = writer.catalogue().next_generation()?;
                home.comes(generation.generation())?;
                writer.return_home(generation)?;
                Ok(last)
            });
        drop(writer);
        drop(asking);
        let last = brought?;
        self.sweep();
        Ok(CameHome {
            point,
            before: before.written,
            at_rest: last.written,
            downtime: began.elapsed(),
        })
    }

    /// Only who serves what is in use can bring it to rest, and into the volume.
    fn refuse_unserved(&self, in_use: Option<BranchId>) -> Result<()> {
        let branches = self.reader()?.branches()?;
        let served = |entry: &&BranchEntry| Some(entry.info.id) == in_use && entry.in_use;
        if branches.iter().any(|entry| served(&entry)) {
            return Ok(());
        }
        let branch = in_use.map_or_else(String::new, |id| format!(" (branch {id})"));
        Err(Error::new(ErrorKind::State, FAIL_BACK)
            .volume(self.volume())
            .detail(format!(
                "nobody serves what is in use{branch}, so that it cannot come to rest"
            ))
            .advice("`replica open VOLUME --branch ID --nbd unix:PATH`, then try again"))
    }

    fn bring(
        &self,
        point: PointId,
        device: &Path,
        pass: Pass,
        home: &mut dyn Home,
    ) -> Result<Restored> {
        let options = RestoreOptions::default().overwrite(Overwrite::Update);
        let mut progress = |progress| home.progress(pass, progress);
        let brought = self
            .reader()?
            .restore(point, device, &options, &mut progress)?;
        if pass == Pass::Last && brought.proof != RestoreProof::Root {
            return Err(Error::new(ErrorKind::Damaged, FAIL_BACK)
                .volume(self.volume())
                .detail("the last point does not say what its digest is"));
        }
        Ok(brought)
    }

    /// Removes what the volume was failed over to: all of it is its history. Who still has it open
    /// is told.
    fn sweep(&self) {
        let sweep = || {
            let reader = self.reader()?;
            for entry in reader.branches()? {
                if entry.info.purpose != BranchPurpose::Failover {
                    continue;
                }
                let id = entry.info.id;
                match reader.discard_branch(id) {
                    Err(error) if error.kind() == ErrorKind::Busy => reader.end_branch(id)?,
                    done => done?,
                }
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = sweep() {
            tracing::warn!(volume = %self.volume(), "{error}");
        }
    }
}
