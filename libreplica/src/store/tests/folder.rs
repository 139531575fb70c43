//! Making, opening, listing and naming; what is refused, and why.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use hrl_format::id::{KeyId, VolumeId};
use hrl_format::units::VolumeSize;

use super::{Scratch, geometry};
use crate::error::ErrorKind;
use crate::store::{Store, VolumeSpec};

fn spec(name: &str) -> VolumeSpec {
    VolumeSpec::new(name, geometry(1 << 20)).unwrap()
}

#[test]
fn a_store_is_made_once_and_found_again() {
    let scratch = Scratch::new();
    let path = scratch.path().join("a/b/store");
    assert_eq!(Store::open(&path).unwrap_err().kind(), ErrorKind::NotFound);
    let store = Store::create(&path).unwrap();
    assert_eq!(Store::open(&path).unwrap().id(), store.id());
    assert_eq!(Store::open_or_create(&path).unwrap().id(), store.id());
    assert_eq!(Store::create(&path).unwrap_err().kind(), ErrorKind::Exists);
    let mode = fs::metadata(path.join("volumes"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o700, "a copy of a disk is private");
}

#[test]
fn a_folder_with_other_things_in_it_is_not_taken() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path().join("lost+found")).unwrap();
    Store::create(scratch.path()).unwrap();
    let other = Scratch::new();
    fs::write(other.path().join("thesis.txt"), "mine").unwrap();
    let error = Store::create(other.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("thesis.txt"), "{error}");
}

#[test]
fn a_link_that_leads_nowhere_is_named() {
    let scratch = Scratch::new();
    let link = scratch.path().join("link");
    std::os::unix::fs::symlink("/nowhere/to/be/found", &link).unwrap();
    for path in [link.clone(), link.join("store")] {
        let said = Store::open_or_create(&path).unwrap_err().to_string();
        for word in [link.to_str().unwrap(), "/nowhere/to/be/found"] {
            assert!(said.contains(word), "{said}");
        }
    }
}

#[test]
fn a_volume_is_taken_back_only_while_it_is_empty() {
    let scratch = Scratch::new();
    let store = Store::create(scratch.path()).unwrap();
    let id = store.create_volume(spec("v")).unwrap();
    let held = store.volume_writer(id, None).unwrap();
    let busy = store.take_back_volume(id).unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::Busy);
    drop(held);
    store.take_back_volume(id).unwrap();
    assert!(!scratch.path().join("volumes").join(id.to_string()).exists());
    let gone = store.take_back_volume(id).unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound);

    let id = store.create_volume(spec("v")).unwrap();
    let mut writer = store.volume_writer(id, None).unwrap();
    writer.begin_baseline().unwrap().finish().unwrap();
    drop(writer);
    let refused = store.take_back_volume(id).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::State);
    assert_eq!(store.find("v").unwrap(), id);
}

