//! The same machine as a libvirt domain, for those who run their machines by libvirt: to be
//! given to `virsh define`. Names in a definition are plain letters; what comes from elsewhere
//! is escaped all the same.

use std::fmt::Write;
use std::path::Path;

use super::arguments::{Networks, Source};
use super::definition::{Bus, Disk, Firmware, MachineDefinition};
use super::network::{Link, Network};
use crate::error::{Error, ErrorKind, Result};

const PRINT: &str = "print the libvirt domain";

/// The domain's XML, whose disks are `sources`, in the definition's order.
///
/// # Errors
/// [`ErrorKind::Invalid`] if there are not as many sources as disks, or a path is not UTF-8.
pub fn domain_xml(
    machine: &MachineDefinition,
    sources: &[Source],
    networks: Networks,
) -> Result<String> {
    if sources.len() != machine.disks.len() {
        let (sources, disks) = (sources.len(), machine.disks.len());
        let detail = format!("{sources} sources for {disks} disks");
        return Err(Error::new(ErrorKind::Invalid, PRINT).detail(detail));
    }
    let mut xml = Xml::default();
    xml.open("domain type='kvm'");
    xml.text("name", &machine.name);
    xml.line(&format!(
        "<memory unit='MiB'>{}</memory>",
        machine.memory.mib()
    ));
    xml.line(&format!("<vcpu>{}</vcpu>", machine.cpus));
    let firmware = match machine.firmware {
        Firmware::Bios => "",
        Firmware::Uefi => " firmware='efi'",
    };
    xml.open(&format!("os{firmware}"));
    let kind = machine.kind.as_str();
    xml.line(&format!("<type arch='x86_64' machine='{kind}'>hvm</type>"));
    xml.close("os");
    xml.line("<features><acpi/><apic/></features>");
    xml.line("<cpu mode='host-passthrough'/>");
    xml.line("<clock offset='utc'/>");
    xml.open("devices");
    let mut letters = Letters::default();
    for (number, (disk, source)) in machine.disks.iter().zip(sources).enumerate() {
        let target = letters.next(disk.bus)?;
        xml.disk(disk, source, &target, BootOrder(number + 1))?;
    }
    if machine.disks.iter().any(|disk| disk.bus == Bus::VirtioScsi) {
        xml.line("<controller type='scsi' model='virtio-scsi'/>");
    }
    for network in &machine.networks {
        xml.network(network, networks);
    }
    xml.line("<serial type='pty'><target port='0'/></serial>");
    xml.line("<console type='pty'><target type='serial' port='0'/></console>");
    let agent = "<target type='virtio' name='org.qemu.guest_agent.0'/>";
    xml.line(&format!("<channel type='unix'>{agent}</channel>"));
    xml.line("<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>");
    xml.close("devices");
    xml.close("domain");
    Ok(xml.text)
}

/// Target names, by which libvirt orders the disks of a bus.
#[derive(Default)]
struct Letters {
    virtio: usize,
    scsi: usize,
}

impl Letters {
    fn next(&mut self, bus: Bus) -> Result<String> {
        let (prefix, count) = match bus {
            Bus::VirtioBlk => ("vd", &mut self.virtio),
            Bus::VirtioScsi | Bus::Sata => ("sd", &mut self.scsi),
            Bus::Nvme => {
                return Err(Error::new(ErrorKind::Unsupported, PRINT)
                    .detail("libvirt gives no guest an NVMe disk that is not one")
                    .advice("choose another bus for the disk"));
            }
        };
        let number = *count;
        *count += 1;
        let letter = |n: usize| char::from(b'a' + (n % 26) as u8);
        Ok(match number.checked_sub(26) {
            None => format!("{prefix}{}", letter(number)),
            Some(more) => format!("{prefix}{}{}", letter(more / 26), letter(more)),
        })
    }
}

/// XML as it grows, indented.
#[derive(Default)]
struct Xml {
    text: String,
    depth: usize,
}

impl Xml {
    fn line(&mut self, line: &str) {
        let indent = self.depth * 2;
        // Writing to a string does not fail.
        let _ = writeln!(self.text, "{:indent$}{line}", "");
    }

    fn open(&mut self, tag: &str) {
        self.line(&format!("<{tag}>"));
        self.depth += 1;
    }

    fn close(&mut self, name: &str) {
        self.depth = self.depth.saturating_sub(1);
        self.line(&format!("</{name}>"));
    }

    fn text(&mut self, name: &str, text: &str) {
        self.line(&format!("<{name}>{}</{name}>", escaped(text)));
    }

    fn disk(&mut self, disk: &Disk, source: &Source, target: &str, boot: BootOrder) -> Result<()> {
        let (kind, place) = match source {
            Source::Nbd(path) => {
                let socket = escaped(utf8(path)?);
                let host = format!("<host transport='unix' socket='{socket}'/>");
                ("network", format!("<source protocol='nbd'>{host}</source>"))
            }
            Source::File(path) if path.starts_with("/dev") => {
                ("block", format!("<source dev='{}'/>", escaped(utf8(path)?)))
            }
            Source::File(path) => ("file", format!("<source file='{}'/>", escaped(utf8(path)?))),
        };
        self.open(&format!("disk type='{kind}' device='disk'"));
        self.line("<driver name='qemu' type='raw' discard='unmap'/>");
        self.line(&place);
        let bus = match disk.bus {
            Bus::VirtioScsi => "scsi",
            Bus::Sata => "sata",
            Bus::VirtioBlk | Bus::Nvme => "virtio",
        };
        self.line(&format!("<target dev='{target}' bus='{bus}'/>"));
        if let Some(serial) = &disk.serial {
            self.text("serial", serial);
        }
        self.line(&format!("<boot order='{}'/>", boot.0));
        self.close("disk");
        Ok(())
    }

