//! Which boot of the machine this is: counters and device numbers mean nothing across two.

use std::fmt;
use std::fs;

use crate::error::{Error, ErrorKind, IoContext, Result};

const PATH: &str = "/proc/sys/kernel/random/boot_id";

/// The random id of one boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BootId([u8; 16]);

impl BootId {
    /// Of the boot that is running.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] without /proc.
    pub fn current() -> Result<Self> {
        let text = fs::read_to_string(PATH).at("read the boot id", PATH)?;
        Self::parse(text.trim()).ok_or_else(|| {
            Error::new(ErrorKind::Kernel, "read the boot id")
                .path(PATH)
                .detail(format!("{text:?} is no id"))
        })
    }

    /// From its text (`8-4-4-4-12` hex digits); `None` if it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let digits: Vec<u8> = text.bytes().filter(|&b| b != b'-').collect();
        if digits.len() != 32 || text.len() != 36 {
            return None;
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }

    /// The id itself.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// From its bytes, as [`BootId::as_bytes`] gave them.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&uuid_text(&self.0))
    }
}

/// Sixteen bytes as a UUID is written.
pub(super) fn uuid_text(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_boot_has_an_id_that_round_trips() {
        let id = BootId::current().unwrap();
        assert_eq!(BootId::parse(&id.to_string()), Some(id));
        assert_eq!(BootId::parse("00"), None);
    }
}
