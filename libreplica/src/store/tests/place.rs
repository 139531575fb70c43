//! Where a store lies: on a filesystem that is full, or read-only; read by somebody who may not
//! write. Mounts need root: without it these tests only say so.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hrl_format::VolumeKey;
use hrl_format::record::Record;
use hrl_format::units::ByteOffset;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::Scratch;
use super::model::{History, SHORT, extent, same};
use super::random::Random;
use crate::error::ErrorKind;
use crate::store::{FoldStep, RestoreOptions, Store, TipReader};

/// A small filesystem in memory.
struct Small {
    scratch: Scratch,
}

impl Small {
    fn new(size: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("not root: nothing is mounted, nothing is tested");
            return None;
        }
        let scratch = Scratch::new();
        let options = format!("size={size}");
        let flags = MsFlags::empty();
        mount(
            Some("tmpfs"),
            scratch.path(),
            Some("tmpfs"),
            flags,
            Some(&*options),
        )
        .unwrap();
        Some(Self { scratch })
    }

    fn store(&self) -> PathBuf {
        self.scratch.path().join("store")
    }

    fn remount(&self, flags: MsFlags) {
        let flags = flags | MsFlags::MS_REMOUNT;
        mount(
            None::<&str>,
            self.scratch.path(),
            None::<&str>,
            flags,
            None::<&str>,
        )
        .unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        umount2(self.scratch.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

/// An epoch that does not compress, with a point.
fn large_epoch(history: &mut History, bytes: u64) -> crate::Result<()> {
    let model = history.model.clone();
    let mut writer = history.writer();
    let mut epoch = writer.begin_epoch()?;
    let mut random = Random::new(bytes);
    let data: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
    let time = history.now();
    let written = epoch.append(
        &Record::Write {
            extent: extent(0, bytes),
            data: &data,
        },
        time,
    );
    let done = written.and_then(|_| {
        history.model.image[..bytes as usize].copy_from_slice(&data);
        history.point_with_root(&mut epoch);
        writer.commit(epoch)
    });
    if done.is_err() {
        history.model = model;
    }
    done.map(|_| ())
}

#[test]
fn a_full_store_says_so_keeps_what_it_has_and_recovers() {
    let Some(small) = Small::new("1m") else {
        return;
    };
    let mut history = History::begin(&small.store(), None, 11);
    let size = history.model.image.len() as u64;
    history.writer().begin_baseline().unwrap().finish().unwrap();
    let ballast = small.scratch.path().join("ballast");
    fs::write(&ballast, vec![1; size as usize]).unwrap();
    let mut epochs = 0;
    let error = loop {
        match large_epoch(&mut history, size) {
            Ok(()) => epochs += 1,
            Err(error) => break error,
        }
    };
    assert!(epochs >= 2, "{epochs} epochs fit");
    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
    assert!(error.to_string().contains("free room"), "{error}");
    history.check();
    // What holds the room is named.
    let oldest = history.model.points[0].clone();
    let held = history.reader().open_point(oldest.id).unwrap();
    let error = large_epoch(&mut history, size).unwrap_err();
    assert!(
        error.to_string().contains(&oldest.id.to_string()),
        "{error}"
    );
    drop(held);
    // What was in the way goes; then it goes on by itself.
    fs::remove_file(&ballast).unwrap();
    history.remove_oldest_and_fold();
    large_epoch(&mut history, size / 2).unwrap();
    history.check();
    assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
}

/// Wherever the room ends: in a log, in the catalogue, in a fold.
#[test]
fn a_disk_that_is_full_at_any_step_costs_nothing() {
    for key in [None, Some(VolumeKey::from_bytes([3; 32]))] {
        let Some(small) = Small::new("6m") else {
            return;
        };
        let mut history = History::begin(&small.store(), key, 17);
        history.log_bytes = SHORT;
        history.baseline(&mut history.writer());
        let ballast = small.scratch.path().join("ballast");
        let (mut failed, mut passed, mut steps) = (0, 0, BTreeSet::new());
        for free in (0..30).cycle().take(120) {
            let filled = fill(&ballast, small.scratch.path(), free * 4096);
            match one_round(&mut history, 20_480) {
                Ok(()) => passed += 1,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Full, "{error}");
                    assert!(error.to_string().contains("free room"), "{error}");
                    let text = error.to_string();
                    steps.extend(text.split(':').next().map(str::to_owned));
                    failed += 1;
                }
            }
            history.check();
            drop(filled);
            // It goes on by itself.
            if free % 10 == 0 {
                one_round(&mut history, 20_480).unwrap();
                assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
                let writer = history.writer();
                let logs = fs::read_dir(writer.folder.logs()).unwrap().count();
                assert_eq!(logs, writer.catalogue().logs.len());
            }
        }
        assert!(
            failed > 20 && passed > 20,
            "{failed} failed, {passed} passed"
        );
        assert!(steps.len() > 1, "{steps:?}");
    }
}

