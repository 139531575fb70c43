//! Where nobody knows what the device holds: a change failed there. It stays here until it was
//! read back, or written over; no moment is taken before. Each part has its own time to be tried
//! again. Pure: nothing is read here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::units::{ByteLen, ByteOffset, Extent};

/// So many parts are told apart. With more, the two that are nearest become one, together
/// with what is between them: that it is read back as well does no harm.
const PARTS_MAX: usize = 1024;
/// So much is read back at once, at most.
const PIECE: ByteLen = ByteLen::new(1 << 20);
/// How soon to look again at what could not be read because it is being written.
const BUSY: Duration = Duration::from_millis(1);
/// How soon to look again when there is nothing: whoever adds something tells so.
const IDLE: Duration = Duration::from_secs(60);

/// Disjoint parts of a device, by their start.
#[derive(Debug, Default)]
pub(super) struct Unknown {
    parts: BTreeMap<u64, Part>,
    trouble: Option<String>,
}

#[derive(Clone, Copy, Debug)]
struct Part {
    end: u64,
    /// It could not be read; it is not tried before.
    not_before: Option<Instant>,
}

impl Unknown {
    /// Whether every part of the device is known.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Why something could not be read, as long as it is in here.
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Adds an extent, which may be in here in part; it becomes one with what it touches.
    pub fn insert(&mut self, extent: Extent) {
        if !extent.is_empty() {
            self.join(extent);
            self.keep_bound();
        }
    }

    fn join(&mut self, extent: Extent) {
        let mut start = extent.offset().get();
        let mut part = Part {
            end: extent.end().get(),
            not_before: None,
        };
        while let Some((&from, &other)) = self.parts.range(..=part.end).next_back()
            && other.end >= start
        {
            self.parts.remove(&from);
            start = start.min(from);
            part.end = part.end.max(other.end);
            part.not_before = part.not_before.max(other.not_before);
        }
        self.parts.insert(start, part);
    }

    /// Takes out what is known now.
    pub fn remove(&mut self, extent: Extent) {
        self.take(extent);
        if self.parts.values().all(|part| part.not_before.is_none()) {
            self.trouble = None;
        }
    }

    /// What is in here of `extent` could not be read, and is tried again at `again`.
    pub fn postpone(&mut self, extent: Extent, again: Instant, trouble: String) {
        let taken = self.take(extent);
        if taken.is_empty() {
            return;
        }
        let not_before = Some(again);
        let parts = taken.into_iter();
        self.parts
            .extend(parts.map(|(start, end)| (start, Part { end, not_before })));
        self.trouble = Some(trouble);
        self.keep_bound();
    }

    /// What can be read back now: not too much at once, and only where `is_free` allows.
    pub fn due(&self, now: Instant, is_free: impl Fn(Extent) -> bool) -> Option<Extent> {
        let due = self.parts.iter().filter(|(_, part)| part.is_due(now));
        due.map(|(&start, part)| {
            let end = part.end.min(start + PIECE.get());
            Extent::between(ByteOffset::new(start), ByteOffset::new(end))
        })
        .find(|extent| is_free(*extent))
    }

    /// How long to wait when nothing can be read back.
    pub fn pause(&self, now: Instant) -> Duration {
        let pause = |part: &Part| {
            part.not_before
                .map_or(BUSY, |time| time.saturating_duration_since(now).max(BUSY))
        };
        self.parts.values().map(pause).min().unwrap_or(IDLE)
    }

    /// Takes out what there is of `extent`: from where to where.
    fn take(&mut self, extent: Extent) -> Vec<(u64, u64)> {
        let (start, end) = (extent.offset().get(), extent.end().get());
        let mut taken = Vec::new();
        while let Some((&from, &part)) = self.parts.range(..end).next_back()
            && part.end > start
        {
            self.parts.remove(&from);
            taken.push((from.max(start), part.end.min(end)));
            if part.end > end {
                self.parts.insert(end, part);
            }
            if from < start {
                self.parts.insert(from, Part { end: start, ..part });
            }
        }
        taken
    }

