//! Points opened as NBD exports: from the store alone and by the daemon, read-only and with writes of
//! their own, read and written by programs that others made.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::inline::{protect, protect_as, qemu_io, restore};
use crate::stage::{Daemon, LoopDevice, MIB, Place, replica, run, until};

/// `replica open` in the foreground; killed when dropped.
struct Foreground {
    child: Child,
    uri: String,
}

impl Foreground {
    #[track_caller]
    fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_replica"))
            .arg("open")
            .args(args)
            .env("REPLICA_SOCKET", "/nonexistent/replica.sock")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut uri = String::new();
        let mut out = BufReader::new(child.stdout.as_mut().unwrap());
        out.read_line(&mut uri).unwrap();
        let opened = Self {
            child,
            uri: uri.trim_end().to_owned(),
        };
        assert!(
            opened.uri.starts_with("nbd+unix:///?socket="),
            "{args:?}: {:?}",
            opened.uri
        );
        opened
    }

    /// Ends it with SIGTERM; what it said.
    #[track_caller]
    fn end(mut self) -> String {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, Signal::SIGTERM).unwrap();
        let status = until("it ends on SIGTERM", Duration::from_secs(30), || {
            self.child.try_wait().unwrap()
        });
        let said = std::io::read_to_string(self.child.stderr.take().unwrap()).unwrap();
        assert!(status.success(), "{status}: {said}");
        said
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Foreground {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// All that an export holds, as nbdcopy reads it.
#[track_caller]
fn read_all(uri: &str, to: &Path) -> Vec<u8> {
    let to_file = to.to_str().unwrap();
    run(
        "nbdcopy",
        ["--connections=4", "--requests=32", uri, to_file],
    );
    fs::read(to).unwrap()
}

#[track_caller]
fn info(uri: &str) -> Value {
    let info = run("nbdinfo", ["--json", uri]);
    let info: Value = serde_json::from_str(&info).unwrap();
    info["exports"][0].clone()
}

/// Whether a write is refused.
#[track_caller]
fn assert_refuses_writes(uri: &str) {
    let io = Command::new("qemu-io")
        .args(["-f", "raw", "-c", "write 0 512", uri])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&io.stderr);
    assert!(
        said.contains("read-only") || said.contains("Permission"),
        "{said}"
    );
}

/// A volume of which there are two points and what lies between; the daemon has ended.
struct Stored {
    place: Place,
    store: PathBuf,
    _disk: LoopDevice,
    first: String,
    between: String,
    second: String,
}

fn stored(options: &[&str]) -> Stored {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    let uri = protect(&mut daemon, &disk, &store, options);
    qemu_io(
        &uri,
        &["write -P 1 0 1M", "write -P 2 8M 3M", "discard 9M 64k"],
    );
    let first = daemon.point("v", &[]);
    qemu_io(&uri, &["write -P 3 512k 64k", "write -P 4 63M 1M", "flush"]);
    std::thread::sleep(Duration::from_millis(5));
    let between = run("date", ["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"]);
    let between = between.trim().to_owned();
    std::thread::sleep(Duration::from_millis(5));
    qemu_io(&uri, &["write -P 5 0 2M"]);
    let second = daemon.point("v", &[]);
    daemon.terminate();
    Stored {
        place,
        store,
        _disk: disk,
        first,
        between,
        second,
    }
}

impl Stored {
    fn open(&self, socket: &str, options: &[&str]) -> Foreground {
        let socket = unix(&self.place.at(socket));
        let args = [
            "v",
            "--store",
            self.store.to_str().unwrap(),
            "--nbd",
            &socket,
        ];
        Foreground::start(&[&args[..], options].concat())
    }

    fn restored(&self, point: &str) -> Vec<u8> {
        restore(&self.store, point, &self.place.at("restored.img"))
    }
}

