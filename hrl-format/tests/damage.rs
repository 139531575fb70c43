//! What happens to files: bits flip, ends are cut off, parts of one log turn up in another.
//! Each is found; and of a torn log, all that is whole is salvaged.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::{
    Flavour, Model, Timed, VOLUME, borrowed, cases, chain, flavour, forge, header, records, scan,
    write_log,
};
use hrl_format::layout::{FRAME_MAGIC, PAGE, RawFrame, RawHeader, RawRecord};
use hrl_format::record::Record;
use hrl_format::units::VolumeSize;
use hrl_format::{
    Ending, ErrorKind, Log, LogWriter, Proof, Scanner, SealProof, VolumeKey, check, merge, salvage,
};
use proptest::prelude::*;

/// Whether a check says that nothing is wrong.
fn sound(file: &[u8], key: Option<&VolumeKey>) -> bool {
    match check(file, key) {
        Ok(report) => report.is_sound(),
        // A flipped bit may well turn the key's name into another.
        Err(error) => {
            assert!(
                matches!(error.kind(), ErrorKind::KeyWrong | ErrorKind::KeyUnused),
                "{error:?}"
            );
            false
        }
    }
}

/// How a log came to be.
#[derive(Clone, Copy, Debug)]
enum Made {
    Written,
    Merged,
    Salvaged,
}

fn made() -> impl Strategy<Value = Made> {
    prop::sample::select(&[Made::Written, Made::Merged, Made::Salvaged][..])
}

