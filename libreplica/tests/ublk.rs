//! The ublk front on a kernel that has the driver: what users write is on the disk, in the
//! backlog, and comes back; whoever serves them may be killed, may fail, may go for good. On
//! the test bench only (`scripts/vm-test`).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod devices;
#[path = "rig/runner.rs"]
mod runner;
mod ublk_rig;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use devices::{Loop, MIB, Mounted, Random, open_direct, run};
use libreplica::ErrorKind;
use libreplica::capture::inline::{Change, Service};
use libreplica::capture::ublk::{How, Started, State, UblkDevice, UblkSpec};
use libreplica::geometry::BlockNumber;
use libreplica::sys::memory::AlignedMemory;
use ublk_rig::{
    CUT_SHORT, Fio, Front, SERVE, Server, VOLUME, climb, content, cut_short, flushes, newer_than,
    replay, serve, spec, take_all, wait,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, disk, folder] = &arguments[..]
        && role == SERVE
    {
        serve(Path::new(disk), Path::new(folder));
        return ExitCode::SUCCESS;
    }
    if let [_, role, number, queues] = &arguments[..]
        && role == CUT_SHORT
    {
        cut_short(number.parse().unwrap(), queues.parse().unwrap());
    }
    runner::run_on_the_bench(&[
        (
            "without_the_driver_it_is_said_what_to_do",
            without_the_driver_it_is_said_what_to_do,
        ),
        (
            "each_request_arrives_as_it_was_made",
            each_request_arrives_as_it_was_made,
        ),
        (
            "what_fio_writes_is_on_the_disk_and_in_the_backlog",
            what_fio_writes_is_on_the_disk_and_in_the_backlog,
        ),
        ("a_database_on_ext4_is_sound", a_database_on_ext4_is_sound),
        (
            "users_wait_for_the_next_process",
            users_wait_for_the_next_process,
        ),
        (
            "killed_ten_times_under_load_nothing_is_lost",
            killed_ten_times_under_load_nothing_is_lost,
        ),
        (
            "a_takeover_that_was_cut_short_harms_nobody_else",
            a_takeover_that_was_cut_short_harms_nobody_else,
        ),
        (
            "a_thread_that_fails_is_replaced",
            a_thread_that_fails_is_replaced,
        ),
        (
            "removed_under_load_users_get_errors",
            removed_under_load_users_get_errors,
        ),
        (
            "what_the_disk_refuses_reaches_the_writer_and_not_the_backlog",
            what_the_disk_refuses_reaches_the_writer_and_not_the_backlog,
        ),
    ])
}

fn load_driver() {
    run("modprobe", &["ublk_drv"]);
}

fn aligned(fill: u8, len: usize) -> AlignedMemory {
    let mut memory = AlignedMemory::new(len).unwrap();
    memory.as_mut_slice().fill(fill);
    memory
}

fn without_the_driver_it_is_said_what_to_do() {
    let _ = Command::new("rmmod").arg("ublk_drv").output();
    let disk = Loop::new(MIB);
    let folder = tempfile::tempdir().unwrap();
    let (service, _) = Service::start(&spec(&disk.path, folder.path())).unwrap();
    let refused = UblkDevice::start(service.entrance(), &UblkSpec::new(VOLUME)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Kernel);
    let said = refused.to_string();
    assert!(said.contains("modprobe ublk_drv"), "{said}");
    assert!(said.contains("--capture nbd"), "{said}");
    load_driver();
}

