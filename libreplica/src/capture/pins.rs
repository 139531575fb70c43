//! The pins of a tracker: a folder for each volume in a BPF file system, holding the maps,
//! the programs and the links that keep the programs attached. The folder is filled under
//! another name and renamed when whole, so that whoever is killed while attaching leaves
//! nothing that could be taken for a tracker. (Names there must not contain a dot.)
//!
//! The folder has the name of the volume's id. Where another state folder has pins of the
//! same volume, as after a state folder was lost, the state folder's id stands behind it:
//!
//! ```text
//! VOLUME               the first state folder's
//! VOLUME_FOLDER        another one's, beside them
//! VOLUME_FOLDER_new    being filled
//! ```

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::capture::spec::FolderId;
use crate::capture::state::{Identity, PARTS, State, VERSION, WORDS};
use crate::device::{DevNo, DiskSeq};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::Geometry;
use crate::id::VolumeId;
use crate::sys::bpf;
use crate::sys::memory::SharedWords;

/// The programs and their tracepoints, in the order in which they are attached: ends before
/// beginnings, so that whatever is seen to begin is seen to end.
pub(super) const PROGRAMS: [(&str, &str); 3] = [
    ("rq_complete", "block_rq_complete"),
    ("bio_complete", "block_bio_complete"),
    ("bio_queue", "block_bio_queue"),
];
/// The maps.
#[cfg_attr(
    not(feature = "ebpf"),
    allow(dead_code, reason = "for those who attach")
)]
pub(super) const MAPS: [&str; 3] = ["state", "bits", "flights"];
/// Bytes of a value in `flights`: sector 8, sectors 4, kind 4, serial 8, left 8.
pub(super) const FLIGHT: usize = 32;

const BPF_MOUNT: &str = "/sys/fs/bpf";
const OPEN: &str = "open the tracker's pins";
const REMOVE: &str = "remove the tracker's pins";

pub(super) fn map_pin(folder: &Path, map: &str) -> PathBuf {
    folder.join(format!("map_{map}"))
}

pub(super) fn program_pin(folder: &Path, program: &str) -> PathBuf {
    folder.join(format!("program_{program}"))
}

pub(super) fn link_pin(folder: &Path, program: &str) -> PathBuf {
    folder.join(format!("link_{program}"))
}

/// The folder of the pins that the state folder `owner` has of a volume, or will have.
pub(super) fn folder_of(pins: &Path, volume: VolumeId, owner: FolderId) -> PathBuf {
    let (first, beside) = (
        pins.join(volume.to_string()),
        pins.join(format!("{volume}_{owner}")),
    );
    // Pins whose owner cannot be told are of this volume all the same.
    let is_others = || owner_of(&first).is_some_and(|found| found != owner);
    if beside.exists() || is_others() {
        beside
    } else {
        first
    }
}

/// Where a folder is filled before it is whole.
pub(super) fn unfinished(pins: &Path, volume: VolumeId, owner: FolderId) -> PathBuf {
    pins.join(format!("{volume}_{owner}_new"))
}

/// Whose pins these are; `None` if there are none, or they do not tell.
fn owner_of(folder: &Path) -> Option<FolderId> {
    let state = State::new(map_words(folder, "state", WORDS).ok()?);
    (state.version()? == VERSION)
        .then(|| state.identity())?
        .map(|identity| identity.folder)
}

/// What a tracker's pins hold, opened.
#[derive(Debug)]
pub(super) struct Pins {
    pub folder: PathBuf,
    pub state: State,
    pub identity: Identity,
    pub bits: Arc<SharedWords>,
    pub flights: bpf::HashMap<FLIGHT>,
    pub programs: [OwnedFd; PROGRAMS.len()],
}

