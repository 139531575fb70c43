//! The commands of recovery, killed at every step: at each sync, rename, link and removal that the
//! process makes, one run after the other, it is killed as it enters the call. Then no point is
//! lost that was promised, the same command given again ends what it began, and the store is
//! sound.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use hrl_format::RecordOrder;
use libreplica::failover::State;
use libreplica::geometry::Geometry;
use libreplica::id::{PointId, VolumeId};
use libreplica::policy::Retention;
use libreplica::record::{Consistency, Record, Tag};
use libreplica::replica::{Choice, Failover, Shutdown};
use libreplica::store::{PointSelector, Store, VolumeReader, VolumeSpec, VolumeWriter};
use libreplica::units::{
    BlockSize, ByteLen, ByteOffset, Extent, SectorSize, Timestamp, VolumeSize,
};

use crate::inline::qemu_io;
use crate::stage::{LoopDevice, MIB, Place, replica, run, until};

/// What makes something durable, or takes it away.
const CALLS: [&str; 8] = [
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "unlinkat",
    "rmdir",
    "linkat",
    "mkdir",
];
const BLOCK: u64 = 4096;
const SIZE: u64 = 2 * MIB;

/// A store as a command is to find it; each run gets a copy.
struct Template {
    place: Place,
    volume: VolumeId,
    points: Vec<PointId>,
}

/// A log that fills the first block, then the second; a point ends it.
fn log(writer: &mut VolumeWriter, n: u8) -> PointId {
    let time = |k: i64| Timestamp::from_nanos(i64::from(n) * 1_000_000_000 + k);
    let mut log = writer.begin_epoch_in(RecordOrder::AsCompleted).unwrap();
    for block in 0..2 {
        let offset = ByteOffset::new(block * BLOCK);
        let extent = Extent::new(offset, ByteLen::new(BLOCK)).unwrap();
        let data = &[n; BLOCK as usize][..];
        let write = Record::Write { extent, data };
        log.append(&write, time(block.cast_signed())).unwrap();
    }
    let tag = Tag {
        id: PointId::at(time(2)).unwrap(),
        time: time(2),
        consistency: Consistency::Crash,
        label: String::new(),
        group: None,
        root: None,
    };
    log.append(&Record::Tag(tag), time(2)).unwrap();
    writer.commit(log).unwrap().points[0].id
}

impl Template {
    fn new() -> Self {
        let place = Place::new();
        let store = Store::create(&place.at("store")).unwrap();
        let geometry = Geometry {
            size: VolumeSize::new(SIZE),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        };
        let spec = VolumeSpec::new("v", geometry).unwrap();
        let volume = store.create_volume(spec).unwrap();
        let mut writer = store.volume_writer(volume, None).unwrap();
        writer.begin_baseline().unwrap().finish().unwrap();
        let points = (1..=3).map(|n| log(&mut writer, n)).collect();
        Self {
            place,
            volume,
            points,
        }
    }

    /// Failed over to this state, and written to: the third block.
    fn failed_over(point: impl Fn(&Self) -> PointSelector) -> Self {
        let template = Self::new();
        let failover = template.run(&template.place.at("store")).failover();
        let choice = Choice::State(point(&template));
        let branch = failover.unplanned(choice, Shutdown::Skip).unwrap().branch;
        let reader = failover.store().volume(template.volume, None).unwrap();
        let branch = reader.open_branch(branch).unwrap();
        let third = ByteOffset::new(2 * BLOCK);
        branch.write(third, &[9; BLOCK as usize]).unwrap();
        branch.flush().unwrap();
        drop(branch);
        template
    }

    fn with(self, more: impl FnOnce(&Failover)) -> Self {
        more(&self.run(&self.place.at("store")).failover());
        self
    }

    /// Of a copy of the store.
    fn run<'a>(&'a self, store: &Path) -> Run<'a> {
        Run {
            template: self,
            store: store.to_owned(),
        }
    }

    fn copy(&self) -> Run<'_> {
        let copy = self.place.at("copy");
        let _ = std::fs::remove_dir_all(&copy);
        let from = self.place.at("store");
        run("cp", ["-a", from.to_str().unwrap(), copy.to_str().unwrap()]);
        self.run(&copy)
    }
}

/// A store that a command is run on.
struct Run<'a> {
    template: &'a Template,
    store: PathBuf,
}

