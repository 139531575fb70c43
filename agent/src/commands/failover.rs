//! `replica failover`, `change-point` and `commit`: a state of a volume in use in place of its source.
//! What is done is done in the store, by this process, with or without a daemon; a daemon, if
//! one runs, serves what comes of it, else this process does until it is told to end.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{ArgGroup, Args};
use hrl_format::id::BranchId;
use libreplica::failover::Event;
use libreplica::replica::{Choice, ExportStatus, FailedOver, Failover, Shutdown};
use libreplica::store::{How, Recovery, StateId};
use libreplica::time::rfc3339;
use libreplica::{ErrorKind, IoContext};
use serde::Serialize;

use crate::cli::{DaemonArgs, OpenArgs};
use crate::commands::open_store::find_volume;
use crate::commands::{group, open};
use crate::control::client::ask;
use crate::control::protocol::{Answer, Request};
use crate::failure::{FAILED, Failure};
use crate::output;
use crate::quantity::DurationArg;
use crate::text;

const LIMIT: Option<Duration> = Some(Duration::from_secs(120));
/// How long a source may take to come to rest before it is replaced without.
const SHUT_DOWN: Duration = Duration::from_secs(60);

#[derive(Args, Debug)]
#[command(group = ArgGroup::new("way").required(true))]
pub struct FailoverArgs {
    /// The volume's name or id
    pub volume: String,
    /// Open a drill, with writes of its own, while replication goes on
    #[arg(long, group = "way")]
    pub test: bool,
    /// Discard the drill
    #[arg(long, group = "way")]
    pub cleanup: bool,
    /// Have the source come to rest, and put its last state in use: nothing is lost, or
    /// nothing is done
    #[arg(long, group = "way")]
    pub planned: bool,
    /// Put a state in use, whatever the source does
    #[arg(long, group = "way")]
    pub unplanned: bool,
    /// Try first, for at most a minute, to have the source come to rest and ship what is left
    #[arg(long, requires = "unplanned")]
    pub shutdown_source: bool,
    /// All volumes that have a point of the same moment, as `protect --group` makes them; --nbd is
    /// a folder then, with a socket NAME.nbd for each, and a daemon is needed
    #[arg(long, conflicts_with_all = ["foreground", "json"])]
    pub group: bool,
    /// Which state, with --test and --unplanned
    ///
    /// `latest` is the newest that the store knows, `latest-processed` the newest recovery
    /// point, `latest-application` the newest that applications were asked for; else a
    /// point's id, a time (RFC 3339) or EPOCH:SEQ, as `restore` takes them.
    #[arg(long, default_value = "latest", conflicts_with_all = ["planned", "cleanup"])]
    #[arg(value_name = "latest|latest-processed|latest-application|ID|RFC3339|EPOCH:SEQ")]
    pub point: String,
    /// With --planned: how long the source may take to come to rest
    #[arg(long, value_name = "DURATION", default_value = "10m")]
    pub limit: DurationArg,
    #[command(flatten)]
    pub serve: ServeArgs,
    #[command(flatten)]
    pub at: AtArgs,
}

/// Where what was opened is served.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Where to serve it: unix:PATH, a Unix socket for its owner alone
    #[arg(long, value_name = "unix:PATH", value_parser = text::unix_socket)]
    #[arg(required_unless_present = "cleanup", conflicts_with = "cleanup")]
    pub nbd: Option<PathBuf>,
    /// Serve it in the foreground until SIGINT or SIGTERM, also if a daemon runs
    #[arg(long)]
    pub foreground: bool,
    /// Print one line of JSON in place of the address
    #[arg(long)]
    pub json: bool,
}

