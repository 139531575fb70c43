//! The daemon's side of the control socket: a thread a connection, a bounded number of
//! connections, a bounded line, a time-out for whoever connects and says nothing.
//!
//! Who waits for a volume may wait for days, and many may: they do not count against the
//! requests that are worked on, and are forgotten when they hang up.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use libreplica::primary::Settled;
use libreplica::{Error, ErrorKind, IoContext, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

use super::protocol::{Answer, MESSAGE_MAX, Request};
use crate::requests::{self, Served};

/// Connections served at a time; one more is told to come back.
const CONNECTIONS_MAX: usize = 64;
/// Clients that wait for a volume at a time, beside those.
const WAITERS_MAX: usize = 1024;
/// How often it is looked whether what a client waits for has come.
const WAIT_SLICE: Duration = Duration::from_millis(50);
/// How long a client may take to send its request.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// A control socket that is listened on.
pub struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    slots: Arc<Slots>,
}

impl ControlServer {
    /// Makes the socket at `path`; the file of a dead daemon's socket is replaced.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when a live daemon answers there; [`ErrorKind::Exists`] when
    /// something else than a socket is there; else what the system said.
    pub fn bind(path: &Path) -> Result<Self> {
        if let Some(folder) = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)
                .at("make the control socket's folder", folder)?;
        }
        clear_stale(path)?;
        // The umask closes the socket to others from its first moment.
        let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        nix::sys::stat::umask(old);
        let listener = bound.at("listen on the control socket", path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
            .at("close the control socket to others", path)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            slots: Arc::default(),
        })
    }

    /// Takes the socket's file away, so that no new client comes.
    pub fn remove_socket(&self) {
        let _ = fs::remove_file(&self.path);
    }

    /// Refuses new requests, and waits for those that must not be cut short, at most for
    /// `limit`: a point may hold applications at rest.
    pub fn finish(&self, limit: Duration) {
        self.slots.ending.store(true, Ordering::SeqCst);
        let until = Instant::now() + limit;
        while self.slots.making.load(Ordering::SeqCst) > 0 {
            if Instant::now() >= until {
                tracing::warn!("a request has not ended within {} s", limit.as_secs());
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Serves what the daemon has until the process ends.
    pub fn serve(&self, served: &Arc<Served>) {
        for stream in self.listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    // Out of descriptors, mostly: others will close theirs.
                    tracing::warn!(%error, "a connection to the control socket failed");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let slot = Slots::take(&self.slots, Of::Requests);
            let (served, slots) = (Arc::clone(served), Arc::clone(&self.slots));
            let spawned = std::thread::Builder::new()
                .name("control".into())
                .spawn(move || {
                    if let Err(error) = serve_one(&stream, &served, slot, &slots) {
                        tracing::debug!(%error, "a client of the control socket went away");
                    }
                });
            if let Err(error) = spawned {
                tracing::warn!(%error, "no thread for a control connection");
            }
        }
    }
}

fn clear_stale(path: &Path) -> Result<()> {
    let there = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("look for a control socket", error).path(path)),
    };
    if !there.file_type().is_socket() {
        return Err(
            Error::new(ErrorKind::Exists, "listen on the control socket")
                .path(path)
                .detail("something that is not a socket is there")
                .advice("remove it, or give another --socket"),
        );
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::new(ErrorKind::Busy, "listen on the control socket")
            .path(path)
            .detail("another daemon answers there")
            .advice("stop it, or give this one its own --socket and --state-dir")),
        Err(_) => fs::remove_file(path).at("remove a dead daemon's control socket", path),
    }
}

/// How many clients are being served.
#[derive(Default)]
struct Slots {
    requests: AtomicUsize,
    waiters: AtomicUsize,
    /// Those of the requests that must not be cut short.
    making: AtomicUsize,
    /// The daemon ends: no more requests.
    ending: AtomicBool,
}

/// What a client is counted among.
#[derive(Clone, Copy)]
enum Of {
    Requests,
    Waiters,
    Making,
}

