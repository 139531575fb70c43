//! A spool on a real file system: what is put into it comes back, or an error does.
#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use crate::units::{BlockSize, ByteOffset, Extent, SectorSize, VolumeSize};

fn spec(folder: &Path, key: Option<VolumeKey>) -> SpoolSpec {
    SpoolSpec {
        folder: folder.join("volume"),
        volume: VolumeId::random().unwrap(),
        geometry: Geometry {
            size: VolumeSize::new(1 << 30),
            block: BlockSize::new(4096).unwrap(),
            sector: SectorSize::B512,
        },
        key,
    }
}

fn extent(number: u64, len: u64) -> Extent {
    Extent::new(ByteOffset::new(number * 4096), ByteLen::new(len)).unwrap()
}

/// Change `number`: one write in three sizes, sometimes zeroes or a discard.
fn add(spool: &Spool, numbers: std::ops::Range<u64>) -> Sequence {
    let contents: Vec<Vec<u8>> = numbers
        .clone()
        .map(|n| vec![n as u8; [512, 4096, 65536][n as usize % 3]])
        .collect();
    let changes = numbers.clone().zip(&contents).map(|(n, data)| {
        let extent = extent(n, data.len() as u64);
        let record = match n % 7 {
            5 => Record::Zeroes { extent },
            6 => Record::Discard { extent },
            _ => Record::Write {
                extent,
                data: &data[..],
            },
        };
        (Timestamp::from_nanos(n as i64), record)
    });
    spool.add(Sequence::new(numbers.start), changes).unwrap()
}

fn read(spool: &Spool, from: u64, upto: u64) -> Vec<u64> {
    let mut seen = Vec::new();
    let mut at = Sequence::new(from);
    while at < Sequence::new(upto) {
        at = spool
            .read(at, Sequence::new(upto), |record, time| {
                let n = time.as_nanos() as u64;
                if seen.last() != Some(&n) {
                    seen.push(n);
                }
                match record {
                    Record::Write { extent: at, data } => {
                        assert!((n * 4096..n * 4096 + 65536).contains(&at.offset().get()));
                        assert!(data.iter().all(|byte| *byte == n as u8));
                    }
                    Record::Zeroes { .. } => assert_eq!(n % 7, 5),
                    Record::Discard { .. } => assert_eq!(n % 7, 6),
                    other => panic!("{other:?}"),
                }
                Ok(())
            })
            .unwrap();
    }
    seen
}

fn files(spool: &Spool) -> usize {
    fs::read_dir(spool.folder()).unwrap().count()
}

#[test]
fn what_is_spooled_comes_back_from_any_number_on() {
    let folder = tempfile::tempdir().unwrap();
    let key = VolumeKey::from_file_bytes(&[7; 32]).unwrap();
    for key in [None, Some(key)] {
        let spool = Spool::begin(spec(folder.path(), key)).unwrap();
        assert_eq!(add(&spool, 10..40), Sequence::new(40));
        assert_eq!(add(&spool, 40..41), Sequence::new(41));
        assert_eq!(add(&spool, 41..90), Sequence::new(90));
        for (from, upto) in [(10, 90), (10, 11), (39, 42), (40, 90), (77, 80), (89, 90)] {
            assert_eq!(read(&spool, from, upto), (from..upto).collect::<Vec<_>>());
        }
        let before = spool.bytes();
        spool.remove_before(Sequence::new(39));
        assert_eq!(spool.bytes(), before);
        spool.remove_before(Sequence::new(40));
        assert_eq!(files(&spool), 2);
        assert!(spool.bytes() < before);
        let gone = spool.read(Sequence::new(39), Sequence::new(90), |_, _| Ok(()));
        assert_eq!(gone.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(read(&spool, 50, 90), (50..90).collect::<Vec<_>>());
        spool.remove_before(Sequence::new(90));
        assert_eq!((files(&spool), spool.bytes()), (0, ByteLen::ZERO));
    }
    assert!(!folder.path().join("volume").exists(), "left behind");
}

#[test]
fn a_new_run_begins_with_an_empty_spool_and_leaves_others_alone() {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec(folder.path(), None);
    let killed = Spool::begin(spec.clone()).unwrap();
    add(&killed, 0..5);
    std::mem::forget(killed);
    let other = spec.folder.join("notes.hrl");
    fs::write(&other, "mine").unwrap();
    let spool = Spool::begin(spec).unwrap();
    assert_eq!(files(&spool), 1);
    assert!(
        spool
            .read(Sequence::ZERO, Sequence::new(1), |_, _| Ok(()))
            .is_err()
    );
    drop(spool);
    assert!(other.exists());
}

#[test]
fn damage_is_an_error_and_never_other_data() {
    let folder = tempfile::tempdir().unwrap();
    let spool = Spool::begin(spec(folder.path(), None)).unwrap();
    add(&spool, 0..50);
    let path = spool.folder().join("0000000000000000.hrl");
    let whole = fs::read(&path).unwrap();
    let all = |take: &mut dyn FnMut(&Record<&[u8]>)| {
        spool.read(Sequence::ZERO, Sequence::new(50), |record, _| {
            take(record);
            Ok(())
        })
    };
    let mut records = Vec::new();
    all(&mut |record| records.push(format!("{record:?}"))).unwrap();
    for at in (0..whole.len()).step_by(997) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(&path, &damaged).unwrap();
        let mut seen = Vec::new();
        let done = all(&mut |record| seen.push(format!("{record:?}")));
        // The seal behind the last record is of no interest.
        assert!(done.is_err() || seen == records, "{at}");
        assert!(records.starts_with(&seen), "{at}");
    }
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(all(&mut |_| {}).unwrap_err().kind(), ErrorKind::Damaged);
}
