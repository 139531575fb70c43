//! What the kernel's driver is told, and what to do where it says no: which features are
//! needed, which of the devices that are there is ours, how one is made, taken over, removed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::id::VolumeId;
use crate::sys::ublk::{
    Added, Control, Device, DeviceNumber, DeviceState, Features, Parameters, QueueNumber, Remains,
    inspect,
};
use crate::sys::uring::{Token, Uring, shared};

/// What a device of ours must be granted.
pub(super) const NEEDED: Features = Features::USER_RECOVERY
    .and(Features::USER_RECOVERY_REISSUE)
    .and(Features::USER_COPY)
    .and(Features::IOCTL_ENCODE);
/// The driver's devices, in sysfs.
const DEVICES: &str = "/sys/class/ublk-char";
const CONTROL: &str = "/dev/ublk-control";
/// How often it is looked whether something has come or gone.
const LOOK: Duration = Duration::from_millis(2);
/// How long the end of a server is let settle before another begins: the driver still cancels
/// what a server has fetched a moment after it has said that the device waits for the next
/// (`ublk_quiesce_work_fn`, kernel 6.12), and does not look whose it is.
const SETTLE: Duration = Duration::from_millis(200);
/// How long device nodes may take to appear.
const NODE_LIMIT: Duration = Duration::from_secs(10);
/// How long the kernel may take to read a partition table through us, or to end what its
/// users have under way.
const LIMIT: Duration = Duration::from_secs(60);
const TAKE_OVER: &str = "take a ublk device over";
const OTHERWISE: &str = "or use --capture nbd, or --capture ebpf";

/// The driver.
#[derive(Debug)]
pub(super) struct Host {
    control: Control,
    pub offered: Features,
}

/// /dev/ublkbN: what users open.
pub(super) fn block_node(number: DeviceNumber) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{number}"))
}

/// /dev/ublkcN: where requests are taken.
pub(super) fn char_node(number: DeviceNumber) -> PathBuf {
    PathBuf::from(format!("/dev/ublkc{number}"))
}

/// What the driver keeps for a volume's device, to tell it from others'.
pub(super) fn mark_of(volume: VolumeId) -> u64 {
    let bytes = volume.as_bytes();
    let halves = bytes.chunks_exact(8).map(|half| {
        let mut word = [0; 8];
        word.copy_from_slice(half);
        u64::from_le_bytes(word)
    });
    halves.fold(0, |mark, half| mark.rotate_left(1) ^ half)
}

/// Whether there is a device of ublk, of whomever.
pub(super) fn has_devices() -> bool {
    std::fs::read_dir(DEVICES).is_ok_and(|mut devices| devices.next().is_some())
}

impl Host {
    /// Finds the driver, and that it can do what is needed.
    pub fn open() -> Result<Self> {
        const OPERATION: &str = "serve a block device through ublk";
        let lacking = |detail: String| Error::new(ErrorKind::Kernel, OPERATION).detail(detail);
        let control = match Control::open() {
            Ok(control) => control,
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => {
                return Err(lacking("the kernel's module ublk_drv is not there".into())
                    .path(CONTROL)
                    .source(source)
                    .advice(format!("load it (`modprobe ublk_drv`), {OTHERWISE}")));
            }
            Err(source) => return Err(source).at(OPERATION, CONTROL),
        };
        let offered = control.features().map_err(|source| {
            let advice = format!("use a kernel from 6.5 on, {OTHERWISE}");
            let detail = "the kernel's ublk cannot say what it can do";
            lacking(detail.into()).source(source).advice(advice)
        })?;
        let missing = offered.lacks(NEEDED);
        if !missing.is_empty() {
            let advice = format!("use a kernel from 6.5 on, {OTHERWISE}");
            return Err(lacking(format!("the kernel's ublk lacks {missing}")).advice(advice));
        }
        Ok(Self { control, offered })
    }

