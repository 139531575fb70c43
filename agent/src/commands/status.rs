//! `replica status`: how the volumes are, for people or as JSON.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use libreplica::primary::VolumeStatus;
use libreplica::replica::{AdoptedStatus, ExportStatus};
use serde::Serialize;

use crate::cli::{DaemonArgs, StatusArgs};
use crate::control::client::ask;
use crate::control::protocol::{Answer, Request};
use crate::failure::Failure;
use crate::output;

#[derive(Serialize)]
struct StatusOutput<'a> {
    volumes: &'a [VolumeStatus],
    open: &'a [ExportStatus],
    adopted: &'a [AdoptedStatus],
}

pub fn run(daemon: &DaemonArgs, args: &StatusArgs) -> Result<ExitCode, Failure> {
    loop {
        let request = Request::Status {
            volume: args.volume.clone(),
        };
        let answer = ask(&daemon.socket, &request, Some(Duration::from_secs(30)))?;
        let Answer::Status {
            volumes,
            open,
            adopted,
        } = answer
        else {
            return Err(Failure::Hangup {
                socket: daemon.socket.clone(),
            });
        };
        if args.watch && !args.json && std::io::stdout().is_terminal() {
            // Home and clear: one screen that changes in place.
            print!("\x1b[H\x1b[2J");
        }
        if args.json {
            output::json(&StatusOutput {
                volumes: &volumes,
                open: &open,
                adopted: &adopted,
            })?;
        } else {
            if volumes.is_empty() && args.volume.is_none() {
                println!("no volume is protected");
            }
            volumes.iter().try_for_each(print_volume)?;
            adopted.iter().try_for_each(print_adopted)?;
            open.iter().try_for_each(print_open)?;
        }
        if !args.watch {
            return Ok(ExitCode::SUCCESS);
        }
        std::io::stdout().flush()?;
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn print_volume(volume: &VolumeStatus) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}  {}", volume.name, volume.id)?;
    writeln!(
        out,
        "  device   {} ({})",
        volume.device,
        output::bytes(volume.size_bytes)
    )?;
    writeln!(out, "  store    {}", volume.store)?;
    let cause = volume
        .state_cause
        .as_deref()
        .map(|cause| format!(": {cause}"));
    writeln!(
        out,
        "  state    {}{}",
        volume.state.as_str(),
        cause.unwrap_or_default()
    )?;
    let cause = volume
        .mode_cause
        .as_deref()
        .map(|cause| format!(": {cause}"));
    writeln!(
        out,
        "  capture  {}, {} mode{}",
        volume.capture,
        volume.mode,
        cause.unwrap_or_default()
    )?;
    if let Some(trouble) = &volume.capture_trouble {
        writeln!(out, "  trouble  {trouble}")?;
    }
    if volume.buffered_bytes + volume.spooled_bytes > 0 {
        let (memory, spool) = (
            output::bytes(volume.buffered_bytes),
            output::bytes(volume.spooled_bytes),
        );
        writeln!(out, "  waiting  {memory} in memory, {spool} in the spool")?;
    }
    if let Some(resync) = &volume.resync {
        let share = resync.bytes_done * 100 / resync.bytes_total.max(1);
        let (done, total) = (
            output::bytes(resync.bytes_done),
            output::bytes(resync.bytes_total),
        );
        writeln!(
            out,
            "  reading  {share}%, {done} of {total} ({})",
            resync.cause
        )?;
    }
    if let Some(space) = &volume.space {
        writeln!(out, "  space    {}", output::space(space))?;
    }
    if !volume.retain.is_empty() {
        writeln!(out, "  keeps    {}", volume.retain)?;
    }
    let dirty = output::bytes(volume.dirty_bytes);
    writeln!(
        out,
        "  behind   {dirty}, {:.1} s, epoch {}",
        volume.lag_seconds, volume.epoch
    )?;
    match &volume.last_point {
        Some(point) => writeln!(
            out,
            "  point    {} at {}, {}{}",
            point.id,
            point.time,
            point.consistency,
            if point.label.is_empty() {
                String::new()
            } else {
                format!(", {}", point.label)
            },
        )?,
        None => writeln!(out, "  point    none yet")?,
    }
    if let Some(error) = &volume.last_error {
        writeln!(out, "  error    {}: {}", error.time, error.message)?;
    }
    Ok(())
}

fn print_adopted(adopted: &AdoptedStatus) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let volume = &adopted.volume;
    writeln!(out, "replica {}  {}", volume.name, volume.volume)?;
    writeln!(out, "  store    {}", volume.store.display())?;
    if let Some(error) = &adopted.error {
        return writeln!(out, "  error    {error}");
    }
    let host = adopted.host.as_deref();
    let host = host.map_or_else(String::new, |host| format!(", in use on `{host}`"));
    let (state, generation) = (&adopted.state, adopted.generation);
    writeln!(out, "  state    {state}, generation {generation}{host}")?;
    if let Some(branch) = &adopted.branch {
        writeln!(out, "  branch   {branch}")?;
    }
    match adopted.newest.as_str() {
        "" => writeln!(out, "  points   none yet"),
        newest => writeln!(out, "  points   {}, the newest of {newest}", adopted.points),
    }
}

fn print_open(export: &ExportStatus) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "open {}  {}", export.name, export.id)?;
    let how = if export.writable {
        "with writes of its own"
    } else {
        "read-only"
    };
    let at = match export.time.as_str() {
        "" => String::new(),
        time => format!(" of {time}"),
    };
    writeln!(out, "  point    {}{at}, {how}", export.point)?;
    match &export.error {
        None => writeln!(out, "  served   {}, {} clients", export.uri, export.clients),
        Some(error) => writeln!(out, "  error    {error}"),
    }
}
