//! The kernel's NBD client, as `nbd-client` sets it up: `/dev/nbdN` over a Unix socket.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::stage::{run, until};

/// A device of the kernel's client; disconnected when dropped.
#[derive(Debug)]
pub struct KernelNbd {
    node: PathBuf,
    connected: bool,
}

impl KernelNbd {
    /// Connects `/dev/nbd0`, over so many connections.
    pub fn connect(socket: &Path, connections: u32) -> Self {
        run("modprobe", ["nbd"]);
        let node = PathBuf::from("/dev/nbd0");
        let (path, count) = (socket.to_str().unwrap(), connections.to_string());
        run(
            "nbd-client",
            ["-unix", path, node.to_str().unwrap(), "-C", &count],
        );
        let client = Self {
            node,
            connected: true,
        };
        until("the device has its size", Duration::from_secs(20), || {
            let sectors = fs::read_to_string("/sys/block/nbd0/size").ok()?;
            (sectors.trim() != "0").then_some(())
        });
        client
    }

    /// `/dev/nbd0`.
    pub fn path(&self) -> &Path {
        &self.node
    }

    /// Says goodbye to the server.
    pub fn disconnect(mut self) {
        run("nbd-client", ["-d", self.node.to_str().unwrap()]);
        self.connected = false;
    }
}

impl Drop for KernelNbd {
    fn drop(&mut self) {
        if self.connected {
            let _ = Command::new("nbd-client")
                .arg("-d")
                .arg(&self.node)
                .output();
        }
    }
}
