//! Programs that are run to their end, or to their limit: in a process group of their own, with the end
//! of what they say kept. Whatever such a program starts in the background may live on; only one that
//! is out of time is killed, with its group.

use std::fmt;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Bytes of its output that are kept: the last ones.
const OUTPUT: usize = 4096;
/// How long it may take to end once told to.
const TERM: Duration = Duration::from_secs(1);
/// How often the end of a program is looked for while it says nothing.
const TICK: Duration = Duration::from_millis(10);

/// What came of a program.
#[derive(Debug)]
pub struct Ran {
    /// How it ended; none if it was killed for its limit.
    pub status: Option<ExitStatus>,
    /// The end of what it said, on either channel.
    pub said: Said,
}

/// The end of what a program said; shown behind a reason, nothing if it said nothing.
#[derive(Debug)]
pub struct Said(Vec<u8>);

impl Said {
    /// Without blanks around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim().to_owned()
    }
}

impl fmt::Display for Said {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text().as_str() {
            "" => Ok(()),
            text => write!(f, "; it said: {text}"),
        }
    }
}

/// Runs `command` to its end, or kills it after `limit`.
///
/// # Errors
/// The system's: it could not be started, or waited for.
pub fn run(command: &mut Command, limit: Duration) -> io::Result<Ran> {
    let (reader, writer) = io::pipe()?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer)
        .process_group(0)
        .spawn()?;
    // The ends for writing are the child's alone from here on.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut output = Output::new(reader)?;
    let status = wait(&mut child, Instant::now() + limit, &mut output)?;
    if status.is_none() {
        end(&mut child, &mut output);
    }
    let said = Said(output.last);
    Ok(Ran { status, said })
}

/// Waits for the end, reading what it says meanwhile; `None` if it is still running at
/// `until`.
fn wait(child: &mut Child, until: Instant, output: &mut Output) -> io::Result<Option<ExitStatus>> {
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
    pipe: io::PipeReader,
    last: Vec<u8>,
    is_open: bool,
}

impl Output {
    fn new(pipe: io::PipeReader) -> io::Result<Self> {
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
}
