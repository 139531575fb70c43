//! `replica log` on damaged files: what is said, what is kept, and the exit codes.

use std::fs;
use std::path::Path;

use hrl_format::id::VolumeId;
use hrl_format::record::Record;
use hrl_format::units::{ByteLen, ByteOffset, Epoch, Extent, Timestamp, VolumeSize};
use hrl_format::{LogHeader, LogOptions, LogWriter};

use crate::stage::{MIB, replica};

const PAGE: usize = 4096;

/// A sealed log of three frames with one record each, of which one byte is wrong.
fn damaged(path: &Path, at: usize) {
    let volume = VolumeId::random().unwrap();
    let header = LogHeader::new(volume, VolumeSize::new(MIB), Epoch::new(1)).unwrap();
    let options = LogOptions::default();
    let mut writer = LogWriter::create(Vec::new(), header, &options, None).unwrap();
    for n in 0..3 {
        let extent = Extent::new(ByteOffset::new(n * 512), ByteLen::new(512)).unwrap();
        let data = &[7; 512][..];
        let record = Record::Write { extent, data };
        writer.append(&record, Timestamp::now()).unwrap();
        writer.flush().unwrap();
    }
    let (mut file, _) = writer.seal().unwrap();
    file[at] ^= 1;
    fs::write(path, file).unwrap();
}

#[test]
fn one_damaged_frame_is_one_finding() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.hrl");
    damaged(&path, 2 * PAGE - 1);
    let reply = replica(&["log", "check", path.to_str().unwrap(), "--json"]);
    assert_eq!(reply.code, 1, "{reply:?}");
    let report: serde_json::Value = serde_json::from_str(&reply.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 1, "{report}");
    assert_eq!(findings[0]["offset"], PAGE);
    assert_eq!(findings[0]["frame"], 0);
    assert_eq!(
        (&report["frames"], &report["records"]),
        (&2.into(), &2.into())
    );
}

#[test]
fn salvage_says_what_it_does_to_a_sealed_log() {
    let folder = tempfile::tempdir().unwrap();
    let (path, out) = (folder.path().join("a.hrl"), folder.path().join("b.hrl"));
    let salvage = || {
        let args = [
            "log",
            "salvage",
            path.to_str().unwrap(),
            out.to_str().unwrap(),
        ];
        replica(&args)
    };
    damaged(&path, 2 * PAGE - 1);
    salvage().fails(
        1,
        &[path.to_str().unwrap(), "4096", "nothing of it is whole"],
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);

    damaged(&path, 3 * PAGE - 1);
    let reply = salvage();
    assert!(reply.ok().contains("1 frames, 1 records kept"), "{reply:?}");
    for word in ["warning", "sealed", "8192"] {
        assert!(reply.stderr.contains(word), "{reply:?}");
    }
    replica(&["log", "check", out.to_str().unwrap()]).ok();
}
