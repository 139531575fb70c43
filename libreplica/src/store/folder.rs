//! The store itself: a folder that says that it is one, and the volumes in it. Looking at
//! a store needs no more than the right to read it; nothing is written by `open`.

use std::path::{Path, PathBuf};

use hrl_format::id::{Generation, GenerationId, KeyId, StoreId, VolumeId};
use hrl_format::units::GenerationNumber;
use serde::{Deserialize, Serialize};

use super::catalogue::{Catalogue, CatalogueGeneration, View};
use super::durable::{self, Replaced, damaged, read_small};
use super::json::text;
use super::layout::{StoreFolder, VolumeFolder};
use super::lock::Lock;
use super::recovery::Recovery;
use super::{catalogue_file, lease};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::Geometry;

/// The version of the layout that this library writes, and the newest that it reads.
const FORMAT: u32 = 1;
const OPEN: &str = "open the store";
const CREATE: &str = "make the store";
const CREATE_VOLUME: &str = "make a volume in the store";

/// What stands in `replica-store.json`.
#[derive(Serialize, Deserialize)]
struct Marker {
    format: u32,
    #[serde(with = "text")]
    id: StoreId,
}

/// A store: a folder that holds the images, logs and recovery points of many volumes.
///
/// ```
/// use libreplica::geometry::Geometry;
/// use libreplica::store::{Store, VolumeSpec};
/// use libreplica::units::{BlockSize, SectorSize, VolumeSize};
///
/// let folder = tempfile::tempdir()?;
/// let store = Store::create(&folder.path().join("store"))?;
/// let geometry = Geometry {
///     size: VolumeSize::new(1 << 30),
///     block: BlockSize::MIN,
///     sector: SectorSize::B512,
/// };
/// let id = store.create_volume(VolumeSpec::new("database", geometry)?)?;
/// assert_eq!(store.find("database")?, id);
/// assert_eq!(Store::open(store.path())?.volumes()?.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Store {
    folder: StoreFolder,
    id: StoreId,
}

/// A volume to be made in a store.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VolumeSpec {
    /// Its id; a new one unless set.
    pub id: VolumeId,
    /// What people call it: at most 255 bytes, without `/`, control characters and space at either
    /// end, and not of the form of an id. It stays readable when the volume is encrypted.
    pub name: String,
    /// Size and units.
    pub geometry: Geometry,
    /// The key that it will be encrypted with; `None` for a plain volume.
    pub key: Option<KeyId>,
    /// Who may write to it; a first, new one unless set.
    pub generation: Generation,
}

impl VolumeSpec {
    /// A plain volume with a new id and a first generation.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn new(name: impl Into<String>, geometry: Geometry) -> Result<Self> {
        let random = |e| Error::new(ErrorKind::Io, CREATE_VOLUME).source(e);
        Ok(Self {
            id: VolumeId::random().map_err(random)?,
            name: name.into(),
            geometry,
            key: None,
            generation: Generation {
                number: GenerationNumber::new(1),
                id: GenerationId::random().map_err(random)?,
            },
        })
    }
}

/// A volume of a store, as a listing finds it.
#[derive(Debug)]
pub struct VolumeEntry {
    /// Its id.
    pub id: VolumeId,
    /// What the store knows of it, or why that cannot be read: the others are listed still.
    pub catalogue: Result<Catalogue>,
}

impl VolumeEntry {
    /// Its name, if the catalogue can be read.
    pub fn name(&self) -> Option<&str> {
        self.catalogue
            .as_ref()
            .ok()
            .map(|catalogue| catalogue.name.as_str())
    }
}

