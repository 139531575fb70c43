//! What is left out of the copy while it is swap, and comes back when it no longer is: a
//! real disk protected, its swap switched on and off. Needs root and BPF.
//!
//! This binary plays two parts: the tests, and the watchdog that the primary starts.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod rig;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use libreplica::ErrorKind;
use libreplica::primary::{
    Capture, PointOptions, Primary, PrimaryOptions, ProtectSpec, Siblings, watchdog,
};
use libreplica::record::Consistency;
use libreplica::store::{PointSelector, Store};
use libreplica::units::{BlockSize, ByteLen, ByteOffset};
use rig::runner::{self, Test};
use rig::{LoopDisk, MIB, Swapping, run, until};
use tempfile::TempDir;

const TESTS: &[Test] = &[
    (
        "swap_is_left_out_until_switched_off",
        swap_is_left_out_until_switched_off,
    ),
    (
        "swap_switched_off_during_a_point_undoes_it",
        swap_switched_off_during_a_point_undoes_it,
    ),
];

const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: u64 = 4096;
const DISK: u64 = 48 * MIB;
/// The swap partition, on the disk.
const SWAP: u64 = 2 * MIB;
const SWAP_END: u64 = 18 * MIB;
/// The blocks that are left out: all but the first, which has the header.
const LEFT_OUT: std::ops::Range<usize> = (SWAP + BLOCK) as usize..SWAP_END as usize;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments != ["watchdog"] {
        return runner::run(TESTS);
    }
    match watchdog::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// A protected disk full of bytes, with a swap partition. The fields are dropped in this
/// order.
struct Bench {
    primary: Arc<Primary>,
    swap: Option<Swapping>,
    partition: PathBuf,
    disk: LoopDisk,
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("replica-left-out.")
            .tempdir()
            .unwrap();
        let mut disk = LoopDisk::new(folder.path(), "disk", DISK);
        let bytes: Vec<u8> = (0..DISK / 8).flat_map(u64::to_le_bytes).collect();
        fs::write(&disk.path, bytes).unwrap();
        let partition = disk.add_partition(1, SWAP, SWAP_END - SWAP);
        let swap = Swapping::on(&partition);
        let path = |name: &str| folder.path().join(name);
        fs::create_dir(path("hooks")).unwrap();
        let primary = Primary::start(PrimaryOptions {
            state_dir: path("state"),
            run_dir: path("run"),
            hooks_dir: path("hooks"),
            hook_limit: LIMIT,
            freeze_limit: Duration::from_secs(2),
            socket_dir: path("run"),
            buffer: ByteLen::new(1 << 20),
            buffers: ByteLen::new(1 << 20),
        })
        .unwrap();
        let bench = Self {
            primary,
            swap: Some(swap),
            partition,
            disk,
            folder,
        };
        bench.protect();
        bench
    }

    fn protect(&self) {
        let spec = ProtectSpec {
            device: self.disk.path.clone(),
            store: self.folder.path().join("store"),
            name: Some("disk".to_owned()),
            // Never, as far as the test goes.
            every: Duration::from_secs(3600),
            retain: "all:24h".to_owned(),
            block: BlockSize::new(BLOCK as u32),
            key_file: None,
            group: None,
            exclude: Vec::new(),
            spool: None,
            capture: Capture::Ebpf,
            siblings: Siblings::Refuse,
        };
        self.primary.protect(spec).unwrap();
        self.primary.wait_until_replicating("disk").unwrap();
    }

    fn point(&self) {
        let options = PointOptions::default();
        self.primary.point("disk", &options, LIMIT).unwrap();
    }

    /// The disk as the newest point has it.
    fn newest(&self) -> Vec<u8> {
        let store = Store::open(&self.folder.path().join("store")).unwrap();
        let volume = store.volume(store.find("disk").unwrap(), None).unwrap();
        let point = volume.point(PointSelector::Latest).unwrap();
        let mut reader = volume.open_point(point.id).unwrap();
        let mut bytes = vec![0; DISK as usize];
        reader.read_at(ByteOffset::ZERO, &mut bytes).unwrap();
        bytes
    }

    /// The disk as it is.
    fn now(&self) -> Vec<u8> {
        fs::read(&self.disk.file).unwrap()
    }

    /// Writes past any page cache that another reads by.
    fn write(&self, offset: u64, byte: u8) {
        let disk = fs::File::options()
            .write(true)
            .open(&self.disk.path)
            .unwrap();
        disk.write_all_at(&[byte; 4096], offset).unwrap();
        disk.sync_all().unwrap();
    }

    /// Has the kernel swap out 4 MiB of a process, and waits until it has.
    fn swap_out(&self) {
        let before = self.writes_seen();
        // 21 is MADV_PAGEOUT.
        let script = "import mmap, os\n\
            memory = mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n\
            memory.write(os.urandom(4 << 20))\n\
            memory.madvise(21)\n";
        run("/usr/bin/python3", &["-c", script]);
        until(LIMIT, || self.writes_seen() > before);
        run("sync", &[&self.disk.path]);
    }

    fn writes_seen(&self) -> u64 {
        self.primary.status(Some("disk")).unwrap()[0]
            .counters
            .writes_seen
    }

    /// Bytes that verify compared; none may differ.
    fn verified(&self) -> u64 {
        let summary = self.primary.verify("disk").unwrap();
        assert_eq!(summary.bytes_differing, 0, "{summary:?}");
        summary.bytes_compared
    }

    fn dirty_bytes(&self) -> u64 {
        self.primary.status(Some("disk")).unwrap()[0].dirty_bytes
    }

    fn hook(&self) -> PathBuf {
        self.folder.path().join("hooks/swap")
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.primary.unprotect("disk");
        self.primary.stop();
    }
}

