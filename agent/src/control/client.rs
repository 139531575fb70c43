//! The client's side of the control socket.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::protocol::{Answer, MESSAGE_MAX, Request};
use crate::failure::Failure;

/// Sends `request` to the daemon at `socket` and waits for its answer, at most `limit`
/// (none: as long as it takes; the daemon ends every request by itself).
///
/// # Errors
/// When no daemon answers there, when it does not within `limit`, or its answer is an error.
pub fn ask(socket: &Path, request: &Request, limit: Option<Duration>) -> Result<Answer, Failure> {
    let no_daemon = |source: std::io::Error| Failure::NoDaemon {
        socket: socket.into(),
        source,
    };
    let mut stream = UnixStream::connect(socket).map_err(no_daemon)?;
    stream.set_read_timeout(limit).map_err(no_daemon)?;
    stream
        .set_write_timeout(Some(Duration::from_secs(10)))
        .map_err(no_daemon)?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line).map_err(no_daemon)?;
    let mut answer = String::new();
    BufReader::new(stream.take(MESSAGE_MAX))
        .read_line(&mut answer)
        .map_err(|source| match (source.kind(), limit) {
            (ErrorKind::WouldBlock | ErrorKind::TimedOut, Some(limit)) => Failure::NoAnswer {
                socket: socket.into(),
                limit,
            },
            _ => no_daemon(source),
        })?;
    if answer.is_empty() {
        return Err(Failure::Hangup {
            socket: socket.into(),
        });
    }
    match serde_json::from_str(&answer)? {
        Answer::Failed { kind, message } => Err(Failure::Daemon { kind, message }),
        answer => Ok(answer),
    }
}
