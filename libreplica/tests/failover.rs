//! Failover carried out in a store: drills, planned and unplanned failovers, another point, the
//! commit, and what a killed process leaves. The source is a thread that holds the volume's lock
//! and answers as an agent does.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libreplica::ErrorKind;
use libreplica::failover::State;
use libreplica::geometry::Geometry;
use libreplica::id::{PointId, VolumeId};
use libreplica::record::{Consistency, Record, Root, Tag};
use libreplica::replica::{Choice, Failover, Shutdown};
use libreplica::store::{
    Answer, Ask, How, PointSelector, Recovery, Store, VolumeSpec, VolumeWriter,
};
use libreplica::units::{
    BlockSize, ByteLen, ByteOffset, Extent, SectorSize, Timestamp, VolumeSize,
};
use tempfile::TempDir;

const SECOND: i64 = 1_000_000_000;
const LIMIT: Duration = Duration::from_secs(10);

/// A store with a volume that has three points, of which each fills the first block with its
/// number.
struct Rig {
    folder: TempDir,
    volume: VolumeId,
    points: Vec<PointId>,
}

fn root(n: u8) -> Root {
    Root::from_bytes([n; 32])
}

/// An epoch that fills the first block, and a point.
fn epoch(writer: &mut VolumeWriter, n: u8, consistency: Consistency) -> PointId {
    let time = Timestamp::from_nanos(i64::from(n) * SECOND);
    let mut log = writer.begin_epoch().unwrap();
    let extent = Extent::new(ByteOffset::ZERO, ByteLen::new(4096)).unwrap();
    let data = vec![n; 4096];
    log.append(
        &Record::Write {
            extent,
            data: &data,
        },
        time,
    )
    .unwrap();
    let tag = Tag {
        id: PointId::at(time).unwrap(),
        time,
        consistency,
        label: String::new(),
        group: None,
        root: Some(root(n)),
    };
    log.append(&Record::Tag(tag), time).unwrap();
    writer.commit(log).unwrap().points[0].id
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(&folder.path().join("store")).unwrap();
        let geometry = Geometry {
            size: VolumeSize::new(1 << 20),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        };
        let volume = store
            .create_volume(VolumeSpec::new("v", geometry).unwrap())
            .unwrap();
        let mut writer = store.volume_writer(volume, None).unwrap();
        writer.begin_baseline().unwrap().finish().unwrap();
        let points = [
            Consistency::Crash,
            Consistency::Application,
            Consistency::Crash,
        ];
        let points = (1..).zip(points).map(|(n, c)| epoch(&mut writer, n, c));
        let points = points.collect();
        Self {
            folder,
            volume,
            points,
        }
    }

    fn store(&self) -> Store {
        Store::open(&self.folder.path().join("store")).unwrap()
    }

    fn failover(&self) -> Failover {
        Failover::new(self.store(), self.volume, None, "b")
    }

    fn state(&self) -> State {
        self.failover().situation().unwrap().state
    }

    /// The first byte of the branch that is in use, or of the drill.
    fn first_byte(&self) -> u8 {
        let situation = self.failover().situation().unwrap();
        let reader = self.store().volume(self.volume, None).unwrap();
        let branch = situation.branch.or(situation.drill).unwrap();
        let mut byte = [0];
        let branch = reader.open_branch(branch).unwrap();
        branch.read_at(ByteOffset::ZERO, &mut byte).unwrap();
        byte[0]
    }

    /// An agent that writes to the volume, and answers questions by `answers`.
    fn source(&self, answers: impl Fn(Ask) -> Option<Answer> + Send + 'static) -> Source {
        let (store, volume) = (self.store(), self.volume);
        let (stop, stopped) = mpsc::channel();
        let mut writer = Some(store.volume_writer(volume, None).unwrap());
        let thread = std::thread::spawn(move || {
            let mut seen = None;
            while stopped.recv_timeout(Duration::from_millis(5)).is_err() {
                let Some(asked) = store.handover(volume).unwrap() else {
                    continue;
                };
                if seen == Some(asked.id) {
                    continue;
                }
                seen = Some(asked.id);
                let Some(answer) = answers(asked.ask) else {
                    continue;
                };
                if !matches!(answer, Answer::Refuses { .. }) {
                    writer = None;
                }
                store.answer_handover(volume, asked.id, answer).unwrap();
            }
            drop(writer);
        });
        Source {
            stop,
            thread: Some(thread),
        }
    }
}

