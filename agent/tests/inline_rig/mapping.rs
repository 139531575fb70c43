//! Mappings of dm, whose targets can be replaced while they are in use. There is no udev on
//! the test bench: `dmsetup` makes the nodes itself.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const SECTOR: u64 = 512;

/// A mapping; removed when dropped.
#[derive(Debug)]
pub struct Mapping {
    name: String,
    path: PathBuf,
}

impl Mapping {
    /// `lines`: the targets, as `dmsetup` takes them.
    pub fn new(name: &str, lines: &[String]) -> Self {
        load(&["create", name], lines);
        Self {
            name: name.to_owned(),
            path: PathBuf::from(format!("/dev/mapper/{name}")),
        }
    }

    /// `/dev/mapper/NAME`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Other targets from now on.
    pub fn becomes(&self, lines: &[String]) {
        load(&["reload", &self.name], lines);
        assert!(dmsetup(&["resume", &self.name]).status().unwrap().success());
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let _ = dmsetup(&["remove", "--retry", &self.name]).status();
    }
}

fn dmsetup(arguments: &[&str]) -> Command {
    let mut command = Command::new("dmsetup");
    command.env("DM_DISABLE_UDEV", "1").args(arguments);
    command
}

fn load(arguments: &[&str], lines: &[String]) {
    let mut command = dmsetup(arguments);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let table = lines.join("\n");
    let mut input = child.stdin.take().unwrap();
    input.write_all(table.as_bytes()).unwrap();
    drop(input);
    assert!(child.wait().unwrap().success(), "{table}");
}

/// A line for `len` bytes at `start` that lie on `disk` from `offset` on.
pub fn linear(start: u64, len: u64, disk: &Path, offset: u64) -> String {
    let [start, len, offset] = [start, len, offset].map(|bytes| bytes / SECTOR);
    format!("{start} {len} linear {} {offset}", disk.display())
}

/// A line for `len` bytes at `start` of which none can be read or written.
pub fn broken(start: u64, len: u64) -> String {
    format!("{} {} error", start / SECTOR, len / SECTOR)
}

/// A line for `len` bytes on `disk` that can be read, and of which no write succeeds.
pub fn unwritable(len: u64, disk: &Path) -> String {
    let len = len / SECTOR;
    format!("0 {len} flakey {} 0 0 100 1 error_writes", disk.display())
}