impl Slots {
    fn count(&self, of: Of) -> (&AtomicUsize, usize) {
        match of {
            Of::Requests => (&self.requests, CONNECTIONS_MAX),
            Of::Waiters => (&self.waiters, WAITERS_MAX),
            Of::Making => (&self.making, CONNECTIONS_MAX),
        }
    }

    fn take(slots: &Arc<Self>, of: Of) -> Option<Slot> {
        let (count, max) = slots.count(of);
        let before = count.fetch_add(1, Ordering::SeqCst);
        let slot = Slot {
            slots: Arc::clone(slots),
            of,
        };
        (before < max).then_some(slot)
    }
}

/// One of the clients that may be served at a time.
struct Slot {
    slots: Arc<Slots>,
    of: Of,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.count(self.of).0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn serve_one(
    stream: &UnixStream,
    served: &Served,
    slot: Option<Slot>,
    slots: &Arc<Slots>,
) -> io::Result<()> {
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    stream.set_write_timeout(Some(REQUEST_LIMIT))?;
    let Some(slot) = slot else {
        return send(stream, &too_many(Of::Requests));
    };
    let answer = match read_request(stream)? {
        Ok(Request::Wait { volume }) => {
            drop(slot);
            let Some(_slot) = Slots::take(slots, Of::Waiters) else {
                return send(stream, &too_many(Of::Waiters));
            };
            match wait(stream, served, &volume)? {
                Some(outcome) => outcome.map(Answer::settled),
                None => return Ok(()),
            }
        }
        Ok(request) => {
            let making = may_not_be_cut(&request).then(|| Slots::take(slots, Of::Making));
            // Looked at behind the count: either this sees the end, or the end sees this.
            if slots.ending.load(Ordering::SeqCst) {
                return send(stream, &ending());
            }
            let answer = requests::answer(served, request);
            let sent = send(
                stream,
                &answer.unwrap_or_else(|error| Answer::failed(&error)),
            );
            drop(making);
            return sent;
        }
        Err(error) => Err(error),
    };
    send(
        stream,
        &answer.unwrap_or_else(|error| Answer::failed(&error)),
    )
}

/// Waits until `volume` is replicating; `None` if the client hung up before.
fn wait(stream: &UnixStream, served: &Served, volume: &str) -> io::Result<Option<Result<Settled>>> {
    let slice = PollTimeout::try_from(WAIT_SLICE).unwrap_or(PollTimeout::ZERO);
    loop {
        if let Some(outcome) = served.primary.settled(volume).transpose() {
            return Ok(Some(outcome));
        }
        // A hang-up is told whatever is asked for. One who has only closed its sending side
        // still waits.
        let mut peer = [PollFd::new(stream.as_fd(), PollFlags::empty())];
        match poll(&mut peer, slice) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether the daemon must not end in the middle of it.
fn may_not_be_cut(request: &Request) -> bool {
    matches!(
        request,
        Request::Point(_)
            | Request::Protect(_)
            | Request::Unprotect { .. }
            | Request::Open(_)
            | Request::Close { .. }
    )
}

fn ending() -> Answer {
    let error = Error::new(ErrorKind::State, "serve a request").detail("the daemon is ending");
    Answer::failed(&error.advice("ask again when it has been started"))
}

fn too_many(of: Of) -> Answer {
    let detail = match of {
        Of::Requests | Of::Making => format!("{CONNECTIONS_MAX} requests are being served"),
        Of::Waiters => format!("{WAITERS_MAX} clients are waiting"),
    };
    let error = Error::new(ErrorKind::Busy, "serve a request").detail(detail);
    Answer::failed(&error.advice("try again"))
}

fn send(stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut stream = stream;
    stream.write_all(&line)
}

fn read_request(stream: &UnixStream) -> io::Result<Result<Request>> {
    let peer = getsockopt(stream, sockopt::PeerCredentials)?;
    if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
        return Ok(Err(Error::new(ErrorKind::Invalid, "serve a request")
            .detail(format!("user {} is not root", peer.uid()))));
    }
    let mut line = String::new();
    BufReader::new(stream.take(MESSAGE_MAX)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)
        .map_err(|source| Error::new(ErrorKind::Invalid, "read a request").source(source)))
}
