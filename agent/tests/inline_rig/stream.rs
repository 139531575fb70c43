//! What the store has recorded: every change in its order, and the moment after it.

use std::fs;
use std::path::Path;

use super::recorder::Kind;
use super::stage::{replica, run};

/// A change in a log.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    epoch: u64,
    sequence: u64,
    kind: Kind,
    offset: u64,
    len: u64,
}

impl Record {
    /// What to restore for the state after it.
    pub fn moment(&self) -> String {
        format!("{}:{}", self.epoch, self.sequence)
    }

    /// What it changes.
    pub fn shape(&self) -> (Kind, u64, u64) {
        (self.kind, self.offset, self.len)
    }
}

/// All changes of the logs of the one volume in `store`.
pub fn of(store: &Path) -> Vec<Record> {
    let volume = fs::read_dir(store.join("volumes")).unwrap().next().unwrap();
    let logs = fs::read_dir(volume.unwrap().path().join("logs")).unwrap();
    let mut logs: Vec<_> = logs.map(|entry| entry.unwrap().path()).collect();
    // By their epochs, which their names begin with.
    logs.sort();
    let mut records = Vec::new();
    for log in logs {
        let name = log.file_name().unwrap().to_str().unwrap();
        let epoch = u64::from_str_radix(&name[..16], 16).unwrap();
        let dump = replica(&["log", "dump", "--json", log.to_str().unwrap()]).json();
        for record in dump["records"].as_array().unwrap() {
            let kind = match record["kind"].as_str().unwrap() {
                "write" => Kind::Write,
                "zeroes" => Kind::Zeroes,
                "discard" => Kind::Discard,
                _ => continue,
            };
            let number = |name: &str| record[name].as_u64().unwrap();
            records.push(Record {
                epoch,
                sequence: number("sequence"),
                kind,
                offset: number("offset"),
                len: number("length"),
            });
        }
    }
    records
}

/// A time as `restore` takes it.
pub fn rfc3339(nanoseconds: u64) -> String {
    let at = format!("@{}", nanoseconds / 1_000_000_000);
    let whole = run("date", ["-u", "-d", &at, "+%Y-%m-%dT%H:%M:%S"]);
    format!("{}.{:09}Z", whole.trim(), nanoseconds % 1_000_000_000)
}
