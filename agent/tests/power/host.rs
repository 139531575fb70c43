//! The host's side: makes the disks, boots the machine on them, and cuts its power. What the
//! machine says to be durable is remembered, and told to the next boot, which must find it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::machine::{self, Load, Said, Stage};
use crate::stage::{MIB, Place, number, run, until};

/// Where `scripts/vm` is.
pub const RUN: &str = "REPLICA_VM_RUN";
/// How long a boot may take until its load runs, or until it has checked everything.
const BOOT: Duration = Duration::from_secs(240);

pub fn what_a_power_cut_leaves_is_compared_and_nothing_is_lost() {
    let place = Place::new();
    let disks = ["volume", "state", "store"].map(|name| place.at(name));
    for (disk, size) in disks.iter().zip([96 * MIB, 64 * MIB, 256 * MIB]) {
        File::create(disk).unwrap().set_len(size).unwrap();
    }
    for disk in &disks[1..] {
        run("mkfs.ext4", ["-qF", disk.to_str().unwrap()]);
    }
    let mut random = Random::new();
    let mut stage = Stage::First;
    let mut durable = Said::default();
    for cut in 1..=number("REPLICA_POWER_CUTS", 2) {
        let load = if cut % 2 == 0 {
            Load::Held
        } else {
            Load::Shipped
        };
        let caches = [0; 3].map(|_| random.below(2) == 0);
        let mut power = Power::on(&place, &disks, caches, stage, durable, load);
        power.wait_for_load();
        let wait = Duration::from_millis(200 + random.below(4000));
        durable = power.cut(wait);
        println!("cut {cut}: {load:?}, volatile caches {caches:?}, after {wait:?}: {durable:?}");
        stage = Stage::Again;
    }
    let power = Power::on(
        &place,
        &disks,
        [false; 3],
        Stage::Last,
        durable,
        Load::Shipped,
    );
    power.wait_for_the_end();
}

struct Random(u64);

impl Random {
    fn new() -> Self {
        let text = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
        Self(u64::from_str_radix(&text[..8], 16).unwrap())
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(99);
        (self.0 >> 33) % limit
    }
}

/// A machine that runs.
struct Power {
    vm: Child,
    pid_file: PathBuf,
    caches: Vec<Child>,
    lines: Receiver<String>,
    said: Said,
    errors: PathBuf,
}

impl Power {
    fn on(
        place: &Place,
        disks: &[PathBuf; 3],
        caches: [bool; 3],
        stage: Stage,
        durable: Said,
        load: Load,
    ) -> Self {
        let mut words = String::new();
        let mut running = Vec::new();
        for (disk, cached) in disks.iter().zip(caches) {
            let file = if cached {
                let socket = disk.with_extension("sock");
                running.push(volatile(disk, &socket));
                format!("nbd+unix:///?socket={}", socket.display())
            } else {
                disk.display().to_string()
            };
            // What a discard leaves is what was there.
            let how = "format=raw,if=virtio,cache=writeback,discard=ignore";
            words += &format!(" -drive file={file},{how}");
        }
        let (pid_file, errors) = (place.at("pid"), place.at("errors"));
        let _ = fs::remove_file(&pid_file);
        // Not to outlive this process, whatever ends it.
        let mut vm = Command::new("setpriv");
        vm.args(["--pdeathsig", "TERM", "--"]);
        vm.arg(std::env::var_os(RUN).unwrap());
        vm.args(["run", "-m", "1500M", "-t", "600", "-M", "ublk_drv loop"]);
        vm.arg("-p").arg(&pid_file).args(["-x", &words, "--"]);
        vm.arg(std::env::current_exe().unwrap());
        vm.args(machine::arguments(stage, durable, load));
        let mut vm = vm
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        let out = BufReader::new(vm.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        Self {
            vm,
            pid_file,
            caches: running,
            lines,
            said: durable,
            errors,
        }
    }

    /// The next thing that the machine says, until then.
    fn hear(&mut self, until: Instant) -> Option<String> {
        let left = until.saturating_duration_since(Instant::now());
        match self.lines.recv_timeout(left) {
            Ok(line) => {
                match Said::parse(&line) {
                    Some(said) => self.said = said,
                    None => println!("  {line}"),
                }
                Some(line)
            }
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => self.failed("it went down"),
        }
    }

    fn failed(&self, what: &str) -> ! {
        let errors = fs::read_to_string(&self.errors).unwrap_or_default();
        panic!("{what}:\n{errors}");
    }

    fn wait_for_load(&mut self) {
        let until = Instant::now() + BOOT;
        loop {
            match self.hear(until) {
                None => self.failed("there is no load in time"),
                Some(line) if line == machine::LOADED => return,
                Some(_) => {}
            }
        }
    }

    /// Cuts the power `wait` from now; what was durable by then.
    fn cut(mut self, wait: Duration) -> Said {
        let at = Instant::now() + wait;
        while self.hear(at).is_some() {}
        let pid = fs::read_to_string(&self.pid_file).unwrap();
        let qemu = Pid::from_raw(pid.trim().parse().unwrap());
        // The machine stands still before its disks go: it sees none of them fail.
        kill(qemu, Signal::SIGSTOP).unwrap();
        // What it said is there soon; what it did not say by now does not count.
        while self
            .hear(Instant::now() + Duration::from_millis(100))
            .is_some()
        {}
        for cache in &mut self.caches {
            cache.kill().unwrap();
            cache.wait().unwrap();
        }
        kill(qemu, Signal::SIGKILL).unwrap();
        let ended = self.vm.wait().unwrap();
        assert_eq!(ended.code(), Some(125), "it had ended before: {ended}");
        self.said
    }

    /// It has checked all, and ended.
    fn wait_for_the_end(mut self) {
        let until = Instant::now() + BOOT;
        let ended = loop {
            if let Some(ended) = self.vm.try_wait().unwrap() {
                break ended;
            }
            assert!(Instant::now() < until, "it does not end");
            while let Ok(line) = self.lines.recv_timeout(Duration::from_millis(50)) {
                println!("  {line}");
            }
        };
        if !ended.success() {
            self.failed("it has found something");
        }
    }
}

impl Drop for Power {
    fn drop(&mut self) {
        // With it goes its QEMU.
        let _ = self.vm.kill();
        let _ = self.vm.wait();
        for cache in &mut self.caches {
            let _ = cache.kill();
            let _ = cache.wait();
        }
    }
}

/// A disk with a volatile cache: what is written stays in it until a flush.
fn volatile(disk: &Path, socket: &Path) -> Child {
    let _ = fs::remove_file(socket);
    let server = Command::new("nbdkit")
        .args(["--foreground", "--exit-with-parent", "--unix"])
        .arg(socket)
        .args(["--filter=cache", "file"])
        .arg(disk)
        .args(["cache=writeback", "cache-min-block-size=4096"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("nbdkit: {error}: scripts/packages installs it"));
    until("nbdkit listens", Duration::from_secs(10), || {
        socket.exists().then_some(())
    });
    server
}
