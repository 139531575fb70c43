//! The activity log: the regions of a device that are being written, or were a moment ago,
//! durable before the first write to them. After a loss of power nobody can say what became
//! of the writes on their way; only these regions have to be compared.
//!
//! All active regions fit one block of 4 KiB, so that a transaction is one durable write of
//! the whole set, to one of two places in turn: the newest whole one counts. A region leaves
//! the set only after a flush of the device that follows its last write, and after its dirty
//! bits are durable; so regions leave many at a time, when room is needed or after a while
//! without writes. This part is pure: it says what to write when; see `activity_file.rs`.

use std::collections::HashMap;

use crate::units::{ByteLen, ByteOffset, Extent, VolumeSize};

/// How many regions can be active: what one block has room for.
pub const REGIONS_MAX: usize = 1000;
/// Bytes in a region. With all active, 4 GiB are compared after a loss of power.
pub const REGION: ByteLen = ByteLen::new(4 << 20);

/// The number of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Region(pub u32);

impl Region {
    /// Its bytes on a volume of `size`; `None` behind the end.
    pub fn extent(self, size: VolumeSize) -> Option<Extent> {
        let start = ByteOffset::new(u64::from(self.0) * REGION.get());
        Extent::new(start, REGION)?.intersect(size.extent())
    }