    /// The device that serves the volume of this mark, if there is one that can be taken over.
    /// Those that were never started, or were stopped, are deleted.
    pub fn find(&self, mark: u64) -> Option<Device> {
        let names = std::fs::read_dir(DEVICES).into_iter().flatten().flatten();
        let numbers = names.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some(DeviceNumber(name.strip_prefix("ublkc")?.parse().ok()?))
        });
        let mut found = None;
        for number in numbers {
            // One that vanished meanwhile, or that is of a user without privileges.
            let Ok(device) = self.control.device(number) else {
                continue;
            };
            if device.mark != mark {
                continue;
            }
            if device.state == DeviceState::Dead {
                let _ = self.control.delete(number, LIMIT);
            } else {
                found = Some(device);
            }
        }
        found
    }

    /// The device as the driver has it now; `None` if it is gone.
    pub fn look(&self, number: DeviceNumber) -> Option<Device> {
        self.control.device(number).ok()
    }

    /// Makes a device; of another number if the one that is wanted is somebody else's.
    pub fn add(&self, wanted: &Added, parameters: Parameters) -> Result<Device> {
        const OPERATION: &str = "add a ublk device";
        let added = match self.control.add(wanted) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => self.control.add(&Added {
                number: None,
                ..*wanted
            }),
            result => result,
        };
        let device = added.at(OPERATION, CONTROL)?;
        let missing = device.features.lacks(NEEDED);
        let checked = if missing.is_empty() {
            let set = self.control.set_parameters(device.number, parameters);
            set.at(
                "set the parameters of a ublk device",
                block_node(device.number),
            )
        } else {
            let detail = format!("the kernel did not grant {missing}");
            Err(Error::new(ErrorKind::Kernel, OPERATION).detail(detail))
        };
        match checked {
            Ok(()) => Ok(device),
            Err(error) => {
                let _ = self.control.delete(device.number, LIMIT);
                Err(error)
            }
        }
    }

    /// Checks that users see the volume's size on a device that is taken over.
    pub fn check(&self, number: DeviceNumber, wanted: Parameters) -> Result<()> {
        let node = block_node(number);
        let found = self.control.parameters(number).at(TAKE_OVER, &node)?;
        let same = found.sectors == wanted.sectors && found.logical_shift == wanted.logical_shift;
        if same {
            return Ok(());
        }
        let detail = format!(
            "it has {} sectors, the disk behind it {}",
            found.sectors, wanted.sectors
        );
        Err(Error::new(ErrorKind::Resized, TAKE_OVER)
            .path(node)
            .detail(detail)
            .advice("unmount it, and remove it"))
    }

    /// How far whoever served a device had come when it ended, if it has ended: drivers before
    /// kernel 6.16 must not be asked to begin a recovery of what is broken.
    pub fn inspect(&self, device: &Device, patience: Duration) -> Result<Remains> {
        const OPERATION: &str = "look what is left of a ublk device";
        if self.offered.has(Features::PER_IO_DAEMON) {
            return Ok(Remains::Served);
        }
        let file = self.wait_for_the_end(device.number, patience)?;
        let node = char_node(device.number);
        let mut ring = Uring::new(8).at(OPERATION, &node)?;
        let handle = ring.add(shared(file));
        let mut all: Option<Remains> = None;
        for queue in (0..device.queues).map(QueueNumber) {
            ring.start(Token(0), handle, inspect(queue));
            ring.submit(1).at(OPERATION, &node)?;
            let remains = ring.ended().and_then(|ended| Remains::of(&ended.result));
            all = match (all, remains) {
                (None, found) => found,
                (Some(all), Some(found)) if all == found => Some(all),
                // Some were taken, others not.
                _ => Some(Remains::Broken),
            };
        }
        all.ok_or_else(|| Error::new(ErrorKind::Kernel, OPERATION).path(node))
    }

    /// Waits until the server of a device is gone, and opens its queues.
    fn wait_for_the_end(&self, number: DeviceNumber, patience: Duration) -> Result<File> {
        let until = Instant::now() + patience;
        loop {
            let device = self.control.device(number);
            let device = device.at(TAKE_OVER, block_node(number))?;
            if device.state != DeviceState::Live {
                let node = char_node(number);
                match File::options().read(true).write(true).open(&node) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                    result => return result.at(TAKE_OVER, node),
                }
            }
            if Instant::now() >= until {
                return Err(Error::new(ErrorKind::Busy, TAKE_OVER)
                    .path(block_node(number))
                    .detail(format!("process {} serves it", device.server)));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Begins to serve a device whose server is gone, or about to be.
    pub fn begin_recovery(&self, number: DeviceNumber, patience: Duration) -> Result<()> {
        let until = Instant::now() + patience;
        std::thread::sleep(SETTLE);
        loop {
            let Err(source) = self.control.begin_recovery(number) else {
                return Ok(());
            };
            let is_busy = source.raw_os_error() == Some(libc::EBUSY);
            if !is_busy || Instant::now() >= until {
                let server = self.look(number).map_or(-1, |device| device.server);
                let kind = if is_busy {
                    ErrorKind::Busy
                } else {
                    ErrorKind::State
                };
                return Err(Error::new(kind, TAKE_OVER)
                    .path(block_node(number))
                    .detail(format!("process {server} serves it, or did so last"))
                    .source(source));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Shows a new device to users.
    pub fn launch(&self, device: &Device) -> Result<()> {
        let number = device.number;
        let node = block_node(number);
        let started = self.control.start(number, LIMIT);
        started.at("start a ublk device", &node)?;
        // The driver before kernel 6.15 sees the end of a server by a fetch that is left alone
        // in each queue; if all were answered it would take half a minute.
        let most = device.depth.saturating_sub(1).max(1);
        let limit = format!("/sys/block/ublkb{number}/queue/nr_requests");
        if let Err(error) = std::fs::write(&limit, most.to_string()) {
            tracing::warn!("{limit}: {error}");
        }
        appear(&node)
    }

    /// Lets the users of a device go on that was taken over.
    pub fn end_recovery(&self, number: DeviceNumber) -> Result<()> {
        let ended = self.control.end_recovery(number, LIMIT);
        ended.at(TAKE_OVER, block_node(number))
    }

    /// Opens the device on which requests are taken.
    pub fn open_queues(&self, number: DeviceNumber) -> Result<File> {
        let node = char_node(number);
        appear(&node)?;
        let file = File::options().read(true).write(true).open(&node);
        file.at("open a ublk device's queues", node)
    }

    /// Waits until the kernel has taken back the requests of a server that has closed its rings.
    pub fn wait_until_released(&self, number: DeviceNumber) {
        let until = Instant::now() + LIMIT;
        while let Some(device) = self.look(number)
            && device.state == DeviceState::Live
            && Instant::now() < until
        {
            std::thread::sleep(LOOK);
        }
    }

    /// Takes the device from its users: they get errors from now on. What its server has is
    /// waited for.
    pub fn stop(&self, number: DeviceNumber) -> Result<()> {
        match self.control.stop(number, LIMIT) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            result => result.at("stop a ublk device", block_node(number)),
        }
    }

    /// Deletes a device that was stopped. Its number is free when its last user is gone.
    pub fn delete(&self, number: DeviceNumber) -> Result<()> {
        match self.control.delete(number, LIMIT) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            result => result.at("delete a ublk device", block_node(number)),
        }
    }
}

/// Waits for a device node, which the kernel makes.
fn appear(node: &Path) -> Result<()> {
    let until = Instant::now() + NODE_LIMIT;
    while !node.exists() {
        if Instant::now() >= until {
            return Err(Error::new(ErrorKind::TimedOut, "wait for a device node")
                .path(node)
                .advice("mount devtmpfs on /dev"));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_have_marks_of_their_own() {
        let mark = |bytes| mark_of(VolumeId::from_bytes(bytes));
        let mut other = [7; 16];
        other[0] = 8;
        assert_ne!(mark([7; 16]), mark(other));
        assert_ne!(mark([7; 16]), 0);
        let mut swapped = [1; 16];
        swapped[8..].fill(2);
        let mut back = [2; 16];
        back[8..].fill(1);
        assert_ne!(mark(swapped), mark(back));
    }
}