impl Pins {
    /// Opens the pins in `folder`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] for pins of another version of
    /// this program; [`ErrorKind::Damaged`] if one is missing or makes no sense.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        if !folder.try_exists().at(OPEN, folder)? {
            return Err(Error::new(ErrorKind::NotFound, OPEN).path(folder));
        }
        let state = State::new(map_words(folder, "state", WORDS)?);
        let damaged = |what: &str| {
            Error::new(ErrorKind::Damaged, OPEN)
                .path(folder)
                .detail(what)
        };
        match state.version() {
            Some(VERSION) => {}
            Some(version) => {
                return Err(Error::new(ErrorKind::Unsupported, OPEN)
                    .path(folder)
                    .detail(format!("version {version}; this program knows {VERSION}"))
                    .advice("remove the pins and resync"));
            }
            None => return Err(damaged("these are no tracker's pins")),
        }
        let identity = state
            .identity()
            .ok_or_else(|| damaged("its state makes no sense"))?;
        let words = identity.layout().words() * PARTS;
        let bits = Arc::new(map_words(folder, "bits", words)?);
        let path = map_pin(folder, "flights");
        let flights = bpf::HashMap::new(open_pin(&path)?).at(OPEN, &path)?;
        let mut programs = Vec::with_capacity(PROGRAMS.len());
        for (program, _) in PROGRAMS {
            programs.push(open_pin(&program_pin(folder, program))?);
            // The link keeps its program attached for as long as it is pinned.
            open_pin(&link_pin(folder, program))?;
        }
        let programs = programs
            .try_into()
            .map_err(|_| damaged("a program is missing"))?;
        Ok(Self {
            folder: folder.to_owned(),
            state,
            identity,
            bits,
            flights,
            programs,
        })
    }
}

fn open_pin(path: &Path) -> Result<OwnedFd> {
    bpf::open_pin(path).map_err(|source| match source.raw_os_error() {
        // The folder is there and this is not.
        Some(libc::ENOENT) => Error::new(ErrorKind::Damaged, OPEN)
            .path(path)
            .source(source),
        _ => Error::io(OPEN, source).path(path),
    })
}

/// Maps the first `words` words of a pinned map of that many or more.
fn map_words(folder: &Path, map: &str, words: usize) -> Result<SharedWords> {
    let path = map_pin(folder, map);
    let fd = open_pin(&path)?;
    let info = bpf::map_info(fd.as_fd()).at(OPEN, &path)?;
    let bytes = u64::from(info.value_size) * u64::from(info.max_entries);
    if bytes < words as u64 * 8 {
        return Err(Error::new(ErrorKind::Damaged, OPEN)
            .path(path)
            .detail(format!("{bytes} bytes, {words} words expected")));
    }
    SharedWords::map(fd.as_fd(), words).at(OPEN, &path)
}

fn on_bpf_fs(path: &Path) -> bool {
    path.ancestors()
        .find(|folder| folder.exists())
        .is_some_and(|folder| statfs(folder).is_ok_and(|s| s.filesystem_type() == BPF_FS_MAGIC))
}

/// Makes the folder `pins`, and mounts the BPF file system where it belongs if need be.
///
/// # Errors
/// [`ErrorKind::Kernel`] if there is none and none can be mounted.
pub(super) fn make_pin_root(pins: &Path) -> Result<()> {
    const OPERATION: &str = "make room for the tracker's pins";
    if !on_bpf_fs(pins) && pins.starts_with(BPF_MOUNT) {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("bpf"), BPF_MOUNT, Some("bpf"), flags, Some("mode=700")).map_err(|errno| {
            Error::new(ErrorKind::Kernel, OPERATION)
                .path(BPF_MOUNT)
                .detail("no BPF file system (bpffs) there, and none can be mounted")
                .source(io::Error::from(errno))
                .advice("mount -t bpf bpf /sys/fs/bpf")
        })?;
    }
    if !on_bpf_fs(pins) {
        return Err(Error::new(ErrorKind::Kernel, OPERATION)
            .path(pins)
            .detail("not on a BPF file system (bpffs)"));
    }
    fs::create_dir_all(pins).at(OPERATION, pins)
}

fn remove_folder(folder: &Path) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.at(REMOVE, folder)?,
    };
    for entry in entries {
        let path = entry.at(REMOVE, folder)?.path();
        fs::remove_file(&path).at(REMOVE, &path)?;
    }
    fs::remove_dir(folder).at(REMOVE, folder)
}

/// Removes what somebody left who did not finish filling a folder.
pub(super) fn clear_unfinished(pins: &Path, volume: VolumeId, owner: FolderId) -> Result<()> {
    remove_folder(&unfinished(pins, volume, owner))
}

