//! Loop devices, filesystems on them and mounts, taken down again when a test ends, passed
//! or not. All need root.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod runner;

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub const MIB: u64 = 1 << 20;

/// Runs a command to its end; its standard output. Panics with its errors if it fails.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {:?}: {}",
        args.iter().map(AsRef::as_ref).collect::<Vec<_>>(),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Whether it could be run, and succeeded.
fn try_run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> bool {
    Command::new(program)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A loop device over a sparse file.
pub struct LoopDisk {
    pub path: PathBuf,
    pub file: PathBuf,
    attached: bool,
}

impl LoopDisk {
    /// Over a new file in `folder`.
    pub fn new(folder: &Path, name: &str, bytes: u64) -> Self {
        let file = folder.join(name);
        File::create(&file).unwrap().set_len(bytes).unwrap();
        Self::over(&file)
    }

    /// The same under a number that `losetup --find` gives to nobody else, so that it can be
    /// detached and be looked at while other tests attach theirs.
    pub fn of_its_own(folder: &Path, name: &str, bytes: u64) -> Self {
        let file = folder.join(name);
        File::create(&file).unwrap().set_len(bytes).unwrap();
        let path = (150..200).map(numbered).find(|path| attach(path, &file));
        Self {
            path: path.unwrap(),
            file,
            attached: true,
        }
    }

    /// Over a file that is there.
    pub fn over(file: &Path) -> Self {
        let path = run(
            "losetup",
            &[OsStr::new("--find"), OsStr::new("--show"), file.as_os_str()],
        );
        let path = PathBuf::from(path.trim());
        delete_partitions(&path);
        Self {
            path,
            file: file.to_owned(),
            attached: true,
        }
    }

    /// Adds a partition; its device node.
    pub fn add_partition(&mut self, number: u32, start: u64, len: u64) -> PathBuf {
        let sectors = |bytes: u64| (bytes / 512).to_string();
        let disk = self.path.to_str().unwrap();
        run(
            "addpart",
            &[disk, &number.to_string(), &sectors(start), &sectors(len)],
        );
        PathBuf::from(format!("{disk}p{number}"))
    }

    pub fn mkfs(&self, kind: &str) {
        mkfs(kind, &self.path);
    }

    /// Only of [`LoopDisk::of_its_own`]: another test may take the number of any other.
    pub fn detach(&mut self) {
        run("losetup", &[OsStr::new("--detach"), self.path.as_os_str()]);
        self.attached = false;
    }

    /// Attaches the same file to the same number again.
    pub fn attach_again(&mut self) {
        assert!(attach(&self.path, &self.file));
        self.attached = true;
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if self.attached {
            delete_partitions(&self.path);
            try_run("losetup", &[OsStr::new("--detach"), self.path.as_os_str()]);
        }
    }
}

/// `/dev/loopNUMBER`; its node is made, for nothing else makes those of high numbers.
fn numbered(number: u32) -> PathBuf {
    let path = PathBuf::from(format!("/dev/loop{number}"));
    if !path.exists() {
        let number = number.to_string();
        try_run(
            "mknod",
            &["-m", "660", path.to_str().unwrap(), "b", "7", &number],
        );
    }
    path
}

fn attach(path: &Path, file: &Path) -> bool {
    let done = Command::new("losetup").args([path, file]).output();
    done.is_ok_and(|output| output.status.success())
}

/// Deletes the partitions that a loop device has. They outlive what it was attached to, so a
/// new one may also have those of a test that was killed.
fn delete_partitions(device: &Path) {
    try_run("partx", &[OsStr::new("--delete"), device.as_os_str()]);
}

pub fn mkfs(kind: &str, device: &Path) {
    let force = match kind {
        "ext4" => "-F",
        "vfat" => "-I",
        _ => "-f",
    };
    run(
        &format!("mkfs.{kind}"),
        &[OsStr::new(force), device.as_os_str()],
    );
}

/// Makes a filesystem that cannot freeze, as the EFI partition's; its type. vfat where the
/// kernel has it, else an empty erofs, written by hand.
pub fn mkfs_that_cannot_freeze(device: &Path) -> &'static str {
    try_run("modprobe", &["vfat"]);
    let kinds = std::fs::read_to_string("/proc/filesystems").unwrap();
    if kinds.lines().any(|line| line.trim() == "vfat") {
        mkfs("vfat", device);
        return "vfat";
    }
    let mut image = vec![0; 8192];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // Superblock at 1024: magic, block size 2^12, root inode 36 (at byte 36 * 32), 2 blocks.
    put(1024, &0xE0F5_E1E2_u32.to_le_bytes());
    put(1036, &[12, 0, 36, 0, 1]);
    put(1060, &2_u32.to_le_bytes());
    // The root folder's inode: mode, links, size, first block of data.
    put(1156, &0o40755_u16.to_le_bytes());
    put(1158, &2_u16.to_le_bytes());
    put(1160, &27_u32.to_le_bytes());
    put(1168, &1_u32.to_le_bytes());
    // Its two entries (inode, offset of the name, type: folder), then their names.
    put(4096, &[36, 0, 0, 0, 0, 0, 0, 0, 24, 0, 2, 0]);
    put(4108, &[36, 0, 0, 0, 0, 0, 0, 0, 25, 0, 2, 0]);
    put(4120, b"...");
    let mut node = File::options().write(true).open(device).unwrap();
    node.write_all(&image).unwrap();
    node.sync_all().unwrap();
    "erofs"
}