/// Where the volume lies.
#[derive(Args, Debug)]
pub struct AtArgs {
    /// The store; without a daemon that has the volume it is needed
    #[arg(long, value_name = "STORE", value_parser = text::store)]
    pub store: Option<String>,
    /// The volume key
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct ChangePointArgs {
    /// The volume's name or id
    pub volume: String,
    /// Which state, as `failover` takes it
    #[arg(long)]
    #[arg(value_name = "latest|latest-processed|latest-application|ID|RFC3339|EPOCH:SEQ")]
    pub point: String,
    /// Where to serve it: unix:PATH [default: where the one before is served]
    #[arg(long, value_name = "unix:PATH", value_parser = text::unix_socket)]
    pub nbd: Option<PathBuf>,
    /// Serve it in the foreground until SIGINT or SIGTERM, also if a daemon runs
    #[arg(long)]
    pub foreground: bool,
    /// Print one line of JSON in place of the address
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub at: AtArgs,
}

#[derive(Args, Debug)]
pub struct CommitArgs {
    /// The volume's name or id
    pub volume: String,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
    #[command(flatten)]
    pub at: AtArgs,
}

/// What a failover came to, for scripts.
#[derive(Serialize)]
struct Line<'a> {
    uri: &'a str,
    branch: String,
    #[serde(flatten)]
    promoted: Option<Promoted>,
}

#[derive(Serialize)]
struct Promoted {
    how: String,
    point: String,
    moment: Option<String>,
    time: String,
    known_until: String,
    loss_seconds: f64,
    loss_bytes: u64,
    source_refused: Option<String>,
}

impl From<&FailedOver> for Promoted {
    fn from(done: &FailedOver) -> Self {
        let promotion = &done.promotion;
        Self {
            how: promotion.how.to_string(),
            point: promotion.point.to_string(),
            moment: promotion.moment.map(|moment| moment.to_string()),
            time: rfc3339(promotion.loss.since),
            known_until: rfc3339(promotion.loss.known_until),
            loss_seconds: promotion.loss.seconds(),
            loss_bytes: promotion.loss.bytes.get(),
            source_refused: done.source.clone(),
        }
    }
}

pub fn run(daemon: &DaemonArgs, args: &FailoverArgs) -> Result<ExitCode, Failure> {
    if args.group {
        return group::failover(daemon, args);
    }
    let choice = choice(&args.point)?;
    let failover = of_volume(daemon, &args.volume, &args.at)?;
    if args.cleanup {
        return clean_up(daemon, &args.volume, &failover);
    }
    let Some(socket) = &args.serve.nbd else {
        return Err(Failure::Usage("--nbd is needed".into()));
    };
    let (branch, promoted) = if args.test {
        (failover.test(choice)?, None)
    } else if let Some(done) = failover.resume(choice)? {
        eprintln!("replica: it was done before, and not served; that follows");
        tell(&args.volume, &done);
        (done.branch, Some(Promoted::from(&done)))
    } else {
        let done = match (args.planned, args.shutdown_source) {
            (true, _) => failover.planned(args.limit.0)?,
            (false, true) => failover.unplanned(choice, Shutdown::Try(SHUT_DOWN))?,
            (false, false) => failover.unplanned(choice, Shutdown::Skip)?,
        };
        tell(&args.volume, &done);
        (done.branch, Some(Promoted::from(&done)))
    };
    let place = Place {
        volume: &args.volume,
        at: &args.at,
        socket: socket.clone(),
        foreground: args.serve.foreground,
        json: args.serve.json,
    };
    place.serve(daemon, branch, promoted)
}

/// Which state is meant.
///
/// # Errors
/// If it is none.
pub fn choice(text: &str) -> Result<Choice, Failure> {
    Ok(match text {
        "latest" => Choice::Latest,
        "latest-processed" => Choice::LatestProcessed,
        "latest-application" => Choice::LatestApplication,
        other => {
            let selector = text::selector(other);
            Choice::State(selector.map_err(|error| Failure::Usage(error.to_string()))?)
        }
    })
}

/// The failover of a volume, by this machine.
pub fn of_volume(daemon: &DaemonArgs, volume: &str, at: &AtArgs) -> Result<Failover, Failure> {
    let found = find_volume(daemon, volume, at.store.as_deref())?;
    let key = found.key(at.key_file.as_deref())?;
    Ok(Failover::new(found.store, found.id, key, &host()?))
}

