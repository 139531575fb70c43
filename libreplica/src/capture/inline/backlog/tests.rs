//! A backlog beside a model that remembers every change: whatever is done to it, each change
//! is in the store, in the stream, in the gap, or the backlog says that it does not know.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::units::{BlockSize, ByteOffset, SectorSize, VolumeSize};

const LIMIT: u64 = 8192;

/// What becomes of the blocks of a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Stored,
    Lost,
}

#[derive(Clone, Debug)]
enum Step {
    /// So many changes, the first of them of this sector.
    Push {
        sector: u64,
        count: u64,
        len: u64,
    },
    Read {
        bytes: u64,
    },
    Spool,
    /// The store has what was read.
    Stored,
    /// It has half of it.
    PartlyStored,
    Fail,
    GiveUp,
    /// A moment from which the stream goes on.
    Climb(Fate),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0u64..200, 1u64..20, 1u64..4)
            .prop_map(|(sector, count, len)| Step::Push { sector, count, len }),
        4 => (1u64..4000).prop_map(|bytes| Step::Read { bytes }),
        3 => Just(Step::Spool),
        2 => Just(Step::Stored),
        1 => Just(Step::PartlyStored),
        1 => Just(Step::Fail),
        1 => Just(Step::GiveUp),
        2 => Just(Step::Climb(Fate::Stored)),
        1 => Just(Step::Climb(Fate::Lost)),
    ]
}

struct Rig {
    backlog: Backlog,
    shared: Arc<Budget>,
    spool: BTreeMap<u64, Entry>,
    /// What each sector was written with last: on the device, and as the store has it.
    device: BTreeMap<u64, u64>,
    store: BTreeMap<u64, u64>,
    /// Read and not stored, in order.
    draft: Vec<Entry>,
    pushed: u64,
}

fn geometry() -> Geometry {
    Geometry {
        size: VolumeSize::new(1 << 20),
        block: BlockSize::new(4096).unwrap(),
        sector: SectorSize::B512,
    }
}

fn sectors(extent: Extent) -> std::ops::Range<u64> {
    extent.offset().get() / 512..extent.end().get() / 512
}

impl Rig {
    fn new() -> Self {
        let shared = Arc::new(Budget::new(ByteLen::new(LIMIT * 3)));
        let limits = Limits {
            bytes: ByteLen::new(LIMIT),
            extents: 12,
            shared: Arc::clone(&shared),
        };
        Self {
            backlog: Backlog::new(limits, geometry()),
            shared,
            spool: BTreeMap::new(),
            device: BTreeMap::new(),
            store: BTreeMap::new(),
            draft: Vec::new(),
            pushed: 0,
        }
    }

    fn push(&mut self, sector: u64, len: u64) {
        self.pushed += 1;
        let at = ByteOffset::new(sector * 512);
        let extent = Extent::new(at, ByteLen::new(len * 512)).unwrap();
        sectors(extent).for_each(|n| {
            let _ = self.device.insert(n, self.pushed);
        });
        let data: Vec<u8> = self.pushed.to_le_bytes().repeat(len as usize * 64);
        let change = self
            .backlog
            .wants_data()
            .then(|| Change::Write(data.into()));
        let now = Timestamp::from_nanos(self.pushed as i64 / 2);
        let before = self.backlog.mode();
        let fall = self.backlog.push(now, extent, change);
        match fall {
            None => assert_eq!(self.backlog.mode(), before),
            Some(fall) => {
                assert!(fall.to < before);
                assert_eq!(self.backlog.mode(), fall.to);
            }
        }
    }

    fn read(&mut self, bytes: u64) {
        let end = self.backlog.newest();
        match self.backlog.read(end, ByteLen::new(bytes)) {
            Read::Changes(entries) => self.draft.extend(entries),
            Read::Spooled(from) => {
                let number = from.get();
                self.draft.push(self.spool[&number].clone());
                self.backlog.was_read(Sequence::new(number + 1));
            }
            Read::Lost => panic!("lost"),
        }
    }

    fn store_draft(&mut self, count: usize) {
        let stored = self.backlog.stored_up_to().get();
        for entry in self.draft.drain(..count) {
            let Change::Write(data) = &entry.change else {
                panic!("{entry:?}")
            };
            let number = u64::from_le_bytes(data[..8].try_into().unwrap());
            sectors(entry.extent).for_each(|n| {
                let _ = self.store.insert(n, number);
            });
        }
        let upto = Sequence::new(stored + count as u64);
        drop(self.backlog.stored(upto));
        self.spool.retain(|number, _| *number >= upto.get());
    }