fn assert_same(a: &[u8], b: &[u8]) {
    let differs = (0..DISK).step_by(4096).find(|&at| {
        let page = at as usize..at as usize + 4096;
        a[page.clone()] != b[page]
    });
    assert_eq!(differs, None, "the first page that differs");
}

fn swap_is_left_out_until_switched_off() {
    let mut bench = Bench::new();
    let before = bench.now();
    let mut expected = before.clone();
    let header = SWAP as usize..SWAP as usize + 4096;
    assert!(expected[header].ends_with(b"SWAPSPACE2"));
    expected[LEFT_OUT].fill(0);
    assert_same(&bench.newest(), &expected);
    assert_eq!(bench.verified(), DISK - LEFT_OUT.len() as u64);

    // What is swapped out is neither shipped nor waited for; what lies beside it is.
    bench.swap_out();
    assert!(bench.now()[LEFT_OUT] != before[LEFT_OUT]);
    assert_eq!(bench.dirty_bytes(), 0);
    bench.write(SWAP_END, 2);
    assert_eq!(bench.dirty_bytes(), BLOCK);
    bench.point();
    expected[SWAP_END as usize..][..4096].fill(2);
    assert_same(&bench.newest(), &expected);

    drop(bench.swap.take());
    bench.point();
    assert_same(&bench.newest(), &bench.now());
    assert_eq!(bench.verified(), DISK);

    // On again, it keeps in the image what it had, and is not looked at.
    let before = bench.now();
    bench.swap = Some(Swapping::over(&bench.partition));
    bench.swap_out();
    bench.point();
    assert_same(&bench.newest(), &before);
    assert_eq!(bench.verified(), DISK - LEFT_OUT.len() as u64);
}

fn swap_switched_off_during_a_point_undoes_it() {
    let bench = Bench::new();
    let disk = bench.partition.display();
    let then = [
        // It could be a filesystem by now.
        format!("swapoff {disk}"),
        // The same to whoever looks only now and then.
        format!("swapoff {disk} && swapon {disk}"),
    ];
    for (commands, byte) in then.iter().zip(4..) {
        let before = bench.newest();
        let script = format!("#!/bin/sh\ntest $1 = post || {{ {commands}; }}\n");
        fs::write(bench.hook(), script).unwrap();
        fs::set_permissions(bench.hook(), fs::Permissions::from_mode(0o755)).unwrap();
        bench.write(SWAP_END, byte);
        let options = PointOptions {
            minimum: Some(Consistency::Application),
            label: String::new(),
        };
        let error = bench.primary.point("disk", &options, LIMIT).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::State, "{error}");
        assert!(error.to_string().contains("swap was switched"), "{error}");
        assert_same(&bench.newest(), &before);
        fs::remove_file(bench.hook()).unwrap();
        // On for the second time round.
        if byte == 4 {
            bench.point();
            assert_same(&bench.newest(), &bench.now());
            run("swapon", &[&bench.partition]);
            bench.point();
        }
    }
    bench.point();
    assert_eq!(bench.newest()[SWAP_END as usize], 5);
}
