//! Tiers over a long time: which points are left, that each is what it was, and how much room
//! all of it takes; what branches hold; and which moments stay.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use hrl_format::id::PointId;
use hrl_format::units::{ByteLen, Epoch};
use hrl_format::{RecordOrder, VolumeKey};

use super::model::{History, extent};
use super::{Scratch, geometry};
use crate::error::ErrorKind;
use crate::store::{FoldStep, Store, VolumeSpec, VolumeWriter};

/// What a log takes besides what it says.
const PAGES: u64 = 24 << 10;
const REGION: u64 = 16 << 10;

/// A folder that says which point it stands on, as a branch's does; gone when dropped.
#[derive(Debug)]
pub(super) struct Branch {
    pub(super) point: PointId,
    folder: PathBuf,
}

impl Drop for Branch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).unwrap();
    }
}

impl History {
    pub(super) fn stand_on_a_point(&mut self) -> Option<Branch> {
        let count = self.model.points.len() as u64;
        let pick = self.random.below(count.max(1)) as usize;
        let point = self.model.points.get(pick)?.id;
        Some(self.stand_on(point, &format!("{{\"version\":1,\"point\":\"{point}\"}}")))
    }

    fn stand_on(&self, point: PointId, says: &str) -> Branch {
        let volume = self
            .store
            .path()
            .join("volumes")
            .join(self.volume.to_string());
        let number = PointId::random().unwrap();
        let folder = volume.join("branches").join(number.to_string());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("branch.json"), says).unwrap();
        Branch { point, folder }
    }
}

fn keys() -> [Option<VolumeKey>; 2] {
    [None, Some(VolumeKey::from_bytes([5; 32]))]
}

fn fold(writer: &mut VolumeWriter) {
    while writer.fold_step().unwrap() != FoldStep::Nothing {}
}

/// A volume of 1 MiB, three quarters of it full.
fn begun(scratch: &Scratch, key: Option<VolumeKey>) -> (History, VolumeWriter) {
    let mut history = History::begin(&scratch.path().join("store"), key, 33);
    let mut spec = VolumeSpec::new("large", geometry(1 << 20)).unwrap();
    spec.key = history.key.as_ref().map(VolumeKey::key_id);
    history.volume = history.store.create_volume(spec).unwrap();
    history.model.image = vec![0; 1 << 20];
    history.log_bytes = ByteLen::new(1 << 20);
    let mut writer = history.writer();
    let mut baseline = writer.begin_baseline().unwrap();
    for region in 0..48 {
        history.write_baseline(&mut baseline, extent(region * REGION, REGION), 1);
    }
    baseline.finish().unwrap();
    (history, writer)
}

/// An epoch of whole regions, with a point; returns the regions.
fn change(history: &mut History, writer: &mut VolumeWriter, regions: u64) -> BTreeSet<u64> {
    let mut epoch = writer.begin_epoch().unwrap();
    let mut changed = BTreeSet::new();
    for _ in 0..regions {
        let (region, byte) = (history.random.below(64), history.random.next() as u8 | 1);
        history.write(&mut epoch, extent(region * REGION, REGION), byte);
        changed.insert(region);
    }
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
    changed
}

/// What base and logs take is at most twice what the base and each kept point say, and what
/// waits for compaction.
fn assert_bounded(
    history: &History,
    writer: &VolumeWriter,
    changed: &BTreeMap<Epoch, BTreeSet<u64>>,
) {
    let catalogue = writer.catalogue();
    let oldest = &history.model.points[0];
    let full = oldest.image.chunks(REGION as usize);
    let mut live = full.filter(|region| region.iter().any(|&b| b != 0)).count() as u64;
    for pair in catalogue.points.windows(2) {
        let between = changed.range(pair[0].epoch.next()..=pair[1].epoch);
        let regions: BTreeSet<u64> = between.flat_map(|(_, regions)| regions).copied().collect();
        live += regions.len() as u64;
    }
    let space = writer.space();
    let takes = space.base.get() + space.logs.get();
    let waiting = catalogue.waiting().bytes.get();
    let allowed = 2 * live * (REGION + 4096) + waiting + PAGES * catalogue.logs.len() as u64;
    assert!(
        takes <= allowed,
        "{takes} bytes, {allowed} allowed: {live} regions, {waiting} wait, {} logs",
        catalogue.logs.len()
    );
    let bound = space.bound.get();
    assert!(
        takes + space.retired.get() <= bound,
        "{takes}, {bound} said"
    );
    let files = fs::read_dir(writer.folder.logs()).unwrap();
    let files: u64 = files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum();
    assert_eq!(files, catalogue.log_bytes().get());
}

