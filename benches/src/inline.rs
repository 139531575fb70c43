//! Inline capture of a device that a bench loads: recording, with nobody behind who could be
//! slow. What is measured is capture, and not a store.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a bench that cannot run shall say so and end"
)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use libreplica::capture::inline::{Budget, InlineSpec, Limits, Read, Service};
use libreplica::device::BlockDevice;
use libreplica::id::VolumeId;
use libreplica::policy::Mode;
use libreplica::units::{BlockSize, ByteLen, Sequence};

/// The volume of all benches.
pub const VOLUME: VolumeId = VolumeId::from_bytes([7; 16]);

/// The volume on `device`, with what is kept of it in `folder`, and room for `bytes`.
pub fn spec(device: &Path, folder: &Path, bytes: ByteLen) -> InlineSpec {
    InlineSpec {
        folder: folder.to_owned(),
        volume: VOLUME,
        disk: BlockDevice::open(device).unwrap(),
        block: BlockSize::MIN,
        limits: Limits {
            bytes,
            extents: 1000,
            shared: Arc::new(Budget::new(bytes)),
        },
    }
}

/// Begins data mode: what is dirty is taken for read.
pub fn record(service: &Service) {
    Service::moment(&[service]).unwrap();
    service.end_moment();
    service.moment_is_stored();
    service.acknowledge();
}

/// Waits for changes, a moment at most, and takes all that have come.
pub fn take(service: &Service) {
    // A change of mode that nobody was told of is worth waking up for.
    service.mode_changes();
    service.wait(Duration::from_millis(100));
    let cut = service.end_now();
    while let Read::Changes(entries) = service.read(&cut, ByteLen::new(4 << 20))
        && !entries.is_empty()
    {
        let stored = service.stored_up_to().get() + entries.len() as u64;
        service.stored(&cut.at(Sequence::new(stored)));
    }
    assert_eq!(
        service.waiting().mode,
        Mode::Data,
        "the backlog was not taken in time"
    );
}

/// A loop device, detached when dropped.
#[derive(Debug)]
pub struct LoopDevice(String);

impl LoopDevice {
    /// Over a file, or a device; `more` are options of losetup.
    pub fn over(file: &Path, more: &[&str]) -> Self {
        let mut losetup = Command::new("losetup");
        let output = losetup
            .args(["--find", "--show"])
            .args(more)
            .arg(file)
            .output();
        let device = String::from_utf8(output.unwrap().stdout).unwrap();
        assert!(device.starts_with("/dev/"), "no loop device: run as root");
        Self(device.trim().to_owned())
    }

    /// Its node.
    pub fn path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}
