//! The NBD front with clients that break the protocol, vanish, or do not listen: each loses
//! its connection, and nobody else notices; and the server ends when it is told to.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod devices;
mod front;

use std::io::{Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use devices::{Loop, MIB, Random, cases};
use front::Front;
use libreplica::ErrorKind;
use libreplica::capture::nbd::{Contexts, NbdOptions, NbdServer, NoContexts, Stretch};
use libreplica::units::Extent;

fn connect(front: &Front) -> UnixStream {
    let stream = UnixStream::connect(front.socket()).unwrap();
    let limit = Some(Duration::from_secs(20));
    stream.set_read_timeout(limit).unwrap();
    stream.set_write_timeout(limit).unwrap();
    stream
}

fn option(number: u8, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT\0\0\0".to_vec();
    bytes.push(number);
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn take<const N: usize>(stream: &mut UnixStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// A client that is served, with simple replies.
fn served(front: &Front) -> UnixStream {
    let mut stream = connect(front);
    let _: [u8; 18] = take(&mut stream);
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(&option(1, b"")).unwrap();
    let _: [u8; 10] = take(&mut stream);
    stream
}

fn request(command: u8, tag: u64, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend([0, 0, 0, command]);
    bytes.extend(tag.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

/// The error and the tag of the next reply, which has no data.
fn reply(stream: &mut UnixStream) -> (u32, u64) {
    let bytes: [u8; 16] = take(stream);
    assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes());
    let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
    (error, u64::from_be_bytes(bytes[8..].try_into().unwrap()))
}

/// Whether the server has ended the connection, all of its replies read.
fn is_ended(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

/// A client beside the others writes and reads.
fn assert_serves(front: &Front) {
    let mut stream = served(front);
    stream.write_all(&request(1, 1, 4096, 512)).unwrap();
    stream.write_all(&[9; 512]).unwrap();
    assert_eq!(reply(&mut stream), (0, 1));
    stream.write_all(&request(0, 2, 4096, 512)).unwrap();
    assert_eq!(reply(&mut stream), (0, 2));
    assert_eq!(take::<512>(&mut stream), [9; 512]);
    stream.write_all(&request(2, 0, 0, 0)).unwrap();
    assert!(is_ended(&mut stream));
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn random_bytes_at_every_stage_end_their_connection_only() {
    let front = Front::new(MIB);
    for seed in 0..cases(60) {
        let mut random = Random(seed * 31 + 7);
        let mut noise: Vec<u8> = (0..random.below(5000))
            .map(|_| random.next() as u8)
            .collect();
        let mut stream = if seed % 3 < 2 {
            connect(&front)
        } else {
            served(&front)
        };
        match seed % 3 {
            0 => {}
            // A right beginning.
            1 => noise
                .splice(..0, [&[0, 0, 0, 3][..], b"IHAVEOPT\0\0\0"].concat())
                .for_each(drop),
            _ => {
                let command = random.below(9) as u8;
                let header = request(command, 1, random.below(MIB), random.next() as u32);
                noise.splice(..0, header).for_each(drop);
            }
        }
        // It may end before all is sent.
        let _ = stream.write_all(&noise);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert!(is_ended(&mut stream));
    }
    assert_serves(&front);
    wait_for("they are gone", || front.server().clients() == 0);
    // Refused ones were forgotten, and what was written is in the backlog.
    let entries = front.entries();
    front.assert_replays(&entries);
}

#[test]
fn errors_are_answered_and_the_stream_goes_on() {
    let front = Front::new(MIB);
    let mut stream = served(&front);
    let refusals = [
        (request(1, 1, MIB, 512), 512, 28),
        (request(1, 2, 100, 512), 512, 22),
        (request(1, 3, 0, 100), 100, 22),
        (request(0, 4, MIB, 512), 0, 22),
        (request(4, 5, u64::MAX, 512), 0, 22),
        (request(7, 6, 0, 512), 0, 22),
        (request(77, 7, 0, 512), 0, 22),
        (request(0, 8, 0, u32::MAX), 0, 22),
    ];
    for (n, (header, payload, error)) in refusals.into_iter().enumerate() {
        stream.write_all(&header).unwrap();
        stream.write_all(&vec![1; payload]).unwrap();
        assert_eq!(reply(&mut stream), (error, n as u64 + 1));
    }
    assert_eq!(front.entries(), []);
    // What is too long to be waited for ends it.
    stream.write_all(&request(1, 1, 0, u32::MAX)).unwrap();
    assert!(is_ended(&mut stream));
    assert_serves(&front);
}

#[test]
fn who_does_not_say_what_he_wants_is_sent_away() {
    let front = Front::over(Loop::new(MIB), |options| {
        options.handshake = Duration::from_millis(300);
        options.connections = 3;
    });
    let mut idle = connect(&front);
    // A byte now and then is no reason to wait longer.
    let began = Instant::now();
    for byte in [0, 0, 0, 3, b'I', b'H', b'A', b'V', b'E'] {
        let _ = idle.write_all(&[byte]);
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(is_ended(&mut idle));
    assert!(began.elapsed() < Duration::from_secs(5));
    wait_for("it is forgotten", || front.server().clients() == 0);
    let first: Vec<_> = (0..3).map(|_| served(&front)).collect();
    let mut fourth = connect(&front);
    assert!(is_ended(&mut fourth));
    drop(first);
    wait_for("they are gone", || front.server().clients() == 0);
    assert_serves(&front);
}

#[test]
fn a_client_that_vanishes_leaves_whole_writes() {
    let front = Front::new(64 * MIB);
    let mut image = vec![0; 64 << 20];
    for seed in 1..cases(10) {
        let mut stream = served(&front);
        let mut random = Random(seed);
        for n in 0..200 {
            let data = vec![random.below(255) as u8; 64 << 10];
            let at = random.below(64 * MIB / data.len() as u64) * data.len() as u64;
            let bytes = [request(1, n, at, data.len() as u32), data].concat();
            // The last one is cut.
            let most = if n == 199 {
                random.below(60_000) as usize
            } else {
                bytes.len()
            };
            stream.write_all(&bytes[..most]).unwrap();
        }
        drop(stream);
        wait_for("it is gone", || front.server().clients() == 0);
        assert!(!front.service().has_in_flight());
        let entries = front.entries();
        assert!(
            entries
                .iter()
                .all(|entry| entry.extent.len().get() == 64 << 10)
        );
        front.assert_goes_on(&mut image, &entries);
    }
}

#[test]
fn a_client_that_does_not_listen_holds_nobody_up() {
    let mut front = Front::new(64 * MIB);
    // Asks for far more than sockets and the server hold, and takes nothing.
    let mut deaf = served(&front);
    deaf.set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let long = request(0, 1, 0, 32 << 20);
    let many = (0..100_000)
        .map_while(|_| deaf.write_all(&long).ok())
        .count();
    assert!(many < 100_000, "the server took them all");
    let mut status = served(&front);
    status
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    let short = request(5, 1, 0, 512);
    let many = (0..1_000_000)
        .map_while(|_| status.write_all(&short).ok())
        .count();
    assert!(many < 1_000_000, "replies are gathered without end");
    assert_serves(&front);
    let began = Instant::now();
    front.server.take().unwrap().stop();
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(!front.service().has_in_flight());
    assert!(!front.socket().exists());
}

#[test]
fn stopping_answers_what_was_received() {
    for _ in 0..cases(5) {
        let mut front = Front::new(16 * MIB);
        let mut stream = served(&front);
        let one = |n: u64| [request(1, n, n % 256 * 4096, 4096), vec![n as u8; 4096]].concat();
        let sent: Vec<u8> = (1..40).flat_map(one).collect();
        stream.write_all(&sent).unwrap();
        let server = front.server.take().unwrap();
        let stopping = std::thread::spawn(move || server.stop());
        let mut answers = Vec::new();
        stream.read_to_end(&mut answers).unwrap();
        stopping.join().unwrap();
        let entries = front.entries();
        assert_eq!(answers.len(), 16 * entries.len(), "each change is answered");
        front.assert_replays(&entries);
    }
}

#[test]
fn when_the_service_stops_connections_end() {
    let mut front = Front::new(16 * MIB);
    let mut stream = served(&front);
    let mut deaf = served(&front);
    deaf.write_all(&request(0, 1, 0, 16 << 20)).unwrap();
    assert_serves(&front);
    let service = front.service.take().unwrap();
    let stopping = std::thread::spawn(move || service.stop());
    assert!(is_ended(&mut stream));
    wait_for("they are gone", || front.server().clients() == 0);
    // Nobody is let in to a volume that is not served.
    let mut late = served(&front);
    assert!(is_ended(&mut late));
    front.server = None;
    stopping.join().unwrap();
}

fn start(front: &Front, path: &Path) -> libreplica::Result<NbdServer> {
    let contexts = Arc::new(NoContexts);
    NbdServer::start(front.service().entrance(), NbdOptions::new(path), contexts)
}

#[test]
fn the_socket_is_private_and_takes_the_place_of_a_dead_one() {
    let front = Front::new(MIB);
    let mode = std::fs::metadata(front.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let kind = |path: &Path| start(&front, path).unwrap_err().kind();
    assert_eq!(kind(&front.socket()), ErrorKind::Busy);
    let file = front.folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert_eq!(kind(&file), ErrorKind::Exists);
    let dead = front.folder.path().join("dead socket");
    drop(UnixListener::bind(&dead).unwrap());
    assert!(dead.exists());
    let server = start(&front, &dead).unwrap();
    assert!(server.uri().ends_with("/dead%20socket"));
    UnixStream::connect(&dead).unwrap();
    server.stop();
    assert!(!dead.exists());
}

/// What changed is known when somebody lets it be, once for each time.
struct Slow(Mutex<Receiver<()>>);

impl Contexts for Slow {
    fn list(&self) -> Vec<String> {
        vec!["slow".to_owned()]
    }

    fn dirty(
        &self,
        _: &str,
        _: Extent,
        _: &mut dyn FnMut(Stretch) -> ControlFlow<()>,
    ) -> libreplica::Result<()> {
        let _ = self.0.lock().unwrap().recv();
        Ok(())
    }
}

/// A client that may ask what changed; says how many contexts it was granted.
fn asking(socket: &Path) -> (UnixStream, usize) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let _: [u8; 18] = take(&mut stream);
    stream.write_all(&[0, 0, 0, 3]).unwrap();
    stream.write_all(&option(8, b"")).unwrap();
    let _: [u8; 20] = take(&mut stream);
    let name = b"qemu:dirty-bitmap:slow";
    let mut query = [0, 0, 0, 0, 0, 0, 0, 1].to_vec();
    query.extend((name.len() as u32).to_be_bytes());
    query.extend(name);
    stream.write_all(&option(10, &query)).unwrap();
    let mut granted = 0;
    loop {
        let header: [u8; 20] = take(&mut stream);
        let len = u32::from_be_bytes(header[16..].try_into().unwrap());
        stream.read_exact(&mut vec![0; len as usize]).unwrap();
        match header[12..16] {
            [0, 0, 0, 4] => granted += 1,
            [0, 0, 0, 1] => break,
            _ => panic!("{header:?}"),
        }
    }
    stream.write_all(&option(1, b"")).unwrap();
    let _: [u8; 10] = take(&mut stream);
    (stream, granted)
}

#[test]
fn who_waits_to_be_told_what_changed_reads_and_writes_meanwhile() {
    let mut front = Front::new(MIB);
    front.server = None;
    let (answer, answers) = sync_channel(1);
    let mut options = NbdOptions::new(front.socket());
    options.handshake = Duration::from_secs(1);
    let contexts = Arc::new(Slow(Mutex::new(answers)));
    let server = NbdServer::start(front.service().entrance(), options, contexts).unwrap();
    let (mut stream, granted) = asking(&front.socket());
    assert_eq!(granted, 1);

    stream.write_all(&request(7, 1, 0, 4096)).unwrap();
    let mut write = request(1, 2, 0, 512);
    write.extend([7; 512]);
    stream.write_all(&write).unwrap();
    let reply: [u8; 16] = take(&mut stream);
    assert_eq!(reply[4..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    stream.write_all(&request(0, 3, 0, 512)).unwrap();
    let reply: [u8; 28 + 512] = take(&mut stream);
    assert_eq!(reply[15], 3);
    assert_eq!(reply[28..], [7; 512]);
    // The points cannot be named, and the client is served.
    let (mut other, granted) = asking(&front.socket());
    assert_eq!(granted, 0);
    other.write_all(&request(3, 4, 0, 0)).unwrap();
    let _: [u8; 16] = take(&mut other);

    answer.send(()).unwrap();
    let reply: [u8; 32] = take(&mut stream);
    assert_eq!(reply[4..8], [0, 1, 0, 5]);
    assert_eq!(reply[15], 1);
    assert_eq!(reply[24..], [0, 0, 16, 0, 0, 0, 0, 1]);
    // Nor does the end wait for an answer, nor for one who does.
    stream.write_all(&request(7, 5, 0, 4096)).unwrap();
    server.stop();
    assert!(is_ended(&mut stream));
    drop(answer);
}
