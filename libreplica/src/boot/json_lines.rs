//! One JSON value a line over a Unix socket, with limits of time and length: what QEMU and the
//! guest agent speak. The agent's end is in the guest, so nothing of what comes is trusted.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

/// The longest line that is taken.
const LONGEST: u64 = 1 << 20;

/// A connection.
#[derive(Debug)]
pub(super) struct JsonLines {
    reader: BufReader<UnixStream>,
}

impl JsonLines {
    /// Connects, once somebody listens.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self {
            reader: BufReader::new(socket),
        })
    }

    /// Sends one value.
    pub(super) fn send(&mut self, value: &Value) -> io::Result<()> {
        let line = format!("{value}\n");
        self.reader.get_mut().write_all(line.as_bytes())
    }

    /// The next value that `wanted` takes, within `limit`; others are passed over.
    pub(super) fn receive<T>(
        &mut self,
        limit: Duration,
        wanted: impl Fn(&Value) -> Option<T>,
    ) -> io::Result<T> {
        let end = Instant::now() + limit;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.reader.get_ref().set_read_timeout(Some(left))?;
            let mut line = Vec::new();
            let mut bounded = (&mut self.reader).take(LONGEST);
            let count = match bounded.read_until(b'\n', &mut line) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                read => read?,
            };
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            // The agent's resync mark, and noise of the guest's.
            let Ok(value) = serde_json::from_slice(&line) else {
                continue;
            };
            if let Some(found) = wanted(&value) {
                return Ok(found);
            }
        }
    }
}
