//! The commands that name a volume and need no more: `unprotect`, `pause`, `resume`,
//! `verify`, `resync`.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::cli::{DaemonArgs, ResyncArgs, UnprotectArgs, VerifyArgs, VolumeArg};
use crate::control::client::ask;
use crate::control::protocol::{Answer, Request};
use crate::failure::{DIFFERS, Failure};
use crate::output::{self, Progress};

const LIMIT: Option<Duration> = Some(Duration::from_secs(120));

pub fn unprotect(daemon: &DaemonArgs, args: UnprotectArgs) -> Result<ExitCode, Failure> {
    let request = match args.volume {
        Some(volume) => Request::Unprotect { volume },
        None => Request::UnprotectStale,
    };
    if let Answer::Stale { removed } = ask(&daemon.socket, &request, LIMIT)? {
        for what in &removed {
            println!("removed {what}");
        }
        if removed.is_empty() {
            eprintln!("nothing stale was found");
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn pause(daemon: &DaemonArgs, args: VolumeArg) -> Result<ExitCode, Failure> {
    ask(
        &daemon.socket,
        &Request::Pause {
            volume: args.volume,
        },
        LIMIT,
    )?;
    Ok(ExitCode::SUCCESS)
}

pub fn resume(daemon: &DaemonArgs, args: VolumeArg) -> Result<ExitCode, Failure> {
    ask(
        &daemon.socket,
        &Request::Resume {
            volume: args.volume,
        },
        LIMIT,
    )?;
    Ok(ExitCode::SUCCESS)
}

pub fn resync(daemon: &DaemonArgs, args: &ResyncArgs) -> Result<ExitCode, Failure> {
    ask(
        &daemon.socket,
        &Request::Resync {
            volume: args.volume.clone(),
        },
        LIMIT,
    )?;
    if args.wait {
        wait(daemon, &args.volume)?;
    }
    Ok(ExitCode::SUCCESS)
}

pub fn verify(daemon: &DaemonArgs, args: VerifyArgs) -> Result<ExitCode, Failure> {
    let answer = ask(
        &daemon.socket,
        &Request::Verify {
            volume: args.volume,
        },
        None,
    )?;
    let Answer::Verified { report } = answer else {
        return Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        });
    };
    if args.json {
        output::json(&report)?;
    } else {
        println!(
            "{} compared, {} changed meanwhile and left out, {} differ",
            output::bytes(report.bytes_compared),
            output::bytes(report.bytes_in_motion),
            output::bytes(report.bytes_differing),
        );
        for range in &report.differing {
            println!(
                "differs: bytes {} to {}",
                range.offset,
                range.offset + range.len
            );
        }
        if report.bytes_differing > 0 {
            eprintln!("replica: source and image differ; `replica resync` repairs the image");
        }
    }
    let differs = report.bytes_differing > 0;
    Ok(if differs {
        ExitCode::from(DIFFERS)
    } else {
        ExitCode::SUCCESS
    })
}

/// Waits until `volume` is replicating, with a progress bar on a terminal; warns if no
/// recovery point came of it.
pub fn wait(daemon: &DaemonArgs, volume: &str) -> Result<(), Failure> {
    let socket = daemon.socket.clone();
    let name = volume.to_owned();
    let waiter = std::thread::spawn(move || ask(&socket, &Request::Wait { volume: name }, None));
    let mut progress = Progress::start("copying");
    let mut asked = Instant::now();
    while !waiter.is_finished() {
        std::thread::sleep(Duration::from_millis(20));
        if asked.elapsed() < Duration::from_millis(500) || !progress.is_shown() {
            continue;
        }
        asked = Instant::now();
        let request = Request::Status {
            volume: Some(volume.to_owned()),
        };
        if let Ok(Answer::Status { volumes, .. }) = ask(&daemon.socket, &request, LIMIT)
            && let Some(resync) = volumes.first().and_then(|volume| volume.resync.as_ref())
        {
            progress.update(resync.bytes_done, resync.bytes_total);
        }
    }
    progress.finish();
    match waiter.join() {
        Ok(Ok(Answer::Settled {
            without_point: Some(why),
        })) => {
            eprintln!("replica: warning: there is no recovery point of it yet: {why}");
            Ok(())
        }
        Ok(answer) => answer.map(drop),
        Err(_) => Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        }),
    }
}