#[test]
fn a_state_is_read_from_the_store_alone() {
    let stored = stored(&["--every", "1h"]);
    let out = stored.place.at("out.img");
    for point in [&stored.first, &stored.between, &stored.second, "latest"] {
        let opened = stored.open("p.sock", &["--point", point, "--read-only"]);
        assert!(
            read_all(&opened.uri, &out) == stored.restored(point),
            "{point}"
        );
        let export = info(&opened.uri);
        assert_eq!(export["export-size"], 64 << 20);
        assert_eq!(export["is_read_only"], true, "{export}");
        assert_eq!(export["can_multi_conn"], true, "{export}");
        assert_refuses_writes(&opened.uri);
        // What was never written is told to be zeroes, and takes no reading.
        let map = run("nbdinfo", ["--map", "--totals", &opened.uri]);
        let data = map
            .lines()
            .find(|line| line.trim_end().ends_with("data"))
            .unwrap();
        let data: u64 = data.split_whitespace().next().unwrap().parse().unwrap();
        assert!(data < 12 << 20, "{map}");
        opened.end();
        assert!(!stored.place.at("p.sock").exists());
    }
    // Nothing of it is left in the store.
    let volumes = fs::read_dir(stored.store.join("volumes")).unwrap();
    for volume in volumes {
        assert!(!volume.unwrap().path().join("branches").exists());
    }
}

#[test]
fn a_read_only_store_is_enough_to_read() {
    let stored = stored(&["--every", "1h"]);
    let image = stored.restored("latest");
    let mount = BindMount::read_only(&stored.store, &stored.place.folder("ro"));
    let socket = unix(&stored.place.at("p.sock"));
    let store = mount.0.to_str().unwrap();
    let args = ["v", "--store", store, "--nbd", &socket, "--point", "latest"];
    let opened = Foreground::start(&[&args[..], &["--read-only"]].concat());
    assert!(read_all(&opened.uri, &stored.place.at("out.img")) == image);
    opened.end();
    let refused = replica(&[&["open"], &args[..], &["--foreground"]].concat());
    refused.fails(1, &["read-only"]);
}

/// A folder once more, where nothing can be changed.
struct BindMount(PathBuf);

impl BindMount {
    fn read_only(folder: &Path, at: &Path) -> Self {
        run("mount", [Path::new("--bind"), folder, at]);
        let mounted = Self(at.to_owned());
        run("mount", [Path::new("-o"), Path::new("remount,bind,ro"), at]);
        mounted
    }
}

impl Drop for BindMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn what_is_written_is_kept_or_discarded_and_the_point_stays() {
    let key = Place::new();
    let key_file = key.at("key");
    fs::write(&key_file, [7; 32]).unwrap();
    let key_file = key_file.to_str().unwrap();
    for options in [&[][..], &["--key-file", key_file]] {
        let stored = stored(&[&["--every", "1h"], options].concat());
        let restored = |point: &str| {
            let (store, output) = (&stored.store, stored.place.at("restored.img"));
            let args = [
                "restore",
                "v",
                "--store",
                store.to_str().unwrap(),
                "--point",
                point,
            ];
            let to = ["--output", output.to_str().unwrap(), "--force"];
            replica(&[&args[..], &to, options].concat()).ok();
            fs::read(output).unwrap()
        };
        let open = |more: &[&str]| stored.open("p.sock", &[options, more].concat());
        let out = stored.place.at("out.img");
        for point in [&stored.first, &stored.between] {
            let mut image = restored(point);
            let opened = open(&["--point", point, "--keep"]);
            write_all_kinds(&opened.uri, &mut image);
            assert!(read_all(&opened.uri, &out) == image);
            let said = opened.end();
            let branch = said.split_once("branch ").unwrap().1;
            let branch = branch.split(':').next().unwrap();
            let opened = open(&["--branch", branch]);
            assert!(read_all(&opened.uri, &out) == image);
            // Killed, it has all that was flushed.
            qemu_io(&opened.uri, &["write -P 9 30M 64k", "flush"]);
            image[30 << 20..(30 << 20) + 65536].fill(9);
            opened.kill();
            let opened = open(&["--branch", branch]);
            assert!(read_all(&opened.uri, &out) == image);
            assert!(opened.end().contains("discarded"));
            let gone = ["open", "v", "--store", stored.store.to_str().unwrap()];
            let gone = [
                &gone[..],
                &["--branch", branch, "--nbd", "unix:/x/y"],
                options,
            ]
            .concat();
            replica(&[&gone[..], &["--foreground"]].concat()).fails(1, &["no branch", branch]);
        }
        let before = restored("latest");
        let opened = open(&["--point", "latest"]);
        qemu_io(&opened.uri, &["write -P 1 0 64M", "flush"]);
        assert!(read_all(&opened.uri, &out).iter().all(|&byte| byte == 1));
        opened.end();
        assert!(restored("latest") == before);
        let check = ["store", "check", stored.store.to_str().unwrap()];
        replica(&[&check[..], options].concat()).ok();
    }
}

