//! The bpf(2) calls that are needed beside the loader: pins, the maps behind them, what the
//! kernel knows of a program, and a fence. Reference: linux/bpf.h, `union bpf_attr`.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;

const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_ARRAY_OF_MAPS: u32 = 12;

#[repr(C)]
#[derive(Default)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

#[repr(C)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner_map: u32,
}

/// Calls bpf(2).
///
/// # Safety
/// `attr` must be what `command` takes, and whatever memory it points to must be valid for
/// what the kernel does with it.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    let attr: *mut T = attr;
    // SAFETY: the caller's promise; `attr` lives across the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as libc::c_int)
    }
}

fn owned(fd: libc::c_int) -> OwnedFd {
    // SAFETY: just returned by the kernel as a new descriptor, which nobody else has.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

fn address<T>(of: *const T) -> u64 {
    of as usize as u64
}

fn path_text(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

/// Pins a map, a program or a link at `path` in a BPF file system: it lives on without us.
///
/// # Errors
/// `EEXIST`; `EINVAL` or `EPERM` where `path` is not on a BPF file system.
pub fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let text = path_text(path)?;
    let mut attr = ObjectAttr {
        path: address(text.as_ptr()),
        fd: number(fd),
        flags: 0,
    };
    // SAFETY: OBJ_PIN reads a path that ends in a zero byte.
    unsafe { bpf(OBJ_PIN, &mut attr) }.map(|_| ())
}

/// Opens what is pinned at `path`.
///
/// # Errors
/// `ENOENT`; `EPERM` without the capability.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let text = path_text(path)?;
    let mut attr = ObjectAttr {
        path: address(text.as_ptr()),
        ..ObjectAttr::default()
    };
    // SAFETY: OBJ_GET reads a path that ends in a zero byte.
    unsafe { bpf(OBJ_GET, &mut attr) }.map(owned)
}

/// Reads what the kernel tells of `fd`; returns how many bytes of `info` it filled.
fn read_info<const N: usize>(fd: BorrowedFd<'_>, info: &mut [u8; N]) -> io::Result<usize> {
    let mut attr = InfoAttr {
        fd: number(fd),
        len: N as u32,
        info: address(info.as_mut_ptr()),
    };
    // SAFETY: the kernel writes at most `len` bytes to `info`, and how many to `attr`.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(attr.len as usize)
}

fn field(info: &[u8], at: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&info[at..at + 4]);
    u32::from_ne_bytes(bytes)
}

/// What kind of map, as it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapInfo {
    /// Bytes of a key.
    pub key_size: u32,
    /// Bytes of a value.
    pub value_size: u32,
    /// How many entries it has, or can have.
    pub max_entries: u32,
}

/// The shape of the map `fd`.
///
/// # Errors
/// Those of bpf(2).
pub fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    // struct bpf_map_info: type, id, key_size, value_size, max_entries, ...
    let mut info = [0; 80];
    read_info(fd, &mut info)?;
    Ok(MapInfo {
        key_size: field(&info, 8),
        value_size: field(&info, 12),
        max_entries: field(&info, 16),
    })
}

/// How often the kernel skipped the program because it was already running on that CPU;
/// `None` where the kernel does not count that (before 5.12).
///
/// # Errors
/// Those of bpf(2).
pub fn recursion_misses(program: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    // struct bpf_prog_info: ..., run_time_ns at 192, run_cnt at 200, recursion_misses at 208.
    const AT: usize = 208;
    let mut info = [0; AT + 8];
    let filled = read_info(program, &mut info)?;
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&info[AT..]);
    Ok((filled == info.len()).then(|| u64::from_ne_bytes(bytes)))
}

fn create(attr: &mut CreateAttr) -> io::Result<OwnedFd> {
    // SAFETY: MAP_CREATE reads plain numbers.
    unsafe { bpf(MAP_CREATE, attr) }.map(owned)
}

