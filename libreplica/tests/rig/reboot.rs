//! A restart of the machine, for what inline capture has kept: the ledger's header is of another
//! boot (`capture/inline/ledger.rs`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// It happened since the service that has kept `folder` ended.
pub fn happened(folder: &Path) {
    let path = folder.join("dirty");
    let mut header = [0; 60];
    let file = File::options().read(true).write(true).open(path).unwrap();
    file.read_exact_at(&mut header, 0).unwrap();
    header[40..56].fill(9);
    let crc = crc32fast::hash(&header[..56]);
    header[56..].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&header, 0).unwrap();
}
