//! A machine's memory, in MiB as QEMU and libvirt count it, written as `512M` or `2G`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};

/// How much memory a machine has: from 16 MiB to 16 TiB.
///
/// ```
/// use libreplica::machine::Memory;
/// let memory: Memory = "2G".parse()?;
/// assert_eq!((memory.mib(), memory.to_string()), (2048, "2G".to_owned()));
/// assert!("2".parse::<Memory>().is_err());
/// # Ok::<(), libreplica::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Memory {
    mib: u32,
}

impl Memory {
    /// In MiB.
    pub const fn mib(self) -> u32 {
        self.mib
    }
}

impl Default for Memory {
    fn default() -> Self {
        Self { mib: 1024 }
    }
}

impl FromStr for Memory {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parts = [("M", 1), ("G", 1024), ("T", 1 << 20)];
        let found = parts.iter().find_map(|(unit, mib)| {
            let digits = text.strip_suffix(unit)?;
            let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| digits.parse::<u32>().ok()?.checked_mul(*mib))?
        });
        found
            .filter(|mib| (16..=16 << 20).contains(mib))
            .map(|mib| Self { mib })
            .ok_or_else(|| {
                Error::new(ErrorKind::Invalid, "read the machine's memory")
                    .detail(format!("`{text}` is no size from 16M to 16T"))
                    .advice("write it as 512M or 4G")
            })
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.mib.is_multiple_of(1024) {
            write!(f, "{}G", self.mib / 1024)
        } else {
            write!(f, "{}M", self.mib)
        }
    }
}

impl TryFrom<String> for Memory {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Memory> for String {
    fn from(memory: Memory) -> Self {
        memory.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_they_are_printed() {
        for (text, mib) in [("16M", 16), ("512M", 512), ("1G", 1024), ("16T", 16 << 20)] {
            assert_eq!(text.parse::<Memory>().unwrap().mib(), mib, "{text}");
        }
        assert_eq!("1536M".parse::<Memory>().unwrap().to_string(), "1536M");
        for bad in [
            "",
            "G",
            "2",
            "2g",
            "2GB",
            "+2G",
            "0G",
            "15M",
            "17T",
            "99999999999G",
            "4294967295G",
        ] {
            let error = bad.parse::<Memory>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
        }
    }
}