/// Every kind of change that there is.
fn write_all_kinds(uri: &str, image: &mut [u8]) {
    let mut fill = |from: usize, to: usize, byte| image[from << 10..to << 10].fill(byte);
    qemu_io(
        uri,
        &[
            "write -P 11 4k 8k",
            "write -f -P 12 100k 4k",
            "write -P 13 1M 4M",
            "write -z 1M 64k",
            "write -z -u 2M 64k",
            "discard 8M 512k",
            "aio_write -P 14 16M 64k",
            "aio_write -P 15 20M 1M",
            "aio_flush",
            "flush",
        ],
    );
    fill(4, 12, 11);
    fill(100, 104, 12);
    fill(1024, 5 * 1024, 13);
    fill(1024, 1088, 0);
    fill(2048, 2112, 0);
    fill(8192, 8704, 0);
    fill(16 << 10, (16 << 10) + 64, 14);
    fill(20 << 10, 21 << 10, 15);
}

#[test]
fn fio_and_a_filesystem_check_are_content() {
    let stored = stored(&["--every", "1h"]);
    let opened = stored.open("p.sock", &["--point", &stored.between]);
    let uri = format!("--uri={}", opened.uri);
    let fio = [
        "--name=t",
        "--ioengine=nbd",
        &uri,
        "--size=48M",
        "--iodepth=32",
    ];
    let verify = ["--verify=crc32c", "--do_verify=1", "--verify_fatal=1"];
    let mixed = ["--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=0"];
    for how in [&["--rw=randwrite", "--bs=4k", "--fsync=64"][..], &mixed] {
        // Two writes of one place at a time may end in either order, and fio would wait for one.
        let more = [
            "--blockalign=512",
            "--serialize_overlap=1",
            "--output-format=terse",
        ];
        let fio = Command::new("fio")
            .args([&fio[..], &verify, how, &more].concat())
            .current_dir(stored.place.folder("fio"))
            .output()
            .unwrap();
        assert!(
            fio.status.success(),
            "{}",
            String::from_utf8_lossy(&fio.stderr)
        );
    }
    let image = stored.place.at("fs.img");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let file = image.to_str().unwrap();
    run("mkfs.ext4", ["-q", "-F", file]);
    run("nbdcopy", ["--flush", file, &opened.uri]);
    let out = stored.place.at("out.img");
    assert!(read_all(&opened.uri, &out) == fs::read(&image).unwrap());
    run("e2fsck", ["-f", "-n", out.to_str().unwrap()]);
    opened.end();
}

