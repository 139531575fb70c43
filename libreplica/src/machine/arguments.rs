//! The arguments that QEMU gets for a machine. A pure function, so that what starts is tested
//! as text; nothing passes through a shell. QEMU separates options within an argument
//! by commas: one in a value is written twice. Disks are given as JSON, which needs no such care.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::definition::{Bus, Disk, Life, MachineDefinition};
use super::network::{Link, Network};
use crate::error::{Error, ErrorKind, Result};

/// What a disk of the machine is read from and written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An NBD server's export without a name, at a Unix socket.
    Nbd(PathBuf),
    /// A raw image, or a device.
    File(PathBuf),
}

/// What runs the machine's code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor, if the kernel lets us; else emulation.
    #[default]
    Auto,
    /// The processor.
    Kvm,
    /// Emulation.
    Tcg,
}

/// Which of a card's links counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Networks {
    /// Those of a drill.
    Test,
    /// Those of a failover.
    Recovery,
}

/// What the serial console is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleEnd {
    /// QEMU's standard input and output.
    Stdio,
    /// A Unix socket that it listens on, for an operator.
    Socket(PathBuf),
}

/// The two images that UEFI takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UefiFiles {
    /// The program, not written to.
    pub code: PathBuf,
    /// The variables, of this machine alone.
    pub variables: PathBuf,
}

/// One start of a machine.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// What it is.
    pub machine: &'a MachineDefinition,
    /// What its disks are, in the definition's order.
    pub disks: &'a [Source],
    /// Which links count.
    pub networks: Networks,
    /// What runs its code.
    pub accelerator: Accelerator,
    /// Where its console is.
    pub console: ConsoleEnd,
    /// The socket of QEMU's own protocol.
    pub control: &'a Path,
    /// The guest agent's socket, if it is to have one.
    pub agent: Option<&'a Path>,
    /// The port of this host's loopback address that leads to the one of [`Life::Tcp`].
    pub forward: Option<u16>,
    /// For a machine with UEFI.
    pub uefi: Option<&'a UefiFiles>,
}

const START: &str = "start the machine";

/// QEMU's arguments for `launch`.
///
/// # Errors
/// [`ErrorKind::Invalid`] if there are not as many sources as disks, a path is not UTF-8, a
/// network is only libvirt's, or the files for UEFI are missing.
pub fn qemu_arguments(launch: &Launch<'_>) -> Result<Vec<String>> {
    let machine = launch.machine;
    if launch.disks.len() != machine.disks.len() {
        let (sources, disks) = (launch.disks.len(), machine.disks.len());
        return Err(invalid(format!("{sources} sources for {disks} disks")));
    }
    let mut list = Arguments(Vec::new());
    list.flags(&["-nodefaults", "-no-user-config", "-display", "none"]);
    list.option("-name", &machine.name);
    list.accelerate(launch.accelerator);
    list.flags(&["-cpu", "max", "-rtc", "base=utc"]);
    list.option("-m", &format!("{}M", machine.memory.mib()));
    list.option("-smp", &machine.cpus.to_string());
    list.board(launch)?;
    list.ports(launch)?;
    for (number, (disk, source)) in machine.disks.iter().zip(launch.disks).enumerate() {
        list.disk(Place(number), disk, source)?;
    }
    for (number, network) in machine.networks.iter().enumerate() {
        list.network(Place(number), network, launch)?;
    }
    Ok(list.0)
}

/// Which of its kind something is, from 0.
#[derive(Clone, Copy)]
struct Place(usize);

struct Arguments(Vec<String>);