/// An epoch, retention and folding.
fn one_round(history: &mut History, bytes: u64) -> crate::Result<()> {
    large_epoch(history, bytes)?;
    let now = history.now();
    let mut writer = history.writer();
    let retained = writer.retain(&"#3".parse().unwrap(), now)?;
    let points = &mut history.model.points;
    points.retain(|known| !retained.dropped.contains(&known.id));
    while writer.fold_step()? != FoldStep::Nothing {}
    Ok(())
}

/// Leaves so many bytes of a filesystem free, until dropped.
fn fill(path: &Path, filesystem: &Path, free: u64) -> Ballast {
    let stat = nix::sys::statvfs::statvfs(filesystem).unwrap();
    let available = stat.blocks_available() * stat.fragment_size();
    let bytes = available.saturating_sub(free);
    fs::write(path, vec![1; bytes as usize]).unwrap();
    Ballast(path.to_owned())
}

struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}

#[test]
fn the_first_full_copy_that_does_not_fit_leaves_no_base() {
    let Some(small) = Small::new("64k") else {
        return;
    };
    let mut history = History::begin(&small.store(), None, 11);
    let size = history.model.image.len() as u64;
    let mut writer = history.writer();
    let mut baseline = writer.begin_baseline().unwrap();
    let error = baseline
        .write(extent(0, 1).offset(), &vec![1; size as usize])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Full);
    drop(baseline);
    drop(writer);
    small.remount_larger();
    let mut writer = history.writer();
    assert!(writer.catalogue().base.is_none());
    history.baseline(&mut writer);
    history.epoch(&mut writer);
    history.check();
}

impl Small {
    fn remount_larger(&self) {
        let flags = MsFlags::MS_REMOUNT;
        mount(
            None::<&str>,
            self.scratch.path(),
            None::<&str>,
            flags,
            Some("size=2m"),
        )
        .unwrap();
    }
}

impl History {
    fn remove_oldest_and_fold(&mut self) {
        let mut writer = self.writer();
        let now = self.now();
        let retained = writer.retain(&"#1".parse().unwrap(), now).unwrap();
        self.model
            .points
            .retain(|known| !retained.dropped.contains(&known.id));
        while writer.fold_step().unwrap() != FoldStep::Nothing {}
    }
}

#[test]
fn a_first_full_copy_may_be_written_in_any_order() {
    for key in [None, Some(VolumeKey::from_bytes([3; 32]))] {
        let scratch = Scratch::new();
        let mut history = History::begin(&scratch.path().join("store"), key, 1);
        let mut writer = history.writer();
        let mut baseline = writer.begin_baseline().unwrap();
        for (at, len, byte) in [(16, 32, 5), (0, 8, 6), (20, 24, 0), (4, 2, 0), (60, 4, 7)] {
            history.write_baseline(&mut baseline, extent(at << 10, len << 10), byte);
        }
        baseline.zeroes(extent(62 << 10, 1 << 10)).unwrap();
        history.model.image[62 << 10..63 << 10].fill(0);
        baseline.finish().unwrap();
        same_tip(&mut writer.read_tip().unwrap(), &history.model.image);
    }
}