#[test]
fn a_long_history_is_thinned_out_and_every_point_is_what_it_was() {
    for key in keys() {
        let scratch = Scratch::in_memory();
        let (mut history, mut writer) = begun(&scratch, key);
        let mut changed = BTreeMap::new();
        for round in 0..150 {
            let regions = change(&mut history, &mut writer, 2);
            changed.insert(writer.catalogue().last_epoch(), regions);
            history.wait(6);
            history.retain_by(&mut writer, "all:60s,60s:400s,300s:1200s");
            fold(&mut writer);
            assert_bounded(&history, &writer, &changed);
            if round % 30 == 17 {
                drop(writer);
                writer = history.writer();
            }
            if round % 10 == 9 {
                history.check();
            }
        }
        // By hand: ten seconds or so a point; a minute of all, six or seven of one a
        // minute, three or four of five minutes behind that.
        let points = writer.catalogue().points.len();
        assert!((14..=22).contains(&points), "{points} points");
        let logs = writer.catalogue().logs.len();
        assert!(logs < 4 * points, "{logs} logs for {points} points");
        let mut buckets = BTreeSet::new();
        let now = history.time().as_nanos();
        for known in &history.model.points {
            let seconds = known.time.as_nanos() / 1_000_000_000;
            if now - known.time.as_nanos() > 60_000_000_000 {
                assert!(buckets.insert(seconds / 60), "two of one minute");
            }
        }
        history.check();
        let report = history.reader().check(&mut |_| {}).unwrap();
        assert!(report.is_sound());
    }
}

#[test]
fn a_policy_that_becomes_stricter_drops_hundreds_at_once() {
    let scratch = Scratch::in_memory();
    let (mut history, mut writer) = begun(&scratch, None);
    for _ in 0..300 {
        change(&mut history, &mut writer, 1);
    }
    let held = history.model.points[7].clone();
    let open = history.reader().open_point(held.id).unwrap();
    let leased = history.retain_by(&mut writer, "#2");
    assert_eq!(leased, [held.id]);
    assert_eq!(writer.catalogue().points.len(), 3);
    fold(&mut writer);
    history.check();
    let leases = fs::read_dir(writer.folder.leases()).unwrap().count();
    assert!(leases <= 3 + 2, "{leases} lease files");
    drop(open);
}

#[test]
fn a_point_that_a_branch_stands_on_stays_until_it_is_discarded() {
    for key in keys() {
        let scratch = Scratch::in_memory();
        let (mut history, mut writer) = begun(&scratch, key);
        for _ in 0..6 {
            change(&mut history, &mut writer, 2);
        }
        let second = history.model.points[1].id;
        let says = format!("{{\"point\":\"{second}\",\"more\":[1,{{}}]}}");
        let branch = history.stand_on(second, &says);
        assert_eq!(history.retain_by(&mut writer, "#1"), [second]);
        assert_eq!(writer.catalogue().points.len(), 2);
        assert_eq!(writer.leased_points().unwrap(), [second]);
        let busy = writer.drop_point(second).unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy);
        assert!(busy.to_string().contains("branches"), "{busy}");
        let held = &writer.space().holders;
        assert!(
            held.iter().any(|held| held.point == Some(second)),
            "{held:?}"
        );
        fold(&mut writer);
        // Also for another process, and after a restart.
        drop(writer);
        writer = history.writer();
        fold(&mut writer);
        history.check();
        drop(branch);
        assert_eq!(history.retain_by(&mut writer, "#1"), []);
        fold(&mut writer);
        assert_eq!(writer.catalogue().points.len(), 1);
        assert!(writer.space().holders.is_empty());
        history.check();
    }
}

