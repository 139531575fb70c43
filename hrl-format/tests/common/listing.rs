//! What a log holds, as text: as the crate reads it, and as the reader does that was written
//! from the document alone. The two must say the same, byte for byte.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use hrl_format::record::{Consistency, Record};
use hrl_format::units::Timestamp;
use hrl_format::{Ending, FrameBuffer, RecordOrder, Scanner, Shape, VolumeKey, check};
use sha2::{Digest, Sha256};

use super::{Byte, Model};

/// Larger volumes are not put together as an image.
const LARGEST: u64 = 16 << 20;

/// What the crate reads; `None` if it takes the file for no log, or is not to make an image
/// so large.
pub fn listing(file: &[u8], key: Option<&VolumeKey>) -> Option<String> {
    let mut scanner = Scanner::new(file, key).ok()?;
    let header = scanner.header().clone();
    let size = header.volume_size;
    let mut text = format!(
        "log {} volume {} epochs {} {} size {size} key {}{}\n",
        header.log,
        header.volume,
        header.epochs.first,
        header.epochs.last,
        header.key.unwrap_or_default(),
        match header.order {
            RecordOrder::AsRead => "",
            RecordOrder::AsCompleted => " in order",
        },
    );
    if size.get() > LARGEST {
        return None;
    }
    let locked = header.key.is_some() && key.is_none();
    let mut model = Model::new(size);
    let (mut frames, mut end) = (0, hrl_format::layout::PAGE);
    while let Some(frame) = scanner.next_frame().unwrap() {
        frames += 1;
        end += frame.span();
        if locked {
            shapes(&mut text, frame);
            continue;
        }
        for entry in frame.entries() {
            let entry = entry.unwrap();
            if matches!(&entry.record, Record::Resize { size } if size.get() > LARGEST) {
                return None;
            }
            let place = format!("record {} {} ", frame.number(), entry.sequence);
            record(&mut text, &place, &entry.record, entry.time);
            model.apply(&entry.record);
        }
    }
    let sound = check(file, key).is_ok_and(|report| report.is_sound());
    match scanner.ending() {
        Some(Ending::Sealed(seal)) if sound => {
            let flag = hrl_format::layout::SEAL_AUTHENTICATED.to_le_bytes();
            let authenticated = file[file.len() - hrl_format::layout::PAGE + 12..][..4] == flag;
            let how = if authenticated {
                "authenticated"
            } else {
                "plain"
            };
            writeln!(text, "sealed {} {how}", seal.digest).unwrap();
        }
        Some(Ending::Torn { at, .. }) => {
            assert_eq!(at.get() as usize, end);
            writeln!(text, "torn {end}").unwrap();
        }
        _ => writeln!(text, "torn {end}").unwrap(),
    }
    let image: Vec<u8> = model.bytes.iter().map(|&byte| image_byte(byte)).collect();
    let size = scanner.volume_size();
    let digest = if locked && frames > 0 {
        "locked".to_owned()
    } else {
        hex(&Sha256::digest(image))
    };
    writeln!(text, "image {size} {digest}").unwrap();
    Some(text)
}

/// What an image has where a log says so.
pub fn image_byte(byte: Byte) -> u8 {
    match byte {
        Byte::Written(byte) => byte,
        Byte::Untouched | Byte::Zero | Byte::Undefined => 0,
    }
}

fn record(text: &mut String, place: &str, record: &Record<&[u8]>, time: Timestamp) {
    let time = time.as_nanos();
    let told = match record {
        Record::Write { extent, data } => {
            let (at, len) = (extent.offset(), extent.len());
            format!("write 0 {time} {at} {len} {}", hex(&Sha256::digest(data)))
        }
        Record::Zeroes { extent } => {
            format!("zeroes 0 {time} {} {}", extent.offset(), extent.len())
        }
        Record::Discard { extent } => {
            format!("discard 0 {time} {} {}", extent.offset(), extent.len())
        }
        Record::Resize { size } => format!("resize 0 {time} {size}"),
        Record::Tag(tag) => format!(
            "tag {} {time} {} {} {} {}",
            flags(tag.consistency),
            tag.id,
            tag.group.unwrap_or_default(),
            hex(tag.root.map_or([0; 32], |root| *root.as_bytes()).as_slice()),
            hex(tag.label.as_bytes()),
        ),
    };
    writeln!(text, "{place}{told}").unwrap();
}

fn shapes(text: &mut String, frame: &FrameBuffer) {
    for entry in frame.table() {
        let (number, time) = (entry.sequence, entry.time.as_nanos());
        let told = match entry.shape {
            Shape::Write(extent) => format!("write 0 {time} {} {}", extent.offset(), extent.len()),
            Shape::Zeroes(extent) => {
                format!("zeroes 0 {time} {} {}", extent.offset(), extent.len())
            }
            Shape::Discard(extent) => {
                format!("discard 0 {time} {} {}", extent.offset(), extent.len())
            }
            Shape::Tag { id, consistency } => format!("tag {} {time} {id}", flags(consistency)),
            Shape::Resize(size) => format!("resize 0 {time} {size}"),
        };
        writeln!(text, "record {} {number} {told}", frame.number()).unwrap();
    }
}

fn flags(consistency: Consistency) -> u8 {
    match consistency {
        Consistency::Crash => 0,
        Consistency::Filesystem => 1,
        Consistency::Application => 2,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the reader in Python reads; `None` if it takes the file for no log.
pub fn python_listing(file: &Path, key: Option<[u8; 32]>) -> Option<String> {
    let reader = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reader.py");
    // Debian's, whatever else is in the path: its modules are Debian packages.
    let mut command = Command::new("/usr/bin/python3");
    command.arg(reader).arg(file).args(key.map(|key| hex(&key)));
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("/usr/bin/python3: {error}: apt-get install python3"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(!complaint.contains("apt-get install"), "{complaint}");
    if !output.status.success() {
        assert!(complaint.contains("Bad: "), "{complaint}");
        return None;
    }
    // Which rule a torn log breaks is for people.
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| match line.split_once(": rule ") {
        Some((torn, _)) => format!("{torn}\n"),
        None => format!("{line}\n"),
    };
    Some(text.lines().map(line).collect())
}
