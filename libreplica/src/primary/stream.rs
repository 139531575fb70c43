//! How the stream of changes gets into the store, where the device's users go through us. It
//! is put into an epoch as it comes, out of memory and out of the spool; such an epoch is in
//! order, so that every change of it can be gone back to. What was read stays where it is
//! until the store has the epoch: a store that fails is tried again, with nothing lost.
//!
//! Where capture had no room the stream ends in a gap. What came before is shipped first;
//! then the gap is closed, by a copy of what changed in it as it was at one moment.

use std::time::Instant;

use hrl_format::RecordOrder;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, Epoch, Extent, Sequence, Timestamp};

use crate::capture::inline::{Blocks, Cut, Moment, Read, Service};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::policy::Mode;
use crate::primary::draft::EpochDraft;
use crate::primary::member::{Member, Sink, Source};
use crate::store::Committed;

/// Bytes taken out of the backlog at a time.
const TAKE: ByteLen = ByteLen::new(8 << 20);
/// Bytes of one read of a moment's blocks.
const READ: u64 = 1 << 20;
const SHIP: &str = "ship the stream of changes";

/// The epoch that the stream is put into.
pub struct StreamDraft {
    draft: EpochDraft,
    /// The end of what was put into it.
    end: Cut,
}

/// What the store has once it has an epoch.
#[derive(Clone, Copy, Debug)]
pub enum Brings {
    /// The stream up to here.
    Stream(Cut),
    /// The moment from which the stream goes on.
    Moment,
}

impl Member {
    /// Puts what a moment is made of into an epoch. Once the store has it,
    /// [`Self::epoch_is_stored`] says so.
    ///
    /// # Errors
    /// [`ErrorKind::State`] when the moment was lost meanwhile; what source or store failed
    /// with.
    pub fn gather(&mut self, moment: &Moment) -> Result<EpochDraft> {
        match moment {
            Moment::Stream(cut) => {
                let stream = self.ship_stream(cut, None)?;
                self.brings = Some(Brings::Stream(stream.end));
                Ok(stream.draft)
            }
            Moment::Blocks(blocks) => {
                self.brings = Some(Brings::Moment);
                self.copy_blocks(blocks)
            }
        }
    }

    /// The store has the epoch that was gathered last.
    pub fn epoch_is_stored(&mut self) {
        let Some(inline) = self.inline() else { return };
        let service = inline.service();
        match self.brings {
            None => return,
            Some(Brings::Stream(end)) => service.stored(&end),
            Some(Brings::Moment) => service.moment_is_stored(),
        }
        inline.trim_spool();
        self.brings = None;
        self.is_at_a_point = true;
    }

    /// Makes a draft durable in the store.
    ///
    /// # Errors
    /// What the store failed with, or the digest tree. In the second case, and perhaps in the
    /// first, the store has the epoch: [`Self::look_at_commit`] tells.
    pub fn commit(&mut self, draft: EpochDraft) -> Result<Committed> {
        self.committing = draft.epoch();
        let (_, sink) = self.live()?;
        let committed = draft.commit(&mut sink.writer, &mut sink.tree)?;
        self.committing = None;
        Ok(committed)
    }

    /// The store's newest epoch is `newest`: whether a commit that failed has brought what it
    /// was to bring all the same. To be shipped again, it would be in the logs twice.
    pub fn look_at_commit(&mut self, newest: Epoch) {
        if self.committing.is_some_and(|epoch| epoch <= newest) {
            self.committing = None;
            self.epoch_is_stored();
        }
    }

    /// Puts what the backlog has now into the epoch under way.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub fn ship_now(&mut self) -> Result<()> {
        let Some(service) = self.live()?.0.service().cloned() else {
            return Ok(());
        };
        let stream = self.ship_stream(&service.end_now(), None)?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Where the stream has ended in a gap: makes what came before durable in the store.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub fn drain(&mut self) -> Result<()> {
        let Some(service) = self.live()?.0.service().cloned() else {
            return Ok(());
        };
        if service.waiting().mode == Mode::Data {
            return Ok(());
        }
        let stream = self.ship_stream(&service.end_now(), None)?;
        self.store(stream)
    }