struct Source {
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[test]
fn a_drill_disturbs_nothing_and_leaves_nothing() {
    let rig = Rig::new();
    let (failover, store) = (rig.failover(), rig.store());
    let mut writer = store.volume_writer(rig.volume, None).unwrap();
    let first = Choice::State(PointSelector::Id(rig.points[0]));
    let drill = failover.test(first).unwrap();
    assert_eq!(rig.state(), State::TestFailover);
    assert_eq!(rig.first_byte(), 1);
    let refused = failover.test(Choice::Latest).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::State);
    assert!(refused.to_string().contains("--cleanup"), "{refused}");

    // Replication goes on.
    epoch(&mut writer, 4, Consistency::Crash);
    let reader = store.volume(rig.volume, None).unwrap();
    let held = reader.open_branch(drill).unwrap();
    held.write(ByteOffset::ZERO, &[9; 512]).unwrap();
    assert_eq!(failover.clean_up().unwrap_err().kind(), ErrorKind::Busy);
    drop(held);
    failover.clean_up().unwrap();
    assert_eq!(rig.state(), State::Replicating);
    assert!(reader.branches().unwrap().is_empty());
    assert_eq!(failover.clean_up().unwrap_err().kind(), ErrorKind::State);
    epoch(&mut writer, 5, Consistency::Crash);
    assert_eq!(reader.points().unwrap().len(), 5);
}

#[test]
fn an_unplanned_failover_may_be_changed_until_it_is_committed() {
    let rig = Rig::new();
    let failover = rig.failover();
    assert_eq!(failover.commit().unwrap_err().kind(), ErrorKind::State);
    failover.test(Choice::LatestProcessed).unwrap();
    let first = failover
        .unplanned(Choice::LatestProcessed, Shutdown::Skip)
        .unwrap();
    assert_eq!(first.promotion.point, rig.points[2]);
    assert!(first.promotion.loss.seconds().abs() < 1e-9);
    assert_eq!((rig.state(), rig.first_byte()), (State::FailedOver, 3));
    let situation = failover.situation().unwrap();
    assert_eq!(
        (situation.drill, situation.branch),
        (None, Some(first.branch))
    );

    let second = failover.change_point(Choice::LatestApplication).unwrap();
    assert_eq!(second.promotion.point, rig.points[1]);
    assert_eq!(second.promotion.loss.seconds(), 1.0);
    assert!(second.promotion.loss.bytes.get() > 0);
    assert_ne!(first.branch, second.branch);
    assert_eq!(rig.first_byte(), 2);
    let reader = rig.store().volume(rig.volume, None).unwrap();
    assert_eq!(reader.branches().unwrap().len(), 1);

    assert_eq!(failover.points_to_drop().unwrap(), 2);
    assert_eq!(failover.commit().unwrap(), 2);
    assert_eq!((rig.state(), rig.first_byte()), (State::Committed, 2));
    let refused = failover.change_point(Choice::Latest).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::State);
    assert_eq!(reader.points().unwrap().len(), 1);
}

