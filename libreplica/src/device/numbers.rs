//! The numbers by which the kernel knows a disk.

use std::fmt;
use std::str::FromStr;

use nix::sys::stat::{major, minor};

/// A device number. Loop and SCSI disks come and go under the same one: [`DiskSeq`] tells
/// them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevNo {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl DevNo {
    /// From `st_dev` or `st_rdev`.
    pub fn from_stat(number: u64) -> Self {
        Self {
            major: major(number) as u32,
            minor: minor(number) as u32,
        }
    }
}

impl fmt::Display for DevNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The text was not `MAJOR:MINOR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a device number (MAJOR:MINOR)")]
pub struct NotADevNo;

impl FromStr for DevNo {
    type Err = NotADevNo;

    fn from_str(text: &str) -> Result<Self, NotADevNo> {
        let (major, minor) = text.trim().split_once(':').ok_or(NotADevNo)?;
        Ok(Self {
            major: major.parse().map_err(|_| NotADevNo)?,
            minor: minor.parse().map_err(|_| NotADevNo)?,
        })
    }
}

/// The number the kernel gives a disk when it appears, and anew when its medium changes or
/// a loop device gets another file; never used twice in one boot. Zero: the kernel is older
/// than 5.15 and has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskSeq(u64);

impl DiskSeq {
    /// What sysfs or the ioctl said.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The plain number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for DiskSeq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_stat_and_of_sysfs_agree() {
        let from_stat = DevNo::from_stat(nix::sys::stat::makedev(259, 70_000));
        assert_eq!(from_stat, "259:70000\n".parse().unwrap());
        assert_eq!(from_stat.to_string(), "259:70000");
        assert_eq!("259".parse::<DevNo>(), Err(NotADevNo));
    }
}