/// A mount, thawed and unmounted at the end.
pub struct Mounted {
    pub point: PathBuf,
}

impl Mounted {
    pub fn new(device: &Path, point: &Path) -> Self {
        std::fs::create_dir_all(point).unwrap();
        run("mount", &[device, point]);
        Self {
            point: point.to_owned(),
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        thaw(&self.point);
        // A mount namespace that another test made holds a copy of this mount, or of one
        // within it, until its last process is gone.
        for _ in 0..100 {
            if try_run("umount", &[&self.point]) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Thaws, and says whether it was frozen.
pub fn thaw(point: &Path) -> bool {
    Command::new("fsfreeze")
        .args([OsStr::new("--unfreeze"), point.as_os_str()])
        .stderr(Stdio::null())
        .status()
        .unwrap()
        .success()
}

/// A child of the test, killed (it alone) and reaped at the end.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // Not for ever: one that waits for a frozen filesystem cannot die.
        let start = Instant::now();
        while matches!(self.0.try_wait(), Ok(None)) && start.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A process in a mount namespace of its own that mounted `device` at `point` there, and
/// keeps it.
pub fn mount_in_other_namespace(device: &Path, point: &Path) -> Running {
    std::fs::create_dir_all(point).unwrap();
    let ready = point.with_extension("ready");
    let script = format!(
        "mount --make-rprivate / && mount {} {} && touch {} && exec sleep 300",
        device.display(),
        point.display(),
        ready.display()
    );
    let child = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .process_group(0)
        .spawn()
        .unwrap();
    let running = Running(child);
    until(Duration::from_secs(10), || ready.exists());
    running
}

/// Waits until it is so; panics after `limit`.
pub fn until(limit: Duration, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < limit, "did not come about in {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Swap in use, ended at the end.
pub struct Swapping {
    path: PathBuf,
}

impl Swapping {
    /// Over all of a device or file.
    pub fn on(path: &Path) -> Self {
        run("mkswap", &[path]);
        Self::over(path)
    }

    /// Over an area that `mkswap` has made.
    pub fn over(path: &Path) -> Self {
        // Before whatever else this machine has.
        let first = ["--priority".as_ref(), "32767".as_ref(), path.as_os_str()];
        run("swapon", &first);
        Self {
            path: path.to_owned(),
        }
    }
}

impl Drop for Swapping {
    fn drop(&mut self) {
        try_run("swapoff", &[&self.path]);
    }
}
