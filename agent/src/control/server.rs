//! The daemon's side of the control socket: a thread a connection, a bounded number of
//! connections, a bounded line, a time-out for whoever connects and says nothing.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use libreplica::primary::Primary;
use libreplica::{Error, ErrorKind, IoContext, Result};
use nix::sys::socket::{getsockopt, sockopt};

use super::protocol::{Answer, MESSAGE_MAX, Request};
use crate::requests;

/// Connections served at a time; one more is told to come back.
const CONNECTIONS_MAX: usize = 64;
/// How long a client may take to send its request.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// A control socket that is listened on.
pub struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
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
        })
    }

    /// Takes the socket's file away, so that no new client comes.
    pub fn remove_socket(&self) {
        let _ = fs::remove_file(&self.path);
    }

    /// Serves `primary` until the process ends.
    pub fn serve(&self, primary: &Arc<Primary>) {
        let active = Arc::new(AtomicUsize::new(0));
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
            let slot = Slot::take(&active);
            let primary = Arc::clone(primary);
            let spawned = std::thread::Builder::new()
                .name("control".into())
                .spawn(move || {
                    if let Err(error) = serve_one(&stream, &primary, slot.as_ref()) {
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

/// One of the connections that may be served at a time.
struct Slot(Arc<AtomicUsize>);

impl Slot {
    fn take(active: &Arc<AtomicUsize>) -> Option<Self> {
        let before = active.fetch_add(1, Ordering::AcqRel);
        let slot = Self(Arc::clone(active));
        (before < CONNECTIONS_MAX).then_some(slot)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve_one(stream: &UnixStream, primary: &Arc<Primary>, slot: Option<&Slot>) -> io::Result<()> {
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    stream.set_write_timeout(Some(REQUEST_LIMIT))?;
    let answer = if slot.is_none() {
        Answer::failed(
            &Error::new(ErrorKind::Busy, "serve a request")
                .detail(format!("{CONNECTIONS_MAX} requests are being served"))
                .advice("try again"),
        )
    } else {
        read_request(stream)?.map_or_else(
            |error| Answer::failed(&error),
            |request| {
                requests::answer(primary, request).unwrap_or_else(|error| Answer::failed(&error))
            },
        )
    };
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    (&*stream).write_all(&line)
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
