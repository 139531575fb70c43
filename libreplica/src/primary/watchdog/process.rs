//! The watchdog's own side: prepare, then do what the agent asks, until it is gone.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::SigSet;
use nix::sys::socket::{MsgFlags, SockType, getsockopt, recv, send, sockopt};
use nix::unistd::setsid;

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::primary::quiesce::{Cause, Failure, FreezeSet};
use crate::primary::watchdog::wire::{PACKET, Reply, Request, encode_reply};
use crate::primary::watchdog::{HELLO, cgroup};
use crate::sys::fds;

const OPERATION: &str = "guard the freezes";

/// Serves the agent at the other end of standard input, until that end is closed. What is
/// frozen then is thawed.
///
/// # Errors
/// [`ErrorKind::Invalid`] if standard input is no packet socket: this command is not for
/// people. [`ErrorKind::Io`] if the agent cannot be greeted.
pub fn run() -> Result<()> {
    let socket = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .at(OPERATION, "/dev/stdin")?;
    if getsockopt(&socket, sockopt::SockType) != Ok(SockType::SeqPacket) {
        return Err(Error::new(ErrorKind::Invalid, OPERATION)
            .detail("standard input is not a socket of the agent's")
            .advice("`replica run` starts it by itself"));
    }
    let shortcomings = prepare();
    let mut hello = shortcomings.join("\n").into_bytes();
    hello.truncate(HELLO - 1);
    hello.insert(0, b'!');
    fds::send(&socket, &hello, &[]).at(OPERATION, "/dev/stdin")?;
    let left_frozen = serve(&socket);
    if left_frozen {
        let _ = writeln!(
            std::io::stderr(),
            "the agent died during a freeze: the filesystems are thawed"
        );
    }
    cgroup::clean_up();
    Ok(())
}

/// Makes this process outlive what kills or stops the agent; what of it failed.
fn prepare() -> Vec<String> {
    let mut shortcomings = cgroup::leave();
    let mut note = |what: &str, error: String| shortcomings.push(format!("{what}: {error}"));
    // Fails only if it leads a session already.
    let _ = setsid();
    if let Err(errno) = SigSet::all().thread_block() {
        note("cannot block signals", errno.to_string());
    }
    if let Err(error) = std::env::set_current_dir("/") {
        note("cannot leave the agent's folder", error.to_string());
    }
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        note("may be chosen when memory runs out", error.to_string());
    }
    if let Err(errno) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        note("cannot lock its memory", errno.to_string());
    }
    shortcomings
}

/// What the agent has loaded, and until when it may be frozen.
#[derive(Default)]
struct Guarded {
    set: Option<FreezeSet>,
    thaw_at: Option<Instant>,
    expired: bool,
}

/// Whether something was still frozen when the agent went.
fn serve(socket: &OwnedFd) -> bool {
    let mut guarded = Guarded::default();
    loop {
        match guarded.wait(socket) {
            Ok(Waited::Expired) => guarded.expire(),
            Ok(Waited::Readable) => match guarded.answer(socket) {
                Ok(()) => {}
                Err(_gone) => break,
            },
            Err(_) => break,
        }
    }
    let left_frozen = guarded.set.as_ref().is_some_and(FreezeSet::is_frozen);
    drop(guarded);
    left_frozen
}

enum Waited {
    Readable,
    Expired,
}

impl Guarded {
    fn wait(&self, socket: &OwnedFd) -> nix::Result<Waited> {
        let timeout = match self.thaw_at {
            None => PollTimeout::NONE,
            Some(at) => {
                // Rounded up, so that it does not spin through the last millisecond.
                let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut polled, timeout) {
                Ok(0) => return Ok(Waited::Expired),
                Ok(_) => return Ok(Waited::Readable),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    fn expire(&mut self) {
        if self.thaw_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        self.thaw_at = None;
        self.expired = true;
        if let Some(set) = &mut self.set {
            let _ = set.thaw();
        }
    }

    /// Takes one request and answers it; an error if the agent is gone.
    fn answer(&mut self, socket: &OwnedFd) -> nix::Result<()> {
        let mut packet = [0; PACKET];
        let reply = if self.thaw_at.is_some() {
            // Something is frozen: nothing may be allocated, and only a thaw can come.
            let len = recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty())?;
            self.take(&packet[..len], Vec::new())?
        } else {
            let (len, descriptors) = fds::receive(socket, &mut packet)?;
            self.take(&packet[..len], descriptors)?
        };
        send(
            socket.as_raw_fd(),
            &encode_reply(reply),
            MsgFlags::MSG_NOSIGNAL,
        )
        .map(drop)
    }

    fn take(&mut self, packet: &[u8], descriptors: Vec<OwnedFd>) -> nix::Result<Reply> {
        // An empty packet is the end; one that makes no sense can only be an error of ours.
        let request = Request::decode(packet).ok_or(Errno::EPROTO)?;
        match request {
            Request::Sync => Ok(sync(&descriptors)),
            Request::Begin => {
                let status = descriptors.into_iter().next().ok_or(Errno::EPROTO)?;
                *self = Self::default();
                self.set = Some(FreezeSet::new(File::from(status)));
                Ok(Ok(()))
            }
            Request::Mounts => {
                let set = self.set.as_mut().ok_or(Errno::EPROTO)?;
                descriptors.into_iter().for_each(|mount| set.push(mount));
                Ok(Ok(()))
            }
            Request::Freeze { limit, grace } => {
                let set = self.set.as_mut().ok_or(Errno::EPROTO)?;
                let start = Instant::now();
                let reply = set.freeze(start, limit);
                if reply.is_ok() {
                    self.thaw_at = Some(start + limit + grace);
                } else {
                    self.set = None;
                }
                Ok(reply)
            }
            Request::Thaw => {
                let mut set = self.set.take().ok_or(Errno::EPROTO)?;
                let expired = self.expired;
                *self = Self::default();
                let thawed = set.thaw();
                Ok(match thawed {
                    Ok(()) if expired => Err(Failure {
                        member: 0,
                        cause: Cause::Expired,
                    }),
                    other => other,
                })
            }
        }
    }
}

/// Writes out what is dirty; the first that failed.
fn sync(mounts: &[OwnedFd]) -> Reply {
    (0..).zip(mounts).try_for_each(|(member, mount)| {
        nix::unistd::syncfs(mount).map_err(|errno| Failure {
            member,
            cause: Cause::System(errno),
        })
    })
}