impl Made {
    /// Without the key, so that an encrypted log has provenance unless it was just written.
    fn make(self, records: &[Timed], flavour: Flavour) -> Vec<u8> {
        match self {
            Self::Written => write_log(header(), records, flavour).0,
            Self::Merged => {
                let logs = chain(records, &[records.len() / 2], flavour);
                let keyless: Vec<_> = logs
                    .iter()
                    .map(|log| Log::open(log.source(), None).unwrap())
                    .collect();
                merge(&keyless, Vec::new(), &flavour.options()).unwrap().0
            }
            Self::Salvaged => {
                let (file, _) = write_log(header(), records, flavour);
                salvage(&file[..file.len() - PAGE], Vec::new(), None)
                    .unwrap()
                    .0
            }
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn a_sound_log_is_found_sound(records in records(40), flavour in flavour()) {
        let (file, seal) = write_log(header(), &records, flavour);
        let key = flavour.key();
        let report = check(&file, key.as_ref()).unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.problems);
        prop_assert_eq!(report.frames, u64::from(seal.frames));
        prop_assert_eq!(report.records, seal.records);
        let (with_key, without) = match key {
            None => (Proof::None, Proof::None),
            Some(_) => (Proof::Whole, Proof::Untried),
        };
        prop_assert_eq!(report.proof, with_key);
        let report = check(&file, None).unwrap();
        prop_assert!(report.is_sound(), "{:?}", report.problems);
        prop_assert_eq!(report.proof, without);
    }

    #[test]
    fn any_flipped_bit_is_found(
        records in records(20), flavour in flavour(), made in made(),
        bits in prop::collection::vec(any::<prop::sample::Index>(), 40),
    ) {
        let mut file = made.make(&records, flavour);
        prop_assert!(sound(&file, flavour.key().as_ref()) && sound(&file, None));
        for bit in bits {
            let bit = bit.index(file.len() * 8);
            file[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!sound(&file, flavour.key().as_ref()), "bit {bit} with the key");
            prop_assert!(!sound(&file, None), "bit {bit} without");
            let scanned = hrl_format::Scanner::new(&file[..], None).map(|mut scanner| {
                while scanner.next_frame().unwrap().is_some() {}
                scanner.ending().unwrap().clone()
            });
            prop_assert!(!matches!(scanned, Ok(Ending::Sealed(_))), "bit {bit} by the scanner");
            file[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_flipped_bit_in_a_torn_log_ends_it_before_its_frame(
        records in records(30), flavour in flavour(), bit in any::<prop::sample::Index>(),
    ) {
        let (file, _) = write_log(header(), &records, flavour);
        let starts = frames_of(&file);
        let mut torn = file[..starts[starts.len() - 1]].to_vec();
        let bit = bit.index(torn.len() * 8);
        torn[bit / 8] ^= 1 << (bit % 8);
        let key = flavour.key();
        prop_assert!(!sound(&torn, key.as_ref()));
        let salvaged = salvage(&torn[..], Vec::new(), key.as_ref());
        if bit / 8 < PAGE {
            prop_assert!(salvaged.is_err(), "without its header nothing counts");
            return Ok(());
        }
        let (out, salvaged) = salvaged.unwrap();
        let whole = starts.iter().filter(|&&start| start <= bit / 8).count() - 1;
        prop_assert_eq!(salvaged.cut.get() as usize, starts[whole]);
        let (before, _) = scan(&file[..starts[whole]], key.as_ref());
        let log = Log::open(&out, key.as_ref()).unwrap();
        prop_assert_eq!(Model::by_index(&log), Model::of(VolumeSize::new(VOLUME), &before));
    }

    #[test]
    fn any_cut_is_found_and_what_is_whole_salvaged(
        records in records(30), flavour in flavour(), cut in any::<prop::sample::Index>(),
    ) {
        let (file, _) = write_log(header(), &records, flavour);
        let cut = cut.index(file.len());
        let torn = &file[..cut];
        let key = flavour.key();
        prop_assert!(!sound(torn, key.as_ref()));
        if cut < PAGE {
            let error = salvage(torn, Vec::new(), key.as_ref()).map(|_| ()).unwrap_err();
            prop_assert_eq!(error.kind(), ErrorKind::NotALog);
            return Ok(());
        }
        let opened = Log::open(torn, key.as_ref()).map(|_| ()).map_err(|error| error.kind());
        prop_assert!(matches!(opened, Err(ErrorKind::NotSealed)), "{opened:?}");
        // Frames that end before the cut, and the records in them.
        let starts = frames_of(&file);
        let whole = starts.windows(2).filter(|window| window[1] <= cut).count();
        let (found, ending) = scan(torn, key.as_ref());
        let Ending::Torn { at, .. } = ending else { panic!("{ending:?}") };
        prop_assert_eq!(at.get() as usize, starts[whole]);
        for key in [key.as_ref(), None] {
            let (out, salvaged) = salvage(torn, Vec::new(), key).unwrap();
            prop_assert_eq!(salvaged.cut, at);
            prop_assert_eq!(salvaged.seal.frames as usize, whole);
            prop_assert_eq!(salvaged.header.stands_for.unwrap().seal, None);
            let report = check(&out, flavour.key().as_ref()).unwrap();
            prop_assert!(report.is_sound(), "{:?}", report.problems);
            let log = Log::open(&out, flavour.key().as_ref()).unwrap();
            prop_assert_eq!(Model::by_index(&log), Model::of(VolumeSize::new(VOLUME), &found));
            let proof = match (flavour.key(), key) {
                (Some(_), Some(_)) => SealProof::Proved,
                _ => SealProof::None,
            };
            prop_assert_eq!(log.seal().proof, proof);
        }
    }

    #[test]
    fn frames_put_elsewhere_are_found(
        records in records(40), flavour in flavour(),
        (a, b) in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let (first, _) = write_log(header(), &records, flavour);
        let (second, _) = write_log(header(), &records, flavour);
        let starts = frames_of(&first);
        prop_assume!(starts.len() > 1 && starts == frames_of(&second));
        let pick = |index: prop::sample::Index| index.index(starts.len() - 1);
        let (a, b) = (pick(a), pick(b));
        let frame = |file: &[u8], n: usize| file[starts[n]..starts[n + 1]].to_vec();
        // A splice: a frame of another log in its very place.
        let mut spliced = first.clone();
        spliced[starts[a]..starts[a + 1]].copy_from_slice(&frame(&second, a));
        prop_assert!(!sound(&spliced, None));
        let Ending::Torn { at, cause } = scan_quietly(&spliced) else { panic!("not found") };
        prop_assert_eq!((at.get() as usize, cause.kind()), (starts[a], ErrorKind::Foreign));
        // A replay or a change of order: a frame of this log in the place of another.
        let (one, other) = (frame(&first, a), frame(&first, b));
        if a != b && one.len() == other.len() {
            let mut replayed = first.clone();
            replayed[starts[b]..starts[b + 1]].copy_from_slice(&one);
            prop_assert!(!sound(&replayed, None));
            replayed[starts[a]..starts[a + 1]].copy_from_slice(&other);
            prop_assert!(!sound(&replayed, None));
        }
        // A frame taken out.
        let mut shortened = first.clone();
        shortened.drain(starts[a]..starts[a + 1]);
        prop_assert!(!sound(&shortened, None));
        // Another log's seal behind these frames.
        let mut resealed = first[..starts[starts.len() - 1]].to_vec();
        resealed.extend_from_slice(&second[starts[starts.len() - 1]..]);
        prop_assert!(!sound(&resealed, None));
    }
}

fn scan_quietly(file: &[u8]) -> Ending {
    let mut scanner = hrl_format::Scanner::new(file, None).unwrap();
    while scanner.next_frame().unwrap().is_some() {}
    scanner.ending().unwrap().clone()
}

/// Where each frame begins, and where the last one ends.
fn frames_of(file: &[u8]) -> Vec<usize> {
    let mut scanner = hrl_format::Scanner::new(file, None).unwrap();
    let mut starts = vec![PAGE];
    while let Some(frame) = scanner.next_frame().unwrap() {
        assert!(file[frame.position().get() as usize..].starts_with(&FRAME_MAGIC));
        starts.push(frame.position().get() as usize + frame.span());
    }
    starts
}

#[test]
fn every_byte_counts() {
    let some = some_records();
    for flavour in common::FLAVOURS {
        let (mut file, _) = write_log(header(), &some, flavour);
        for at in 0..file.len() {
            let bit = 1 << (at * 5 % 8);
            file[at] ^= bit;
            assert!(
                !sound(&file, flavour.key().as_ref()),
                "{flavour:?} byte {at}"
            );
            file[at] ^= bit;
        }
        assert!(sound(&file, flavour.key().as_ref()));
    }
}

fn some_records() -> Vec<Timed> {
    let write = Record::Write {
        extent: common::extent(5, 9),
        data: b"nine long".to_vec(),
    };
    let zeroes = Record::Zeroes {
        extent: common::extent(100, 50),
    };
    [write, zeroes]
        .map(|record| (record, Default::default()))
        .into()
}

/// The frames behind a damaged one are judged by themselves.
#[test]
fn one_damaged_frame_is_one_finding() {
    const FRAMES: u64 = 20;
    for flavour in common::FLAVOURS {
        let (options, key) = (flavour.options(), flavour.key());
        let mut begun = header();
        begun.key = key.as_ref().map(VolumeKey::key_id);
        let mut writer = LogWriter::create(Vec::new(), begun, &options, key.as_ref()).unwrap();
        for n in 0..FRAMES {
            let extent = common::extent(VOLUME - 2 * FRAMES + n, 1);
            let write = Record::Write {
                extent,
                data: &b"x"[..],
            };
            let size = VolumeSize::new(VOLUME - n);
            for record in [write, Record::Resize { size }] {
                writer.append(&record, Default::default()).unwrap();
            }
            writer.flush().unwrap();
        }
        let (mut file, seal) = writer.seal().unwrap();
        assert_eq!(u64::from(seal.frames), FRAMES);
        for damaged in [0, 7, FRAMES - 1] {
            let at = (1 + damaged as usize) * PAGE + PAGE - 1;
            file[at] ^= 1;
            let report = check(&file, key.as_ref()).unwrap();
            let [found] = &report.problems[..] else {
                panic!("{flavour:?}: {:?}", report.problems)
            };
            assert_eq!(found.frame().unwrap().get() as u64, damaged);
            assert_eq!(found.offset().unwrap().get(), (1 + damaged) * PAGE as u64);
            assert_eq!(report.frames, FRAMES - 1);
            assert_eq!(report.records, 2 * (FRAMES - 1));
            file[at] ^= 1;
        }
        assert!(sound(&file, key.as_ref()));
    }
}

#[test]
fn another_key_is_refused_by_name() {
    let (mut file, _) = write_log(header(), &some_records(), Flavour::Encrypted);
    let key = Flavour::Encrypted.key().unwrap();
    let other = VolumeKey::from_bytes([1; 32]);
    let refused = [
        Log::open(&file, Some(&other)).map(|_| ()).unwrap_err(),
        Scanner::new(&file[..], Some(&other))
            .map(|_| ())
            .unwrap_err(),
        salvage(&file[..], Vec::new(), Some(&other))
            .map(|_| ())
            .unwrap_err(),
        check(&file, Some(&other)).map(|_| ()).unwrap_err(),
    ];
    for error in refused {
        assert_eq!(error.kind(), ErrorKind::KeyWrong);
        let said = error.to_string();
        assert!(said.contains(&key.key_id().to_string()), "{said}");
        assert!(said.contains(&other.key_id().to_string()), "{said}");
    }
    // A log that lies about its key's name: the cipher tells.
    let name = std::mem::offset_of!(RawHeader, key);
    file[name..name + 16].copy_from_slice(other.key_id().as_bytes());
    forge::mend(&mut file);
    let error = Log::open(&file, Some(&other)).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Forged);
}

#[test]
fn a_frame_that_is_not_whole_resizes_nothing() {
    let flavour = Flavour::Encrypted;
    let resize = Record::Resize {
        size: VolumeSize::new(4096),
    };
    let mut records = some_records();
    records.push((resize, Default::default()));
    let (mut file, _) = write_log(header(), &records, flavour);
    // All checksums agree, but the cipher's proof does not.
    let stored = PAGE + size_of::<RawFrame>() + records.len() * size_of::<RawRecord>();
    file[stored] ^= 1;
    forge::mend(&mut file);
    let mut scanner = Scanner::new(&file[..], flavour.key().as_ref()).unwrap();
    assert!(scanner.next_frame().unwrap().is_none());
    assert_eq!(scanner.volume_size(), VolumeSize::new(VOLUME));
}

#[test]
fn bytes_behind_the_seal_are_found() {
    let (mut file, _) = write_log(header(), &some_records(), Flavour::Plain);
    file.extend_from_slice(&[0; PAGE]);
    assert!(!sound(&file, None));
    assert!(matches!(scan_quietly(&file), Ending::Torn { .. }));
}

#[test]
fn a_sealed_log_needs_no_salvage() {
    let (file, _) = write_log(header(), &some_records(), Flavour::Plain);
    let error = salvage(&file[..], Vec::new(), None)
        .map(|_| ())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_salvaged_log_keeps_its_place_in_the_chain() {
    let logs = chain(&some_records(), &[1], Flavour::Plain);
    let [before, torn] = &logs[..] else {
        panic!("two logs")
    };
    let seal = before.seal().digest;
    let cut = torn.seal().file_len.get() as usize - 1;
    let file = chain_file(torn);
    let (_, salvaged) = salvage(&file[..cut], Vec::new(), None).unwrap();
    before
        .header()
        .check_followed_by(seal, &salvaged.header)
        .unwrap();
    let mut after = header();
    after.previous = Some(torn.header().log);
    after.epochs = hrl_format::EpochRange::single(torn.header().epochs.last.next());
    salvaged
        .header
        .check_followed_by(salvaged.seal.digest, &after)
        .unwrap();
}

fn chain_file(log: &Log<Vec<u8>>) -> Vec<u8> {
    use hrl_format::ReadAt;
    let mut file = vec![0; log.seal().file_len.get() as usize];
    let source: &dyn ReadAt = log.source();
    source.read_exact_at(&mut file, Default::default()).unwrap();
    file
}

/// A writer that fails after so many bytes.
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0 == 0 {
            return Err(std::io::Error::from_raw_os_error(28));
        }
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn after_a_failed_write_nothing_is_appended() {
    let options = Flavour::Plain.options();
    let mut writer = LogWriter::create(Full(5000), header(), &options, None).unwrap();
    let record = &some_records()[0].0;
    writer
        .append(&borrowed(record), Default::default())
        .unwrap();
    let error = writer.flush().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert_eq!(error.io().unwrap().raw_os_error(), Some(28));
    for _ in 0..2 {
        let error = writer
            .append(&borrowed(record), Default::default())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Broken);
    }
    assert_eq!(
        writer.seal().map(|_| ()).unwrap_err().kind(),
        ErrorKind::Broken
    );
}