fn each_request_arrives_as_it_was_made() {
    load_driver();
    let disk = Loop::with(64 * MIB, &["--sector-size", "4096"]);
    let front = Front::new(&disk.path);
    let node = front.node().to_str().unwrap();
    let asked = |what: &str| run("blockdev", &[what, node]).parse::<u64>().unwrap();
    assert_eq!(asked("--getsize64"), 64 * MIB);
    assert_eq!(asked("--getss"), 4096);
    let status = front.device().status();
    assert_eq!(status.state, State::Serving);
    assert_eq!(status.has_zero_copy(), newer_than(6, 15));

    let before = flushes(&disk.path);
    let plain = open_direct(front.node());
    plain
        .write_all_at(aligned(1, 8192).as_slice(), 4096)
        .unwrap();
    assert_eq!(flushes(&disk.path), before, "nobody asked for a flush");
    let mut options = OpenOptions::new();
    let forced = options
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_DSYNC)
        .open(front.node())
        .unwrap();
    forced
        .write_all_at(aligned(2, 4096).as_slice(), 65536)
        .unwrap();
    let after_forced = flushes(&disk.path);
    assert!(after_forced > before, "a forced write is one for the disk");
    plain.sync_all().unwrap();
    assert!(flushes(&disk.path) > after_forced, "a flush is one, too");
    // A discard, zeroes that may be freed, zeroes that may not.
    run("blkdiscard", &["-o", "1048576", "-l", "1048576", node]);
    run("blkdiscard", &["-z", "-o", "4194304", "-l", "8192", node]);
    run(
        "fallocate",
        &["--zero-range", "-o", "8388608", "-l", "4096", node],
    );
    let mut read = AlignedMemory::new(16384).unwrap();
    plain.read_exact_at(read.as_mut_slice(), 0).unwrap();
    assert!(read.as_slice()[..4096].iter().all(|byte| *byte == 0));
    assert!(read.as_slice()[4096..12288].iter().all(|byte| *byte == 1));
    // What is recorded is copied.
    let uncopied = front.device().status().uncopied;
    assert_eq!(
        (uncopied.reads > 0, uncopied.writes),
        (newer_than(6, 15), 0)
    );

    let entries = take_all(front.service());
    let seen: Vec<_> = entries
        .iter()
        .map(|entry| {
            let kind = match entry.change {
                Change::Write(_) => 'w',
                Change::Zeroes => 'z',
                Change::Discard => 'd',
            };
            (kind, entry.extent.offset().get(), entry.extent.len().get())
        })
        .collect();
    let expected = [
        ('w', 4096, 8192),
        ('w', 65536, 4096),
        ('d', MIB, MIB),
        ('z', 4 * MIB, 8192),
        ('z', 8 * MIB, 4096),
    ];
    assert_eq!(seen, expected);
}

fn what_fio_writes_is_on_the_disk_and_in_the_backlog() {
    load_driver();
    let disk = Loop::new(48 * MIB);
    what_fio_writes(&disk.path, 48 * MIB);
    // And on the test bench's virtio disk, which others have written to.
    run("blkdiscard", &["-f", "-z", "/dev/vda"]);
    what_fio_writes(Path::new("/dev/vda"), 256 * MIB);
}

fn what_fio_writes(disk: &Path, size: u64) {
    let front = Front::new(disk);
    let node = front.node();
    // Of a quarter of the device each, where nobody else writes.
    let loads: [&[&str]; 4] = [
        &["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=8m"],
        &[
            "--rw=randwrite",
            "--bsrange=512-192k",
            "--bs_unaligned=0",
            "--blockalign=512",
            "--iodepth=16",
            "--offset=12m",
            "--size=12m",
        ],
        &[
            "--rw=randwrite",
            "--bs=8k",
            "--sync=dsync",
            "--fsync=16",
            "--iodepth=4",
            "--offset=24m",
            "--size=4m",
        ],
        &[
            "--rw=randtrimwrite",
            "--bs=64k",
            "--iodepth=4",
            "--offset=36m",
            "--size=8m",
        ],
    ];
    let mut running: Vec<_> = loads
        .iter()
        .map(|arguments| Fio::new(node, arguments).spawn())
        .collect();
    for child in &mut running {
        assert!(wait(child, Duration::from_secs(120)).success());
    }
    let entries = take_all(front.service());
    assert!(entries.is_sorted_by_key(|entry| entry.time));
    let mut image = vec![0; size as usize];
    replay(&mut image, &entries);
    assert!(image == content(disk), "the backlog is another image");
    assert!(image == content(node), "users read something else");
    assert!(entries.iter().any(|entry| entry.change == Change::Discard));
    assert_eq!(front.device().status().failures, 0);
}

