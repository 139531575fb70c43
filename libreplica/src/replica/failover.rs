//! Failover, carried out: what the state machine (`failover/`) says is to be done, done in the
//! store, step by step, so that a process killed anywhere leaves a state from which
//! [`Failover::finish`] goes on. Serving what was opened is the caller's matter; here branches
//! are made, kept and thrown away.

use std::time::{Duration, Instant};

use hrl_format::VolumeKey;
use hrl_format::record::Consistency;

use crate::error::{Error, ErrorKind, Result};
use crate::failover::{Event, State, Step, step};
use crate::id::{BranchId, HandoverId, PointId, VolumeId};
use crate::store::{
    Answer, Ask, Asking, BranchPurpose, Catalogue, How, PointSelector, Promotion, Recovery,
    StateId, Store, VolumeReader, VolumeWriter,
};

const FAIL_OVER: &str = "fail the volume over";
const REST: &str = "have the source come to rest";
/// How long a primary may take to let go.
const LET_GO: Duration = Duration::from_secs(15);
/// A source that came to rest does so for [`LET_GO`] longer than it was given; what follows on
/// its answer must be done before so much of that is over, for then it goes on.
const IN_TIME: Duration = Duration::from_secs(5);
/// How often it is looked whether it has.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Which state of the volume is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// The newest that the store knows, point or not.
    Latest,
    /// The newest recovery point.
    LatestProcessed,
    /// The newest recovery point that applications were asked for.
    LatestApplication,
    /// This one.
    State(PointSelector),
}

/// Whether the source is asked to come to rest before it is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// It is not.
    Skip,
    /// It is, and has so long.
    Try(Duration),
}

/// How a volume is, seen from where it is recovered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Situation {
    /// In one word.
    pub state: State,
    /// What became of it at its last failover.
    pub recovery: Recovery,
    /// The branch of the drill that is open.
    pub drill: Option<BranchId>,
    /// The branch that is in use in place of the source.
    pub branch: Option<BranchId>,
}

/// What a failover came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedOver {
    /// What is in use, and what it lacks.
    pub promotion: Promotion,
    /// The branch to be served.
    pub branch: BranchId,
    /// Why the source did not come to rest, if it was asked to.
    pub source: Option<String>,
}

/// What a source left that came to rest. Dropped, it goes on.
#[derive(Debug)]
pub struct AtRest {
    /// The lock that it let go.
    pub(super) writer: VolumeWriter,
    /// The point that holds everything.
    pub(super) point: PointId,
    /// It rests as long as this is there.
    pub(super) asking: Asking,
}

/// One volume of a store, as it is failed over.
#[derive(Debug)]
pub struct Failover {
    store: Store,
    volume: VolumeId,
    key: Option<VolumeKey>,
    host: String,
}

impl Failover {
    /// Of a volume, by the machine called `host`.
    pub fn new(store: Store, volume: VolumeId, key: Option<VolumeKey>, host: &str) -> Self {
        Self {
            store,
            volume,
            key,
            host: host.to_owned(),
        }
    }

    /// The store.
    pub const fn store(&self) -> &Store {
        &self.store
    }

    /// The volume.
    pub const fn volume(&self) -> VolumeId {
        self.volume
    }

    pub(super) fn reader(&self) -> Result<VolumeReader> {
        self.store.volume(self.volume, self.key.clone())
    }

    /// How the volume is.
    ///
    /// # Errors
    /// Those of reading the catalogue and the branches.
    pub fn situation(&self) -> Result<Situation> {
        let reader = self.reader()?;
        let catalogue = reader.catalogue()?;
        let branches = reader.branches()?;
        let of = |purpose: BranchPurpose| {
            let mut found = branches
                .iter()
                .filter(|entry| entry.info.purpose == purpose);
            let own = catalogue.generation.id;
            let is_it = |id| purpose != BranchPurpose::Failover || id == own;
            found
                .find(|entry| is_it(entry.info.generation.id))
                .map(|entry| entry.info.id)
        };
        let drill = of(BranchPurpose::Test);
        let state = match (&catalogue.recovery, drill) {
            (Recovery::Replicating, None) => State::Replicating,
            (Recovery::Replicating, Some(_)) => State::TestFailover,
            (Recovery::FailedOver(_), _) => State::FailedOver,
            (Recovery::Committed(_), _) => State::Committed,
            (Recovery::Reversing(_), _) => State::Reversing,
        };
        Ok(Situation {
            state,
            recovery: catalogue.recovery.clone(),
            drill,
            branch: of(BranchPurpose::Failover),
        })
    }