/// Removes the pins that a state folder has of a volume, whole or not, so that nothing is
/// tracked for it any more.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there are none; what the file system says.
pub fn remove_pins(pins: &Path, volume: VolumeId, owner: FolderId) -> Result<()> {
    let folder = folder_of(pins, volume, owner);
    let rest = unfinished(pins, volume, owner);
    if !folder.exists() && !rest.exists() {
        return Err(Error::new(ErrorKind::NotFound, REMOVE).path(folder));
    }
    remove_folder(&rest)?;
    remove_folder(&folder)
}

/// Pins that were found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PinInfo {
    /// The volume, by the folder's name.
    pub volume: VolumeId,
    /// The folder.
    pub path: PathBuf,
    /// Whose they are: the state folder's id; `None` if neither pins nor name tell.
    pub owner: Option<FolderId>,
    /// Whether somebody finished making them.
    pub stage: PinStage,
    /// What is tracked; `None` for pins that are not whole or of another version.
    pub tracked: Option<Tracked>,
}

/// How far pins are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinStage {
    /// Somebody makes them, or was killed while making them.
    Unfinished,
    /// Whole.
    Whole,
}

impl PinInfo {
    /// Removes these pins; none is no error.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self) -> Result<()> {
        remove_folder(&self.path)
    }
}

/// Volume, owner and stage of a folder's name.
fn parse_name(name: &str) -> Option<(VolumeId, Option<FolderId>, PinStage)> {
    let (name, stage) = match name.strip_suffix("_new") {
        Some(name) => (name, PinStage::Unfinished),
        None => (name, PinStage::Whole),
    };
    match name.split_once('_') {
        None => Some((name.parse().ok()?, None, stage)),
        Some((volume, owner)) => Some((volume.parse().ok()?, Some(FolderId::parse(owner)?), stage)),
    }
}

/// What a tracker's pins say of themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// The state folder of the agent that attached it.
    pub folder: FolderId,
    /// The disk's name when it was attached.
    pub name: String,
    /// The disk's device number.
    pub devno: DevNo,
    /// The disk's sequence number.
    pub diskseq: DiskSeq,
    /// How the volume falls into blocks.
    pub geometry: Geometry,
}

/// The pins of all volumes in `pins`.
///
/// # Errors
/// What the file system says; a folder that is missing has no pins.
pub fn list_pins(pins: &Path) -> Result<Vec<PinInfo>> {
    const OPERATION: &str = "list the trackers' pins";
    let entries = match fs::read_dir(pins) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.at(OPERATION, pins)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.at(OPERATION, pins)?.path();
        let name = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let Some((volume, owner, stage)) = name.and_then(|name| parse_name(&name)) else {
            continue;
        };
        let tracked = Pins::open(&path).ok().map(|opened| Tracked {
            folder: opened.identity.folder,
            name: opened.identity.name,
            devno: opened.identity.devno,
            diskseq: opened.identity.diskseq,
            geometry: opened.identity.geometry,
        });
        found.push(PinInfo {
            volume,
            path,
            owner: tracked.as_ref().map(|tracked| tracked.folder).or(owner),
            stage,
            tracked,
        });
    }
    found.sort_by(|a, b| (a.volume, &a.path).cmp(&(b.volume, &b.path)));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_volume_owner_and_stage() {
        let volume = VolumeId::random().unwrap();
        let owner = FolderId::from_bytes([0xa7; 16]);
        let parse = |name: String| parse_name(&name);
        let whole = PinStage::Whole;
        assert_eq!(parse(volume.to_string()), Some((volume, None, whole)));
        let beside = format!("{volume}_{owner}");
        assert_eq!(parse(beside.clone()), Some((volume, Some(owner), whole)));
        let unfinished = unfinished(Path::new("/pins"), volume, owner);
        let name = unfinished.file_name().unwrap().to_str().unwrap().to_owned();
        let expected = (volume, Some(owner), PinStage::Unfinished);
        assert_eq!(parse(name), Some(expected));
        assert_eq!(parse(format!("{beside}_old")), None);
        assert_eq!(parse(format!("{volume}_x")), None);
        assert_eq!(parse("somebody_elses".into()), None);
    }
}