    /// The regions that `extent` touches.
    pub fn of(extent: Extent) -> impl Iterator<Item = Self> + Clone {
        let first = extent.offset().get() / REGION.get();
        let last = extent.end().get().saturating_sub(1) / REGION.get();
        let end = if extent.is_empty() { first } else { last + 1 };
        (first..end).map(|n| Self(u32::try_from(n).unwrap_or(u32::MAX)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Asked for; in no durable transaction yet.
    Wanted,
    /// In the last durable transaction, and in the next.
    Active,
}

#[derive(Debug)]
struct Entry {
    standing: Standing,
    /// Changes under way in it.
    writers: u32,
    /// In which turn it was last written.
    touched: u64,
}

/// The regions in use.
#[derive(Debug, Default)]
pub struct Activity {
    entries: HashMap<Region, Entry>,
    turn: u64,
    wanted: usize,
}

/// What the next transaction shall hold, or what has to be done before.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing is wanted.
    Rest,
    /// Write this set durably, then call [`Activity::written`] with it.
    Write(Vec<Region>),
    /// There is no room: flush the device and the dirty bits, then call
    /// [`Activity::retire`] with these.
    Retire(Vec<Region>),
    /// There is no room, and every region is being written: wait for writes to end.
    Wait,
}

impl Activity {
    /// A change of `extent` arrives; says whether it may begin at once, as for the activity
    /// log. Its regions stay until [`Self::leave`] and beyond.
    pub fn enter(&mut self, extent: Extent) -> bool {
        let mut active = true;
        let turn = self.turn;
        for region in Region::of(extent) {
            let entry = self.entries.entry(region).or_insert_with(|| {
                self.wanted += 1;
                Entry {
                    standing: Standing::Wanted,
                    writers: 0,
                    touched: turn,
                }
            });
            entry.writers += 1;
            entry.touched = turn;
            active &= entry.standing == Standing::Active;
        }
        active
    }

    /// The change has ended.
    pub fn leave(&mut self, extent: Extent) {
        let turn = self.turn;
        for region in Region::of(extent) {
            if let Some(entry) = self.entries.get_mut(&region) {
                entry.writers = entry.writers.saturating_sub(1);
                entry.touched = turn;
            }
        }
    }

    /// Whether all regions of `extent` are active.
    pub fn is_active(&self, extent: Extent) -> bool {
        let active = |region| {
            let entry = self.entries.get(&region);
            entry.is_some_and(|entry| entry.standing == Standing::Active)
        };
        Region::of(extent).all(active)
    }

    /// What is to be done now.
    pub fn step(&mut self) -> Step {
        if self.wanted == 0 {
            return Step::Rest;
        }
        let active = self.entries.len() - self.wanted;
        if active < REGIONS_MAX {
            // As many as fit; the rest waits for the next.
            let mut set = self.standing(Standing::Active);
            let mut wanted = self.standing(Standing::Wanted);
            wanted.truncate(REGIONS_MAX - active);
            set.append(&mut wanted);
            return Step::Write(set);
        }
        let mut idle = self.idle(u64::MAX);
        if idle.is_empty() {
            return Step::Wait;
        }
        // The longest untouched quarter: room for many transactions at the price of one.
        idle.sort_unstable();
        idle.truncate(REGIONS_MAX / 4);
        Step::Retire(self.begin_retiring(idle))
    }

    /// Regions that nobody has written since [`Self::tick`] was last called twice, to be
    /// retired as after [`Step::Retire`]; then [`Self::remaining`] is to be written.
    pub fn idle_regions(&mut self) -> Vec<Region> {
        let before = self.turn.saturating_sub(1);
        let idle = self.idle(before);
        self.begin_retiring(idle)
    }

    /// Time passes.
    pub fn tick(&mut self) {
        self.turn += 1;
    }

    /// The regions without writers, touched before turn `before`, with that turn.
    fn idle(&self, before: u64) -> Vec<(u64, Region)> {
        let entries = self.entries.iter();
        entries
            .filter(|(_, entry)| entry.standing == Standing::Active && entry.writers == 0)
            .filter(|(_, entry)| entry.touched < before)
            .map(|(region, entry)| (entry.touched, *region))
            .collect()
    }

    /// Whoever writes to one of them from now on is seen by [`Self::retire`].
    fn begin_retiring(&mut self, idle: Vec<(u64, Region)>) -> Vec<Region> {
        self.turn += 1;
        idle.into_iter().map(|(_, region)| region).collect()
    }

    /// The device and the dirty bits were flushed after `regions` were chosen: those that
    /// were not touched meanwhile leave the set. They may be in the durable one for longer.
    pub fn retire(&mut self, regions: &[Region]) {
        for region in regions {
            let untouched = self.entries.get(region).is_some_and(|entry| {
                entry.writers == 0
                    && entry.touched < self.turn
                    && entry.standing == Standing::Active
            });
            if untouched {
                self.entries.remove(region);
            }
        }
    }

    /// The set without what was retired.
    pub fn remaining(&self) -> Vec<Region> {
        self.standing(Standing::Active)
    }

    fn standing(&self, standing: Standing) -> Vec<Region> {
        let entries = self.entries.iter();
        entries
            .filter(|(_, entry)| entry.standing == standing)
            .map(|(region, _)| *region)
            .collect()
    }

    /// A transaction with `set` is durable: the regions in it are active.
    pub fn written(&mut self, set: &[Region]) {
        for region in set {
            if let Some(entry) = self.entries.get_mut(region)
                && entry.standing == Standing::Wanted
            {
                entry.standing = Standing::Active;
                self.wanted -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    fn extent(region: u32, regions: u32) -> Extent {
        let start = ByteOffset::new(u64::from(region) * REGION.get() + 512);
        let len = ByteLen::new(u64::from(regions - 1) * REGION.get() + 512);
        Extent::new(start, len).unwrap()
    }

    #[test]
    fn regions_of_an_extent() {
        let regions = |offset, len| -> Vec<u32> {
            let extent = Extent::new(ByteOffset::new(offset), ByteLen::new(len)).unwrap();
            Region::of(extent).map(|region| region.0).collect()
        };
        let size = REGION.get();
        assert_eq!(regions(0, 0), [0; 0]);
        assert_eq!(regions(0, 1), [0]);
        assert_eq!(regions(size - 1, 1), [0]);
        assert_eq!(regions(size - 1, 2), [0, 1]);
        assert_eq!(regions(size, 2 * size + 1), [1, 2, 3]);
    }

    #[test]
    fn room_is_made_by_those_that_were_quiet_longest() {
        let mut activity = Activity::default();
        for n in 0..REGIONS_MAX as u32 {
            activity.tick();
            assert!(!activity.enter(extent(n, 1)));
        }
        let Step::Write(set) = activity.step() else {
            panic!("nothing to write")
        };
        activity.written(&set);
        assert_eq!(activity.step(), Step::Rest);
        assert!(!activity.enter(extent(5000, 1)));
        assert_eq!(activity.step(), Step::Wait, "all are being written");
        for n in 0..REGIONS_MAX as u32 - 1 {
            activity.leave(extent(n, 1));
        }
        // Written again: it is no longer the quietest.
        activity.tick();
        assert!(activity.enter(extent(0, 1)));
        activity.leave(extent(0, 1));
        let Step::Retire(regions) = activity.step() else {
            panic!("no room is made")
        };
        assert_eq!(regions.len(), REGIONS_MAX / 4);
        assert!(!regions.contains(&Region(0)));
        // One that is written while the device is flushed stays.
        assert!(activity.enter(extent(regions[7].0, 1)));
        activity.retire(&regions);
        assert!(activity.is_active(extent(regions[7].0, 1)));
        assert!(!activity.is_active(extent(regions[8].0, 1)));
        assert!(matches!(activity.step(), Step::Write(_)));
    }

    #[derive(Clone, Debug)]
    enum Event {
        Enter(u32, u32),
        Leave(prop::sample::Index),
        LeaveFirst,
        Work,
        Quiet,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => (0..3000_u32, 1..3_u32).prop_map(|(region, regions)| Event::Enter(region, regions)),
            3 => any::<prop::sample::Index>().prop_map(Event::Leave),
            2 => Just(Event::Work),
            1 => Just(Event::Quiet),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Whatever comes: a region in which a write began is in the last durable set, until
        /// the device was flushed after that write.
        #[test]
        fn what_is_not_flushed_is_in_the_durable_set(
            first in 0..1000_u32,
            events in prop::collection::vec(event(), 1..400),
        ) {
            let mut activity = Activity::default();
            let mut durable: HashSet<Region> = HashSet::new();
            let mut unflushed: HashSet<Region> = HashSet::new();
            let mut writers = Vec::new();
            let mut waiting = Vec::new();
            // Many regions that were written once fill the set.
            let filling = (0..first).map(|n| Event::Enter(n, 1));
            let emptying = (0..first).map(|_| Event::LeaveFirst);
            let filling = filling.chain([Event::Work]).chain(emptying);
            let events = filling.chain(events);
            for event in events {
                match event {
                    Event::Enter(region, regions) => {
                        let extent = extent(region, regions);
                        if writers.len() + waiting.len() < 950 {
                            if activity.enter(extent) {
                                writers.push(extent);
                            } else {
                                waiting.push(extent);
                            }
                        }
                    }
                    Event::Leave(pick) if !writers.is_empty() => {
                        let extent = writers.swap_remove(pick.index(writers.len()));
                        activity.leave(extent);
                    }
                    Event::LeaveFirst if !writers.is_empty() => activity.leave(writers.remove(0)),
                    Event::Leave(_) | Event::LeaveFirst => {}
                    Event::Work => match activity.step() {
                        Step::Write(set) => {
                            prop_assert!(set.len() <= REGIONS_MAX);
                            durable = set.iter().copied().collect();
                            activity.written(&set);
                        }
                        Step::Retire(regions) => {
                            // The flush, then what is written meanwhile, in one moment.
                            let busy: HashSet<_> = writers.iter().flat_map(|e| Region::of(*e)).collect();
                            unflushed.retain(|region| busy.contains(region));
                            activity.retire(&regions);
                        }
                        Step::Rest | Step::Wait => {}
                    },
                    Event::Quiet => {
                        activity.tick();
                        let regions = activity.idle_regions();
                        let busy: HashSet<_> = writers.iter().flat_map(|e| Region::of(*e)).collect();
                        unflushed.retain(|region| busy.contains(region));
                        activity.retire(&regions);
                        durable = activity.remaining().into_iter().collect();
                    }
                }
                let begin = |extent: &Extent| activity.is_active(*extent);
                writers.extend(waiting.iter().filter(|extent| begin(extent)));
                waiting.retain(|extent| !begin(extent));
                unflushed.extend(writers.iter().flat_map(|extent| Region::of(*extent)));
                prop_assert!(unflushed.is_subset(&durable));
            }
        }
    }
}
