//! Whose a mark in the run folder is: the process that will undo what the mark tells of. A
//! mark whose process is dead is for the next start to act on; a pid alone would not tell,
//! for another process may have it by then.

use std::fs;

use crate::device::BootId;

/// A process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pid: u32,
    /// Clock ticks since boot: another process that got the same pid has another.
    pub(super) started: u64,
}

impl Owner {
    /// The process of this pid, now.
    pub fn of(pid: u32) -> Self {
        Self {
            pid,
            started: start_time(pid).unwrap_or(0),
        }
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// The first line of its mark: `MAGIC BOOT PID START`, always of one length.
    pub fn head(self, magic: &str, boot: &BootId) -> String {
        let Self { pid, started } = self;
        format!("{magic} {boot} {pid:>10} {started:>20}\n")
    }

    /// The boot and the process of a mark's first line; `None` if it makes no sense.
    pub fn parse_head(magic: &str, head: &str) -> Option<(BootId, Self)> {
        let mut words = head.strip_prefix(magic)?.split_ascii_whitespace();
        let boot = BootId::parse(words.next()?)?;
        let pid = words.next()?.parse().ok()?;
        let started = words.next()?.parse().ok()?;
        Some((boot, Self { pid, started }))
    }
}

/// When the process started; `None` if it is gone, or dead and only not yet reaped.
/// Fields 3 and 22 of /proc/PID/stat, counted behind the name, which may hold anything.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, behind) = stat.rsplit_once(')')?;
    let mut fields = behind.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}