    /// Whether an event means something now; how the volume is.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it does not: why, and what would. Those of
    /// [`Failover::situation`].
    pub fn may(&self, event: Event) -> Result<Situation> {
        self.decide(event).map(|(situation, _)| situation)
    }

    fn decide(&self, event: Event) -> Result<(Situation, Step)> {
        let situation = self.situation()?;
        let decided = step(situation.state, event).map_err(|refusal| {
            Error::new(ErrorKind::State, FAIL_OVER)
                .volume(self.volume)
                .detail(refusal.why)
                .advice(refusal.advice)
        })?;
        Ok((situation, decided))
    }

    /// Opens a drill: a branch to be served, which [`Failover::clean_up`] throws away.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where the table has none; those of choosing and opening a state.
    pub fn test(&self, choice: Choice) -> Result<BranchId> {
        self.decide(Event::Test)?;
        let reader = self.reader()?;
        let catalogue = reader.catalogue()?;
        let chosen = self.choose(&reader, &catalogue, choice)?;
        let branch = reader.create_branch(
            selector(chosen),
            BranchPurpose::Test,
            catalogue.next_generation()?,
        )?;
        Ok(branch.info().id)
    }

    /// Throws the drill away.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if none is open; [`ErrorKind::Busy`] while it is served.
    pub fn clean_up(&self) -> Result<()> {
        let (situation, _) = self.decide(Event::Cleanup)?;
        let reader = self.reader()?;
        situation
            .drill
            .map_or(Ok(()), |drill| reader.discard_branch(drill))
    }

    /// Puts a state in use in place of the source, whatever that does.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where the table has none; [`ErrorKind::Busy`] if the primary does not
    /// let go of the volume; those of choosing and opening a state.
    pub fn unplanned(&self, choice: Choice, shutdown: Shutdown) -> Result<FailedOver> {
        let (event, limit) = match shutdown {
            Shutdown::Skip => (Event::Unplanned, None),
            Shutdown::Try(limit) => (Event::UnplannedAfterShutdown, Some(limit)),
        };
        self.decide(event)?;
        let reader = self.reader()?;
        // What cannot be had is refused before anybody is disturbed.
        self.choose(&reader, &reader.catalogue()?, choice)?;
        let rested = limit.map(|limit| self.take_over_at_rest(limit));
        let (writer, _asking, source) = match rested {
            Some(Ok(rests)) => (rests.writer, Some(rests.asking), None),
            Some(Err(error)) => (self.take_lock()?, None, Some(error.to_string())),
            None => (self.take_lock()?, None, None),
        };
        // What came to rest may have brought something newer.
        let chosen = self.choose(&reader, writer.catalogue(), choice)?;
        let failed_over = self.promote(writer, chosen, How::Unplanned)?;
        Ok(FailedOver {
            source,
            ..failed_over
        })
    }

    /// Has the source come to rest, and puts its last point in use: nothing is lost, which is
    /// proved by comparing digests, or nothing is done.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where the table has none, and if the source refuses;
    /// [`ErrorKind::TimedOut`] if it does not answer within `limit`; [`ErrorKind::Damaged`] if its
    /// device is not what its last point has.
    pub fn planned(&self, limit: Duration) -> Result<FailedOver> {
        let rests = self.rest(limit)?;
        self.planned_at_rest(rests)
    }

    /// The first half of [`Failover::planned`]: has the source come to rest. So the volumes of a
    /// group can all rest before the first of them is taken over.
    ///
    /// # Errors
    /// As there.
    pub fn rest(&self, limit: Duration) -> Result<AtRest> {
        self.decide(Event::Planned)?;
        self.take_over_at_rest(limit)
    }

    /// The second half: puts the last point of the source in use.
    ///
    /// # Errors
    /// Those of the store.
    pub fn planned_at_rest(&self, rests: AtRest) -> Result<FailedOver> {
        let AtRest {
            writer,
            point,
            asking: _asking,
        } = rests;
        self.promote(writer, StateId::Point(point), How::Planned)
    }

