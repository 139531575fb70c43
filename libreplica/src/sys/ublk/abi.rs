//! Numbers and layouts of `include/uapi/linux/ublk_cmd.h` (kernel 6.12), written by hand;
//! sizes are asserted. All in the machine's byte order.

use std::fmt;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// What a command to the control device is: its ioctl code (`UBLK_U_CMD_*`).
pub(super) mod control {
    use super::CtrlCommand;

    const SIZE: usize = size_of::<CtrlCommand>();
    const fn read(number: u32) -> u32 {
        nix::request_code_read!(b'u', number, SIZE) as u32
    }
    const fn change(number: u32) -> u32 {
        nix::request_code_readwrite!(b'u', number, SIZE) as u32
    }

    pub const GET_DEV_INFO: u32 = read(0x02);
    pub const ADD_DEV: u32 = change(0x04);
    pub const DEL_DEV: u32 = change(0x05);
    pub const START_DEV: u32 = change(0x06);
    pub const STOP_DEV: u32 = change(0x07);
    pub const SET_PARAMS: u32 = change(0x08);
    pub const GET_PARAMS: u32 = read(0x09);
    pub const START_USER_RECOVERY: u32 = change(0x10);
    pub const END_USER_RECOVERY: u32 = change(0x11);
    /// From kernel 6.5 on.
    pub const GET_FEATURES: u32 = read(0x13);
    /// From kernel 6.9 on.
    pub const DEL_DEV_ASYNC: u32 = read(0x14);
}

/// Commands on a queue (`UBLK_U_IO_*`).
pub(super) mod io {
    use super::IoCommand;

    const SIZE: usize = size_of::<IoCommand>();
    pub const FETCH_REQ: u32 = nix::request_code_readwrite!(b'u', 0x20, SIZE) as u32;
    pub const COMMIT_AND_FETCH_REQ: u32 = nix::request_code_readwrite!(b'u', 0x21, SIZE) as u32;
    /// Of another driver's: this one refuses it, after it has looked at the queue.
    pub const FOREIGN: u32 = nix::request_code_readwrite!(b'v', 0x20, SIZE) as u32;
}

/// `struct ublksrv_ctrl_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
pub(super) struct CtrlCommand {
    pub dev_id: u32,
    pub queue_id: u16,
    pub len: u16,
    pub addr: u64,
    pub data: u64,
    pub dev_path_len: u16,
    pub pad: u16,
    pub reserved: u32,
}
const _: () = assert!(size_of::<CtrlCommand>() == 32);

/// `struct ublksrv_ctrl_dev_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct DeviceInfo {
    pub nr_hw_queues: u16,
    pub queue_depth: u16,
    pub state: u16,
    pub pad0: u16,
    pub max_io_buf_bytes: u32,
    pub dev_id: u32,
    pub ublksrv_pid: i32,
    pub pad1: u32,
    pub flags: u64,
    /// The server's own; the driver keeps it and returns it.
    pub ublksrv_flags: u64,
    pub owner_uid: u32,
    pub owner_gid: u32,
    pub reserved1: u64,
    pub reserved2: u64,
}
const _: () = assert!(size_of::<DeviceInfo>() == 64);

/// `struct ublk_params` up to the alignment of memory, which the driver has since kernel 6.15;
/// one before takes what it knows. What follows is not used; `len` says where ours end.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct RawParameters {
    pub len: u32,
    pub types: u32,
    // struct ublk_param_basic
    pub attrs: u32,
    pub logical_bs_shift: u8,
    pub physical_bs_shift: u8,
    pub io_opt_shift: u8,
    pub io_min_shift: u8,
    pub max_sectors: u32,
    pub chunk_sectors: u32,
    pub dev_sectors: u64,
    pub virt_boundary_mask: u64,
    // struct ublk_param_discard
    pub discard_alignment: u32,
    pub discard_granularity: u32,
    pub max_discard_sectors: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_discard_segments: u16,
    pub reserved0: u16,
    // struct ublk_param_devt, struct ublk_param_zoned
    pub devt: [u32; 4],
    pub zoned: [u32; 8],
    // struct ublk_param_dma_align
    pub memory_mask: u32,
    pub pad: u32,
    /// The first word of what follows; not part of `len`.
    pub behind: u32,
}
const _: () = assert!(size_of::<RawParameters>() == 120);

