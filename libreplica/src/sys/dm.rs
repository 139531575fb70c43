//! The table of a device-mapper device: which ranges of which devices it is made of.
//! Source: linux/dm-ioctl.h.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// Give the table, not the state.
const STATUS_TABLE: u32 = 1 << 4;
/// The answer did not fit.
const BUFFER_FULL: u32 = 1 << 8;
const NAME_LEN: usize = 128;
/// Enough for some thousand linear targets.
const BUFFER: usize = 256 << 10;

mod ioctl {
    nix::ioctl_readwrite!(table_status, 0xfd, 12, super::DmIoctl);
}

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone, Copy)]
struct DmIoctl {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; NAME_LEN],
    uuid: [u8; 129],
    data: [u8; 7],
}

const HEAD: usize = size_of::<DmIoctl>();
const _: () = assert!(HEAD == 312);

/// The head and the room for the answer, at the alignment of the head.
#[repr(C)]
struct Buffer {
    head: DmIoctl,
    rest: [u8; BUFFER - HEAD],
}

/// `struct dm_target_spec`: start, length, status, next, type name; the parameters follow.
const SPEC: usize = 40;

/// One row of a table, in sectors of 512 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The first sector of the device that it makes.
    pub start: u64,
    /// How many.
    pub length: u64,
    /// Its type: `linear`.
    pub kind: String,
    /// What the type says of itself: `8:2 2048`.
    pub parameters: String,
}

/// The table of the device called `name`.
///
/// # Errors
/// `ENOENT` or `ENXIO` if there is no such device, or no device-mapper; `EOVERFLOW` if the
/// table is beyond all measure.
pub fn table(name: &str) -> nix::Result<Vec<Target>> {
    let control = File::options()
        .read(true)
        .write(true)
        .open("/dev/mapper/control")
        .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    if name.len() >= NAME_LEN {
        return Err(Errno::ENAMETOOLONG);
    }
    let mut buffer = Box::new(Buffer {
        head: DmIoctl {
            version: [4, 0, 0],
            data_size: BUFFER as u32,
            data_start: HEAD as u32,
            target_count: 0,
            open_count: 0,
            flags: STATUS_TABLE,
            event_nr: 0,
            padding: 0,
            dev: 0,
            name: [0; NAME_LEN],
            uuid: [0; 129],
            data: [0; 7],
        },
        rest: [0; BUFFER - HEAD],
    });
    buffer.head.name[..name.len()].copy_from_slice(name.as_bytes());
    let at = (&raw mut *buffer).cast();
    // SAFETY: the descriptor is open for the call. The kernel reads and writes at most
    // `data_size` bytes from `at`, which is the size of the whole buffer.
    unsafe { ioctl::table_status(control.as_raw_fd(), at) }?;
    if buffer.head.flags & BUFFER_FULL != 0 {
        return Err(Errno::EOVERFLOW);
    }
    let start = (buffer.head.data_start as usize).checked_sub(HEAD);
    let answer = start.and_then(|start| buffer.rest.get(start..));
    parse(answer.ok_or(Errno::EPROTO)?, buffer.head.target_count).ok_or(Errno::EPROTO)
}

/// Rows lie behind one another; `next` counts from the start of the answer.
fn parse(answer: &[u8], count: u32) -> Option<Vec<Target>> {
    let mut targets = Vec::new();
    let mut at = 0;
    for _ in 0..count {
        let row = answer.get(at..)?;
        let (spec, behind) = row.split_at_checked(SPEC)?;
        let next = u32::from_ne_bytes(spec[20..24].try_into().ok()?);
        targets.push(Target {
            start: u64::from_ne_bytes(spec[..8].try_into().ok()?),
            length: u64::from_ne_bytes(spec[8..16].try_into().ok()?),
            kind: text(&spec[24..]),
            parameters: text(behind),
        });
        at = next as usize;
    }
    Some(targets)
}

/// Up to the first zero byte.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(start: u64, length: u64, next: u32, kind: &str, parameters: &str) -> Vec<u8> {
        let mut row = Vec::new();
        row.extend_from_slice(&start.to_ne_bytes());
        row.extend_from_slice(&length.to_ne_bytes());
        row.extend_from_slice(&0_u32.to_ne_bytes());
        row.extend_from_slice(&next.to_ne_bytes());
        row.extend_from_slice(kind.as_bytes());
        row.resize(SPEC, 0);
        row.extend_from_slice(parameters.as_bytes());
        row.resize(SPEC + 24, 0);
        row
    }

    #[test]
    fn rows_are_read_one_behind_the_other() {
        let mut answer = row(0, 8192, 64, "linear", "8:2 2048");
        answer.extend(row(8192, 100, 128, "linear", "8:3 0"));
        let targets = parse(&answer, 2).unwrap();
        assert_eq!(targets[0].parameters, "8:2 2048");
        assert_eq!((targets[1].start, targets[1].length), (8192, 100));
        assert_eq!(parse(&answer, 3), None);
        assert_eq!(parse(&answer[..70], 2), None);
    }
}
