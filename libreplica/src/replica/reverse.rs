//! What a volume was failed over to, protected while it is served: what is written to the branch
//! becomes the volume's history, a recovery point every so often; and when the first side asks
//! for its volume, nobody is served any more, the rest follows with the digest of all of it, and
//! the branch keeps still.
//!
//! It goes on only under the volume's lock, which the first side takes before it uses what it
//! was told, and keeps until the volume is its own: so what is written here after an answer is
//! never lost, however long the other side takes.

use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::export::Front;
use crate::digest::{LeafFunction, RootBuilder};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::id::{HandoverId, PointId};
use crate::policy::Retention;
use crate::record::{Consistency, Root, Tag};
use crate::store::{
    Answer, Ask, Branch, Catalogue, FoldStep, Handover, PieceKind, Recovery, Reversal, Store,
    VolumeReader, VolumeWriter,
};
use crate::units::{ByteLen, ByteOffset, Extent, Timestamp};

/// How often it is looked whether somebody asks: a store may be far away.
const LOOK: Duration = Duration::from_secs(1);
/// How often the whole catalogue is read for it.
const AGAIN: Duration = Duration::from_secs(5);
/// So long the store is tidied behind a point at most.
const TIDY: Duration = Duration::from_secs(1);
/// Bytes of the branch read at a time for its digest.
const READ: u64 = 1 << 20;
const PROTECT: &str = "protect what the volume was failed over to";
const REST: &str = "bring the volume to rest";

/// The thread that does it; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Reverse {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Stop {
    stops: Mutex<bool>,
    told: Condvar,
}

impl Stop {
    /// Whether it is to end, after so long at most.
    fn within(&self, pause: Duration) -> bool {
        let stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.told.wait_timeout_while(stops, pause, |stops| !*stops);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn now(&self) {
        *self.stops.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.told.notify_all();
    }
}

impl Reverse {
    /// Protects what `front` serves, once the volume is to be.
    ///
    /// # Errors
    /// When the system gives no thread, or the store cannot be opened.
    pub(super) fn start(front: Arc<Front>) -> Result<Self> {
        let volume = front.opened().volume().clone();
        let store = volume.store()?;
        let stop = Arc::new(Stop::default());
        let ends = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("reverse".into());
        let path = store.path().to_owned();
        let thread = thread.spawn(move || {
            let mut watch = Watch::new(&front, store, volume);
            while !ends.within(LOOK) {
                let trouble = watch.turn().err().map(|error| error.to_string());
                let mut shown = front.trouble();
                if let Some(error) = trouble.as_ref().filter(|new| shown.as_ref() != Some(new)) {
                    tracing::warn!("{error}");
                }
                *shown = trouble;
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread.at(PROTECT, &path)?),
        })
    }
}

impl Drop for Reverse {
    fn drop(&mut self) {
        self.stop.now();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread remembers between two looks.
struct Watch<'a> {
    front: &'a Front,
    store: Store,
    volume: VolumeReader,
    /// When it is looked again what the store says, if nobody asks.
    due: Instant,
    /// When the last point was made, or tried.
    rolled: Option<Instant>,
    /// The last question, and until when it stands.
    seen: Option<(HandoverId, Instant)>,
}

impl<'a> Watch<'a> {
    fn new(front: &'a Front, store: Store, volume: VolumeReader) -> Self {
        Self {
            front,
            store,
            volume,
            due: Instant::now(),
            rolled: None,
            seen: None,
        }
    }

    fn branch(&self) -> Result<&'a Branch> {
        let branch = self.front.opened().branch();
        branch.ok_or_else(|| Error::new(ErrorKind::State, PROTECT).detail("nothing is written"))
    }

    fn turn(&mut self) -> Result<()> {
        let branch = self.branch()?;
        let rests = branch.rests_for()?.is_some();
        let id = self.volume.id();
        let question = self.store.handover(id)?;
        if !rests && question.is_none() && Instant::now() < self.due {
            return Ok(());
        }
        let catalogue = self.volume.catalogue()?;
        let every = match &catalogue.recovery {
            Recovery::Reversing(reversal) => reversal.every(),
            _ => AGAIN,
        };
        self.due = Instant::now() + every.min(AGAIN);
        if catalogue.generation.id != branch.info().generation.id {
            // What is written from here on would be no part of the volume.
            self.front.close();
            let own = Some(branch.info().generation.id);
            let why = match catalogue.generation.parent == own {
                true => "it has gone home, or another point was chosen",
                false => "the store is another: an older copy, or one that was promoted elsewhere",
            };
            return Err(Error::new(ErrorKind::Fenced, PROTECT)
                .volume(id)
                .detail(why)
                .advice("`replica points` shows what is kept of what was written here"));
        }
        let Recovery::Reversing(reversal) = &catalogue.recovery else {
            return Ok(());
        };
        match question {
            Some(asked) if self.seen.is_none_or(|(seen, _)| seen != asked.id) => {
                self.answer(&catalogue, reversal, &asked)
            }
            Some(_) if self.seen.is_some_and(|(_, until)| Instant::now() < until) => match rests {
                true => Err(kept_still(&catalogue)),
                false => self.roll_if_due(&catalogue, reversal),
            },
            _ if rests => self.go_on(&catalogue),
            _ => self.roll_if_due(&catalogue, reversal),
        }
    }

