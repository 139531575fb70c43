//! In what order changes of a device may begin. A change waits for every earlier one that
//! overlaps it, begun or not, and for whatever else stands in its way: a region that is not
//! yet in the activity log, a block whose old content has not yet been copied. Pure: who
//! waits for what; nothing is read, written or woken here.
//!
//! A device may finish overlapping writes in any order, and then nobody can say what it
//! holds; a log would have to guess. So they are never on the device together.

use crate::units::Extent;

/// A change that was let in, until it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flight(u32);

/// What a change may have to wait for besides the changes before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hurdle {
    /// Its regions are not all in the activity log.
    Activity,
    /// The content that it replaces is still to be copied.
    Copy,
}

/// Whether a change may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// At once.
    Begin,
    /// Once it is among [`Gate::released`].
    Wait,
}

/// `O` is what the owner of a change knows it by.
#[derive(Debug)]
struct Change<O> {
    owner: O,
    extent: Extent,
    /// How many changes before it have not ended.
    before: u32,
    /// Those that wait for it.
    behind: Vec<Flight>,
    hurdles: Hurdles,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Hurdles {
    activity: bool,
    copy: bool,
}

impl Hurdles {
    const fn any(self) -> bool {
        self.activity || self.copy
    }

    const fn of(&mut self, hurdle: Hurdle) -> &mut bool {
        match hurdle {
            Hurdle::Activity => &mut self.activity,
            Hurdle::Copy => &mut self.copy,
        }
    }
}

/// All changes that were let in and have not ended.
#[derive(Debug)]
pub struct Gate<O> {
    changes: Vec<Option<Change<O>>>,
    free: Vec<u32>,
    /// Where each lies: dense, so that a look for overlaps runs through a few cache lines.
    spans: Vec<Span>,
    released: Vec<(Flight, O)>,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    end: u64,
    flight: Flight,
}

impl<O: Copy> Default for Gate<O> {
    fn default() -> Self {
        Self {
            changes: Vec::new(),
            free: Vec::new(),
            spans: Vec::new(),
            released: Vec::new(),
        }
    }
}

impl<O: Copy> Gate<O> {
    /// Lets a change of `extent` in, behind all that were let in before; `hurdles` are in
    /// its way besides.
    pub fn admit(&mut self, extent: Extent, owner: O, hurdles: &[Hurdle]) -> (Flight, Admission) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.changes.push(None);
            (self.changes.len() - 1) as u32
        });
        let flight = Flight(index);
        let (start, end) = (extent.offset().get(), extent.end().get());
        let mut before = 0;
        for span in &self.spans {
            if span.start < end && start < span.end {
                before += 1;
                if let Some(earlier) = &mut self.changes[span.flight.0 as usize] {
                    earlier.behind.push(flight);
                }
            }
        }
        self.spans.push(Span { start, end, flight });
        let mut set = Hurdles::default();
        hurdles.iter().for_each(|hurdle| *set.of(*hurdle) = true);
        self.changes[index as usize] = Some(Change {
            owner,
            extent,
            before,
            behind: Vec::new(),
            hurdles: set,
        });
        let admission = if before == 0 && !set.any() {
            Admission::Begin
        } else {
            Admission::Wait
        };
        (flight, admission)
    }

    /// A change has ended, or will never begin. Those that waited for it alone are released.
    pub fn end(&mut self, flight: Flight) {
        let Some(change) = self.changes[flight.0 as usize].take() else {
            return;
        };
        self.free.push(flight.0);
        if let Some(at) = self.spans.iter().position(|span| span.flight == flight) {
            self.spans.swap_remove(at);
        }
        for behind in change.behind {
            if let Some(next) = &mut self.changes[behind.0 as usize] {
                next.before -= 1;
                if next.before == 0 && !next.hurdles.any() {
                    self.released.push((behind, next.owner));
                }
            }
        }
    }

    /// Takes back the changes that have not begun, and of whose owner `is_gone` says so. Those
    /// that waited for one of them alone are released.
    pub fn withdraw(&mut self, is_gone: impl Fn(O) -> bool) -> Vec<(O, Extent)> {
        let waits = |change: &Change<O>| change.before > 0 || change.hurdles.any();
        let all = self.changes.iter().enumerate();
        let gone: Vec<(Flight, O, Extent)> = all
            .filter_map(|(index, slot)| Some((Flight(index as u32), slot.as_ref()?)))
            .filter(|(_, change)| waits(change) && is_gone(change.owner))
            .map(|(flight, change)| (flight, change.owner, change.extent))
            .collect();
        for &(flight, ..) in &gone {
            // Nobody is to find another under its number.
            for earlier in self.changes.iter_mut().flatten() {
                earlier.behind.retain(|behind| *behind != flight);
            }
        }
        for &(flight, ..) in &gone {
            self.end(flight);
        }
        gone.into_iter()
            .map(|(_, owner, extent)| (owner, extent))
            .collect()
    }

    /// Puts a hurdle in the way of every change that has not begun and of which `concerns`
    /// says so.
    pub fn raise(&mut self, hurdle: Hurdle, concerns: impl Fn(Extent) -> bool) {
        let waiting = self.changes.iter_mut().flatten();
        for change in waiting.filter(|change| change.before > 0 || change.hurdles.any()) {
            if concerns(change.extent) {
                *change.hurdles.of(hurdle) = true;
            }
        }
    }

    /// Takes a hurdle out of the way of every change of which `is_gone` says so.
    pub fn lower(&mut self, hurdle: Hurdle, is_gone: impl Fn(Extent) -> bool) {
        for (index, slot) in self.changes.iter_mut().enumerate() {
            let Some(change) = slot else { continue };
            let stands = change.hurdles.of(hurdle);
            if *stands && is_gone(change.extent) {
                *stands = false;
                if change.before == 0 && !change.hurdles.any() {
                    self.released.push((Flight(index as u32), change.owner));
                }
            }
        }
    }

    /// The extents of the changes that a hurdle holds back.
    pub fn held_by(&self, hurdle: Hurdle) -> impl Iterator<Item = Extent> {
        let held = self.changes.iter().flatten();
        held.filter(move |change| *change.hurdles.clone().of(hurdle))
            .map(|change| change.extent)
    }

    /// Those that may begin now, and have not been asked for yet, in the order in which the
    /// last thing in their way went.
    pub fn released(&mut self) -> std::vec::Drain<'_, (Flight, O)> {
        self.released.drain(..)
    }

    /// The extents of all changes that have not ended.
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        self.changes.iter().flatten().map(|change| change.extent)
    }

    /// Whether all have ended.
    pub const fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Whether any that has not ended overlaps `extent`.
    pub fn touches(&self, extent: Extent) -> bool {
        let (start, end) = (extent.offset().get(), extent.end().get());
        self.spans
            .iter()
            .any(|span| span.start < end && start < span.end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::units::{ByteLen, ByteOffset};

    fn extent(offset: u64, len: u64) -> Extent {
        Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap()
    }

    #[test]
    fn what_overlaps_goes_in_the_order_of_arrival() {
        let mut gate = Gate::default();
        let (first, begins) = gate.admit(extent(0, 10), 'a', &[]);
        assert_eq!(begins, Admission::Begin);
        let (second, waits) = gate.admit(extent(5, 10), 'b', &[]);
        assert_eq!(waits, Admission::Wait);
        // Overlaps only what waits itself, and must not overtake it.
        let (third, waits) = gate.admit(extent(12, 10), 'c', &[]);
        assert_eq!(waits, Admission::Wait);
        let (_, begins) = gate.admit(extent(30, 1), 'd', &[]);
        assert_eq!(begins, Admission::Begin);
        gate.end(first);
        assert_eq!(gate.released().collect::<Vec<_>>(), [(second, 'b')]);
        gate.end(second);
        assert_eq!(gate.released().collect::<Vec<_>>(), [(third, 'c')]);
        gate.end(third);
        assert!(!gate.is_empty());
    }

    #[test]
    fn hurdles_hold_back_and_let_go() {
        let mut gate = Gate::default();
        let (one, waits) = gate.admit(extent(0, 8), 1, &[Hurdle::Activity, Hurdle::Copy]);
        assert_eq!(waits, Admission::Wait);
        gate.lower(Hurdle::Copy, |_| true);
        assert_eq!(gate.released().count(), 0);
        assert_eq!(
            gate.held_by(Hurdle::Activity).collect::<Vec<_>>(),
            [extent(0, 8)]
        );
        // A hurdle that rises later concerns only what has not begun.
        let (two, begins) = gate.admit(extent(8, 8), 2, &[]);
        assert_eq!(begins, Admission::Begin);
        gate.raise(Hurdle::Copy, |_| true);
        gate.lower(Hurdle::Activity, |_| true);
        assert_eq!(gate.released().count(), 0);
        gate.lower(Hurdle::Copy, |extent| extent.offset().get() == 0);
        assert_eq!(gate.released().collect::<Vec<_>>(), [(one, 1)]);
        gate.end(one);
        gate.end(two);
        assert!(gate.is_empty());
    }

    #[test]
    fn what_is_withdrawn_holds_nobody_back() {
        let mut gate = Gate::default();
        let (first, _) = gate.admit(extent(0, 10), 'a', &[]);
        gate.admit(extent(5, 10), 'b', &[]);
        let (third, _) = gate.admit(extent(12, 10), 'c', &[]);
        gate.admit(extent(0, 3), 'b', &[Hurdle::Copy]);
        let (begun, _) = gate.admit(extent(40, 3), 'b', &[]);
        let gone = gate.withdraw(|owner| owner == 'b');
        assert_eq!(gone, [('b', extent(5, 10)), ('b', extent(0, 3))]);
        assert_eq!(gate.released().collect::<Vec<_>>(), [(third, 'c')]);
        // Under the number of one that is gone.
        let (again, waits) = gate.admit(extent(13, 1), 'd', &[]);
        assert_eq!(waits, Admission::Wait);
        gate.end(first);
        assert_eq!(gate.released().count(), 0);
        gate.end(third);
        assert_eq!(gate.released().collect::<Vec<_>>(), [(again, 'd')]);
        gate.end(again);
        gate.end(begun);
        assert!(gate.is_empty());
    }

    proptest! {
        /// Whatever comes and ends: no two that overlap are ever begun together, each begins
        /// after the earlier ones that it overlaps, and in the end all have begun.
        #[test]
        fn overlapping_changes_are_never_begun_together(
            wanted in prop::collection::vec((0..64_u64, 1..16_u64), 1..60),
            ends in prop::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let mut gate = Gate::default();
            let mut begun: Vec<(usize, Flight)> = Vec::new();
            let mut ended = vec![false; wanted.len()];
            let overlap = |a: usize, b: usize| {
                let ((s, l), (t, m)) = (wanted[a], wanted[b]);
                s < t + m && t < s + l
            };
            let mut next = 0;
            for (step, pick) in ends.iter().enumerate() {
                if next < wanted.len() && (step % 2 == 0 || begun.is_empty()) {
                    let (offset, len) = wanted[next];
                    let (flight, admission) = gate.admit(extent(offset, len), next, &[]);
                    if admission == Admission::Begin {
                        begun.push((next, flight));
                    }
                    next += 1;
                } else if !begun.is_empty() {
                    let (n, flight) = begun.swap_remove(pick.index(begun.len()));
                    gate.end(flight);
                    ended[n] = true;
                }
                begun.extend(gate.released().map(|(flight, n)| (n, flight)));
                for (i, (a, _)) in begun.iter().enumerate() {
                    prop_assert!(begun[i + 1..].iter().all(|(b, _)| !overlap(*a, *b)));
                    prop_assert!((0..*a).all(|b| ended[b] || !overlap(*a, b)));
                }
            }
            while let Some((_, flight)) = begun.pop() {
                gate.end(flight);
                begun.extend(gate.released().map(|(flight, n)| (n, flight)));
            }
            prop_assert!(gate.is_empty());
        }
    }
}
