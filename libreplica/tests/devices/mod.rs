//! Block devices for tests, each made for one test and taken away when it ends, however it
//! ends: loop devices over files in memory, zram, partitions, file systems mounted on them.
//! Needs root. Numbers come from the environment where a test can be made longer.
// Each test file uses a part of it, and a panic is how a test says no.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod load;
pub mod small;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use libreplica::capture::{AttachSpec, FolderId, RoundReport, Tracker, remove_pins};
use libreplica::device::BlockDevice;
use libreplica::geometry::Geometry;
use libreplica::id::VolumeId;
use libreplica::sys::memory::AlignedMemory;
use libreplica::sys::reader::{Reader, ReaderOptions};
use libreplica::units::{BlockSize, ByteLen, ByteOffset, Extent};

pub const MIB: u64 = 1 << 20;
/// The state folder and the block size that tests use unless they say otherwise.
pub const FOLDER: FolderId = FolderId::from_bytes([7; 16]);
pub const BLOCK: BlockSize = BlockSize::MIN;

/// How many random cases a test runs: `REPLICA_CASES`, or `small`.
pub fn cases(small: u64) -> u64 {
    std::env::var("REPLICA_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(small)
}

/// A plain generator, so that a failure can be repeated from its seed.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Stops the load, or whatever else runs beside, also when a test fails.
pub struct StopAtEnd<'a>(pub &'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs a command to its end; its output, or a panic with what it said.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect(program);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

fn unique() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!(
        "{}-{}",
        std::process::id(),
        COUNT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A loop device over a sparse file in memory.
pub struct Loop {
    pub path: PathBuf,
    pub file: PathBuf,
    attached: bool,
}

impl Loop {
    pub fn new(bytes: u64) -> Self {
        Self::with(bytes, &[])
    }

    /// With more arguments for losetup.
    pub fn with(bytes: u64, arguments: &[&str]) -> Self {
        let file = PathBuf::from(format!("/dev/shm/replica-capture-{}", unique()));
        File::create(&file).unwrap().set_len(bytes).unwrap();
        let path = Self::attach(&file, arguments);
        Self {
            path,
            file,
            attached: true,
        }
    }

    /// Over a sparse file in `folder`, whose file system may be too small for all of it.
    pub fn inside(folder: &Path, bytes: u64) -> Self {
        let file = folder.join(format!("disk-{}", unique()));
        File::create(&file).unwrap().set_len(bytes).unwrap();
        Self {
            path: Self::attach(&file, &[]),
            file,
            attached: true,
        }
    }

    /// Under a number that `losetup --find` gives to nobody else, for [`Loop::attach_again`].
    pub fn of_its_own(bytes: u64) -> Self {
        let file = PathBuf::from(format!("/dev/shm/replica-capture-{}", unique()));
        File::create(&file).unwrap().set_len(bytes).unwrap();
        let mut paths = (100..150).map(|number| PathBuf::from(format!("/dev/loop{number}")));
        let path = paths.find(|path| {
            if let (false, Some(number)) = (path.exists(), path.to_str().unwrap().get(9..)) {
                let node = ["-m", "660", path.to_str().unwrap(), "b", "7", number];
                let _ = Command::new("mknod").args(node).output();
            }
            let done = Command::new("losetup").args([path, &file]).output();
            done.is_ok_and(|output| output.status.success())
        });
        Self {
            path: path.unwrap(),
            file,
            attached: true,
        }
    }

    fn attach(file: &Path, arguments: &[&str]) -> PathBuf {
        let mut all = vec!["--find", "--show"];
        all.extend(arguments);
        all.push(file.to_str().unwrap());
        // Other tests may take the free device first.
        for _ in 0..20 {
            let output = Command::new("losetup")
                .args(&all)
                .output()
                .expect("losetup");
            if output.status.success() {
                let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
                delete_partitions(&path);
                return path;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("no loop device to be had for {}", file.display());
    }

    pub fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Detaches the device and attaches the file to the same device again.
    pub fn attach_again(&mut self) {
        run("losetup", &["--detach", self.name()]);
        self.attached = false;
        run("losetup", &[self.name(), self.file.to_str().unwrap()]);
        self.attached = true;
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if self.attached {
            delete_partitions(&self.path);
            let _ = Command::new("losetup")
                .args(["--detach", self.name()])
                .status();
        }
        let _ = fs::remove_file(&self.file);
    }
}

/// Deletes the partitions that a loop device has. They outlive what it was attached to, so a
/// new one may also have those of a test that was killed.
fn delete_partitions(device: &Path) {
    let _ = Command::new("partx").arg("--delete").arg(device).output();
}

/// A zram device: compressed memory, driven by bios.
pub struct Zram {
    pub path: PathBuf,
    number: u32,
}

impl Zram {
    pub fn new(bytes: u64) -> Self {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").unwrap();
        let number = number.trim().parse().unwrap();
        let zram = Self {
            path: PathBuf::from(format!("/dev/zram{number}")),
            number,
        };
        fs::write(
            format!("/sys/block/zram{number}/disksize"),
            bytes.to_string(),
        )
        .unwrap();
        zram
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let number = self.number;
        let _ = fs::write(format!("/sys/block/zram{number}/reset"), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", number.to_string());
    }
}

/// A file system mounted on a device.
pub struct Mounted {
    pub at: PathBuf,
}

impl Mounted {
    pub fn new(device: &Path) -> Self {
        Self::with(device, "defaults")
    }

    /// With options for mount.
    pub fn with(device: &Path, options: &str) -> Self {
        let at = PathBuf::from(format!("/tmp/replica-capture-{}", unique()));
        fs::create_dir(&at).unwrap();
        let (device, folder) = (device.to_str().unwrap(), at.to_str().unwrap());
        run("mount", &["-o", options, device, folder]);
        Self { at }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).status();
        let _ = fs::remove_dir(&self.at);
    }
}

/// A disk over a file in a file system that can be frozen: then the disk's writes stay in
/// flight until it is thawed.
pub struct Slow {
    pub path: PathBuf,
    lower: Mounted,
    _disk: Loop,
}

impl Drop for Slow {
    fn drop(&mut self) {
        // Before the mount and the device below go, in the order of the fields.
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.path)
            .status();
    }
}

impl Slow {
    pub fn new(bytes: u64) -> Self {
        let disk = Loop::new(bytes * 2 + 32 * MIB);
        run("mkfs.ext4", &["-q", disk.name()]);
        let lower = Mounted::new(&disk.path);
        let file = lower.at.join("disk");
        // Allocated and written, so that writes need no transaction of their own.
        fs::write(&file, vec![0; bytes as usize]).unwrap();
        File::open(&file).unwrap().sync_all().unwrap();
        let path = Loop::attach(&file, &[]);
        Self {
            path,
            lower,
            _disk: disk,
        }
    }

    pub fn frozen<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Thaw<'a>(&'a Path);
        impl Drop for Thaw<'_> {
            fn drop(&mut self) {
                run("fsfreeze", &["--unfreeze", self.0.to_str().unwrap()]);
            }
        }
        run("fsfreeze", &["--freeze", self.lower.at.to_str().unwrap()]);
        let _thaw = Thaw(&self.lower.at);
        work()
    }
}

