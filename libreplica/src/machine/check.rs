//! What a definition must be, beyond its types. All of it reaches QEMU's command line and
//! libvirt's XML, so names are held to plain letters here rather than quoted there alone.

use super::definition::{Life, MachineDefinition};
use super::network::Link;
use crate::error::{Error, ErrorKind, Result};

/// More than any machine that is one disk's owner has.
const MOST_DISKS: usize = 32;
const MOST_NETWORKS: usize = 16;
const MOST_CPUS: u16 = 512;

impl MachineDefinition {
    /// Whether it can be a machine.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`], saying what is wrong.
    pub fn check(&self) -> Result<()> {
        if !is_plain(&self.name, 64) {
            return Err(invalid(format!(
                "`{}` is no name: 1 to 64 letters, digits, `-`, `_` and `.` expected",
                self.name
            )));
        }
        if !(1..=MOST_CPUS).contains(&self.cpus) {
            return Err(invalid(format!(
                "{} CPUs: 1 to {MOST_CPUS} expected",
                self.cpus
            )));
        }
        if self.timeout.is_zero() {
            return Err(invalid("timeout: it must be longer than nothing".into()));
        }
        self.check_disks()?;
        self.check_networks()?;
        self.check_life()
    }

    fn check_disks(&self) -> Result<()> {
        if !(1..=MOST_DISKS).contains(&self.disks.len()) {
            return Err(invalid(format!("1 to {MOST_DISKS} disks expected")));
        }
        for (number, disk) in self.disks.iter().enumerate() {
            let serial = disk.serial.as_deref().unwrap_or("none");
            if !is_plain(serial, 20) {
                return Err(invalid(format!(
                    "disk {number}: `{serial}` is no serial number: 1 to 20 letters, digits, \
                     `-`, `_` and `.` expected"
                )));
            }
            let earlier = &self.disks[..number];
            if earlier.iter().any(|other| other.volume == disk.volume) {
                let whose = disk.volume.as_deref().unwrap_or("the volume itself");
                return Err(invalid(format!("disk {number}: {whose} is a disk already")));
            }
        }
        Ok(())
    }

    fn check_networks(&self) -> Result<()> {
        if self.networks.len() > MOST_NETWORKS {
            return Err(invalid(format!(
                "at most {MOST_NETWORKS} networks expected"
            )));
        }
        for (number, network) in self.networks.iter().enumerate() {
            if let Some(mac) = network.mac.as_deref().filter(|mac| !is_mac(mac)) {
                return Err(invalid(format!(
                    "network {number}: `{mac}` is no MAC address of one card: six bytes in hex \
                     with colons expected, of which the first is even"
                )));
            }
        }
        Ok(())
    }

    fn check_life(&self) -> Result<()> {
        match &self.life {
            Some(Life::Console(text)) if text.is_empty() || text.len() > 256 => {
                Err(invalid("life: a text of 1 to 256 bytes expected".into()))
            }
            Some(Life::Console(text)) if text.chars().any(char::is_control) => {
                Err(invalid("life: the text must be within one line".into()))
            }
            Some(Life::Tcp(0)) => Err(invalid("life: 0 is no port".into())),
            Some(Life::Tcp(_)) => match self.networks.first() {
                Some(network) if network.test == Link::Isolated => Ok(()),
                Some(_) => Err(invalid(
                    "life: a TCP port is reached through the first network only if that is \
                     isolated in a drill (test = \"isolated\")"
                        .into(),
                )),
                None => Err(invalid("life: a TCP port needs a [[network]]".into())),
            },
            Some(Life::Command(words)) if !is_command(words) => Err(invalid(
                "life: a program by its absolute path, and its arguments, expected".into(),
            )),
            _ => Ok(()),
        }
    }
}

fn invalid(detail: String) -> Error {
    Error::new(ErrorKind::Invalid, "check the machine's definition").detail(detail)
}

/// Letters that mean nothing to anybody, no longer than `most`.
fn is_plain(text: &str, most: usize) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    (1..=most).contains(&text.len()) && text.bytes().all(plain)
}

