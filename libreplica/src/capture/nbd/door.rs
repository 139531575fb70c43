//! The door: a socket, a thread that lets clients in, and one for each of them. A client that breaks
//! the protocol, or takes too long to say what it wants, loses its connection; nobody else
//! notices. What is served behind it is the [`Host`]'s.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::capture::nbd::handshake::{Export, Negotiation, OPTION_MAX, Progress, Session};
use crate::capture::nbd::server::NbdOptions;
use crate::capture::nbd::socket::Socket;
use crate::error::{IoContext, Result};

/// How long clients may take for their replies when the server stops.
const GRACE: Duration = Duration::from_secs(2);
/// How often it is looked whether they have.
const LOOK: Duration = Duration::from_millis(5);

/// What is served behind a door.
pub trait Host: Send + Sync {
    /// What clients are told of it.
    fn export(&self) -> &Export;

    /// The names that changes are known since. Whoever is to give them waits no longer than
    /// `waits` says.
    fn names(&self, waits: &dyn Fn() -> bool) -> Vec<String> {
        let _ = waits;
        Vec::new()
    }

    /// Serves a client until it ends; `first` is what it has sent behind its last option.
    /// Whoever reads from the stream finds its end when the door is closed.
    ///
    /// # Errors
    /// Why it cannot be served; it is logged.
    fn serve(&self, stream: &UnixStream, session: Session, first: &[u8]) -> Result<()>;
}

/// A socket at which clients are let in.
#[derive(Debug)]
pub struct Door {
    socket: Arc<Socket>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Client {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

struct Shared {
    host: Arc<dyn Host>,
    options: NbdOptions,
    stopping: AtomicBool,
    clients: Mutex<Vec<Client>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Door {
    /// Lets clients in to `host`. A socket that a dead process left is replaced.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] if somebody listens there; [`crate::ErrorKind::Exists`] if
    /// something else than a socket is there; what the system says.
    pub fn open(options: NbdOptions, host: Arc<dyn Host>) -> Result<Self> {
        let socket = Arc::new(Socket::bind(&options.socket)?);
        let shared = Arc::new(Shared {
            host,
            options,
            stopping: AtomicBool::new(false),
            clients: Mutex::new(Vec::new()),
        });
        let thread = std::thread::Builder::new().name("nbd-door".into());
        let (at_door, for_all) = (Arc::clone(&socket), Arc::clone(&shared));
        let thread = thread.spawn(move || let_in(&at_door, &for_all));
        let thread = thread.at("start a thread", &shared.options.socket)?;
        Ok(Self {
            socket,
            shared,
            thread: Some(thread),
        })
    }

    /// What clients are told to use: `nbd+unix:///?socket=PATH`.
    pub fn uri(&self) -> String {
        self.socket.uri()
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        let clients = self.shared.clients();
        let there = |client: &&Client| !client.thread.is_finished();
        clients.iter().filter(there).count()
    }

    /// Lets nobody in any more and ends the connections: what was received is done, and
    /// answered if the clients take their replies soon. Waits until every change has ended.
    pub fn close(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.socket.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let clients = std::mem::take(&mut *self.shared.clients());
        shut(&clients, Shutdown::Read);
        let until = Instant::now() + GRACE;
        while Instant::now() < until && !clients.iter().all(|client| client.thread.is_finished()) {
            std::thread::sleep(LOOK);
        }
        shut(&clients, Shutdown::Both);
        for client in clients {
            let _ = client.thread.join();
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.end();
    }
}

fn shut(clients: &[Client], how: Shutdown) {
    for client in clients {
        let _ = client.stream.shutdown(how);
    }
}

impl Shared {
    fn clients(&self) -> std::sync::MutexGuard<'_, Vec<Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Starts the thread of a new client.
    fn welcome(self: &Arc<Self>, stream: UnixStream) -> std::io::Result<()> {
        let mut clients = self.clients();
        clients.retain(|client| !client.thread.is_finished());
        if clients.len() >= self.options.connections {
            tracing::warn!("an NBD client is sent away: there are {}", clients.len());
            return Ok(());
        }
        let ours = stream.try_clone()?;
        let shared = Arc::clone(self);
        let builder = std::thread::Builder::new().name("nbd".into());
        let thread = builder.spawn(move || {
            if let Err(error) = shared.serve(&stream) {
                tracing::warn!("{error}");
            }
            // Others have it open still, and the client waits for its end.
            let _ = stream.shutdown(Shutdown::Both);
        })?;
        clients.push(Client {
            stream: ours,
            thread,
        });
        Ok(())
    }

    fn serve(&self, stream: &UnixStream) -> Result<()> {
        let Some((session, first)) = self.greet(stream) else {
            return Ok(());
        };
        self.host.serve(stream, session, &first)
    }

    /// Talks with a client until it is to be served: how, and what it has sent already.
    fn greet(&self, stream: &UnixStream) -> Option<(Session, Vec<u8>)> {
        let until = Instant::now() + self.options.handshake;
        let (mut input, mut output) = (Vec::new(), Vec::new());
        // Without them a client can still be served, if there is time left.
        let named = Instant::now() + self.options.handshake / 2;
        let waits = || !self.is_stopping() && Instant::now() < named;
        let names = || self.host.names(&waits);
        let mut talk = Negotiation::new(self.host.export(), &names, &mut output);
        loop {
            let step = talk.advance(&input, &mut output);
            say(stream, until, &mut output).ok()?;
            match step {
                Ok((taken, progress)) => {
                    input.drain(..taken);
                    match progress {
                        Progress::Answered => {}
                        Progress::Wants => hear(stream, until, &mut input).ok()?,
                        Progress::Settled(session) => {
                            stream.set_read_timeout(None).ok()?;
                            stream.set_write_timeout(None).ok()?;
                            return Some((session, input));
                        }
                        Progress::Over => return None,
                    }
                }
                Err(violation) => {
                    tracing::debug!(%violation, "an NBD client is sent away");
                    return None;
                }
            }
        }
    }
}

/// What is left until then; an error when nothing is.
fn left(until: Instant) -> std::io::Result<Option<Duration>> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(std::io::ErrorKind::TimedOut.into());
    }
    Ok(Some(left))
}

/// Sends what is in `output`, and empties it.
fn say(mut stream: &UnixStream, until: Instant, output: &mut Vec<u8>) -> std::io::Result<()> {
    let mut sent = 0;
    while sent < output.len() {
        stream.set_write_timeout(left(until)?)?;
        sent += stream.write(&output[sent..])?;
    }
    output.clear();
    Ok(())
}

/// Adds what comes to `input`, which never has more than an option and a little.
fn hear(mut stream: &UnixStream, until: Instant, input: &mut Vec<u8>) -> std::io::Result<()> {
    debug_assert!(
        input.len() <= OPTION_MAX as usize + 16,
        "an option is whole"
    );
    let mut bytes = [0; 4096];
    stream.set_read_timeout(left(until)?)?;
    match stream.read(&mut bytes)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        count => {
            input.extend_from_slice(&bytes[..count]);
            Ok(())
        }
    }
}

/// Lets clients in until the socket is closed.
fn let_in(socket: &Socket, shared: &Arc<Shared>) {
    loop {
        let came = socket.listener.accept();
        if shared.is_stopping() {
            return;
        }
        let welcomed = came.and_then(|(stream, _)| shared.welcome(stream));
        if let Err(error) = welcomed {
            // Out of descriptors or threads, mostly: others will end.
            tracing::warn!(%error, "an NBD client cannot be let in");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