    fn keep_bound(&mut self) {
        while self.parts.len() > PARTS_MAX {
            let pairs = self.parts.iter().zip(self.parts.keys().skip(1));
            let nearest = pairs.min_by_key(|&((_, part), &next)| next - part.end);
            let Some(((&start, _), &next)) = nearest else {
                return;
            };
            // Up to the next one, which it touches then.
            let (from, to) = (ByteOffset::new(start), ByteOffset::new(next));
            self.join(Extent::between(from, to));
        }
    }
}

impl Part {
    fn is_due(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|time| time <= now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SPACE: u64 = 200;

    fn extent(start: u64, len: u64) -> Extent {
        Extent::between(ByteOffset::new(start), ByteOffset::new(start + len))
    }

    #[derive(Clone, Copy, Debug)]
    enum Act {
        Insert,
        Remove,
        Postpone,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop::sample::select(vec![Act::Insert, Act::Remove, Act::Postpone])
    }

    proptest! {
        #[test]
        fn it_holds_what_is_unknown(
            acts in prop::collection::vec((act(), 0..SPACE, 1u64..40), 0..60),
        ) {
            let (mut unknown, now) = (Unknown::default(), Instant::now());
            let mut model = [false; 300];
            for (act, start, len) in acts {
                let range = start as usize..(start + len) as usize;
                match act {
                    Act::Insert => {
                        unknown.insert(extent(start, len));
                        model[range].fill(true);
                    }
                    Act::Remove => {
                        unknown.remove(extent(start, len));
                        model[range].fill(false);
                    }
                    Act::Postpone => {
                        unknown.postpone(extent(start, len), now, "why".into());
                        prop_assert!(!model[range].contains(&true) || unknown.trouble().is_some());
                    }
                }
                let failed = unknown.parts.values().any(|part| part.not_before.is_some());
                prop_assert_eq!(unknown.trouble().is_some(), failed);
                let mut shown = [false; 300];
                let mut last = 0;
                for (&start, part) in &unknown.parts {
                    prop_assert!(last <= start && start < part.end);
                    last = part.end;
                    shown[start as usize..part.end as usize].fill(true);
                }
                prop_assert_eq!(shown, model);
            }
        }
    }

    #[test]
    fn what_failed_waits_alone() {
        let (mut unknown, now) = (Unknown::default(), Instant::now());
        let piece = PIECE.get();
        unknown.insert(extent(0, 3 * piece));
        assert_eq!(unknown.due(now, |_| true), Some(extent(0, piece)));
        let again = now + Duration::from_secs(1);
        unknown.postpone(extent(0, piece), again, "why".into());
        assert_eq!(unknown.due(now, |_| true), Some(extent(piece, piece)));
        // It is being written: what cannot be read now is looked at soon.
        assert_eq!(unknown.due(now, |_| false), None);
        assert_eq!(unknown.pause(now), BUSY);
        unknown.remove(extent(piece, 2 * piece));
        assert_eq!(unknown.due(now, |_| true), None);
        assert_eq!(unknown.pause(now), Duration::from_secs(1));
        assert_eq!(unknown.due(again, |_| true), Some(extent(0, piece)));
        assert_eq!(unknown.trouble(), Some("why"));
        unknown.remove(extent(0, piece));
        assert!(unknown.is_empty());
        assert_eq!(unknown.trouble(), None);
    }

    #[test]
    fn there_is_a_bound_to_its_parts() {
        let mut unknown = Unknown::default();
        let places = 4 * PARTS_MAX as u64;
        for n in 0..places {
            unknown.insert(extent(n * 8192, 512));
        }
        assert!(unknown.parts.len() <= PARTS_MAX);
        for n in 0..places {
            let there = unknown.take(extent(n * 8192, 512));
            assert_eq!(there, [(n * 8192, n * 8192 + 512)]);
        }
    }
}