    fn climb(&mut self, fate: Fate) {
        if self.backlog.wants_data() {
            return;
        }
        // What came before the gap is shipped first.
        while self.backlog.stored_up_to() < self.backlog.newest() {
            self.read(1000);
            self.store_draft(self.draft.len());
        }
        let closed = self.backlog.climb();
        if fate == Fate::Lost {
            self.fail();
            return;
        }
        let device = self.device.clone();
        match closed {
            Closed::Unknown => self.store = device,
            Closed::Gap(gap) => {
                for run in gap.blocks().runs() {
                    for part in gap.parts(geometry().extent_of(run)) {
                        sectors(part).for_each(|n| match device.get(&n) {
                            Some(number) => {
                                let _ = self.store.insert(n, *number);
                            }
                            None => {
                                let _ = self.store.remove(&n);
                            }
                        });
                    }
                }
            }
        }
        self.backlog.base_is_stored();
        assert_eq!(self.store, self.device, "something is in neither");
    }

    fn fail(&mut self) {
        self.draft.clear();
        drop(self.backlog.rewind());
    }

    fn spool(&mut self) {
        if let Some(batch) = self.backlog.to_spool() {
            let first = batch.first.get();
            let end = first + batch.entries.len() as u64;
            self.spool.extend((first..end).zip(batch.entries));
            drop(self.backlog.spooled(Sequence::new(end)));
        }
    }

    fn carry_out(&mut self, step: &Step) {
        match *step {
            Step::Push { sector, count, len } => {
                (0..count).for_each(|n| self.push(sector + n * 5, len));
            }
            Step::Read { bytes } => self.read(bytes),
            Step::Spool => self.spool(),
            Step::Stored => self.store_draft(self.draft.len()),
            Step::PartlyStored => self.store_draft(self.draft.len() / 2),
            Step::Fail => self.fail(),
            Step::GiveUp => {
                self.draft.clear();
                drop(self.backlog.give_up());
            }
            Step::Climb(fate) => self.climb(fate),
        }
    }

    fn check(&self) {
        let held = self.backlog.held().get();
        assert!(held <= LIMIT);
        assert_eq!(self.shared.used(), held);
        assert!(self.backlog.unread().get() <= held);
        let bytes: u64 = self.backlog.entries.iter().map(Entry::bytes).sum();
        assert_eq!(bytes, held);
        let unread = self.backlog.next.saturating_sub(self.backlog.first) as usize;
        let bytes: u64 = self
            .backlog
            .entries
            .iter()
            .skip(unread)
            .map(Entry::bytes)
            .sum();
        assert_eq!(bytes, self.backlog.unread().get());
    }

    /// In data mode the store and the stream make the device, and in order.
    fn check_whole(&mut self) {
        if !self.backlog.wants_data() {
            return;
        }
        self.fail();
        if !self.backlog.wants_data() {
            return;
        }
        while self.backlog.stored_up_to() < self.backlog.newest() {
            self.read(500);
            let times: Vec<_> = self.draft.iter().map(|entry| entry.time).collect();
            assert!(times.is_sorted());
            self.store_draft(self.draft.len());
        }
        assert_eq!(self.store, self.device);
    }
}

proptest! {
    #[test]
    fn every_change_is_somewhere(steps in prop::collection::vec(step(), 1..80)) {
        let mut rig = Rig::new();
        for step in &steps {
            rig.carry_out(step);
            rig.check();
        }
        rig.check_whole();
        rig.climb(Fate::Stored);
        rig.check_whole();
        let shared = Arc::clone(&rig.shared);
        drop(rig);
        prop_assert_eq!(shared.used(), 0);
    }
}

#[test]
fn the_backlogs_of_a_process_share_their_memory() {
    let shared = Arc::new(Budget::new(ByteLen::new(10_000)));
    let limits = Limits {
        bytes: ByteLen::new(1 << 30),
        extents: 10,
        shared: Arc::clone(&shared),
    };
    let mut backlogs = [
        Backlog::new(limits.clone(), geometry()),
        Backlog::new(limits, geometry()),
    ];
    backlogs
        .iter_mut()
        .for_each(|backlog| drop(backlog.climb()));
    let write = |backlog: &mut Backlog, n: u64| {
        let extent = Extent::new(ByteOffset::new(n * 4096), ByteLen::new(4096)).unwrap();
        backlog.push(
            Timestamp::now(),
            extent,
            Some(Change::Write(vec![0; 4096].into())),
        )
    };
    assert_eq!(write(&mut backlogs[0], 0), None);
    assert!(!backlogs[1].is_behind());
    assert_eq!(write(&mut backlogs[1], 0), None);
    // Both hold some of the memory that is nearly full.
    assert!(backlogs[0].is_behind() && backlogs[1].is_behind());
    let fall = write(&mut backlogs[1], 1).unwrap();
    assert_eq!(
        (fall.to, fall.cause),
        (Mode::Metadata, FallCause::BudgetSpent)
    );
    let batch = backlogs[0].to_spool().unwrap();
    assert_eq!(batch.entries.len(), 1);
    drop(backlogs[0].spooled(Sequence::new(1)));
    assert!(!backlogs[0].is_behind());
    assert_eq!(write(&mut backlogs[0], 1), None);
}
