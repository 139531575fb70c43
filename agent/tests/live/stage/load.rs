//! Loads that know what they wrote: a database that counts its own transactions, and fio,
//! which reads back and checks what it wrote.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use super::place::{Place, run};

/// SQLite transactions without end, each raising a counter and booking its number in a
/// ledger, so that the two agree in every state a database may be found in.
#[derive(Debug)]
pub struct Bank {
    acknowledged: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Transactions of one call to sqlite3.
const BATCH: u64 = 5;
const FILE: &str = "bank.db";

impl Bank {
    /// Opens one in `folder` and keeps it busy.
    pub fn open(folder: &Path) -> Self {
        let database = folder.join(FILE);
        ask(
            &database,
            "PRAGMA journal_mode = WAL;
             CREATE TABLE counter (n INTEGER); INSERT INTO counter VALUES (0);
             CREATE TABLE ledger (n INTEGER PRIMARY KEY, note BLOB);",
        );
        Self::run(database, 0)
    }

    /// Goes on with the one in `folder`.
    #[allow(dead_code, reason = "of use where a machine starts again")]
    pub fn resume(folder: &Path) -> Self {
        let database = folder.join(FILE);
        let last = ask(&database, "SELECT n FROM counter");
        Self::run(database, last.trim().parse().unwrap())
    }

    fn run(database: PathBuf, last: u64) -> Self {
        let acknowledged = Arc::new(AtomicU64::new(last));
        let stop = Arc::new(AtomicBool::new(false));
        let (count, ended) = (Arc::clone(&acknowledged), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let transaction = "BEGIN; UPDATE counter SET n = n + 1;
                INSERT INTO ledger SELECT n, randomblob(500) FROM counter; COMMIT;";
            let batch = transaction.repeat(BATCH as usize);
            while !ended.load(Ordering::Relaxed) {
                ask(&database, &format!("PRAGMA synchronous = FULL; {batch}"));
                count.fetch_add(BATCH, Ordering::SeqCst);
            }
        });
        Self {
            acknowledged,
            stop,
            thread: Some(thread),
        }
    }

    /// The last transaction that is durable.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    /// Ends the load; gives the last transaction.
    pub fn close(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.acknowledged()
    }

    /// Checks the database in `folder`; gives its last transaction.
    #[track_caller]
    pub fn check(folder: &Path, place: &Place) -> u64 {
        // A copy, for SQLite replays its log by writing.
        let copy = place.folder("bank");
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with(FILE) {
                fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
            }
        }
        let database = copy.join(FILE);
        assert_eq!(ask(&database, "PRAGMA integrity_check").trim(), "ok");
        let counter = ask(&database, "SELECT n FROM counter")
            .trim()
            .parse()
            .unwrap();
        let ledger = ask(
            &database,
            "SELECT count(*) || ' ' || ifnull(max(n), 0) FROM ledger",
        );
        assert_eq!(
            ledger.trim(),
            format!("{counter} {counter}"),
            "ledger and counter disagree"
        );
        fs::remove_dir_all(copy).unwrap();
        counter
    }
}

impl Drop for Bank {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ask(database: &Path, sql: &str) -> String {
    run("sqlite3", [database.to_str().unwrap(), sql])
}

/// fio in the background, writing at random and verifying what it wrote, until stopped.
#[derive(Debug)]
pub struct Fio {
    child: Child,
    report: PathBuf,
}

impl Fio {
    /// Writes to `target`, a device or a new file of `bytes`, over and over: 4 KiB blocks in
    /// its first half, 64 KiB blocks in its second, each at most `megabytes` a second, so
    /// that two cores leave something for others.
    pub fn start(place: &Place, target: &Path, bytes: u64, megabytes: u32) -> Self {
        let half = bytes / 2;
        let target = target.display();
        let jobs = format!(
            "[global]
             filename={target}\nallow_mounted_write=1\nrw=randwrite\nrandrepeat=0\nthread=1
             direct=1\nioengine=libaio\niodepth=16\nrate={megabytes}m
             verify=crc32c\nverify_backlog=256\nverify_fatal=1\nverify_state_save=0
             time_based=1\nruntime=600\nsize={half}
             [small]\nbs=4k
             [large]\nbs=64k\noffset={half}\n"
        );
        Self::run(place, &jobs)
    }

    /// Runs these jobs, which verify what they write, until stopped.
    pub fn run(place: &Place, jobs: &str) -> Self {
        let (job_file, report) = (place.at("fio.jobs"), place.at("fio.txt"));
        fs::write(&job_file, jobs).unwrap();
        let out = fs::File::create(&report).unwrap();
        let child = Command::new("fio")
            .arg(job_file)
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap();
        Self { child, report }
    }

    /// Whether it still runs, that is, has found nothing wrong.
    #[track_caller]
    pub fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!(
                "fio ended with {status}: {}",
                fs::read_to_string(&self.report).unwrap()
            );
        }
    }

    /// Ends it; it must have found nothing wrong.
    #[track_caller]
    pub fn stop(mut self) {
        self.assert_running();
        run("kill", ["-INT", &self.child.id().to_string()]);
        self.child.wait().unwrap();
        let report = fs::read_to_string(&self.report).unwrap();
        assert!(
            !report.contains("verify:") && !report.contains("bad magic"),
            "{report}"
        );
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes mebibytes that no two times are the same, past the page cache.
#[track_caller]
pub fn write_random(device: &Path, at_mib: u64, count_mib: u64) {
    let output = format!("of={}", device.display());
    let (seek, count) = (format!("seek={at_mib}"), format!("count={count_mib}"));
    let how = ["oflag=direct", "conv=notrunc", "status=none"];
    let what = ["if=/dev/urandom", &output, "bs=1M", &seek, &count];
    run("dd", [&what[..], &how].concat());
}