    /// Puts another state in use than the one that was chosen first. What was written on that is
    /// gone.
    ///
    /// # Errors
    /// As [`Failover::unplanned`]; [`ErrorKind::Busy`] while the first one is served.
    pub fn change_point(&self, choice: Choice) -> Result<FailedOver> {
        let (situation, _) = self.decide(Event::ChangePoint)?;
        let reader = self.reader()?;
        if let Some(branch) = situation.branch {
            drop(reader.open_branch(branch)?);
        }
        let writer = self.take_lock()?;
        let chosen = self.choose(&reader, writer.catalogue(), choice)?;
        self.promote(writer, chosen, How::Unplanned)
    }

    /// How many points [`Failover::commit`] would drop.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where the table has no commit.
    pub fn points_to_drop(&self) -> Result<usize> {
        self.decide(Event::Commit)?;
        let points = self.reader()?.catalogue()?.points.len();
        Ok(points.saturating_sub(1))
    }

    /// Makes the choice final; how many points are gone.
    ///
    /// # Errors
    /// [`ErrorKind::State`] where the table has none; those of
    /// [`VolumeWriter::commit_failover`].
    pub fn commit(&self) -> Result<usize> {
        self.decide(Event::Commit)?;
        self.take_lock()?.commit_failover()
    }

    /// What a failover by this machine to the same state came to, if nobody has it open: whoever
    /// carried it out was killed before it was served.
    ///
    /// # Errors
    /// Those of [`Failover::finish`].
    pub fn resume(&self, choice: Choice) -> Result<Option<FailedOver>> {
        let reader = self.reader()?;
        let catalogue = reader.catalogue()?;
        let Recovery::FailedOver(promotion) = &catalogue.recovery else {
            return Ok(None);
        };
        let is_it = match choice {
            Choice::State(selector) => reader.state(selector)?.id() == promotion.state(),
            _ => true,
        };
        let open = reader
            .branches()?
            .into_iter()
            .any(|entry| entry.in_use && entry.info.generation.id == catalogue.generation.id);
        if !is_it || open || promotion.host != self.host {
            return Ok(None);
        }
        let promotion = promotion.clone();
        Ok(self.finish()?.map(|branch| FailedOver {
            promotion,
            branch,
            source: None,
        }))
    }

    /// Does again what a killed process may have left: the branch of what is in use is there, and
    /// no other.
    ///
    /// # Errors
    /// Those of making a branch.
    pub fn finish(&self) -> Result<Option<BranchId>> {
        let reader = self.reader()?;
        let catalogue = reader.catalogue()?;
        let Recovery::FailedOver(promotion) = &catalogue.recovery else {
            return Ok(self.situation()?.branch);
        };
        for entry in reader.branches()? {
            let info = &entry.info;
            let goes = match info.purpose {
                BranchPurpose::Test => true,
                BranchPurpose::Failover => info.generation.id != catalogue.generation.id,
                BranchPurpose::Open | BranchPurpose::Drill => false,
            };
            if goes && let Err(error) = reader.discard_branch(info.id) {
                // It holds room, and nothing else, until it is closed.
                tracing::warn!(volume = %self.volume, branch = %info.id, "{error}");
            }
        }
        if let Some(branch) = self.situation()?.branch {
            return Ok(Some(branch));
        }
        let branch = reader.create_branch(
            selector(promotion.state()),
            BranchPurpose::Failover,
            catalogue.generation,
        )?;
        Ok(Some(branch.info().id))
    }

    fn promote(&self, mut writer: VolumeWriter, chosen: StateId, how: How) -> Result<FailedOver> {
        let promotion = writer.promote(chosen, how, &self.host)?;
        drop(writer);
        let branch = self.finish()?.ok_or_else(|| {
            Error::new(ErrorKind::State, FAIL_OVER)
                .volume(self.volume)
                .detail("it was changed meanwhile")
        })?;
        Ok(FailedOver {
            promotion,
            branch,
            source: None,
        })
    }

    /// Has the source come to rest, and takes the lock that it let go: the point that holds
    /// everything. The lock is not asked for: who holds it then has gone on, and has more.
    pub(super) fn take_over_at_rest(&self, limit: Duration) -> Result<AtRest> {
        let until = Instant::now() + limit + IN_TIME;
        let asking = self.question(Ask::Rest, limit)?;
        let point = self.rested(asking.handover().id, limit)?;
        let writer = self.store.volume_writer(self.volume, self.key.clone())?;
        let catalogue = writer.catalogue();
        let newest = catalogue.points.last();
        let is_end = newest
            .is_some_and(|newest| newest.id == point && newest.epoch == catalogue.last_epoch());
        if is_end && Instant::now() < until {
            return Ok(AtRest {
                writer,
                point,
                asking,
            });
        }
        Err(Error::new(ErrorKind::State, REST)
            .volume(self.volume)
            .detail("it has gone on meanwhile")
            .advice("try again, with a longer limit"))
    }