    fn answer(
        &mut self,
        catalogue: &Catalogue,
        reversal: &Reversal,
        asked: &Handover,
    ) -> Result<()> {
        self.seen = Some((asked.id, Instant::now() + asked.limit()));
        let answer = match asked.ask {
            // Between two points nobody here has the lock.
            Ask::LetGo => Answer::LetsGo,
            Ask::Rest => match self.come_to_rest(catalogue, reversal, asked) {
                Ok((point, root)) => Answer::Rests {
                    point,
                    root: Some(root),
                },
                Err(error) => {
                    let why = error.to_string();
                    self.go_on(catalogue)?;
                    Answer::Refuses { why }
                }
            },
        };
        self.store
            .answer_handover(self.volume.id(), asked.id, answer)
    }

    /// Nobody writes any more, and all that was written is in the volume, as a point that says
    /// what its digest is.
    fn come_to_rest(
        &self,
        catalogue: &Catalogue,
        reversal: &Reversal,
        asked: &Handover,
    ) -> Result<(PointId, Root)> {
        let refuse = |why: String| {
            Err(Error::new(ErrorKind::Busy, REST)
                .volume(self.volume.id())
                .detail(why)
                .advice("shut down what uses it, then try again"))
        };
        let branch = self.branch()?;
        match self.front.clients() {
            0 => {}
            clients => return refuse(format!("{clients} clients are connected")),
        }
        branch.come_to_rest(asked.id)?;
        self.front.close();
        let root = self.root(catalogue)?;
        let point = self.roll(catalogue, reversal, Some(root))?;
        Ok((point, root))
    }

    /// The root of the digest tree over all of the branch.
    fn root(&self, catalogue: &Catalogue) -> Result<Root> {
        let branch = self.branch()?;
        let mut geometry = catalogue.geometry();
        geometry.size = branch.info().size;
        let function = LeafFunction::for_volume(self.volume.key());
        let mut builder = RootBuilder::new(geometry, function);
        let mut buffer = vec![0; READ as usize];
        let size = geometry.size.get();
        for start in (0..size).step_by(READ as usize) {
            let end = size.min(start + READ);
            let extent = Extent::between(ByteOffset::new(start), ByteOffset::new(end));
            let mut pieces = Vec::new();
            branch.pieces_in(extent, &mut |piece| {
                pieces.push(piece);
                ControlFlow::Continue(())
            })?;
            for piece in pieces {
                let len = piece.extent.len();
                if piece.kind == PieceKind::Data {
                    let buffer = &mut buffer[..len.get() as usize];
                    branch.read_at(piece.extent.offset(), buffer)?;
                    builder.data(buffer)?;
                } else {
                    builder.zeroes(ByteLen::new(len.get()))?;
                }
            }
        }
        builder.finish()
    }

    fn roll_if_due(&mut self, catalogue: &Catalogue, reversal: &Reversal) -> Result<()> {
        let rolled = self.rolled;
        if rolled.is_some_and(|rolled| rolled.elapsed() < reversal.every()) {
            return Ok(());
        }
        let branch = self.branch()?;
        let newest = catalogue.points.last().map(|point| point.epoch);
        let last = branch.logs().last().map(|log| log.header.epochs.last);
        let is_new = branch.has_news() || (last.is_some() && last > newest);
        self.rolled = Some(Instant::now());
        if is_new {
            self.roll(catalogue, reversal, None)?;
        }
        Ok(())
    }

    /// Ends what was written in a recovery point, and takes it into the volume.
    fn roll(
        &self,
        catalogue: &Catalogue,
        reversal: &Reversal,
        root: Option<Root>,
    ) -> Result<PointId> {
        let branch = self.branch()?;
        // Who cannot have the lock makes no points that nobody takes in.
        let mut writer = self.writer(catalogue)?;
        let time = Timestamp::now();
        let random = |e| Error::new(ErrorKind::Io, PROTECT).source(e);
        let id = PointId::at(time).map_err(random)?;
        let label = if root.is_some() { "at rest" } else { "" };
        branch.seal_as_point(Tag {
            id,
            time,
            consistency: Consistency::Crash,
            label: label.to_owned(),
            group: None,
            root,
        })?;
        for log in branch.logs() {
            writer.adopt(&log)?;
        }
        if root.is_none() {
            tidy(&mut writer, reversal)?;
        }
        Ok(id)
    }

    fn writer(&self, catalogue: &Catalogue) -> Result<VolumeWriter> {
        let generation = catalogue.generation.generation();
        let key = self.volume.key().cloned();
        self.store
            .volume_writer_of(self.volume.id(), key, generation)
    }

    /// Nothing came of a question: the branch is served again. Under the volume's lock, so that
    /// nobody is about to use what was answered.
    fn go_on(&self, catalogue: &Catalogue) -> Result<()> {
        let branch = self.branch()?;
        if branch.rests_for()?.is_none() {
            return Ok(());
        }
        let _lock = self.writer(catalogue)?;
        branch.end_rest()?;
        self.front.open()
    }
}

fn kept_still(catalogue: &Catalogue) -> Error {
    Error::new(ErrorKind::Busy, PROTECT)
        .volume(catalogue.volume)
        .detail("it is at rest: another side is taking it over")
}

/// Drops and folds what the policy does not keep, for a while.
fn tidy(writer: &mut VolumeWriter, reversal: &Reversal) -> Result<()> {
    let policy: Retention = reversal.retain.parse()?;
    writer.retain(&policy, Timestamp::now())?;
    let began = Instant::now();
    while began.elapsed() < TIDY && writer.fold_step()? != FoldStep::Nothing {}
    Ok(())
}
