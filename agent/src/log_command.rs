//! `replica log`: logs as files, by themselves. Needs no daemon and no store; either
//! `.hrl` format is recognised by how the file begins.
//!
//! Nothing is written in place: an output is made under another name beside its own,
//! flushed, and only then takes its name. An existing file is replaced with `--force` only.

mod check;
mod convert;
mod dump;
mod input;
mod merge;
mod new_file;
mod salvage;
mod stat;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::failure::Failure;

pub use convert::ConvertArgs;
pub use merge::MergeArgs;
pub use salvage::SalvageArgs;

/// What to do with logs.
#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// Check a log of either format; exit 1 and say what is wrong if anything is
    Check(ReadArgs),
    /// Print every record of a log
    Dump(ReadArgs),
    /// Tell what a log is and what it holds
    Stat(ReadArgs),
    /// Merge consecutive logs into one: the last writer of each byte wins
    Merge(MergeArgs),
    /// Move what is whole of a torn log into a new, sealed one
    Salvage(SalvageArgs),
    /// Convert a log between the native format and [MS-HRL]
    Convert(ConvertArgs),
}

/// A log to be read.
#[derive(Args, Debug)]
pub struct ReadArgs {
    /// The log
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The volume key, to read what is encrypted
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Does what `command` says.
///
/// # Errors
/// What failed. A log that a check finds damaged is no error: the exit code says so.
pub fn run(command: LogCommand) -> Result<ExitCode, Failure> {
    match command {
        LogCommand::Check(args) => check::run(&args),
        LogCommand::Dump(args) => dump::run(&args),
        LogCommand::Stat(args) => stat::run(&args),
        LogCommand::Merge(args) => merge::run(&args),
        LogCommand::Salvage(args) => salvage::run(&args),
        LogCommand::Convert(args) => convert::run(&args),
    }
}
