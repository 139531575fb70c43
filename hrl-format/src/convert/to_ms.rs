//! A native log as an [MS-HRL] log: record by record, in their order.

use std::io::{Read, Seek, Write};

use super::{Error, Losses, Lost};
use crate::key::VolumeKey;
use crate::ms::{Writer, WriterOptions};
use crate::record::Record;
use crate::scanner::{Ending, Scanner};

/// What becomes of what cannot be said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Loss {
    /// The conversion fails and names it.
    #[default]
    Refused,
    /// It is left out, and the report names it.
    Accepted,
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MsReport {
    /// How many records became writes.
    pub records: u64,
    /// How many bytes of the volume they cover.
    pub bytes: u64,
    /// What was left out.
    pub lost: Losses,
}

/// Converts the native log that `source` reads. `out` is an empty file; making it durable
/// is the caller's.
///
/// # Errors
/// [`Error::Inexpressible`] unless `loss` is accepted; [`Error::Torn`]; [`Error::Native`], of
/// kind [`crate::ErrorKind::KeyMissing`] if the log is encrypted and there is no key.
pub fn to_ms_hrl<R: Read, W: Write + Seek>(
    source: R,
    key: Option<&VolumeKey>,
    out: W,
    loss: Loss,
) -> Result<(W, MsReport), Error> {
    let mut scanner = Scanner::new(source, key)?;
    let header = scanner.header();
    let options = WriterOptions {
        id: *header.log.as_bytes(),
        previous: *header.previous.unwrap_or_default().as_bytes(),
        created: header.created,
        data_write: [0; 16],
    };
    let mut writer = Writer::create(out, &options)?;
    let mut report = MsReport::default();
    while let Some(entry) = scanner.next_record()? {
        match entry.record {
            Record::Tag(tag) => report.lost.add(Lost::Point(tag.id)),
            Record::Resize { size } => report.lost.add(Lost::Resize(size)),
            // Nothing more need be written, but all that is lost is to be named.
            _ if loss == Loss::Refused && !report.lost.is_empty() => {}
            Record::Write { extent, data } => {
                writer.write(extent.offset(), data, entry.time)?;
                report.count(extent.len().get());
            }
            Record::Zeroes { extent } | Record::Discard { extent } => {
                writer.zeroes(extent, entry.time)?;
                report.count(extent.len().get());
            }
        }
    }
    if let Some(Ending::Torn { at, cause }) = scanner.ending() {
        return Err(Error::Torn {
            at: *at,
            cause: cause.clone(),
        });
    }
    if loss == Loss::Refused && !report.lost.is_empty() {
        return Err(Error::Inexpressible(report.lost));
    }
    Ok((writer.finish()?, report))
}

impl MsReport {
    const fn count(&mut self, bytes: u64) {
        self.records += 1;
        self.bytes += bytes;
    }
}