    /// Where the stream has ended in a gap: closes that, by an epoch without a point.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub fn climb(&mut self) -> Result<()> {
        let Some(service) = self.live()?.0.service().cloned() else {
            return Ok(());
        };
        if service.waiting().mode == Mode::Data {
            return Ok(());
        }
        self.drain()?;
        self.store_moment(&service)
    }

    /// Ships what waits in memory and spool as epochs without a point, as far as it comes until
    /// `deadline`; the rest is known by its blocks.
    ///
    /// # Errors
    /// As [`Self::gather`].
    pub fn bring_home(&mut self, deadline: Instant) -> Result<()> {
        if !self.is_up() {
            return Ok(());
        }
        let Some(service) = self.live()?.0.service().cloned() else {
            return Ok(());
        };
        if service.waiting().mode != Mode::Data {
            return Ok(());
        }
        let cut = service.end_now();
        let stream = self.ship_stream(&cut, Some(deadline))?;
        let is_all = stream.end == cut;
        self.store(stream)?;
        if is_all {
            self.store_moment(&service)?;
        }
        Ok(())
    }

    fn store_moment(&mut self, service: &Service) -> Result<()> {
        let (_, moments) = Service::moment(&[service])?;
        for moment in moments {
            let draft = self.gather(&moment)?;
            if !draft.is_empty() {
                self.commit(draft)?;
            }
            self.live()?.0.acknowledge()?;
            self.epoch_is_stored();
        }
        Ok(())
    }

    /// Puts what the backlog has up to `cut` into the epoch under way, which is made durable
    /// in the store where its memory is needed; as much of it as there is time for.
    fn ship_stream(&mut self, cut: &Cut, deadline: Option<Instant>) -> Result<StreamDraft> {
        let geometry = self.geometry();
        loop {
            let mut stream = match self.stream.take() {
                Some(stream) => stream,
                None => self.begin_stream(cut)?,
            };
            let read = self.read_on(&mut stream, &geometry, cut)?;
            let (source, _) = self.live()?;
            let is_to_be_stored = source.service().is_some_and(|it| it.should_store());
            if stream.draft.is_large() || is_to_be_stored && !stream.draft.is_empty() {
                self.store(stream)?;
            } else if read == Progress::End || deadline.is_some_and(|end| Instant::now() >= end) {
                return Ok(stream);
            } else {
                self.stream = Some(stream);
            }
        }
    }

    fn begin_stream(&mut self, cut: &Cut) -> Result<StreamDraft> {
        let order = self.order();
        let (source, sink) = self.live()?;
        let stored = source.service().map(|service| {
            // A draft that was dropped takes what it had read with it.
            service.read_again();
            service.stored_up_to()
        });
        Ok(StreamDraft {
            draft: EpochDraft::begin_in(&sink.writer, order)?,
            end: cut.at(stored.unwrap_or_default()),
        })
    }

    /// Puts the next changes into the epoch.
    fn read_on(
        &mut self,
        stream: &mut StreamDraft,
        geometry: &Geometry,
        cut: &Cut,
    ) -> Result<Progress> {
        let inline = self.inline().cloned();
        let (_, sink) = self.live()?;
        let Some(inline) = inline else {
            return Ok(Progress::End);
        };
        let draft = &mut stream.draft;
        let mut put = |record: &Record<&[u8]>, time: Timestamp| {
            draft.change(geometry, &sink.function, record, time)
        };
        let upto = match inline.service().read(cut, TAKE) {
            Read::Lost => return Err(lost()),
            Read::Changes(entries) if entries.is_empty() => return Ok(Progress::End),
            Read::Changes(entries) => {
                for entry in &entries {
                    put(&entry.record(), entry.time)?;
                }
                Sequence::new(stream.end.upto.get() + entries.len() as u64)
            }
            Read::Spooled(from) => {
                let upto = inline.read_spool(from, cut.upto, put)?;
                inline.service().was_read(upto);
                upto
            }
        };
        stream.end = stream.end.at(upto);
        Ok(Progress::More)
    }

    /// Makes an epoch of the stream durable in the store.
    fn store(&mut self, stream: StreamDraft) -> Result<()> {
        if !stream.draft.is_empty() {
            self.brings = Some(Brings::Stream(stream.end));
            self.commit(stream.draft)?;
            let is_at_a_point = self.is_at_a_point;
            self.epoch_is_stored();
            self.is_at_a_point = is_at_a_point;
        }
        Ok(())
    }

    /// An epoch is in order if the image was one state of the volume when it began.
    const fn order(&self) -> RecordOrder {
        if self.is_at_a_point {
            RecordOrder::AsCompleted
        } else {
            RecordOrder::AsRead
        }
    }

    /// Reads the blocks of a moment as they were then.
    fn copy_blocks(&mut self, blocks: &Blocks) -> Result<EpochDraft> {
        let geometry = self.geometry();
        let order = self.order();
        let (source, sink) = self.live()?;
        let Some(service) = source.service().cloned() else {
            return Err(Error::new(ErrorKind::State, "read the moment of a point"));
        };
        let copied = if blocks.is_empty() {
            // Nothing was missed: the stream goes on where the last one ended.
            EpochDraft::begin_in(&sink.writer, order)
        } else {
            self.is_at_a_point = false;
            let (source, sink) = self.live()?;
            read_blocks(&service, source, sink, &geometry, blocks)
        };
        service.end_moment();
        copied
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    More,
    End,
}

