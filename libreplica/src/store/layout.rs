//! Where things stand in a store's folder (docs/store.md). Paths are made here and nowhere
//! else, always from ids, never from a name that came out of a file.

use std::path::{Path, PathBuf};

use hrl_format::id::{BranchId, LogId, PointId, VolumeId};
use hrl_format::units::Epoch;

use super::catalogue::View;

/// The folder of a store.
#[derive(Clone, Debug)]
pub(super) struct StoreFolder(PathBuf);

impl StoreFolder {
    pub(super) fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// What makes the folder a store: format and id.
    pub(super) fn marker(&self) -> PathBuf {
        self.0.join("replica-store.json")
    }

    /// Held while a volume is made, so that no two get one name.
    pub(super) fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    pub(super) fn volumes(&self) -> PathBuf {
        self.0.join("volumes")
    }

    pub(super) fn volume(&self, id: VolumeId) -> VolumeFolder {
        VolumeFolder {
            path: self.volumes().join(id.to_string()),
            id,
        }
    }
}

/// The folder of one volume in a store.
#[derive(Clone, Debug)]
pub(super) struct VolumeFolder {
    path: PathBuf,
    id: VolumeId,
}

impl VolumeFolder {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn id(&self) -> VolumeId {
        self.id
    }

    /// The two copies of the catalogue.
    pub(super) fn catalogues(&self) -> [PathBuf; 2] {
        [self.path.join("catalogue.0"), self.path.join("catalogue.1")]
    }

    /// The base, where it is a raw image.
    pub(super) fn base(&self) -> PathBuf {
        self.path.join("base.img")
    }

    /// Held by the one writer.
    pub(super) fn lock(&self) -> PathBuf {
        self.path.join("lock")
    }

    pub(super) fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    pub(super) fn log(&self, name: &LogName) -> PathBuf {
        self.logs().join(name.to_string())
    }

    /// What whoever writes to the volume is asked for.
    pub(super) fn handover(&self) -> PathBuf {
        self.path.join("handover.json")
    }

    /// Held by who asked, as long as the question stands.
    pub(super) fn handover_lock(&self) -> PathBuf {
        self.path.join("handover.lock")
    }

    /// The answer to it.
    pub(super) fn handover_answer(&self) -> PathBuf {
        self.path.join("handover-answer.json")
    }

    /// Logs that are being written.
    pub(super) fn incoming(&self) -> PathBuf {
        self.path.join("incoming")
    }

    pub(super) fn incoming_log(&self, name: &LogName) -> PathBuf {
        self.incoming().join(name.to_string())
    }

    pub(super) fn leases(&self) -> PathBuf {
        self.path.join("leases")
    }

    pub(super) fn point_lease(&self, point: PointId) -> PathBuf {
        self.leases().join(point.to_string())
    }

    pub(super) fn view_lease(&self, view: View) -> PathBuf {
        self.leases().join(format!("view-{view}"))
    }

    /// The definition of the machine that the volume belongs to.
    pub(super) fn machine(&self) -> PathBuf {
        self.path.join("machine.toml")
    }

    /// Held while that, or a proof, is replaced.
    pub(super) fn machine_lock(&self) -> PathBuf {
        self.path.join("machine.lock")
    }

    /// What drills have shown.
    pub(super) fn proofs(&self) -> PathBuf {
        self.path.join("proofs")
    }

    pub(super) fn proof(&self, point: PointId) -> PathBuf {
        self.proofs().join(format!("{point}.json"))
    }

    pub(super) fn proof_console(&self, point: PointId) -> PathBuf {
        self.proofs().join(format!("{point}.console"))
    }

    /// What was written to opened points.
    pub(super) fn branches(&self) -> PathBuf {
        self.path.join("branches")
    }

    /// Held while a branch is made, or what is left of one is taken away.
    pub(super) fn branches_lock(&self) -> PathBuf {
        self.branches().join("lock")
    }

    pub(super) fn branch(&self, id: BranchId) -> BranchFolder {
        BranchFolder {
            path: self.branches().join(id.to_string()),
            id,
            volume: self.id,
        }
    }

    /// Merged indexes of the logs (`levels/`).
    pub(super) fn levels(&self) -> PathBuf {
        self.path.join("levels")
    }

    /// Which of them there are.
    pub(super) fn level_manifest(&self) -> PathBuf {
        self.levels().join("manifest")
    }

    /// The folders within it that every volume has.
    pub(super) fn folders(&self) -> [PathBuf; 4] {
        [self.logs(), self.incoming(), self.leases(), self.levels()]
    }
}

/// The folder of a branch.
#[derive(Clone, Debug)]
pub(super) struct BranchFolder {
    path: PathBuf,
    id: BranchId,
    volume: VolumeId,
}

impl BranchFolder {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn id(&self) -> BranchId {
        self.id
    }

    pub(super) fn volume(&self) -> VolumeId {
        self.volume
    }

    /// What the branch is; without it there is none.
    pub(super) fn info(&self) -> PathBuf {
        self.path.join("branch.json")
    }

    /// Held by the one that has it open.
    pub(super) fn lock(&self) -> PathBuf {
        self.path.join("lock")
    }

    /// The volume's logs between the point and the moment that the branch stands on.
    /// Is there while whoever uses the branch is to keep away from it.
    pub(super) fn at_rest(&self) -> PathBuf {
        self.path.join("at-rest")
    }

    /// Is there once the volume has all that the branch has.
    pub(super) fn over(&self) -> PathBuf {
        self.path.join("over")
    }

    pub(super) fn below(&self) -> PathBuf {
        self.path.join("below")
    }

    /// Its own logs.
    pub(super) fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    /// The folders within it.
    pub(super) fn folders(&self) -> [PathBuf; 2] {
        [self.below(), self.logs()]
    }
}

/// The name of a log's file: its first epoch, so that a listing is in order, and its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogName {
    pub(super) first: Epoch,
    pub(super) log: LogId,
}

impl LogName {
    /// From the name of a file.
    pub(super) fn parse(name: &str) -> Option<Self> {
        let (first, log) = name.strip_suffix(".hrl")?.split_once('-')?;
        let first = (first.len() == 16).then(|| u64::from_str_radix(first, 16));
        Some(Self {
            first: Epoch::new(first?.ok()?),
            log: log.parse().ok()?,
        })
    }
}

impl std::fmt::Display for LogName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}-{}.hrl", self.first.get(), self.log)
    }
}
