//! Another side is to take a volume over, and asks its primary by way of the store.

use std::path::Path;
use std::time::Duration;

use libreplica::id::{PointId, VolumeId};
use libreplica::store::{Answer, Ask, Asking, How, PointSelector, Store};

use crate::inline::{protect, qemu_io};
use crate::stage::{
    Daemon, LoopDevice, MIB, Mount, Place, Volume, assert_restores, run, until, write_random,
};

const LIMIT: Duration = Duration::from_secs(60);

/// What the primary of the one volume in `store` says.
fn ask(store: &Store, what: Ask) -> (VolumeId, Answer, Asking) {
    let volume = store.volumes().unwrap()[0].id;
    let asking = store.ask_handover(volume, what, LIMIT, "b").unwrap();
    let answer = until("an answer", LIMIT, || {
        let id = asking.handover().id;
        store.handover_answer(volume, id).unwrap()
    });
    (volume, answer, asking)
}

fn spec<'a>(disk: &'a LoopDevice, store: &'a Path) -> Volume<'a> {
    Volume {
        device: disk.path(),
        store,
        name: "v",
        options: &["--every", "1h"],
    }
}

fn is_read_only(device: &Path) -> bool {
    run("blockdev", ["--getro", device.to_str().unwrap()]).trim() == "1"
}

/// Holds the volume's lock for a moment, as only its one writer can.
fn can_be_locked(store: &Store, volume: VolumeId) -> bool {
    store.volume_writer(volume, None).is_ok()
}

