//! The first full copy of a volume. Without a key it goes straight into the raw image; with one
//! it becomes a chain of encrypted logs, each an epoch of its own, so that no log's index grows
//! with the volume. Nothing of it counts before it is complete: an interrupted one starts over.

use hrl_format::RecordOrder;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, ByteOffset, Epoch, Extent, Timestamp};

use super::base::{BaseWriter, StretchKind, Stretches};
use super::catalogue::{Base, Catalogue};
use super::durable;
use super::epoch::EpochLog;
use super::writer::{Committed, VolumeWriter};
use super::{ingest, lease};
use crate::error::{Error, ErrorKind, Result};

const WRITE: &str = "write the first full copy";

/// A first full copy, being written. In any order; what is not written is zeroes.
///
/// Made by [`VolumeWriter::begin_baseline`]. It counts from [`Baseline::finish`] on; dropped before,
/// it leaves nothing that does.
pub struct Baseline<'w> {
    writer: &'w mut VolumeWriter,
    target: Target,
}

enum Target {
    Image(BaseWriter),
    Logs(Box<LogChain>),
}

/// The logs of an encrypted base so far.
struct LogChain {
    /// What the catalogue will be: it lists the logs that are sealed.
    next: Catalogue,
    /// The log that grows now. It is begun by its first record: it names the seal of the log
    /// before it.
    open: Option<EpochLog>,
}

impl<'w> Baseline<'w> {
    pub(super) fn begin(writer: &'w mut VolumeWriter) -> Result<Self> {
        let target = match writer.catalogue.key {
            None => Target::Image(BaseWriter::create(&writer.folder, writer.catalogue.size)?),
            Some(_) => Target::Logs(Box::new(LogChain {
                next: writer.catalogue.clone(),
                open: None,
            })),
        };
        Ok(Self { writer, target })
    }

    /// The volume holds `data` at `offset`. Longer stretches of zeroes take no room. Fastest with a
    /// megabyte or more at a time.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] past the volume's end; [`ErrorKind::Full`] and others of the system's.
    pub fn write(&mut self, offset: ByteOffset, data: &[u8]) -> Result<()> {
        self.check(offset, ByteLen::new(data.len() as u64))?;
        let written = match &mut self.target {
            Target::Image(base) => base.write(offset, data),
            Target::Logs(chain) => chain.write(self.writer, offset, data),
        };
        written.map_err(|e| lease::explain_full(&self.writer.folder, e))
    }

    /// The volume holds zeroes in `extent`, as it does wherever nothing is written.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] past the volume's end; the system's.
    pub fn zeroes(&mut self, extent: Extent) -> Result<()> {
        self.check(extent.offset(), extent.len())?;
        match &mut self.target {
            Target::Image(base) => base.zeroes(extent),
            Target::Logs(_) if extent.is_empty() => Ok(()),
            // A record, not nothing: something may have been written there before.
            Target::Logs(chain) => chain.append(self.writer, &Record::Zeroes { extent }),
        }
    }

    /// Makes the copy durable, and the base of the volume.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] and others of the system's: the volume has no base, as before.
    pub fn finish(self) -> Result<Committed> {
        let finished = match self.target {
            Target::Image(base) => finish_image(self.writer, &base),
            Target::Logs(chain) => chain.finish(self.writer),
        };
        finished.map_err(|e| lease::explain_full(&self.writer.folder, e))
    }

    fn check(&self, offset: ByteOffset, len: ByteLen) -> Result<()> {
        let size = self.writer.catalogue.size;
        let end = offset.checked_add(len).map(ByteOffset::get);
        if end.is_some_and(|end| end <= size.get()) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Invalid, WRITE)
            .volume(self.writer.catalogue.volume)
            .offset(offset)
            .detail(format!("{len} bytes there end past the volume's {size}")))
    }
}

fn finish_image(writer: &mut VolumeWriter, base: &BaseWriter) -> Result<Committed> {
    base.sync()?;
    durable::sync_folder(writer.folder.path())?;
    let epoch = Epoch::ZERO.next();
    let mut next = writer.catalogue.clone();
    next.base = Some(Base {
        epoch,
        size: next.size,
        last: None,
    });
    let bytes = ByteLen::new(next.size.get());
    writer.save(next)?;
    Ok(Committed {
        epoch,
        log: None,
        points: Vec::new(),
        bytes,
    })
}

impl LogChain {
    fn write(&mut self, writer: &VolumeWriter, offset: ByteOffset, data: &[u8]) -> Result<()> {
        for stretch in Stretches::new(data) {
            let at = ByteOffset::new(offset.get() + stretch.start as u64);
            let end = ByteOffset::new(offset.get() + stretch.end as u64);
            let extent = Extent::between(at, end);
            let record = match stretch.kind {
                StretchKind::Data => Record::Write {
                    extent,
                    data: &data[stretch.start..stretch.end],
                },
                StretchKind::Zeroes => Record::Zeroes { extent },
            };
            self.append(writer, &record)?;
        }
        Ok(())
    }

    fn append(&mut self, writer: &VolumeWriter, record: &Record<&[u8]>) -> Result<()> {
        let mut open = self.take_open(writer)?;
        open.append(record, Timestamp::now())?;
        if open.bytes() >= writer.log_bytes || open.is_full() {
            self.end_log(writer, open)
        } else {
            self.open = Some(open);
            Ok(())
        }
    }

    fn take_open(&mut self, writer: &VolumeWriter) -> Result<EpochLog> {
        match self.open.take() {
            Some(open) => Ok(open),
            None => writer.begin_log(&self.next, RecordOrder::AsRead),
        }
    }

    /// Seals a log and puts it in its place.
    fn end_log(&mut self, writer: &VolumeWriter, log: EpochLog) -> Result<()> {
        let sealed = log.seal()?;
        writer.place(&sealed)?;
        self.next.logs.push(ingest::entry_of(
            &sealed.header,
            &sealed.seal,
            sealed.covers,
        ));
        Ok(())
    }

    fn finish(mut self, writer: &mut VolumeWriter) -> Result<Committed> {
        if self.open.is_some() || self.next.logs.is_empty() {
            let last = self.take_open(writer)?;
            self.end_log(writer, last)?;
        }
        durable::sync_folder(&writer.folder.logs())?;
        let epoch = self.next.last_epoch();
        let log = self.next.logs.last().map(|log| log.log);
        self.next.base = Some(Base {
            epoch,
            size: self.next.size,
            last: None,
        });
        let bytes = self.next.logs.iter().map(|log| log.bytes.get()).sum();
        writer.save(self.next)?;
        Ok(Committed {
            epoch,
            log,
            points: Vec::new(),
            bytes: ByteLen::new(bytes),
        })
    }
}
