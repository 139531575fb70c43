//! Writes the seeds that fuzzing starts from into `corpus/<target>/`: whole logs of every
//! flavour, alone, torn and merged, and the same in [MS-HRL]. Run it in `fuzz/`:
//! `cargo run --bin seeds`.

use std::fs;
use std::io::{Cursor, Result};
use std::path::Path;

use hrl_format::convert::{Loss, to_ms_hrl};
use hrl_format::{Log, LogOptions, merge};
use replica_fuzz::story::{self, Flavour, Step};

fn main() -> Result<()> {
    let short = [Step::Write(4096, 511, 7), Step::Tag(3)];
    let long = [
        Step::Write(0, 8191, 1),
        Step::Zeroes(4000, 100),
        Step::Flush,
        Step::Discard(512, 511),
        Step::Resize(60_000),
        Step::Tag(1),
        Step::Cut,
        Step::Write(100, 9000, 2),
        Step::Resize(65_000),
        Step::Write(62_000, 2000, 3),
        Step::Tag(2),
    ];
    for flavour in [Flavour::Plain, Flavour::Lz4, Flavour::Encrypted] {
        for (name, steps) in [("short", &short[..]), ("long", &long)] {
            let name = format!("{flavour:?}-{name}").to_lowercase();
            native(&name, steps, flavour)?;
            published(&name, steps, flavour)?;
        }
    }
    Ok(())
}

fn native(name: &str, steps: &[Step], flavour: Flavour) -> Result<()> {
    let story = story::tell(steps, flavour);
    let logs: Vec<_> = story
        .logs
        .iter()
        .flat_map(|file| Log::open(file, None))
        .collect();
    let merged = merge(&logs, Vec::new(), &LogOptions::default()).map(|(file, _)| file);
    for target in ["native_read", "native_scan"] {
        for (n, file) in story.logs.iter().chain(&merged).enumerate() {
            put(target, &format!("{name}-{n}"), file)?;
            put(
                target,
                &format!("{name}-{n}-torn"),
                &file[..file.len() - 4096],
            )?;
        }
    }
    Ok(())
}

fn published(name: &str, steps: &[Step], flavour: Flavour) -> Result<()> {
    for (n, file) in story::tell(steps, flavour).logs.iter().enumerate() {
        let out = Cursor::new(Vec::new());
        let key = flavour.key();
        if let Ok((out, _)) = to_ms_hrl(&file[..], key.as_ref(), out, Loss::Accepted) {
            put("ms_read", &format!("{name}-{n}"), out.get_ref())?;
            put("convert", &format!("{name}-{n}"), out.get_ref())?;
        }
    }
    Ok(())
}

/// A seed with its first byte, which says whether checksums are made right: one of each.
fn put(target: &str, name: &str, file: &[u8]) -> Result<()> {
    let folder = Path::new("corpus").join(target);
    fs::create_dir_all(&folder)?;
    for first in [0, 1] {
        let seed = [&[first], file].concat();
        fs::write(folder.join(format!("{name}-{first}")), seed)?;
    }
    Ok(())
}
