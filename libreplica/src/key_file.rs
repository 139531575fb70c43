//! Volume keys as they are kept in files: 32 raw bytes, or 64 hexadecimal digits.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use hrl_format::VolumeKey;

use crate::error::{Error, ErrorKind, IoContext, Result};

/// The longest key file: 64 hexadecimal digits and a line's end.
const BYTES_MAX: u64 = 66;

/// Reads the volume key in the file at `path`.
///
/// # Errors
/// [`ErrorKind::Key`] when the file holds no key, else what the system said.
pub fn read_key_file(path: &Path) -> Result<VolumeKey> {
    let mut bytes = zeroize::Zeroizing::new(Vec::with_capacity(BYTES_MAX as usize + 1));
    File::open(path)
        .and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes))
        .at("read the key file", path)?;
    VolumeKey::from_file_bytes(&bytes).map_err(|source| {
        Error::new(ErrorKind::Key, "read the key file")
            .path(path)
            .source(source)
            .advice("it must hold 32 raw bytes or 64 hexadecimal digits")
    })
}
