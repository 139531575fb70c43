//! What a mounted btrfs says of itself: its id, by which /sys/fs/btrfs lists its devices
//! (its mounts carry an anonymous device number that leads to none of them), and its
//! block groups, which tell where an address of its own, as in FIEMAP, lies on which device.
//! Source: linux/btrfs.h (`BTRFS_IOC_FS_INFO`, `BTRFS_IOC_TREE_SEARCH`), linux/btrfs_tree.h
//! (`struct btrfs_chunk`).

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

mod ioctl {
    nix::ioctl_read!(fs_info, 0x94, 31, super::FsInfo);
    nix::ioctl_readwrite!(tree_search, 0x94, 17, super::Search);
}

/// The head of `struct btrfs_ioctl_fs_info_args`, and the rest of its 1024 bytes.
#[repr(C)]
#[derive(Clone, Copy)]
struct FsInfo {
    max_id: u64,
    num_devices: u64,
    fsid: [u8; 16],
    rest: [u64; 124],
}

const _: () = assert!(size_of::<FsInfo>() == 1024);

/// The 16 bytes of the filesystem's UUID.
///
/// # Errors
/// `ENOTTY` if the descriptor is not on a btrfs.
pub fn filesystem_id(mount: impl AsFd) -> nix::Result<[u8; 16]> {
    let mut info = FsInfo {
        max_id: 0,
        num_devices: 0,
        fsid: [0; 16],
        rest: [0; 124],
    };
    // SAFETY: the descriptor is open for the call; the ioctl copies exactly the 1024 bytes
    // of `FsInfo`, asserted above.
    unsafe { ioctl::fs_info(mount.as_fd().as_raw_fd(), &raw mut info) }?;
    Ok(info.fsid)
}

const CHUNK_TREE: u64 = 3;
const CHUNK_OBJECT: u64 = 256;
const CHUNK_ITEM: u32 = 228;
/// The bits of a block group's type that say how its data is spread over devices.
const PROFILES: u64 = 0x7f8;

/// `struct btrfs_ioctl_search_key`.
#[repr(C)]
#[derive(Clone, Copy)]
struct SearchKey {
    tree_id: u64,
    min_objectid: u64,
    max_objectid: u64,
    min_offset: u64,
    max_offset: u64,
    min_transid: u64,
    max_transid: u64,
    min_type: u32,
    max_type: u32,
    nr_items: u32,
    unused: u32,
    unused_more: [u64; 4],
}

/// `struct btrfs_ioctl_search_args`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Search {
    key: SearchKey,
    items: [u8; 4096 - size_of::<SearchKey>()],
}

const _: () = assert!(size_of::<SearchKey>() == 104);
const _: () = assert!(size_of::<Search>() == 4096);

/// A range of a btrfs's own addresses that lies in one piece on one device, and nowhere
/// else; in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockGroup {
    /// Its first address.
    pub logical: u64,
    /// How long it is.
    pub length: u64,
    /// Where it begins on the device.
    pub physical: u64,
}

/// The block groups that lie in one piece, in the order of their addresses; mirrored and striped
/// ones are left out.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN; `ENOTTY` if the descriptor is not on a btrfs; `EPROTO`
/// if the answer makes no sense.
pub fn plain_groups(file: impl AsFd) -> nix::Result<Vec<BlockGroup>> {
    let fd = file.as_fd().as_raw_fd();
    let mut groups = Vec::new();
    let mut from = 0;
    loop {
        let mut search = Search {
            key: SearchKey {
                tree_id: CHUNK_TREE,
                min_objectid: CHUNK_OBJECT,
                max_objectid: CHUNK_OBJECT,
                min_offset: from,
                max_offset: u64::MAX,
                min_transid: 0,
                max_transid: u64::MAX,
                min_type: CHUNK_ITEM,
                max_type: CHUNK_ITEM,
                nr_items: u32::MAX,
                unused: 0,
                unused_more: [0; 4],
            },
            items: [0; 4096 - size_of::<SearchKey>()],
        };
        // SAFETY: the descriptor is open for the call; the ioctl reads and writes exactly
        // the 4096 bytes of `Search`, asserted above.
        unsafe { ioctl::tree_search(fd, &raw mut search) }?;
        let count = search.key.nr_items;
        match parse(&search.items, count, &mut groups).ok_or(Errno::EPROTO)? {
            Some(last) if last < u64::MAX => from = last + 1,
            _ => return Ok(groups),
        }
    }
}

/// Adds the groups of one answer; the address of the last, or `None` if there was none.
fn parse(mut items: &[u8], count: u32, groups: &mut Vec<BlockGroup>) -> Option<Option<u64>> {
    let mut last = None;
    for _ in 0..count {
        // `struct btrfs_ioctl_search_header`, in the machine's byte order.
        let (header, rest) = items.split_at_checked(32)?;
        let logical = u64::from_ne_bytes(header[16..24].try_into().ok()?);
        let len = u32::from_ne_bytes(header[28..32].try_into().ok()?);
        let (item, rest) = rest.split_at_checked(len as usize)?;
        items = rest;
        last = Some(logical);
        // `struct btrfs_chunk`, as on disk: little-endian.
        let number = |at: usize| {
            let bytes = item.get(at..at + 8)?.try_into().ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        let (length, kind, physical) = (number(0)?, number(24)?, number(56)?);
        let stripes = u16::from_le_bytes(item.get(44..46)?.try_into().ok()?);
        if stripes == 1 && kind & PROFILES == 0 {
            groups.push(BlockGroup {
                logical,
                length,
                physical,
            });
        }
    }
    Some(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(logical: u64, length: u64, kind: u64, stripes: u16, physical: u64) -> Vec<u8> {
        let len = 48 + 32 * usize::from(stripes);
        let mut item = vec![0; 32 + len];
        item[16..24].copy_from_slice(&logical.to_ne_bytes());
        item[28..32].copy_from_slice(&(len as u32).to_ne_bytes());
        item[32..40].copy_from_slice(&length.to_le_bytes());
        item[56..64].copy_from_slice(&kind.to_le_bytes());
        item[76..78].copy_from_slice(&stripes.to_le_bytes());
        item[88..96].copy_from_slice(&physical.to_le_bytes());
        item
    }

    #[test]
    fn only_groups_in_one_piece_have_a_place() {
        let mut answer = item(1 << 20, 1 << 23, 1, 1, 5 << 20);
        answer.extend(item(9 << 20, 1 << 23, 1 | 32, 2, 20 << 20));
        let mut groups = Vec::new();
        let last = parse(&answer, 2, &mut groups);
        assert_eq!(last, Some(Some(9 << 20)));
        let group = BlockGroup {
            logical: 1 << 20,
            length: 1 << 23,
            physical: 5 << 20,
        };
        assert_eq!(groups, [group]);
        assert_eq!(parse(&answer, 0, &mut groups), Some(None));
        assert_eq!(parse(&answer[..100], 2, &mut groups), None);
        assert_eq!(parse(&answer, 3, &mut groups), None);
    }
}
