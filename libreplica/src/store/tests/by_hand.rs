//! A point comes back with nothing of ours: by a script that was written from docs/store.md. And
//! the examples of that document are true.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use hrl_format::{Compression, VolumeKey};

use super::Scratch;
use super::model::{History, SHORT};
use crate::store::{FoldStep, How, Store};

const DOCUMENT: &str = include_str!("../../../../docs/store.md");
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/store/tests/restore.py");

/// Epochs, dropped points, folded logs, a resize now and then.
fn lived(path: &Path, key: Option<VolumeKey>) -> History {
    let mut history = History::begin(path, key, 31);
    history.log_bytes = SHORT;
    let mut writer = history.writer();
    history.baseline(&mut writer);
    for round in 0..20 {
        if round % 3 == 0 {
            writer.set_compression(Compression::Lz4);
        }
        history.epoch(&mut writer);
        if round % 6 == 5 {
            history.retain(&mut writer);
            while writer.fold_step().unwrap() != FoldStep::Nothing {}
        }
    }
    history
}

#[test]
fn a_script_restores_what_the_document_says() {
    for key in [None, Some([0x5a; 32])] {
        let scratch = Scratch::in_memory();
        let path = scratch.path().join("store");
        let history = lived(&path, key.map(VolumeKey::from_bytes));
        assert!(history.model.points.len() > 2);
        let folder = history.writer().folder.path().to_owned();
        for known in &history.model.points {
            let output = scratch.path().join("restored");
            let mut script = Command::new("/usr/bin/python3");
            script.arg(SCRIPT).arg(&folder);
            script.arg(known.id.to_string()).arg(&output);
            script.args(key.map(|key| key.map(|byte| format!("{byte:02x}")).concat()));
            let done = script.output().unwrap();
            let said = String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "{said}");
            assert!(
                fs::read(&output).unwrap() == known.image,
                "point {}",
                known.id
            );
            fs::remove_file(&output).unwrap();
        }
    }
}
#[test]
fn the_example_is_a_catalogue() {
    let example = DOCUMENT.lines().map(str::trim_start);
    let example: Vec<&str> = example
        .skip_while(|line| !line.starts_with("replica-catalogue 1 33 "))
        .take(2)
        .collect();
    let scratch = Scratch::in_memory();
    let store = Store::create(scratch.path()).unwrap();
    let volume = store
        .path()
        .join("volumes/6e01ef37d6a1760cba5b1d54bf1b1d75");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("catalogue.1"), example.join("\n")).unwrap();
    let id = store.find("vdb").unwrap();
    let points = store.volume(id, None).unwrap().points().unwrap();
    assert_eq!(points[0].label, "before the update");
    let marker = DOCUMENT
        .lines()
        .find_map(|line| line.split_once("replica-store.json "));
    fs::write(
        store.path().join("replica-store.json"),
        marker.unwrap().1.trim(),
    )
    .unwrap();
    assert_ne!(Store::open(store.path()).unwrap().id(), store.id());
}

#[test]
fn every_field_of_a_catalogue_is_in_the_document() {
    for key in [None, Some(VolumeKey::from_bytes([6; 32]))] {
        let scratch = Scratch::in_memory();
        let mut history = lived(&scratch.path().join("store"), key);
        // While somebody reads an older view, logs are listed as retired.
        let mut writer = history.writer();
        let _held = history.hold_a_point();
        let mut steps = 0;
        while writer.catalogue().retired.is_empty() {
            history.epoch(&mut writer);
            history.retain(&mut writer);
            while writer.fold_step().unwrap() != FoldStep::Nothing {}
            steps += 1;
            assert!(steps < 50);
        }
        let newest = writer.catalogue().points.last().unwrap().id;
        writer.promote(newest, How::Unplanned, "b").unwrap();
        let mut fields = BTreeSet::new();
        names(
            &serde_json::to_value(writer.catalogue()).unwrap(),
            &mut fields,
        );
        assert!(fields.len() > 25, "{fields:?}");
        for field in fields {
            assert!(DOCUMENT.contains(&format!("`{field}`")), "{field}");
        }
    }
}

/// The names of all fields.
fn names(json: &serde_json::Value, found: &mut BTreeSet<String>) {
    match json {
        serde_json::Value::Object(object) => {
            for (name, value) in object {
                found.insert(name.clone());
                names(value, found);
            }
        }
        serde_json::Value::Array(items) => items.iter().for_each(|item| names(item, found)),
        _ => {}
    }
}
