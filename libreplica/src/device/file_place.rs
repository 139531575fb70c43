//! Where the bytes of a file lie on the device of its filesystem. Only filesystems are
//! asked whose answer is known to mean that, and only plain answers are taken.

use std::fs::File;

use hrl_format::units::{ByteLen, ByteOffset, Extent};

use crate::sys::btrfs::{self, BlockGroup};
use crate::sys::fiemap::{self, FileExtent};

/// The bytes of the only device of a filesystem of this `kind` that hold `file`, in the
/// file's order; `None` if it has holes or shares blocks, or nobody can tell. True for as
/// long as the filesystem leaves the file where it is, as it does while it is swap.
pub(super) fn on_device(file: &File, kind: &str) -> Option<Vec<Extent>> {
    let pieces = fiemap::extents(file).ok().filter(|p| is_plain(p))?;
    let extents = pieces.iter().map(|piece| {
        let at = ByteOffset::new(piece.physical);
        Extent::new(at, ByteLen::new(piece.length))
    });
    match kind {
        "ext2" | "ext3" | "ext4" | "xfs" => extents.collect(),
        // It answers in addresses of its own.
        "btrfs" => {
            let groups = btrfs::plain_groups(file).ok()?;
            let mut places = Vec::new();
            for extent in extents {
                places.extend(through(&groups, extent?)?);
            }
            Some(places)
        }
        _ => None,
    }
}

/// Whether each piece follows the one before it in the file, from its start, and is stored
/// as it is, for this file alone.
fn is_plain(pieces: &[FileExtent]) -> bool {
    let mut at = 0;
    pieces.iter().all(|piece| {
        let follows = piece.logical == at;
        at = piece.logical.saturating_add(piece.length);
        follows && piece.flags & !fiemap::HARMLESS == 0
    })
}

/// `addresses` of a btrfs as bytes of its device.
fn through(groups: &[BlockGroup], addresses: Extent) -> Option<Vec<Extent>> {
    let mut places = Vec::new();
    let mut at = addresses.offset().get();
    let end = addresses.end().get();
    while at < end {
        let (group, within) = groups.iter().find_map(|group| {
            let within = at.checked_sub(group.logical)?;
            (within < group.length).then_some((group, within))
        })?;
        let len = (end - at).min(group.length - within);
        let place = ByteOffset::new(group.physical.checked_add(within)?);
        places.push(Extent::new(place, ByteLen::new(len))?);
        at += len;
    }
    Some(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(offset: u64, len: u64) -> Extent {
        Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap()
    }

    #[test]
    fn holes_and_blocks_of_several_files_are_no_place() {
        let piece = |logical, flags| FileExtent {
            logical,
            physical: 1 << 20,
            length: 4096,
            flags,
        };
        assert!(is_plain(&[piece(0, 0), piece(4096, 0x800)]));
        assert!(!is_plain(&[piece(4096, 0)]));
        assert!(!is_plain(&[piece(0, 0), piece(8192, 0)]));
        assert!(!is_plain(&[piece(0, 0x2)]), "not known");
        assert!(!is_plain(&[piece(0, 0x2000)]), "shared with another file");
    }

    #[test]
    fn addresses_of_btrfs_are_followed_from_group_to_group() {
        let group = |logical, physical| BlockGroup {
            logical,
            length: 1 << 23,
            physical,
        };
        let groups = [
            group(1 << 30, 64 << 20),
            group((1 << 30) + (1 << 23), 5 << 20),
        ];
        let within = extent((1 << 30) + 4096, 8192);
        assert_eq!(
            through(&groups, within),
            Some(vec![extent((64 << 20) + 4096, 8192)])
        );
        let over = extent((1 << 30) + (1 << 23) - 4096, 8192);
        let parts = vec![
            extent((64 << 20) + (1 << 23) - 4096, 4096),
            extent(5 << 20, 4096),
        ];
        assert_eq!(through(&groups, over), Some(parts));
        assert_eq!(through(&groups, extent((1 << 30) - 4096, 8192)), None);
        let end = (1 << 30) + (2 << 23);
        assert_eq!(through(&groups, extent(end - 4096, 8192)), None);
    }
}
