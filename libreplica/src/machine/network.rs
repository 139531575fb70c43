//! A machine's network cards, and what each is connected to: at home, after a failover, and
//! in a drill, which by default reaches nothing and nobody.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};

/// A network card. The guest sees the same card, with the same address, wherever it runs; only
/// what is behind it differs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// What the source machine's card is connected to, as its owner calls it; for people.
    #[serde(default)]
    pub source: String,
    /// What it is connected to after a failover.
    #[serde(default)]
    pub recovery: Link,
    /// What it is connected to in a drill.
    #[serde(default)]
    pub test: Link,
    /// The card's MAC address: six bytes in hex with colons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    /// Which card the guest sees.
    #[serde(default)]
    pub model: NicModel,
    /// The address that the guest gives itself, for the isolated network to be around it; without,
    /// it is given one by DHCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<StaticAddress>,
}

/// Which card the guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NicModel {
    /// virtio-net.
    #[default]
    Virtio,
    /// Intel's gigabit card of old, with drivers in every guest.
    E1000,
    /// Its successor.
    E1000e,
    /// Realtek's 8139.
    Rtl8139,
}

impl NicModel {
    /// QEMU's name of the device.
    pub const fn device(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-net-pci",
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::Rtl8139 => "rtl8139",
        }
    }

    /// libvirt's name of the model.
    pub const fn libvirt(self) -> &'static str {
        match self {
            Self::Virtio => "virtio",
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::Rtl8139 => "rtl8139",
        }
    }
}

/// What a card is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Link {
    /// A network of its own, with nobody in it: the machine's packets go nowhere.
    #[default]
    Isolated,
    /// A bridge of the host.
    Bridge(String),
    /// A tap device of the host that is there already.
    Tap(String),
    /// A network of libvirt's; only for its domains.
    Libvirt(String),
}

impl FromStr for Link {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        // An interface's name, by the kernel's rule; a network's is no longer here either.
        let named = |name: &str| {
            let part = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            (1..=15).contains(&name.len()) && name.bytes().all(part)
        };
        match text.split_once(':') {
            None if text == "isolated" => Ok(Self::Isolated),
            Some(("bridge", name)) if named(name) => Ok(Self::Bridge(name.to_owned())),
            Some(("tap", name)) if named(name) => Ok(Self::Tap(name.to_owned())),
            Some(("libvirt", name)) if named(name) => Ok(Self::Libvirt(name.to_owned())),
            _ => Err(Error::new(ErrorKind::Invalid, "read a network")
                .detail(format!("`{text}` is nothing to connect a card to"))
                .advice("write isolated, bridge:NAME, tap:NAME or libvirt:NAME")),
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Isolated => f.write_str("isolated"),
            Self::Bridge(name) => write!(f, "bridge:{name}"),
            Self::Tap(name) => write!(f, "tap:{name}"),
            Self::Libvirt(name) => write!(f, "libvirt:{name}"),
        }
    }
}

/// An address and how long its network's prefix is, as in `192.168.5.10/24`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StaticAddress {
    address: Ipv4Addr,
    prefix: u8,
}

impl StaticAddress {
    /// The guest's address.
    pub const fn address(self) -> Ipv4Addr {
        self.address
    }

    /// Its network, as in `192.168.5.0/24`.
    pub fn network(self) -> String {
        let mask = u32::MAX << (32 - u32::from(self.prefix));
        let network = Ipv4Addr::from_bits(self.address.to_bits() & mask);
        format!("{network}/{}", self.prefix)
    }
}

impl FromStr for StaticAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let address = address.parse().ok()?;
            let prefix = prefix.parse().ok()?;
            // Room for the guest, the network's own side and a name server.
            (8..=28)
                .contains(&prefix)
                .then_some(Self { address, prefix })
        });
        parsed.ok_or_else(|| {
            Error::new(ErrorKind::Invalid, "read a card's address")
                .detail(format!(
                    "`{text}` is no IPv4 address with a prefix of 8 to 28 bits"
                ))
                .advice("write it as 192.168.5.10/24")
        })
    }
}

impl fmt::Display for StaticAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// Text in the definition, values in the program.
macro_rules! by_text {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = Error;

            fn try_from(text: String) -> Result<Self, Error> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    };
}

by_text!(Link);
by_text!(StaticAddress);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_addresses_are_read_as_they_are_printed() {
        for text in ["isolated", "bridge:br0", "tap:vm-7.1", "libvirt:default"] {
            assert_eq!(text.parse::<Link>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "none",
            "bridge:",
            "bridge:a,b",
            "tap:a/b",
            "br0",
            "bridge:sixteenletters__",
        ] {
            assert!(bad.parse::<Link>().is_err(), "{bad}");
        }
        let address: StaticAddress = "192.168.5.130/25".parse().unwrap();
        assert_eq!(address.to_string(), "192.168.5.130/25");
        assert_eq!(address.network(), "192.168.5.128/25");
        for bad in [
            "",
            "1.2.3.4",
            "1.2.3.4/",
            "1.2.3/24",
            "1.2.3.4/0",
            "1.2.3.4/32",
            "::1/24",
        ] {
            assert!(bad.parse::<StaticAddress>().is_err(), "{bad}");
        }
    }
}
