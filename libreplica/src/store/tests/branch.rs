//! Branches against a model: what is written to a state is what is read, whatever is sealed, taken up
//! again or done to the volume meanwhile; the point stays what it is; and a crash at any
//! step leaves all that was flushed.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use hrl_format::VolumeKey;
use hrl_format::id::{BranchId, PointId};
use hrl_format::units::{ByteOffset, Timestamp};

use super::Scratch;
use super::crash::{self, Loss};
use super::model::{History, SHORT, cases, extent, same};
use super::random::Random;
use crate::error::ErrorKind;
use crate::store::{
    Branch, BranchPurpose, FoldStep, PieceKind, PointSelector, StateId, Store, VolumeReader,
};

const SECTOR: u64 = 512;

fn key_of(seed: u64) -> Option<VolumeKey> {
    (seed % 2 == 1).then(|| VolumeKey::from_bytes([seed as u8; 32]))
}

/// A store with some epochs, of which some are in order.
fn history(path: &Path, seed: u64) -> History {
    let mut history = History::begin(path, key_of(seed), seed);
    history.log_bytes = SHORT;
    let mut writer = history.writer();
    history.baseline(&mut writer);
    for _ in 0..6 {
        history.epoch(&mut writer);
    }
    history.epoch_as_read(&mut writer);
    history.epoch(&mut writer);
    drop(writer);
    history
}

/// A point or a moment, and what the volume was.
fn some_state(history: &mut History) -> (StateId, Vec<u8>) {
    if let Some((open, image, _)) = history.hold_a_moment()
        && history.random.coin()
    {
        return (open.state().id(), image);
    }
    let pick = history.random.below(history.model.points.len() as u64) as usize;
    let known = &history.model.points[pick];
    (known.id.into(), known.image.clone())
}

fn selector(state: StateId) -> PointSelector {
    match state {
        StateId::Point(id) => PointSelector::Id(id),
        StateId::Moment(moment) => PointSelector::Moment(moment),
    }
}

fn create(reader: &VolumeReader, state: StateId) -> Branch {
    let generation = reader.catalogue().unwrap().next_generation().unwrap();
    let branch = reader.create_branch(selector(state), BranchPurpose::Test, generation);
    branch.unwrap()
}

/// All of the branch is `image`, read at once and told as pieces.
#[track_caller]
fn assert_is(branch: &Branch, image: &[u8]) {
    assert_eq!(branch.info().size.get() as usize, image.len());
    let mut bytes = vec![0xee; image.len()];
    branch.read_at(ByteOffset::ZERO, &mut bytes).unwrap();
    if let Some(at) = bytes.iter().zip(image).position(|(a, b)| a != b) {
        panic!("byte {at} is {} not {}", bytes[at], image[at]);
    }
    let mut at = ByteOffset::ZERO;
    let all = extent(0, image.len() as u64);
    let told = branch.pieces_in(all, &mut |piece| {
        assert_eq!(piece.extent.offset(), at, "no gap, no overlap");
        at = piece.extent.end();
        if piece.kind == PieceKind::Zeroes {
            let (from, to) = (piece.extent.offset().get(), at.get());
            assert!(image[from as usize..to as usize].iter().all(|&b| b == 0));
        }
        ControlFlow::Continue(())
    });
    told.unwrap();
    assert_eq!(at.get() as usize, image.len());
}

/// A random change, to the branch and to `image`.
fn change(branch: &Branch, image: &mut [u8], random: &mut Random) {
    let sectors = image.len() as u64 / SECTOR;
    let start = random.below(sectors);
    let len = (1 + random.below((sectors - start).min(100))) * SECTOR;
    let extent = extent(start * SECTOR, len);
    let range = extent.offset().get() as usize..extent.end().get() as usize;
    match random.below(5) {
        0 => {
            branch.zeroes(extent).unwrap();
            image[range].fill(0);
        }
        1 => {
            branch.discard_extent(extent).unwrap();
            image[range].fill(0);
        }
        _ => {
            image[range.clone()].fill(random.next() as u8);
            branch.write(extent.offset(), &image[range]).unwrap();
        }
    }
}