#[test]
fn a_source_that_lives_lets_go_and_one_that_does_not_answer_keeps_the_lock() {
    let rig = Rig::new();
    {
        let _source = rig.source(|_| None);
        let begun = Instant::now();
        let refused = rig.failover().unplanned(Choice::Latest, Shutdown::Skip);
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Busy);
        assert!(begun.elapsed() < Duration::from_secs(60));
        assert_eq!(rig.state(), State::Replicating);
        assert_eq!(rig.store().handover(rig.volume).unwrap(), None);
    }
    let _source = rig.source(|asked| match asked {
        Ask::LetGo => Some(Answer::LetsGo),
        Ask::Rest => Some(Answer::Refuses {
            why: "it is in use".to_owned(),
        }),
    });
    let failed_over = rig
        .failover()
        .unplanned(Choice::Latest, Shutdown::Try(LIMIT))
        .unwrap();
    assert!(failed_over.source.unwrap().contains("it is in use"));
    assert_eq!(failed_over.promotion.how, How::Unplanned);
    assert_eq!(rig.state(), State::FailedOver);
    assert_eq!(rig.store().handover(rig.volume).unwrap(), None);
}

#[test]
fn a_planned_failover_loses_nothing_or_does_nothing() {
    let rig = Rig::new();
    let failover = rig.failover();
    let newest = rig.points[2];
    let rests = move |n| {
        move |_| {
            Some(Answer::Rests {
                point: newest,
                root: Some(root(n)),
            })
        }
    };
    {
        let _source = rig.source(|_| {
            Some(Answer::Refuses {
                why: "/mnt is mounted".to_owned(),
            })
        });
        let refused = failover.planned(LIMIT).unwrap_err();
        assert!(refused.to_string().contains("/mnt is mounted"), "{refused}");
    }
    {
        let _source = rig.source(rests(9));
        let refused = failover.planned(LIMIT).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Damaged, "{refused}");
    }
    {
        let _source = rig.source(|_| None);
        let refused = failover.planned(Duration::from_millis(200)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::TimedOut);
    }
    {
        // It says that it rests at a point, and has gone on since.
        let older = rig.points[1];
        let _source = rig.source(move |_| {
            Some(Answer::Rests {
                point: older,
                root: Some(root(2)),
            })
        });
        let refused = failover.planned(LIMIT).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::State);
        assert!(refused.to_string().contains("gone on"), "{refused}");
    }
    assert_eq!(rig.state(), State::Replicating);
    assert_eq!(rig.store().handover(rig.volume).unwrap(), None);

    let _source = rig.source(rests(3));
    let planned = failover.planned(LIMIT).unwrap();
    assert_eq!(planned.promotion.how, How::Planned);
    assert_eq!(planned.promotion.point, newest);
    assert!(planned.promotion.loss.seconds().abs() < 1e-9);
    assert_eq!((rig.state(), rig.first_byte()), (State::FailedOver, 3));
}

#[test]
fn what_a_killed_process_left_is_finished() {
    let rig = Rig::new();
    let (failover, store) = (rig.failover(), rig.store());
    assert_eq!(failover.finish().unwrap(), None);
    // Killed behind the promotion: there is no branch yet, and a drill still.
    let drill = failover.test(Choice::LatestProcessed).unwrap();
    let promote = |point| {
        let mut writer = store.volume_writer(rig.volume, None).unwrap();
        writer.promote(point, How::Unplanned, "b").unwrap();
    };
    promote(rig.points[0]);
    let branch = failover.finish().unwrap().unwrap();
    assert_ne!(branch, drill);
    assert_eq!(failover.finish().unwrap(), Some(branch));
    assert_eq!(rig.first_byte(), 1);
    // Killed behind the promotion of another point: the branch of the first goes.
    promote(rig.points[1]);
    let second = failover.finish().unwrap().unwrap();
    assert_ne!(second, branch);
    assert_eq!(rig.first_byte(), 2);
    let reader = store.volume(rig.volume, None).unwrap();
    assert_eq!(reader.branches().unwrap().len(), 1);
    let catalogue = reader.catalogue().unwrap();
    assert!(matches!(catalogue.recovery, Recovery::FailedOver(_)));
}
