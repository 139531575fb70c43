//! An [MS-HRL] log as a native log. It says neither which volume it is of nor how large
//! that is: the caller does, or the size is what the writes need.

use std::io::{Read, Seek, Write};

use super::Error;
use crate::header::{EpochRange, LogHeader, RecordOrder};
use crate::id::{Generation, GenerationId, LogId, RandomError, VolumeId};
use crate::key::VolumeKey;
use crate::ms::{LocatedEntry, Reader};
use crate::record::Record;
use crate::seal::Seal;
use crate::units::{
    BlockSize, ByteLen, ByteOffset, Epoch, Extent, GenerationNumber, SectorSize, Timestamp,
    VolumeSize,
};
use crate::writer::{LogOptions, LogWriter};

/// A size that follows from the writes is a multiple of this.
const ROUNDED_TO: u64 = 1 << 20;
/// Data is read in pieces of this, the most that a native record holds.
const PIECE: usize = 1 << 20;

/// What the native log says that the other does not.
#[derive(Clone, Debug)]
pub struct HrlOptions {
    /// Which volume it is of.
    pub volume: VolumeId,
    /// How large that is; if not known, as large as the writes need, in whole MiB.
    pub volume_size: Option<VolumeSize>,
    /// Which epoch it is.
    pub epoch: Epoch,
    /// How it is written.
    pub log: LogOptions,
}

impl HrlOptions {
    /// The first epoch of `volume`, uncompressed.
    pub fn new(volume: VolumeId) -> Self {
        Self {
            volume,
            volume_size: None,
            epoch: Epoch::new(1),
            log: LogOptions::default(),
        }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct HrlReport {
    /// The native log's header.
    pub header: LogHeader,
    /// Its seal.
    pub seal: Seal,
}

/// Converts the [MS-HRL] log in `source` into a sealed native log, encrypted if there is a
/// key. Writes of zeroes become records of zeroes, MiB by MiB. Making `out` durable is the
/// caller's.
///
/// # Errors
/// [`Error::Ms`] if the log is not whole; [`Error::VolumeTooSmall`], [`Error::VolumeTooLarge`];
/// [`Error::Native`] if `out` cannot be written.
pub fn to_hrl<R: Read + Seek, W: Write>(
    source: R,
    key: Option<&VolumeKey>,
    out: W,
    options: &HrlOptions,
) -> Result<(W, HrlReport), Error> {
    let mut source = source;
    let needed = largest_end(&mut source)?;
    let volume_size = volume_size(needed, options.volume_size)?;
    let mut reader = Reader::open(source)?;
    let header = header(&reader, options, volume_size)?;
    let mut writer = LogWriter::create(out, header, &options.log, key)?;
    let mut buffer = vec![0; PIECE];
    while let Some(write) = reader.next_write()? {
        copy(&mut reader, &write, &mut writer, &mut buffer)?;
    }
    let header = writer.header().clone();
    let (out, seal) = writer.seal()?;
    Ok((out, HrlReport { header, seal }))
}

/// The end of the write that reaches furthest.
fn largest_end<R: Read + Seek>(source: R) -> Result<ByteOffset, Error> {
    let mut reader = Reader::open(source)?;
    let mut largest = ByteOffset::ZERO;
    while let Some(write) = reader.next_write()? {
        largest = largest.max(write.entry().extent.end());
    }
    Ok(largest)
}

fn volume_size(needed: ByteOffset, given: Option<VolumeSize>) -> Result<VolumeSize, Error> {
    match given {
        Some(given) if given.get() < needed.get() => Err(Error::VolumeTooSmall { needed, given }),
        Some(given) => Ok(given),
        None => needed
            .get()
            .checked_next_multiple_of(ROUNDED_TO)
            .map(VolumeSize::new)
            .ok_or(Error::VolumeTooLarge(needed)),
    }
}

fn header<R>(
    reader: &Reader<R>,
    options: &HrlOptions,
    volume_size: VolumeSize,
) -> Result<LogHeader, Error>
where
    R: Read + Seek,
{
    let from = reader.header();
    let some = |id: [u8; 16]| Some(LogId::from_bytes(id)).filter(|id| !id.is_nil());
    let log = match some(from.id) {
        Some(id) => id,
        None => LogId::random().map_err(|error: RandomError| crate::Error::from(error))?,
    };
    Ok(LogHeader {
        log,
        previous: some(from.previous),
        previous_seal: None,
        stands_for: None,
        volume: options.volume,
        // Nobody's promotion: the same for all logs of a chain, so that they can be merged.
        generation: Generation {
            number: GenerationNumber::new(1),
            id: GenerationId::NIL,
        },
        epochs: EpochRange::single(options.epoch),
        // Nothing in such a log says that its writes are all there were, and in order.
        order: RecordOrder::AsRead,
        block: BlockSize::default_for(volume_size),
        sector: SectorSize::B512,
        volume_size,
        created: from.created.to_timestamp(),
        key: None,
    })
}

fn copy<R: Read + Seek, W: Write>(
    reader: &mut Reader<R>,
    write: &LocatedEntry,
    writer: &mut LogWriter<W>,
    buffer: &mut [u8],
) -> Result<(), Error> {
    let time = write.entry().time.to_timestamp();
    let mut offset = write.entry().extent.offset();
    let mut data = reader.data(write)?;
    loop {
        let len = data.read(buffer)?;
        if len == 0 {
            return Ok(());
        }
        offset = append(writer, offset, &buffer[..len], time)?;
    }
}

/// Appends a piece and returns where the next begins.
fn append<W: Write>(
    writer: &mut LogWriter<W>,
    offset: ByteOffset,
    data: &[u8],
    time: Timestamp,
) -> Result<ByteOffset, Error> {
    // The end fits: the whole write's did.
    let end = offset.checked_add(ByteLen::new(data.len() as u64));
    let extent = Extent::between(offset, end.unwrap_or(offset));
    let record = if data.iter().all(|byte| *byte == 0) {
        Record::Zeroes { extent }
    } else {
        Record::Write { extent, data }
    };
    writer.append(&record, time)?;
    Ok(extent.end())
}
