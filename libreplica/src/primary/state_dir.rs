//! The state folder: what a daemon remembers between runs.
//!
//! ```text
//! STATE/state.json            format and id of this folder
//! STATE/lock                  held (flock) by the daemon that uses it
//! STATE/volumes/<id>/volume.json   what is protected, how, and where to
//! STATE/volumes/<id>/tree          the volume's digest tree
//! STATE/volumes/<id>/history.json  what `status` shall still know after a restart
//! ```
//!
//! Whatever is said here about a volume can be lost without losing data: dirty bits live
//! in the kernel, points in the store. A file is replaced whole (write, fsync, rename,
//! fsync of the folder), so a crash leaves the old one or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use hrl_format::id::VolumeId;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::primary::config::VolumeConfig;

const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct StateFile {
    format: u32,
    id: String,
}

/// A state folder, locked for as long as this value lives.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    id: [u8; 16],
    _lock: Flock<File>,
}

impl StateDir {
    /// Opens the folder at `path`, making it (mode 0700) where it is missing, and locks it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] when another daemon uses it, [`ErrorKind::Damaged`] or
    /// [`ErrorKind::Unsupported`] when `state.json` is not ours to read, else what the
    /// system said.
    pub fn open(path: &Path) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let volumes = path.join("volumes");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&volumes)
            .at("make the state folder", &volumes)?;
        let path = fs::canonicalize(path).at("find the state folder", path)?;
        let lock = lock(&path)?;
        let id = identity(&path)?;
        Ok(Self {
            path,
            id,
            _lock: lock,
        })
    }

    /// The state folder, locked or not, that `path` is or lies in.
    pub fn around(path: &Path) -> Option<PathBuf> {
        let place = path
            .canonicalize()
            .or_else(|_| path.parent().unwrap_or(path).canonicalize())
            .ok()?;
        let is_one = |folder: &&Path| {
            folder.join("volumes").is_dir()
                && read_json::<StateFile>(&folder.join("state.json")).is_ok()
        };
        place.ancestors().find(is_one).map(Path::to_owned)
    }

    /// Where it is, as an absolute path without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The id that pins in bpffs carry, so that they are told from another daemon's.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// The folder of one volume.
    pub fn volume_dir(&self, volume: VolumeId) -> PathBuf {
        self.path.join("volumes").join(volume.to_string())
    }

    /// All volumes that are protected from here, with their settings, or why those cannot be
    /// read.
    ///
    /// # Errors
    /// When the folder itself cannot be read.
    pub fn volumes(&self) -> Result<Vec<(VolumeId, Result<VolumeConfig>)>> {
        let folder = self.path.join("volumes");
        let mut found = Vec::new();
        for entry in fs::read_dir(&folder).at("list the volumes", &folder)? {
            let entry = entry.at("list the volumes", &folder)?;
            let Ok(id) = entry.file_name().to_string_lossy().parse::<VolumeId>() else {
                continue;
            };
            let path = entry.path().join("volume.json");
            // A folder without settings is a `protect` or an `unprotect` cut short.
            if path.exists() {
                let config = read_json::<VolumeConfig>(&path).map_err(|error| error.volume(id));
                found.push((id, config));
            }
        }
        Ok(found)
    }

    /// Writes a volume's settings, durably.
    ///
    /// # Errors
    /// What the system said.
    pub fn save(&self, config: &VolumeConfig) -> Result<()> {
        let folder = self.make_volume_dir(config.id)?;
        write_json(&folder.join("volume.json"), config)
    }

    /// Makes the folder of one volume, if it is not there.
    ///
    /// # Errors
    /// What the system said.
    pub fn make_volume_dir(&self, volume: VolumeId) -> Result<PathBuf> {
        use std::os::unix::fs::DirBuilderExt;
        let folder = self.volume_dir(volume);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .at("make the volume's state folder", &folder)?;
        Ok(folder)
    }

    /// Forgets a volume: its settings first, so that no half of it is ever taken up again.
    ///
    /// # Errors
    /// What the system said.
    pub fn forget(&self, volume: VolumeId) -> Result<()> {
        let folder = self.volume_dir(volume);
        let settings = folder.join("volume.json");
        match fs::remove_file(&settings) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("forget the volume", error).path(settings));
            }
            _ => {}
        }
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove the volume's state folder", error).path(folder))
            }
            _ => Ok(()),
        }
    }
}

