//! The two jobs that read a whole volume: the baseline, which fills an empty image, and
//! the resync, which ships what differs from the digest tree. Both read while writes go
//! on: what changes meanwhile is marked as ever, and the epoch that follows brings it.

use hrl_format::units::{ByteLen, ByteOffset, Extent, Timestamp};

use crate::digest::{LeafFunction, TreeState};
use crate::error::Result;
use crate::geometry::{BlockNumber, Geometry, Run};
use crate::primary::draft::{EpochDraft, is_zero};
use crate::primary::member::{Member, Sink, Source};
use crate::primary::status::{ResyncProgress, ResyncSummary, VolumeState};
use crate::primary::volume::Volume;
use crate::time::rfc3339;

/// Bytes between two looks at whether the operator wants something else.
const SLICE: u64 = 32 << 20;
/// Bytes of one read: a multiple of every block size.
pub const READ: u64 = 1 << 20;

/// Copies the whole source into an empty image.
///
/// # Errors
/// What the source or the store failed with; the copy starts over then.
pub fn baseline(volume: &Volume, member: &mut Member) -> Result<()> {
    let geometry = member.geometry();
    member.break_off("the first copy is being made");
    let (source, sink) = member.live()?;
    tracing::info!(volume = %volume.id(), bytes = geometry.size.get(), "first copy begins");
    sink.renew_tree()?;
    let function = sink.function.clone();
    let mut update = sink
        .tree
        .update(sink.writer.catalogue().last_epoch().next())?;
    let mut image = sink.writer.begin_baseline()?;
    let mut at = ByteOffset::ZERO;
    while let Some(slice) = next_slice(&geometry, at) {
        volume.pass_or_stop()?;
        show(volume, VolumeState::Baseline, "first copy", at, &geometry);
        let exclusions = source.exclusions.clone();
        exclusions.read(&geometry, slice, source.reader()?, |extent, data| {
            for (block, bytes) in blocks(&geometry, extent, data) {
                update.set(block, Some(leaf(&function, block, &bytes)))?;
            }
            match data {
                Some(data) if !is_zero(data) => image.write(extent.offset(), data),
                _ => image.zeroes(extent),
            }
        })?;
        at = slice.end();
    }
    update.finish()?;
    let committed = image.finish()?;
    // An encrypted image is a chain of logs, and ends in a later epoch than it began.
    if sink.tree.state()
        != (TreeState::Clean {
            epoch: committed.epoch,
        })
    {
        sink.tree.apply(committed.epoch, [])?;
    }
    volume.publish(|status| status.resync = None);
    tracing::info!(volume = %volume.id(), "first copy ended");
    Ok(())
}

/// Reads the whole source and ships what differs from the digest tree, as one epoch or
/// several without a point. The points before it stay.
///
/// # Errors
/// What the source or the store failed with; the resync starts over then, and what was
/// shipped by then no longer differs.
pub fn resync(volume: &Volume, member: &mut Member, cause: &str) -> Result<()> {
    let geometry = member.geometry();
    let started = Timestamp::now();
    // What is read is newer than what waits in the stream.
    member.break_off("a resync is under way");
    let (source, sink) = member.live()?;
    tracing::info!(volume = %volume.id(), cause, "resync begins");
    sink.make_tree_current()?;
    let mut draft = EpochDraft::begin(&sink.writer)?;
    let mut at = ByteOffset::ZERO;
    while let Some(slice) = next_slice(&geometry, at) {
        volume.pass_or_stop()?;
        show(volume, VolumeState::Resync, cause, at, &geometry);
        compare_slice(source, sink, &geometry, slice, &mut draft)?;
        at = slice.end();
        if draft.is_large() {
            draft.roll(&mut sink.writer, &mut sink.tree)?;
        }
    }
    let shipped = draft.shipped().get();
    if !draft.is_empty() {
        draft.commit(&mut sink.writer, &mut sink.tree)?;
    }
    let ended = Timestamp::now();
    tracing::info!(volume = %volume.id(), cause, bytes = shipped, "resync ended");
    volume.publish(|status| {
        status.resync = None;
        status.counters.bytes_shipped += shipped;
        status.last_resync = Some(ResyncSummary {
            cause: cause.to_owned(),
            started: rfc3339(started),
            ended: rfc3339(ended),
            bytes: shipped,
        });
    });
    Ok(())
}

