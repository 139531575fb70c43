//! Verify: source and image are compared while writes go on. A block that differs and is
//! dirty is no difference: its change is on its way. One that differs and is clean is
//! read again before it is reported, for a write may have been between the device and the
//! mark when it was read. All such blocks of a slice are looked at again together: an image
//! that really differs may have millions, and nothing ships while they are waited for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hrl_format::units::{ByteOffset, Extent};

use crate::error::{Error, ErrorKind, Result};
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::primary::config::Phase;
use crate::primary::copy::{READ, next_slice, reads};
use crate::primary::environment::Environment;
use crate::primary::lifecycle;
use crate::primary::member::{Sink, Source};
use crate::primary::status::{DifferingRange, VerifySummary};
use crate::primary::volume::Volume;
use crate::store::TipReader;

/// How long to wait for a point that is being made.
const PATIENCE: Duration = Duration::from_secs(300);
/// Ranges named in a report, at most.
const NAMED_MAX: usize = 1000;
/// How often the blocks of a slice that differ are read again.
const LOOKS: u32 = 3;
/// How long to wait between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Compares the source of `volume` with its image, slice by slice, so that points are
/// made in between.
///
/// # Errors
/// [`ErrorKind::ResyncNeeded`] during the first copy and a resync; [`ErrorKind::State`] when
/// the volume's thread shall end; else what source or store failed with.
pub fn verify(volume: &Arc<Volume>, environment: &Environment) -> Result<VerifySummary> {
    let mut summary = VerifySummary::default();
    let mut at = ByteOffset::ZERO;
    loop {
        if volume.config().phase != Phase::Replicating {
            return Err(Error::new(ErrorKind::ResyncNeeded, "verify the volume")
                .volume(volume.id())
                .detail("its baseline (first copy) or a resync has not ended")
                .advice("`replica status` shows how far it is"));
        }
        let mut member = volume.member_until(Instant::now() + PATIENCE)?;
        // Refuses, too, when the volume's thread shall end.
        member.bring_up(volume, environment)?;
        let geometry = member.geometry();
        let Some(slice) = next_slice(&geometry, at) else {
            member.rest();
            return Ok(summary);
        };
        let (source, sink) = member.live()?;
        if let Err(error) = compare(source, sink, &geometry, slice, &mut summary) {
            lifecycle::note_failure(volume, &mut member, &error);
            volume.wake();
            return Err(error);
        }
        at = slice.end();
        drop(member);
        volume.give_way();
    }
}

fn compare(
    source: &mut Source,
    sink: &mut Sink,
    geometry: &Geometry,
    slice: Extent,
    summary: &mut VerifySummary,
) -> Result<()> {
    let mut image = Image {
        tip: sink.writer.read_tip()?,
        buffer: vec![0; READ as usize],
    };
    let mut suspects = Vec::new();
    let exclusions = source.exclusions.clone();
    exclusions.read(geometry, slice, source.reader()?, |extent, data| {
        let Some(data) = data else { return Ok(()) };
        summary.bytes_compared += extent.len().get();
        image.compare(geometry, extent, data, &mut suspects)
    })?;
    let suspected = bytes_of(geometry, &suspects);
    look_again(source, &mut image, geometry, &mut suspects)?;
    summary.bytes_in_motion += suspected - bytes_of(geometry, &suspects);
    for run in runs(&suspects) {
        report(summary, geometry.extent_of(run));
    }
    Ok(())
}

/// The image, and room for what is compared with it at once.
struct Image {
    tip: TipReader,
    buffer: Vec<u8>,
}

impl Image {
    /// Adds the blocks of `extent` to `differing` that are not as `data` says.
    fn compare(
        &mut self,
        geometry: &Geometry,
        extent: Extent,
        data: &[u8],
        differing: &mut Vec<BlockNumber>,
    ) -> Result<()> {
        let expected = &mut self.buffer[..data.len()];
        self.tip.read_at(extent.offset(), expected)?;
        if data != expected {
            let block = geometry.block.get() as usize;
            let first = extent.offset().get() / block as u64;
            let pairs = (first..).zip(data.chunks(block).zip(expected.chunks(block)));
            let unequal = pairs.filter(|(_, (ours, theirs))| ours != theirs);
            differing.extend(unequal.map(|(number, _)| BlockNumber::new(number)));
        }
        Ok(())
    }
}

/// Leaves of `suspects` those that differ although nothing says that they were written.
fn look_again(
    source: &mut Source,
    image: &mut Image,
    geometry: &Geometry,
    suspects: &mut Vec<BlockNumber>,
) -> Result<()> {
    for look in 0..LOOKS {
        if suspects.is_empty() {
            break;
        }
        if look > 0 {
            std::thread::sleep(BETWEEN_LOOKS);
        }
        let mut still = Vec::new();
        let extents = runs(suspects).map(|run| geometry.extent_of(run));
        let mut pieces = source.reader()?.pieces(extents.flat_map(reads));
        while let Some((extent, data)) = pieces.next()? {
            image.compare(geometry, extent, data, &mut still)?;
        }
        drop(pieces);
        // Asked after the read: a write marks its block before the device has it.
        still.retain(|block| !source.excuses(*block));
        *suspects = still;
    }
    Ok(())
}

/// Ascending blocks, neighbours taken together.
fn runs(blocks: &[BlockNumber]) -> impl Iterator<Item = Run> {
    let neighbours = blocks.chunk_by(|a, b| a.get() + 1 == b.get());
    neighbours.filter_map(|run| {
        let (first, last) = (run.first()?, run.last()?);
        Some(Run {
            start: *first,
            end: BlockNumber::new(last.get() + 1),
        })
    })
}

fn bytes_of(geometry: &Geometry, blocks: &[BlockNumber]) -> u64 {
    let lengths = blocks.iter().map(|block| geometry.block_len(*block).get());
    lengths.sum()
}

fn report(summary: &mut VerifySummary, extent: Extent) {
    let (offset, len) = (extent.offset().get(), extent.len().get());
    summary.bytes_differing += len;
    let named = summary.differing.len();
    match summary.differing.last_mut() {
        Some(last) if last.offset + last.len == offset => last.len += len,
        _ if named < NAMED_MAX => summary.differing.push(DifferingRange { offset, len }),
        _ => {}
    }
}
