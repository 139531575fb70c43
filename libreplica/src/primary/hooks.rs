//! Programs that bring applications to rest around a point: every program in the hooks
//! folder is run with `pre` before the filesystems are frozen, in the order of the names,
//! and with `post` after they are thawed, in reverse. A database that flushes and holds its
//! writes in between makes the point application-consistent.
//!
//! One that fails or takes too long means that there is no such point; those that ran, the
//! failed one included, are still run with `post`, so that nothing stays at rest. Whatever
//! a program starts in the background may live on: only one that is out of time is killed,
//! with its process group.
//!
//! While applications are at rest a mark in the run folder says so: if this process is killed, the
//! next start runs the `post` that is owed. `post` may so run twice, and without a `pre` that
//! has ended.

mod mark;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::program;
use mark::Mark;
pub use mark::{Released, recover};

const OPERATION: &str = "run a hook";

/// What a program is run for.
#[derive(Clone, Copy)]
enum Phase {
    Pre,
    Post,
}

impl Phase {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Pre => "pre",
            Self::Post => "post",
        }
    }
}

/// Where hooks are, and how long they may take.
#[derive(Clone, Copy, Debug)]
pub struct HookSetup<'a> {
    /// The folder of the programs.
    pub folder: &'a Path,
    /// Where the mark is kept while applications are at rest: on a filesystem in memory.
    pub run_dir: &'a Path,
    /// How long one program may take.
    pub limit: Duration,
    /// When the last `pre` must have ended.
    pub deadline: Instant,
}

/// Hooks whose `pre` has run. Run `post` whatever became of the point; dropped without, it
/// is run then.
#[derive(Debug)]
pub struct Hooks {
    ran: Vec<PathBuf>,
    volumes: String,
    limit: Duration,
    mark: Mark,
}

impl Hooks {
    /// Runs every program of `setup` with `pre`. It finds the names of the volumes in
    /// `REPLICA_VOLUME`, blanks between them, and the phase in `REPLICA_PHASE`, too.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no program; [`ErrorKind::Invalid`] if one is not
    /// executable, or others than root could change it; [`ErrorKind::TimedOut`] or
    /// [`ErrorKind::State`] if one is too slow or fails, with the end of what it said. Those
    /// that ran have then been run with `post`.
    pub fn pre(setup: &HookSetup<'_>, volumes: &[impl AsRef<str>]) -> Result<Self> {
        let programs = programs(setup.folder)?;
        let names: Vec<&str> = volumes.iter().map(AsRef::as_ref).collect();
        let volumes = names.join(" ");
        let mut hooks = Self {
            ran: Vec::with_capacity(programs.len()),
            mark: Mark::create(setup.run_dir, &volumes)?,
            volumes,
            limit: setup.limit,
        };
        for program in programs {
            let left = setup.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::TimedOut, OPERATION)
                    .path(program)
                    .detail("pre: the time for the point is over")
                    .advice("allow it more with --timeout"));
            }
            hooks.mark.add(&program)?;
            hooks.ran.push(program);
            let newest = hooks.ran.len() - 1;
            // On failure `hooks` is dropped, which runs `post`.
            run(
                &hooks.ran[newest],
                Phase::Pre,
                &hooks.volumes,
                setup.limit.min(left),
            )?;
        }
        Ok(hooks)
    }

    /// Runs those programs with `post`, in reverse; all of them, whatever fails.
    ///
    /// # Errors
    /// The first failure, as for [`Hooks::pre`].
    pub fn post(mut self) -> Result<()> {
        self.run_post()
    }

    fn run_post(&mut self) -> Result<()> {
        let mut outcome = Ok(());
        while let Some(program) = self.ran.pop() {
            outcome = outcome.and(run(&program, Phase::Post, &self.volumes, self.limit));
        }
        self.mark.remove();
        outcome
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        // After a failure; the first one is the one that is told.
        let _ = self.run_post();
    }
}

/// Runs `program` to its end, or kills it after `limit`.
fn run(program: &Path, phase: Phase, volumes: &str, limit: Duration) -> Result<()> {
    let phase = phase.as_str();
    let mut command = Command::new(program);
    command
        .arg(phase)
        .env("REPLICA_PHASE", phase)
        .env("REPLICA_VOLUME", volumes)
        .current_dir("/");
    let ran = program::run(&mut command, limit).at(OPERATION, program)?;
    let error = match ran.status {
        Some(status) if status.success() => return Ok(()),
        Some(status) => Error::new(ErrorKind::State, OPERATION)
            .detail(format!("{phase}: {status}{}", ran.said))
            .advice("make it succeed, or ask for --consistency filesystem"),
        None => Error::new(ErrorKind::TimedOut, OPERATION)
            .detail(format!(
                "{phase}: not done within {} ms{}",
                limit.as_millis(),
                ran.said
            ))
            .advice("make it faster, or allow it more time"),
    };
    Err(error.path(program))
}

/// The programs of the folder, by name. Hidden files, editors' and packages' copies, and
/// files called README are no programs.
fn programs(folder: &Path) -> Result<Vec<PathBuf>> {
    const OPERATION: &str = "look for hooks";
    let none = || {
        Error::new(ErrorKind::NotFound, OPERATION)
            .path(folder)
            .detail("there are none")
            .advice("put a program there that quiesces the application when run with `pre`")
    };
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(none()),
        Err(error) => return Err(Error::io(OPERATION, error).path(folder)),
    };
    let mut programs = Vec::new();
    for entry in entries {
        let entry = entry.at(OPERATION, folder)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_copy = name.ends_with('~') || name.contains(".dpkg-") || name.contains(".rpm");
        if !name.starts_with('.') && !name.starts_with("README") && !is_copy {
            programs.push(entry.path());
        }
    }
    programs.sort();
    if programs.is_empty() {
        return Err(none());
    }
    only_ours(folder)?;
    for program in &programs {
        runnable(program)?;
    }
    Ok(programs)
}

/// It will be run as root, so nobody else may have written it.
fn only_ours(path: &Path) -> Result<()> {
    let meta = fs::metadata(path).at("look at a hook", path)?;
    let owner = meta.uid();
    if (owner != 0 && owner != geteuid().as_raw()) || meta.permissions().mode() & 0o022 != 0 {
        return Err(Error::new(ErrorKind::Invalid, "look at a hook")
            .path(path)
            .detail("others than root could change it")
            .advice("chown root:root and chmod go-w"));
    }
    Ok(())
}

fn runnable(program: &Path) -> Result<()> {
    only_ours(program)?;
    let meta = fs::metadata(program).at("look at a hook", program)?;
    if !meta.is_file() || meta.permissions().mode() & 0o111 == 0 {
        return Err(Error::new(ErrorKind::Invalid, "look at a hook")
            .path(program)
            .detail("it is not executable")
            .advice("chmod +x, or move it away"));
    }
    Ok(())
}