impl Run<'_> {
    fn failover(&self) -> Failover {
        let store = Store::open(&self.store).unwrap();
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        Failover::new(store, self.template.volume, None, host.trim())
    }

    fn reader(&self) -> VolumeReader {
        let store = Store::open(&self.store).unwrap();
        store.volume(self.template.volume, None).unwrap()
    }

    fn state(&self) -> State {
        self.failover().situation().unwrap().state
    }

    fn points(&self) -> usize {
        self.reader().points().unwrap().len()
    }

    /// The first bytes of the first three blocks of what is in use.
    fn in_use(&self) -> [u8; 3] {
        let branch = self.failover().situation().unwrap().branch.unwrap();
        let branch = self.reader().open_branch(branch).unwrap();
        [0, 1, 2].map(|block| {
            let mut byte = [0];
            let offset = ByteOffset::new(block * BLOCK);
            branch.read_at(offset, &mut byte).unwrap();
            byte[0]
        })
    }

    /// Gives a command, as often as it takes, and kills it at one of its calls.
    fn killed(&self, command: &[&str], call: &str, number: u32) -> bool {
        let inject = format!("inject={call}:signal=SIGKILL:when={number}");
        let ended = Command::new("strace")
            .args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}")])
            .args(["-e", &inject, env!("CARGO_BIN_EXE_replica")])
            .args(self.arguments(command))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        ended.signal() == Some(9)
    }

    fn arguments(&self, command: &[&str]) -> Vec<String> {
        let all = ["--socket", "/nonexistent/replica.sock"];
        let all = all.iter().chain(command).map(|&text| text.to_owned());
        let store = self.store.to_str().unwrap().to_owned();
        all.chain(["--store".to_owned(), store]).collect()
    }

    fn again(&self, command: &[&str]) {
        let arguments = self.arguments(command);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        // What is done need not be done again, and what is not served here is no matter.
        let reply = replica(&arguments);
        assert!([0, 1].contains(&reply.code), "{reply:?}");
        assert!(!reply.stderr.contains("panicked"), "{reply:?}");
    }

    #[track_caller]
    fn assert_sound(&self) {
        replica(&["store", "check", self.store.to_str().unwrap()]).ok();
    }
}

