//! Stores and keys as they are named on the command line, and volumes in them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hrl_format::VolumeKey;
use hrl_format::id::VolumeId;
use libreplica::key_file::read_key_file;
use libreplica::store::{Store, VolumeReader};
use libreplica::{Error, ErrorKind};

use crate::cli::DaemonArgs;
use crate::control::client::ask;
use crate::control::protocol::{Answer, Location, Request};
use crate::failure::Failure;
use crate::store_folder::store_folder;

/// The absolute path of a store: a folder or a `file://` URL.
///
/// # Errors
/// When it is nothing, another kind of URL, or one of another machine.
pub fn store_path(text: &str) -> Result<PathBuf, Failure> {
    let path = store_folder(text).map_err(|error| Failure::Usage(error.to_string()))?;
    Ok(std::path::absolute(path)?)
}

/// A volume's image, open for reading.
pub struct Located {
    /// The image.
    pub reader: VolumeReader,
}

/// The devices that the daemon protects, which nothing is restored to; none if no daemon
/// runs: a restore does not need one.
pub fn protected_devices(daemon: &DaemonArgs) -> Vec<PathBuf> {
    match ask(
        &daemon.socket,
        &Request::Status { volume: None },
        Some(Duration::from_secs(30)),
    ) {
        Ok(Answer::Status { volumes, .. }) => volumes
            .into_iter()
            .map(|volume| volume.device.into())
            .collect(),
        _ => Vec::new(),
    }
}

/// Finds a volume's image: in `store` without a daemon, else where the daemon says.
///
/// # Errors
/// When there is no such store, volume or daemon; when the key is missing or another.
pub fn locate(
    daemon: &DaemonArgs,
    volume: &str,
    store: Option<&str>,
    key_file: Option<&Path>,
) -> Result<Located, Failure> {
    if let Some(store) = store {
        let store = Store::open(&store_path(store)?)?;
        let id = store.find(volume)?;
        let reader = store.volume(id, read_key(key_file)?)?;
        return Ok(Located { reader });
    }
    let at = location(daemon, volume)?;
    let id = at.id.parse().map_err(|source| {
        Error::new(ErrorKind::Invalid, "read the daemon's answer").source(source)
    })?;
    let key = read_key(key_file.or(at.key_file.as_deref()))?;
    let reader = Store::open(&at.store)?.volume(id, key)?;
    Ok(Located { reader })
}

/// A volume that was found in its store.
pub struct Found {
    /// The store.
    pub store: Store,
    /// The volume.
    pub id: VolumeId,
    /// Where the daemon has its key from.
    key_file: Option<PathBuf>,
}

impl Found {
    /// The volume key, from `path` or where the daemon has it from.
    ///
    /// # Errors
    /// When the file cannot be read, or is no key.
    pub fn key(&self, path: Option<&Path>) -> Result<Option<VolumeKey>, Failure> {
        read_key(path.or(self.key_file.as_deref()))
    }

    /// The volume, for reading.
    ///
    /// # Errors
    /// When the key is another, or the catalogue cannot be read.
    pub fn reader(&self, key: Option<VolumeKey>) -> Result<VolumeReader, Failure> {
        Ok(self.store.volume(self.id, key)?)
    }
}

/// Finds a volume: in `store` without a daemon, else where the daemon says.
///
/// # Errors
/// When there is no such store, volume or daemon.
pub fn find_volume(
    daemon: &DaemonArgs,
    volume: &str,
    store: Option<&str>,
) -> Result<Found, Failure> {
    if let Some(store) = store {
        let store = Store::open(&store_path(store)?)?;
        let id = store.find(volume)?;
        let key_file = None;
        return Ok(Found {
            store,
            id,
            key_file,
        });
    }
    let at = location(daemon, volume)?;
    let id = at.id.parse().map_err(|source| {
        Error::new(ErrorKind::Invalid, "read the daemon's answer").source(source)
    })?;
    Ok(Found {
        store: Store::open(&at.store)?,
        id,
        key_file: at.key_file,
    })
}

fn location(daemon: &DaemonArgs, volume: &str) -> Result<Location, Failure> {
    let request = Request::Location {
        volume: volume.to_owned(),
    };
    match ask(&daemon.socket, &request, Some(Duration::from_secs(30)))? {
        Answer::Location(location) => Ok(location),
        _ => Err(Failure::Hangup {
            socket: daemon.socket.clone(),
        }),
    }
}

/// Reads a volume key, if a file is named.
///
/// # Errors
/// When the file cannot be read, or is no key.
pub fn read_key(path: Option<&Path>) -> Result<Option<VolumeKey>, Failure> {
    Ok(path.map(read_key_file).transpose()?)
}
