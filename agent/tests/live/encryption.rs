//! A store that holds no secret: with a key, the base and every log are sealed, the labels
//! too. Without the key the store gives up which extents changed, and when; with it,
//! everything.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::stage::{Daemon, LoopDevice, MIB, Mount, Place, Volume, check_filesystem, replica, run};

/// Whether any file below `folder` holds `secret`.
fn holds(folder: &Path, secret: &str) -> bool {
    let found = std::process::Command::new("grep")
        .args(["-raqF", secret])
        .arg(folder)
        .status();
    found.unwrap().success()
}

#[test]
fn without_the_key_the_store_gives_up_nothing() {
    let place = Place::new();
    let store = place.folder("store");
    let key = place.at("key");
    fs::write(&key, format!("{}\n", "5a".repeat(32))).unwrap();
    let wrong = place.at("wrong");
    fs::write(&wrong, [7; 32]).unwrap();
    let disk = LoopDevice::new(&place, "disk.img", 100 * MIB);
    let mount = Mount::make("ext4", disk.path(), &place.at("mnt"));
    fs::write(
        mount.at("in-the-base"),
        "the secret of the base\n".repeat(1000),
    )
    .unwrap();
    mount.sync();
    assert!(holds(disk.file(), "the secret of the base"));

    let mut daemon = Daemon::start(&place);
    let options = ["--key-file", key.to_str().unwrap(), "--every", "1h"];
    daemon.protect(&Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    });
    fs::write(mount.at("in-a-log"), "the secret of a log\n".repeat(1000)).unwrap();
    let made = daemon.replica(&["point", "v", "--label", "the secret of a label", "--json"]);
    let made = made.json();
    assert_eq!(
        made["label"], "the secret of a label",
        "the daemon has the key"
    );
    let point = made["id"].as_str().unwrap().to_owned();
    assert!(!holds(&store, "the secret of"));
    let with_key = daemon.replica(&["points", "v", "--json"]).json();
    let listed = with_key["points"]
        .as_array()
        .unwrap()
        .iter()
        .find(|p| p["id"] == *point);
    // What the list adds is known of no point that was just made.
    let mut listed = listed.unwrap().clone();
    let proven = listed.as_object_mut().unwrap().remove("proven");
    assert_eq!((listed, proven), (made.clone(), Some(Value::Null)));
    assert_eq!(made["proof"], "root");
    let untold = replica(&["points", "v", "--store", store.to_str().unwrap(), "--json"]).json();
    let proofs = untold["points"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| &p["proof"]);
    assert!(
        proofs.clone().all(Value::is_null),
        "{untold}: not known without the key"
    );
    // The daemon has the key in its state folder, or is told it again: it goes on.
    daemon.kill();
    daemon.start_again();
    daemon.point("v", &[]);
    daemon.unprotect("v");
    mount.unmount();
    drop(disk);

    let text = store.to_str().unwrap();
    let without_key = replica(&["points", "v", "--store", text]);
    assert!(without_key.ok().contains(&point) && !without_key.ok().contains("secret"));
    replica(&["store", "check", text]).ok();
    replica(&["store", "check", text, "--key-file", key.to_str().unwrap()]).ok();

    replica(&[
        "store",
        "check",
        text,
        "--key-file",
        wrong.to_str().unwrap(),
    ])
    .fails(1, &["key"]);

    let output = place.at("out.img");
    let to = output.to_str().unwrap();
    let restore = [
        "restore", "v", "--point", &point, "--output", to, "--store", text,
    ];
    replica(&restore).fails(1, &["--key-file"]);
    let with =
        |key: &Path| replica(&[&restore[..], &["--key-file", key.to_str().unwrap()]].concat());
    with(&wrong).fails(1, &["key"]);
    assert!(
        !output.exists(),
        "a restore that fails leaves nothing that looks like one"
    );
    with(&key).ok();
    check_filesystem("ext4", &output, &place, |mounted| {
        let text = fs::read_to_string(mounted.join("in-a-log")).unwrap();
        assert_eq!(text, "the secret of a log\n".repeat(1000));
    });
}

#[test]
fn a_store_with_two_keys_is_checked_with_one() {
    let place = Place::new();
    let store = place.folder("store");
    let mut daemon = Daemon::start(&place);
    let disks = ["a", "b"].map(|name| LoopDevice::new(&place, &format!("{name}.img"), 16 * MIB));
    let keys = ["a", "b"].map(|name| place.at(&format!("{name}.key")));
    for (index, name) in ["a", "b"].into_iter().enumerate() {
        fs::write(&keys[index], [index as u8 + 1; 32]).unwrap();
        fs::write(disks[index].path(), name.repeat(1 << 20)).unwrap();
        daemon.protect(&Volume {
            device: disks[index].path(),
            store: &store,
            name,
            options: &["--every", "1h", "--key-file", keys[index].to_str().unwrap()],
        });
    }
    let store = store.to_str().unwrap();
    let check = |options: &[&str]| {
        replica(&[&["store", "check", store], options, &["--json"]].concat()).json()
    };
    let report = check(&["--key-file", keys[0].to_str().unwrap()]);
    let volumes = report["volumes"].as_array().unwrap();
    assert_eq!(
        (&volumes[0]["name"], &volumes[1]["name"]),
        (&"a".into(), &"b".into())
    );
    assert_eq!(volumes[0]["points"][0]["state"], "proved", "{report}");
    assert!(volumes[0]["not_inside"].is_null(), "{report}");
    assert_eq!(volumes[1]["points"][0]["state"], "unread", "{report}");
    assert_eq!(volumes[1]["not_inside"], "it has another key", "{report}");
    for volume in check(&[])["volumes"].as_array().unwrap() {
        assert_eq!(volume["not_inside"], "no --key-file was given");
    }
}

#[test]
fn a_key_file_that_is_none() {
    let place = Place::new();
    let store = place.folder("store");
    let disk = LoopDevice::new(&place, "disk.img", 16 * MIB);
    let mut daemon = Daemon::start(&place);
    let key = place.at("key");
    let text = key.to_str().unwrap();
    let options = ["--key-file", text];
    let volume = Volume {
        device: disk.path(),
        store: &store,
        name: "v",
        options: &options,
    };
    daemon.try_protect(&volume).fails(1, &[text]);
    for bad in ["", "short", &"zz".repeat(32)] {
        fs::write(&key, bad).unwrap();
        daemon.try_protect(&volume).fails(1, &[text]);
    }
    run("losetup", [disk.path()]);
}
