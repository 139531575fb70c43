//! What a machine is, as its owner writes it down once, in TOML. Everything has a
//! default but the name; what is not known is refused, so that a slip of the pen does not
//! become a machine that is another one than was meant.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::memory::Memory;
use super::network::Network;
use crate::error::{Error, ErrorKind, Result};
use crate::policy::parse_duration;

/// A machine to boot a volume in.
///
/// ```
/// use libreplica::machine::{Bus, MachineDefinition};
/// let machine = MachineDefinition::from_toml(r#"
///     name = "db1"
///     memory = "2G"
///     life = { console = "login:" }
///     [[disk]]
///     bus = "sata"
/// "#)?;
/// assert_eq!(machine.disks[0].bus, Bus::Sata);
/// assert!(MachineDefinition::from_toml("name = 'db1'\nmemroy = '2G'").is_err());
/// # Ok::<(), libreplica::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineDefinition {
    /// What people call it.
    pub name: String,
    /// Its memory.
    #[serde(default)]
    pub memory: Memory,
    /// How many CPUs it has.
    #[serde(default = "one")]
    pub cpus: u16,
    /// What starts first in it.
    #[serde(default)]
    pub firmware: Firmware,
    /// Which board it has.
    #[serde(default, rename = "type")]
    pub kind: MachineType,
    /// How long a drill waits for its sign of life: `90s`, `10m`.
    #[serde(default = "ten_minutes", with = "duration")]
    pub timeout: Duration,
    /// By what a drill knows that it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub life: Option<Life>,
    /// Its disks, in the order in which the firmware sees them; the first one is booted. None
    /// means: this volume alone.
    #[serde(default, rename = "disk")]
    pub disks: Vec<Disk>,
    /// Its network cards.
    #[serde(default, rename = "network")]
    pub networks: Vec<Network>,
}

/// What starts first in a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// A PC's BIOS: the disk's first sector is run.
    #[default]
    Bios,
    /// UEFI: a program is run from the disk's EFI partition.
    Uefi,
}

/// Which board a machine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineType {
    /// With PCI Express.
    #[default]
    Q35,
    /// With PCI, for guests of old.
    Pc,
}

impl MachineType {
    /// QEMU's and libvirt's name for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Pc => "pc",
        }
    }
}

/// A disk of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Which volume of the store it is, by name or id; without: the one that the definition is
    /// kept with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
    /// What it is connected to.
    #[serde(default)]
    pub bus: Bus,
    /// The serial number that the guest sees: up to 20 letters, digits, `-`, `_` and `.`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

/// What a disk is connected to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bus {
    /// virtio-blk: `/dev/vda` and on.
    #[default]
    VirtioBlk,
    /// virtio-scsi: `/dev/sda` and on.
    VirtioScsi,
    /// AHCI: `/dev/sda` and on.
    Sata,
    /// NVMe: `/dev/nvme0n1` and on.
    Nvme,
}

/// By what one knows that a machine lives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Life {
    /// This text on the serial console.
    Console(String),
    /// The guest accepts a connection at this TCP port, on its first card, in an isolated network.
    Tcp(u16),
    /// A program and its arguments, which the QEMU guest agent in the guest runs until it
    /// ends well.
    Command(Vec<String>),
}

impl MachineDefinition {
    /// Reads and checks a definition.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], saying what is wrong where.
    pub fn from_toml(text: &str) -> Result<Self> {
        let parsed: Result<Self, _> = toml::from_str(text);
        let mut machine = parsed.map_err(|source| {
            Error::new(ErrorKind::Invalid, "read the machine's definition").source(source)
        })?;
        if machine.disks.is_empty() {
            machine.disks.push(Disk::default());
        }
        machine.check()?;
        Ok(machine)
    }

    /// The definition as [`from_toml`](Self::from_toml) reads it.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|source| {
            Error::new(ErrorKind::Invalid, "write the machine's definition").source(source)
        })
    }
}

const fn one() -> u16 {
    1
}

const fn ten_minutes() -> Duration {
    Duration::from_mins(10)
}

/// Durations as text.
mod duration {
    use super::{Duration, parse_duration};
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{}s", value.as_secs()))
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        let bad = || D::Error::custom(format!("`{text}` is no time; write it as 90s or 10m"));
        parse_duration(&text).ok_or_else(bad)
    }
}
