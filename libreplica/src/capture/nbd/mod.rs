//! The front for users that speak NBD, the network block device protocol, over a Unix
//! socket: QEMU's disks, the kernel's nbd module, backup tools. What they read and write
//! passes through the volume's interceptor (`capture/inline/`); and what changed since a
//! recovery point is shown to them as QEMU shows its dirty bitmaps.
//!
//! ```text
//! wire          numbers of the protocol
//! handshake     bytes to options and back, until a client is served   ┐ pure: no input
//! requests      bytes to requests, checked                            │ or output, no
//! replies       bytes of replies                                      │ trust in what
//! contexts      what changed, for block status                        ┘ a client says
//! clerk         the thread that asks the store what changed
//! memory        buffers that are used again, and a limit on them
//! inbox         from what a socket has to requests with their data
//! outbox        replies, many in one message
//! connection    one client, one thread, one lane
//! door          the socket, and the threads
//! server        what the connections to a volume share
//! ```
//!
//! Sections are named as in the protocol's document, `doc/proto.md` of the
//! NetworkBlockDevice project.

mod clerk;
mod connection;
mod contexts;
mod door;
pub mod handshake;
pub mod inbox;
mod memory;
mod outbox;
pub mod replies;
pub mod requests;
mod server;
mod socket;
pub mod wire;

pub use contexts::{Context, Contexts, HowMany, NoContexts, Since, Stretch, stretches};
pub use door::{Door, Host};
pub use memory::{Allowance, Pool};
pub use server::{NbdOptions, NbdServer};
pub use socket::uri_of;