/// What this machine is called.
///
/// # Errors
/// What the system refuses.
pub fn host() -> libreplica::Result<String> {
    let path = std::path::Path::new("/proc/sys/kernel/hostname");
    let name = std::fs::read_to_string(path).at("find this machine's name", path)?;
    Ok(name.trim().to_owned())
}

/// Says what is in use now, and what it lacks.
pub fn tell(volume: &str, done: &FailedOver) {
    if let Some(why) = &done.source {
        eprintln!("replica: the source did not come to rest: {why}");
    }
    let (promotion, loss) = (&done.promotion, &done.promotion.loss);
    let state = match promotion.state() {
        StateId::Point(id) => format!("point {id}"),
        StateId::Moment(moment) => format!("moment {moment}"),
    };
    let (since, known) = (rfc3339(loss.since), rfc3339(loss.known_until));
    eprintln!("{volume} is failed over to {state} of {since}");
    match promotion.how {
        How::Planned => {
            eprintln!("nothing is lost: the source was at rest, and its digest is the point's");
        }
        How::Unplanned => eprintln!(
            "left out: {} in {:.3} s that the store has behind it; what the source wrote after \
             {known} did not arrive",
            output::bytes(loss.bytes.get()),
            loss.seconds(),
        ),
    }
    eprintln!("next: `replica change-point` for another point, or `replica commit`");
}

/// What is to be served, and where.
struct Place<'a> {
    volume: &'a str,
    at: &'a AtArgs,
    socket: PathBuf,
    foreground: bool,
    json: bool,
}

/// Whether what is written outlives who serves it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Yes,
    No,
}

impl Place<'_> {
    fn args(&self, branch: BranchId, kept: Kept) -> OpenArgs {
        OpenArgs {
            volume: self.volume.to_owned(),
            group: false,
            point: None,
            branch: Some(branch.to_string()),
            nbd: self.socket.clone(),
            read_only: false,
            keep: kept == Kept::Yes,
            foreground: self.foreground,
            store: self.at.store.clone(),
            key_file: self.at.key_file.clone(),
        }
    }

    fn serve(
        self,
        daemon: &DaemonArgs,
        branch: BranchId,
        promoted: Option<Promoted>,
    ) -> Result<ExitCode, Failure> {
        let is_drill = promoted.is_none();
        let args = self.args(branch, if is_drill { Kept::No } else { Kept::Yes });
        let line = |uri: &str| {
            if !self.json {
                return uri.to_owned();
            }
            let line = Line {
                uri,
                branch: branch.to_string(),
                promoted,
            };
            serde_json::to_string(&line).unwrap_or_default()
        };
        open::open(daemon, &args, line).inspect_err(|_| {
            let next = if is_drill {
                "`replica failover --cleanup` discards it"
            } else {
                "the failover is done"
            };
            eprintln!(
                "replica: branch {branch} of {} is not served; {next}, `replica open {} \
                 --branch {branch} --nbd unix:PATH` serves it",
                self.volume, self.volume
            );
        })
    }
}

/// Discards the drill of a volume.
///
/// # Errors
/// If none is open, or somebody uses it.
pub fn clean_up(
    daemon: &DaemonArgs,
    volume: &str,
    failover: &Failover,
) -> Result<ExitCode, Failure> {
    if let Some(drill) = failover.situation()?.drill {
        let what = drill.to_string();
        let request = Request::Close { what, keep: false };
        match ask(&daemon.socket, &request, LIMIT) {
            // Then nobody serves it, or another process does, and the store tells.
            Err(Failure::NoDaemon { .. }) => {}
            Err(Failure::Daemon { kind, .. }) if kind == ErrorKind::NotFound.as_str() => {}
            Err(failure) => return Err(failure),
            Ok(_) => {
                eprintln!("the drill of {volume} is discarded");
                return Ok(ExitCode::SUCCESS);
            }
        }
    }
    failover.clean_up()?;
    eprintln!("the drill of {volume} is discarded");
    Ok(ExitCode::SUCCESS)
}

