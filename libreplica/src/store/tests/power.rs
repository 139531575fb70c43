//! Crashes at every step. A history is recorded step by step; then, for each step, the folder is
//! rebuilt as a crash just before it could leave it, and opened: it must hold what the last
//! acknowledged call left, or what the call in progress would have, and go on from there. The same
//! once more with a real process and a real SIGKILL.

use std::path::Path;
use std::process::{Command, Stdio};

use hrl_format::VolumeKey;
use hrl_format::units::Epoch;

use super::Scratch;
use super::crash::{self, CHILD_PATH, KILL_AT, Loss};
use super::model::{History, Known, SHORT, same};
use super::random::Random;
use super::tiers::Branch;
use crate::error::ErrorKind;
use crate::store::{FoldStep, PointReader, Store, VolumeWriter};

/// With which seed.
const CHILD_SEED: &str = "REPLICA_TEST_CHILD_SEED";

/// What a call that returned has made true.
#[derive(Clone, Debug)]
struct Acknowledged {
    /// How many steps were done by then.
    steps: usize,
    epoch: Epoch,
    points: Vec<Known>,
}

fn key_of(seed: u64) -> Option<VolumeKey> {
    (seed % 2 == 1).then(|| VolumeKey::from_bytes([seed as u8; 32]))
}

/// A history with all that the store can do to its folder; `done` is called after each call. Returns
/// the steps of folding.
fn live(path: &Path, seed: u64, mut done: impl FnMut(&History, &VolumeWriter)) -> Vec<FoldStep> {
    let mut steps = Vec::new();
    let mut history = History::begin(path, key_of(seed), seed);
    history.log_bytes = SHORT;
    let mut writer = history.writer();
    done(&history, &writer);
    history.baseline(&mut writer);
    done(&history, &writer);
    let mut held: Option<PointReader> = None;
    let mut branch: Option<Branch> = None;
    for round in 0..10 {
        match round {
            3 => held = history.hold_a_point(),
            4 => branch = history.stand_on_a_point(),
            7 => held = None,
            9 => branch = None,
            _ => {}
        }
        history.epoch(&mut writer);
        done(&history, &writer);
        if round % 4 == 0 && branch.is_none() {
            history.take_back(&mut writer);
            done(&history, &writer);
        }
        if round % 3 == 2 {
            history.retain(&mut writer);
            done(&history, &writer);
            fold(&history, &mut writer, &mut steps, &mut done);
        }
        if round == 5 {
            drop(writer);
            writer = history.writer();
            done(&history, &writer);
        }
    }
    drop((held, branch));
    drop(writer);
    // Without the key, then what that left for the key.
    for open in [History::keeper, History::writer] {
        let mut writer = open(&history);
        history.retain(&mut writer);
        done(&history, &writer);
        fold(&history, &mut writer, &mut steps, &mut done);
    }
    steps
}

fn fold(
    history: &History,
    writer: &mut VolumeWriter,
    steps: &mut Vec<FoldStep>,
    done: &mut impl FnMut(&History, &VolumeWriter),
) {
    loop {
        let step = writer.fold_step().unwrap();
        done(history, writer);
        if step == FoldStep::Nothing {
            return;
        }
        steps.push(step);
    }
}

/// Runs and records the history; what was acknowledged when, and what was folded.
fn recorded(seed: u64) -> (Vec<Acknowledged>, crash::Recorder, Vec<FoldStep>) {
    let scratch = Scratch::in_memory();
    let path = scratch.path().join("store");
    let nothing = Acknowledged {
        steps: 0,
        epoch: Epoch::ZERO,
        points: Vec::new(),
    };
    let mut all = vec![nothing];
    crash::start(&path);
    let steps = live(&path, seed, |history, writer| {
        all.push(Acknowledged {
            steps: crash::steps(),
            epoch: writer.catalogue().last_epoch(),
            points: history.model.points.clone(),
        });
    });
    let folded = steps
        .iter()
        .any(|step| matches!(step, FoldStep::Folded { .. }));
    assert_eq!(key_of(seed).is_none(), folded, "{steps:?}");
    (all, crash::stop(), steps)
}

/// Opens what a crash left. `before` was acknowledged, `after` was not yet, if there is more to come.
fn verify(path: &Path, seed: u64, before: &Acknowledged, after: Option<&Acknowledged>) {
    let store = match Store::open(path) {
        Ok(store) => store,
        Err(e) => {
            assert_eq!((before.steps, e.kind()), (0, ErrorKind::NotFound), "{e}");
            Store::open_or_create(path).unwrap();
            return;
        }
    };
    let volumes = store.volumes().unwrap();
    let Some(entry) = volumes.first() else {
        assert_eq!(before.steps, 0, "the volume was there");
        return;
    };
    // First as a reader finds it, then as the writer leaves it.
    let reader = store.volume(entry.id, key_of(seed)).unwrap();
    let known = expect(&reader.catalogue().unwrap(), before, after);
    check_points(&reader, known);
    let mut writer = store.volume_writer(entry.id, key_of(seed)).unwrap();
    expect(writer.catalogue(), before, after);
    if writer.catalogue().base.is_none() {
        writer.begin_baseline().unwrap().finish().unwrap();
    }
    let epoch = writer.begin_epoch().unwrap();
    writer.commit(epoch).unwrap();
    while writer.fold_step().unwrap() != FoldStep::Nothing {}
    check_points(&reader, known);
    let logs = std::fs::read_dir(writer.folder.logs()).unwrap().count();
    assert_eq!(logs, writer.catalogue().logs.len(), "no file is left over");
    super::levels::no_file_is_left_over(&writer);
}

