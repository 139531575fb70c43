//! The process that makes the freeze calls, and thaws if the agent cannot.
//!
//! An agent that is killed while a filesystem is frozen would leave the machine hanging,
//! perhaps so that nobody can log in to thaw it. So a second process, the same binary
//! started again, holds the mounts' descriptors and calls FIFREEZE and FITHAW on the
//! agent's behalf. It has memory that is locked, a session and a control group of its own;
//! it thaws when its socket to the agent closes, or when limit and grace have passed; and
//! as it made the calls, it knows which filesystems are ours: what others froze it never
//! thaws. It ends with the agent.
//!
//! It also writes out what is dirty before a freeze. The agent may itself be what serves the
//! device below: a thread of its own that waits for that device cannot be killed, and an agent
//! with such a thread keeps what its successor needs, while the thread waits for the successor.

mod cgroup;
mod process;
mod wire;

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::primary::quiesce::{Failure, FreezeSet};
use crate::sys::fds;

pub use process::run;
use wire::{PACKET, Request, decode_reply};

const OPERATION: &str = "start the watchdog";

/// How much longer than the limit filesystems may stay frozen before the watchdog acts.
pub const GRACE: Duration = Duration::from_millis(250);
/// How long a call may hang in the kernel, beyond its limit, before the agent goes on
/// without waiting.
const STUCK: Duration = Duration::from_secs(30);
/// How long it may take to write out what is dirty.
const SYNC: Duration = Duration::from_secs(600);
/// How long the watchdog may take to start.
const START: Duration = Duration::from_secs(10);
/// How long it may take to end once its socket is closed.
const END: Duration = Duration::from_secs(2);
/// Bytes of its greeting, at most.
const HELLO: usize = 4096;

/// How to start a watchdog.
#[derive(Clone, Debug)]
pub struct Command {
    program: OsString,
    arguments: Vec<OsString>,
}

impl Command {
    /// The running binary with the hidden subcommand `watchdog`, also if the file was
    /// replaced since.
    pub fn of_this_binary() -> Self {
        Self::new("/proc/self/exe", ["watchdog"])
    }

