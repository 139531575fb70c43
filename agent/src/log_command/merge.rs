//! `replica log merge`: consecutive logs into one that leaves the same state behind.

use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use hrl_format::{Compression, Log, LogOptions, MergeWay, VolumeKey, merge};
use libreplica::{Error, Result};

use super::input::{Input, key, native_error};
use super::new_file::OutputArgs;
use crate::failure::Failure;
use crate::output;

/// Bytes gathered before they are written.
const GATHERED: usize = 1 << 20;

/// Which logs to merge into which.
#[derive(Args, Debug)]
pub struct MergeArgs {
    /// The logs, the oldest first; each names the one before it
    #[arg(value_name = "IN", required = true, num_args = 1..)]
    pub inputs: Vec<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
    /// The volume key; without it frames of encrypted logs are moved whole, not cut anew
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// Merges logs.
///
/// # Errors
/// If they do not follow one another, or one cannot be read; else what failed.
pub fn run(args: &MergeArgs) -> Result<ExitCode, Failure> {
    let key = key(args.key_file.as_deref())?;
    let logs = open(&args.inputs, key.as_ref())?;
    let new = args.output.create()?;
    let options = LogOptions {
        compression: Compression::Lz4,
    };
    let out = BufWriter::with_capacity(GATHERED, new.file());
    let (_, merged) = merge(&logs, out, &options)
        .map_err(|error| native_error("merge the logs", new.path(), error))?;
    new.finish()?;
    let epochs = merged.header.epochs;
    let way = match merged.way {
        MergeWay::Recut => "frames cut anew",
        MergeWay::Moved => "frames moved whole",
    };
    let bytes = output::bytes(merged.seal.file_len.get());
    println!(
        "log {}: epochs {} to {}, {bytes}, {way}",
        merged.header.log, epochs.first, epochs.last
    );
    for point in merged.dropped {
        println!("point {point}: gone, its state is no longer told apart");
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens the logs and sees that each follows the one before it.
fn open(paths: &[PathBuf], key: Option<&VolumeKey>) -> Result<Vec<Log<File>>> {
    let operation = "merge the logs";
    let mut logs: Vec<Log<File>> = Vec::with_capacity(paths.len());
    for path in paths {
        let input = Input::open(path)?;
        input.must_be_native(operation)?;
        let failed = |error| native_error(operation, path, error);
        let log = Log::open(input.into_file(), key).map_err(failed)?;
        if let Some(before) = logs.last() {
            before.check_followed_by(log.header()).map_err(|error| {
                Error::log(operation, error)
                    .path(path)
                    .advice("give consecutive logs of one volume, the oldest first")
            })?;
        }
        logs.push(log);
    }
    Ok(logs)
}