/// What to track, with a folder of pins of its own that goes away.
pub struct Pinned {
    pub spec: AttachSpec,
}

impl Pinned {
    pub fn new(device: &Path) -> Self {
        Self::with_block(device, BLOCK)
    }

    pub fn with_block(device: &Path, block: BlockSize) -> Self {
        let disk = BlockDevice::open(device).unwrap();
        let volume = VolumeId::random().unwrap();
        let mut spec = AttachSpec::new(FOLDER, volume, disk, block);
        spec.pins = PathBuf::from(format!("/sys/fs/bpf/replica-test-{}", unique()));
        Self { spec }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = remove_pins(&self.spec.pins, self.spec.volume, self.spec.folder);
        let _ = fs::remove_dir(&self.spec.pins);
    }
}

pub fn extent(offset: u64, len: u64) -> Extent {
    Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap()
}

pub fn open_direct(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    options.open(path).unwrap()
}

/// Writes `byte` over a range, past the page cache.
pub fn write_direct(path: &Path, offset: u64, len: usize, byte: u8) {
    let mut memory = AlignedMemory::new(len).unwrap();
    memory.as_mut_slice().fill(byte);
    open_direct(path)
        .write_all_at(&memory.as_slice()[..len], offset)
        .unwrap();
}

/// Writes `byte` over a range through the page cache, and flushes it.
pub fn write_buffered(path: &Path, offset: u64, len: usize, byte: u8) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&vec![byte; len], offset).unwrap();
    file.sync_all().unwrap();
}