#[test]
fn drills_see_neither_each_other_nor_what_goes_on() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 64 * MIB);
    let mut daemon = Daemon::start(&place);
    let options = ["--every", "1h", "--retain", "#2"];
    let uri = protect_as("v", &daemon, &disk, &store, &options);
    qemu_io(&uri, &["write -P 1 0 64M"]);
    let first = daemon.point("v", &[]);
    qemu_io(&uri, &["write -P 2 0 32M"]);
    let second = daemon.point("v", &[]);
    let open = |point: &str, socket: &str, more: &[&str]| {
        let socket = unix(&place.at(socket));
        let args = ["open", "v", "--point", point, "--nbd", &socket];
        let reply = daemon.replica(&[&args[..], more].concat());
        let uri = reply.ok().to_owned();
        assert_eq!(uri.lines().count(), 1, "{uri}");
        uri
    };
    let one = open(&first, "one.sock", &[]);
    let two = open(&second, "two.sock", &[]);
    let three = open(&first, "three.sock", &["--read-only"]);
    qemu_io(&one, &["write -P 11 1M 1M", "flush"]);
    qemu_io(&two, &["write -P 12 1M 1M", "flush"]);
    // Replication goes on, and retention drops what nobody has open.
    for round in 20..25 {
        qemu_io(&uri, &[&format!("write -P {round} 0 8M")]);
        daemon.point("v", &[]);
    }
    qemu_io(
        &one,
        &["read -P 11 1M 1M", "read -P 1 0 1M", "read -P 1 2M 62M"],
    );
    qemu_io(
        &two,
        &["read -P 12 1M 1M", "read -P 2 0 1M", "read -P 1 32M 32M"],
    );
    assert!(
        read_all(&three, &place.at("out.img"))
            .iter()
            .all(|&byte| byte == 1)
    );
    let points = |daemon: &Daemon| daemon.replica(&["points", "v", "--json"]).json();
    let listed = |points: &Value, id: &str| {
        let points = points["points"].as_array().unwrap();
        points.iter().any(|point| point["id"] == id)
    };
    // In the background, and with pauses.
    let limit = Duration::from_secs(30);
    let now = until("old points dropped", limit, || {
        let now = points(&daemon);
        (now["points"].as_array().unwrap().len() <= 4).then_some(now)
    });
    assert!(listed(&now, &first) && listed(&now, &second), "{now}");
    assert_eq!(now["points"].as_array().unwrap().len(), 4, "{now}");
    let status = daemon.replica(&["status", "--json"]).json();
    assert_eq!(status["open"].as_array().unwrap().len(), 3, "{status}");
    let shown = daemon.replica(&["status"]).ok().to_owned();
    assert!(
        shown.contains(&one) && shown.contains("read-only"),
        "{shown}"
    );

    // Served again after a restart, whether the daemon had time or not.
    daemon.kill();
    daemon.start_again();
    qemu_io(&one, &["read -P 11 1M 1M", "write -P 13 3M 1M"]);
    daemon.terminate();
    daemon.start_again();
    qemu_io(&one, &["read -P 13 3M 1M", "read -P 11 1M 1M"]);
    qemu_io(&two, &["read -P 12 1M 1M"]);
    assert!(
        read_all(&three, &place.at("out.img"))
            .iter()
            .all(|&byte| byte == 1)
    );
    let image = restore(&store, &first, &place.at("restored.img"));
    assert!(image.iter().all(|&byte| byte == 1));

    // One cannot be named by the volume, for there are several.
    daemon.replica(&["close", "v"]).fails(1, &["may mean"]);
    let kept = daemon.replica(&["close", &unix(&place.at("one.sock")), "--keep"]);
    kept.ok();
    let branch = kept
        .stderr
        .split_once("branch ")
        .unwrap()
        .1
        .split(':')
        .next()
        .unwrap();
    assert!(!place.at("one.sock").exists());
    let socket = unix(&place.at("again.sock"));
    let again = ["open", "v", "--branch", branch, "--nbd", &socket];
    let again = daemon.replica(&again).ok().to_owned();
    qemu_io(&again, &["read -P 13 3M 1M", "read -P 1 4M 60M"]);
    daemon.replica(&["close", branch]).ok();
    daemon
        .replica(&["close", &unix(&place.at("two.sock"))])
        .ok();
    daemon.replica(&["close", "v"]).ok();
    daemon
        .replica(&["close", "v"])
        .fails(1, &["nothing", "is open"]);
    let status = daemon.replica(&["status", "--json"]).json();
    assert_eq!(status["open"], serde_json::json!([]));
    // Now they go.
    daemon.point("v", &[]);
    until("points of closed drills dropped", limit, || {
        let now = points(&daemon);
        (!listed(&now, &first) && !listed(&now, &second)).then_some(())
    });
    daemon.replica(&["verify", "v"]).ok();
}