/// Walks the steps of a command: killed at each, looked at, given again, looked at.
fn walk(
    template: &Template,
    command: &[&str],
    after_kill: impl Fn(&Run<'_>),
    at_the_end: impl Fn(&Run<'_>),
) {
    let mut kills = BTreeSet::new();
    for call in CALLS {
        for number in 1.. {
            assert!(number < 200, "{command:?} has no end of {call}");
            let run = template.copy();
            if !run.killed(command, call, number) {
                at_the_end(&run);
                break;
            }
            kills.insert((call, number));
            after_kill(&run);
            run.again(command);
            at_the_end(&run);
            run.assert_sound();
        }
    }
    // The walk is of something.
    let calls: BTreeSet<&str> = kills.iter().map(|(call, _)| *call).collect();
    assert!(kills.len() >= 4 && calls.len() >= 2, "{kills:?}");
    eprintln!("{command:?}: killed at {} steps", kills.len());
}

/// Nothing is served: all that is done is done in the store.
const NOWHERE: [&str; 2] = ["--nbd", "unix:/nonexistent/socket"];

#[test]
fn failover() {
    let template = Template::new();
    let point = template.points[1].to_string();
    let command = ["failover", "v", "--unplanned", "--point", &point];
    walk(
        &template,
        &[&command[..], &NOWHERE].concat(),
        |run| assert_eq!(run.points(), 3),
        |run| {
            assert_eq!(run.state(), State::FailedOver);
            assert_eq!((run.in_use(), run.points()), ([2, 2, 0], 3));
        },
    );
}

#[test]
fn change_point() {
    let template = Template::failed_over(|t| PointSelector::Id(t.points[1]));
    let point = template.points[2].to_string();
    let command = ["change-point", "v", "--point", &point];
    walk(
        &template,
        &[&command[..], &NOWHERE].concat(),
        |run| {
            assert_eq!((run.state(), run.points()), (State::FailedOver, 3));
            run.failover().finish().unwrap();
            // What was there before, with what was written, or the other.
            assert!([[2, 2, 9], [3, 3, 0]].contains(&run.in_use()));
        },
        |run| assert_eq!((run.in_use(), run.points()), ([3, 3, 0], 3)),
    );
}

#[test]
fn commit() {
    let template = Template::failed_over(|t| PointSelector::Id(t.points[1]));
    walk(
        &template,
        &["commit", "v", "--yes"],
        |run| match run.state() {
            State::FailedOver => assert_eq!(run.points(), 3),
            state => assert_eq!((state, run.points()), (State::Committed, 1)),
        },
        |run| {
            assert_eq!((run.state(), run.points()), (State::Committed, 1));
            assert_eq!(run.in_use(), [2, 2, 9]);
        },
    );
}

#[test]
fn commit_of_a_moment() {
    let template = Template::failed_over(|_| PointSelector::Moment("4:0".parse().unwrap()));
    walk(
        &template,
        &["commit", "v", "--yes"],
        |run| match run.state() {
            State::FailedOver => assert_eq!(run.points(), 3),
            state => assert_eq!((state, run.points()), (State::Committed, 2)),
        },
        |run| {
            // The moment, and the point before it that the branch stands on.
            assert_eq!((run.state(), run.points()), (State::Committed, 2));
            assert_eq!(run.in_use(), [3, 2, 9]);
            let newest = run.reader().point(PointSelector::Latest).unwrap();
            let mut blocks = vec![0; 3 * BLOCK as usize];
            let mut reader = run.reader().open_point(newest.id).unwrap();
            reader.read_at(ByteOffset::ZERO, &mut blocks).unwrap();
            let first = [0, 1, 2].map(|block| blocks[block * BLOCK as usize]);
            assert_eq!(first, [3, 2, 0]);
        },
    );
}

fn committed() -> Template {
    Template::failed_over(|t| PointSelector::Id(t.points[1])).with(|failover| {
        failover.commit().unwrap();
    })
}

#[test]
fn reprotect() {
    walk(
        &committed(),
        &["reprotect", "v"],
        |run| assert_eq!(run.points(), 1),
        |run| {
            assert_eq!((run.state(), run.points()), (State::Reversing, 1));
            assert_eq!(run.in_use(), [2, 2, 9]);
        },
    );
}

#[test]
fn failback() {
    let template = committed().with(|failover| {
        let retain: Retention = "all:2h".parse().unwrap();
        failover
            .reprotect(Duration::from_secs(3600), &retain)
            .unwrap();
    });
    let disk = LoopDevice::of_its_own(&template.place, "disk.img", SIZE);
    let device = disk.path().to_str().unwrap();
    let command = ["failback", "v", "--device", device, "--force"];
    let mut kills = 0;
    for call in ["fsync", "fdatasync", "rename", "unlink"] {
        for number in 1.. {
            std::fs::write(disk.path(), vec![7; SIZE as usize]).unwrap();
            let run = template.copy();
            let mut other = Other::serve(&run);
            let killed = run.killed(&command, call, number);
            if killed {
                kills += 1;
                // Whoever goes on, goes on with everything.
                if run.state() == State::Reversing {
                    other.write_when_served();
                }
                run.again(&command);
            }
            other.end();
            assert_eq!(run.state(), State::Replicating, "{call} {number}");
            let image = std::fs::read(disk.path()).unwrap();
            let blocks = [0, 1, 2].map(|block| image[block * BLOCK as usize]);
            assert_eq!(blocks, [2, 2, 9], "{call} {number}");
            let written = if other.has_written { 8 } else { 0 };
            assert_eq!(image[3 * BLOCK as usize], written, "{call} {number}");
            run.assert_sound();
            if !killed {
                break;
            }
        }
    }
    assert!(kills >= 6, "{kills}");
}

/// Who serves what the volume was failed over to.
struct Other {
    child: std::process::Child,
    uri: String,
    has_written: bool,
}

impl Other {
    fn serve(run: &Run<'_>) -> Self {
        use std::io::BufRead;
        let branch = run.failover().situation().unwrap().branch.unwrap();
        let (branch, socket) = (branch.to_string(), run.template.place.at("other.sock"));
        let nbd = format!("unix:{}", socket.display());
        let open = ["open", "v", "--branch", &branch, "--nbd", &nbd];
        let mut child = Command::new(env!("CARGO_BIN_EXE_replica"))
            .args(run.arguments(&open))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut uri = String::new();
        let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut uri).unwrap();
        Self {
            child,
            uri: uri.trim_end().to_owned(),
            has_written: false,
        }
    }

    /// It keeps still while a question stands; then it goes on.
    fn write_when_served(&mut self) {
        let info = || Command::new("nbdinfo").args(["--size", &self.uri]).output();
        until("it is served again", Duration::from_secs(60), || {
            info().unwrap().status.success().then_some(())
        });
        qemu_io(&self.uri, &["write -P 8 12k 4k", "flush"]);
        self.has_written = true;
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.end();
    }
}
