//! A machine that runs. QEMU is our child, and ends with us; it is asked to end, and killed by
//! its process id if it does not. What goes in and out lies in a folder of its own, which is
//! removed at the end.

use std::fs::DirBuilder;
use std::io::{Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::console::Console;
use super::firmware::uefi_files;
use super::qmp::Qmp;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::machine::{
    Accelerator, ConsoleEnd, Firmware, Launch, Life, MachineDefinition, Networks, Source,
    qemu_arguments,
};
use crate::sys::child::die_with_thread;

const START: &str = "start the machine";
const QEMU: &str = "qemu-system-x86_64";

/// How long QEMU may take to write out what it holds.
const GRACE: Duration = Duration::from_secs(20);

/// What is to run.
#[derive(Clone, Debug)]
pub struct BootSpec<'a> {
    /// The machine.
    pub machine: &'a MachineDefinition,
    /// Its disks, in the definition's order.
    pub disks: &'a [Source],
    /// What its network cards are connected to.
    pub networks: Networks,
    /// What runs its code.
    pub accelerator: Accelerator,
    /// A socket for an operator's console; without, what the guest says is kept here.
    pub console: Option<PathBuf>,
}

/// A machine that runs, until it is dropped.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    folder: WorkFolder,
    console: Arc<Mutex<Console>>,
    input: Option<ChildStdin>,
    readers: Vec<JoinHandle<()>>,
    /// What QEMU itself had to say.
    complaints: Arc<Mutex<Console>>,
    qmp: Option<Qmp>,
    pub(super) started: Instant,
}

