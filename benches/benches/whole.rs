//! The whole, as an operator sees it: the binary on a loop device, each job beside the tool
//! that people would use instead or beside the raw device, alternated in one run. Prints
//! the medians as the table of benches/README.md. As root; a release build of the
//! agent (`make build`) must be there, or named by `REPLICA_BIN`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a bench that cannot run shall say so and end"
)]

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use replica_bench::noise;

const ROUNDS: usize = 5;
const SIZE_MIB: u64 = 2048;
/// Half of the volume holds data.
const DATA_MIB: u64 = SIZE_MIB / 2;
const CHANGED_MIB: u64 = 256;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn timed(job: impl FnOnce()) -> Duration {
    let started = Instant::now();
    job();
    started.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Forgets what the kernel has cached, so that every round reads the device.
fn cold() {
    run("sync", &[]);
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// A loop device, a daemon and a store, gone when dropped.
struct Stage {
    folder: tempfile::TempDir,
    device: String,
    binary: PathBuf,
    daemon: Option<Child>,
}

impl Stage {
    fn new() -> Self {
        let binary = std::env::var_os("REPLICA_BIN").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/replica"),
            PathBuf::from,
        );
        assert!(binary.exists(), "{}: run `make build`", binary.display());
        let folder = tempfile::tempdir_in("/var/tmp").unwrap();
        let disk = folder.path().join("disk");
        let mut file = File::create(&disk).unwrap();
        let data = noise(1 << 20);
        (0..DATA_MIB).for_each(|_| file.write_all(&data).unwrap());
        file.set_len(SIZE_MIB << 20).unwrap();
        file.sync_all().unwrap();
        let device = run(
            "losetup",
            &["--find", "--show", "--direct-io=on", disk.to_str().unwrap()],
        );
        let mut stage = Self {
            folder,
            device,
            binary,
            daemon: None,
        };
        stage.start_daemon();
        stage
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn start_daemon(&mut self) {
        let log = File::create(self.path("log")).unwrap();
        let daemon = Command::new(&self.binary)
            .args(["run", "--state-dir", &self.path("state")])
            .args(["--socket", &self.path("sock")])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.daemon = Some(daemon.unwrap());
        let socket = PathBuf::from(self.path("sock"));
        while !socket.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn replica(&self, args: &[&str]) -> String {
        let socket = self.path("sock");
        let mut all = vec!["--socket", &socket];
        all.extend(args);
        run(self.binary.to_str().unwrap(), &all)
    }

    fn protect(&self, round: usize) {
        let store = self.path(&format!("store-{round}"));
        let args = ["protect", &self.device, "--to", &store, "--name", "v"];
        self.replica(&[&args[..], &["--every", "1h", "--wait"]].concat());
    }

    /// Random 4 KiB writes at full speed for some seconds; how many a second.
    fn iops(&self) -> f64 {
        let device = format!("--filename={}", self.device);
        let args = [
            "--name=w",
            &device,
            "--rw=randwrite",
            "--bs=4k",
            "--direct=1",
        ];
        let more = [
            "--ioengine=libaio",
            "--iodepth=32",
            "--runtime=4",
            "--time_based",
        ];
        let output = ["--output-format=terse", "--terse-version=3", "--size=1g"];
        let line = run("fio", &[&args[..], &more, &output].concat());
        // Field 49 of fio's terse format, version 3: write IOPS.
        line.split(';').nth(48).unwrap().parse().unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = Command::new(&self.binary)
            .args(["--socket", &self.path("sock"), "unprotect", "v"])
            .output();
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let _ = Command::new("losetup")
            .args(["--detach", &self.device])
            .output();
    }
}

fn report(work: &str, ours: Duration, peer: &str, theirs: Duration) {
    let ratio = theirs.as_secs_f64() / ours.as_secs_f64();
    println!(
        "| {work} | {:.2} s | {peer} | {:.2} s | {ratio:.2} |",
        ours.as_secs_f64(),
        theirs.as_secs_f64()
    );
}

/// The baseline, beside reading the device and beside a sparse copy of it made durable.
fn baseline(stage: &Stage) {
    let (mut ours, mut reads, mut copies) = (Vec::new(), Vec::new(), Vec::new());
    let (input, copy) = (format!("if={}", stage.device), stage.path("copy"));
    let output = format!("of={copy}");
    for round in 0..ROUNDS {
        cold();
        reads.push(timed(|| {
            drop(run(
                "dd",
                &[&input, "of=/dev/null", "bs=1M", "iflag=direct"],
            ))
        }));
        cold();
        let sparse = [
            &input,
            &output,
            "bs=1M",
            "iflag=direct",
            "conv=sparse,fsync",
        ];
        copies.push(timed(|| drop(run("dd", &sparse))));
        fs::remove_file(&copy).unwrap();
        cold();
        ours.push(timed(|| stage.protect(round)));
        if round + 1 < ROUNDS {
            stage.replica(&["unprotect", "v"]);
            fs::remove_dir_all(stage.path(&format!("store-{round}"))).unwrap();
        }
    }
    let ours = median(ours);
    report("baseline", ours, "dd, reading only", median(reads));
    report("baseline", ours, "dd conv=sparse,fsync", median(copies));
}

/// A point after changes all over the volume, beside reading the whole device.
fn point(stage: &Stage) {
    let (mut ours, mut reads) = (Vec::new(), Vec::new());
    let device = format!("--filename={}", stage.device);
    let changed = format!("--io_size={CHANGED_MIB}m");
    let size = format!("--size={DATA_MIB}m");
    for _ in 0..ROUNDS {
        let args = [
            "--name=w",
            &device,
            "--rw=randwrite",
            "--bs=64k",
            "--direct=1",
        ];
        run(
            "fio",
            &[
                &args[..],
                &["--ioengine=libaio", "--iodepth=16", &size, &changed],
            ]
            .concat(),
        );
        cold();
        ours.push(timed(|| drop(stage.replica(&["point", "v"]))));
        cold();
        let input = format!("if={}", stage.device);
        reads.push(timed(|| {
            drop(run(
                "dd",
                &[&input, "of=/dev/null", "bs=1M", "iflag=direct"],
            ))
        }));
    }
    let work = format!("a point after {CHANGED_MIB} MiB of random 64 KiB writes");
    report(
        &work,
        median(ours),
        "dd, reading all of the device",
        median(reads),
    );
}

/// A restore to a file, durable, beside a sparse copy of the same bytes.
fn restore(stage: &Stage) {
    let (mut ours, mut copies) = (Vec::new(), Vec::new());
    let store = stage.path(&format!("store-{}", ROUNDS - 1));
    let (restored, copy) = (stage.path("restored"), stage.path("copy"));
    for _ in 0..ROUNDS {
        cold();
        let args = [
            "restore", "v", "--point", "latest", "--output", &restored, "--store", &store,
        ];
        ours.push(timed(|| {
            stage.replica(&args);
            run("sync", &["-f", &restored]);
        }));
        cold();
        let (input, output) = (format!("if={}", stage.device), format!("of={copy}"));
        let sparse = [
            &input,
            &output,
            "bs=1M",
            "iflag=direct",
            "conv=sparse,fsync",
        ];
        copies.push(timed(|| drop(run("dd", &sparse))));
        fs::remove_file(&restored).unwrap();
        fs::remove_file(&copy).unwrap();
    }
    report(
        "restore of a point, digest checked",
        median(ours),
        "dd conv=sparse,fsync",
        median(copies),
    );
}

/// What tracking costs the writers.
fn tracking(stage: &Stage) {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        with.push(stage.iops());
        stage.replica(&["unprotect", "v"]);
        without.push(stage.iops());
        stage.protect(ROUNDS + round);
    }
    for numbers in [&mut with, &mut without] {
        numbers.sort_by(f64::total_cmp);
    }
    let (with, without) = (with[ROUNDS / 2], without[ROUNDS / 2]);
    println!(
        "| random 4 KiB writes, queue depth 32 | {with:.0}/s tracked | not tracked | {without:.0}/s | {:.2} |",
        with / without
    );
}

fn main() {
    let stage = Stage::new();
    println!("| work | ours | beside | theirs | ratio (above 1: ours is faster) |");
    println!("| --- | --- | --- | --- | --- |");
    baseline(&stage);
    point(&stage);
    restore(&stage);
    tracking(&stage);
}