fn lost() -> Error {
    Error::new(ErrorKind::State, SHIP)
        .detail("it was given up meanwhile, and changes are known by their blocks only")
        .advice("those are read by themselves: see `mode_cause` in `replica status --json`")
}

fn read_blocks(
    service: &Service,
    source: &mut Source,
    sink: &mut Sink,
    geometry: &Geometry,
    blocks: &Blocks,
) -> Result<EpochDraft> {
    let mut draft = EpochDraft::begin(&sink.writer)?;
    let block = u64::from(geometry.block.get());
    let mut data = vec![0; READ.max(block) as usize];
    let mut at = BlockNumber::new(0);
    while let Some(run) = blocks.next_run(at, (READ / block).max(1)) {
        let extent = geometry.extent_of(run);
        let data = &mut data[..extent.len().get() as usize];
        read(source, extent, data)?;
        take_blocks(service, geometry, run, data)?;
        match blocks.parts(extent).as_slice() {
            [whole] if *whole == extent => draft.add(geometry, &sink.function, extent, data)?,
            parts => draft.add_parts(geometry, &sink.function, (extent, data), parts)?,
        }
        if draft.is_large() {
            draft.roll(&mut sink.writer, &mut sink.tree)?;
        }
        at = run.end;
    }
    Ok(draft)
}

fn read(source: &mut Source, extent: Extent, data: &mut [u8]) -> Result<()> {
    let mut pieces = source.reader()?.pieces([extent]);
    let mut filled = 0;
    while let Some((_, piece)) = pieces.next()? {
        data[filled..filled + piece.len()].copy_from_slice(piece);
        filled += piece.len();
    }
    Ok(())
}

/// Puts what the blocks held at the moment in place of what was written since.
fn take_blocks(service: &Service, geometry: &Geometry, run: Run, data: &mut [u8]) -> Result<()> {
    let start = geometry.extent_of(run).offset().get();
    for n in run.range() {
        let block = BlockNumber::new(n);
        let end = BlockNumber::new(n + 1);
        let extent = geometry.extent_of(Run { start: block, end });
        let from = (extent.offset().get() - start) as usize;
        let bytes = &mut data[from..from + extent.len().get() as usize];
        service.take_block(block, bytes)?;
    }
    Ok(())
}
