//! Levels in a store: every point reads through them as through its logs alone, whatever becomes
//! of the files; and a log that is not touched is not opened.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hrl_format::VolumeKey;

use super::Scratch;
use super::model::{History, extent, same};
use crate::error::ErrorKind;
use crate::store::levels::{Tile, Tiles};
use crate::store::{FoldStep, PointSelector, Store, VolumeWriter};

/// What is in the folder of the levels is what counts, and nothing else.
pub(super) fn no_file_is_left_over(writer: &VolumeWriter) {
    let names = fs::read_dir(writer.folder.levels()).unwrap();
    let mut found: Vec<String> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.retain(|name| name != "manifest");
    found.sort_unstable();
    let mut listed = writer.levels.names();
    listed.sort_unstable();
    assert_eq!(found, listed);
}

/// A store of so many logs, each with a point, and its levels.
fn store(scratch: &Scratch, key: Option<VolumeKey>, logs: usize) -> History {
    let mut history = History::begin(&scratch.path().join("store"), key, 3);
    let mut writer = history.writer();
    history.baseline(&mut writer);
    for _ in 0..logs {
        let mut epoch = writer.begin_epoch().unwrap();
        history.fill(&mut epoch);
        history.forget();
        history.point_if_none(&mut epoch);
        writer.commit(epoch).unwrap();
    }
    settle(&mut writer);
    history
}

fn settle(writer: &mut VolumeWriter) {
    while writer.fold_step().unwrap() != FoldStep::Nothing {}
}

/// How many tiles of each kind the newest state takes: levels, and single logs.
fn tiles(writer: &VolumeWriter) -> (usize, usize) {
    let tiles = Tiles::choose(&writer.folder, &writer.catalogue().logs).get();
    let levels = tiles.iter().filter(|t| matches!(t, Tile::Level(..)));
    let levels = levels.count();
    (levels, tiles.len() - levels)
}

