//! A proxy between an NBD client and its server that writes down what the server has
//! acknowledged: each change with its data, in the order of the replies. It knows nothing of
//! the agent but the protocol, so it says what a log should have without having read one.
//! For one connection, and simple replies.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

const OPTION_GO: u32 = 7;
const ACK: u32 = 1;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
const DISCONNECT: u16 = 2;

/// What a change does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Write,
    Discard,
    Zeroes,
}

/// A change that the server said is done.
#[derive(Debug)]
pub struct Acknowledged {
    pub kind: Kind,
    pub offset: u64,
    pub len: u64,
    data: Vec<u8>,
    /// No later than this it was sent to the server; nanoseconds since 1970.
    pub sent: u64,
    /// No earlier than this the client was told.
    pub answered: u64,
}

impl Acknowledged {
    /// What it makes of a volume.
    pub fn apply(&self, image: &mut [u8]) {
        let range = self.offset as usize..(self.offset + self.len) as usize;
        match self.kind {
            Kind::Write => image[range].copy_from_slice(&self.data),
            Kind::Discard | Kind::Zeroes => image[range].fill(0),
        }
    }

    /// What the table of a log has of it.
    pub fn shape(&self) -> (Kind, u64, u64) {
        (self.kind, self.offset, self.len)
    }
}

/// A request that was not answered yet.
enum Pending {
    Change(Acknowledged),
    Read(u64),
    Other,
}

#[derive(Default)]
struct Recording {
    pending: HashMap<u64, Pending>,
    acknowledged: Vec<Acknowledged>,
}

/// The proxy, at a socket of its own.
pub struct Recorder {
    socket: PathBuf,
    recording: Arc<Mutex<Recording>>,
    thread: Option<JoinHandle<()>>,
}

/// Nanoseconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_nanos() as u64
}

impl Recorder {
    /// Listens at `socket` for one client of the server at `server`.
    pub fn start(socket: &Path, server: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let recording = Arc::new(Mutex::new(Recording::default()));
        let (shared, server) = (Arc::clone(&recording), server.to_owned());
        let thread = std::thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let server = UnixStream::connect(server).unwrap();
            let (to_client, from_server) = (client.try_clone(), server.try_clone());
            let (to_client, from_server) = (to_client.unwrap(), from_server.unwrap());
            let replies = Arc::clone(&shared);
            let back = std::thread::spawn(move || {
                // The end of the connection is no failure.
                let _ = pass_replies(from_server, to_client, &replies);
            });
            let _ = pass_requests(client, server, &shared);
            back.join().unwrap();
        });
        Self {
            socket: socket.to_owned(),
            recording,
            thread: Some(thread),
        }
    }

    /// Where the client connects to.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// How many changes have been acknowledged.
    pub fn count(&self) -> usize {
        self.recording.lock().unwrap().acknowledged.len()
    }

    /// All of them. The client must have gone.
    pub fn end(mut self) -> Vec<Acknowledged> {
        self.thread.take().unwrap().join().unwrap();
        std::mem::take(&mut self.recording.lock().unwrap().acknowledged)
    }
}

/// Passes `N` bytes on; gives them.
fn pass<const N: usize>(from: &mut UnixStream, to: &mut UnixStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    to.write_all(&bytes)?;
    Ok(bytes)
}

fn pass_many(from: &mut UnixStream, to: &mut UnixStream, len: u64) -> std::io::Result<()> {
    let mut bytes = vec![0; len as usize];
    from.read_exact(&mut bytes)?;
    to.write_all(&bytes)
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().unwrap()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(number(bytes, at))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(number(bytes, at))
}

fn pass_requests(
    mut client: UnixStream,
    mut server: UnixStream,
    recording: &Mutex<Recording>,
) -> std::io::Result<()> {
    pass::<4>(&mut client, &mut server)?;
    loop {
        let option: [u8; 16] = pass(&mut client, &mut server)?;
        pass_many(&mut client, &mut server, u64::from(word(&option, 12)))?;
        if word(&option, 8) == OPTION_GO {
            break;
        }
    }
    loop {
        let mut header = [0; 28];
        client.read_exact(&mut header)?;
        assert_eq!(word(&header, 0), REQUEST);
        let command = u16::from_be_bytes(number(&header, 6));
        let (offset, len) = (long(&header, 16), u64::from(word(&header, 24)));
        let mut data = Vec::new();
        let kind = match command {
            1 => {
                data = vec![0; len as usize];
                client.read_exact(&mut data)?;
                Some(Kind::Write)
            }
            4 => Some(Kind::Discard),
            6 => Some(Kind::Zeroes),
            _ => None,
        };
        let mut message = header.to_vec();
        message.extend(&data);
        let pending = match kind {
            Some(kind) => Pending::Change(Acknowledged {
                kind,
                offset,
                len,
                data,
                sent: now(),
                answered: 0,
            }),
            None if command == 0 => Pending::Read(len),
            None => Pending::Other,
        };
        let cookie = long(&header, 8);
        recording.lock().unwrap().pending.insert(cookie, pending);
        server.write_all(&message)?;
        if command == DISCONNECT {
            return Ok(());
        }
    }
}

fn pass_replies(
    mut server: UnixStream,
    mut client: UnixStream,
    recording: &Mutex<Recording>,
) -> std::io::Result<()> {
    pass::<18>(&mut server, &mut client)?;
    loop {
        let reply: [u8; 20] = pass(&mut server, &mut client)?;
        pass_many(&mut server, &mut client, u64::from(word(&reply, 16)))?;
        if (word(&reply, 8), word(&reply, 12)) == (OPTION_GO, ACK) {
            break;
        }
    }
    loop {
        let mut header = [0; 16];
        server.read_exact(&mut header)?;
        assert_eq!(word(&header, 0), REPLY, "simple replies");
        let is_done = word(&header, 4) == 0;
        let mut state = recording.lock().unwrap();
        let pending = state.pending.remove(&long(&header, 8));
        let mut data = 0;
        match pending.expect("a reply to nothing") {
            Pending::Change(mut change) if is_done => {
                change.answered = now();
                state.acknowledged.push(change);
            }
            Pending::Read(len) if is_done => data = len,
            _ => {}
        }
        drop(state);
        client.write_all(&header)?;
        pass_many(&mut server, &mut client, data)?;
    }
}