fn live(seed: u64) {
    let scratch = Scratch::in_memory();
    let mut history = history(&scratch.path().join("store"), seed);
    let (state, mut image) = some_state(&mut history);
    let before = history.reader().branches().unwrap().len();
    let reader = history.reader();
    let mut branch = create(&reader, state);
    let id = branch.info().id;
    assert_is(&branch, &image);
    let (other, other_image) = some_state(&mut history);
    let other = create(&reader, other);
    let mut random = Random::new(!seed);
    let mut writer = history.writer();
    for _ in 0..60 {
        match random.below(16) {
            0 => branch.seal().unwrap(),
            1 => branch.flush().unwrap(),
            2 | 3 => {
                drop(branch);
                branch = reader.open_branch(id).unwrap();
                assert_eq!(branch.info().id, id);
            }
            4 => history.epoch(&mut writer),
            5 => {
                history.retain(&mut writer);
                while writer.fold_step().unwrap() != FoldStep::Nothing {}
            }
            6 => assert_is(&branch, &image),
            _ => change(&branch, &mut image, &mut random),
        }
    }
    assert_is(&branch, &image);
    assert_is(&other, &other_image);
    // One at a time.
    let busy = reader.open_branch(id).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    branch.seal().unwrap();
    check_chain(&branch);
    drop((branch, other));
    let mut listed = reader.branches().unwrap();
    assert_eq!(listed.len(), before + 2);
    assert!(listed.iter().all(|branch| !branch.in_use));
    // With nobody reading, retention goes by what lies in the store.
    let point = listed[0].info.point;
    history.retain(&mut writer);
    while writer.fold_step().unwrap() != FoldStep::Nothing {}
    assert!(writer.catalogue().point(point).is_some());
    let branch = reader.open_branch(id).unwrap();
    assert_is(&branch, &image);
    branch.discard().unwrap();
    listed.retain(|branch| branch.info.id != id);
    assert_eq!(reader.branches().unwrap().len(), 1);
    reader.discard_branch(listed[0].info.id).unwrap();
    assert!(reader.branches().unwrap().is_empty());
    assert_eq!(
        reader.open_branch(id).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    history.check();
}

/// The logs are such that the volume could go on with them.
fn check_chain(branch: &Branch) {
    let (info, logs) = (branch.info(), branch.logs());
    let mut epoch = info.epoch;
    for pair in logs.windows(2) {
        let next = pair[0]
            .header
            .check_followed_by(pair[0].seal.digest, &pair[1].header);
        next.unwrap();
    }
    if let Some(first) = logs.first() {
        let link = first.header.previous.zip(first.header.previous_seal);
        assert_eq!(link, info.follows.map(|link| (link.log, link.seal)));
    }
    for log in &logs {
        epoch = epoch.next();
        assert_eq!(log.header.epochs.first, epoch);
        assert_eq!(log.header.generation, info.generation.generation());
        assert_eq!(log.header.order, hrl_format::RecordOrder::AsCompleted);
        let file = std::fs::File::open(&log.path).unwrap();
        let report = hrl_format::Log::open(file, None);
        // Without the key of an encrypted one it is checked from outside.
        assert!(report.unwrap().check().unwrap().problems.is_empty());
    }
}

#[test]
fn a_branch_is_what_the_model_says() {
    for seed in cases() {
        println!("REPLICA_SEED={seed}");
        live(seed);
    }
}

#[test]
fn a_log_is_sealed_when_much_is_held() {
    let scratch = Scratch::in_memory();
    let mut history = History::begin(&scratch.path().join("store"), None, 2);
    let mut writer = history.writer();
    history.baseline(&mut writer);
    history.epoch_as_read(&mut writer);
    let point = history.model.points[0].clone();
    let branch = create(&history.reader(), point.id.into());
    let len = point.image.len().min(64 << 10);
    for n in 0..(40 << 20) / len {
        branch.write(ByteOffset::ZERO, &vec![n as u8; len]).unwrap();
    }
    assert_eq!(branch.logs().len(), 1);
    let mut bytes = vec![0; len];
    branch.read_at(ByteOffset::ZERO, &mut bytes).unwrap();
    assert_eq!(bytes[len / 2], ((40 << 20) / len - 1) as u8);
}

#[test]
fn an_encrypted_one_needs_the_key_and_shows_nothing() {
    let scratch = Scratch::in_memory();
    let mut history = history(&scratch.path().join("store"), 3);
    let (state, _) = some_state(&mut history);
    let without = history.store.volume(history.volume, None).unwrap();
    let generation = without.catalogue().unwrap().next_generation().unwrap();
    let refused = without.create_branch(selector(state), BranchPurpose::Open, generation);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Key);
    assert!(without.branches().unwrap().is_empty());
    let branch = create(&history.reader(), state);
    branch.write(ByteOffset::ZERO, &[b'x'; 512]).unwrap();
    branch.flush().unwrap();
    let folder = scratch.path().join("store/volumes");
    let found = std::process::Command::new("grep")
        .args(["-rqaF", "xxxxxxxxxxxxxxxx"])
        .arg(folder)
        .status();
    assert_eq!(found.unwrap().code(), Some(1), "in the clear");
}