fn files(writer: &VolumeWriter) -> Vec<PathBuf> {
    let entries = fs::read_dir(writer.folder.levels()).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn points_are_read_through_few_files() {
    for key in [None, Some(VolumeKey::from_bytes([5; 32]))] {
        let scratch = Scratch::in_memory();
        let mut history = store(&scratch, key, 43);
        let mut writer = history.writer();
        let logs = writer.catalogue().logs.len();
        let (levels, singles) = tiles(&writer);
        assert!(logs >= 42 && levels + singles <= 6, "{levels} {singles}");
        history.check();
        // What changed is made anew, the rest stays.
        for _ in 0..5 {
            history.epoch_as_read(&mut writer);
            history.retain(&mut writer);
            settle(&mut writer);
            history.check();
            no_file_is_left_over(&writer);
        }
    }
}

#[test]
fn a_store_without_levels_gets_them() {
    let scratch = Scratch::in_memory();
    let mut history = store(&scratch, None, 20);
    let mut writer = history.writer();
    fs::remove_dir_all(writer.folder.levels()).unwrap();
    assert_eq!(tiles(&writer), (0, 19));
    history.check();
    drop(writer);
    writer = history.writer();
    settle(&mut writer);
    let (levels, singles) = tiles(&writer);
    assert!(levels + singles <= 5, "{levels} {singles}");
    history.check();
}

/// Contents that a file must not have: cut, longer, flipped, another one's.
fn broken(whole: &[u8], other: Vec<u8>) -> Vec<Vec<u8>> {
    let mut broken = vec![Vec::new(), other, [whole, &[0]].concat()];
    for cut in [1, 100, 4095, 4096, whole.len() / 2, whole.len() - 1] {
        broken.push(whole[..cut.min(whole.len() - 1)].to_vec());
    }
    for at in (0..whole.len()).step_by(whole.len() / 40 + 1) {
        let mut flipped = whole.to_vec();
        flipped[at] ^= 1 << (at % 8);
        broken.push(flipped);
    }
    broken
}

#[test]
fn damaged_levels_cost_nothing_but_time() {
    let scratch = Scratch::in_memory();
    let mut history = store(&scratch, None, 16);
    let all = files(&history.writer());
    assert!(all.len() > 8, "{all:?}");
    for path in &all {
        let whole = fs::read(path).unwrap();
        let other = all.iter().find(|other| *other != path).unwrap();
        for bytes in broken(&whole, fs::read(other).unwrap()) {
            fs::write(path, bytes).unwrap();
            history.check();
        }
        fs::remove_file(path).unwrap();
        history.check();
        // The next writer makes it again.
        settle(&mut history.writer());
        assert!(path.exists(), "{}", path.display());
        let again = fs::read(path).unwrap();
        let is_manifest = path.ends_with("manifest");
        assert!(is_manifest || again == whole, "{}", path.display());
    }
    history.check();
}

/// What is in the folder of the levels.
type Folder = Vec<(PathBuf, Vec<u8>)>;

fn contents(writer: &VolumeWriter) -> Folder {
    let read = |path: PathBuf| (path.clone(), fs::read(path).unwrap());
    files(writer).into_iter().map(read).collect()
}

fn is_manifest(file: &&(PathBuf, Vec<u8>)) -> bool {
    file.0.ends_with("manifest")
}

#[test]
fn levels_of_an_earlier_time_are_not_believed() {
    for key in [None, Some(VolumeKey::from_bytes([5; 32]))] {
        let scratch = Scratch::in_memory();
        let mut history = store(&scratch, key, 20);
        let mut writer = history.writer();
        let old = contents(&writer);
        // Logs are folded, merged, and written anew: what is at a place is another run.
        for _ in 0..6 {
            history.epoch_as_read(&mut writer);
            history.retain(&mut writer);
            settle(&mut writer);
        }
        let new = contents(&writer);
        let levels = writer.folder.levels();
        drop(writer);
        let of = |folder: &Folder, manifest: bool| -> Folder {
            let files = folder.iter().filter(|file| is_manifest(file) == manifest);
            files.cloned().collect()
        };
        let mixed = [
            old.clone(),
            [of(&old, true), of(&new, false)].concat(),
            [of(&new, true), of(&old, false)].concat(),
            [of(&old, true), of(&old, false), of(&new, false)].concat(),
        ];
        for folder in mixed {
            fs::remove_dir_all(&levels).unwrap();
            fs::create_dir(&levels).unwrap();
            for (path, bytes) in &folder {
                fs::write(path, bytes).unwrap();
            }
            history.check();
            let mut writer = history.writer();
            settle(&mut writer);
            no_file_is_left_over(&writer);
            history.check();
            let again: Vec<PathBuf> = files(&writer);
            let made: Vec<PathBuf> = new.iter().map(|(path, _)| path.clone()).collect();
            assert_eq!(again, made, "what the chain needs, and nothing else");
        }
    }
}

#[test]
fn a_log_is_opened_when_it_is_touched() {
    let scratch = Scratch::in_memory();
    let mut history = History::begin(&scratch.path().join("store"), None, 1);
    let mut writer = history.writer();
    let mut baseline = writer.begin_baseline().unwrap();
    history.write_baseline(&mut baseline, extent(0, 64 << 10), 0x11);
    baseline.finish().unwrap();
    for k in 0..8 {
        let mut epoch = writer.begin_epoch().unwrap();
        history.write(&mut epoch, extent(k * 4096, 4096), 0x20 + k as u8);
        history.point_with_root(&mut epoch);
        writer.commit(epoch).unwrap();
    }
    settle(&mut writer);
    let known = history.model.points.last().unwrap().clone();
    // The oldest point's log is in the base by now.
    let gone = writer.folder.log(&writer.catalogue().logs[1].name());
    let elsewhere = scratch.path().join("elsewhere");
    fs::rename(&gone, &elsewhere).unwrap();
    let mut open = history.reader().open_point(known.id).unwrap();
    let mut block = [0; 4096];
    for k in [0, 1, 3, 7, 9] {
        open.read_at(extent(k * 4096, 0).offset(), &mut block)
            .unwrap();
        let at = (k * 4096) as usize;
        assert!(block == known.image[at..at + 4096], "block {k}");
    }
    let error = open.read_at(extent(2 * 4096, 0).offset(), &mut block);
    let error = error.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    let name = gone.file_name().unwrap().to_str().unwrap();
    assert!(error.to_string().contains(name), "{error}");
    fs::rename(&elsewhere, &gone).unwrap();
    same(&mut open, &known.image);
}

/// Which store the process of its own opens.
const CHILD_STORE: &str = "REPLICA_TEST_OPEN_STORE";

/// The process of its own; without its variable, as one test among the others, it does nothing. It
/// opens the newest point, and says how many bytes that read and how many files it holds open.
#[test]
fn child() {
    let Some(path) = std::env::var_os(CHILD_STORE) else {
        return;
    };
    let read = || {
        let io = fs::read_to_string("/proc/self/io").unwrap();
        let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
        line.unwrap().parse::<u64>().unwrap()
    };
    let files = || fs::read_dir("/proc/self/fd").unwrap().count();
    let store = Store::open(Path::new(&path)).unwrap();
    let id = store.volumes().unwrap()[0].id;
    let (bytes, open) = (read(), files());
    let volume = store.volume(id, None).unwrap();
    let point = volume.point(PointSelector::Latest).unwrap();
    let point = volume.open_point(point.id).unwrap();
    println!("\n{CHILD_STORE} {} {}", read() - bytes, files() - open);
    drop(point);
}

#[test]
fn opening_reads_few_files_however_many_logs_there_are() {
    let mut all = Vec::new();
    for logs in [24, 96, 384] {
        let scratch = Scratch::in_memory();
        let history = store(&scratch, None, logs);
        let writer = history.writer();
        let folder = writer.folder.clone();
        let (levels, singles) = tiles(&writer);
        let listed = writer.catalogue().logs.len();
        drop(writer);
        assert_eq!(listed, logs - 1, "the oldest is in the base");
        // Not one of the logs is needed for it.
        fs::rename(folder.logs(), scratch.path().join("away")).unwrap();
        let lists = folder
            .catalogues()
            .map(|path| fs::metadata(path).unwrap().len());
        let lists = lists[0] + fs::metadata(folder.level_manifest()).unwrap().len();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["store::tests::levels::child", "--exact", "--nocapture"])
            .env(CHILD_STORE, history.store.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        let said = said.lines().find_map(|line| line.strip_prefix(CHILD_STORE));
        let numbers = said.unwrap().split_whitespace();
        let numbers: Vec<u64> = numbers.map(|word| word.parse().unwrap()).collect();
        let [bytes, files] = numbers[..] else {
            panic!("{numbers:?}");
        };
        // Both copies of the catalogue, its first lines again, and the manifest; one page a level.
        assert!(
            bytes <= 2 * lists + 16 * 4096,
            "{bytes} bytes for {logs} logs, {lists} in lists"
        );
        // Besides: the base, the leases of point and view.
        assert!(
            files <= levels as u64 + 4,
            "{files} files, {levels} levels, {singles} logs"
        );
        all.push(levels);
    }
    assert!(all.iter().all(|&levels| levels <= 10), "{all:?}");
}
