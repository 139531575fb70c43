//! A virtual machine made of Debian packages (`scripts/guest-image`), that commits numbered
//! transactions in PostgreSQL and says so on its console. QEMU emulates its processor.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use libreplica::machine::{
    Accelerator, ConsoleEnd, Launch, MachineDefinition, Networks, Source, qemu_arguments,
};

use super::place::{Place, run, until};

/// A boot takes some 20 s of a processor, which tests may have to share.
pub const BOOT_LIMIT: Duration = Duration::from_secs(400);

/// The disks of the guest: its own, and one for PostgreSQL's write-ahead log.
pub fn guest_disks(place: &Place) -> [PathBuf; 2] {
    let disks = [place.at("root.raw"), place.at("wal.raw")];
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/guest-image");
    run(script, &disks);
    disks
}

/// QEMU, which `scripts/vm` has, installed or not.
pub fn qemu() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/vm");
        run(script, ["qemu"]).trim().into()
    })
}

/// A guest that runs; killed when dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    input: ChildStdin,
    said: Arc<Mutex<String>>,
    /// Where in what it said [`Guest::hears`] has got to.
    heard: usize,
}

impl Guest {
    /// Switches the machine on.
    pub fn start(place: &Place, machine: &MachineDefinition, disks: &[Source]) -> Self {
        let control = place.at("guest.control");
        let launch = Launch {
            machine,
            disks,
            networks: Networks::Recovery,
            accelerator: Accelerator::Tcg,
            console: ConsoleEnd::Stdio,
            control: &control,
            agent: None,
            forward: None,
            uefi: None,
        };
        let mut child = Command::new(qemu())
            .args(qemu_arguments(&launch).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = child.stdout.take().unwrap();
        let said = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&said);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = out.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
                into.lock().unwrap().push_str(&text);
            }
        });
        Self {
            input: child.stdin.take().unwrap(),
            child,
            said,
            heard: 0,
        }
    }

    /// All that it has said.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Types a line on its console.
    pub fn tell(&mut self, line: &str) {
        self.input
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
    }

    /// Waits for a line that begins with `word`, behind the one that was heard last; gives the rest
    /// of it.
    pub fn hears(&mut self, word: &str) -> String {
        let begin = format!("{word} ");
        let (at, rest) = until(word, BOOT_LIMIT, || {
            if let Some(ended) = self.child.try_wait().unwrap() {
                panic!("the guest is off, {ended}: {}", self.said());
            }
            let said = self.said();
            let mut at = self.heard;
            said[at..].split_inclusive('\n').find_map(|line| {
                at += line.len();
                let plain = line.ends_with('\n').then(|| line.trim_end())?;
                let same = plain == word || plain.starts_with(&begin);
                same.then(|| (at, plain[word.len()..].trim().to_owned()))
            })
        });
        self.heard = at;
        rest
    }

    /// The last number that it has said to be committed; 0 if none.
    pub fn committed(&self) -> u64 {
        last_committed(&self.said())
    }

    /// Waits until it has said so of `number`.
    pub fn commits(&mut self, number: u64) {
        until(&format!("commit {number}"), BOOT_LIMIT, || {
            assert!(self.child.try_wait().unwrap().is_none(), "{}", self.said());
            (self.committed() >= number).then_some(())
        });
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let said = self.said();
            let last: Vec<&str> = said.lines().rev().take(20).collect();
            eprintln!("the guest said last:");
            last.iter().rev().for_each(|line| eprintln!("  {line}"));
        }
    }
}

/// The last of the lines `committed N`; 0 if there is none.
pub fn last_committed(said: &str) -> u64 {
    let whole = said.rfind('\n').map_or("", |end| &said[..end]);
    let numbers = whole.lines().rev();
    let mut numbers =
        numbers.filter_map(|line| line.trim().strip_prefix("committed ")?.parse().ok());
    numbers.next().unwrap_or(0)
}

/// What PostgreSQL had when the guest that said `said` was up: how many numbers, and the last.
#[track_caller]
pub fn recovered(said: &str) -> (u64, u64) {
    let mut lines = said
        .lines()
        .filter_map(|line| line.trim().strip_prefix("recovered "));
    let line = lines
        .next()
        .unwrap_or_else(|| panic!("nothing recovered: {said}"));
    let (count, last) = line.split_once(' ').unwrap();
    (count.parse().unwrap(), last.parse().unwrap())
}

/// PATH, with QEMU in it.
pub fn path_with_qemu() -> String {
    let folder = qemu().parent().unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{}:{path}", folder.display())
}