impl Arguments {
    fn flags(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(|&word| word.to_owned()));
    }

    fn option(&mut self, name: &str, value: &str) {
        self.0.extend([name.to_owned(), value.to_owned()]);
    }

    fn accelerate(&mut self, accelerator: Accelerator) {
        // Of several, QEMU takes the first that works.
        match accelerator {
            Accelerator::Auto => self.flags(&["-accel", "kvm", "-accel", "tcg"]),
            Accelerator::Kvm => self.flags(&["-accel", "kvm"]),
            Accelerator::Tcg => self.flags(&["-accel", "tcg"]),
        }
    }

    fn board(&mut self, launch: &Launch<'_>) -> Result<()> {
        let kind = launch.machine.kind.as_str();
        let Some(uefi) = launch.uefi else {
            if launch.machine.firmware == super::Firmware::Uefi {
                return Err(invalid("the firmware's files are missing".into()));
            }
            self.option("-machine", kind);
            return Ok(());
        };
        for (name, path, read_only) in [
            ("code", &uefi.code, Value::Bool(true)),
            ("variables", &uefi.variables, Value::Bool(false)),
        ] {
            let file = json!({"driver": "file", "filename": utf8(path)?});
            self.node(&json!({
                "driver": "raw", "node-name": name, "read-only": read_only, "file": file,
            }));
        }
        let board = format!("{kind},pflash0=code,pflash1=variables");
        self.option("-machine", &board);
        Ok(())
    }

    fn ports(&mut self, launch: &Launch<'_>) -> Result<()> {
        let console = match &launch.console {
            ConsoleEnd::Stdio => "stdio,id=console,signal=off".to_owned(),
            ConsoleEnd::Socket(path) => listening("console", path)?,
        };
        self.option("-chardev", &console);
        self.option("-serial", "chardev:console");
        self.option("-chardev", &listening("control", launch.control)?);
        self.option("-mon", "chardev=control,mode=control");
        self.option("-device", "virtio-rng-pci");
        if let Some(agent) = launch.agent {
            self.option("-chardev", &listening("agent", agent)?);
            self.option("-device", "virtio-serial-pci,id=ports");
            let port = "virtserialport,bus=ports.0,chardev=agent,name=org.qemu.guest_agent.0";
            self.option("-device", port);
        }
        Ok(())
    }

    fn node(&mut self, node: &Value) {
        self.option("-blockdev", &node.to_string());
    }

    fn disk(&mut self, place: Place, disk: &Disk, source: &Source) -> Result<()> {
        let name = format!("disk{}", place.0);
        let node = match source {
            Source::Nbd(path) => json!({
                "driver": "nbd", "node-name": name, "discard": "unmap",
                "server": {"type": "unix", "path": utf8(path)?},
            }),
            Source::File(path) => json!({
                "driver": "raw", "node-name": name, "discard": "unmap",
                "file": {"driver": "file", "filename": utf8(path)?, "discard": "unmap"},
            }),
        };
        self.node(&node);
        let number = place.0;
        let device = match disk.bus {
            Bus::VirtioBlk => "virtio-blk-pci".to_owned(),
            Bus::VirtioScsi => {
                self.option("-device", &format!("virtio-scsi-pci,id=scsi{number}"));
                format!("scsi-hd,bus=scsi{number}.0")
            }
            Bus::Sata => {
                self.option("-device", &format!("ahci,id=sata{number}"));
                format!("ide-hd,bus=sata{number}.0")
            }
            Bus::Nvme => "nvme".to_owned(),
        };
        // NVMe's has to have one.
        let fallback = (disk.bus == Bus::Nvme).then(|| name.clone());
        let serial = disk.serial.clone().or(fallback);
        let serial = serial.map_or_else(String::new, |text| format!(",serial={}", doubled(&text)));
        let boot = number + 1;
        self.option(
            "-device",
            &format!("{device},drive={name}{serial},bootindex={boot}"),
        );
        Ok(())
    }

    fn network(&mut self, place: Place, network: &Network, launch: &Launch<'_>) -> Result<()> {
        let name = format!("net{}", place.0);
        let link = match launch.networks {
            Networks::Test => &network.test,
            Networks::Recovery => &network.recovery,
        };
        let backend = match link {
            Link::Isolated => self::isolated(place, network, launch),
            Link::Bridge(bridge) => format!("bridge,br={bridge}"),
            Link::Tap(tap) => format!("tap,ifname={tap},script=no,downscript=no"),
            Link::Libvirt(_) => {
                return Err(Error::new(ErrorKind::Unsupported, START)
                    .detail(format!("{link} can only be had by a domain of libvirt's"))
                    .advice("`replica machine xml` prints one; or name a bridge:"));
            }
        };
        self.option("-netdev", &format!("{backend},id={name}"));
        let mac = network.mac.as_deref();
        let mac = mac.map_or_else(String::new, |mac| format!(",mac={mac}"));
        let device = network.model.device();
        self.option("-device", &format!("{device},netdev={name}{mac}"));
        Ok(())
    }
}