    /// The last point of a source that came to rest.
    fn rested(&self, asked: HandoverId, limit: Duration) -> Result<PointId> {
        match self.answer(asked, limit)? {
            Some(Answer::Rests { point, root }) => {
                let listed = self.reader()?.point(PointSelector::Id(point))?;
                let why = match (listed.root, root) {
                    (Some(listed), Some(root)) if listed == root => return Ok(point),
                    (Some(_), Some(_)) => "the digest of its device is not that of its last point",
                    (None, _) => "its last point has no digest",
                    (_, None) => "the digest of its device is not known there",
                };
                Err(Error::new(ErrorKind::Damaged, REST)
                    .volume(self.volume)
                    .detail(why)
                    .advice("`replica resync` there, then try again"))
            }
            Some(Answer::Refuses { why }) => Err(Error::new(ErrorKind::State, REST)
                .volume(self.volume)
                .detail(why)
                .advice("mend that there; a failover can do without it (`--unplanned`)")),
            Some(Answer::LetsGo) | None => Err(Error::new(ErrorKind::TimedOut, REST)
                .volume(self.volume)
                .detail(format!("it did not within {} s", limit.as_secs()))
                .advice("is its agent running? A failover can do without it (`--unplanned`)")),
        }
    }

    /// Asks the primary. The question stands long enough for what follows on the answer.
    fn question(&self, what: Ask, limit: Duration) -> Result<Asking> {
        let stands = limit + LET_GO;
        self.store
            .ask_handover(self.volume, what, stands, &self.host)
    }

    /// Waits for an answer.
    fn answer(&self, asked: HandoverId, limit: Duration) -> Result<Option<Answer>> {
        let until = Instant::now() + limit;
        while Instant::now() < until {
            if let Some(answer) = self.store.handover_answer(self.volume, asked)? {
                return Ok(Some(answer));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(None)
    }

    /// Takes the volume's lock, which its primary lets go if it is asked.
    pub(super) fn take_lock(&self) -> Result<VolumeWriter> {
        let take = || self.store.volume_writer(self.volume, self.key.clone());
        let busy = match take() {
            Err(error) if error.kind() == ErrorKind::Busy => error,
            taken => return taken,
        };
        let asked = self.question(Ask::LetGo, LET_GO)?;
        let answered = self.answer(asked.handover().id, LET_GO)?;
        let until = Instant::now() + LET_GO;
        while answered.is_some() && Instant::now() < until {
            match take() {
                Err(error) if error.kind() == ErrorKind::Busy => std::thread::sleep(LOOK_AGAIN),
                taken => return taken,
            }
        }
        Err(busy.advice(
            "its primary does not let go of it: end that process first, for two must not write",
        ))
    }

    fn choose(
        &self,
        reader: &VolumeReader,
        catalogue: &Catalogue,
        choice: Choice,
    ) -> Result<StateId> {
        let none = |what: &str| {
            Error::new(ErrorKind::NotFound, FAIL_OVER)
                .volume(self.volume)
                .detail(what)
                .advice("`replica points` lists what there is")
        };
        let newest = catalogue.points.last();
        match choice {
            Choice::State(selector) => Ok(reader.state(selector)?.id()),
            Choice::LatestProcessed => newest
                .map(|point| StateId::Point(point.id))
                .ok_or_else(|| none("there is no recovery point")),
            Choice::LatestApplication => {
                let mut newest_first = catalogue.points.iter().rev();
                let found = newest_first.find(|p| p.consistency == Consistency::Application);
                found
                    .map(|point| StateId::Point(point.id))
                    .ok_or_else(|| none("no recovery point is application-consistent"))
            }
            Choice::Latest => {
                let newest = newest.ok_or_else(|| none("there is no recovery point"))?;
                let window = catalogue.windows().pop();
                let behind = window.filter(|window| window.to.moment.epoch > newest.epoch);
                Ok(behind.map_or(StateId::Point(newest.id), |window| {
                    StateId::Moment(window.to.moment)
                }))
            }
        }
    }
}

const fn selector(state: StateId) -> PointSelector {
    match state {
        StateId::Point(id) => PointSelector::Id(id),
        StateId::Moment(moment) => PointSelector::Moment(moment),
    }
}