pub fn change_point(daemon: &DaemonArgs, args: &ChangePointArgs) -> Result<ExitCode, Failure> {
    let choice = choice(&args.point)?;
    let failover = of_volume(daemon, &args.volume, &args.at)?;
    let before = failover.may(Event::ChangePoint)?.branch;
    let served = match before {
        Some(branch) => served(daemon, branch)?,
        None => None,
    };
    let socket = served.as_ref().and_then(|export| export.socket());
    let Some(socket) = args.nbd.clone().or(socket) else {
        return Err(Failure::Usage(
            "nothing is served here: --nbd is needed".into(),
        ));
    };
    if let Some(export) = &served {
        if export.clients > 0 {
            let (uri, clients) = (&export.uri, export.clients);
            eprintln!("replica: {clients} clients use {uri}; shut them down first");
            return Ok(ExitCode::from(FAILED));
        }
        let (what, keep) = (export.id.clone(), true);
        ask(&daemon.socket, &Request::Close { what, keep }, LIMIT)?;
    }
    let place = Place {
        volume: &args.volume,
        at: &args.at,
        socket,
        foreground: args.foreground,
        json: args.json,
    };
    let done = match (failover.change_point(choice), before) {
        (Err(error), Some(branch)) if served.is_some() => {
            // All stays as it was.
            let args = place.args(branch, Kept::Yes);
            let _ = ask(&daemon.socket, &open::request(&args)?, LIMIT)?;
            return Err(error.into());
        }
        (done, _) => done?,
    };
    tell(&args.volume, &done);
    place.serve(daemon, done.branch, Some(Promoted::from(&done)))
}

/// What the daemon serves of a branch, if one runs and does.
pub fn served(daemon: &DaemonArgs, branch: BranchId) -> Result<Option<ExportStatus>, Failure> {
    let request = Request::Status { volume: None };
    match ask(&daemon.socket, &request, LIMIT) {
        Ok(Answer::Status { open, .. }) => {
            let id = branch.to_string();
            Ok(open.into_iter().find(|export| export.id == id))
        }
        Err(Failure::NoDaemon { .. }) => Ok(None),
        Err(failure) => Err(failure),
        Ok(_) => Ok(None),
    }
}

pub fn commit(daemon: &DaemonArgs, args: &CommitArgs) -> Result<ExitCode, Failure> {
    let failover = of_volume(daemon, &args.volume, &args.at)?;
    let situation = failover.situation()?;
    let points = failover.points_to_drop()?;
    let state = match &situation.recovery {
        Recovery::FailedOver(promotion) => match promotion.state() {
            StateId::Point(id) => format!("point {id}"),
            StateId::Moment(moment) => format!("moment {moment}"),
        },
        _ => String::new(),
    };
    eprintln!(
        "commit makes {state} of {} final: {points} other recovery points are dropped, and all \
         that lies behind it",
        args.volume
    );
    if !args.yes && !confirmed()? {
        eprintln!("replica: nothing was done");
        return Ok(ExitCode::from(FAILED));
    }
    let dropped = failover.commit()?;
    eprintln!(
        "{} is committed, {dropped} points were dropped",
        args.volume
    );
    eprintln!("next: `replica reprotect` protects it towards the first side");
    Ok(ExitCode::SUCCESS)
}

/// Asks who sits at the terminal.
///
/// # Errors
/// If there is nobody to ask.
pub fn confirmed() -> Result<bool, Failure> {
    if !std::io::stdin().is_terminal() {
        return Err(Failure::Usage(
            "nobody can be asked here: --yes says that it is meant".into(),
        ));
    }
    eprint!("go on? [y/N] ");
    std::io::stderr().flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(matches!(line.trim(), "y" | "Y" | "yes"))
}