    fn network(&mut self, network: &Network, which: Networks) {
        let link = match which {
            Networks::Test => &network.test,
            Networks::Recovery => &network.recovery,
        };
        let (kind, source) = match link {
            // libvirt's own user network is open to the outside: its cable is pulled.
            Link::Isolated => ("user", "<link state='down'/>".to_owned()),
            Link::Bridge(name) => ("bridge", format!("<source bridge='{}'/>", escaped(name))),
            Link::Tap(name) => {
                let target = escaped(name);
                ("ethernet", format!("<target dev='{target}' managed='no'/>"))
            }
            Link::Libvirt(name) => ("network", format!("<source network='{}'/>", escaped(name))),
        };
        self.open(&format!("interface type='{kind}'"));
        if let Some(mac) = &network.mac {
            self.line(&format!("<mac address='{}'/>", mac.to_ascii_lowercase()));
        }
        self.line(&source);
        self.line(&format!("<model type='{}'/>", network.model.libvirt()));
        self.close("interface");
    }
}

/// From 1.
#[derive(Clone, Copy)]
struct BootOrder(usize);

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            other => escaped.push(other),
        }
    }
    escaped
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::new(ErrorKind::Invalid, PRINT)
            .path(path)
            .detail("the path is not UTF-8")
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    const EVERYTHING: &str = r#"
        name = "db1"
        memory = "3G"
        cpus = 4
        firmware = "uefi"
        [[disk]]
        serial = "S1"
        [[disk]]
        volume = "wal"
        bus = "virtio-scsi"
        [[disk]]
        volume = "archive"
        bus = "sata"
        [[network]]
        recovery = "bridge:br7"
        mac = "52:54:00:AB:34:56"
        model = "e1000e"
        [[network]]
        recovery = "libvirt:default"
        [[network]]
        recovery = "tap:t0"
        [[network]]
    "#;

    fn sources() -> [Source; 3] {
        [
            Source::Nbd("/run/replica/a & 'b' <c>.sock".into()),
            Source::File("/images/wal.raw".into()),
            Source::File("/dev/ublkb0".into()),
        ]
    }

    /// libvirt's own schema, of Debian's libvirt0.
    fn validate(xml: &str) {
        let schema = "/usr/share/libvirt/schemas/domain.rng";
        let mut lint = Command::new("xmllint")
            .args(["--noout", "--relaxng", schema, "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("xmllint: run scripts/packages");
        let mut input = lint.stdin.take().unwrap();
        input.write_all(xml.as_bytes()).unwrap();
        drop(input);
        let output = lint.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}\n{xml}");
    }

    #[test]
    fn libvirt_accepts_every_part() {
        let machine = MachineDefinition::from_toml(EVERYTHING).unwrap();
        for networks in [Networks::Test, Networks::Recovery] {
            let xml = domain_xml(&machine, &sources(), networks).unwrap();
            validate(&xml);
        }
        let least = MachineDefinition::from_toml("name = 'a'").unwrap();
        validate(&domain_xml(&least, &sources()[..1], Networks::Test).unwrap());
    }

    #[test]
    fn disks_and_networks_stand_in_it() {
        let machine = MachineDefinition::from_toml(EVERYTHING).unwrap();
        let xml = domain_xml(&machine, &sources(), Networks::Recovery).unwrap();
        for part in [
            "<host transport='unix' socket='/run/replica/a &amp; &apos;b&apos; &lt;c&gt;.sock'/>",
            "<target dev='vda' bus='virtio'/>",
            "<target dev='sda' bus='scsi'/>",
            "<target dev='sdb' bus='sata'/>",
            "<source dev='/dev/ublkb0'/>",
            "<boot order='3'/>",
            "<source bridge='br7'/>",
            "<mac address='52:54:00:ab:34:56'/>",
            "<os firmware='efi'>",
        ] {
            assert!(xml.contains(part), "{part} is not in {xml}");
        }
        let xml = domain_xml(&machine, &sources(), Networks::Test).unwrap();
        assert!(
            !xml.contains("br7") && xml.contains("<link state='down'/>"),
            "{xml}"
        );
    }

    #[test]
    fn what_libvirt_cannot_is_refused() {
        let nvme = MachineDefinition::from_toml("name = 'a'\n[[disk]]\nbus = 'nvme'").unwrap();
        let error = domain_xml(&nvme, &sources()[..1], Networks::Test).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let error = domain_xml(&nvme, &sources(), Networks::Test).unwrap_err();
        assert!(
            error.to_string().contains("3 sources for 1 disks"),
            "{error}"
        );
    }
}