fn compare_slice(
    source: &mut Source,
    sink: &Sink,
    geometry: &Geometry,
    slice: Extent,
    draft: &mut EpochDraft,
) -> Result<()> {
    let function = &sink.function;
    let exclusions = source.exclusions.clone();
    exclusions.read(geometry, slice, source.reader()?, |extent, data| {
        // An excluded range is not copied: the image holds zeroes there, or what was
        // copied before it was excluded.
        let Some(data) = data else { return Ok(()) };
        let Some(run) = geometry.run_of(extent) else {
            return Ok(());
        };
        let mut differing: Option<Extent> = None;
        let known = sink
            .tree
            .leaves(run)
            .map(|known| known.map(|(_, leaf)| leaf));
        for ((block, bytes), known) in blocks(geometry, extent, Some(data)).zip(known) {
            if known? == Some(leaf(function, block, &bytes)) {
                continue;
            }
            let here = geometry.extent_of(Run {
                start: block,
                end: BlockNumber::new(block.get() + 1),
            });
            differing = match differing {
                Some(before) if before.end() == here.offset() => {
                    Some(Extent::between(before.offset(), here.end()))
                }
                Some(before) => {
                    draft.add(geometry, function, before, part(extent, data, before))?;
                    Some(here)
                }
                None => Some(here),
            };
        }
        match differing {
            Some(last) => draft.add(geometry, function, last, part(extent, data, last)),
            None => Ok(()),
        }
    })
}

/// The bytes of `inner` out of `data`, which was read from `outer`.
fn part(outer: Extent, data: &[u8], inner: Extent) -> &[u8] {
    let start = (inner.offset().get() - outer.offset().get()) as usize;
    &data[start..start + inner.len().get() as usize]
}

pub fn next_slice(geometry: &Geometry, at: ByteOffset) -> Option<Extent> {
    let end = at.get().saturating_add(SLICE).min(geometry.size.get());
    (at.get() < end).then(|| Extent::between(at, ByteOffset::new(end)))
}

/// The extents of `slice`, each as long as one read.
pub fn reads(slice: Extent) -> impl Iterator<Item = Extent> {
    let end = slice.end();
    (slice.offset().get()..end.get())
        .step_by(READ as usize)
        .map(move |start| {
            let stop = ByteOffset::new((start + READ).min(end.get()));
            Extent::between(ByteOffset::new(start), stop)
        })
}

/// The blocks of `extent` with their bytes; `None` in place of data means zeroes.
fn blocks<'a>(
    geometry: &Geometry,
    extent: Extent,
    data: Option<&'a [u8]>,
) -> impl Iterator<Item = (BlockNumber, BlockBytes<'a>)> {
    let geometry = *geometry;
    let block = u64::from(geometry.block.get());
    let first = extent.offset().get() / block;
    let count = extent.len().get().div_ceil(block);
    (0..count).map(move |n| {
        let number = BlockNumber::new(first + n);
        let len = geometry.block_len(number);
        let bytes = data.map_or(BlockBytes::Zeroes(len), |data| {
            let start = (n * block) as usize;
            BlockBytes::Data(&data[start..start + len.get() as usize])
        });
        (number, bytes)
    })
}

enum BlockBytes<'a> {
    Data(&'a [u8]),
    Zeroes(ByteLen),
}

fn leaf(
    function: &LeafFunction,
    block: BlockNumber,
    bytes: &BlockBytes<'_>,
) -> crate::digest::Leaf {
    match bytes {
        BlockBytes::Data(data) if is_zero(data) => {
            function.zero_leaf(block, ByteLen::new(data.len() as u64))
        }
        BlockBytes::Data(data) => function.leaf(block, data),
        BlockBytes::Zeroes(len) => function.zero_leaf(block, *len),
    }
}

fn show(volume: &Volume, state: VolumeState, cause: &str, at: ByteOffset, geometry: &Geometry) {
    volume.publish(|status| {
        status.state = state;
        status.state_cause = Some(cause.to_owned());
        status.resync = Some(ResyncProgress {
            cause: cause.to_owned(),
            bytes_done: at.get(),
            bytes_total: geometry.size.get(),
        });
    });
}
