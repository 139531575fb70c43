//! A volume served through ublk for a test, by this process or by one that can be killed; and
//! users of it, who write and check what they read.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../shipper/mod.rs"]
mod shipper;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libreplica::ErrorKind;
use libreplica::capture::inline::{InlineSpec, Service};
use libreplica::capture::ublk::{Copying, How, Started, State, UblkDevice, UblkSpec};
use libreplica::sys::ublk::{Control, DeviceNumber, QueueNumber, Tag, fetch};
use libreplica::sys::uring::{Token, Uring, shared};

use crate::devices::run;
pub use shipper::*;

/// The argument with which the test program serves a volume.
pub const SERVE: &str = "--serve";
/// The argument with which it begins to take a device over and dies.
pub const CUT_SHORT: &str = "--cut-short";

fn copied(copying: Copying) -> UblkSpec {
    UblkSpec {
        copying,
        ..UblkSpec::new(VOLUME)
    }
}

/// Whether this kernel is newer than `major`.`minor`.
pub fn newer_than(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) > (Some(major), Some(minor))
}

pub fn spec(disk: &Path, folder: &Path) -> InlineSpec {
    spec_of(disk, folder, 512 << 20)
}

/// A volume that this process serves.
pub struct Front {
    // In the order in which they must end.
    pub device: Option<UblkDevice>,
    pub service: Option<Service>,
    pub folder: tempfile::TempDir,
}

impl Front {
    /// Over a disk; in data mode.
    pub fn new(disk: &Path) -> Self {
        Self::recording(disk, Copying::WhereNeeded)
    }

    /// Over a disk; in data mode, and copied so.
    pub fn recording(disk: &Path, copying: Copying) -> Self {
        let front = Self::marking(disk, copying);
        climb(front.service());
        front
    }

    /// Over a disk; in bitmap mode, and copied so.
    pub fn marking(disk: &Path, copying: Copying) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (service, _) = Service::start(&spec(disk, folder.path())).unwrap();
        let device = UblkDevice::start(service.entrance(), &copied(copying)).unwrap();
        assert_eq!(device.started(), Started::Added);
        Self {
            device: Some(device),
            service: Some(service),
            folder,
        }
    }

    pub fn device(&self) -> &UblkDevice {
        self.device.as_ref().unwrap()
    }

    pub fn service(&self) -> &Service {
        self.service.as_ref().unwrap()
    }

    /// What users open.
    pub fn node(&self) -> &Path {
        self.device().path()
    }

    /// Waits until the device has got over so many failures, or is stopped for them.
    pub fn wait_until_served_after(&self, failures: u32) {
        let began = Instant::now();
        loop {
            let status = self.device().status();
            if status.failures == failures && status.state != State::TakingOver {
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{status:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The same device, served anew.
    pub fn serve_again(&mut self) {
        self.serve_again_and(Copying::WhereNeeded);
    }

    /// The same, and copied so.
    pub fn serve_again_and(&mut self, copying: Copying) {
        let entrance = self.service().entrance();
        let device = UblkDevice::start(entrance, &copied(copying)).unwrap();
        self.device = Some(device);
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            let removed = device.stop(How::Remove);
            if !std::thread::panicking() {
                removed.unwrap();
            }
        }
        if let Some(service) = self.service.take() {
            service.stop();
        }
    }
}

/// A volume that another process serves, which can be killed.
pub struct Server {
    child: Child,
    /// What users open.
    pub node: PathBuf,
    pub started: String,
}

impl Server {
    pub fn start(disk: &Path, folder: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .arg(SERVE)
            .args([disk, folder])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let Some(Ok(line)) = lines.next() else {
            panic!("the server ended: {:?}", child.wait());
        };
        let (started, node) = line.split_once(' ').unwrap();
        Self {
            child,
            node: PathBuf::from(node),
            started: started.to_owned(),
        }
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Removes the device.
    pub fn remove(mut self) {
        writeln!(self.child.stdin.take().unwrap(), "remove").unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the other process does, until it is told to stop or killed.
pub fn serve(disk: &Path, folder: &Path) {
    let began = Instant::now();
    // The process before this one holds the disk until it is gone.
    let service = loop {
        match Service::start(&spec(disk, folder)) {
            Ok((service, _)) => break service,
            Err(error) if error.kind() == ErrorKind::Busy => {
                assert!(began.elapsed() < Duration::from_secs(60), "{error}");
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => panic!("{error}"),
        }
    };
    let device = UblkDevice::start(service.entrance(), &UblkSpec::new(VOLUME)).unwrap();
    println!("{:?} {}", device.started(), device.path().display());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let how = if line.trim() == "remove" {
        How::Remove
    } else {
        How::Detach
    };
    device.stop(how).unwrap();
    service.stop();
}

/// Begins to take a device over, fetches the requests of some of its queues, and dies.
pub fn cut_short(number: u32, queues: u16) {
    let control = Control::open().unwrap();
    let number = DeviceNumber(number);
    while control.begin_recovery(number).is_err() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let node = format!("/dev/ublkc{number}");
    let file = File::options().read(true).write(true).open(node).unwrap();
    let depth = control.device(number).unwrap().depth;
    let mut ring = Uring::new(u32::from(depth)).unwrap();
    let handle = ring.add(shared(file));
    for queue in (0..queues).map(QueueNumber) {
        for tag in (0..depth).map(Tag) {
            ring.start(Token(u64::from(tag.0)), handle, fetch(queue, tag));
        }
        ring.submit(0).unwrap();
        assert!(ring.ended().is_none());
    }
    run("kill", &["-KILL", &std::process::id().to_string()]);
}

/// fio on a device, in direct mode, with a checksum in each block that is read back in the end.
pub struct Fio {
    arguments: Vec<String>,
}

impl Fio {
    pub fn new(node: &Path, arguments: &[&str]) -> Self {
        let common = [
            "--name=load",
            "--ioengine=io_uring",
            "--direct=1",
            "--group_reporting",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randrepeat=0",
            "--allow_mounted_write=0",
            "--minimal",
        ];
        let mut all: Vec<String> = common.iter().map(ToString::to_string).collect();
        all.push(format!("--filename={}", node.display()));
        all.extend(arguments.iter().map(ToString::to_string));
        Self { arguments: all }
    }

    /// To its end, which must be a good one.
    pub fn run(&self) {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        run("fio", &arguments);
    }

    pub fn spawn(&self) -> Child {
        Command::new("fio")
            .args(&self.arguments)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }
}

/// Waits for a child, but not for ever.
pub fn wait(child: &mut Child, limit: Duration) -> std::process::ExitStatus {
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if began.elapsed() > limit {
            let _ = child.kill();
            panic!("still there after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn content(path: &Path) -> Vec<u8> {
    let file = File::open(path).unwrap();
    // What the page cache has of it is not asked for.
    drop(file);
    run("blockdev", &["--flushbufs", path.to_str().unwrap()]);
    std::fs::read(path).unwrap()
}

/// How many flushes a disk has ended.
pub fn flushes(disk: &Path) -> u64 {
    let name = disk.file_name().unwrap().to_str().unwrap();
    let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    stat.split_whitespace().nth(15).unwrap().parse().unwrap()
}