#[test]
fn damaged_and_newer_markers_are_told_apart() {
    let scratch = Scratch::new();
    let marker = scratch.path().join("replica-store.json");
    for (content, kind) in [
        ("", ErrorKind::Damaged),
        ("{}", ErrorKind::Damaged),
        (r#"{"format":1,"id":"short"}"#, ErrorKind::Damaged),
        (r#"{"format":2,"id":[]}"#, ErrorKind::Unsupported),
    ] {
        fs::write(&marker, content).unwrap();
        let error = Store::open(scratch.path()).unwrap_err();
        assert_eq!(error.kind(), kind, "{content}: {error}");
    }
}

#[test]
fn volumes_are_found_by_name_and_by_id() {
    let scratch = Scratch::new();
    let store = Store::create(scratch.path()).unwrap();
    let b = store.create_volume(spec("b")).unwrap();
    let a = store.create_volume(spec("a")).unwrap();
    let names: Vec<_> = store.volumes().unwrap().iter().map(|e| e.id).collect();
    assert_eq!(names, [a, b], "listed by name");
    assert_eq!(store.find("a").unwrap(), a);
    assert_eq!(store.find(&b.to_string()).unwrap(), b);
    for absent in ["c", "", "A", &VolumeId::random().unwrap().to_string()] {
        let error = store.find(absent).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{absent}");
    }
}

#[test]
fn an_ambiguous_name_lists_the_ids() {
    let scratch = Scratch::new();
    let store = Store::create(&scratch.path().join("one")).unwrap();
    let other = Store::create(&scratch.path().join("two")).unwrap();
    let first = store.create_volume(spec("sda")).unwrap();
    let second = other.create_volume(spec("sda")).unwrap();
    // Two stores put together by hand.
    let from = other.path().join("volumes").join(second.to_string());
    fs::rename(from, store.path().join("volumes").join(second.to_string())).unwrap();
    let error = store.find("sda").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    for id in [first, second] {
        assert!(error.to_string().contains(&id.to_string()), "{error}");
        assert_eq!(store.find(&id.to_string()).unwrap(), id);
    }
}

#[test]
fn taken_and_impossible_names_are_refused() {
    let scratch = Scratch::new();
    let store = Store::create(scratch.path()).unwrap();
    let id = store.create_volume(spec("sda")).unwrap();
    let error = store.create_volume(spec("sda")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    assert!(error.to_string().contains(&id.to_string()), "{error}");
    let mut same = spec("other");
    same.id = id;
    assert_eq!(
        store.create_volume(same).unwrap_err().kind(),
        ErrorKind::Exists
    );
    let long = "x".repeat(256);
    let id = id.to_string();
    for bad in ["", "a/b", "a\n", " a", "a ", &long, &id] {
        let error = store.create_volume(spec(bad)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad:?}");
    }
    for bytes in [0, 100, u64::MAX - 511] {
        let mut odd = spec("odd");
        odd.geometry.size = VolumeSize::new(bytes);
        let error = store.create_volume(odd).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bytes}");
    }
}

#[test]
fn the_first_catalogue_says_what_was_asked_for() {
    let scratch = Scratch::new();
    let store = Store::create(scratch.path()).unwrap();
    let mut spec = spec("d\u{e9}j\u{e0} \"vu\"");
    spec.key = Some(KeyId::from_bytes([7; 16]));
    let id = store.create_volume(spec.clone()).unwrap();
    let entries = store.volumes().unwrap();
    let catalogue = entries[0].catalogue.as_ref().unwrap();
    assert_eq!(catalogue.volume, id);
    assert_eq!(catalogue.name, spec.name);
    assert_eq!(catalogue.geometry(), spec.geometry);
    assert_eq!(catalogue.key, spec.key);
    assert_eq!(catalogue.generation.generation(), spec.generation);
    assert_eq!(catalogue.last_epoch().get(), 0);
    assert_eq!((catalogue.base, catalogue.head()), (None, None));
}

#[test]
fn a_volumes_folder_under_another_id_is_foreign() {
    let scratch = Scratch::new();
    let store = Store::create(&scratch.path().join("store")).unwrap();
    let spec = VolumeSpec::new("v", geometry(1 << 20)).unwrap();
    let id = store.create_volume(spec).unwrap();
    let other = hrl_format::id::VolumeId::random().unwrap();
    let folder = |id: hrl_format::id::VolumeId| store.path().join("volumes").join(id.to_string());
    std::fs::rename(folder(id), folder(other)).unwrap();
    let error = store.volume_writer(other, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Foreign);
    for part in [id.to_string(), other.to_string(), "name back".to_owned()] {
        assert!(error.to_string().contains(&part), "{error}");
    }
    assert_eq!(
        store.volume(id, None).unwrap_err().kind(),
        ErrorKind::NotFound
    );
    std::fs::rename(folder(other), folder(id)).unwrap();
    store.volume_writer(id, None).unwrap();
}

#[test]
fn a_file_is_not_a_store() {
    let scratch = Scratch::new();
    let file = scratch.path().join("file");
    std::fs::write(&file, "not a folder").unwrap();
    for error in [Store::open(&file), Store::create(&file)] {
        let error = error.unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
    }
}
