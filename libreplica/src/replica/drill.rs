//! A drill: a recovery point is opened with private writes, and booted; its sign of life is waited
//! for; what came of it is recorded as the point's proof; and all of it is cleaned up, whatever
//! happens on the way. Replication goes on meanwhile. A machine of several disks takes the
//! points that were made in one moment.

use std::path::Path;
use std::time::Duration;

use hrl_format::VolumeKey;

use super::export::PointExport;
use super::opened::{Opened, Wanted};
use crate::boot::{BootSpec, Console, Guest, WorkFolder};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{BranchId, VolumeId};
use crate::machine::{Accelerator, Life, MachineDefinition, Networks, Proof, Source};
use crate::store::{BranchPurpose, Point, PointSelector, Store, VolumeReader};
use crate::time::rfc3339;
use crate::units::Timestamp;

const DRILL: &str = "drill a recovery point";

/// What is to be drilled.
#[derive(Debug)]
pub struct DrillSpec<'a> {
    /// Where the volumes lie.
    pub store: &'a Store,
    /// The volume that the definition is kept with.
    pub volume: VolumeId,
    /// The key of those that are encrypted.
    pub key: Option<&'a VolumeKey>,
    /// Which of its points.
    pub point: PointSelector,
    /// The machine, in place of the one that is kept with the volume.
    pub machine: Option<&'a MachineDefinition>,
    /// How long to wait for its sign of life, in place of what the definition says.
    pub limit: Option<Duration>,
    /// What runs its code.
    pub accelerator: Accelerator,
}

/// What came of a drill.
#[derive(Debug)]
pub struct Drilled {
    /// The point.
    pub point: Point,
    /// What is recorded of it.
    pub proof: Proof,
    /// What the guest said.
    pub console: Console,
    /// What QEMU had to say, in one line.
    pub complaint: String,
}

/// Boots a point and sees whether it lives; the proof is durable when this returns, and all
/// else is gone.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is no definition, point or QEMU; [`ErrorKind::Invalid`] if the
/// definition says no sign of life; [`ErrorKind::State`] if a disk has no point of that moment, or
/// `interrupted` says so; those of opening a point; the system's. That the machine does not live is
/// no error.
pub fn drill(spec: &DrillSpec<'_>, interrupted: &dyn Fn() -> bool) -> Result<Drilled> {
    let volume = reader(spec, spec.volume)?;
    let machine = match spec.machine {
        Some(machine) => machine.clone(),
        None => volume.machine()?.ok_or_else(no_machine)?,
    };
    let life = machine.life.clone().ok_or_else(|| {
        Error::new(ErrorKind::Invalid, DRILL)
            .detail("the machine's definition does not say by what one knows that it lives")
            .advice("add for instance life = { console = \"login:\" }")
    })?;
    let point = volume.point(spec.point)?;
    let folder = WorkFolder::new()?;
    let disks = open_disks(spec, &machine, (&volume, &point), folder.path())?;
    let sources: Vec<Source> = disks
        .iter()
        .map(|disk| Source::Nbd(disk.socket()))
        .collect();
    let mut guest = Guest::start(&BootSpec {
        machine: &machine,
        disks: &sources,
        networks: Networks::Test,
        accelerator: spec.accelerator,
        console: None,
    })?;
    let limit = spec.limit.unwrap_or(machine.timeout);
    let observed = guest.wait_for_life(&life, limit, interrupted)?;
    let complaint = guest.complaint();
    let console = guest.stop();
    let proof = Proof {
        time: rfc3339(Timestamp::now()),
        verdict: observed.verdict,
        seconds: Proof::seconds(observed.after),
        machine: machine.name.clone(),
        waited_for: told(&life),
        console_bytes: console.total(),
    };
    let kept = console.kept();
    for disk in &disks {
        disk.volume.record_proof(disk.point, &proof, &kept)?;
    }
    for disk in disks {
        disk.close()?;
    }
    Ok(Drilled {
        point,
        proof,
        console,
        complaint,
    })
}

/// A disk of the machine: a point with a branch behind a socket, which goes with the value.
struct OpenDisk {
    volume: VolumeReader,
    point: crate::id::PointId,
    branch: Option<BranchId>,
    export: Option<PointExport>,
    path: std::path::PathBuf,
}

