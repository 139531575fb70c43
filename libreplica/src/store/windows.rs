//! What was found out about a volume: the spans of parts of it, as they were read. To find out
//! where bytes are takes a look into every level and log that may have them, and whoever reads a
//! place mostly comes back to it; so as much is remembered as fits, and the half that was not used
//! for longest forgotten when it does not. So memory follows what is touched, up to a limit.

use std::collections::BTreeMap;

use hrl_format::units::{ByteOffset, Extent};

use super::layers::Span;

/// How many spans are remembered: some 15 MiB.
const MOST: usize = 1 << 18;

/// The spans of a part of the volume, without a gap.
#[derive(Clone, Debug)]
pub(super) struct Window {
    pub(super) extent: Extent,
    pub(super) spans: Vec<Span>,
}

/// Windows that do not overlap, by where they begin.
#[derive(Debug)]
pub(super) struct Windows {
    known: BTreeMap<ByteOffset, (Window, u64)>,
    spans: usize,
    most: usize,
    /// Counts uses, to find those not used for longest.
    uses: u64,
}

impl Default for Windows {
    fn default() -> Self {
        Self {
            known: BTreeMap::new(),
            spans: 0,
            most: MOST,
            uses: 0,
        }
    }
}

impl Windows {
    /// The window that holds `at`.
    pub(super) fn get(&mut self, at: ByteOffset) -> Option<&Window> {
        self.uses += 1;
        let (_, (window, used)) = self.known.range_mut(..=at).next_back()?;
        if at >= window.extent.end() {
            return None;
        }
        *used = self.uses;
        Some(window)
    }

    /// Where the first window behind `at` begins.
    pub(super) fn next_behind(&self, at: ByteOffset) -> Option<ByteOffset> {
        self.known.range(at..).next().map(|(start, _)| *start)
    }

    /// Remembers a window that overlaps none.
    pub(super) fn keep(&mut self, window: Window) {
        if self.spans + window.spans.len() > self.most {
            self.forget();
        }
        self.spans += window.spans.len();
        let start = window.extent.offset();
        self.known.insert(start, (window, self.uses));
    }

    /// Half at once, so that it is seldom looked which.
    fn forget(&mut self) {
        let mut uses: Vec<u64> = self.known.values().map(|(_, used)| *used).collect();
        let middle = uses.len() / 2;
        if middle < uses.len() {
            let (_, &mut limit, _) = uses.select_nth_unstable(middle);
            self.known.retain(|_, (_, used)| *used > limit);
        }
        let left = self.known.values();
        self.spans = left.map(|(window, _)| window.spans.len()).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::super::layers::Origin;
    use super::*;

    fn window(start: u64, spans: u64) -> Window {
        let extent = |from: u64, to: u64| {
            Extent::between(ByteOffset::new(from * 512), ByteOffset::new(to * 512))
        };
        let span = |n: u64| Span {
            extent: extent(start + n, start + n + 1),
            origin: Origin::Base,
        };
        Window {
            extent: extent(start, start + spans),
            spans: (0..spans).map(span).collect(),
        }
    }

    #[test]
    fn what_is_used_stays_and_the_limit_holds() {
        let at = |sector: u64| ByteOffset::new(sector * 512);
        let mut windows = Windows {
            most: 100,
            ..Windows::default()
        };
        assert!(windows.get(at(0)).is_none());
        for n in 0..50 {
            windows.keep(window(n * 20, 10));
            assert!(windows.get(at(5)).is_some(), "used each time, {n}");
            let last = windows.get(at(n * 20 + 9)).unwrap();
            assert_eq!(last.extent.offset(), at(n * 20));
            assert!(windows.get(at(n * 20 + 10)).is_none(), "a gap");
            let spans: usize = windows.known.values().map(|(w, _)| w.spans.len()).sum();
            assert!(spans == windows.spans && spans <= 100, "{spans}");
        }
        assert_eq!(
            windows.next_behind(at(1)),
            windows.known.keys().nth(1).copied()
        );
        // One that alone is longer than the limit is kept as long as nothing else is.
        windows.keep(window(5000, 150));
        assert!(windows.get(at(5149)).is_some());
        windows.keep(window(6000, 1));
        assert!(windows.get(at(6000)).is_some());
    }
}
