//! `replica log convert`: from the native format to [MS-HRL], and back.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use hrl_format::convert::{self, HrlOptions, Loss};
use hrl_format::id::VolumeId;
use hrl_format::units::{Epoch, VolumeSize};
use hrl_format::{Compression, LogOptions, VolumeKey};
use libreplica::{Error, ErrorKind, IoContext, Result};

use super::input::{Format, Input, key, ms_error, native_error};
use super::new_file::OutputArgs;
use crate::failure::Failure;
use crate::quantity::parse_bytes;

/// Bytes gathered before they are written.
const GATHERED: usize = 1 << 20;

/// What to convert into what.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// The format of OUT
    #[arg(long, value_enum)]
    pub to: Target,
    /// The log
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    #[command(flatten)]
    pub output: OutputArgs,
    /// To hrl: the volume's size [default: what the writes need, in whole MiB]
    #[arg(long, value_name = "SIZE")]
    pub volume_size: Option<String>,
    /// To hrl: the volume's id [default: a new one]
    #[arg(long, value_name = "ID")]
    pub volume: Option<VolumeId>,
    /// To hrl: the number of the epoch
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub epoch: u64,
    /// To ms-hrl: leave out recovery points and changes of size, and say so
    #[arg(long)]
    pub lossy: bool,
    /// The volume key: opens an encrypted IN; encrypts OUT if that is hrl
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

/// A format to convert into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// [MS-HRL] version 2, as published
    MsHrl,
    /// The native format, version 3
    Hrl,
}

/// Converts a log.
///
/// # Errors
/// [`Failure::Usage`] for options of the other direction; else what failed.
pub fn run(args: &ConvertArgs) -> Result<ExitCode, Failure> {
    check_options(args)?;
    let volume_size = args.volume_size.as_deref().map(parse_bytes).transpose()?;
    let key = key(args.key_file.as_deref())?;
    let input = Input::open(&args.input)?;
    match (input.format(), args.to) {
        (Format::Native, Target::MsHrl) => to_ms_hrl(&input, key.as_ref(), args)?,
        (Format::MsHrl, Target::Hrl) => {
            let size = volume_size.map(|size| VolumeSize::new(size.get()));
            to_hrl(&input, key.as_ref(), args, size)?;
        }
        (format, _) => {
            let error = Error::new(ErrorKind::Invalid, "convert the log").path(&args.input);
            return Err(error
                .detail(format!("it is of format {} already", format.as_str()))
                .into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check_options(args: &ConvertArgs) -> Result<(), Failure> {
    let of_the_other = match args.to {
        Target::MsHrl if args.volume_size.is_some() => Some("--volume-size"),
        Target::MsHrl if args.volume.is_some() => Some("--volume"),
        Target::Hrl if args.lossy => Some("--lossy"),
        _ => None,
    };
    match of_the_other {
        Some(option) => Err(Failure::Usage(format!(
            "{option} belongs to the other direction"
        ))),
        None => Ok(()),
    }
}

fn to_ms_hrl(input: &Input, key: Option<&VolumeKey>, args: &ConvertArgs) -> Result<()> {
    let loss = if args.lossy {
        Loss::Accepted
    } else {
        Loss::Refused
    };
    let output = args.output.create()?;
    let files = Files {
        native: input.path(),
        published: output.path(),
    };
    let out = BufWriter::with_capacity(GATHERED, output.file());
    let (mut out, report) =
        convert::to_ms_hrl(input.stream()?, key, out, loss).map_err(|error| files.failed(error))?;
    out.flush().at("write the log", output.path())?;
    drop(out);
    output.finish()?;
    if !report.lost.is_empty() {
        eprintln!("replica: left out: {}", report.lost);
    }
    Ok(())
}

fn to_hrl(
    input: &Input,
    key: Option<&VolumeKey>,
    args: &ConvertArgs,
    volume_size: Option<VolumeSize>,
) -> Result<()> {
    let operation = "convert the log";
    let volume = match args.volume {
        Some(volume) => volume,
        None => VolumeId::random().map_err(|e| Error::new(ErrorKind::Io, operation).source(e))?,
    };
    let options = HrlOptions {
        volume_size,
        epoch: Epoch::new(args.epoch),
        log: LogOptions {
            compression: Compression::Lz4,
        },
        ..HrlOptions::new(volume)
    };
    let output = args.output.create()?;
    let files = Files {
        native: output.path(),
        published: input.path(),
    };
    let out = BufWriter::with_capacity(GATHERED, output.file());
    convert::to_hrl(input.file(), key, out, &options).map_err(|error| files.failed(error))?;
    output.finish()
}

/// The files of a conversion, by their formats.
struct Files<'a> {
    native: &'a Path,
    published: &'a Path,
}

impl Files<'_> {
    /// What went wrong, with the file that it went wrong with and the way out.
    fn failed(&self, error: convert::Error) -> Error {
        use convert::Error as Why;
        let operation = "convert the log";
        let invalid = |path: &Path, error: Why| {
            Error::new(ErrorKind::Invalid, operation)
                .path(path)
                .source(error)
        };
        match error {
            Why::Torn { cause, .. } => native_error(operation, self.native, cause),
            Why::Native(error) => native_error(operation, self.native, error),
            Why::Ms(error) => ms_error(operation, self.published, error),
            error @ Why::Inexpressible(_) => {
                invalid(self.native, error).advice("leave them out with --lossy")
            }
            error @ Why::VolumeTooSmall { .. } => {
                invalid(self.published, error).advice("give a larger --volume-size, or none")
            }
            error => invalid(self.published, error),
        }
    }
}