impl Guest {
    /// Starts the machine. It ends with the thread that calls this.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no QEMU, or no firmware; those of [`qemu_arguments`];
    /// the system's. What QEMU itself refuses is seen when it ends.
    pub fn start(spec: &BootSpec<'_>) -> Result<Self> {
        let qemu = find_qemu()?;
        let folder = WorkFolder::new()?;
        let uefi = match spec.machine.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(uefi_files(&folder.0)?),
        };
        let agent = matches!(spec.machine.life, Some(Life::Command(_))).then(|| folder.agent());
        let console = spec.console.clone();
        let launch = Launch {
            machine: spec.machine,
            disks: spec.disks,
            networks: spec.networks,
            accelerator: spec.accelerator,
            console: console.map_or(ConsoleEnd::Stdio, ConsoleEnd::Socket),
            control: &folder.control(),
            agent: agent.as_deref(),
            // Whichever is free.
            forward: matches!(spec.machine.life, Some(Life::Tcp(_))).then_some(0),
            uefi: uefi.as_ref(),
        };
        let mut command = Command::new(&qemu);
        command.args(qemu_arguments(&launch)?);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = die_with_thread(&mut command).spawn().at(START, &qemu)?;
        let wanted = match &spec.machine.life {
            Some(Life::Console(text)) => text.as_str(),
            _ => "",
        };
        let console = Arc::new(Mutex::new(Console::new(wanted)));
        let complaints = Arc::new(Mutex::new(Console::default()));
        let mut guest = Self {
            input: child.stdin.take(),
            folder,
            console,
            readers: Vec::new(),
            complaints,
            qmp: None,
            started: Instant::now(),
            child,
        };
        guest.listen()?;
        Ok(guest)
    }

    fn listen(&mut self) -> Result<()> {
        let out = self.child.stdout.take();
        let errors = self.child.stderr.take();
        if let (Some(out), Some(errors)) = (out, errors) {
            self.readers.push(reader("console", out, &self.console)?);
            self.readers
                .push(reader("complaints", errors, &self.complaints)?);
        }
        Ok(())
    }

    /// What the guest has said up to now.
    pub fn console(&self) -> MutexGuard<'_, Console> {
        locked(&self.console)
    }

    /// What QEMU had to say, in one line.
    pub fn complaint(&self) -> String {
        let kept = locked(&self.complaints).kept();
        let text = String::from_utf8_lossy(&kept);
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        lines.collect::<Vec<_>>().join("; ")
    }

    /// Types on the console.
    ///
    /// # Errors
    /// When QEMU has ended.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        let ended = || Error::new(ErrorKind::State, "type on the console");
        let input = self.input.as_mut().ok_or_else(ended)?;
        let written = input
            .write_all(text.as_bytes())
            .and_then(|()| input.flush());
        written.map_err(|e| ended().source(e))
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How QEMU ended, if it has.
    ///
    /// # Errors
    /// The system's.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .at("look after the machine", Path::new(QEMU))
    }

    /// Presses the power button, and waits until the machine is off; whether it is.
    ///
    /// # Errors
    /// The system's.
    pub fn power_down(&mut self, limit: Duration) -> Result<bool> {
        let end = Instant::now() + limit;
        if let Some(qmp) = self.qmp() {
            // Who cannot be asked will not be off in time.
            let _ = qmp.power_down();
        }
        while Instant::now() < end {
            if self.ended()?.is_some() {
                return Ok(true);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(false)
    }

    /// Ends the machine as a power cut does, but for what QEMU holds of its writes: that is written
    /// out. Gives back what the guest has said.
    pub fn stop(mut self) -> Console {
        self.end();
        std::mem::take(&mut *locked(&self.console))
    }

    /// The connection to QEMU, made when it is first needed.
    pub(super) fn qmp(&mut self) -> Option<&mut Qmp> {
        if self.qmp.is_none() {
            self.qmp = Qmp::connect(&self.folder.control()).ok();
        }
        self.qmp.as_mut()
    }

    pub(super) fn agent_socket(&self) -> PathBuf {
        self.folder.agent()
    }

    fn end(&mut self) {
        let asked = self.qmp().is_some_and(|qmp| qmp.quit().is_ok());
        let end = Instant::now() + if asked { GRACE } else { Duration::ZERO };
        let mut gone = matches!(self.child.try_wait(), Ok(Some(_)));
        while !gone && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
            gone = matches!(self.child.try_wait(), Ok(Some(_)));
        }
        if !gone {
            // Ours and not waited for yet, so the process id is still its own.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        self.input = None;
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end();
    }
}

fn locked(console: &Mutex<Console>) -> MutexGuard<'_, Console> {
    // Nothing that panics is done under it.
    console.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread that keeps what comes from `source`, until its end.
fn reader(
    name: &str,
    mut source: impl Read + Send + 'static,
    into: &Arc<Mutex<Console>>,
) -> Result<JoinHandle<()>> {
    let into = Arc::clone(into);
    let read = move || {
        let mut buffer = vec![0; 16 << 10];
        loop {
            match source.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => locked(&into).push(&buffer[..count]),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    };
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(read).at(START, Path::new(QEMU))
}

/// QEMU in the folders of PATH, or where Red Hat's distributions have it.
pub(super) fn find_qemu() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&path).map(|folder| folder.join(QEMU));
    let mut places = in_path.chain(["/usr/libexec/qemu-kvm".into()]);
    places.find(|place| place.is_file()).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "find QEMU")
            .detail(format!("{QEMU} is in no folder of PATH"))
            .advice("install the package qemu-system-x86 (qemu-kvm on Fedora)")
    })
}

/// A folder for sockets and the like, of this process alone.
#[derive(Debug)]
pub struct WorkFolder(PathBuf);

impl WorkFolder {
    /// A new one, which goes with the value.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> Result<Self> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes)
            .map_err(|e| Error::new(ErrorKind::Io, START).detail(e.to_string()))?;
        let number = u64::from_le_bytes(bytes);
        let path = std::env::temp_dir().join(format!("replica-machine-{number:016x}"));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .at(START, &path)?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn control(&self) -> PathBuf {
        self.0.join("control")
    }

    fn agent(&self) -> PathBuf {
        self.0.join("agent")
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