/// QEMU's own network with nobody in it; the one way in is the port that is looked at.
fn isolated(place: Place, network: &Network, launch: &Launch<'_>) -> String {
    let mut text = "user,restrict=on,ipv6=off".to_owned();
    if let Some(address) = network.address {
        let start = address.address();
        text.push_str(&format!(",net={},dhcpstart={start}", address.network()));
    }
    if let (0, Some(Life::Tcp(port)), Some(host)) = (place.0, &launch.machine.life, launch.forward)
    {
        let guest = network.address.map(|address| address.address().to_string());
        let guest = guest.unwrap_or_default();
        text.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-{guest}:{port}"));
    }
    text
}

fn listening(name: &str, path: &Path) -> Result<String> {
    let path = doubled(utf8(path)?);
    Ok(format!("socket,id={name},path={path},server=on,wait=off"))
}

fn doubled(text: &str) -> String {
    text.replace(',', ",,")
}

fn utf8(path: &Path) -> Result<&str> {
    path.to_str()
        .ok_or_else(|| invalid("the path is not UTF-8".into()).path(path))
}

fn invalid(detail: String) -> Error {
    Error::new(ErrorKind::Invalid, START).detail(detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch<'a>(machine: &'a MachineDefinition, disks: &'a [Source]) -> Launch<'a> {
        Launch {
            machine,
            disks,
            networks: Networks::Test,
            accelerator: Accelerator::Tcg,
            console: ConsoleEnd::Stdio,
            control: Path::new("/run/a,b/control"),
            agent: None,
            forward: Some(40022),
            uefi: None,
        }
    }

    fn arguments(toml: &str, disks: &[Source], change: impl Fn(&mut Launch<'_>)) -> Vec<String> {
        let machine = MachineDefinition::from_toml(toml).unwrap();
        let mut launch = launch(&machine, disks);
        change(&mut launch);
        qemu_arguments(&launch).unwrap()
    }

    /// The values of the options `name`.
    fn values<'a>(list: &'a [String], name: &str) -> Vec<&'a str> {
        let pairs = list.windows(2).filter(|pair| pair[0] == name);
        pairs.map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn the_least_machine_is_exactly_this() {
        let disks = [Source::Nbd("/run/v, w.sock".into())];
        let list = arguments("name = 'db1'", &disks, |_| {});
        assert_eq!(
            list.join(" "),
            "-nodefaults -no-user-config -display none -name db1 -accel tcg -cpu max -rtc base=utc \
             -m 1024M -smp 1 -machine q35 -chardev stdio,id=console,signal=off \
             -serial chardev:console \
             -chardev socket,id=control,path=/run/a,,b/control,server=on,wait=off \
             -mon chardev=control,mode=control -device virtio-rng-pci -blockdev \
             {\"discard\":\"unmap\",\"driver\":\"nbd\",\"node-name\":\"disk0\",\
             \"server\":{\"path\":\"/run/v, w.sock\",\"type\":\"unix\"}} \
             -device virtio-blk-pci,drive=disk0,bootindex=1"
        );
    }

    #[test]
    fn disks_keep_their_order_on_any_bus() {
        let toml = "name = 'a'\n[[disk]]\nbus = 'sata'\n[[disk]]\nvolume = 'b'\nbus = 'nvme'\n\
                    [[disk]]\nvolume = 'c'\nbus = 'virtio-scsi'\nserial = 'S3'";
        let disks = ["/a", "/b", "/c"].map(|path| Source::File(path.into()));
        let list = arguments(toml, &disks, |_| {});
        assert_eq!(
            values(&list, "-device")[1..],
            [
                "ahci,id=sata0",
                "ide-hd,bus=sata0.0,drive=disk0,bootindex=1",
                "nvme,drive=disk1,serial=disk1,bootindex=2",
                "virtio-scsi-pci,id=scsi2",
                "scsi-hd,bus=scsi2.0,drive=disk2,serial=S3,bootindex=3",
            ]
        );
        let machine = MachineDefinition::from_toml(toml).unwrap();
        let error = qemu_arguments(&launch(&machine, &disks[..2])).unwrap_err();
        assert!(
            error.to_string().contains("2 sources for 3 disks"),
            "{error}"
        );
    }

    #[test]
    fn a_drill_reaches_nobody_and_a_failover_what_was_written_down() {
        let toml = "name = 'a'\nlife = { tcp = 22 }\n[[network]]\nrecovery = 'bridge:br7'\n\
                    mac = '52:54:00:12:34:56'\naddress = '192.168.5.10/24'\n\
                    [[network]]\nrecovery = 'tap:t0'\nmodel = 'e1000'";
        let disks = [Source::File("/a".into())];
        let list = arguments(toml, &disks, |_| {});
        assert_eq!(
            values(&list, "-netdev"),
            [
                "user,restrict=on,ipv6=off,net=192.168.5.0/24,dhcpstart=192.168.5.10,\
                 hostfwd=tcp:127.0.0.1:40022-192.168.5.10:22,id=net0",
                "user,restrict=on,ipv6=off,id=net1",
            ]
        );
        let list = arguments(toml, &disks, |launch| launch.networks = Networks::Recovery);
        let backends = values(&list, "-netdev");
        assert_eq!(
            backends,
            [
                "bridge,br=br7,id=net0",
                "tap,ifname=t0,script=no,downscript=no,id=net1"
            ]
        );
        let cards = &values(&list, "-device")[2..];
        assert_eq!(
            cards,
            [
                "virtio-net-pci,netdev=net0,mac=52:54:00:12:34:56",
                "e1000,netdev=net1"
            ]
        );
        let toml = "name = 'a'\n[[network]]\nrecovery = 'libvirt:default'";
        let machine = MachineDefinition::from_toml(toml).unwrap();
        let mut launch = launch(&machine, &disks);
        assert!(qemu_arguments(&launch).is_ok());
        launch.networks = Networks::Recovery;
        let error = qemu_arguments(&launch).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn uefi_takes_two_images() {
        let disks = [Source::File("/a".into())];
        let machine = MachineDefinition::from_toml("name = 'a'\nfirmware = 'uefi'").unwrap();
        let mut launch = launch(&machine, &disks);
        let error = qemu_arguments(&launch).unwrap_err();
        assert!(error.to_string().contains("firmware"), "{error}");
        let files = UefiFiles {
            code: "/fw/code,1".into(),
            variables: "/tmp/vars".into(),
        };
        launch.uefi = Some(&files);
        let list = qemu_arguments(&launch).unwrap();
        assert_eq!(
            values(&list, "-machine"),
            ["q35,pflash0=code,pflash1=variables"]
        );
        let nodes = values(&list, "-blockdev");
        assert!(nodes[0].contains("\"/fw/code,1\"") && nodes[0].contains("\"read-only\":true"));
        assert!(nodes[1].contains("\"read-only\":false"));
    }

    #[test]
    fn a_guest_agent_gets_a_port_and_an_operator_a_socket() {
        let disks = [Source::File("/a".into())];
        let list = arguments("name = 'a'", &disks, |launch| {
            launch.agent = Some(Path::new("/run/agent"));
            launch.console = ConsoleEnd::Socket("/run/console".into());
            launch.accelerator = Accelerator::Auto;
        });
        assert_eq!(values(&list, "-accel"), ["kvm", "tcg"]);
        let ports = values(&list, "-chardev");
        assert_eq!(
            ports[0],
            "socket,id=console,path=/run/console,server=on,wait=off"
        );
        assert_eq!(
            ports[2],
            "socket,id=agent,path=/run/agent,server=on,wait=off"
        );
        assert!(
            list.iter()
                .any(|word| word.ends_with("name=org.qemu.guest_agent.0"))
        );
    }
}
