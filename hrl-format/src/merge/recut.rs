//! Merging with the data at hand: pieces are read in order of the volume, and written to
//! a new log as if they had just been captured.

use std::io::Write;

use super::overlay;
use crate::error::{Error, Result};
use crate::extents::ExtentKind;
use crate::frame::FrameBuffer;
use crate::gather::Gather;
use crate::header::LogHeader;
use crate::log::Log;
use crate::record::Record;
use crate::seal::{Mark, Seal};
use crate::source::ReadAt;
use crate::units::{ByteLen, Extent, Timestamp};
use crate::writer::{LogOptions, LogWriter};

/// Data that is held at a time.
const MEMORY: ByteLen = ByteLen::new(32 << 20);

pub(super) fn recut<R: ReadAt, W: Write>(
    logs: &[&Log<R>],
    out: W,
    header: LogHeader,
    options: &LogOptions,
    points: &[Mark],
) -> Result<(W, Seal)> {
    let Some(last) = logs.last() else {
        return Err(Error::invalid("there are no logs to merge"));
    };
    let size = last.seal().volume_size;
    let begins_with = header.volume_size;
    let mut writer = LogWriter::create(out, header, options, last.key.as_ref())?;
    if size != begins_with {
        writer.append(&Record::Resize { size }, last.seal().sealed)?;
    }
    let mut pending = Pending(None);
    let mut gather = Gather::new(logs, overlay(logs), MEMORY);
    while let Some(batch) = gather.next_batch()? {
        for (piece, data) in batch.iter() {
            let time = logs
                .get(piece.source.get())
                .map_or(Timestamp::default(), |log| log.seal().sealed);
            let extent = piece.extent();
            match piece.kind() {
                ExtentKind::Write => {
                    pending.write(&mut writer)?;
                    writer.append(&Record::Write { extent, data }, time)?;
                }
                kind => pending.join(&mut writer, kind, extent, time)?,
            }
        }
    }
    pending.write(&mut writer)?;
    append_points(&mut writer, last, points)?;
    writer.seal()
}

/// A range without data that may go on in the next piece.
struct Pending(Option<(ExtentKind, Extent, Timestamp)>);

impl Pending {
    fn join<W: Write>(
        &mut self,
        writer: &mut LogWriter<W>,
        kind: ExtentKind,
        extent: Extent,
        time: Timestamp,
    ) -> Result<()> {
        if let Some((held, before, at)) = &mut self.0
            && *held == kind
            && before.end() == extent.offset()
        {
            *before = Extent::between(before.offset(), extent.end());
            *at = time.max(*at);
            return Ok(());
        }
        self.write(writer)?;
        self.0 = Some((kind, extent, time));
        Ok(())
    }

    fn write<W: Write>(&mut self, writer: &mut LogWriter<W>) -> Result<()> {
        let Some((kind, extent, time)) = self.0.take() else {
            return Ok(());
        };
        let record = match kind {
            ExtentKind::Zeroes => Record::Zeroes { extent },
            _ => Record::Discard { extent },
        };
        writer.append(&record, time).map(|_| ())
    }
}

fn append_points<R: ReadAt, W: Write>(
    writer: &mut LogWriter<W>,
    last: &Log<R>,
    points: &[Mark],
) -> Result<()> {
    let mut frame = FrameBuffer::new();
    for mark in points {
        let tag = last.read_tag(mark, &mut frame)?;
        let time = tag.time;
        writer.append(&Record::Tag(tag), time)?;
    }
    Ok(())
}