fn same_tip(tip: &mut TipReader, image: &[u8]) {
    let mut bytes = vec![0xee; image.len()];
    tip.read_at(ByteOffset::ZERO, &mut bytes).unwrap();
    assert!(bytes == image);
}

#[test]
fn a_read_only_store_is_read_and_refuses_a_writer() {
    let Some(small) = Small::new("4m") else {
        return;
    };
    let mut history = History::begin(&small.store(), None, 13);
    let mut writer = history.writer();
    history.baseline(&mut writer);
    let mut epoch = writer.begin_epoch().unwrap();
    history.point_with_root(&mut epoch);
    writer.commit(epoch).unwrap();
    drop(writer);
    small.remount(MsFlags::MS_RDONLY);
    history.check();
    assert!(history.reader().check(&mut |_| {}).unwrap().is_sound());
    let scratch = Scratch::new();
    let known = &history.model.points[0];
    let output = scratch.path().join("restored");
    let options = RestoreOptions::default();
    history
        .reader()
        .restore(known.id, &output, &options, &mut |_| {})
        .unwrap();
    assert!(fs::read(&output).unwrap() == known.image);
    let error = history
        .store
        .volume_writer(history.volume, None)
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.errno()),
        (ErrorKind::Io, Some(libc::EROFS))
    );
    let error = Store::create(&small.scratch.path().join("another")).unwrap_err();
    assert_eq!(error.errno(), Some(libc::EROFS));
    small.remount(MsFlags::empty());
    history.epoch(&mut history.writer());
    history.check();
}

/// What [`reader_of_another_user`] reads.
const STORE: &str = "REPLICA_TEST_STORE";

#[test]
fn somebody_without_the_right_to_write_reads_a_point() {
    if !nix::unistd::geteuid().is_root() {
        println!("not root: the other tests show this user's case");
        return;
    }
    let scratch = Scratch::new();
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut history = History::begin(&scratch.path().join("store"), None, 17);
    let mut writer = history.writer();
    history.baseline(&mut writer);
    for _ in 0..3 {
        let mut epoch = writer.begin_epoch().unwrap();
        history.fill(&mut epoch);
        history.point_if_none(&mut epoch);
        writer.commit(epoch).unwrap();
    }
    let image = scratch.path().join("image");
    fs::write(&image, &history.model.points[0].image).unwrap();
    // The test itself may lie where nobody else may look.
    let program = scratch.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let run = || {
        let mut command = Command::new(&program);
        command.args([
            "store::tests::place::reader_of_another_user",
            "--exact",
            "--nocapture",
        ]);
        command
            .env(STORE, history.store.path())
            .current_dir("/")
            .uid(65534)
            .gid(65534);
        command.output().unwrap()
    };
    let denied = run();
    assert!(!denied.status.success(), "volumes are private");
    let volumes = history.store.path().join("volumes");
    fs::set_permissions(volumes, fs::Permissions::from_mode(0o755)).unwrap();
    let read = run();
    assert!(
        read.status.success(),
        "{}",
        String::from_utf8_lossy(&read.stdout)
    );
    // The lease of the other user holds the point.
    let first = history.model.points[0].id;
    let open = history.reader().open_point(first).unwrap();
    let now = history.now();
    let retained = writer.retain(&"#1".parse().unwrap(), now).unwrap();
    assert_eq!(retained.leased, [first]);
    drop(open);
}

/// Run by another user; as one test among the others it does nothing.
#[test]
fn reader_of_another_user() {
    let Some(path) = std::env::var_os(STORE) else {
        return;
    };
    let path = Path::new(&path);
    let store = Store::open(path).unwrap();
    let volume = store.volume(store.find("model").unwrap(), None).unwrap();
    let first = volume.points().unwrap()[0].clone();
    let image = fs::read(path.with_file_name("image")).unwrap();
    same(&mut volume.open_point(first.id).unwrap(), &image);
    assert!(volume.check(&mut |_| {}).unwrap().is_sound());
    let error = store
        .volume_writer(volume.catalogue().unwrap().volume, None)
        .unwrap_err();
    assert_eq!(error.errno(), Some(libc::EACCES), "{error}");
}