fn a_database_on_ext4_is_sound() {
    load_driver();
    let disk = Loop::new(64 * MIB);
    let front = Front::new(&disk.path);
    run("mkfs.ext4", &["-q", front.node().to_str().unwrap()]);
    let mounted = Mounted::new(front.node());
    let database = mounted.at.join("db");
    let mut script = String::from(
        "PRAGMA journal_mode=DELETE; PRAGMA synchronous=FULL; CREATE TABLE t(n INTEGER, b BLOB);\n",
    );
    for n in 0..60 {
        script.push_str(&format!(
            "INSERT INTO t VALUES ({n}, randomblob({}));\n",
            100 + n * 97
        ));
    }
    script.push_str("PRAGMA integrity_check; SELECT count(*) FROM t;");
    let said = run("sqlite3", &[database.to_str().unwrap(), &script]);
    assert!(said.ends_with("ok\n60"), "{said}");
    drop(mounted);
    let mut image = vec![0; 64 * MIB as usize];
    replay(&mut image, &take_all(front.service()));
    assert!(image == content(&disk.path));
    drop(front);
    run("e2fsck", &["-fn", disk.name()]);
}

fn users_wait_for_the_next_process() {
    load_driver();
    let disk = Loop::new(16 * MIB);
    let mut front = Front::new(&disk.path);
    let number = front.device().status().number;
    let node = front.node().to_owned();
    front.device().stop(How::Detach).unwrap();
    assert_eq!(front.device().status().state, State::Waiting);
    let writer = std::thread::spawn(move || {
        let device = open_direct(&node);
        device
            .write_all_at(aligned(3, 4096).as_slice(), 8192)
            .unwrap();
        device.sync_all().unwrap();
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(!writer.is_finished(), "there is nobody to write to");
    front.serve_again();
    assert_eq!(front.device().started(), Started::TakenOver);
    assert_eq!(front.device().status().number, number);
    writer.join().unwrap();
    assert!(content(&disk.path)[8192..12288].iter().all(|b| *b == 3));
    assert_eq!(take_all(front.service()).len(), 1);
    // While it is served, nobody else takes it.
    let mut impatient = UblkSpec::new(VOLUME);
    impatient.patience = Duration::from_millis(50);
    let second = UblkDevice::start(front.service().entrance(), &impatient).unwrap_err();
    assert_eq!(second.kind(), ErrorKind::Busy);
    // The end of the service is one of the front, too, and users wait again.
    front.service.take().unwrap().stop();
    let began = Instant::now();
    while front.device().status().state != State::Waiting {
        assert!(began.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn killed_ten_times_under_load_nothing_is_lost() {
    load_driver();
    let disk = Loop::new(48 * MIB);
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::start(&disk.path, folder.path());
    assert_eq!(server.started, "Added");
    let node = server.node.clone();
    let mut random = Random(u64::from(std::process::id()) * 7919 + 1);
    let load = |offset: &str| {
        let arguments = [
            "--rw=randwrite",
            "--bsrange=4k-32k",
            "--iodepth=32",
            "--size=16m",
            offset,
        ];
        Fio::new(&node, &arguments).spawn()
    };
    let mut kills = 0;
    let mut started = Vec::new();
    while kills < 10 {
        let mut running = [load("--offset=0"), load("--offset=24m")];
        while kills < 10
            && running
                .iter_mut()
                .all(|fio| fio.try_wait().unwrap().is_none())
        {
            std::thread::sleep(Duration::from_millis(100 + random.below(300)));
            server.kill();
            kills += 1;
            server = Server::start(&disk.path, folder.path());
            assert_eq!(server.started, "TakenOver");
            assert_eq!(server.node, node);
        }
        started.extend(running);
    }
    for fio in &mut started {
        assert!(
            wait(fio, Duration::from_secs(120)).success(),
            "fio found it"
        );
    }
    server.remove();
    // What was written is dirty, whoever served then.
    let (service, _) = Service::start(&spec(&disk.path, folder.path())).unwrap();
    let image = fs::read(&disk.file).unwrap();
    let dirty = service.pending();
    for (number, block) in image.chunks(4096).enumerate() {
        let written = block.iter().any(|byte| *byte != 0);
        assert!(!written || dirty.test(BlockNumber::new(number as u64)));
    }
    climb(&service);
}

fn a_takeover_that_was_cut_short_harms_nobody_else() {
    load_driver();
    let disk = Loop::new(16 * MIB);
    let mut front = Front::new(&disk.path);
    let number = front.device().status().number;
    let cut = |front: &Front, queues: &str| {
        front.device().stop(How::Detach).unwrap();
        let mut died = Command::new(std::env::current_exe().unwrap());
        let died = died.args([CUT_SHORT, &number.to_string(), queues]);
        assert!(!died.status().unwrap().success());
    };
    let write = |node: &Path| {
        let node = node.to_owned();
        std::thread::spawn(move || open_direct(&node).write_all_at(aligned(6, 4096).as_slice(), 0))
    };
    // Before it has fetched anything.
    cut(&front, "0");
    let writer = write(front.node());
    front.serve_again();
    assert_eq!(front.device().started(), Started::TakenOver);
    writer.join().unwrap().unwrap();
    // After it has taken one of two queues.
    assert_eq!(front.device().status().queues, 2);
    cut(&front, "1");
    let writer = write(front.node());
    std::thread::sleep(Duration::from_millis(100));
    front.serve_again();
    let written = writer.join().unwrap();
    let status = front.device().status();
    if newer_than(6, 15) {
        // The driver has got over it.
        written.unwrap();
        assert_eq!(front.device().started(), Started::TakenOver);
        assert_eq!(status.trouble, None);
    } else {
        assert!(written.is_err());
        assert_eq!(front.device().started(), Started::Added);
        let trouble = status.trouble.unwrap();
        assert!(trouble.contains("in the midst"), "{trouble}");
    }
    write(front.node()).join().unwrap().unwrap();
}

fn a_thread_that_fails_is_replaced() {
    load_driver();
    let disk = Loop::new(32 * MIB);
    let front = Front::new(&disk.path);
    let arguments = ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=24m"];
    let mut fio = Fio::new(front.node(), &arguments).spawn();
    for failures in 1..=3 {
        std::thread::sleep(Duration::from_millis(300));
        fail(&front, failures);
        assert_eq!(front.device().status().state, State::Serving);
    }
    assert!(wait(&mut fio, Duration::from_secs(120)).success());
    let mut image = vec![0; 32 * MIB as usize];
    replay(&mut image, &take_all(front.service()));
    assert!(image == content(&disk.path));
    // Again and again: it is stopped, and whoever writes gets an error.
    for failures in 4..=6 {
        fail(&front, failures);
    }
    let status = front.device().status();
    assert_eq!(status.state, State::Stopped);
    let trouble = status.trouble.unwrap();
    assert!(trouble.contains("ordered to fail"), "{trouble}");
    assert!(!front.node().exists());
}

/// Makes a thread fail, and waits until the device has got over it.
fn fail(front: &Front, failures: u32) {
    front.device().fail_a_thread();
    front.wait_until_served_after(failures);
}

fn removed_under_load_users_get_errors() {
    load_driver();
    let disk = Loop::new(64 * MIB);
    let front = Front::new(&disk.path);
    let node = front.node().to_owned();
    run("mkfs.ext4", &["-q", node.to_str().unwrap()]);
    let mounted = Mounted::new(&node);
    let file = mounted.at.join("file");
    let in_file = std::thread::spawn(move || {
        let file = fs::File::create(file).unwrap();
        (0..).find_map(|n: u64| {
            let written = file.write_all_at(&[n as u8; 4096], n % 100 * 4096);
            written.and_then(|()| file.sync_all()).err()
        })
    });
    let readers: Vec<_> = (0..4)
        .map(|part: u64| {
            let device = open_direct(&node);
            std::thread::spawn(move || {
                let mut memory = aligned(0, 65536);
                let at = (40 + part) * MIB;
                (0..).find_map(|n: u64| {
                    let place = at + n % 8 * 65536;
                    device.read_exact_at(memory.as_mut_slice(), place).err()
                })
            })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    let began = Instant::now();
    front.device().stop(How::Remove).unwrap();
    assert_eq!(front.device().status().state, State::Removed);
    assert!(in_file.join().unwrap().is_some());
    for reader in readers {
        assert!(reader.join().unwrap().is_some());
    }
    assert!(began.elapsed() < Duration::from_secs(30));
    drop(mounted);
    let chars = format!(
        "/sys/class/ublk-char/ublkc{}",
        front.device().status().number
    );
    while Path::new(&chars).exists() {
        assert!(began.elapsed() < Duration::from_secs(60), "{chars}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A dm device that is taken down in the end.
struct Mapped(&'static str);

impl Mapped {
    fn new(name: &'static str, table: &str) -> Self {
        run("dmsetup", &["create", name, "--table", table]);
        run("dmsetup", &["mknodes", name]);
        Self(name)
    }

    fn path(&self) -> std::path::PathBuf {
        fs::canonicalize(format!("/dev/mapper/{}", self.0)).unwrap()
    }

    fn becomes(&self, table: &str) {
        run("dmsetup", &["suspend", "--noflush", self.0]);
        run("dmsetup", &["load", self.0, "--table", table]);
        run("dmsetup", &["resume", self.0]);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let _ = Command::new("dmsetup")
            .args(["remove", "--force", self.0])
            .output();
    }
}

fn what_the_disk_refuses_reaches_the_writer_and_not_the_backlog() {
    load_driver();
    let disk = Loop::new(16 * MIB);
    let name = disk.name();
    let good = format!("0 32768 linear {name} 0");
    // 64 KiB from 1 MiB on fail, reads too.
    let hole = format!("0 2048 linear {name} 0\n2048 128 error\n2176 30592 linear {name} 2176");
    // Writes fail, reads do not.
    let unwritable = format!("0 32768 flakey {name} 0 0 100 1 error_writes");
    let mapped = Mapped::new("replica-ublk", &good);
    let front = Front::new(&mapped.path());
    let device = open_direct(front.node());
    let write = |fill: u8, at: u64| device.write_all_at(aligned(fill, 8192).as_slice(), at);
    write(1, MIB).unwrap();
    assert_eq!(take_all(front.service()).len(), 1);

    mapped.becomes(&hole);
    let refused = write(2, MIB + 4096).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EIO));
    write(3, 4 * MIB).unwrap();
    let entries = take_all(front.service());
    assert_eq!(entries.len(), 1, "only what the disk took: {entries:?}");
    assert_eq!(front.service().counters().failed, 1);
    // When it can be read again, what it has is in the backlog.
    mapped.becomes(&good);
    let entries = read_back(front.service());
    let Change::Write(data) = &entries[0].change else {
        panic!("{entries:?}");
    };
    assert_eq!(entries[0].extent.offset().get(), MIB + 4096);
    assert!(data[..4096].iter().all(|byte| *byte == 1));
    assert!(data[4096..].iter().all(|byte| *byte == 0));

    mapped.becomes(&unwritable);
    assert!(write(4, 8 * MIB).is_err());
    let entries = read_back(front.service());
    assert_eq!(entries.len(), 1);
    let Change::Write(data) = &entries[0].change else {
        panic!("{entries:?}");
    };
    assert!(data.iter().all(|byte| *byte == 0), "what was never written");
    mapped.becomes(&good);
    write(5, 8 * MIB).unwrap();
    drop(device);
    let image = content(&mapped.path());
    drop(front);
    assert!(image[8 * MIB as usize..][..8192].iter().all(|b| *b == 5));
}

/// What is recorded next, within some seconds.
fn read_back(service: &Service) -> Vec<libreplica::capture::inline::Entry> {
    let began = Instant::now();
    loop {
        let entries = take_all(service);
        if !entries.is_empty() {
            return entries;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "not read back");
        std::thread::sleep(Duration::from_millis(20));
    }
}
