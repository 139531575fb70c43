//! `replica log check`: all that a log says of itself, against what it holds.

use std::process::ExitCode;

use hrl_format::{Ending, Log, Scanner, VolumeKey, ms};
use libreplica::Result;
use serde::Serialize;

use super::ReadArgs;
use super::input::{Format, Input, key};
use crate::failure::Failure;
use crate::output;

/// What a check found, as JSON has it.
#[derive(Serialize)]
struct Report {
    file: String,
    format: &'static str,
    sound: bool,
    /// The log's id; null if not even that can be read.
    log: Option<String>,
    /// Whether the log was finished: sealed, or closed.
    sealed: bool,
    /// Whether what is encrypted was read, too; null if nothing is.
    decrypted: Option<bool>,
    frames: u64,
    records: u64,
    data_bytes: u64,
    /// Writes whose data no checksum covers: [MS-HRL] only.
    without_checksum: u64,
    findings: Vec<Finding>,
    more_findings: u64,
}

/// One thing wrong.
#[derive(Serialize)]
struct Finding {
    offset: Option<u64>,
    frame: Option<u32>,
    message: String,
}

/// Checks a log and prints what was found.
///
/// # Errors
/// If the log cannot be read, or the key is not its key.
pub fn run(args: &ReadArgs) -> Result<ExitCode, Failure> {
    let input = Input::open(&args.file)?;
    let key = key(args.key_file.as_deref())?;
    let report = match input.format() {
        Format::Native => native(&input, key.as_ref())?,
        Format::MsHrl => published(&input)?,
    };
    if args.json {
        output::json(&report)?;
    } else {
        report.print();
    }
    Ok(if report.sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl Report {
    fn new(input: &Input) -> Self {
        Self {
            file: input.path().display().to_string(),
            format: input.format().as_str(),
            sound: false,
            log: None,
            sealed: false,
            decrypted: None,
            frames: 0,
            records: 0,
            data_bytes: 0,
            without_checksum: 0,
            findings: Vec::new(),
            more_findings: 0,
        }
    }

    fn found(&mut self, error: &hrl_format::Error) {
        self.findings.push(Finding {
            offset: error.offset().map(|at| at.get()),
            frame: error.frame().map(|frame| frame.get()),
            message: error.to_string(),
        });
    }

    fn print(&self) {
        let Self {
            file,
            format,
            records,
            ..
        } = self;
        let log = self.log.as_deref().unwrap_or("unknown");
        for finding in &self.findings {
            println!("{file}: {}", finding.message);
        }
        if self.more_findings > 0 {
            println!("{file}: and {} more", self.more_findings);
        }
        let verdict = if self.sound { "sound" } else { "DAMAGED" };
        let data = output::bytes(self.data_bytes);
        println!("{file}: {verdict}: {format} log {log}, {records} records, {data} of data");
        if self.decrypted == Some(false) {
            println!("{file}: encrypted, and no key was given: its data was not opened");
        }
        if self.without_checksum > 0 {
            println!(
                "{file}: {} writes have no checksum of their data",
                self.without_checksum
            );
        }
    }
}

/// Reads all frames and the seal, then the index and the marks through the seal.
fn native(input: &Input, key: Option<&VolumeKey>) -> Result<Report> {
    use hrl_format::ErrorKind as Kind;
    let operation = "check the log";
    let failed = |error| input.native_error(operation, error);
    let mut report = Report::new(input);
    let mut scanner = match Scanner::new(input.stream()?, key) {
        Ok(scanner) => scanner,
        Err(error) if matches!(error.kind(), Kind::Io | Kind::KeyWrong | Kind::KeyUnused) => {
            return Err(failed(error));
        }
        Err(error) => {
            report.found(&error);
            return Ok(report);
        }
    };
    report.log = Some(scanner.header().log.to_string());
    report.decrypted = scanner.header().key.map(|_| key.is_some());
    while let Some(frame) = scanner.next_frame().map_err(failed)? {
        report.frames += 1;
        report.records += frame.records() as u64;
        report.data_bytes += frame.data_len() as u64;
    }
    match scanner.ending() {
        Some(Ending::Sealed(_)) => {
            report.sealed = true;
            match sections(input, key) {
                Ok(()) => report.sound = true,
                Err(error) if error.kind() == Kind::Io => return Err(failed(error)),
                Err(error) => report.found(&error),
            }
        }
        Some(Ending::Torn { cause, .. }) => report.found(cause),
        None => {}
    }
    Ok(report)
}

fn sections(input: &Input, key: Option<&VolumeKey>) -> hrl_format::Result<()> {
    let log = Log::open(input.file(), key)?;
    log.index().try_for_each(|entry| entry.map(|_| ()))?;
    log.marks().try_for_each(|mark| mark.map(|_| ()))?;
    if log.header().key.is_none() || key.is_some() {
        log.tags()?;
    }
    Ok(())
}

fn published(input: &Input) -> Result<Report> {
    let mut report = Report::new(input);
    let found = match ms::check(input.file()) {
        Ok(found) => found,
        Err(error @ ms::Error::Io { .. }) => return Err(input.ms_error("check the log", error)),
        Err(error) => {
            let message = error.to_string();
            report.findings.push(Finding {
                offset: None,
                frame: None,
                message,
            });
            return Ok(report);
        }
    };
    report.sound = found.is_sound();
    if let Some(header) = &found.header {
        report.log = Some(hrl_format::id::LogId::from_bytes(header.id).to_string());
        report.sealed = true;
    }
    report.frames = found.blocks;
    report.records = found.entries;
    report.data_bytes = found.data_bytes;
    report.without_checksum = found.without_checksum;
    report.more_findings = found.more_findings;
    let finding = |finding: &ms::Finding| Finding {
        offset: Some(finding.at.get()),
        frame: None,
        message: finding.to_string(),
    };
    report.findings = found.findings.iter().map(finding).collect();
    Ok(report)
}
