//! A volume's block device that nobody serves: its server died, or could not remove it, and
//! none can serve it again. Its users wait for ever, unless it is removed.

use std::path::{Path, PathBuf};

use crate::capture::ublk::host::{self, Host, block_node, mark_of};
use crate::error::{ErrorKind, Result};
use crate::id::VolumeId;
use crate::sys::ublk::DeviceNumber;

/// A block device that was left behind.
#[derive(Debug)]
pub struct Leftover {
    host: Host,
    number: DeviceNumber,
    node: PathBuf,
}

impl Leftover {
    /// That of a volume, which must not be served by anybody; `None` if there is none, or no
    /// ublk.
    ///
    /// # Errors
    /// If there are devices of ublk and the driver cannot be asked whose they are.
    pub fn find(volume: VolumeId) -> Result<Option<Self>> {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) if error.kind() == ErrorKind::Kernel && !host::has_devices() => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let found = host.find(mark_of(volume));
        Ok(found.map(|device| Self {
            host,
            number: device.number,
            node: block_node(device.number),
        }))
    }

    /// /dev/ublkbN.
    pub fn path(&self) -> &Path {
        &self.node
    }

    /// Removes it. Whoever uses it gets errors.
    ///
    /// # Errors
    /// [`TimedOut`](ErrorKind::TimedOut) if the kernel did not stop it in time; what the kernel
    /// says.
    pub fn remove(self) -> Result<()> {
        self.host.stop(self.number)?;
        self.host.delete(self.number)
    }
}