#[test]
fn damage_is_told_and_nothing_is_removed() {
    let scratch = Scratch::in_memory();
    let mut history = history(&scratch.path().join("store"), 2);
    let (state, mut image) = some_state(&mut history);
    let branch = create(&history.reader(), state);
    let id = branch.info().id;
    let mut random = Random::new(1);
    for _ in 0..3 {
        (0..5).for_each(|_| change(&branch, &mut image, &mut random));
        branch.seal().unwrap();
    }
    let paths: Vec<_> = branch.logs().into_iter().map(|log| log.path).collect();
    drop(branch);
    let reader = history.reader();
    let kind = || reader.open_branch(id).unwrap_err().kind();
    for (n, path) in paths.iter().enumerate() {
        let whole = std::fs::read(path).unwrap();
        std::fs::write(path, &whole[..100]).unwrap();
        assert_eq!(kind(), ErrorKind::Damaged, "log {n} cut");
        let mut flipped = whole.clone();
        flipped[30] ^= 1;
        std::fs::write(path, &flipped).unwrap();
        assert_eq!(kind(), ErrorKind::Damaged, "log {n} flipped");
        std::fs::write(path, &whole).unwrap();
    }
    std::fs::rename(&paths[1], scratch.path().join("away")).unwrap();
    assert_eq!(kind(), ErrorKind::Damaged, "a log is missing");
    std::fs::rename(scratch.path().join("away"), &paths[1]).unwrap();
    assert_is(&reader.open_branch(id).unwrap(), &image);
    let info = paths[0].parent().unwrap().with_file_name("branch.json");
    let text = std::fs::read_to_string(&info).unwrap();
    std::fs::write(&info, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
    assert_eq!(kind(), ErrorKind::Unsupported);
    std::fs::write(&info, "{").unwrap();
    assert_eq!(kind(), ErrorKind::Damaged);
    // Who does not know what it holds drops nothing.
    let newest = history.model.points.last().unwrap().time;
    let policy = "#1".parse().unwrap();
    let later = Timestamp::from_nanos(newest.as_nanos() + 1);
    assert!(history.writer().retain(&policy, later).is_err());
}

/// A branch with one log, of several frames, and sealed; the log's file, and what it came to.
fn sealed_log(history: &mut History) -> (BranchId, PathBuf, Vec<u8>) {
    let (state, mut image) = some_state(history);
    let branch = create(&history.reader(), state);
    let mut random = Random::new(7);
    for _ in 0..4 {
        (0..4).for_each(|_| change(&branch, &mut image, &mut random));
        branch.flush().unwrap();
    }
    branch.seal().unwrap();
    let path = branch.logs()[0].path.clone();
    (branch.info().id, path, image)
}

/// Where the frames of a log end.
fn frames_end(path: &Path) -> usize {
    let file = std::fs::File::open(path).unwrap();
    let log = hrl_format::Log::open(file, None).unwrap();
    log.frames_end().get() as usize
}

#[test]
fn a_frame_that_is_damaged_before_a_seal_is_told_and_stays() {
    for seed in [2, 3] {
        let scratch = Scratch::in_memory();
        let mut history = history(&scratch.path().join("store"), seed);
        let (id, path, image) = sealed_log(&mut history);
        let whole = std::fs::read(&path).unwrap();
        let end = frames_end(&path);
        let reader = history.reader();
        let names = |path: &Path| std::fs::read_dir(path.parent().unwrap()).unwrap().count();
        for at in (4096..end).step_by(1999) {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            std::fs::write(&path, &flipped).unwrap();
            let error = reader.open_branch(id).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "byte {at}: {error}");
            assert!(error.to_string().contains(".hrl"), "{error}");
            assert!(std::fs::read(&path).unwrap() == flipped, "byte {at}");
            assert_eq!(names(&path), 1, "byte {at}");
        }
        // Lost as if it had never reached the medium, which cannot be: it was synced.
        let mut lost = whole.clone();
        lost[end - 4096..end].fill(0);
        std::fs::write(&path, &lost).unwrap();
        let error = reader.open_branch(id).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
        assert!(std::fs::read(&path).unwrap() == lost);
        std::fs::write(&path, &whole).unwrap();
        assert_is(&reader.open_branch(id).unwrap(), &image);
    }
}