/// An address of one card: an odd first byte would mean several.
fn is_mac(text: &str) -> bool {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|part| {
            let hex = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            hex.then(|| u8::from_str_radix(part, 16).ok())?
        })
        .collect();
    bytes.is_some_and(|bytes| bytes.len() == 6 && bytes[0] & 1 == 0)
}

fn is_command(words: &[String]) -> bool {
    let no_end = |word: &String| !word.contains('\0');
    words
        .first()
        .is_some_and(|program| program.starts_with('/'))
        && words.iter().all(no_end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(more: &str) -> String {
        let text = format!("name = 'db1'\n{more}");
        let error = MachineDefinition::from_toml(&text).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (more, part) in [
            ("memory = '2'", "16M to 16T"),
            ("cpus = 0", "0 CPUs"),
            ("timeout = '5'", "`5` is no time"),
            ("firmware = 'coreboot'", "coreboot"),
            ("disks = []", "disks"),
            ("[[disk]]\nserial = 'a,b'", "disk 0: `a,b`"),
            ("[[disk]]\n[[disk]]", "disk 1: the volume itself"),
            (
                "[[disk]]\n[[disk]]\nvolume = 'w'\n[[disk]]\nvolume = 'w'",
                "disk 2: w is",
            ),
            ("[[disk]]\nbus = 'ide'", "ide"),
            (
                "[[network]]\nmac = '52:54:00:12:34'",
                "network 0: `52:54:00:12:34`",
            ),
            ("[[network]]\nmac = '53:54:00:12:34:56'", "even"),
            ("[[network]]\nrecovery = 'bridge:a b'", "`bridge:a b`"),
            ("[[network]]\naddress = '10.0.0.1'", "`10.0.0.1`"),
            ("life = { tcp = 22 }", "needs a [[network]]"),
            ("life = { tcp = 0 }\n[[network]]", "0 is no port"),
            (
                "life = { tcp = 22 }\n[[network]]\ntest = 'bridge:b'",
                "isolated",
            ),
            ("life = { console = '' }", "1 to 256"),
            ("life = { console = \"a\\nb\" }", "one line"),
            ("life = { command = ['true'] }", "absolute"),
            ("life = { command = [] }", "absolute"),
            ("life = { ping = 1 }", "ping"),
        ] {
            let text = said(more);
            assert!(text.contains(part), "{more}: {text}");
        }
        for bad in ["", "a b", "a/b", "a,b", "<a>", &"a".repeat(65)] {
            let text = format!("name = \"{bad}\"");
            let error = MachineDefinition::from_toml(&text).unwrap_err();
            assert!(error.to_string().contains("is no name"), "{error}");
        }
        assert!(MachineDefinition::from_toml("memory = '2G'").is_err());
    }

    #[test]
    fn a_definition_is_written_as_it_is_read() {
        let text = r#"
            name = "db1"
            memory = "3G"
            cpus = 4
            firmware = "uefi"
            type = "pc"
            timeout = "90s"
            life = { command = ["/usr/bin/pg_isready", "-q"] }
            [[disk]]
            serial = "S1"
            [[disk]]
            volume = "wal"
            bus = "virtio-scsi"
            [[network]]
            source = "production, floor 2"
            recovery = "bridge:br7"
            mac = "52:54:00:12:34:56"
            model = "e1000e"
            address = "192.168.5.10/24"
        "#;
        let machine = MachineDefinition::from_toml(text).unwrap();
        let again = MachineDefinition::from_toml(&machine.to_toml().unwrap()).unwrap();
        assert_eq!(machine, again);
        assert_eq!(machine.disks.len(), 2);
        assert_eq!(machine.timeout.as_secs(), 90);
        let least = MachineDefinition::from_toml("name = 'a'").unwrap();
        assert_eq!(
            (least.disks.len(), least.cpus, least.memory.mib()),
            (1, 1, 1024)
        );
        assert_eq!(
            least,
            MachineDefinition::from_toml(&least.to_toml().unwrap()).unwrap()
        );
    }
}