#[test]
fn a_branch_that_cannot_be_read_holds_everything_and_says_so() {
    let scratch = Scratch::in_memory();
    let (mut history, mut writer) = begun(&scratch, None);
    for _ in 0..4 {
        change(&mut history, &mut writer, 2);
    }
    let first = history.model.points[0].id;
    for says in [
        "",
        "{",
        "[]",
        "{\"point\":7}",
        "{\"point\":\"none\"}",
        "{\"at\":\"\"}",
    ] {
        let branch = history.stand_on(first, says);
        let now = history.now();
        let error = writer.retain(&"#1".parse().unwrap(), now).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{says}: {error}");
        let text = error.to_string();
        assert!(
            text.contains("branch.json") && text.contains("none is dropped"),
            "{text}"
        );
        assert_eq!(
            writer.drop_point(first).unwrap_err().kind(),
            ErrorKind::Damaged
        );
        assert_eq!(writer.space().holders.len(), 1);
        history.check();
        drop(branch);
    }
    // One that is being made, or was being removed, holds nothing; nor does what is no folder.
    let branch = history.stand_on(first, "");
    fs::remove_file(branch.folder.join("branch.json")).unwrap();
    fs::write(branch.folder.with_file_name("lock"), "").unwrap();
    assert_eq!(history.retain_by(&mut writer, "#1"), []);
    history.check();
}

#[test]
fn readers_are_named() {
    let scratch = Scratch::in_memory();
    let (mut history, mut writer) = begun(&scratch, None);
    for _ in 0..4 {
        change(&mut history, &mut writer, 4);
    }
    let first = history.model.points[0].id;
    let open = history.reader().open_point(first).unwrap();
    history.retain_by(&mut writer, "#1");
    fold(&mut writer);
    let space = writer.space();
    let me = format!("process {}", std::process::id());
    let by = |point| {
        let mut held = space.holders.iter().filter(move |held| held.point == point);
        held.all(|held| held.by.starts_with(&me)) && space.holders.iter().any(|h| h.point == point)
    };
    assert!(by(Some(first)) && by(None), "{:?}", space.holders);
    assert!(space.retired > ByteLen::ZERO);
    // Whoever has no daemon to ask finds the same.
    let found = history.reader().space().unwrap();
    assert_eq!(
        (found.holders, found.retired),
        (space.holders, space.retired)
    );
    drop(open);
    history.retain_by(&mut writer, "#1");
    fold(&mut writer);
    let space = writer.space();
    assert!(
        space.holders.is_empty() && space.retired == ByteLen::ZERO,
        "{space:?}"
    );
}

/// As long as the tier goes back that keeps all points, every moment can be had, also where
/// the point before it was dropped; not longer.
#[test]
fn moments_stay_as_long_as_every_point_does() {
    for key in keys() {
        let scratch = Scratch::in_memory();
        let (mut history, mut writer) = begun(&scratch, key);
        change(&mut history, &mut writer, 1);
        for _ in 0..25 {
            let mut epoch = writer.begin_epoch_in(RecordOrder::AsCompleted).unwrap();
            for _ in 0..4 {
                history.change(&mut epoch);
                history.remember(&epoch);
            }
            history.point_with_root(&mut epoch);
            writer.commit(epoch).unwrap();
            history.keep_moments(&writer);
            history.retain_by(&mut writer, "all:30s,40s:1000s");
            fold(&mut writer);
        }
        history.check();
        history.check_moments();
        let windows = history.reader().windows().unwrap();
        let [window] = &windows[..] else {
            panic!("{windows:?}");
        };
        let length = window.to.time.as_nanos() - window.from.time.as_nanos();
        let seconds = length / 1_000_000_000;
        assert!((26..=40).contains(&seconds), "{seconds} s of moments");
        assert!(Store::open(history.store.path()).is_ok());
    }
}