impl OpenDisk {
    fn open(volume: VolumeReader, point: crate::id::PointId, path: &Path) -> Result<Self> {
        let wanted = Wanted::Write(PointSelector::Id(point), BranchPurpose::Drill);
        let opened = Opened::open(&volume, wanted)?;
        let mut disk = Self {
            branch: opened.branch().map(|branch| branch.info().id),
            volume,
            point,
            export: None,
            path: path.to_owned(),
        };
        disk.export = Some(PointExport::start(opened, path)?);
        Ok(disk)
    }

    fn socket(&self) -> std::path::PathBuf {
        self.path.clone()
    }

    /// Removes what was written.
    fn close(mut self) -> Result<()> {
        self.discard()
    }

    fn discard(&mut self) -> Result<()> {
        if let Some(export) = self.export.take() {
            drop(export.stop()?);
        }
        match self.branch.take() {
            Some(branch) => self.volume.discard_branch(branch),
            None => Ok(()),
        }
    }
}

impl Drop for OpenDisk {
    fn drop(&mut self) {
        if let Err(error) = self.discard() {
            tracing::warn!(%error, "what a drill has written is not removed; the next drill will");
        }
    }
}

/// Opens what the machine's disks are: of `own` its point, of others those of the same moment.
fn open_disks(
    spec: &DrillSpec<'_>,
    machine: &MachineDefinition,
    own: (&VolumeReader, &Point),
    folder: &Path,
) -> Result<Vec<OpenDisk>> {
    let own_name = own.0.catalogue()?.name;
    let mut disks = Vec::new();
    for (number, disk) in machine.disks.iter().enumerate() {
        let own_name = own_name.as_str();
        let name = disk.volume.as_deref().unwrap_or(own_name);
        let id = match &disk.volume {
            Some(name) => spec.store.find(name)?,
            None => spec.volume,
        };
        let (volume, point) = if id == spec.volume {
            (own.0.clone(), own.1.id)
        } else {
            let volume = reader(spec, id)?;
            let point = same_moment(&volume, own.1, name)?;
            (volume, point)
        };
        discard_leftovers(&volume)?;
        let path = folder.join(format!("disk{number}"));
        disks.push(OpenDisk::open(volume, point, &path)?);
    }
    Ok(disks)
}

/// The point of `volume` that is of the same moment as `point` of another.
fn same_moment(volume: &VolumeReader, point: &Point, name: &str) -> Result<crate::id::PointId> {
    let points = volume.points()?;
    let same = |other: &&Point| point.group.is_some() && other.group == point.group;
    points
        .iter()
        .find(same)
        .map(|point| point.id)
        .ok_or_else(|| {
            Error::new(ErrorKind::State, DRILL)
                .detail(format!(
                    "{name}, a disk of the same machine, has no point of the moment of {}",
                    point.id
                ))
                .advice("protect all disks of a machine with the same --group")
        })
}

/// What a drill has left that was killed.
fn discard_leftovers(volume: &VolumeReader) -> Result<()> {
    for branch in volume.branches()? {
        if branch.info.purpose == BranchPurpose::Drill && !branch.in_use {
            volume.discard_branch(branch.info.id)?;
        }
    }
    Ok(())
}

/// A volume of the store, with the key if it is encrypted.
fn reader(spec: &DrillSpec<'_>, id: VolumeId) -> Result<VolumeReader> {
    let encrypted = spec.store.volume(id, None)?.catalogue()?.key.is_some();
    spec.store
        .volume(id, spec.key.filter(|_| encrypted).cloned())
}

fn told(life: &Life) -> String {
    match life {
        Life::Console(text) => format!("console: {text}"),
        Life::Tcp(port) => format!("TCP port {port}"),
        Life::Command(words) => format!("command: {}", words.join(" ")),
    }
}

fn no_machine() -> Error {
    Error::new(ErrorKind::NotFound, DRILL)
        .detail("no definition of the machine is kept with the volume")
        .advice("write one, see docs/drills.md, and give it to `replica machine set`")
}
