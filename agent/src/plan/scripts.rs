//! A script of a plan: run to its end or its limit, with what it may want to know in its environment. It
//! ends with us, so that a script of a run that was killed is not still at it when the next one begins.

use std::process::Command;
use std::time::Duration;

use libreplica::plan::{Mode, Outcome};
use libreplica::sys::child::die_with_thread;
use libreplica::sys::program;
use libreplica::{Error, ErrorKind, IoContext, Result};

const RUN: &str = "run a script of the plan";

/// What a script is told.
pub struct Around<'a> {
    /// The plan's name.
    pub plan: &'a str,
    /// What it is run for.
    pub mode: Mode,
    /// The group's name.
    pub group: &'a str,
    /// The script's.
    pub name: &'a str,
    /// The how manieth time it is run.
    pub attempt: u32,
}

/// Runs a script.
///
/// # Errors
/// [`ErrorKind::State`] or [`ErrorKind::TimedOut`] if it fails or is too slow, with the end of what it
/// said; the system's.
pub fn run(words: &[String], limit: Duration, around: &Around<'_>) -> Result<Outcome> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(Error::new(ErrorKind::Invalid, RUN).detail("it is nothing"));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("REPLICA_PLAN", around.plan)
        .env("REPLICA_MODE", around.mode.as_str())
        .env("REPLICA_GROUP", around.group)
        .env("REPLICA_STEP", around.name)
        .env("REPLICA_ATTEMPT", around.attempt.to_string())
        .current_dir("/");
    let ran = program::run(die_with_thread(&mut command), limit).at(RUN, program)?;
    let error = match ran.status {
        Some(status) if status.success() => {
            let output = ran.said.text();
            return Ok(Outcome::Ran { output });
        }
        Some(status) => Error::new(ErrorKind::State, RUN).detail(format!("{status}{}", ran.said)),
        None => {
            let seconds = limit.as_secs();
            let why = format!("not done within {seconds} s{}", ran.said);
            Error::new(ErrorKind::TimedOut, RUN).detail(why)
        }
    };
    Err(error.path(program))
}
