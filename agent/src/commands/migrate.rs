//! `replica migrate`: a device in use moves to another place, with all that is on it, for good. The first
//! copy, what changed since, the planned failover, its commit, and the old device left read-only. Each
//! step is seen in the store or at the daemons, so that the same command goes on after whatever stopped
//! it.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use hrl_format::id::BranchId;
use libreplica::failover::State;
use libreplica::primary::VolumeStatus;
use libreplica::replica::Failover;
use libreplica::store::Store;
use libreplica::units::Timestamp;
use libreplica::{Error, ErrorKind, IoContext};
use serde::Serialize;

use crate::cli::{CaptureArg, DaemonArgs};
use crate::commands::failover::host;
use crate::commands::open_store::{read_key, store_path};
use crate::commands::serve_branch::serve;
use crate::commands::volume::wait;
use crate::control::client::ask;
use crate::control::protocol::{Answer, PointRequest, ProtectRequest, Request};
use crate::failure::Failure;
use crate::output;
use crate::quantity::DurationArg;
use crate::text;

const MIGRATE: &str = "migrate the device";
const LIMIT: Option<Duration> = Some(Duration::from_secs(120));
/// How long a point may take on the way.
const POINT_LIMIT: Duration = Duration::from_secs(60 * 60);
/// How many points are made at most, until little is left.
const ROUNDS: u32 = 8;
/// So much can be left when the source is asked to come to rest.
const LITTLE: u64 = 16 << 20;

#[derive(Args, Debug)]
pub struct MigrateArgs {
    /// The block device, protected or not
    pub device: PathBuf,
    /// The store by which it moves: a folder or a file:// URL
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub to: String,
    /// What to call the volume
    #[arg(long, value_parser = text::name)]
    pub name: String,
    /// Where it is served afterwards: unix:PATH, a Unix socket for its owner alone
    #[arg(long, value_name = "unix:PATH", value_parser = text::unix_socket)]
    pub nbd: PathBuf,
    /// The socket of the daemon that serves it afterwards [default: this one]
    #[arg(long, value_name = "PATH")]
    pub target_socket: Option<PathBuf>,
    /// How writes are captured, if it is not protected yet
    #[arg(long, value_enum, default_value_t)]
    pub capture: CaptureArg,
    /// Encrypt with the key in this file: 32 raw bytes or 64 hexadecimal digits
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// How long the source may take to come to rest: it is compared with its copy
    #[arg(long, value_name = "DURATION", default_value = "10m")]
    pub limit: DurationArg,
    /// Print one line of JSON in place of the address
    #[arg(long)]
    pub json: bool,
}

/// What a migration came to, for scripts.
#[derive(Serialize)]
struct Line<'a> {
    uri: &'a str,
    branch: String,
    point: String,
    lost_bytes: u64,
    /// None if it was served before this command began.
    downtime_seconds: Option<f64>,
}

/// A migration under way.
struct Migration<'a> {
    source: &'a DaemonArgs,
    target: DaemonArgs,
    args: &'a MigrateArgs,
    store: PathBuf,
    device: PathBuf,
}

/// What is in use in place of the source.
struct Moved {
    branch: BranchId,
    uri: String,
    downtime: Option<Duration>,
}

pub fn run(daemon: &DaemonArgs, args: &MigrateArgs) -> Result<ExitCode, Failure> {
    let target = DaemonArgs {
        socket: args
            .target_socket
            .as_ref()
            .unwrap_or(&daemon.socket)
            .clone(),
        ..daemon.clone()
    };
    let device = std::fs::canonicalize(&args.device).at(MIGRATE, &args.device)?;
    let _alone = alone(&device)?;
    let migration = Migration {
        source: daemon,
        target,
        args,
        store: store_path(&args.to)?,
        device,
    };
    migration.refuse_socket_in_use()?;
    let failover = migration.bring_over()?;
    let moved = migration.take_over(&failover)?;
    migration.make_final(&failover)?;
    migration.tell(&failover, &moved)
}

/// One migration of a device at a time; the lock ends with the process.
fn alone(device: &Path) -> Result<File, Failure> {
    let file = File::open(device).at(MIGRATE, device)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::new(ErrorKind::Busy, MIGRATE)
            .path(device)
            .detail("another migration of it is under way")
            .into()),
        Err(TryLockError::Error(error)) => Err(error).at(MIGRATE, device)?,
    }
}

