//! Commands to `/dev/ublk-control`: they make, start, stop and delete devices. Each goes
//! through a ring of its own, whose entries have 128 bytes, as the driver wants it. None is
//! waited for longer than a limit: some wait in the kernel for others, who may never come.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use zerocopy::{FromBytes, IntoBytes};

use crate::sys::ublk::abi::{
    CtrlCommand, DeviceInfo, DeviceState, Features, Parameters, RawParameters, control,
};

const CONTROL: &str = "/dev/ublk-control";
/// "Any number" when a device is added.
const ANY: u32 = u32::MAX;
/// Commands that wait for nobody.
const SOON: Duration = Duration::from_secs(10);

/// The number of a ublk device: the N of /dev/ublkbN, which users open, and of /dev/ublkcN,
/// on which it is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber(pub u32);

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a new device is to be.
#[derive(Clone, Copy, Debug)]
pub struct Added {
    /// The number, if it must be this one.
    pub number: Option<DeviceNumber>,
    /// How many queues, at most.
    pub queues: u16,
    /// How many requests each can have, at most 4096.
    pub depth: u16,
    /// Bytes of the longest read or write.
    pub longest: u32,
    /// What it needs.
    pub features: Features,
    /// What its server knows it by; the driver keeps it.
    pub mark: u64,
}

/// A device as the driver describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number.
    pub number: DeviceNumber,
    /// In what state it is.
    pub state: DeviceState,
    /// How many queues it has.
    pub queues: u16,
    /// How many requests each can have.
    pub depth: u16,
    /// Bytes of the longest read or write.
    pub longest: u32,
    /// The process that serves it, or served it; -1 if it was never started or is stopped.
    pub server: i32,
    /// What it was granted.
    pub features: Features,
    /// What its server knows it by.
    pub mark: u64,
}

impl Device {
    const fn from_raw(raw: &DeviceInfo) -> Self {
        Self {
            number: DeviceNumber(raw.dev_id),
            state: DeviceState::from_raw(raw.state),
            queues: raw.nr_hw_queues,
            depth: raw.queue_depth,
            longest: raw.max_io_buf_bytes,
            server: raw.ublksrv_pid,
            features: Features(raw.flags),
            mark: raw.ublksrv_flags,
        }
    }
}

