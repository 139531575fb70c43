//! The server's socket in the file system: for its owner alone from its first moment, in the
//! place of one that a dead process left, and taken away at the end.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};

use crate::error::{Error, ErrorKind, IoContext, Result};

const LISTEN: &str = "listen for NBD clients";

/// A socket that is listened on.
#[derive(Debug)]
pub(super) struct Socket {
    pub listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Socket {
    /// Makes it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if somebody listens there; [`ErrorKind::Exists`] if something else
    /// is there; what the file system says.
    pub fn bind(path: &Path) -> Result<Self> {
        clear_stale(path)?;
        let listener = listen(path).at(LISTEN, path)?;
        let inode = fs::symlink_metadata(path).at(LISTEN, path)?.ino();
        let path = path.to_owned();
        Ok(Self {
            listener,
            path,
            inode,
        })
    }

    /// Lets nobody in any more: a thread that waits for clients gets an error.
    pub fn close(&self) {
        use std::os::fd::AsRawFd;
        let _ = socket::shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
    }

    /// What clients are told to use.
    pub fn uri(&self) -> String {
        uri_of(&self.path)
    }
}

/// What clients of the socket at `path` are told to use: `nbd+unix:///?socket=PATH`.
pub fn uri_of(path: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut uri = "nbd+unix:///?socket=".to_owned();
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            let _ = write!(uri, "%{byte:02X}");
        }
    }
    uri
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Another may have taken the place.
        if fs::symlink_metadata(&self.path).is_ok_and(|there| there.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The file gets these permissions when it is made (unix(7)).
    fchmod(fd.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR)?;
    use std::os::fd::AsRawFd;
    socket::bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&fd, Backlog::new(64)?)?;
    Ok(fd.into())
}

fn clear_stale(path: &Path) -> Result<()> {
    let there = match fs::symlink_metadata(path) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).at(LISTEN, path),
    };
    if !there.file_type().is_socket() {
        return Err(Error::new(ErrorKind::Exists, LISTEN)
            .path(path)
            .detail("there is something else than a socket"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).at(LISTEN, path)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).at(LISTEN, path),
        Ok(_) => Err(Error::new(ErrorKind::Busy, LISTEN)
            .path(path)
            .detail("somebody listens there")),
    }
}
