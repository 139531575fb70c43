//! `replica log salvage`: what is whole of a torn log, as a new sealed one.

use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use hrl_format::units::ByteOffset;
use hrl_format::{ErrorKind as Kind, Log, Salvaged, salvage};
use libreplica::{Error, ErrorKind};

use super::input::{Input, key};
use super::new_file::OutputArgs;
use crate::failure::Failure;

/// Bytes gathered before they are written.
const GATHERED: usize = 1 << 20;

/// A torn log and where its rest goes.
#[derive(Args, Debug)]
pub struct SalvageArgs {
    /// The torn log
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
    /// The volume key: opens each frame that is kept, and authenticates the new seal
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// Salvages a torn log, and says what was left behind.
///
/// # Errors
/// If the log is sealed and sound, or not even its header and first frame are whole; then
/// nothing is written. Else what failed.
pub fn run(args: &SalvageArgs) -> Result<ExitCode, Failure> {
    let operation = "salvage the log";
    let key = key(args.key_file.as_deref())?;
    let input = Input::open(&args.input)?;
    input.must_be_native(operation)?;
    let new = args.output.create()?;
    let out = BufWriter::with_capacity(GATHERED, new.file());
    let (_, salvaged) =
        salvage(input.stream()?, out, key.as_ref()).map_err(|error| match error.kind() {
            Kind::Invalid => Error::new(ErrorKind::Invalid, operation)
                .path(input.path())
                .detail("it is sealed and sound: there is nothing to salvage"),
            _ => input.native_error(operation, error),
        })?;
    if salvaged.seal.frames == 0 {
        return Err(nothing(&input, operation, &salvaged).into());
    }
    new.finish()?;
    if Log::open(input.file(), key.as_ref()).is_ok() {
        eprintln!(
            "replica: {}: warning: it was sealed, so it is damaged, not torn: all behind byte {} \
             is left out, whole or not; another copy of it is better than this",
            input.path().display(),
            salvaged.cut
        );
    }
    let left = input.len()?.saturating_sub(salvaged.cut.get());
    println!(
        "log {}: {} frames, {} records kept of log {}",
        salvaged.header.log,
        salvaged.seal.frames,
        salvaged.seal.records,
        salvaged
            .header
            .stands_for
            .map_or_else(String::new, |end| end.log.to_string())
    );
    println!(
        "left behind: {left} bytes from byte {} on: {}",
        salvaged.cut, salvaged.cause
    );
    Ok(ExitCode::SUCCESS)
}

/// Not one frame is whole: a log of it would say that nothing had changed.
fn nothing(input: &Input, operation: &'static str, salvaged: &Salvaged) -> Error {
    Error::log(operation, salvaged.cause.clone())
        .path(input.path())
        .offset(ByteOffset::new(salvaged.cut.get()))
        .detail("nothing of it is whole, and nothing is written")
        .advice("take another copy")
}
