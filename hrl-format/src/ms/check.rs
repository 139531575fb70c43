//! Checking a log: every checksum, every bound, the chain of metadata; not the sizes,
//! the creator, or whether the log before it is there.

use std::io::{Read, Seek};

use super::error::{Error, Finding};
use super::header::Header;
use super::reader::{LocatedEntry, Reader};

/// Findings kept; further ones are only counted.
const KEPT: usize = 1000;
/// Bytes of data summed at a time.
const PIECE: usize = 256 << 10;

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct CheckReport {
    /// The header, unless it is damaged so that nothing behind it can be found.
    pub header: Option<Header>,
    /// Metadata blocks found.
    pub blocks: u64,
    /// Whole entries in them.
    pub entries: u64,
    /// Bytes of data of these.
    pub data_bytes: u64,
    /// Entries whose data has no checksum.
    pub without_checksum: u64,
    /// What is wrong, at most the first thousand.
    pub findings: Vec<Finding>,
    /// How many more were found.
    pub more_findings: u64,
}

impl CheckReport {
    /// Whether nothing is wrong.
    pub const fn is_sound(&self) -> bool {
        self.findings.is_empty()
    }

    fn note(&mut self, finding: Finding) {
        if self.findings.len() < KEPT {
            self.findings.push(finding);
        } else {
            self.more_findings += 1;
        }
    }

    /// Damage becomes a finding; any other error stays one.
    fn absorb(&mut self, error: Error) -> Result<(), Error> {
        match error {
            Error::Damaged(finding) => {
                self.note(finding);
                Ok(())
            }
            other => Err(other),
        }
    }
}

/// Reads all of a log and reports what is wrong with it.
///
/// # Errors
/// [`Error::NotMsHrl`], [`Error::Unsupported`], [`Error::NotClosed`], or [`Error::Io`]
/// if it cannot be read. Damage is no error here, but in the report.
pub fn check<R: Read + Seek>(inner: R) -> Result<CheckReport, Error> {
    let mut report = CheckReport::default();
    let opened = Reader::open_noting(inner, &mut |finding| {
        report.note(finding);
        Ok(())
    });
    let mut reader = match opened {
        Ok(reader) => reader,
        // With a wrong checksum the header's fields say nothing: the damage is the cause.
        Err(Error::Unsupported(_) | Error::NotClosed) if !report.is_sound() => return Ok(report),
        Err(error) => {
            report.absorb(error)?;
            return Ok(report);
        }
    };
    report.header = Some(reader.header().clone());
    report.blocks = reader.block_count() as u64;
    let mut buffer = vec![0; PIECE];
    for index in 0..reader.block_count() {
        check_block(&mut reader, index, &mut buffer, &mut report)?;
    }
    Ok(report)
}

/// Checks the entries of a block, and their data up to the first entry that is damaged:
/// where the data behind it lies is not known.
fn check_block<R: Read + Seek>(
    reader: &mut Reader<R>,
    index: usize,
    buffer: &mut [u8],
    report: &mut CheckReport,
) -> Result<(), Error> {
    let mut block = match reader.load(index) {
        Ok(block) => block,
        Err(error) => return report.absorb(error),
    };
    let mut next = 0;
    while next < block.len() {
        match block.locate(next) {
            Ok(write) => check_write(reader, &write, buffer, report)?,
            Err(finding) => {
                report.note(finding);
                break;
            }
        }
        next += 1;
    }
    for entry in next + 1..block.len() {
        if let Err(finding) = block.entry(entry) {
            report.note(finding);
        }
    }
    Ok(())
}

fn check_write<R: Read + Seek>(
    reader: &mut Reader<R>,
    write: &LocatedEntry,
    buffer: &mut [u8],
    report: &mut CheckReport,
) -> Result<(), Error> {
    report.entries += 1;
    report.data_bytes += write.entry().extent.len().get();
    if write.entry().data_checksum == 0 {
        report.without_checksum += 1;
        return Ok(());
    }
    let mut data = reader.data(write)?;
    loop {
        match data.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) => return report.absorb(error),
        }
    }
}