#[test]
fn a_seal_that_was_cut_short_costs_nothing() {
    for seed in [2, 3] {
        let scratch = Scratch::in_memory();
        let mut history = history(&scratch.path().join("store"), seed);
        let (id, path, image) = sealed_log(&mut history);
        let whole = std::fs::read(&path).unwrap();
        let end = frames_end(&path);
        let reader = history.reader();
        let mut torn: Vec<Vec<u8>> = Vec::new();
        for page in (end..whole.len()).step_by(4096) {
            torn.push(whole[..page].to_vec());
            torn.push(whole[..page + 77].to_vec());
            // Pages reach the medium in any order.
            let mut lost = whole.clone();
            lost[page..page + 4096].fill(0);
            torn.push(lost);
        }
        assert!(torn.len() >= 9, "lists and a trailer");
        for (n, torn) in torn.iter().enumerate() {
            std::fs::write(&path, torn).unwrap();
            let branch = reader.open_branch(id).unwrap();
            assert_is(&branch, &image);
            check_chain(&branch);
            let logs = branch.logs();
            assert_eq!(logs.len(), 1);
            // A crash before the old one was removed leaves both.
            drop(branch);
            std::fs::write(&path, torn).unwrap();
            let branch = reader.open_branch(id).unwrap();
            assert_is(&branch, &image);
            let left = std::fs::read_dir(path.parent().unwrap()).unwrap();
            assert_eq!(left.count(), 1, "case {n}");
            std::fs::remove_file(&branch.logs()[0].path).unwrap();
        }
    }
}

/// What was flushed by step `steps`, and what was written since.
#[derive(Clone)]
struct Written {
    steps: usize,
    /// The first was flushed; each of the others is one change more.
    images: Vec<Vec<u8>>,
}

/// The history of a branch, step by step: made, written to, sealed and taken up again.
fn recorded(seed: u64, path: &Path) -> (BranchId, PointId, Vec<u8>, Vec<Written>, crash::Recorder) {
    crash::start(path);
    let mut history = history(path, seed);
    let (state, mut image) = some_state(&mut history);
    let reader = history.reader();
    let begin = crash::steps();
    let mut branch = create(&reader, state);
    let (id, point) = (branch.info().id, branch.info().point);
    let known = history.model.points.iter().find(|known| known.id == point);
    let known = known.unwrap().image.clone();
    let mut all = vec![Written {
        steps: begin,
        images: Vec::new(),
    }];
    let mut flushed = |image: &[u8]| {
        all.push(Written {
            steps: crash::steps(),
            images: vec![image.to_vec()],
        });
    };
    flushed(&image);
    let mut random = Random::new(seed);
    let mut since = Vec::new();
    let mut pending: Vec<(usize, Vec<Vec<u8>>)> = Vec::new();
    for n in 1..40 {
        change(&branch, &mut image, &mut random);
        since.push(image.clone());
        match n % 13 {
            4 | 8 => branch.flush().unwrap(),
            10 => branch.seal().unwrap(),
            12 => {
                drop(branch);
                branch = reader.open_branch(id).unwrap();
            }
            _ => continue,
        }
        pending.push((crash::steps(), std::mem::take(&mut since)));
    }
    drop(branch);
    // What came behind a flush belongs to it, until the next.
    for (steps, images) in pending {
        let last = all.last_mut().unwrap();
        last.images.extend(images);
        let flushed = last.images.last().unwrap().clone();
        all.push(Written {
            steps,
            images: vec![flushed],
        });
    }
    all.last_mut().unwrap().images.extend(since);
    (id, point, known, all, crash::stop())
}

