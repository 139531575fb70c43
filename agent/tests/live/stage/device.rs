//! Block devices and mounts that are ours alone, and go with their guard.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::place::{Place, run};

/// A loop device over a sparse file.
#[derive(Debug)]
pub struct LoopDevice {
    device: PathBuf,
    file: PathBuf,
    attached: bool,
}

impl LoopDevice {
    /// A device of `bytes`, over a new file `name` in `place`.
    pub fn new(place: &Place, name: &str, bytes: u64) -> Self {
        Self::with(place, name, bytes, &[])
    }

    /// The same under a number that `losetup --find` gives to nobody else, so that the device can be
    /// detached and put back while other tests attach theirs.
    pub fn of_its_own(place: &Place, name: &str, bytes: u64) -> Self {
        let file = place.at(name);
        File::create(&file).unwrap().set_len(bytes).unwrap();
        let device = (200..250)
            .map(|number| (number, PathBuf::from(format!("/dev/loop{number}"))))
            .find(|(number, device)| {
                if !device.exists() {
                    let (major, minor) = ("7", number.to_string());
                    let node = device.to_str().unwrap();
                    quietly("mknod", &["-m", "660", node, "b", major, &minor]);
                }
                let (device, file) = (device.to_str().unwrap(), file.to_str().unwrap());
                quietly("losetup", &[device, file])
            });
        let device = device.unwrap().1;
        // The number may have been made read-only, which outlives what was attached to it.
        quietly("blockdev", &["--setrw", device.to_str().unwrap()]);
        Self {
            device,
            file,
            attached: true,
        }
    }

    /// The same with more options for losetup: `["--sector-size", "4096"]`.
    pub fn with(place: &Place, name: &str, bytes: u64, options: &[&str]) -> Self {
        let file = place.at(name);
        File::create(&file).unwrap().set_len(bytes).unwrap();
        Self::over(&file, options)
    }

    /// A device over a file that is there.
    pub fn over(file: &Path, options: &[&str]) -> Self {
        let mut args = vec!["--find", "--show"];
        args.extend(options);
        args.push(file.to_str().unwrap());
        let device = PathBuf::from(run("losetup", args).trim());
        delete_partitions(&device);
        Self {
            device,
            file: file.to_owned(),
            attached: true,
        }
    }

    /// `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The file under it.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Its base name: what a volume on it is called unless told otherwise.
    pub fn name(&self) -> &str {
        self.device.file_name().unwrap().to_str().unwrap()
    }

    /// A partition `number` of `sectors` at sector `start`, as its device.
    pub fn add_partition(&self, number: u32, start: u64, sectors: u64) -> PathBuf {
        let numbers = [u64::from(number), start, sectors].map(|n| n.to_string());
        let [number, start, sectors] = &numbers;
        run(
            "addpart",
            [self.device.to_str().unwrap(), number, start, sectors],
        );
        let name = format!("{}p{number}", self.name());
        let node = PathBuf::from(format!("/dev/{name}"));
        if !node.exists() {
            // Without udev nobody makes the node.
            let text = fs::read_to_string(format!("/sys/class/block/{name}/dev")).unwrap();
            let (major, minor) = text.trim().split_once(':').unwrap();
            run("mknod", [node.to_str().unwrap(), "b", major, minor]);
        }
        node
    }

    /// Takes the partition away again.
    pub fn delete_partition(&self, number: u32) {
        run(
            "delpart",
            [self.device.to_str().unwrap(), &number.to_string()],
        );
        let _ = fs::remove_file(format!("/dev/{}p{number}", self.name()));
    }

    /// Detaches it from its file, as a disk that is pulled.
    pub fn detach(&mut self) {
        run("losetup", ["--detach", self.device.to_str().unwrap()]);
        self.attached = false;
    }

    /// Attaches the same file to the same number again: a disk that is put back.
    pub fn attach_again(&mut self) {
        run("losetup", [&self.device, &self.file]);
        self.attached = true;
    }

    /// Gives the device another size, through its file.
    pub fn resize(&self, bytes: u64) {
        OpenOptions::new()
            .write(true)
            .open(&self.file)
            .unwrap()
            .set_len(bytes)
            .unwrap();
        run("losetup", ["--set-capacity", self.device.to_str().unwrap()]);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if self.attached {
            delete_partitions(&self.device);
            quietly("losetup", &["--detach", self.device.to_str().unwrap()]);
        }
    }
}

