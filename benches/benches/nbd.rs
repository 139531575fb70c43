//! The NBD front beside other servers, on one loop device and in one run: CPU of the server
//! for each request, and requests a second, of 4 KiB random writes and of 1 MiB sequential
//! ones. Ours tracks and records meanwhile: data mode, the backlog taken by a thread. The
//! client sends what it may in one call and takes replies in bulk, so that the servers are
//! measured and not it. As root; peers that are not installed are left out.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench that cannot run shall say so and end"
)]

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libreplica::capture::inline::Service;
use libreplica::capture::nbd::{NbdOptions, NbdServer, NoContexts};
use libreplica::units::ByteLen;
use replica_bench::inline::{self, LoopDevice};
use replica_bench::{Numbers, noise};

const SIZE: u64 = 512 << 20;
const ROUNDS: usize = 5;
const TIME: Duration = Duration::from_secs(2);
/// Kernel ticks a second, in which CPU time is counted.
const TICKS: f64 = 100.0;

/// The load: how long a request is, how many are under way.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    len: u32,
    depth: usize,
    random: Order,
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    Random,
    Ascending,
}

const LOADS: [Load; 3] = [
    Load {
        name: "4 KiB random, 32 under way",
        len: 4096,
        depth: 32,
        random: Order::Random,
    },
    Load {
        name: "4 KiB random, 128 under way",
        len: 4096,
        depth: 128,
        random: Order::Random,
    },
    Load {
        name: "1 MiB ascending, 4 under way",
        len: 1 << 20,
        depth: 4,
        random: Order::Ascending,
    },
];

/// A connection in the transmission phase.
struct Client(UnixStream);

impl Client {
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        let mut client = Self(stream);
        let _: [u8; 18] = client.take();
        client.0.write_all(&3_u32.to_be_bytes()).unwrap();
        // GO, for the export without a name, nothing asked about it.
        let mut go = b"IHAVEOPT".to_vec();
        go.extend([0, 0, 0, 7, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0]);
        client.0.write_all(&go).unwrap();
        loop {
            let header: [u8; 20] = client.take();
            let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
            let mut data = vec![0; number(16) as usize];
            client.0.read_exact(&mut data).unwrap();
            match number(12) {
                1 => return client,
                error if error >> 31 == 1 => panic!("the server refuses"),
                _ => {}
            }
        }
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Sends writes to all of `offsets`.
    fn send(&mut self, offsets: &[u64], data: &[u8]) {
        let header = |offset: &u64| {
            let mut bytes = [0; 28];
            bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
            bytes[7] = 1;
            bytes[16..24].copy_from_slice(&offset.to_be_bytes());
            bytes[24..].copy_from_slice(&(data.len() as u32).to_be_bytes());
            bytes
        };
        let headers: Vec<[u8; 28]> = offsets.iter().map(header).collect();
        let pieces = headers.iter().flat_map(|header| [&header[..], data]);
        let mut slices: Vec<IoSlice<'_>> = pieces.map(IoSlice::new).collect();
        let mut rest = &mut slices[..];
        while !rest.is_empty() {
            let some = rest.len().min(1024);
            let sent = self.0.write_vectored(&rest[..some]).unwrap();
            IoSlice::advance_slices(&mut rest, sent);
        }
    }

    /// Loads the server for some time; how many writes were answered.
    fn load(&mut self, load: Load, time: Duration) -> u64 {
        let data = noise(load.len as usize);
        let places = SIZE / u64::from(load.len);
        let mut numbers = Numbers::default();
        let (mut next, mut sent, mut done, mut part) = (0, 0, 0, 0);
        let mut replies = vec![0; 16 * load.depth + 16];
        let until = Instant::now() + time;
        let mut ending = false;
        while !ending || done < sent {
            let room = if ending {
                0
            } else {
                load.depth - (sent - done) as usize
            };
            let offsets: Vec<u64> = (0..room)
                .map(|_| {
                    next += 1;
                    let place = match load.random {
                        Order::Random => numbers.next().unwrap() >> 20,
                        Order::Ascending => next,
                    };
                    place % places * u64::from(load.len)
                })
                .collect();
            self.send(&offsets, &data);
            sent += room as u64;
            ending = Instant::now() >= until;
            let keep = if ending { 0 } else { load.depth as u64 / 2 };
            while sent - done > keep {
                part += self.0.read(&mut replies[part..]).unwrap();
                let whole = part / 16;
                for reply in replies[..16 * whole].chunks(16) {
                    assert_eq!(reply[4..8], [0; 4], "a write failed");
                }
                done += whole as u64;
                replies.copy_within(16 * whole..part, 0);
                part -= 16 * whole;
            }
        }
        done
    }
}