/// The driver's control device. Its commands need `CAP_SYS_ADMIN`.
#[derive(Debug)]
pub struct Control {
    file: File,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// `ENOENT` where the module `ublk_drv` is not loaded; `EACCES`.
    pub fn open() -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(CONTROL)?;
        Ok(Self { file })
    }

    /// What the driver can do.
    ///
    /// # Errors
    /// `EOPNOTSUPP` or `EINVAL` before kernel 6.5.
    pub fn features(&self) -> io::Result<Features> {
        let code = control::GET_FEATURES;
        let (_, answer) = self.exchange(code, DeviceNumber(ANY), &0_u64, SOON)?;
        Ok(Features(answer))
    }

    /// Makes a device, which nobody sees yet: it has to be given parameters, to be served,
    /// and to be started.
    ///
    /// # Errors
    /// `EEXIST` if the number is taken; `EINVAL`; `ENOMEM`.
    pub fn add(&self, wanted: &Added) -> io::Result<Device> {
        let number = wanted.number.unwrap_or(DeviceNumber(ANY));
        let raw = DeviceInfo {
            nr_hw_queues: wanted.queues,
            queue_depth: wanted.depth,
            max_io_buf_bytes: wanted.longest,
            dev_id: number.0,
            flags: wanted.features.0,
            ublksrv_flags: wanted.mark,
            ..zerocopy::FromZeros::new_zeroed()
        };
        let (_, raw) = self.exchange(control::ADD_DEV, number, &raw, SOON)?;
        Ok(Device::from_raw(&raw))
    }

    /// Says what users are to see of a device. Only before it is started.
    ///
    /// # Errors
    /// `EINVAL` for what makes no sense; `EACCES` if it was started.
    pub fn set_parameters(&self, number: DeviceNumber, parameters: Parameters) -> io::Result<()> {
        let raw = parameters.to_raw();
        self.exchange(control::SET_PARAMS, number, &raw, SOON)?;
        Ok(())
    }

    /// What users see of a device.
    ///
    /// # Errors
    /// `ENODEV` if there is none of that number.
    pub fn parameters(&self, number: DeviceNumber) -> io::Result<Parameters> {
        let to_fill = Parameters::to_fill();
        let code = control::GET_PARAMS;
        let (_, raw): (_, RawParameters) = self.exchange(code, number, &to_fill, SOON)?;
        Ok(Parameters::from_raw(&raw))
    }

    /// The device of that number.
    ///
    /// # Errors
    /// `ENODEV` if there is none; `EINVAL` for one of a user without privileges.
    pub fn device(&self, number: DeviceNumber) -> io::Result<Device> {
        let to_fill: DeviceInfo = zerocopy::FromZeros::new_zeroed();
        let (_, raw) = self.exchange(control::GET_DEV_INFO, number, &to_fill, SOON)?;
        Ok(Device::from_raw(&raw))
    }

    /// Shows a device, which all its queues must be served for: the kernel reads its partition
    /// table meanwhile.
    ///
    /// # Errors
    /// `ETIME` if it took longer than `limit`; `EINVAL` without parameters; `EEXIST` if it is
    /// started.
    pub fn start(&self, number: DeviceNumber, limit: Duration) -> io::Result<()> {
        let data = u64::from(std::process::id());
        self.plain(control::START_DEV, number, data, limit)
    }

    /// Takes a device away from its users: requests that its server has are waited for, all
    /// others, and all that come, end with errors. Does nothing if that was done already.
    ///
    /// # Errors
    /// `ETIME` if it took longer than `limit`: it then goes on in the kernel, or waits there
    /// for the server.
    pub fn stop(&self, number: DeviceNumber, limit: Duration) -> io::Result<()> {
        self.plain(control::STOP_DEV, number, 0, limit)
    }

    /// Deletes a device that was stopped; its number is free when its last user has closed
    /// it. /dev/ublkcN must be closed. Waits for the users before kernel 6.9.
    ///
    /// # Errors
    /// `ETIME` if users kept it longer than `limit`: it goes when they do.
    pub fn delete(&self, number: DeviceNumber, limit: Duration) -> io::Result<()> {
        match self.plain(control::DEL_DEV_ASYNC, number, 0, limit) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.delete_and_wait(number, limit)
            }
            result => result,
        }
    }

    /// As [`Self::delete`], and waits until the number is free.
    ///
    /// # Errors
    /// As there.
    pub fn delete_and_wait(&self, number: DeviceNumber, limit: Duration) -> io::Result<()> {
        self.plain(control::DEL_DEV, number, 0, limit)
    }

    /// Begins to serve a device anew, whose server is gone: then it can be served as a new
    /// one.
    ///
    /// # Errors
    /// `EBUSY` until the kernel has seen the server go; `EINVAL` if the device does not wait
    /// for another.
    pub fn begin_recovery(&self, number: DeviceNumber) -> io::Result<()> {
        self.plain(control::START_USER_RECOVERY, number, 0, SOON)
    }

    /// Lets the users of a device go on: all its queues must be served.
    ///
    /// # Errors
    /// `ETIME` if it took longer than `limit`; `EBUSY` if it is not waiting.
    pub fn end_recovery(&self, number: DeviceNumber, limit: Duration) -> io::Result<()> {
        let data = u64::from(std::process::id());
        self.plain(control::END_USER_RECOVERY, number, data, limit)
    }

    /// A command without a buffer.
    fn plain(&self, code: u32, number: DeviceNumber, data: u64, limit: Duration) -> io::Result<()> {
        self.run(code, number, data, None, limit).map(drop)
    }

    /// A command with a buffer, which the driver reads or fills.
    fn exchange<T: IntoBytes + FromBytes + zerocopy::Immutable>(
        &self,
        code: u32,
        number: DeviceNumber,
        value: &T,
        limit: Duration,
    ) -> io::Result<(i32, T)> {
        let buffer = value.as_bytes().to_vec().into_boxed_slice();
        let (result, buffer) = self.run(code, number, 0, Some(buffer), limit)?;
        let value = buffer.and_then(|buffer| T::read_from_bytes(&buffer).ok());
        let value = value.ok_or(io::ErrorKind::InvalidData)?;
        Ok((result, value))
    }

    fn run(
        &self,
        code: u32,
        number: DeviceNumber,
        data: u64,
        buffer: Option<Box<[u8]>>,
        limit: Duration,
    ) -> io::Result<(i32, Option<Box<[u8]>>)> {
        let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder().build(1)?;
        let mut buffer = buffer;
        let (addr, len) = match &mut buffer {
            Some(buffer) => (buffer.as_mut_ptr() as u64, buffer.len() as u16),
            None => (0, 0),
        };
        let command = CtrlCommand {
            dev_id: number.0,
            // Not for a queue.
            queue_id: u16::MAX,
            len,
            addr,
            data,
            dev_path_len: 0,
            pad: 0,
            reserved: 0,
        };
        let mut bytes = [0; 80];
        bytes[..size_of::<CtrlCommand>()].copy_from_slice(command.as_bytes());
        let entry = opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), code).cmd(bytes);
        // SAFETY: the buffer that the entry names lives until the command has ended, or for
        // ever (below); the file is open for the call, and the ring holds it from then on.
        let pushed = unsafe { ring.submission().push(&entry.build()) };
        pushed.map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
        let waited = wait(&ring, limit);
        match (ring.completion().next(), waited) {
            (Some(ended), _) => match ended.result() {
                errno @ ..0 => Err(io::Error::from_raw_os_error(-errno)),
                result => Ok((result, buffer)),
            },
            (None, waited) => {
                // The kernel may still use it, until the ring is gone, and after.
                std::mem::forget(buffer);
                Err(waited
                    .err()
                    .unwrap_or_else(|| io::Error::from_raw_os_error(libc::ETIME)))
            }
        }
    }
}

/// Submits, and waits for the end.
fn wait(ring: &IoUring<squeue::Entry128, cqueue::Entry>, limit: Duration) -> io::Result<()> {
    let until = std::time::Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let time = Timespec::from(left);
        let args = SubmitArgs::new().timespec(&time);
        match ring.submitter().submit_with_args(1, &args) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            result => return result.map(drop),
        }
    }
}