/// A compressed disk in memory: bio-based, so that its requests complete as bios.
#[derive(Debug)]
pub struct Zram {
    number: String,
}

impl Zram {
    /// A new one of `bytes`.
    pub fn new(bytes: u64) -> Self {
        if !Path::new("/sys/class/zram-control").exists() {
            quietly("modprobe", &["zram", "num_devices=0"]);
        }
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").unwrap();
        let zram = Self {
            number: number.trim().to_owned(),
        };
        let size = format!("/sys/block/zram{}/disksize", zram.number);
        fs::write(size, bytes.to_string()).unwrap();
        zram
    }

    /// `/dev/zramN`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/zram{}", self.number))
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let _ = fs::write(format!("/sys/block/zram{}/reset", self.number), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", &self.number);
    }
}

/// A mounted filesystem.
#[derive(Debug)]
pub struct Mount {
    at: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Makes a filesystem `kind` (`ext4`, `xfs`, `btrfs`, `vfat`) on `device` and mounts it.
    pub fn make(kind: &str, device: &Path, at: &Path) -> Self {
        let quiet = if kind == "vfat" { None } else { Some("-q") };
        let device_text = device.to_str().unwrap();
        run(
            &format!("mkfs.{kind}"),
            quiet.into_iter().chain([device_text]),
        );
        Self::new(device, at, "defaults")
    }

    /// Mounts what is on `device`, with `options`.
    pub fn new(device: &Path, at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        run(
            "mount",
            [
                "-o",
                options,
                device.to_str().unwrap(),
                at.to_str().unwrap(),
            ],
        );
        Self {
            at: at.to_owned(),
            mounted: true,
        }
    }

    /// A filesystem in memory of `bytes`.
    pub fn memory(at: &Path, bytes: u64) -> Self {
        fs::create_dir_all(at).unwrap();
        let size = format!("size={bytes}");
        run(
            "mount",
            ["-t", "tmpfs", "-o", &size, "tmpfs", at.to_str().unwrap()],
        );
        Self {
            at: at.to_owned(),
            mounted: true,
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// A path in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    /// Mounts it anew with `options`: `ro`, `rw`.
    pub fn remount(&self, options: &str) {
        run(
            "mount",
            [
                "-o",
                &format!("remount,{options}"),
                self.at.to_str().unwrap(),
            ],
        );
    }

    /// Writes all that is dirty to the device.
    pub fn sync(&self) {
        run("sync", ["-f", self.at.to_str().unwrap()]);
    }

    /// Freezes it as somebody else would.
    pub fn freeze(&self) {
        run("fsfreeze", ["--freeze", self.at.to_str().unwrap()]);
    }

    /// Thaws it; whether it was frozen.
    pub fn thaw(&self) -> bool {
        quietly("fsfreeze", &["--unfreeze", self.at.to_str().unwrap()])
    }

    /// Unmounts it. What a process that was just killed had open is let go of a moment
    /// later.
    pub fn unmount(mut self) {
        let at = self.at.to_str().unwrap();
        let soon = Instant::now() + Duration::from_secs(5);
        while Instant::now() < soon && !quietly("umount", &[at]) {
            std::thread::sleep(Duration::from_millis(50));
        }
        if quietly("mountpoint", &["-q", at]) {
            run("umount", [&self.at]);
        }
        self.mounted = false;
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            self.thaw();
            let at = self.at.to_str().unwrap();
            if !quietly("umount", &[at]) {
                quietly("umount", &["--lazy", at]);
            }
        }
    }
}

/// Runs a command whose failure is no failure of the test.
/// Deletes the partitions that a loop device has. They outlive what it was attached to, so a
/// new one may also have those of a test that was killed.
fn delete_partitions(device: &Path) {
    quietly("partx", &["--delete", device.to_str().unwrap()]);
    for number in 1..5 {
        // A node that was made by hand.
        let _ = fs::remove_file(format!("{}p{number}", device.display()));
    }
}

fn quietly(program: &str, args: &[&str]) -> bool {
    let output = Command::new(program).args(args).output();
    output.is_ok_and(|output| output.status.success())
}