/// Waits for running programs through a map of maps: the kernel lets no update of one
/// return before every program that may still see the old entry has ended. Used where
/// membarrier is not offered.
#[derive(Debug)]
pub struct Fence {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl Fence {
    /// Makes the two maps it needs.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn new() -> io::Result<Self> {
        let array = |map_type, inner_map| CreateAttr {
            map_type,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            flags: 0,
            inner_map,
        };
        let inner = create(&mut array(MAP_TYPE_ARRAY, 0))?;
        let outer = create(&mut array(MAP_TYPE_ARRAY_OF_MAPS, number(inner.as_fd())))?;
        Ok(Self { outer, inner })
    }

    /// Returns once no program runs that began before the call.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn wait(&self) -> io::Result<()> {
        let value = number(self.inner.as_fd());
        update(
            self.outer.as_fd(),
            &0_u32.to_ne_bytes(),
            &value.to_ne_bytes(),
        )
    }
}

/// Sets an entry. The slices must be as long as the map's keys and values.
fn update(map: BorrowedFd<'_>, key: &[u8; 4], value: &[u8; 4]) -> io::Result<()> {
    let mut attr = ElementAttr {
        map: number(map),
        key: address(key.as_ptr()),
        value: address(value.as_ptr()),
        ..ElementAttr::default()
    };
    // SAFETY: only `Fence` calls this, on a map whose keys and values are four bytes.
    unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(|_| ())
}

/// A hash map with keys of 8 bytes and values of `N` bytes.
#[derive(Debug)]
pub struct HashMap<const N: usize> {
    fd: OwnedFd,
}

impl<const N: usize> HashMap<N> {
    /// Takes the map behind `fd`.
    ///
    /// # Errors
    /// `InvalidData` if its keys or values have another size.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let info = map_info(fd.as_fd())?;
        if (info.key_size, info.value_size as usize) != (8, N) {
            let text = format!("a map of other shape: {info:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(Self { fd })
    }

    /// The key that comes behind `key`, or the first; `None` at the end. What changes
    /// meanwhile may be met twice or never.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn next_key(&self, key: Option<u64>) -> io::Result<Option<u64>> {
        let mut next = 0_u64;
        let mut attr = ElementAttr {
            map: number(self.fd.as_fd()),
            key: key
                .as_ref()
                .map_or(0, |key| address(std::ptr::from_ref(key))),
            value: address(&raw mut next),
            ..ElementAttr::default()
        };
        // SAFETY: the kernel reads 8 bytes at `key` and writes 8 to `next`: see `new`.
        match unsafe { bpf(MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The value of `key`; `None` if it is not there.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn get(&self, key: u64) -> io::Result<Option<[u8; N]>> {
        let mut value = [0; N];
        let mut attr = ElementAttr {
            map: number(self.fd.as_fd()),
            key: address(&raw const key),
            value: address(value.as_mut_ptr()),
            ..ElementAttr::default()
        };
        // SAFETY: the kernel reads 8 bytes at `key` and writes N to `value`: see `new`.
        match unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr) } {
            Ok(_) => Ok(Some(value)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Adds `key`, or changes its value.
    ///
    /// # Errors
    /// Those of bpf(2): `E2BIG` when the map is full.
    pub fn insert(&self, key: u64, value: [u8; N]) -> io::Result<()> {
        let mut attr = ElementAttr {
            map: number(self.fd.as_fd()),
            key: address(&raw const key),
            value: address(value.as_ptr()),
            ..ElementAttr::default()
        };
        // SAFETY: the kernel reads 8 bytes at `key` and N at `value`: see `new`.
        unsafe { bpf(MAP_UPDATE_ELEM, &mut attr) }.map(|_| ())
    }

    /// Removes `key`; says whether it was there.
    ///
    /// # Errors
    /// Those of bpf(2).
    pub fn remove(&self, key: u64) -> io::Result<bool> {
        let mut attr = ElementAttr {
            map: number(self.fd.as_fd()),
            key: address(&raw const key),
            ..ElementAttr::default()
        };
        // SAFETY: the kernel reads 8 bytes at `key`: see `new`.
        match unsafe { bpf(MAP_DELETE_ELEM, &mut attr) } {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