fn lock(folder: &Path) -> Result<Flock<File>> {
    let path = folder.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .at("open the state folder's lock", &path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno == nix::errno::Errno::EWOULDBLOCK {
            Error::new(ErrorKind::Busy, "lock the state folder")
                .path(folder)
                .detail("another `replica run` uses it")
                .advice("stop that daemon, or give this one its own --state-dir")
        } else {
            Error::io("lock the state folder", errno.into()).path(folder)
        }
    })
}

fn identity(folder: &Path) -> Result<[u8; 16]> {
    let path = folder.join("state.json");
    if path.exists() {
        let state: StateFile = read_json(&path)?;
        if state.format > FORMAT {
            return Err(Error::new(ErrorKind::Unsupported, "read the state folder")
                .path(path)
                .detail(format!("format {} is newer than {FORMAT}", state.format))
                .advice("use the version of replica that wrote it, or a newer one"));
        }
        let id: VolumeId = state.id.parse().map_err(|source| {
            Error::new(ErrorKind::Damaged, "read the state folder")
                .path(&path)
                .source(source)
        })?;
        return Ok(*id.as_bytes());
    }
    let id = VolumeId::random()
        .map_err(|source| Error::new(ErrorKind::Io, "make an id").source(source))?;
    write_json(
        &path,
        &StateFile {
            format: FORMAT,
            id: id.to_string(),
        },
    )?;
    Ok(*id.as_bytes())
}

/// Reads a JSON file of at most 1 MiB.
///
/// # Errors
/// [`ErrorKind::Damaged`] when it is not what it should be, else what the system said.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).at("read", path)?;
    serde_json::from_slice(&bytes).map_err(|source| {
        Error::new(ErrorKind::Damaged, "read")
            .path(path)
            .source(source)
            .advice("restore the file, or unprotect and protect the volume again")
    })
}

/// Replaces a JSON file whole and durably.
///
/// # Errors
/// What the system said.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|source| {
        Error::new(ErrorKind::Invalid, "write")
            .path(path)
            .source(source)
    })?;
    let temporary = path.with_extension("json.new");
    let mut file = File::create(&temporary).at("write", &temporary)?;
    file.write_all(&text).at("write", &temporary)?;
    file.sync_all().at("make durable", &temporary)?;
    fs::rename(&temporary, path).at("put in place", path)?;
    if let Some(folder) = path.parent() {
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .at("make durable", folder)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_daemon_is_refused_and_the_id_stays() {
        let folder = tempfile::tempdir().unwrap();
        let first = StateDir::open(folder.path()).unwrap();
        let id = first.id();
        assert_eq!(
            StateDir::open(folder.path()).unwrap_err().kind(),
            ErrorKind::Busy
        );
        drop(first);
        assert_eq!(StateDir::open(folder.path()).unwrap().id(), id);
    }

    #[test]
    fn what_lies_in_a_state_folder_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        assert_eq!(StateDir::around(&path.join("new.img")), None);
        drop(StateDir::open(&path.join("state")).unwrap());
        let state = Some(path.join("state"));
        assert_eq!(StateDir::around(&path.join("state/lock")), state);
        assert_eq!(StateDir::around(&path.join("state/volumes/new")), state);
        assert_eq!(StateDir::around(&path.join("new.img")), None);
    }

    #[test]
    fn a_newer_format_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        drop(StateDir::open(folder.path()).unwrap());
        let id = "0".repeat(32);
        fs::write(
            folder.path().join("state.json"),
            format!(r#"{{"format":9,"id":"{id}"}}"#),
        )
        .unwrap();
        assert_eq!(
            StateDir::open(folder.path()).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
    }
}
