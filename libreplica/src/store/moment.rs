//! Moments between recovery points. A log whose records are in order can be cut behind any of
//! them, and what the chain up to there leaves behind is what the volume was. Such logs, one
//! behind the other, make a window: any moment within can be restored.
//!
//! A window begins no earlier than the oldest point. For a moment is held by the newest point
//! before its epoch: as long as that is listed nothing from it on is folded into the base, and
//! a reader of the moment leases it. The logs of a window are neither merged nor written anew.
//! When retention drops a point, the logs around it leave the window for good.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use hrl_format::units::{Epoch, Sequence, Timestamp};
use serde::{Deserialize, Serialize};

use super::catalogue::{Catalogue, LogEntry};
use super::json::text;

/// The volume as it was when exactly one record of an epoch had completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment {
    /// Which epoch's record.
    pub epoch: Epoch,
    /// The last record that counts; `None`: not even the first, so that it is the end of the
    /// epoch before.
    pub after: Option<Sequence>,
}

/// What stands for [`Moment::after`] `None`.
const START: &str = "start";

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.after {
            Some(sequence) => write!(f, "{}:{sequence}", self.epoch),
            None => write!(f, "{}:{START}", self.epoch),
        }
    }
}

/// The text was no moment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a moment: EPOCH:SEQ expected")]
pub struct ParseMomentError(String);

impl FromStr for Moment {
    type Err = ParseMomentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Digits alone: `parse` would take a sign, too.
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse::<u64>().ok()).flatten()
        };
        let parsed = text.split_once(':').and_then(|(epoch, after)| {
            let epoch = Epoch::new(number(epoch)?);
            let after = match after {
                START => None,
                sequence => Some(Sequence::new(number(sequence)?)),
            };
            Some(Self { epoch, after })
        });
        parsed.ok_or_else(|| ParseMomentError(text.to_owned()))
    }
}

/// A stretch of time of which every moment can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The first: the state that its first record follows.
    pub from: WindowEnd,
    /// The last: after its last record.
    pub to: WindowEnd,
}

/// Where a window begins or ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowEnd {
    /// The moment.
    pub moment: Moment,
    /// When it was.
    pub time: Timestamp,
}

impl Window {
    /// Whether what the volume was at `time` is known.
    pub fn holds(&self, time: Timestamp) -> bool {
        self.from.time <= time && time <= self.to.time
    }
}

/// What the catalogue says of the order of a log's records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogOrder {
    /// Only its end is a state that the volume had; or the store gave up the others.
    #[default]
    AsRead,
    /// Every record is a moment that can be had.
    AsCompleted(InOrder),
}

/// The records of a log in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InOrder {
    /// How many there are.
    pub records: u64,
    /// From when on the volume is known: the log's begin, or its first record if that
    /// completed earlier.
    #[serde(with = "text")]
    pub from: Timestamp,
    /// Up to when: its last record.
    #[serde(with = "text")]
    pub to: Timestamp,
}

impl InOrder {
    /// The last record; `None` if there are none.
    pub fn last(&self) -> Option<Sequence> {
        self.records.checked_sub(1).map(Sequence::new)
    }
}

impl LogEntry {
    /// Its records, if they are in order.
    pub(super) fn in_order(&self) -> Option<&InOrder> {
        match &self.order {
            LogOrder::AsRead => None,
            LogOrder::AsCompleted(records) => Some(records),
        }
    }
}

impl Catalogue {
    /// The records of a log of which every moment can be had.
    pub(super) fn window_log(&self, log: &LogEntry) -> Option<InOrder> {
        // Nothing holds what lies before the oldest point: it is folded.
        let held = self.points.first()?.epoch < log.first;
        log.in_order().filter(|_| held).copied()
    }

    /// The logs of each window, the oldest first.
    pub(super) fn window_logs(&self) -> Vec<Range<usize>> {
        let mut windows: Vec<Range<usize>> = Vec::new();
        for (n, log) in self.logs.iter().enumerate() {
            match windows.last_mut() {
                _ if self.window_log(log).is_none() => {}
                Some(window) if window.end == n => window.end += 1,
                _ => windows.push(n..n + 1),
            }
        }
        windows
    }

    /// The windows, the oldest first.
    pub fn windows(&self) -> Vec<Window> {
        let logs = self.window_logs().into_iter();
        logs.filter_map(|range| self.window(&self.logs[range]))
            .collect()
    }

    pub(super) fn window(&self, logs: &[LogEntry]) -> Option<Window> {
        let first = logs.first()?;
        // An empty log says when it was begun, which may be after what came before the next.
        let recorded = logs.iter().filter_map(LogEntry::in_order);
        let mut recorded = recorded.filter(|records| records.records > 0);
        let begin = recorded.next().or(first.in_order())?;
        // The epoch before may end in a point; then its state is known since then.
        let before = self.points.iter();
        let before = before.filter(|point| point.epoch.next() == first.first);
        let since = before.map(|point| point.time).min();
        let from = WindowEnd {
            moment: Moment {
                epoch: first.first,
                after: None,
            },
            time: since.map_or(begin.from, |since| since.min(begin.from)),
        };
        // What an empty log says is that nothing is known to have happened.
        let end = |log: &LogEntry| {
            let records = log.in_order().filter(|records| records.records > 0)?;
            let moment = Moment {
                epoch: log.first,
                after: records.last(),
            };
            Some(WindowEnd {
                moment,
                time: records.to,
            })
        };
        let to = logs.iter().rev().find_map(end).unwrap_or(from);
        Some(Window { from, to })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_round_trip_as_text() {
        for text in ["7:0", "1:start", "18446744073709551615:41"] {
            assert_eq!(text.parse::<Moment>().unwrap().to_string(), text);
        }
        for text in ["7", ":", "7:", ":7", "7:+1", "-1:2", "7:1:2", "7:end"] {
            let number = text.parse::<Moment>();
            assert_eq!(number, Err(ParseMomentError(text.to_owned())));
        }
    }

    #[test]
    fn moments_are_in_the_order_of_the_stream() {
        let moments = ["1:start", "1:0", "1:9", "1:10", "2:start", "10:0"];
        let moments: Vec<Moment> = moments.iter().map(|text| text.parse().unwrap()).collect();
        assert!(moments.is_sorted());
    }
}
