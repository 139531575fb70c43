//! A machine that is in use: QEMU as a daemon, which goes on when whoever started it ends. All there is
//! to it lies in a folder: the sockets of its console and of QEMU's own protocol, its process id, what
//! its firmware keeps. A machine that runs already is not started twice.

use std::fs::{DirBuilder, File};
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};

use super::agent;
use super::console::Console;
use super::firmware::uefi_files;
use super::guest::find_qemu;
use super::life::Observed;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::machine::{
    Accelerator, ConsoleEnd, Firmware, Launch, Life, Link, MachineDefinition, Networks, Source,
    Verdict, qemu_arguments,
};
use crate::sys::program;

const START: &str = "start the machine";
/// QEMU's process id.
const PID: &str = "pid";
/// How long QEMU may take until it is a daemon.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a sign of life is looked for.
const STEP: Duration = Duration::from_millis(200);

/// A machine in use.
#[derive(Debug)]
pub struct Standing<'a> {
    machine: &'a MachineDefinition,
    folder: PathBuf,
    started: Instant,
    /// What the guest says, from its start on; none if it ran already.
    console: Option<(UnixStream, Console)>,
}

impl<'a> Standing<'a> {
    /// Starts the machine on `disks`, in the definition's order, with the network links of a failover. What
    /// belongs to it is in `folder`, which is made. If it runs there already, that is all.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no QEMU, or no firmware; [`ErrorKind::State`] if QEMU refuses,
    /// with what it said; those of [`qemu_arguments`]; the system's.
    pub fn start(
        machine: &'a MachineDefinition,
        disks: &[Source],
        accelerator: Accelerator,
        folder: &Path,
    ) -> Result<Self> {
        let mut standing = Self {
            machine,
            folder: folder.to_owned(),
            started: Instant::now(),
            console: None,
        };
        if standing.runs() {
            return Ok(standing);
        }
        let made = DirBuilder::new().mode(0o700).recursive(true).create(folder);
        made.at(START, folder)?;
        standing.launch(disks, accelerator)?;
        let wanted = match &machine.life {
            Some(Life::Console(text)) => text.as_str(),
            _ => return Ok(standing),
        };
        let path = folder.join("console");
        let stream = UnixStream::connect(&path).at(START, &path)?;
        stream.set_read_timeout(Some(STEP)).at(START, &path)?;
        standing.console = Some((stream, Console::new(wanted)));
        Ok(standing)
    }

    fn launch(&self, disks: &[Source], accelerator: Accelerator) -> Result<()> {
        let (qemu, folder) = (find_qemu()?, &self.folder);
        let uefi = match self.machine.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(uefi_files(folder)?),
        };
        let agent = folder.join("agent");
        let arguments = qemu_arguments(&Launch {
            machine: self.machine,
            disks,
            networks: Networks::Recovery,
            accelerator,
            console: ConsoleEnd::Socket(folder.join("console")),
            control: &folder.join("control"),
            agent: matches!(self.machine.life, Some(Life::Command(_))).then_some(&*agent),
            forward: None,
            uefi: uefi.as_ref(),
        })?;
        let mut command = Command::new(&qemu);
        command.args(arguments).arg("-daemonize");
        command.arg("-pidfile").arg(folder.join(PID));
        let ran = program::run(&mut command, START_LIMIT).at(START, &qemu)?;
        match ran.status {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(Error::new(ErrorKind::State, START)
                .path(&qemu)
                .detail(format!("{status}{}", ran.said))),
            None => Err(Error::new(ErrorKind::TimedOut, START)
                .path(&qemu)
                .detail(format!("it hangs{}", ran.said))),
        }
    }

    /// Whether it runs: then QEMU holds a lock on the file with its process id.
    pub fn runs(&self) -> bool {
        let Ok(file) = File::open(self.folder.join(PID)) else {
            return false;
        };
        let mut lock = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        fcntl(&file, FcntlArg::F_GETLK(&mut lock)).is_ok()
            && lock.l_type != libc::F_UNLCK as libc::c_short
    }

    /// What can be waited for from here: nothing, if the machine ran already and its console was not
    /// heard from the start, or if its port is behind a network that this host does not reach.
    pub fn sign(&self) -> Option<&'a Life> {
        let life = self.machine.life.as_ref()?;
        let is_seen = match life {
            Life::Console(_) => self.console.is_some(),
            Life::Tcp(_) => self.address().is_some(),
            Life::Command(_) => true,
        };
        is_seen.then_some(life)
    }

    /// Where the guest's port is, if its first card has an address of its own, and is connected.
    fn address(&self) -> Option<SocketAddr> {
        let card = self.machine.networks.first()?;
        let Some(Life::Tcp(port)) = self.machine.life else {
            return None;
        };
        let address = card.address?.address();
        (card.recovery != Link::Isolated).then(|| (address, port).into())
    }

    /// Waits for its sign of life, at most so long as its definition says; one that cannot be waited for
    /// lives if it runs. It goes on, whatever comes of that.
    pub fn wait_for_life(&mut self) -> Observed {
        let mut number = 0;
        loop {
            let after = self.started.elapsed();
            let observed = |verdict| Observed { verdict, after };
            number += 1;
            if self.shows(number) {
                return observed(Verdict::Alive);
            }
            if !self.runs() {
                return observed(Verdict::Ended { code: None });
            }
            if after >= self.machine.timeout {
                return observed(Verdict::Silent);
            }
        }
    }

    fn shows(&mut self, number: u32) -> bool {
        let Some(life) = self.sign() else {
            return true;
        };
        let seen = match life {
            Life::Console(_) => return self.hears(),
            Life::Tcp(_) => self
                .address()
                .is_some_and(|address| TcpStream::connect_timeout(&address, STEP).is_ok()),
            Life::Command(words) => {
                agent::run(&self.folder.join("agent"), words, number).unwrap_or(false)
            }
        };
        if !seen {
            std::thread::sleep(STEP);
        }
        seen
    }

    /// Hears for a moment what the guest says.
    fn hears(&mut self) -> bool {
        let Some((stream, console)) = &mut self.console else {
            return false;
        };
        let mut buffer = [0; 4096];
        match stream.read(&mut buffer) {
            Ok(0) => std::thread::sleep(STEP),
            Ok(count) => console.push(&buffer[..count]),
            Err(_) => {}
        }
        console.has_found()
    }
}
