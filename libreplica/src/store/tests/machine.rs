//! A machine's definition and the proofs of points: kept with the volume, without its key, and
//! gone with the points.

use std::fs;
use std::path::Path;

use hrl_format::VolumeKey;

use super::Scratch;
use super::model::{History, extent};
use crate::error::ErrorKind;
use crate::machine::{MachineDefinition, Proof, Verdict};

fn proof(seconds: f64) -> Proof {
    Proof {
        time: "2026-11-22T05:00:00Z".into(),
        verdict: Verdict::Alive,
        seconds,
        machine: "db1".into(),
        waited_for: "console: ready".into(),
        console_bytes: 5,
    }
}

/// A volume with two points.
fn history(folder: &Path, key: Option<VolumeKey>) -> History {
    let mut history = History::begin(&folder.join("store"), key, 5);
    let mut writer = history.writer();
    history.baseline(&mut writer);
    for byte in 1..3 {
        let mut epoch = writer.begin_epoch().unwrap();
        history.write(&mut epoch, extent(byte << 12, 4096), byte as u8);
        history.point_with_root(&mut epoch);
        writer.commit(epoch).unwrap();
    }
    drop(writer);
    history
}

#[test]
fn a_definition_is_there_without_the_key_and_a_damaged_one_is_named() {
    let scratch = Scratch::new();
    let history = history(scratch.path(), Some(VolumeKey::from_bytes([4; 32])));
    let store = crate::store::Store::open(&scratch.path().join("store")).unwrap();
    let volume = store.volume(history.reader().catalogue().unwrap().volume, None);
    let volume = volume.unwrap();
    assert_eq!(volume.machine().unwrap(), None);
    for memory in ["1G", "2G"] {
        let text = format!("name = 'db1'\nmemory = '{memory}'");
        let machine = MachineDefinition::from_toml(&text).unwrap();
        volume.set_machine(&machine).unwrap();
        assert_eq!(volume.machine().unwrap(), Some(machine));
    }
    let path = volume.folder.machine();
    fs::write(&path, "name = 'a b'").unwrap();
    let error = volume.machine().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(
        error.to_string().contains(path.to_str().unwrap()),
        "{error}"
    );
}

#[test]
fn proofs_go_with_their_points() {
    let scratch = Scratch::new();
    let mut history = history(scratch.path(), None);
    let reader = history.reader();
    let [first, second] = [0, 1].map(|number| history.model.points[number].id);
    assert_eq!(reader.proof(first).unwrap(), None);
    for point in [first, second] {
        reader.record_proof(point, &proof(1.0), b"hello").unwrap();
        reader.record_proof(point, &proof(2.5), b"world").unwrap();
        assert_eq!(reader.proof(point).unwrap(), Some(proof(2.5)));
        assert_eq!(reader.proof_console(point).unwrap().unwrap(), b"world");
    }
    let files = || fs::read_dir(reader.folder.proofs()).unwrap().count();
    assert_eq!(files(), 4);
    let mut writer = history.writer();
    let now = history.now();
    writer.retain(&"#1".parse().unwrap(), now).unwrap();
    assert_eq!(files(), 2);
    assert_eq!(reader.proof(first).unwrap(), None);
    let gone = reader.record_proof(first, &proof(1.0), b"").unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);
    drop(writer);
    // What a writer leaves that was killed between the catalogue and the proofs.
    fs::write(reader.folder.proof(first), "{}").unwrap();
    drop(history.writer());
    assert_eq!(files(), 2);
    assert_eq!(reader.proof(second).unwrap(), Some(proof(2.5)));
}