impl Migration<'_> {
    /// Better said before the first copy than after it.
    fn refuse_socket_in_use(&self) -> Result<(), Failure> {
        let request = Request::Status { volume: None };
        let Answer::Status { open, .. } = ask(&self.target.socket, &request, LIMIT)? else {
            return Ok(());
        };
        let there = |export: &&libreplica::replica::ExportStatus| {
            export.socket().as_ref() == Some(&self.args.nbd) && export.name != self.args.name
        };
        match open.iter().find(there) {
            None => Ok(()),
            Some(export) => Err(Error::new(ErrorKind::Busy, MIGRATE)
                .path(&self.args.nbd)
                .detail(format!("{} is served there", export.name))
                .into()),
        }
    }

    /// The volume, all of which is in the store but for what was written last.
    fn bring_over(&self) -> Result<Failover, Failure> {
        if let Some(failover) = self.found()?
            && failover.situation()?.recovery.promotion().is_some()
        {
            return Ok(failover);
        }
        if self.protected()?.is_none() {
            self.protect()?;
        }
        wait(self.source, &self.args.name)?;
        self.catch_up()?;
        self.found()?.ok_or_else(|| {
            let missing = Error::new(ErrorKind::NotFound, MIGRATE).path(&self.store);
            missing.detail("the volume is not in this store").into()
        })
    }

    /// The volume in the store, if it is there.
    fn found(&self) -> Result<Option<Failover>, Failure> {
        let store = match Store::open(&self.store) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            store => store?,
        };
        let id = match store.find(&self.args.name) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            id => id?,
        };
        let key = read_key(self.args.key_file.as_deref())?;
        Ok(Some(Failover::new(store, id, key, &host()?)))
    }

    /// How the source's daemon protects the device, if it does.
    fn protected(&self) -> Result<Option<VolumeStatus>, Failure> {
        let request = Request::Status { volume: None };
        let Answer::Status { volumes, .. } = ask(&self.source.socket, &request, LIMIT)? else {
            return Ok(None);
        };
        let named = |volume: &VolumeStatus| volume.name == self.args.name;
        let Some(volume) = volumes.into_iter().find(named) else {
            return Ok(None);
        };
        let (theirs, store) = (Path::new(&volume.device), Path::new(&volume.store));
        let same = |a: &Path, b: &Path| a.canonicalize().ok() == b.canonicalize().ok();
        if same(theirs, &self.device) && same(store, &self.store) {
            return Ok(Some(volume));
        }
        Err(Error::new(ErrorKind::Foreign, MIGRATE)
            .path(&self.device)
            .detail(format!(
                "the volume {} is {} in {}",
                volume.name, volume.device, volume.store
            ))
            .advice("choose another --name")
            .into())
    }

    fn protect(&self) -> Result<(), Failure> {
        let existing = |path: &Path| std::fs::canonicalize(path).at("find the key file", path);
        let request = Request::Protect(ProtectRequest {
            device: self.device.clone(),
            store: self.store.clone(),
            name: Some(self.args.name.clone()),
            every_ms: 30_000,
            retain: "all:2h,1h:24h".to_owned(),
            block_bytes: None,
            key_file: self.args.key_file.as_deref().map(existing).transpose()?,
            group: None,
            exclude: Vec::new(),
            spool: None,
            capture: self.args.capture.resolve(),
            force: false,
        });
        let answer = ask(&self.source.socket, &request, LIMIT)?;
        if let Answer::Protected {
            address: Some(address),
            ..
        } = answer
        {
            eprintln!("until it has moved, its users reach it at {address}");
        }
        Ok(())
    }

    /// Makes points until little is left, or it gets no less.
    fn catch_up(&self) -> Result<(), Failure> {
        let mut before = u64::MAX;
        for _ in 0..ROUNDS {
            let request = Request::Point(PointRequest {
                volume: self.args.name.clone(),
                consistency: None,
                label: "migration".to_owned(),
                timeout_ms: POINT_LIMIT.as_millis() as u64,
            });
            ask(&self.source.socket, &request, None)?;
            let Some(volume) = self.protected()? else {
                return Ok(());
            };
            let left = volume.dirty_bytes + volume.buffered_bytes + volume.spooled_bytes;
            eprintln!("{} are left to bring over", output::bytes(left));
            if left <= LITTLE || left >= before {
                break;
            }
            before = left;
        }
        Ok(())
    }

    /// Has the source come to rest, and its last state served by the target. The downtime is counted
    /// from when the source is asked, which is before it comes to rest.
    fn take_over(&self, failover: &Failover) -> Result<Moved, Failure> {
        let asked = Instant::now();
        let situation = failover.situation()?;
        let key_file = self.args.key_file.as_deref();
        let serve = |branch| serve(&self.target, failover, branch, key_file, &self.args.nbd);
        let Some(promotion) = situation.recovery.promotion() else {
            eprintln!("the source is asked to come to rest");
            let done = failover.planned(self.args.limit.0).inspect_err(|_| {
                eprintln!(
                    "replica: all is brought over, and nothing was taken from its users; mend this, \
                     and give the same command again"
                );
            })?;
            let uri = serve(done.branch)?;
            return Ok(Moved {
                branch: done.branch,
                uri,
                downtime: Some(asked.elapsed()),
            });
        };
        if situation.state == State::Reversing {
            return Err(Error::new(ErrorKind::State, MIGRATE)
                .volume(failover.volume())
                .detail("it has moved, and is protected where it is now")
                .into());
        }
        let gone = || Error::new(ErrorKind::State, MIGRATE).detail("what it moved to is gone");
        let branch = failover.finish()?.ok_or_else(gone)?;
        let was_served = crate::commands::failover::served(&self.target, branch)?.is_some();
        let uri = serve(branch)?;
        // Of a command that was killed in between: by the clock, from the last point on.
        let since = Timestamp::now().as_nanos() - promotion.loss.since.as_nanos();
        let since = Duration::from_nanos(u64::try_from(since).unwrap_or(0));
        let downtime = (!was_served).then_some(since);
        Ok(Moved {
            branch,
            uri,
            downtime,
        })
    }

    /// There is no way back: the other points go, and the source is given up.
    fn make_final(&self, failover: &Failover) -> Result<(), Failure> {
        if failover.situation()?.state == State::FailedOver {
            failover.commit()?;
        }
        let volume = failover.volume().to_string();
        match ask(&self.source.socket, &Request::Retire { volume }, LIMIT) {
            Err(Failure::Daemon { kind, .. }) if kind == ErrorKind::NotFound.as_str() => {}
            retired => drop(retired?),
        }
        let request = Request::Adopt {
            store: self.store.clone(),
            volume: Some(failover.volume().to_string()),
            key_file: self
                .args
                .key_file
                .as_deref()
                .map(|path| std::fs::canonicalize(path).at("find the key file", path))
                .transpose()?,
        };
        ask(&self.target.socket, &request, LIMIT)?;
        Ok(())
    }

    fn tell(&self, failover: &Failover, moved: &Moved) -> Result<ExitCode, Failure> {
        let (name, device) = (&self.args.name, self.device.display());
        eprintln!("{name} has moved; nothing is lost: the source was at rest, and compared");
        match moved.downtime {
            Some(downtime) => eprintln!("downtime: {:.1} s", downtime.as_secs_f64()),
            None => eprintln!("it was served already"),
        }
        eprintln!(
            "{device} is not protected any more, and read-only, so that nobody goes on with it"
        );
        eprintln!("next: `replica reprotect {name}` where it is now");
        if !self.args.json {
            println!("{}", moved.uri);
            return Ok(ExitCode::SUCCESS);
        }
        let situation = failover.situation()?;
        let promotion = situation.recovery.promotion();
        let line = Line {
            uri: &moved.uri,
            branch: moved.branch.to_string(),
            point: promotion.map_or_else(String::new, |promotion| promotion.point.to_string()),
            lost_bytes: promotion.map_or(0, |promotion| promotion.loss.bytes.get()),
            downtime_seconds: moved.downtime.map(|downtime| downtime.as_secs_f64()),
        };
        println!("{}", serde_json::to_string(&line)?);
        Ok(ExitCode::SUCCESS)
    }
}
