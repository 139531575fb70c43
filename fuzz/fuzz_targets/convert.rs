//! Conversion both ways, of whole logs and of mutated ones. Invariants:
//!
//! - no input panics;
//! - writes, zeroes and discards survive the way there and back: a reader sees the same;
//! - what is converted is sound in its new format;
//! - an [MS-HRL] log is converted if, and only if, a check finds it sound.
#![no_main]

use std::io::Cursor;

use arbitrary::Arbitrary;
use hrl_format::convert::{self, Error, HrlOptions, Loss};
use hrl_format::id::VolumeId;
use hrl_format::units::VolumeSize;
use hrl_format::{Log, VolumeKey, ms};
use libfuzzer_sys::fuzz_target;
use replica_fuzz::story::{self, Byte, Flavour, Step};
use replica_fuzz::{file, resum};

#[derive(Arbitrary, Debug)]
enum Input {
    Story(Vec<Step>, Flavour),
    File(Vec<u8>),
}

fuzz_target!(|input: Input| match input {
    Input::Story(steps, flavour) => there_and_back(steps, flavour),
    Input::File(input) => from_published(&file(&input, resum::ms_hrl)),
});

fn there_and_back(mut steps: Vec<Step>, flavour: Flavour) {
    steps.retain(|step| !matches!(step, Step::Cut | Step::Resize(_)));
    let story = story::tell(&steps, flavour);
    let out = Cursor::new(Vec::new());
    let key = flavour.key();
    let (out, report) = convert::to_ms_hrl(&story.logs[0][..], key.as_ref(), out, Loss::Accepted)
        .expect("a whole log");
    let tags = steps
        .iter()
        .filter(|step| matches!(step, Step::Tag(_)))
        .count();
    assert_eq!(
        report.lost.named().len() as u64 + report.lost.more(),
        tags as u64
    );
    let published = out.into_inner();
    assert!(
        ms::check(Cursor::new(&published))
            .expect("readable")
            .is_sound()
    );
    let size = VolumeSize::new(story.bytes.len() as u64);
    let native = to_hrl(&published, Some(size), key.as_ref()).expect("a sound log");
    let log = Log::open(native, key.as_ref()).expect("a sealed log");
    for (found, told) in story::bytes_of(&log).iter().zip(&story.bytes) {
        let seen = if *told == Byte::Undefined {
            Byte::Is(0)
        } else {
            *told
        };
        assert_eq!(*found, seen);
    }
}

fn from_published(file: &[u8]) {
    let sound = ms::check(Cursor::new(file)).is_ok_and(|report| report.is_sound());
    match to_hrl(file, None, None) {
        Ok(native) => {
            assert!(sound);
            Log::open(native, None).expect("a sealed log");
        }
        Err(Error::Ms(_)) => assert!(!sound),
        // A volume of an impossible size.
        Err(_) => {}
    }
}

fn to_hrl(
    file: &[u8],
    volume_size: Option<VolumeSize>,
    key: Option<&VolumeKey>,
) -> Result<Vec<u8>, Error> {
    let volume = VolumeId::from_bytes([7; 16]);
    let options = HrlOptions {
        volume_size,
        ..HrlOptions::new(volume)
    };
    convert::to_hrl(Cursor::new(file), key, Vec::new(), &options).map(|(out, _)| out)
}
