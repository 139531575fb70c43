//! QEMU's own protocol, as much of it as is needed: to ask it to end, to press the
//! guest's power button, and to see whether the guest has taken a connection.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::json_lines::JsonLines;

const LIMIT: Duration = Duration::from_secs(5);

/// A connection to QEMU.
#[derive(Debug)]
pub(super) struct Qmp(JsonLines);

impl Qmp {
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let mut lines = JsonLines::connect(path)?;
        lines.receive(LIMIT, |value| value.get("QMP").map(drop))?;
        let mut qmp = Self(lines);
        qmp.ask(&json!({"execute": "qmp_capabilities"}))?;
        Ok(qmp)
    }

    /// Has QEMU write out what it holds, and end.
    pub(super) fn quit(&mut self) -> io::Result<()> {
        self.0.send(&json!({"execute": "quit"}))
    }

    /// Presses the power button; what the guest makes of it is its own matter.
    pub(super) fn power_down(&mut self) -> io::Result<()> {
        self.ask(&json!({"execute": "system_powerdown"})).map(drop)
    }

    /// What goes through QEMU's own networks.
    pub(super) fn connections(&mut self) -> io::Result<Vec<Connection>> {
        let command = json!({
            "execute": "human-monitor-command",
            "arguments": {"command-line": "info usernet"},
        });
        let answer = self.ask(&command)?;
        let text = answer.as_str().unwrap_or_default();
        Ok(text.lines().filter_map(Connection::parse).collect())
    }

    fn ask(&mut self, command: &Value) -> io::Result<Value> {
        self.0.send(command)?;
        // Events come in between.
        self.0.receive(LIMIT, |value| {
            let answer = value.get("return").cloned().map(Ok);
            let refused = || {
                let text = value.get("error")?.to_string();
                Some(Err(io::Error::other(text)))
            };
            answer.or_else(refused)
        })?
    }
}

/// A line of `info usernet`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Connection {
    /// `HOST_FORWARD`, `SYN_SENT`, `ESTABLISHED`, ...
    pub(super) state: String,
    /// On the host's side.
    pub(super) host_port: u16,
    /// On the guest's.
    pub(super) guest_port: u16,
}

impl Connection {
    /// `TCP[STATE] FD ADDRESS PORT ADDRESS PORT ...`; others are not connections of ours.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let state = words.next()?.strip_prefix("TCP[")?.strip_suffix(']')?;
        let host_port = words.nth(2)?.parse().ok()?;
        let guest_port = words.nth(1)?.parse().ok()?;
        Some(Self {
            state: state.to_owned(),
            host_port,
            guest_port,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_read_from_what_qemu_prints() {
        let text = "Hub -1 (net0):\n\
            \x20 Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\n\
            \x20 TCP[ESTABLISHED]   17       127.0.0.1 41234       10.0.2.15  5432     0     0\n\
            \x20 TCP[HOST_FORWARD]  12       127.0.0.1 41234       10.0.2.15  5432     0     0\n\
            \x20 UDP[236 sec]       18       10.0.2.15 49151   192.168.1.1    53     0     0\n";
        let found: Vec<_> = text.lines().filter_map(Connection::parse).collect();
        let of = |state: &str| Connection {
            state: state.into(),
            host_port: 41234,
            guest_port: 5432,
        };
        assert_eq!(found, [of("ESTABLISHED"), of("HOST_FORWARD")]);
    }
}
