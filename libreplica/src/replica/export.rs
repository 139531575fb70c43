//! An opened state behind an NBD socket of its owner alone.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use super::connection;
use super::opened::Opened;
use crate::capture::nbd::handshake::{Export, Session, Trim};
use crate::capture::nbd::{Allowance, Door, Host, NbdOptions};
use crate::error::{Error, ErrorKind, Result};

/// Clients at a time: each has some threads.
const CLIENTS: usize = 16;

/// A state of a volume that is served over NBD.
#[derive(Debug)]
pub struct PointExport {
    door: Door,
    served: Arc<Served>,
}

#[derive(Debug)]
struct Served {
    opened: Opened,
    export: Export,
    allowance: Arc<Allowance>,
}

impl PointExport {
    /// Serves `opened` at the socket `path`. One that a dead process left is replaced.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if somebody listens there; [`ErrorKind::Exists`] if something else
    /// than a socket is there; what the system says.
    pub fn start(opened: Opened, path: &Path) -> Result<Self> {
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
        let host: Arc<dyn Host> = Arc::<Served>::clone(&served);
        let door = Door::open(options, host)?;
        Ok(Self { door, served })
    }

    /// What clients are told to use: `nbd+unix:///?socket=PATH`.
    pub fn uri(&self) -> String {
        self.door.uri()
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        self.door.clients()
    }

    /// What is served.
    pub fn opened(&self) -> &Opened {
        &self.served.opened
    }

    /// Ends the connections: what was received is done, and answered if the clients take
    /// their replies soon. Gives back what was served.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if somebody else still uses it.
    pub fn stop(self) -> Result<Opened> {
        self.door.close();
        let in_use = || Error::new(ErrorKind::State, "close an opened point");
        let served = Arc::into_inner(self.served).ok_or_else(in_use)?;
        Ok(served.opened)
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