/// Bytes of [`RawParameters`] that the driver takes and gives.
const PARAMETERS_LEN: u32 = 116;
/// `UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DISCARD | UBLK_PARAM_TYPE_DMA_ALIGN`.
const PARAMETERS_TYPES: u32 = 1 | 1 << 1 | 1 << 4;
const ATTR_ROTATIONAL: u32 = 1 << 1;
const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
const ATTR_FUA: u32 = 1 << 3;

/// `struct ublksrv_io_desc`: a request.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromZeros)]
pub(super) struct IoDescriptor {
    pub op_flags: u32,
    pub nr_sectors: u32,
    pub start_sector: u64,
    pub addr: u64,
}
const _: () = assert!(size_of::<IoDescriptor>() == 24);

/// `struct ublksrv_io_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
pub(super) struct IoCommand {
    pub q_id: u16,
    pub tag: u16,
    pub result: i32,
    /// Zero: data is copied by reads and writes.
    pub addr: u64,
}
const _: () = assert!(size_of::<IoCommand>() == 16);

/// What the driver can do, or does for a device (`UBLK_F_*`).
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Features(pub(super) u64);

impl Features {
    /// A request's pages can be registered as a buffer of a ring (6.15).
    pub const ZERO_COPY: Self = Self(1);
    /// The device waits for another server when its own dies.
    pub const USER_RECOVERY: Self = Self(1 << 3);
    /// And what the dead one had in hand comes again.
    pub const USER_RECOVERY_REISSUE: Self = Self(1 << 4);
    /// Commands are encoded as ioctls are.
    pub const IOCTL_ENCODE: Self = Self(1 << 6);
    /// Data is copied by reads and writes of `/dev/ublkcN` (6.5).
    pub const USER_COPY: Self = Self(1 << 7);
    /// The pages of each request are registered before it is delivered (6.16).
    pub const AUTO_BUF_REG: Self = Self(1 << 11);
    /// Each of a queue's tags may have a thread of its own (6.16).
    pub const PER_IO_DAEMON: Self = Self(1 << 13);

    const NAMES: [(u32, &str); 20] = [
        (0, "zero-copy"),
        (1, "complete-in-task"),
        (2, "need-get-data"),
        (3, "user-recovery"),
        (4, "user-recovery-reissue"),
        (5, "unprivileged"),
        (6, "ioctl-encode"),
        (7, "user-copy"),
        (8, "zoned"),
        (9, "user-recovery-fail-io"),
        (10, "update-size"),
        (11, "auto-buf-reg"),
        (12, "quiesce"),
        (13, "per-io-daemon"),
        (14, "buf-reg-off-daemon"),
        (15, "batch-io"),
        (16, "integrity"),
        (17, "safe-stop"),
        (18, "no-auto-part-scan"),
        (19, "shmem-zc"),
    ];

    /// Those of either.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are among them.
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those of `other` that are not among them.
    #[must_use]
    pub const fn lacks(self, other: Self) -> Self {
        Self(other.0 & !self.0)
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Their names, as the header has them, in lower case; a bit that it does not name (yet)
    /// as `bit-N`.
    pub fn names(self) -> Vec<String> {
        let bits = (0..u64::BITS).filter(|bit| self.0 >> bit & 1 == 1);
        bits.map(|bit| {
            let known = Self::NAMES.iter().find(|(number, _)| *number == bit);
            known.map_or_else(|| format!("bit-{bit}"), |(_, name)| (*name).to_owned())
        })
        .collect()
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.names().join(", "))
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Features({self})")
    }
}

/// In what state a device is (`UBLK_S_DEV_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceState {
    /// Not started, or stopped: users get errors.
    Dead,
    /// Served, or so the driver believes: it may take a moment to see that a server died.
    Live,
    /// Its server is gone; users wait for another.
    Quiesced,
    /// A state that this program does not know.
    Other(u16),
}

impl DeviceState {
    pub(super) const fn from_raw(state: u16) -> Self {
        match state {
            0 => Self::Dead,
            1 => Self::Live,
            2 => Self::Quiesced,
            other => Self::Other(other),
        }
    }
}

