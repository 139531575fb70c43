//! A volume behind an NBD socket: what every client's connection shares, and how a client
//! that was let in is served.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::capture::inline::Entrance;
use crate::capture::nbd::clerk::Clerk;
use crate::capture::nbd::connection::{Common, Connection, depth};
use crate::capture::nbd::contexts::Contexts;
use crate::capture::nbd::door::{Door, Host};
use crate::capture::nbd::handshake::{Access, Export, Session, Trim};
use crate::capture::nbd::memory::Allowance;
use crate::error::{IoContext, Result};
use crate::units::ByteLen;

/// Where and how to serve.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// The socket's path. Its folder is there; the socket is for its owner alone.
    pub socket: PathBuf,
    /// The export's name, besides the empty one.
    pub export: String,
    /// Clients at a time; more are sent away.
    pub connections: usize,
    /// How long a client may take until it is served.
    pub handshake: Duration,
    /// What the data of all clients' requests may take, besides a request for each.
    pub memory: ByteLen,
}

impl NbdOptions {
    /// Usual ones for a server at `socket`.
    pub fn new(socket: impl AsRef<Path>) -> Self {
        Self {
            socket: socket.as_ref().to_owned(),
            export: String::new(),
            connections: 64,
            handshake: Duration::from_secs(10),
            memory: ByteLen::new(256 << 20),
        }
    }
}

/// A volume that is served over NBD. Stop it before the volume's
/// [`Service`](crate::capture::inline::Service).
#[derive(Debug)]
pub struct NbdServer(Door);

struct Served {
    entrance: Entrance,
    common: Common,
}

impl NbdServer {
    /// Serves the device behind `entrance`. A socket that a dead process left is replaced.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] if somebody listens there; [`crate::ErrorKind::Exists`] if
    /// something else than a socket is there; what the system says.
    pub fn start(
        entrance: Entrance,
        options: NbdOptions,
        contexts: Arc<dyn Contexts>,
    ) -> Result<Self> {
        let geometry = entrance.geometry();
        let trim = if entrance.disk().can_discard() {
            Trim::Offered
        } else {
            Trim::Absent
        };
        let export = Export {
            name: options.export.clone(),
            size: geometry.size,
            sector: geometry.sector,
            access: Access::ReadWrite,
            trim,
        };
        let common = Common {
            export,
            clerk: Clerk::start(contexts).at("start a thread", &options.socket)?,
            allowance: Arc::new(Allowance::new(options.memory.get())),
        };
        let served = Arc::new(Served { entrance, common });
        Door::open(options, served).map(Self)
    }

    /// What clients are told to use: `nbd+unix:///?socket=PATH`.
    pub fn uri(&self) -> String {
        self.0.uri()
    }

    /// How many clients are connected.
    pub fn clients(&self) -> usize {
        self.0.clients()
    }

    /// Lets nobody in any more and ends the connections: what was received is done, and
    /// answered if the clients take their replies soon. Waits until every change has ended.
    pub fn stop(self) {
        self.0.close();
    }
}

impl Host for Served {
    fn export(&self) -> &Export {
        &self.common.export
    }

    fn names(&self, waits: &dyn Fn() -> bool) -> Vec<String> {
        self.common.clerk.names(waits)
    }

    fn serve(&self, stream: &UnixStream, session: Session, first: &[u8]) -> Result<()> {
        let lane = self.entrance.lane(depth())?;
        Connection::new(&self.common, session, stream, first, lane)?.run()
    }
}
