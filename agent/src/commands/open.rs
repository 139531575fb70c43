//! `replica open` and `replica close`: a state of a volume as an NBD export. A daemon serves it, if one
//! runs; else the command does, until it is told to end. What is written goes to a branch in the
//! store, which is discarded at the end unless it is to be kept.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use hrl_format::id::BranchId;
use libreplica::replica::{ExportStatus, Opened, PointExport, Wanted};
use libreplica::store::{BranchPurpose, Store};
use libreplica::{Error, ErrorKind, IoContext};

use crate::cli::{CloseArgs, DaemonArgs, OpenArgs};
use crate::commands::group;
use crate::commands::open_store::{locate, store_path};
use crate::control::client::ask;
use crate::control::protocol::{Answer, OpenRequest, Request};
use crate::failure::Failure;
use crate::run::{hold_signals, start_logging};
use crate::text::selector;

const LIMIT: Option<Duration> = Some(Duration::from_secs(120));

pub fn run(daemon: &DaemonArgs, args: &OpenArgs) -> Result<ExitCode, Failure> {
    if args.group {
        return group::open(daemon, args);
    }
    open(daemon, args, str::to_owned)
}

/// Opens what is asked for, and prints the one line that `line` makes of its address.
pub fn open(
    daemon: &DaemonArgs,
    args: &OpenArgs,
    line: impl FnOnce(&str) -> String,
) -> Result<ExitCode, Failure> {
    let wanted = wanted(args)?;
    if !args.foreground {
        match ask(&daemon.socket, &request(args)?, LIMIT) {
            Err(Failure::NoDaemon { .. }) if args.store.is_some() => {}
            Err(failure) => return Err(failure),
            Ok(Answer::Export { export }) => {
                println!("{}", line(&export.uri));
                return Ok(ExitCode::SUCCESS);
            }
            Ok(_) => {
                return Err(Failure::Hangup {
                    socket: daemon.socket.clone(),
                });
            }
        }
    }
    serve(daemon, args, wanted, line)
}

/// Serves it until a signal comes.
fn serve(
    daemon: &DaemonArgs,
    args: &OpenArgs,
    wanted: Wanted,
    line: impl FnOnce(&str) -> String,
) -> Result<ExitCode, Failure> {
    // Before the first thread starts, so that every thread inherits it.
    let signals = hold_signals()?;
    start_logging(Some("warn"));
    let (store, key) = (args.store.as_deref(), args.key_file.as_deref());
    let volume = locate(daemon, &args.volume, store, key)?.reader;
    let opened = Opened::open(&volume, wanted)?;
    let is_new = matches!(wanted, Wanted::Write(..));
    let branch = opened.branch().map(|branch| branch.info().id);
    let export = PointExport::start(opened, &args.nbd).inspect_err(|_| {
        if let Some(id) = branch.filter(|_| is_new) {
            // Nobody has got to know of it.
            let _ = volume.discard_branch(id);
        }
    })?;
    // The one line for scripts. Who does not listen any more can still end us.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", line(&export.uri())).and_then(|()| out.flush());
    signals
        .wait()
        .at("wait for a signal", Path::new("the process"))?;
    let Some(branch) = export.stop()?.into_branch() else {
        return Ok(ExitCode::SUCCESS);
    };
    let id = branch.info().id;
    // A drill stays until it is cleaned up, what was failed over to until it comes home.
    let passing = matches!(
        branch.info().purpose,
        BranchPurpose::Open | BranchPurpose::Drill
    );
    if args.keep || !passing {
        branch.seal()?;
        eprintln!("what was written is kept as branch {id}: `replica open --branch {id}` goes on");
    } else {
        branch.discard()?;
        eprintln!("what was written is discarded");
    }
    Ok(ExitCode::SUCCESS)
}

pub fn close(daemon: &DaemonArgs, args: CloseArgs) -> Result<ExitCode, Failure> {
    if let Some(store) = &args.store {
        return discard(&store_path(store)?, &args.what);
    }
    let CloseArgs { what, keep, .. } = args;
    let request = Request::Close { what, keep };
    let Answer::Export { export } = ask(&daemon.socket, &request, LIMIT)? else {
        return Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        });
    };
    let ExportStatus { id, name, .. } = &export;
    match (export.writable, keep) {
        (false, _) => eprintln!("{name} is closed"),
        (true, false) => eprintln!("{name} is closed, and what was written discarded"),
        (true, true) => eprintln!(
            "{name} is closed, and what was written kept as branch {id}: \
             `replica open {name} --branch {id}` goes on"
        ),
    }
    Ok(ExitCode::SUCCESS)
}

/// Discards a branch that nobody has open.
fn discard(store: &Path, what: &str) -> Result<ExitCode, Failure> {
    const CLOSE: &str = "discard a branch";
    let id: BranchId = what.parse().map_err(|source| {
        let error = Error::new(ErrorKind::Invalid, CLOSE).source(source);
        Failure::Usage(
            error
                .advice("with --store give the branch's id")
                .to_string(),
        )
    })?;
    let store = Store::open(store)?;
    for entry in store.volumes()? {
        let volume = store.volume(entry.id, None)?;
        if volume.branches()?.iter().any(|branch| branch.info.id == id) {
            volume.discard_branch(id)?;
            eprintln!("branch {id} is discarded");
            return Ok(ExitCode::SUCCESS);
        }
    }
    let error = Error::new(ErrorKind::NotFound, CLOSE).path(store.path());
    Err(error.detail(format!("there is no branch {id}")).into())
}

fn wanted(args: &OpenArgs) -> Result<Wanted, Failure> {
    let usage = |error: &dyn std::fmt::Display| Failure::Usage(error.to_string());
    match (&args.point, &args.branch) {
        (Some(point), _) => {
            let selector = selector(point).map_err(|error| usage(&error))?;
            Ok(match args.read_only {
                true => Wanted::Read(selector),
                false => Wanted::Write(selector, BranchPurpose::Open),
            })
        }
        (None, Some(branch)) => {
            let id = branch.parse().map_err(|error| usage(&error))?;
            Ok(Wanted::Branch(id))
        }
        (None, None) => Err(usage(&"--point or --branch is needed")),
    }
}

/// What a daemon is asked, which runs in another folder.
pub fn request(args: &OpenArgs) -> Result<Request, Failure> {
    let existing = |path: &Path| std::fs::canonicalize(path).at("find the key file", path);
    Ok(Request::Open(OpenRequest {
        volume: args.volume.clone(),
        store: args.store.as_deref().map(store_path).transpose()?,
        key_file: args.key_file.as_deref().map(existing).transpose()?,
        point: args.point.clone(),
        branch: args.branch.clone(),
        read_only: args.read_only,
        socket: args.nbd.clone(),
    }))
}
