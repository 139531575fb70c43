//! What a tracker has counted, and why a volume was taken for dirty as a whole.

use std::fmt;

/// Why all of a volume counts as dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WidenCause {
    /// More writes in flight than can be noted.
    TableFull,
    /// A write completed whose submission was not seen.
    Unmatched,
    /// An operation that changes data, but not known where.
    UnknownOperation,
    /// A command sent past the block layer that may have written.
    PassThrough,
    /// A range that could not be marked whole.
    Range,
    /// A write behind the end of the volume: the disk has grown.
    BeyondEnd,
    /// The kernel skipped a program that was already running on that CPU.
    MissedEvents,
    /// The kernel counted sectors that were not seen.
    StatsDiffer,
    /// The caller said so: a first copy, tracking that was lost.
    Asked,
}

impl WidenCause {
    /// All, in the order of the words that count them.
    pub const ALL: [Self; 9] = [
        Self::TableFull,
        Self::Unmatched,
        Self::UnknownOperation,
        Self::PassThrough,
        Self::Range,
        Self::BeyondEnd,
        Self::MissedEvents,
        Self::StatsDiffer,
        Self::Asked,
    ];

    /// As it stands in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TableFull => "table_full",
            Self::Unmatched => "unmatched",
            Self::UnknownOperation => "unknown_operation",
            Self::PassThrough => "pass_through",
            Self::Range => "range",
            Self::BeyondEnd => "beyond_end",
            Self::MissedEvents => "missed_events",
            Self::StatsDiffer => "stats_differ",
            Self::Asked => "asked",
        }
    }
}

impl fmt::Display for WidenCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TableFull => "more writes in flight than can be noted",
            Self::Unmatched => "a write completed whose start was not seen",
            Self::UnknownOperation => "an operation that changes data at an unknown place",
            Self::PassThrough => "a command past the block layer that may have written",
            Self::Range => "a range that could not be marked",
            Self::BeyondEnd => "a write behind the end of the volume",
            Self::MissedEvents => "the kernel skipped an event",
            Self::StatsDiffer => "the kernel counted writes that were not seen",
            Self::Asked => "asked for",
        })
    }
}

/// Writes that were submitted and have not completed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    /// Bios seen on their way, flushes included.
    pub writes: u64,
    /// The sectors they cover, 512 bytes each.
    pub sectors: u64,
    /// Write requests that the kernel itself has in flight, those included that came through
    /// a driver above without being announced; 0 where it does not count.
    pub requests: u64,
}

impl InFlight {
    /// Whether nothing that changes data is in flight. Bios without sectors do not count: of
    /// a flush that a disk hands to one of its paths (NVMe multipath) no end is ever seen; and
    /// what an unknown operation does is a cause when it begins and again when it ends.
    pub const fn is_none(&self) -> bool {
        self.sectors == 0 && self.requests == 0
    }
}

/// What was counted since the tracker was attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Writes, discards and the like submitted, flushes included.
    pub submitted: u64,
    /// Their sectors, 512 bytes each.
    pub submitted_sectors: u64,
    /// How many of them have completed.
    pub completed: u64,
    /// Their sectors.
    pub completed_sectors: u64,
    /// Requests completed; 0 on disks that know none.
    pub requests: u64,
    /// Their sectors.
    pub request_sectors: u64,
    /// Writes whose completion was missed, and found so later.
    pub stale: u64,
    /// How often the kernel skipped one of the programs.
    pub missed_events: u64,
    /// How often the volume was widened, by cause; only causes that occurred.
    pub widened: Vec<(WidenCause, u64)>,
}
