//! What is kept with a volume for the day it is needed: the definition of the machine it belongs
//! to, and for each point what drills have shown of it (docs/store.md). They are small files beside the
//! catalogue, each replaced as a whole; nothing in the chain depends on them. A proof goes
//! with its point.

use std::time::{Duration, Instant};

use hrl_format::id::PointId;

use super::durable;
use super::layout::VolumeFolder;
use super::lock::Lock;
use super::reader::VolumeReader;
use crate::error::{Error, ErrorKind, Result};
use crate::machine::{MachineDefinition, Proof};

const KEEP: &str = "keep a machine's definition";
const RECORD: &str = "record what a drill has shown";

/// How long one waits for another that writes the same.
const PATIENCE: Duration = Duration::from_secs(10);

impl VolumeReader {
    /// The definition of the machine that the volume belongs to, if there is one.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if the file is none; the system's.
    pub fn machine(&self) -> Result<Option<MachineDefinition>> {
        let path = self.folder.machine();
        let Some(bytes) = durable::read_small(&path)? else {
            return Ok(None);
        };
        let damaged = |why: String| durable::damaged("read the machine's definition", &path, why);
        let text = String::from_utf8(bytes).map_err(|e| damaged(e.to_string()))?;
        let machine = MachineDefinition::from_toml(&text);
        machine.map(Some).map_err(|e| damaged(e.to_string()))
    }

    /// Keeps `machine` with the volume, in place of what was there. Durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it cannot be a machine; the system's.
    pub fn set_machine(&self, machine: &MachineDefinition) -> Result<()> {
        machine.check()?;
        let text = machine.to_toml()?;
        let _lock = wait_for_lock(&self.folder, KEEP)?;
        let files = [(self.folder.machine(), text.as_bytes())];
        let replaced = durable::replace_all(&files, self.folder.path());
        replaced.map_err(durable::Replaced::into_error)
    }

    /// Keeps what a drill has shown of a point, with what the guest said, in place of what an
    /// earlier one has. Durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the point is not there (any more); the system's.
    pub fn record_proof(&self, point: PointId, proof: &Proof, console: &[u8]) -> Result<()> {
        let text = serde_json::to_vec_pretty(proof)
            .map_err(|e| Error::new(ErrorKind::Invalid, RECORD).source(e))?;
        let _lock = wait_for_lock(&self.folder, RECORD)?;
        if self.catalogue()?.point(point).is_none() {
            return Err(super::lease::no_such_point(&self.folder, point));
        }
        durable::create_folder(&self.folder.proofs())?;
        durable::sync_folder(self.folder.path())?;
        let files = [
            // The proof last: where it is, the console is that drill's.
            (self.folder.proof_console(point), console),
            (self.folder.proof(point), text.as_slice()),
        ];
        let replaced = durable::replace_all(&files, &self.folder.proofs());
        replaced.map_err(durable::Replaced::into_error)
    }

    /// What the last drill has shown of a point, if there was one.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if the file is none; the system's.
    pub fn proof(&self, point: PointId) -> Result<Option<Proof>> {
        let path = self.folder.proof(point);
        let Some(bytes) = durable::read_small(&path)? else {
            return Ok(None);
        };
        let proof = serde_json::from_slice(&bytes);
        proof
            .map(Some)
            .map_err(|e| durable::damaged("read what a drill has shown", &path, e.to_string()))
    }

    /// What the guest said in the last drill of a point, if there was one.
    ///
    /// # Errors
    /// The system's.
    pub fn proof_console(&self, point: PointId) -> Result<Option<Vec<u8>>> {
        durable::read_small(&self.folder.proof_console(point))
    }
}

/// Removes the proofs of points that are not in the catalogue any more, as `is_listed` says.
pub(super) fn remove_proofs(
    folder: &VolumeFolder,
    is_listed: impl Fn(PointId) -> bool,
) -> Result<()> {
    let proofs = folder.proofs();
    if !proofs.is_dir() {
        return Ok(());
    }
    for name in durable::names_in(&proofs)? {
        let point = name.split('.').next().unwrap_or_default().parse();
        if point.is_ok_and(|point| !is_listed(point)) {
            durable::remove(&proofs.join(name))?;
        }
    }
    Ok(())
}

fn wait_for_lock(folder: &VolumeFolder, what: &'static str) -> Result<Lock> {
    let end = Instant::now() + PATIENCE;
    loop {
        match Lock::take(&folder.machine_lock(), what) {
            Err(e) if e.kind() == ErrorKind::Busy && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            taken => return taken,
        }
    }
}