/// What users of a device see of it. A volatile cache and FUA are always said to be there:
/// so flushes and forced writes arrive as users gave them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Its size in units of 512 bytes.
    pub sectors: u64,
    /// The unit it is read and written in, as a power of two.
    pub logical_shift: u8,
    /// The unit it writes without reading first, as a power of two.
    pub physical_shift: u8,
    /// The smallest request that is not slow, as a power of two.
    pub least_shift: u8,
    /// The best size of a request, as a power of two.
    pub best_shift: u8,
    /// Whether seeks cost.
    pub rotational: bool,
    /// The longest read or write, in units of 512 bytes.
    pub longest: u32,
    /// The longest discard, in units of 512 bytes; 0 if there are none.
    pub longest_discard: u32,
    /// What discards should be multiples of, in bytes.
    pub discard_granularity: u32,
    /// Where those multiples begin, in bytes.
    pub discard_alignment: u32,
    /// The longest request to write zeroes, in units of 512 bytes.
    pub longest_zeroes: u32,
    /// What the addresses of users' memory are multiples of, less one, at most 4095: where a
    /// disk is to read and write that memory itself, what the disk wants.
    pub memory_mask: u32,
}

impl Parameters {
    pub(super) const fn to_raw(self) -> RawParameters {
        let rotational = if self.rotational { ATTR_ROTATIONAL } else { 0 };
        RawParameters {
            len: PARAMETERS_LEN,
            types: PARAMETERS_TYPES,
            attrs: ATTR_VOLATILE_CACHE | ATTR_FUA | rotational,
            logical_bs_shift: self.logical_shift,
            physical_bs_shift: self.physical_shift,
            io_opt_shift: self.best_shift,
            io_min_shift: self.least_shift,
            max_sectors: self.longest,
            chunk_sectors: 0,
            dev_sectors: self.sectors,
            virt_boundary_mask: 0,
            discard_alignment: self.discard_alignment,
            discard_granularity: self.discard_granularity,
            max_discard_sectors: self.longest_discard,
            max_write_zeroes_sectors: self.longest_zeroes,
            // The driver takes no other number.
            max_discard_segments: 1,
            reserved0: 0,
            devt: [0; 4],
            zoned: [0; 8],
            memory_mask: self.memory_mask,
            pad: 0,
            behind: 0,
        }
    }

    pub(super) const fn from_raw(raw: &RawParameters) -> Self {
        Self {
            sectors: raw.dev_sectors,
            logical_shift: raw.logical_bs_shift,
            physical_shift: raw.physical_bs_shift,
            least_shift: raw.io_min_shift,
            best_shift: raw.io_opt_shift,
            rotational: raw.attrs & ATTR_ROTATIONAL != 0,
            longest: raw.max_sectors,
            longest_discard: raw.max_discard_sectors,
            discard_granularity: raw.discard_granularity,
            discard_alignment: raw.discard_alignment,
            longest_zeroes: raw.max_write_zeroes_sectors,
            memory_mask: raw.memory_mask,
        }
    }

    /// As a buffer for the driver to fill.
    pub(super) fn to_fill() -> RawParameters {
        RawParameters {
            len: PARAMETERS_LEN,
            ..RawParameters::new_zeroed()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn codes_are_those_of_the_header() {
        // As `printf("%#x")` of a C program with the header of kernel 6.12 says.
        assert_eq!(control::GET_FEATURES, 0x8020_7513);
        assert_eq!(control::ADD_DEV, 0xc020_7504);
        assert_eq!(io::FETCH_REQ, 0xc010_7520);
        assert_eq!(io::COMMIT_AND_FETCH_REQ, 0xc010_7521);
    }

    #[test]
    fn fields_are_where_the_header_has_them() {
        assert_eq!(offset_of!(DeviceInfo, flags), 24);
        assert_eq!(offset_of!(DeviceInfo, ublksrv_flags), 32);
        assert_eq!(offset_of!(RawParameters, dev_sectors), 24);
        assert_eq!(offset_of!(RawParameters, discard_alignment), 40);
        assert_eq!(offset_of!(RawParameters, devt), 60);
        assert_eq!(offset_of!(RawParameters, memory_mask), 108);
        assert_eq!(offset_of!(RawParameters, behind), PARAMETERS_LEN as usize);
        assert_eq!(offset_of!(CtrlCommand, addr), 8);
        assert_eq!(offset_of!(CtrlCommand, dev_path_len), 24);
    }

    #[test]
    fn features_have_names() {
        let some = Features::USER_COPY.and(Features(1 << 40));
        assert_eq!(some.to_string(), "user-copy, bit-40");
        let missing = some.lacks(Features::USER_COPY.and(Features::USER_RECOVERY));
        assert_eq!(missing, Features::USER_RECOVERY);
        assert!(!some.has(missing) && some.has(Features::USER_COPY));
    }
}