/// A server in a process of its own, ended when dropped.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(mut command: Command, socket: &Path) -> Self {
        let _ = fs::remove_file(socket);
        let child = command.stdout(Stdio::null()).spawn().unwrap();
        let server = Self {
            child,
            socket: socket.to_owned(),
        };
        let until = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(socket).is_err() {
            assert!(Instant::now() < until, "the server does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    /// CPU time so far, in seconds, its ended threads' included.
    fn cpu(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let behind = stat.rsplit_once(')').unwrap().1;
        let fields: Vec<&str> = behind.split_whitespace().collect();
        let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
        (ticks(11) + ticks(12)) / TICKS
    }

    /// Microseconds of CPU for each request, and requests a second.
    fn measure(&self, load: Load) -> (f64, f64) {
        let mut client = Client::connect(&self.socket);
        client.load(load, TIME / 10);
        let (cpu, began) = (self.cpu(), Instant::now());
        let done = client.load(load, TIME) as f64;
        let took = began.elapsed().as_secs_f64();
        ((self.cpu() - cpu) * 1e6 / done, done / took)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = nix_terminate(&self.child);
        let _ = self.child.wait();
    }
}

/// SIGTERM, for a server that removes what it made.
fn nix_terminate(child: &Child) -> std::io::Result<()> {
    let id = child.id().to_string();
    Command::new("kill").arg(id).status().map(drop)
}

/// Serves until terminated: what the child process of ours does.
fn serve(device: &str, socket: &str) {
    let folder = tempfile::tempdir().unwrap();
    let spec = inline::spec(Path::new(device), folder.path(), ByteLen::new(256 << 20));
    let (service, _) = Service::start(&spec).unwrap();
    inline::record(&service);
    let options = NbdOptions::new(socket);
    let _server = NbdServer::start(service.entrance(), options, Arc::new(NoContexts)).unwrap();
    loop {
        inline::take(&service);
    }
}

/// A file of noise in memory, and a loop device over it.
fn disk() -> (LoopDevice, tempfile::NamedTempFile) {
    let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    let data = noise(1 << 20);
    (0..SIZE >> 20).for_each(|_| file.write_all(&data).unwrap());
    (LoopDevice::over(file.path(), &[]), file)
}

fn command(program: &str, device: &str, socket: &str) -> Command {
    let mut command = match program {
        "ours" => Command::new(std::env::current_exe().unwrap()),
        other => Command::new(other),
    };
    match program {
        "ours" => command.args(["--serve", device, socket]),
        "nbdkit" => command.args(["-f", "-U", socket, "file", device]),
        _ => command
            .args(["-t", "-f", "raw", "--cache=none", "--aio=io_uring"])
            .args(["-k", socket, device]),
    };
    command
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, device, socket] = &arguments[..]
        && role == "--serve"
    {
        return serve(device, socket);
    }
    let (disk, _file) = disk();
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let there = |program: &&str| {
        *program == "ours"
            || Command::new(program)
                .arg("--version")
                .stdout(Stdio::null())
                .status()
                .is_ok()
    };
    let programs: Vec<&str> = ["ours", "qemu-nbd", "nbdkit"]
        .into_iter()
        .filter(there)
        .collect();
    let mut found = vec![vec![(Vec::new(), Vec::new()); programs.len()]; LOADS.len()];
    for _ in 0..ROUNDS {
        for (p, program) in programs.iter().enumerate() {
            let device = disk.path().to_str().unwrap();
            let command = command(program, device, socket.to_str().unwrap());
            let server = Server::start(command, &socket);
            for (l, load) in LOADS.into_iter().enumerate() {
                let (cpu, rate) = server.measure(load);
                found[l][p].0.push(cpu);
                found[l][p].1.push(rate);
            }
        }
    }
    println!("| load | server | CPU a request | requests a second |");
    println!("| --- | --- | --- | --- |");
    for (load, row) in LOADS.iter().zip(found) {
        for (program, (cpu, rate)) in programs.iter().zip(row) {
            let (cpu, rate) = (median(cpu), median(rate));
            println!("| {} | {program} | {cpu:.2} µs | {rate:.0} |", load.name);
        }
    }
}