fn rests(answer: Answer) -> PointId {
    match answer {
        Answer::Rests { point, root } => {
            assert!(root.is_some());
            point
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_source_at_rest_has_shipped_everything_and_goes_on_if_nothing_comes_of_it() {
    let place = Place::new();
    let folder = place.folder("store");
    let disk = LoopDevice::of_its_own(&place, "disk.img", 32 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&spec(&disk, &folder));
    write_random(disk.path(), 3, 2);

    let store = Store::open(&folder).unwrap();
    let (volume, answer, asking) = ask(&store, Ask::Rest);
    let point = rests(answer);
    assert!(is_read_only(disk.path()));
    assert!(can_be_locked(&store, volume));
    assert_restores(&place, &folder, "v", &point.to_string(), disk.path());
    daemon.until("it keeps still", "v", |v| {
        v["state_cause"]
            .as_str()
            .is_some_and(|why| why.contains("`b`"))
    });

    drop(asking);
    daemon.until("it goes on", "v", |v| v["state"] == "replicating");
    assert!(!is_read_only(disk.path()));
    write_random(disk.path(), 9, 1);
    let point = daemon.point("v", &[]);
    assert_restores(&place, &folder, "v", &point, disk.path());
    daemon.assert_no_resync("v");
}

#[test]
fn a_source_at_rest_stays_so_while_its_store_cannot_be_asked() {
    let place = Place::new();
    let folder = place.folder("store");
    let disk = LoopDevice::of_its_own(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    daemon.protect(&spec(&disk, &folder));
    let store = Store::open(&folder).unwrap();
    let (_, answer, asking) = ask(&store, Ask::Rest);
    rests(answer);
    // Whether it was promoted meanwhile, nobody can say.
    let away = place.at("away");
    std::fs::rename(&folder, &away).unwrap();
    drop(asking);
    std::thread::sleep(Duration::from_secs(4));
    assert!(is_read_only(disk.path()));
    std::fs::rename(&away, &folder).unwrap();
    daemon.until("it goes on", "v", |v| v["state"] == "replicating");
    assert!(!is_read_only(disk.path()));
}

#[test]
fn a_device_in_use_is_not_taken_from_its_users() {
    let place = Place::new();
    let folder = place.folder("store");
    let disk = LoopDevice::of_its_own(&place, "disk.img", 64 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    let mut daemon = Daemon::start(&place);
    daemon.protect(&spec(&disk, &folder));
    let store = Store::open(&folder).unwrap();
    let (_, answer, asking) = ask(&store, Ask::Rest);
    let Answer::Refuses { why } = answer else {
        panic!("{answer:?}");
    };
    assert!(why.contains("is mounted"), "{why}");
    // It goes on, with the question still standing.
    std::fs::write(mount.at("file"), b"more").unwrap();
    daemon.point("v", &[]);
    drop(asking);
    mount.unmount();
    let (_, answer, _asking) = ask(&store, Ask::Rest);
    let point = rests(answer).to_string();
    assert_restores(&place, &folder, "v", &point, disk.path());
}

#[test]
fn a_served_device_is_served_again_if_nothing_comes_of_it() {
    let place = Place::new();
    let folder = place.folder("store");
    let disk = LoopDevice::of_its_own(&place, "disk.img", 32 * MIB);
    let mut daemon = Daemon::start(&place);
    let uri = protect(&mut daemon, &disk, &folder, &["--every", "1h"]);
    qemu_io(&uri, &["write -P 7 1M 64k"]);
    let store = Store::open(&folder).unwrap();
    let (_, answer, asking) = ask(&store, Ask::Rest);
    let point = rests(answer).to_string();
    let refused = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read 0 4k", &uri])
        .output()
        .unwrap();
    assert!(!refused.status.success(), "somebody is still served");
    assert_restores(&place, &folder, "v", &point, disk.path());

    drop(asking);
    daemon.until("it is served", "v", |v| v["state"] == "replicating");
    qemu_io(&uri, &["read -P 7 1M 64k", "write -P 8 2M 64k"]);
    let point = daemon.point("v", &[]);
    assert_restores(&place, &folder, "v", &point, disk.path());
    daemon.assert_no_resync("v");
}

#[test]
fn an_old_primary_is_refused_and_told_what_to_do() {
    let place = Place::new();
    let folder = place.folder("store");
    let disk = LoopDevice::of_its_own(&place, "disk.img", 32 * MIB);
    let mut daemon = Daemon::start(&place);
    let uri = protect(&mut daemon, &disk, &folder, &["--every", "1h"]);
    let store = Store::open(&folder).unwrap();
    let (volume, answer, asking) = ask(&store, Ask::LetGo);
    assert_eq!(answer, Answer::LetsGo);
    let reader = store.volume(volume, None).unwrap();
    let latest = reader.point(PointSelector::Latest).unwrap();
    let mut writer = store.volume_writer(volume, None).unwrap();
    writer.promote(latest.id, How::Unplanned, "b").unwrap();
    drop(writer);
    drop(asking);

    let told = |daemon: &Daemon| {
        let status = daemon.until("it is fenced", "v", |v| v["state"] == "failed_over");
        let why = status["state_cause"].as_str().unwrap().to_owned();
        for words in ["generation 2", "`b` took over", "replica failback"] {
            assert!(why.contains(words), "{why}");
        }
    };
    told(&daemon);
    // Its users have not gone away; what they write stays on the device.
    qemu_io(&uri, &["write -P 9 1M 64k"]);
    daemon.replica(&["point", "v"]).fails(1, &["generation 2"]);
    let before = reader.catalogue().unwrap();

    // It comes back, and serves nobody.
    daemon.kill();
    daemon.start_again();
    told(&daemon);
    let refused = std::process::Command::new("qemu-io")
        .args(["-f", "raw", "-c", "read 0 4k", &uri])
        .output()
        .unwrap();
    assert!(
        !refused.status.success(),
        "an old primary serves its device"
    );
    let after = reader.catalogue().unwrap();
    assert_eq!((after.logs, after.points), (before.logs, before.points));

    // Nor is it protected into that image by another name for the same thing.
    daemon.unprotect("v");
    let device = disk.path().to_str().unwrap();
    let to = folder.to_str().unwrap();
    let again = ["protect", device, "--to", to, "--name", "v", "--force"];
    daemon
        .replica(&again)
        .fails(1, &["in use in place of the source"]);
}
