//! Checking a log: every byte of it. Checksums and places of all frames, their records
//! against the volume, the seal against the frames, the index against what the records
//! come to; and with the key, that nobody without it made or changed any of that.
//!
//! Memory stays below the size of the file: what is rebuilt is never larger than what the
//! file itself has to say about it.

mod frames;
mod index;
mod leaf;
mod proof;

use std::io::{self, Read};

use crate::error::{Error, ErrorKind, Result};
use crate::header::LogHeader;
use crate::key::VolumeKey;
use crate::log::Log;
use crate::scanner::{Ending, Scanner};
use crate::seal::{Seal, SealProof};
use crate::source::ReadAt;
use crate::units::FileOffset;

/// Problems that are kept; more are counted.
const MOST: usize = 256;

/// What the cipher vouches for, in a log that was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proof {
    /// Nothing: the log is not encrypted.
    None,
    /// Nothing yet: no key was given.
    Untried,
    /// Each frame that is there; not that all are there.
    Frames,
    /// All of it: the seal is proved, or the seals of all logs that it was made of are, and
    /// it is what comes of them.
    Whole,
}

/// What was found in a log.
#[derive(Clone, Debug)]
pub struct CheckReport {
    /// What the log says of itself, if that could be read.
    pub header: Option<LogHeader>,
    /// Its seal, if it has one.
    pub seal: Option<Seal>,
    /// How many frames are whole.
    pub frames: u64,
    /// How many records they have.
    pub records: u64,
    /// What is proved.
    pub proof: Proof,
    /// What is wrong; empty if nothing is. The first 256.
    pub problems: Vec<Error>,
    /// How many more problems there were.
    pub more_problems: u64,
}

impl CheckReport {
    fn new() -> Self {
        Self {
            header: None,
            seal: None,
            frames: 0,
            records: 0,
            proof: Proof::None,
            problems: Vec::new(),
            more_problems: 0,
        }
    }

    /// Whether nothing is wrong.
    pub const fn is_sound(&self) -> bool {
        self.problems.is_empty()
    }

    /// Notes what is wrong with the log. That it could not be read is not the log's fault.
    fn note(&mut self, found: Result<()>) -> Result<()> {
        match found {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::Io && !error.is_past_end() => Err(error),
            Err(error) if self.problems.len() < MOST => {
                self.problems.push(error);
                Ok(())
            }
            Err(_) => {
                self.more_problems += 1;
                Ok(())
            }
        }
    }
}

/// Checks a log, whatever state it is in: sealed, torn, or not a log at all.
///
/// # Errors
/// [`ErrorKind::Io`] if it could not be read; [`ErrorKind::KeyWrong`],
/// [`ErrorKind::KeyUnused`]. What is wrong with the log is no error, but in the report.
pub fn check<R: ReadAt>(source: R, key: Option<&VolumeKey>) -> Result<CheckReport> {
    match Log::open(&source, key) {
        Ok(log) => log.check(),
        Err(error) => match error.kind() {
            ErrorKind::Io | ErrorKind::KeyWrong | ErrorKind::KeyUnused => Err(error),
            _ => check_unsealed(&source, key, error),
        },
    }
}

/// Reads as far as frames go, in a log that does not open: for `cause`.
fn check_unsealed<R: ReadAt>(
    source: &R,
    key: Option<&VolumeKey>,
    cause: Error,
) -> Result<CheckReport> {
    let mut report = CheckReport::new();
    let mut scanner = match Scanner::new(Stream { source, at: 0 }, key) {
        Ok(scanner) => scanner,
        Err(error) if error.kind() == ErrorKind::Io => return Err(error),
        Err(_) => {
            report.note(Err(cause))?;
            return Ok(report);
        }
    };
    report.header = Some(scanner.header().clone());
    report.proof = match (scanner.header().key, key) {
        (None, _) => Proof::None,
        (Some(_), None) => Proof::Untried,
        (Some(_), Some(_)) => Proof::Frames,
    };
    while let Some(frame) = scanner.next_frame()? {
        report.frames += 1;
        report.records += frame.records() as u64;
    }
    match scanner.ending() {
        Some(Ending::Torn { cause: torn, .. }) if torn.kind() != cause.kind() => {
            report.note(Err(torn.clone()))?;
            report.note(Err(cause))?;
        }
        Some(Ending::Torn { cause: torn, .. }) => report.note(Err(torn.clone()))?,
        _ => report.note(Err(cause))?,
    }
    Ok(report)
}

impl<R: ReadAt> Log<R> {
    /// Checks every byte of the log.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if it could not be read. What is wrong with the log is no error,
    /// but in the report.
    pub fn check(&self) -> Result<CheckReport> {
        let mut report = CheckReport::new();
        report.header = Some(self.header().clone());
        report.seal = Some(self.seal().clone());
        report.note(self.check_seal())?;
        let sizes = frames::check(self, &mut report)?;
        let frames_are_sound = report.is_sound();
        match index::survey(self) {
            // What the index should say is known only if all frames are.
            Ok(survey) if frames_are_sound => report.note(index::check(self, &survey, &sizes))?,
            Ok(_) => {}
            Err(error) => report.note(Err(error))?,
        }
        report.proof = match (self.header().key, &self.key, self.seal().proof) {
            (None, _, _) => Proof::None,
            (Some(_), None, _) => Proof::Untried,
            (Some(_), Some(_), SealProof::Proved) => Proof::Whole,
            (Some(_), Some(_), _) => Proof::Frames,
        };
        let leaves = leaf::leaves_of(self);
        match leaves {
            Ok(leaves) if report.proof == Proof::Frames && report.is_sound() => {
                let proved = proof::prove(self, &leaves);
                if matches!(proved, Ok(Proof::Whole)) {
                    report.proof = Proof::Whole;
                }
                report.note(proved.map(|_| ()))?;
            }
            Ok(_) => {}
            Err(error) => report.note(Err(error))?,
        }
        Ok(report)
    }
}

/// A source read from its start.
struct Stream<'a, R> {
    source: &'a R,
    at: u64,
}

impl<R: ReadAt> Read for Stream<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.source.size()?.saturating_sub(self.at);
        let len = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        self.source
            .read_exact_at(&mut buffer[..len], FileOffset::new(self.at))?;
        self.at += len as u64;
        Ok(len)
    }
}
