//! What a command can fail with, and the exit code that each failure has.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use libreplica::ErrorKind;

use crate::control::protocol::needs_resync;
use crate::quantity::QuantityError;

/// Exit code: it failed.
pub const FAILED: u8 = 1;
/// Exit code: the command line makes no sense.
pub const USAGE: u8 = 2;
/// Exit code: a resync is needed or running, or source and image differ.
pub const DIFFERS: u8 = 3;
/// Exit code: a step of a recovery plan waits for somebody to confirm it.
pub const WAITS: u8 = 4;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Nothing listens on the control socket.
    #[error(
        "speak to the daemon: {}: {source}; start it with `replica run` (systemctl start replica), \
         or name its socket with --socket",
        socket.display()
    )]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The daemon lives and says nothing.
    #[error(
        "speak to the daemon: {}: it did not answer within {} s; it may still be at it: \
         see `replica status`",
        socket.display(),
        limit.as_secs()
    )]
    NoAnswer {
        /// The socket.
        socket: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// The daemon ended while it worked on the request.
    #[error("speak to the daemon: {}: it closed the connection without an answer; see its log",
        socket.display())]
    Hangup {
        /// The socket.
        socket: PathBuf,
    },
    /// The daemon said no.
    #[error("{message}")]
    Daemon {
        /// The error's kind, see [`ErrorKind::as_str`].
        kind: String,
        /// What it said.
        message: String,
    },
    /// The library failed.
    #[error(transparent)]
    Library(#[from] libreplica::Error),
    /// A quantity was not one.
    #[error(transparent)]
    Quantity(#[from] QuantityError),
    /// A message was not JSON, or not of this version.
    #[error("speak to the daemon: {0}; are both of the same version?")]
    Message(#[from] serde_json::Error),
    /// Standard output is gone, or a file could not be written.
    #[error("write the result: {0}")]
    Output(#[from] std::io::Error),
    /// The configuration file makes no sense.
    #[error("read the configuration: {0}")]
    Config(String),
    /// The arguments make no sense together.
    #[error("{0}")]
    Usage(String),
}

impl Failure {
    /// The exit code of this failure.
    pub fn exit_code(&self) -> ExitCode {
        let code = match self {
            Self::Quantity(_) | Self::Config(_) | Self::Usage(_) => USAGE,
            Self::Daemon { kind, .. } if needs_resync(kind) => DIFFERS,
            Self::Library(error) if error.kind() == ErrorKind::ResyncNeeded => DIFFERS,
            _ => FAILED,
        };
        ExitCode::from(code)
    }
}
