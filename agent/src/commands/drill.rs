//! `replica drill`: boots a recovery point, unattended, and tells whether it lives. SIGTERM and
//! SIGINT end it as its own end does: nothing of it is left.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use hrl_format::id::VolumeId;
use libreplica::machine::{Accelerator, Proof};
use libreplica::replica::{Choice, DrillSpec, Drilled, drill};
use libreplica::store::PointSelector;
use libreplica::{Error, ErrorKind, IoContext};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::Serialize;

use crate::cli::DaemonArgs;
use crate::commands::group::Group;
use crate::commands::machine::read_definition;
use crate::commands::open_store::find_volume;
use crate::failure::{FAILED, Failure};
use crate::output;
use crate::quantity::DurationArg;
use crate::run::{hold_signals, start_logging};
use crate::text;

/// What runs the machine's code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum AcceleratorArg {
    /// The processor, if the kernel lets us; else emulation
    #[default]
    Auto,
    /// The processor
    Kvm,
    /// Emulation, ten times slower or more
    Tcg,
}

impl From<AcceleratorArg> for Accelerator {
    fn from(arg: AcceleratorArg) -> Self {
        match arg {
            AcceleratorArg::Auto => Self::Auto,
            AcceleratorArg::Kvm => Self::Kvm,
            AcceleratorArg::Tcg => Self::Tcg,
        }
    }
}

#[derive(Args, Debug)]
pub struct DrillArgs {
    /// The volume's name or id
    pub volume: String,
    /// A point's id, `latest`, or a time (RFC 3339): the newest point at or before it
    #[arg(long, value_name = "ID|latest|RFC3339", default_value = "latest")]
    pub point: String,
    /// The machine of any volume that has a point of the same moment, if this one has none
    #[arg(long)]
    pub group: bool,
    /// The machine's definition, in place of the one that is kept with the volume
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// How long to wait for its sign of life [default: as the definition says]
    #[arg(long, value_name = "DURATION")]
    pub timeout: Option<DurationArg>,
    /// What runs the machine's code
    #[arg(long, value_enum, default_value_t)]
    pub accelerator: AcceleratorArg,
    /// Write what the machine says on its console there, too
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,
    /// The store; without a daemon that has the volume it is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
    /// The volume key
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct DrillOutput {
    point: String,
    point_time: String,
    #[serde(flatten)]
    proof: Proof,
}

pub fn run(daemon: &DaemonArgs, args: &DrillArgs) -> Result<ExitCode, Failure> {
    let point = text::selector(&args.point).map_err(|e| Failure::Usage(e.to_string()))?;
    let machine = args.machine.as_deref().map(read_definition).transpose()?;
    // Before the first thread starts, so that every thread inherits it.
    let signals = hold_signals()?;
    start_logging(Some("warn"));
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signals = SignalFd::with_flags(&signals, flags);
    let signals = signals.at("wait for signals", Path::new("the process"))?;
    let found = find_volume(daemon, &args.volume, args.store.as_deref())?;
    let key = found.key(args.key_file.as_deref())?;
    let (volume, point) = match args.group {
        true => with_machine(daemon, args, point)?,
        false => (found.id, point),
    };
    let spec = DrillSpec {
        store: &found.store,
        volume,
        key: key.as_ref(),
        point,
        machine: machine.as_ref(),
        limit: args.timeout.map(|limit| limit.0),
        accelerator: args.accelerator.into(),
    };
    let drilled = drill(&spec, &|| has_come(&signals))?;
    if let Some(path) = &args.console {
        std::fs::write(path, drilled.console.kept()).at("write the console", path)?;
    }
    tell(args, drilled)
}

/// The volume of the group that the machine's definition is kept with, and its point.
fn with_machine(
    daemon: &DaemonArgs,
    args: &DrillArgs,
    point: PointSelector,
) -> Result<(VolumeId, PointSelector), Failure> {
    let (store, key_file) = (args.store.as_deref(), args.key_file.as_deref());
    let choice = Choice::State(point);
    let group = Group::find(daemon, &args.volume, store, key_file, choice)?;
    for member in &group.members {
        if group
            .store
            .volume(member.volume, None)?
            .machine()?
            .is_some()
        {
            return Ok((member.volume, PointSelector::Id(member.point)));
        }
    }
    let error = Error::new(ErrorKind::NotFound, "drill a recovery point");
    Err(error
        .detail("no volume of the group has the definition of a machine")
        .advice("`replica machine set VOLUME FILE` keeps one")
        .into())
}

/// Whether a signal waits.
fn has_come(signals: &SignalFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut polled, PollTimeout::ZERO), Ok(1))
}

fn tell(args: &DrillArgs, drilled: Drilled) -> Result<ExitCode, Failure> {
    let Drilled {
        point,
        proof,
        console,
        complaint,
    } = drilled;
    let alive = proof.verdict.is_alive();
    if !alive {
        if !complaint.is_empty() {
            eprintln!("replica: QEMU said: {complaint}");
        }
        eprintln!("replica: the machine gave no sign of life; the last it said:");
        eprintln!("{}", last_lines(&console.kept()));
    }
    if args.json {
        output::json(&DrillOutput {
            point: point.id.to_string(),
            point_time: libreplica::time::rfc3339(point.time),
            proof,
        })?;
    } else {
        let (verdict, seconds) = (proof.verdict.as_str(), proof.seconds);
        println!("{}  {verdict} after {seconds:.1} s", point.id);
    }
    Ok(if alive {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    })
}

/// The end of what a guest said, without what would upset a terminal.
fn last_lines(console: &[u8]) -> String {
    let text = String::from_utf8_lossy(console);
    let plain = |c: &char| *c == '\n' || !c.is_control();
    let lines: Vec<&str> = text.lines().collect();
    let last = lines[lines.len().saturating_sub(12)..].join("\n");
    last.chars().filter(plain).collect()
}