impl Store {
    /// Makes a store in `path`: a folder that is empty or not there yet. Its volumes are
    /// readable for the caller alone; to let others read them, change the mode of `volumes`.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if there is a store; [`ErrorKind::Invalid`] if the folder holds something
    /// else; what the system refuses.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = StoreFolder::new(path);
        if read_small(&folder.marker())?.is_some() {
            return Err(Error::new(ErrorKind::Exists, CREATE)
                .path(path)
                .detail("there is one already"));
        }
        create_path(path)?;
        // `lost+found` is what a filesystem made for the store begins with; the others are ours,
        // left by a creation that was interrupted.
        let ours = ["lost+found", "lock", "volumes", "replica-store.json.new"];
        let names = durable::names_in(path)?;
        if let Some(other) = names.iter().find(|name| !ours.contains(&name.as_str())) {
            return Err(Error::new(ErrorKind::Invalid, CREATE)
                .path(path)
                .detail(format!("the folder is not empty: `{other}` is there"))
                .advice("name an empty folder or one that does not exist yet"));
        }
        let _lock = Lock::take(&folder.lock(), CREATE)?;
        durable::create_folder(&folder.volumes())?;
        make_private(&folder.volumes())?;
        let id = StoreId::random().map_err(|e| Error::new(ErrorKind::Io, CREATE).source(e))?;
        let marker = serde_json::to_vec(&Marker { format: FORMAT, id })
            .map_err(|e| Error::new(ErrorKind::Invalid, CREATE).source(e))?;
        let files = [(folder.marker(), &marker[..])];
        durable::replace_all(&files, path).map_err(Replaced::into_error)?;
        if let Some(parent) = path.canonicalize().at(CREATE, path)?.parent() {
            durable::sync_folder(parent)?;
        }
        Ok(Self { folder, id })
    }

    /// Opens the store in `path`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none; [`ErrorKind::Unsupported`] if a newer version made it;
    /// [`ErrorKind::Damaged`] if its marker file cannot be understood.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = StoreFolder::new(path);
        let marker = folder.marker();
        let Some(bytes) = read_small(&marker)? else {
            return Err(Error::new(ErrorKind::NotFound, OPEN)
                .path(path)
                .detail("there is no store: replica-store.json is missing")
                .advice("is the filesystem of the store mounted?"));
        };
        let damaged =
            |e: serde_json::Error| damaged(OPEN, &marker, "not the marker of a store").source(e);
        let json: serde_json::Value = serde_json::from_slice(&bytes).map_err(damaged)?;
        let newer = json.get("format").and_then(serde_json::Value::as_u64);
        if let Some(format) = newer.filter(|&format| format > u64::from(FORMAT)) {
            return Err(Error::new(ErrorKind::Unsupported, OPEN)
                .path(path)
                .detail(format!(
                    "it has format {format}, this version knows {FORMAT}"
                ))
                .advice("use the version that wrote it"));
        }
        let marker: Marker = serde_json::from_value(json).map_err(damaged)?;
        Ok(Self {
            folder,
            id: marker.id,
        })
    }

    /// Opens the store in `path`, or makes one where there is none.
    ///
    /// # Errors
    /// Those of [`Store::open`] and [`Store::create`].
    pub fn open_or_create(path: &Path) -> Result<Self> {
        match Self::open(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Self::create(path),
            opened => opened,
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The store's id.
    pub fn id(&self) -> StoreId {
        self.id
    }

    /// All volumes, by name. A volume whose catalogue cannot be read is listed with the reason.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn volumes(&self) -> Result<Vec<VolumeEntry>> {
        let mut entries = Vec::new();
        for id in self.ids()? {
            let catalogue = catalogue_file::load(&self.folder.volume(id));
            match catalogue.map(|loaded| loaded.catalogue) {
                // The trace of an interrupted creation.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                catalogue => entries.push(VolumeEntry { id, catalogue }),
            }
        }
        entries.sort_by(|a, b| (a.name(), a.id).cmp(&(b.name(), b.id)));
        Ok(entries)
    }

    /// The volume of this name or id.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Invalid`] with the ids if several have the name.
    pub fn find(&self, name_or_id: &str) -> Result<VolumeId> {
        const FIND: &str = "find the volume";
        let mut named = Vec::new();
        let mut unreadable = None;
        let wanted = name_or_id.parse::<VolumeId>().ok();
        for id in self.ids()? {
            match catalogue_file::load_name(&self.folder.volume(id)) {
                // The trace of an interrupted creation.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                _ if wanted == Some(id) => return Ok(id),
                Ok(name) if name == name_or_id => named.push(id),
                Ok(_) => {}
                Err(e) => unreadable = unreadable.or(Some(e)),
            }
        }
        match named[..] {
            [id] => Ok(id),
            [] => {
                let error = Error::new(ErrorKind::NotFound, FIND)
                    .path(self.path())
                    .detail(format!("there is no volume `{name_or_id}`"));
                Err(match unreadable {
                    Some(damaged) => error.advice(format!("one cannot be read: {damaged}")),
                    None => error,
                })
            }
            _ => {
                let ids: Vec<String> = named.iter().map(ToString::to_string).collect();
                Err(Error::new(ErrorKind::Invalid, FIND)
                    .path(self.path())
                    .detail(format!("`{name_or_id}` is the name of {}", ids.join(", ")))
                    .advice("give the id"))
            }
        }
    }

    /// The folders that are named as a volume's is.
    fn ids(&self) -> Result<Vec<VolumeId>> {
        let names = durable::names_in(&self.folder.volumes())?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Makes a volume. Durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if the id or the name is taken; [`ErrorKind::Invalid`] for a name that cannot be
    /// one, or a size that is not whole sectors.
    pub fn create_volume(&self, spec: VolumeSpec) -> Result<VolumeId> {
        check_spec(&spec)?;
        let _lock = Lock::take(&self.folder.lock(), CREATE_VOLUME)?;
        for entry in self.volumes()? {
            if entry.id == spec.id || entry.name() == Some(&spec.name) {
                return Err(Error::new(ErrorKind::Exists, CREATE_VOLUME)
                    .path(self.path())
                    .volume(entry.id)
                    .detail(format!(
                        "`{}` is there already",
                        entry.name().unwrap_or("it")
                    ))
                    .advice("choose another name"));
            }
        }
        let folder = self.folder.volume(spec.id);
        durable::create_folder(folder.path())?;
        for path in folder.folders() {
            durable::create_folder(&path)?;
        }
        let id = spec.id;
        let catalogue = first_catalogue(spec);
        lease::prepare(&folder.view_lease(catalogue.view))?;
        durable::sync_folder(folder.path())?;
        catalogue_file::save(&folder, &catalogue, 1).map_err(Replaced::into_error)?;
        durable::sync_folder(&self.folder.volumes())?;
        Ok(id)
    }

    /// Takes back a volume that was just made, and of which nothing was stored.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::State`] if the volume has an image;
    /// [`ErrorKind::Busy`] if somebody writes to it; what the system refuses.
    pub fn take_back_volume(&self, id: VolumeId) -> Result<()> {
        const TAKE_BACK: &str = "take back a volume of the store";
        let _lock = Lock::take(&self.folder.lock(), TAKE_BACK)?;
        let folder = self.folder.volume(id);
        let catalogue = catalogue_file::load(&folder)?.catalogue;
        let _writer = Lock::take(&folder.lock(), TAKE_BACK)?;
        if catalogue.base.is_some() || !catalogue.logs.is_empty() {
            return Err(Error::new(ErrorKind::State, TAKE_BACK)
                .path(folder.path())
                .volume(id)
                .detail("it has an image"));
        }
        // Without a catalogue the rest is the trace of an interrupted creation.
        for copy in folder.catalogues() {
            durable::remove(&copy)?;
        }
        durable::sync_folder(folder.path())?;
        std::fs::remove_dir_all(folder.path()).at(TAKE_BACK, folder.path())?;
        durable::sync_folder(&self.folder.volumes())
    }

    /// The folder of a volume that must be there.
    pub(super) fn volume_folder(&self, id: VolumeId) -> VolumeFolder {
        self.folder.volume(id)
    }
}

/// The folder and those above it. Unlike in the store, missing ones are made as `mkdir -p`
/// does.
fn create_path(path: &Path) -> Result<()> {
    if let Some(link) = dangling(path) {
        let leads = std::fs::read_link(&link).at(CREATE, &link)?;
        return Err(Error::new(ErrorKind::NotFound, CREATE)
            .path(path)
            .detail(format!(
                "{} is a link to {}, which is not there",
                link.display(),
                leads.display()
            ))
            .advice("mount or make what it leads to, or name another folder"));
    }
    let made = std::fs::create_dir_all(path).at(CREATE, path);
    made.map_err(durable::advise)
}

/// The link on the way of `path` that leads nowhere, if there is one.
fn dangling(path: &Path) -> Option<PathBuf> {
    // Where a link is there and what it leads to is not.
    let is_dangling = |folder: &&Path| folder.symlink_metadata().is_ok() && !folder.exists();
    path.ancestors().find(is_dangling).map(Path::to_owned)
}

/// A copy of a disk must not be easier to read than the disk.
fn make_private(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(path, mode).at("make the store private", path)
}

/// Whether a volume can be called so, see [`VolumeSpec::name`].
///
/// # Errors
/// [`ErrorKind::Invalid`] with the reason if not.
pub fn check_name(name: &str) -> Result<()> {
    let invalid = |why: String| Err(Error::new(ErrorKind::Invalid, CREATE_VOLUME).detail(why));
    if name.is_empty() || name.len() > 255 {
        return invalid("a name has 1 to 255 bytes".to_owned());
    }
    if name.contains(|c: char| c == '/' || c.is_control()) || name.trim() != name {
        return invalid(format!(
            "{name:?} cannot be a name: no `/`, no control characters, no space at either end"
        ));
    }
    if name.parse::<VolumeId>().is_ok() {
        return invalid(format!("`{name}` looks like an id and cannot be a name"));
    }
    Ok(())
}

fn check_spec(spec: &VolumeSpec) -> Result<()> {
    let invalid = |why: String| Err(Error::new(ErrorKind::Invalid, CREATE_VOLUME).detail(why));
    check_name(&spec.name)?;
    let (size, sector) = (spec.geometry.size.get(), spec.geometry.sector.get());
    if size == 0 || size % u64::from(sector) != 0 {
        return invalid(format!(
            "{size} bytes are not a whole number of {sector}-byte sectors"
        ));
    }
    if size > i64::MAX as u64 {
        return invalid(format!("{size} bytes are more than a file can have"));
    }
    Ok(())
}

fn first_catalogue(spec: VolumeSpec) -> Catalogue {
    Catalogue {
        volume: spec.id,
        name: spec.name,
        size: spec.geometry.size,
        block: spec.geometry.block,
        sector: spec.geometry.sector,
        key: spec.key,
        generation: CatalogueGeneration {
            number: spec.generation.number,
            id: spec.generation.id,
            parent: None,
        },
        recovery: Recovery::default(),
        base: None,
        logs: Vec::new(),
        points: Vec::new(),
        view: View::default(),
        retired: Vec::new(),
    }
}
