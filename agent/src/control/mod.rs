//! The control socket: how the command line speaks to the daemon. One request and one
//! answer a connection, each a line of JSON. The socket's folder and the socket itself
//! are root's alone, and the peer's user is asked of the kernel besides.

pub mod client;
pub mod protocol;
pub mod server;
