//! `replica reprotect` and `failback`: the way home of a volume that was failed over. The first is
//! given where the volume is used now, the second where it is to go: on its first side, or on a
//! machine with a blank disk.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use hrl_format::id::Generation;
use libreplica::primary::refuse_target;
use libreplica::replica::{CameHome, Failover, Home, Pass};
use libreplica::store::Progress as Done;
use libreplica::{Error, ErrorKind};
use serde::Serialize;

use crate::cli::DaemonArgs;
use crate::commands::failover::{AtArgs, of_volume};
use crate::commands::open_store::{protected_devices, store_path};
use crate::control::client::ask;
use crate::control::protocol::{Answer, Request};
use crate::failure::Failure;
use crate::output::{self, Progress};
use crate::quantity::DurationArg;
use crate::text;

const LIMIT: Option<Duration> = Some(Duration::from_secs(120));
const FAIL_BACK: &str = "bring the volume home";

#[derive(Args, Debug)]
pub struct ReprotectArgs {
    /// The volume's name or id
    pub volume: String,
    /// Where its changes go [default: the store that it was failed over from]
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub to: Option<String>,
    /// The interval between recovery points
    #[arg(long, default_value = "30s", value_name = "DURATION")]
    pub every: DurationArg,
    /// Which recovery points to keep, as `protect` takes it
    #[arg(long, default_value = "all:2h,1h:24h", value_name = "TIERS", value_parser = text::tiers)]
    pub retain: String,
    #[command(flatten)]
    pub at: AtArgs,
}

#[derive(Args, Debug)]
pub struct FailbackArgs {
    /// The volume's name or id
    pub volume: String,
    /// The device, on a machine that does not protect the volume: any that is large enough; needs
    /// --force
    #[arg(long, value_name = "PATH", requires = "force")]
    pub device: Option<PathBuf>,
    /// Overwrite what is on the device
    #[arg(long)]
    pub force: bool,
    /// How long the other side may take to come to rest: it reads all of the volume
    #[arg(long, value_name = "DURATION", default_value = "10m")]
    pub limit: DurationArg,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub at: AtArgs,
}

#[derive(Serialize)]
struct HomeOutput {
    device: String,
    point: String,
    bytes_before: u64,
    bytes_at_rest: u64,
    downtime_seconds: f64,
}

pub fn reprotect(daemon: &DaemonArgs, args: &ReprotectArgs) -> Result<ExitCode, Failure> {
    let failover = of_volume(daemon, &args.volume, &args.at)?;
    if let Some(to) = &args.to {
        refuse_another(&failover, to)?;
    }
    let retain = args
        .retain
        .parse()
        .map_err(|e: Error| Failure::Usage(e.to_string()))?;
    let before = failover.situation()?;
    let branch = failover.reprotect(args.every.0, &retain)?;
    let every = args.every.0.as_secs_f64();
    eprintln!(
        "{} is protected where it is used now: a recovery point every {every} s of what is \
         written to branch {branch}",
        args.volume
    );
    let host = before.recovery.promotion().map_or("it", |p| &p.host);
    eprintln!(
        "next: `replica failback {}` on the first side; until then {host} goes on",
        args.volume
    );
    Ok(ExitCode::SUCCESS)
}

/// What was written since the failover lies in the store that it was failed over from.
fn refuse_another(failover: &Failover, to: &str) -> Result<(), Failure> {
    let (here, there) = (failover.store().path(), store_path(to)?);
    let same = |path: &Path| path.canonicalize().ok();
    if same(here) == same(&there) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Unsupported, "protect what is in use")
        .path(there)
        .detail(format!(
            "the volume was failed over from {}",
            here.display()
        ))
        .advice(
            "protect it there (leave --to away); `replica protect` of the served device \
                 makes a first copy in another store",
        )
        .into())
}

/// The device, and what is told of it.
struct Way<'a> {
    daemon: &'a DaemonArgs,
    /// The volume, if this machine's daemon protects it.
    volume: Option<&'a str>,
    bar: Option<(Pass, Progress)>,
    shown: Instant,
}

impl Home for Way<'_> {
    fn progress(&mut self, pass: Pass, done: Done) {
        if self.bar.as_ref().is_none_or(|(of, _)| *of != pass) {
            let what = match pass {
                Pass::First => "comparing",
                Pass::Last => "at rest, comparing",
            };
            self.bar = Some((pass, Progress::start(what)));
        }
        if self.shown.elapsed() < Duration::from_millis(100) {
            return;
        }
        self.shown = Instant::now();
        if let Some((_, bar)) = &mut self.bar {
            bar.update(done.done.get(), done.total.get());
        }
    }

    fn comes(&mut self, generation: Generation) -> libreplica::Result<()> {
        let Some(volume) = self.volume else {
            return Ok(());
        };
        let request = Request::AnnounceHomecoming {
            volume: volume.to_owned(),
            number: generation.number.get(),
            generation: generation.id.to_string(),
        };
        let told = ask(&self.daemon.socket, &request, LIMIT);
        told.map(drop)
            .map_err(|failure| Error::new(ErrorKind::State, FAIL_BACK).detail(failure.to_string()))
    }
}

pub fn failback(daemon: &DaemonArgs, args: &FailbackArgs) -> Result<ExitCode, Failure> {
    let failover = of_volume(daemon, &args.volume, &args.at)?;
    failover.may(libreplica::failover::Event::Failback)?;
    let device = match &args.device {
        Some(device) => {
            refuse_target(device, &protected_devices(daemon))?;
            device.clone()
        }
        None => prepare(daemon, &args.volume)?,
    };
    let volume = args.device.is_none().then_some(args.volume.as_str());
    let mut way = Way {
        daemon,
        volume,
        bar: None,
        shown: Instant::now(),
    };
    let home = failover.failback(&device, args.limit.0, &mut way);
    if let Some((_, bar)) = &mut way.bar {
        bar.finish();
    }
    let home = home?;
    tell(args, &device, &home)?;
    match volume {
        Some(volume) => {
            // It looks by itself, if this does not reach it.
            let volume = volume.to_owned();
            let _ = ask(&daemon.socket, &Request::CameHome { volume }, LIMIT);
        }
        None => {
            let (name, device) = (&args.volume, device.display());
            let store = failover.store().path().display();
            eprintln!(
                "next: `replica protect {device} --to {store} --name {name} --force` protects \
                 it again"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Has the daemon let go of the volume's device; its path.
fn prepare(daemon: &DaemonArgs, volume: &str) -> Result<PathBuf, Failure> {
    let volume = volume.to_owned();
    match ask(
        &daemon.socket,
        &Request::PrepareHomecoming { volume },
        LIMIT,
    )? {
        Answer::Device { path } => Ok(path),
        _ => Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        }),
    }
}

fn tell(args: &FailbackArgs, device: &Path, home: &CameHome) -> Result<(), Failure> {
    let (before, at_rest) = (home.before.get(), home.at_rest.get());
    if args.json {
        output::json(&HomeOutput {
            device: device.display().to_string(),
            point: home.point.to_string(),
            bytes_before: before,
            bytes_at_rest: at_rest,
            downtime_seconds: home.downtime.as_secs_f64(),
        })?;
        return Ok(());
    }
    eprintln!(
        "{} is home on {}: {} were written while the other side was in use, {} while it was at \
         rest, for {:.1} s; the digest of the device is that of point {}",
        args.volume,
        device.display(),
        output::bytes(before),
        output::bytes(at_rest),
        home.downtime.as_secs_f64(),
        home.point
    );
    Ok(())
}
