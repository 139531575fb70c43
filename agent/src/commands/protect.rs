//! `replica protect`: tracking is attached when it returns; with `--wait` the first copy
//! is durable and its recovery point made.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use libreplica::IoContext;

use crate::cli::{DaemonArgs, ProtectArgs};
use crate::commands::open_store::store_path;
use crate::commands::volume::wait;
use crate::control::client::ask;
use crate::control::protocol::{Answer, Exclude, ProtectRequest, Request};
use crate::failure::Failure;
use crate::quantity::parse_range;

/// How long the daemon may take to look at a device and attach to it.
const ATTACH_LIMIT: Duration = Duration::from_secs(120);

pub fn run(daemon: &DaemonArgs, args: ProtectArgs) -> Result<ExitCode, Failure> {
    let device = std::path::absolute(&args.device)?;
    let exclude = args
        .exclude
        .iter()
        .map(|text| exclusion(text))
        .collect::<Result<_, _>>()?;
    let spool = args.spool.map(std::path::absolute).transpose()?;
    let request = ProtectRequest {
        device: device.clone(),
        store: store_path(&args.to)?,
        name: args.name,
        every_ms: u64::try_from(args.every.0.as_millis()).unwrap_or(u64::MAX),
        retain: args.retain,
        block_bytes: args.block_size.map(|size| size.0.get()),
        key_file: args.key_file.map(|path| existing(&path)).transpose()?,
        group: args.group,
        exclude,
        spool: spool.clone(),
        capture: args.capture.resolve(),
        force: args.force,
    };
    let answer = ask(
        &daemon.socket,
        &Request::Protect(request),
        Some(ATTACH_LIMIT),
    )?;
    let Answer::Protected { id, name, address } = answer else {
        return Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        });
    };
    if let (Some(spool), None) = (&spool, &address) {
        eprintln!(
            "replica: note: --spool {}: ebpf capture does not use it: what waits for the \
             store waits in the dirty bitmap",
            spool.display()
        );
    }
    eprintln!("{} is protected as volume {name} ({id})", device.display());
    if let Some(address) = address {
        // The one line for scripts: what the device's users open from now on.
        println!("{address}");
    }
    if args.wait {
        wait(daemon, &id)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The absolute path of a file that must be there: the daemon runs in another folder.
fn existing(path: &Path) -> Result<std::path::PathBuf, Failure> {
    Ok(std::fs::canonicalize(path).at("find the key file", path)?)
}

fn exclusion(text: &str) -> Result<Exclude, Failure> {
    if text.starts_with('/') {
        return Ok(Exclude::Partition(text.into()));
    }
    let range = parse_range(text)?;
    Ok(Exclude::Range {
        offset: range.offset().get(),
        len: range.len().get(),
    })
}
