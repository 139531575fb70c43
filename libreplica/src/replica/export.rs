//! An opened state behind an NBD socket of its owner alone. What a volume was failed over to is
//! protected, too, while it is served (`reverse.rs`); and it is not served at all while another
//! side is taking it over.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::connection;
use super::opened::Opened;
use super::reverse::Reverse;
use crate::capture::nbd::handshake::{Export, Session, Trim};
use crate::capture::nbd::{Allowance, Door, Host, NbdOptions, uri_of};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Branch, BranchPurpose};

/// Clients at a time: each has some threads.
const CLIENTS: usize = 16;

/// A state of a volume that is served over NBD.
#[derive(Debug)]
pub struct PointExport {
    front: Arc<Front>,
    reverse: Option<Reverse>,
}

/// What is served, and the socket while it is.
#[derive(Debug)]
pub(super) struct Front {
    served: Arc<Served>,
    options: NbdOptions,
    door: Mutex<Option<Door>>,
    /// What keeps it from being served, or from being protected.
    trouble: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Served {
    opened: Opened,
    export: Export,
    allowance: Arc<Allowance>,
}

impl PointExport {
    /// Serves `opened` at the socket `path`. One that a dead process left is replaced. A branch
    /// at rest is served only once it is clear that nobody takes it over, one whose volume is
    /// another side's not at all.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if somebody listens there; [`ErrorKind::Exists`] if something else
    /// than a socket is there; what the system says.
    pub fn start(opened: Opened, path: &Path) -> Result<Self> {
        let in_use = |branch: &&Branch| branch.info().purpose == BranchPurpose::Failover;
        let waits = match opened.branch().filter(in_use) {
            Some(branch) => {
                let own = branch.info().generation.id;
                let is_over = opened.volume().catalogue()?.generation.id != own;
                Some(is_over || branch.rests_for()?.is_some())
            }
            None => None,
        };
        let front = Arc::new(Front::new(opened, path));
        if waits != Some(true) {
            front.open()?;
        }
        let reverse = match waits {
            Some(_) => Some(Reverse::start(Arc::clone(&front))?),
            None => None,
        };
        Ok(Self { front, reverse })
    }

    /// What clients are told to use: `nbd+unix:///?socket=PATH`.
    pub fn uri(&self) -> String {
        uri_of(&self.front.options.socket)
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        self.front.clients()
    }

    /// What is served.
    pub fn opened(&self) -> &Opened {
        self.front.opened()
    }

    /// What keeps it from being served, or from being protected.
    pub fn trouble(&self) -> Option<String> {
        self.front.trouble().clone()
    }

    /// Whether the volume that it was in use for has gone home, so that nothing is served any more.
    pub fn is_over(&self) -> bool {
        let opened = self.front.opened();
        let gone = |branch: &Branch| {
            // The next generation has all of it, or another state was chosen instead.
            let own = Some(branch.info().generation.id);
            let catalogue = opened.volume().catalogue();
            branch.is_over() || catalogue.is_ok_and(|catalogue| catalogue.generation.parent == own)
        };
        let was_in_use = opened.branch().filter(|_| self.reverse.is_some());
        was_in_use.is_some_and(gone)
    }

    /// Ends the connections: what was received is done, and answered if the clients take
    /// their replies soon. Gives back what was served.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if somebody else still uses it.
    pub fn stop(mut self) -> Result<Opened> {
        drop(self.reverse.take());
        self.front.close();
        let in_use = || Error::new(ErrorKind::State, "close an opened point");
        let front = Arc::into_inner(self.front).ok_or_else(in_use)?;
        let served = Arc::into_inner(front.served).ok_or_else(in_use)?;
        Ok(served.opened)
    }
}

impl Front {
    fn new(opened: Opened, path: &Path) -> Self {
        let options = NbdOptions {
            connections: CLIENTS,
            ..NbdOptions::new(path)
        };
        let geometry = opened.geometry();
        let export = Export {
            name: String::new(),
            size: geometry.size,
            sector: geometry.sector,
            access: opened.access(),
            trim: Trim::Offered,
        };
        let served = Arc::new(Served {
            opened,
            export,
            allowance: Arc::new(Allowance::new(options.memory.get())),
        });
        Self {
            served,
            options,
            door: Mutex::new(None),
            trouble: Mutex::new(None),
        }
    }

    /// Lets clients in from now on.
    pub(super) fn open(&self) -> Result<()> {
        let mut door = self.door();
        if door.is_none() {
            let host: Arc<dyn Host> = Arc::<Served>::clone(&self.served);
            *door = Some(Door::open(self.options.clone(), host)?);
        }
        Ok(())
    }

    /// Lets nobody in any more; when it returns, all that was received is done.
    pub(super) fn close(&self) {
        if let Some(door) = self.door().take() {
            door.close();
        }
    }

    pub(super) fn clients(&self) -> usize {
        self.door().as_ref().map_or(0, Door::clients)
    }

    pub(super) fn opened(&self) -> &Opened {
        &self.served.opened
    }

    pub(super) fn trouble(&self) -> MutexGuard<'_, Option<String>> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Nothing that panics is done under it.
    fn door(&self) -> MutexGuard<'_, Option<Door>> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Host for Served {
    fn export(&self) -> &Export {
        &self.export
    }

    fn serve(&self, stream: &UnixStream, session: Session, first: &[u8]) -> Result<()> {
        let (opened, export) = (&self.opened, &self.export);
        let line = connection::Line::new(opened, export, session, stream, &self.allowance);
        line.run(first)
    }
}