/// Which of the two states it is; there is no third.
fn expect<'a>(
    catalogue: &crate::store::Catalogue,
    before: &'a Acknowledged,
    after: Option<&'a Acknowledged>,
) -> &'a [Known] {
    let of = |points: &[Known]| {
        points
            .iter()
            .map(|p| (p.time, p.image.len()))
            .collect::<Vec<_>>()
    };
    let found = catalogue
        .points
        .iter()
        .map(|p| (p.time, p.size.get() as usize));
    let found = (catalogue.last_epoch(), found.collect::<Vec<_>>());
    let states = [Some(before), after];
    let state = states
        .into_iter()
        .flatten()
        .find(|s| (s.epoch, of(&s.points)) == found);
    let Some(state) = state else {
        let states = states.map(|state| state.map(|s| (s.steps, s.epoch, of(&s.points))));
        panic!("neither before nor after, {states:?}: {found:?}");
    };
    &state.points
}

fn check_points(reader: &crate::store::VolumeReader, known: &[Known]) {
    for (point, known) in reader.points().unwrap().iter().zip(known) {
        assert_eq!((&point.label, point.root), (&known.label, known.root));
        same(&mut reader.open_point(point.id).unwrap(), &known.image);
    }
}

/// What was acknowledged by step `at`, and what is next.
fn around(all: &[Acknowledged], at: usize) -> (&Acknowledged, Option<&Acknowledged>) {
    let next = all.partition_point(|ack| ack.steps <= at);
    (&all[next - 1], all.get(next))
}

/// How many histories are tried; each takes some ten seconds.
fn cases() -> u64 {
    let cases = std::env::var("REPLICA_CASES").ok();
    cases
        .and_then(|cases| cases.parse().ok())
        .map_or(1, |cases: u64| cases.div_ceil(200))
}

/// Returns what was folded.
fn crash_everywhere(seed: u64) -> Vec<FoldStep> {
    let (all, recorder, steps) = recorded(seed);
    assert!(recorder.len() > 150, "{} steps", recorder.len());
    let mut random = Random::new(seed);
    for at in 0..=recorder.len() {
        let parts = [
            Loss::Contents,
            Loss::Names,
            Loss::Some(random.next()),
            Loss::Some(random.next()),
        ];
        for loss in [Loss::Nothing, Loss::Everything, parts[at % 4]] {
            println!("seed {seed}, crash before step {at}, {loss:?}");
            let scratch = Scratch::in_memory();
            recorder.rebuild(at, loss, scratch.path());
            let (before, after) = around(&all, at);
            verify(scratch.path(), seed, before, after);
        }
    }
    steps
}

#[test]
fn a_plain_volume_survives_a_crash_at_every_step() {
    for case in 1..=cases() {
        crash_everywhere(2 * case);
    }
}

#[test]
fn an_encrypted_volume_survives_a_crash_at_every_step() {
    let steps: Vec<FoldStep> = (1..=cases())
        .flat_map(|case| crash_everywhere(2 * case + 1))
        .collect();
    // Not each history has all of it.
    let has = |is_it: fn(&FoldStep) -> bool| assert!(steps.iter().any(is_it), "{steps:?}");
    has(|step| matches!(step, FoldStep::Merged { .. }));
    has(|step| matches!(step, FoldStep::Compacted { .. }));
}

#[test]
fn a_killed_process_leaves_what_it_had_acknowledged() {
    let seed = 4;
    let (all, recorder, _) = recorded(seed);
    // A prime stride visits every kind of step; all of them are visited above.
    for at in (0..recorder.len()).step_by(11) {
        let scratch = Scratch::in_memory();
        let path = scratch.path().join("store");
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["store::tests::power::child", "--exact", "--test-threads=1"])
            .env(CHILD_PATH, &path)
            .env(CHILD_SEED, seed.to_string())
            .env(KILL_AT, at.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(
            status.signal(),
            Some(libc::SIGKILL),
            "killed before step {at}"
        );
        println!("killed before step {at}");
        let (before, after) = around(&all, at);
        verify(&path, seed, before, after);
    }
}

/// The process that is killed; without its variables, as one test among the others, it does nothing.
#[test]
fn child() {
    let seed = std::env::var(CHILD_SEED)
        .ok()
        .and_then(|seed| seed.parse().ok());
    if let (Some(path), Some(seed)) = (std::env::var_os(CHILD_PATH), seed) {
        live(Path::new(&path), seed, |_, _| {});
    }
}
