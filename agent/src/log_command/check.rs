//! `replica log check`: all that a log says of itself, against what it holds.

use std::process::ExitCode;

use hrl_format::{Proof, VolumeKey, ms};
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
    /// What the cipher vouches for: `none` if the log is not encrypted, `untried` without
    /// the key, `frames` (those that are there), or `whole`.
    proof: &'static str,
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
            proof: "none",
            frames: 0,
            records: 0,
            data_bytes: 0,
            without_checksum: 0,
            findings: Vec::new(),
            more_findings: 0,
        }
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
        match self.proof {
            "untried" => println!("{file}: encrypted; what the cipher says was not tried: no key"),
            "frames" => println!("{file}: the key proves the frames, not that all are there"),
            _ => {}
        }
        if self.without_checksum > 0 {
            println!(
                "{file}: {} writes have no checksum of their data",
                self.without_checksum
            );
        }
    }
}

/// Checks every byte of a native log.
fn native(input: &Input, key: Option<&VolumeKey>) -> Result<Report> {
    let found = hrl_format::check(input.file(), key)
        .map_err(|error| input.native_error("check the log", error))?;
    let mut report = Report::new(input);
    report.sound = found.is_sound();
    report.log = found.header.map(|header| header.log.to_string());
    report.sealed = found.seal.is_some();
    report.proof = match found.proof {
        Proof::None => "none",
        Proof::Untried => "untried",
        Proof::Frames => "frames",
        Proof::Whole => "whole",
    };
    report.frames = found.frames;
    report.records = found.records;
    report.data_bytes = found.seal.map_or(0, |seal| seal.data.get());
    report.more_findings = found.more_problems;
    let finding = |problem: &hrl_format::Error| Finding {
        offset: problem.offset().map(|at| at.get()),
        frame: problem.frame().map(|frame| frame.get()),
        message: problem.to_string(),
    };
    report.findings = found.problems.iter().map(finding).collect();
    Ok(report)
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