/// The blocks of the next round, as starts and ends; the round is finished.
pub fn drain(tracker: &mut Tracker) -> (RoundReport, Vec<(u64, u64)>) {
    let report = tracker.swap().unwrap();
    let runs: Vec<_> = tracker
        .round()
        .runs()
        .map(|run| (run.start.get(), run.end.get()))
        .collect();
    assert_eq!(
        report.blocks,
        runs.iter().map(|(start, end)| end - start).sum::<u64>()
    );
    tracker.finish_round();
    (report, runs)
}

/// Takes one of the programs away from the kernel, which does it in its own time.
pub fn detach(pinned: &Pinned, program: &str) {
    let link = pinned.spec.pin_folder().join(format!("link_{program}"));
    fs::remove_file(link).unwrap();
}

/// Asks for what is in flight until nothing is.
pub fn wait_until_settled(tracker: &Tracker) {
    let began = Instant::now();
    while !tracker.in_flight().unwrap().is_none() {
        let passed = began.elapsed();
        assert!(
            passed < Duration::from_secs(10),
            "{:?}",
            tracker.in_flight()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A copy of a volume that is brought up to date by rounds.
pub struct Copy {
    reader: Reader,
    geometry: Geometry,
    pub bytes: Vec<u8>,
}

impl Copy {
    pub fn new(spec: &AttachSpec) -> Self {
        let disk = &spec.disk;
        let reader =
            Reader::open(disk.node(), disk.logical_sector(), ReaderOptions::default()).unwrap();
        let bytes = vec![0; disk.size().get() as usize];
        Self {
            reader,
            geometry: spec.geometry(),
            bytes,
        }
    }

    pub fn read(&mut self, extents: impl IntoIterator<Item = Extent>) {
        let mut pieces = self.reader.pieces(extents);
        while let Some((extent, piece)) = pieces.next().unwrap() {
            let at = extent.offset().get() as usize;
            self.bytes[at..at + piece.len()].copy_from_slice(piece);
        }
    }

    /// One round: swap, read what it has, finish. Says what the swap said.
    pub fn round(&mut self, tracker: &mut Tracker) -> RoundReport {
        let report = tracker.swap().unwrap();
        let geometry = self.geometry;
        let runs: Vec<_> = tracker
            .round()
            .runs()
            .map(|run| geometry.extent_of(run))
            .collect();
        self.read(runs);
        tracker.finish_round();
        report
    }

    /// Panics with the first difference from what the device has now.
    pub fn assert_same(&self, device: &Path) {
        let now = fs::read(device).unwrap();
        assert_eq!(now.len(), self.bytes.len());
        if now == self.bytes {
            return;
        }
        let block = self.geometry.block.get() as usize;
        let blocks = now.chunks(block).zip(self.bytes.chunks(block));
        let differ: Vec<_> = blocks
            .enumerate()
            .filter(|(_, (a, b))| a != b)
            .map(|(i, _)| i)
            .collect();
        panic!(
            "{} blocks differ: {:?}",
            differ.len(),
            &differ[..differ.len().min(20)]
        );
    }
}
