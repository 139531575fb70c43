//! What a volume takes in its store, how much that can become, and who keeps room from being
//! given back. All is known from the catalogue, the names in the folder, and the kernel's list of
//! locks: no log is opened, and no lease is touched, so that this may be asked at any time.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirEntryExt, MetadataExt};

use hrl_format::id::PointId;
use hrl_format::units::ByteLen;

use super::catalogue::{Catalogue, LogEntry};
use super::compact::Waiting;
use super::held::durable_leases;
use super::layout::VolumeFolder;
use super::reader::VolumeReader;
use super::writer::VolumeWriter;
use crate::error::Result;

/// What a log takes besides what it says: header, sections, trailer, and what these are rounded to.
const PAGES: u64 = 24 << 10;

/// What a volume takes in its store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Space {
    /// The base: what the image occupies; with a key, its logs.
    pub base: ByteLen,
    /// The logs over the base.
    pub logs: ByteLen,
    /// Logs that are not needed any more, and wait for readers that began before that.
    pub retired: ByteLen,
    /// Logs that are being written.
    pub incoming: ByteLen,
    /// What waits for compaction; part of `base` and `logs`.
    pub waiting: Waiting,
    /// What `base`, `logs` and `retired` come to at most, as long as nothing is written: twice
    /// what the base and each point say, what waits for compaction, and the logs of windows
    /// and behind the newest point as they are.
    pub bound: ByteLen,
    /// Who keeps room from being given back.
    pub holders: Vec<Holder>,
}

/// Somebody who keeps room from being given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The point that stays for his sake; `None`: logs of an older state of the chain, or, where it
    /// cannot be told what a branch stands on, every point.
    pub point: Option<PointId>,
    /// Who: a process, or the folder of a branch.
    pub by: String,
}

impl VolumeReader {
    /// What the volume takes in the store now.
    ///
    /// # Errors
    /// As [`VolumeReader::catalogue`].
    pub fn space(&self) -> Result<Space> {
        Ok(space(&self.folder, &self.catalogue()?))
    }
}

impl VolumeWriter {
    /// What the volume takes in the store now.
    pub fn space(&self) -> Space {
        space(&self.folder, &self.catalogue)
    }
}

fn space(folder: &VolumeFolder, catalogue: &Catalogue) -> Space {
    let (base_logs, logs) = catalogue.base_and_chain();
    let image = fs::metadata(folder.base()).map_or(0, |image| image.blocks() * 512);
    let retired = catalogue.retired.iter().map(|retired| &retired.entry);
    // The catalogue may list some that are gone already.
    let retired = retired.filter(|log| folder.log(&log.name()).exists());
    let retired = bytes(retired);
    Space {
        base: ByteLen::new(image + bytes(base_logs)),
        logs: ByteLen::new(bytes(logs)),
        retired: ByteLen::new(retired),
        incoming: ByteLen::new(incoming(folder)),
        waiting: catalogue.waiting(),
        bound: ByteLen::new(catalogue.bound() + retired),
        holders: holders(folder, catalogue),
    }
}

fn bytes<'a>(logs: impl IntoIterator<Item = &'a LogEntry>) -> u64 {
    logs.into_iter().map(|log| log.bytes.get()).sum()
}

/// Files come and go there while this looks.
fn incoming(folder: &VolumeFolder) -> u64 {
    let Ok(entries) = fs::read_dir(folder.incoming()) else {
        return 0;
    };
    let sizes = entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
    sizes.sum()
}

impl Catalogue {
    /// The logs of the base, where that is no image, and those over it.
    fn base_and_chain(&self) -> (&[LogEntry], &[LogEntry]) {
        let base = self.base.filter(|_| self.key.is_some());
        let of_base = |log: &LogEntry| base.is_some_and(|base| log.last <= base.epoch);
        let split = self.logs.partition_point(of_base);
        self.logs.split_at(split)
    }

    /// What base and logs come to at most when nothing waits for compaction, and what does.
    fn bound(&self) -> u64 {
        let image = match (self.base, self.key) {
            (Some(base), None) => base.size.get().max(self.size.get()),
            _ => 0,
        };
        let mut bound = image + bytes(&self.logs) + self.waiting().bytes.get();
        for stretch in self.stretches() {
            let logs = &self.logs[stretch];
            let says: u64 = logs.iter().map(|log| log.covers.get()).sum();
            let size = logs.iter().map(|log| log.size.get()).max().unwrap_or(0);
            // In place of what it takes now.
            bound -= bytes(logs);
            bound += 2 * says.min(size) + PAGES * logs.len() as u64;
        }
        bound
    }
}

/// Who holds points, and older states of the chain.
fn holders(folder: &VolumeFolder, catalogue: &Catalogue) -> Vec<Holder> {
    let current = format!("view-{}", catalogue.view);
    let leases = folder.leases();
    let locks = fs::metadata(&leases).map_or_else(|_| HashMap::new(), |of| locks(of.dev()));
    let mut holders = Vec::new();
    for entry in fs::read_dir(leases).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| *name != current) else {
            continue;
        };
        for &process in locks.get(&entry.ino()).into_iter().flatten() {
            holders.push(Holder {
                point: name.parse().ok(),
                by: named(process),
            });
        }
    }
    match durable_leases(folder) {
        Ok(held) => holders.extend(held.into_iter().map(|held| Holder {
            point: Some(held.point),
            by: format!("branch {}", held.by.display()),
        })),
        // Then everything is held.
        Err(error) => holders.push(Holder {
            point: None,
            by: error.to_string(),
        }),
    }
    holders.sort_by(|a, b| (a.point, &a.by).cmp(&(b.point, &b.by)));
    holders
}

/// The processes that hold a lock by flock on this filesystem, by inode; as far as this process
/// may know. Some filesystems (btrfs) go by another number there, and tell nothing.
fn locks(device: u64) -> HashMap<u64, Vec<u32>> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let device = format!("{major:02x}:{minor:02x}");
    let mut locks: HashMap<u64, Vec<u32>> = HashMap::new();
    let text = fs::read_to_string("/proc/locks").unwrap_or_default();
    for line in text.lines() {
        // `12: FLOCK  ADVISORY  READ  4711 fd:01:131073 0 EOF`
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["FLOCK", _, _, process, file, ..] = words.get(1..).unwrap_or_default()
            && let Ok(process) = process.parse()
            && let Some((at, inode)) = file.rsplit_once(':')
            && let (true, Ok(inode)) = (at == device, inode.parse())
        {
            locks.entry(inode).or_default().push(process);
        }
    }
    locks
}

fn named(process: u32) -> String {
    match fs::read_to_string(format!("/proc/{process}/comm")) {
        Ok(name) => format!("process {process} ({})", name.trim()),
        Err(_) => format!("process {process}"),
    }
}
