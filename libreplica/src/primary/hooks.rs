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
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, geteuid};

use crate::error::{Error, ErrorKind, IoContext, Result};
use mark::Mark;
pub use mark::{Released, recover};

const OPERATION: &str = "run a hook";
/// Bytes of its output that are kept: the last ones.
const OUTPUT: usize = 4096;
/// How long it may take to end once told to.
const TERM: Duration = Duration::from_secs(1);
/// How often the end of a program is looked for while it says nothing.
const TICK: Duration = Duration::from_millis(10);

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
    let (reader, writer) = std::io::pipe().at(OPERATION, program)?;
    let mut child = Command::new(program)
        .arg(phase)
        .env("REPLICA_PHASE", phase)
        .env("REPLICA_VOLUME", volumes)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(writer.try_clone().at(OPERATION, program)?)
        .stderr(writer)
        .process_group(0)
        .spawn()
        .at(OPERATION, program)?;
    let mut output = Output::new(reader).at(OPERATION, program)?;
    let status = wait(&mut child, Instant::now() + limit, &mut output);
    let error = match status {
        Ok(Some(status)) if status.success() => return Ok(()),
        Ok(Some(status)) => Error::new(ErrorKind::State, OPERATION)
            .detail(format!("{phase}: {status}{}", output.said()))
            .advice("make it succeed, or ask for --consistency filesystem"),
        Ok(None) => {
            end(&mut child, &mut output);
            let limit = limit.as_millis();
            Error::new(ErrorKind::TimedOut, OPERATION)
                .detail(format!(
                    "{phase}: not done within {limit} ms{}",
                    output.said()
                ))
                .advice("make it faster, or allow it more time")
        }
        Err(source) => Error::io(OPERATION, source),
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

/// Waits for the end, reading what it says meanwhile; `None` if it is still running at
/// `until`.
fn wait(
    child: &mut Child,
    until: Instant,
    output: &mut Output,
) -> std::io::Result<Option<ExitStatus>> {
    loop {
        output.read_for(TICK);
        if let Some(status) = child.try_wait()? {
            output.read_for(Duration::ZERO);
            return Ok(Some(status));
        }
        if Instant::now() >= until {
            return Ok(None);
        }
    }
}

/// Ends a program that is out of time, and all of its process group.
fn end(child: &mut Child, output: &mut Output) {
    let Ok(group) = i32::try_from(child.id()).map(Pid::from_raw) else {
        return;
    };
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        // Not yet reaped, so the number is still its own.
        let _ = killpg(group, signal);
        if let Ok(Some(_)) = wait(child, Instant::now() + TERM, output) {
            break;
        }
    }
    // What it left behind in the group dies too; gone already is fine.
    let _ = killpg(group, Signal::SIGKILL);
}

/// The end of what a program says. The pipe may stay open for ever, held by what it
/// started, so it is never read to its end.
struct Output {
    pipe: std::io::PipeReader,
    last: Vec<u8>,
    is_open: bool,
}

impl Output {
    fn new(pipe: std::io::PipeReader) -> std::io::Result<Self> {
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self {
            pipe,
            last: Vec::new(),
            is_open: true,
        })
    }

    /// Reads what comes, until nothing came for `quiet`.
    fn read_for(&mut self, quiet: Duration) {
        if !self.is_open {
            std::thread::sleep(quiet);
            return;
        }
        let timeout = PollTimeout::try_from(quiet).unwrap_or(PollTimeout::ZERO);
        let mut polled = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
        if !matches!(poll(&mut polled, timeout), Ok(1..)) {
            return;
        }
        // One buffer only: a program that never stops talking must still meet its limit.
        let mut buffer = [0; OUTPUT];
        match self.pipe.read(&mut buffer) {
            Ok(0) => self.is_open = false,
            Ok(len) => {
                self.last.extend_from_slice(&buffer[..len]);
                let surplus = self.last.len().saturating_sub(OUTPUT);
                self.last.drain(..surplus);
            }
            Err(_) => {}
        }
    }

    fn said(&self) -> String {
        let text = String::from_utf8_lossy(&self.last);
        match text.trim() {
            "" => String::new(),
            text => format!("; it said: {text}"),
        }
    }
}
