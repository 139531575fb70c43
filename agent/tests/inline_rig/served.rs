//! A volume that is protected in one of the three ways, and what its users then open.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use libreplica::sys::memory::AlignedMemory;

use super::kernel_nbd::KernelNbd;
use super::stage::{Daemon, run};

/// What users open.
#[derive(Debug)]
pub enum Served {
    /// The disk itself, or the agent's ublk device.
    Node(PathBuf),
    /// The kernel's client of the agent's NBD server.
    Nbd(KernelNbd),
}

impl Served {
    /// Protects `disk` as volume `v` by `capture`: `ebpf`, `nbd` or `ublk`.
    #[track_caller]
    pub fn protect(daemon: &Daemon, disk: &Path, store: &Path, capture: &str) -> Self {
        if capture == "ublk" {
            run("modprobe", ["ublk_drv"]);
        }
        let reply = daemon.replica(&arguments(disk, store, capture));
        let said = reply.ok();
        match capture {
            "ebpf" => Self::Node(disk.to_owned()),
            "nbd" => {
                let socket = said.split_once("socket=").unwrap().1;
                Self::Nbd(KernelNbd::connect(Path::new(socket), 1))
            }
            _ => Self::Node(PathBuf::from(said)),
        }
    }

    /// The device to write to.
    pub fn path(&self) -> &Path {
        match self {
            Self::Node(path) => path,
            Self::Nbd(client) => client.path(),
        }
    }
}

/// How `disk` is asked to be protected as volume `v`, without the disks that it is made of.
pub fn arguments<'a>(disk: &'a Path, store: &'a Path, capture: &'a str) -> Vec<&'a str> {
    let (disk, store) = (disk.to_str().unwrap(), store.to_str().unwrap());
    let mut words = vec!["protect", disk, "--to", store, "--name", "v"];
    words.extend(["--every", "1h", "--capture", capture, "--wait", "--force"]);
    words
}

/// A device, past the page cache.
pub struct Direct(File);

impl Direct {
    pub fn open(path: &Path) -> Self {
        let mut options = OpenOptions::new();
        let direct = options
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_DIRECT);
        Self(direct.open(path).unwrap())
    }

    /// `len` bytes that are all `fill`, at `offset`.
    pub fn write(&self, fill: u8, offset: u64, len: usize) -> io::Result<()> {
        let mut memory = AlignedMemory::new(len)?;
        memory.as_mut_slice().fill(fill);
        self.0.write_all_at(memory.as_slice(), offset)
    }

    pub fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }
}