/// The branch holds what was flushed, and of what was written since any part, in order.
fn verify(path: &Path, seed: u64, id: BranchId, written: &Written) -> bool {
    let store = Store::open(path).unwrap();
    let volume = store.volumes().unwrap()[0].id;
    let reader = store.volume(volume, key_of(seed)).unwrap();
    let branch = match reader.open_branch(id) {
        Ok(branch) => branch,
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
            assert!(written.images.is_empty(), "it was made: {e}");
            return false;
        }
    };
    let mut bytes = vec![0xee; branch.info().size.get() as usize];
    branch.read_at(ByteOffset::ZERO, &mut bytes).unwrap();
    // A long write is several records: it may be there in part.
    let between = |a: &[u8], b: &[u8]| {
        let mut all = bytes.iter().zip(a.iter().zip(b));
        all.all(|(byte, (a, b))| byte == a || byte == b)
    };
    let images = &written.images;
    let last = images.last().map(|last| (last, last));
    let mut pairs = images
        .windows(2)
        .map(|pair| (&pair[0], &pair[1]))
        .chain(last);
    assert!(
        images.is_empty() || pairs.any(|(a, b)| between(a, b)),
        "flushed bytes are lost"
    );
    // It goes on from there.
    branch.write(ByteOffset::ZERO, &[0xab; 512]).unwrap();
    bytes[..512].fill(0xab);
    drop(branch);
    let branch = reader.open_branch(id).unwrap();
    assert_is(&branch, &bytes);
    check_chain(&branch);
    true
}

fn crash_everywhere(seed: u64) {
    let scratch = Scratch::in_memory();
    let (id, point, image, all, recorder) = recorded(seed, &scratch.path().join("store"));
    let mut random = Random::new(seed);
    let mut there = 0;
    for at in all[0].steps..=recorder.len() {
        let next = all.partition_point(|written| written.steps <= at);
        let written = &all[next - 1];
        for loss in [Loss::Nothing, Loss::Everything, Loss::Some(random.next())] {
            println!("seed {seed}, crash before step {at}, {loss:?}");
            let scratch = Scratch::in_memory();
            recorder.rebuild(at, loss, scratch.path());
            there += usize::from(verify(scratch.path(), seed, id, written));
            let store = Store::open(scratch.path()).unwrap();
            let volume = store.volumes().unwrap()[0].id;
            let reader = store.volume(volume, key_of(seed)).unwrap();
            same(&mut reader.open_point(point).unwrap(), &image);
            // The next that is made takes away what was cut short.
            let generation = reader.catalogue().unwrap().next_generation().unwrap();
            let latest = PointSelector::Latest;
            let made = reader.create_branch(latest, BranchPurpose::Open, generation);
            drop(made.unwrap());
            let folders = std::fs::read_dir(reader.folder.branches()).unwrap();
            let folders = folders.filter(|entry| entry.as_ref().unwrap().path().is_dir());
            assert_eq!(folders.count(), reader.branches().unwrap().len());
        }
    }
    assert!(there > 100, "{there} crashes found the branch");
}

#[test]
fn a_branch_survives_a_crash_at_every_step() {
    crash_everywhere(2);
}

#[test]
fn an_encrypted_branch_survives_a_crash_at_every_step() {
    crash_everywhere(5);
}