    /// Another program. Its standard input is the socket; it must call [`run`].
    pub fn new<S: Into<OsString>>(
        program: impl Into<OsString>,
        arguments: impl IntoIterator<Item = S>,
    ) -> Self {
        Self {
            program: program.into(),
            arguments: arguments.into_iter().map(Into::into).collect(),
        }
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The calls failed; the watchdog goes on.
    Failed(Failure),
    /// The watchdog is gone.
    Lost(Errno),
    /// No answer in time: a call hangs in the kernel.
    Stuck,
}

/// The agent's side.
#[derive(Debug)]
pub(super) struct Watchdog {
    child: Child,
    socket: Option<OwnedFd>,
    shortcomings: Vec<String>,
}

impl Watchdog {
    /// Starts it, and waits until it is ready.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if it does not start, or does not answer.
    pub(super) fn start(command: &Command) -> Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .at(OPERATION, &command.program)?;
        let failed = |source: std::io::Error| {
            Error::new(ErrorKind::State, OPERATION)
                .path(&command.program)
                .source(source)
                .advice("no filesystem is frozen without it")
        };
        let child = std::process::Command::new(&command.program)
            .arg0("replica")
            .args(&command.arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .current_dir("/")
            .spawn()
            .map_err(failed)?;
        let mut watchdog = Self {
            child,
            socket: Some(ours),
            shortcomings: Vec::new(),
        };
        let mut hello = vec![0; HELLO];
        let greeting = watchdog.receive(&mut hello, Instant::now() + START);
        match greeting {
            Ok(len) if hello[..len].starts_with(b"!") => {
                let text = String::from_utf8_lossy(&hello[1..len]).into_owned();
                watchdog.shortcomings = text.lines().map(str::to_owned).collect();
                Ok(watchdog)
            }
            Ok(_) => Err(failed(Errno::EPROTO.into())),
            Err(Broken::Lost(errno)) => Err(failed(errno.into())),
            Err(_) => Err(failed(Errno::ETIMEDOUT.into())),
        }
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it could not do to stay safe, a line each.
    pub(super) fn shortcomings(&self) -> &[String] {
        &self.shortcomings
    }

    /// Whether it can still be asked.
    pub(super) fn is_alive(&mut self) -> bool {
        self.socket.is_some() && matches!(self.child.try_wait(), Ok(None))
    }

    /// Has it write out what is dirty on these mounts.
    pub(super) fn sync(&mut self, mounts: &[OwnedFd]) -> Result<(), Broken> {
        let mut first = 0;
        let mounts: Vec<RawFd> = mounts.iter().map(AsRawFd::as_raw_fd).collect();
        for some in mounts.chunks(fds::MAX_FDS) {
            let synced = self.hand_over(Request::Sync, some, SYNC);
            synced.map_err(|broken| match broken {
                Broken::Failed(Failure { member, cause }) => Broken::Failed(Failure {
                    member: first + member,
                    cause,
                }),
                other => other,
            })?;
            first += some.len() as u32;
        }
        Ok(())
    }

    /// Hands it the status file and the mounts of `set`.
    pub(super) fn load(&mut self, status: &File, set: &FreezeSet) -> Result<()> {
        let broken = |_: Broken| {
            Error::new(ErrorKind::State, "hand the mounts to the watchdog")
                .detail("it is gone")
                .advice("it is started again with the next point")
        };
        self.hand_over(Request::Begin, &[status.as_raw_fd()], START)
            .map_err(broken)?;
        let mounts: Vec<RawFd> = set.mounts().map(AsRawFd::as_raw_fd).collect();
        for some in mounts.chunks(fds::MAX_FDS) {
            self.hand_over(Request::Mounts, some, START)
                .map_err(broken)?;
        }
        Ok(())
    }

    fn hand_over(
        &mut self,
        request: Request,
        descriptors: &[RawFd],
        limit: Duration,
    ) -> Result<(), Broken> {
        let socket = self.socket.as_ref().ok_or(Broken::Lost(Errno::EPIPE))?;
        fds::send(socket, &request.encode(), descriptors).map_err(Broken::Lost)?;
        self.reply(Instant::now() + limit)
    }

    /// Has it freeze all that was loaded. Allocates nothing.
    pub(super) fn freeze(&mut self, limit: Duration) -> Result<(), Broken> {
        let request = Request::Freeze {
            limit,
            grace: GRACE,
        };
        self.ask(request, Instant::now() + limit + STUCK)
    }

    /// Has it thaw and close all that was loaded. Allocates nothing.
    pub(super) fn thaw(&mut self) -> Result<(), Broken> {
        self.ask(Request::Thaw, Instant::now() + STUCK)
    }

    fn ask(&mut self, request: Request, until: Instant) -> Result<(), Broken> {
        let socket = self.socket.as_ref().ok_or(Broken::Lost(Errno::EPIPE))?;
        let packet = request.encode();
        send(socket.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL).map_err(Broken::Lost)?;
        self.reply(until)
    }

    fn reply(&mut self, until: Instant) -> Result<(), Broken> {
        let mut packet = [0; PACKET];
        let len = self.receive(&mut packet, until)?;
        match decode_reply(&packet[..len]) {
            Some(reply) => reply.map_err(Broken::Failed),
            None => Err(Broken::Lost(Errno::EPROTO)),
        }
    }

    /// One packet; its length, never 0.
    fn receive(&self, packet: &mut [u8], until: Instant) -> Result<usize, Broken> {
        let socket = self.socket.as_ref().ok_or(Broken::Lost(Errno::EPIPE))?;
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut polled, timeout) {
                Ok(0) => return Err(Broken::Stuck),
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Broken::Lost(errno)),
            }
        }
        match recv(socket.as_raw_fd(), packet, MsgFlags::empty()) {
            Ok(0) => Err(Broken::Lost(Errno::EPIPE)),
            Ok(len) => Ok(len),
            Err(errno) => Err(Broken::Lost(errno)),
        }
    }
}

impl Drop for Watchdog {
    /// Closes the socket: it thaws what is frozen, and ends. One that hangs in the kernel is
    /// not waited for; it ends later, by itself.
    fn drop(&mut self) {
        self.socket = None;
        let start = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && start.elapsed() < END {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
