//! What levels promise by themselves: few tiles for every point, and files that give back what was
//! put in, wherever one begins to read.

use std::ops::Range;
use std::sync::Arc;

use hrl_format::id::VolumeId;
use hrl_format::units::{ByteLen, ByteOffset, Epoch, Extent, FrameNumber, VolumeSize};
use hrl_format::{DataOffset, ExtentKind, IndexEntry, Piece, SourceNumber};

use super::build::LevelWriter;
use super::file::{Fences, LevelFile, LevelStream};
use super::layout::{Head, Run};
use super::manifest::Listed;
use super::plan::{self, Placed, RADIX};
use crate::store::tests::random::Random;

fn listed(level: u32, logs: &Range<usize>) -> Listed {
    let mut run = [0; 32];
    run[..8].copy_from_slice(&(logs.start as u64).to_le_bytes());
    run[8..16].copy_from_slice(&(logs.end as u64).to_le_bytes());
    Listed {
        run: Run(run),
        level,
        logs: logs.len() as u64,
        first: Epoch::new(logs.start as u64 + 1),
        last: Epoch::new(logs.end as u64),
        size: VolumeSize::new(1 << 40),
        entries: 1,
        bytes: ByteLen::new(4096),
    }
}

/// Makes files until there is nothing to do.
fn build(count: usize, files: &mut Vec<Placed>, radix: usize) {
    while let Some(job) = plan::next(count, files, radix) {
        let logs = job.logs();
        assert!(files.iter().all(|file| file.logs != logs), "made twice");
        let file = listed(job.level, &logs);
        files.push(Placed { logs, file });
    }
}

/// How many tiles the first `count` logs take.
fn tiles(count: usize, files: &[Placed]) -> usize {
    let cover = plan::cover(count, files.to_vec(), |_| Some(()));
    let mut at = 0;
    for (logs, _) in &cover {
        assert_eq!(logs.start, at, "no gap, no overlap");
        at = logs.end;
    }
    assert_eq!(at, count);
    cover.len()
}

#[test]
fn every_point_takes_few_tiles() {
    let mut files = Vec::new();
    // As they come: each log is there before the next.
    for count in 1..=10_000 {
        build(count, &mut files, RADIX);
    }
    let most = (1..=10_000).map(|count| tiles(count, &files)).max();
    // One of the third level, then fifteen of each below, and logs.
    assert_eq!(most, Some(46));
    assert_eq!(tiles(10_000, &files), 2 + 7 + 1);
    let mut at_once = Vec::new();
    build(10_000, &mut at_once, RADIX);
    files.sort_by_key(|file| (file.file.level, file.logs.start));
    at_once.sort_by_key(|file| (file.file.level, file.logs.start));
    assert!(files == at_once, "it does not matter when they are made");
}

#[test]
fn gaps_are_filled() {
    let mut files = Vec::new();
    build(5000, &mut files, RADIX);
    // Some logs were merged: the files that they were in are gone, and those behind moved up.
    for gone in [700..717, 2000..2003, 3000..3100] {
        let shift = gone.len() - 1;
        files.retain(|file| file.logs.end <= gone.start || file.logs.start >= gone.end);
        for file in &mut files {
            if file.logs.start >= gone.end {
                file.logs = file.logs.start - shift..file.logs.end - shift;
                file.file = listed(file.file.level, &file.logs);
            }
        }
    }
    // And the oldest were folded.
    files.retain(|file| file.logs.start >= 40);
    for file in &mut files {
        file.logs = file.logs.start - 40..file.logs.end - 40;
        file.file = listed(file.file.level, &file.logs);
    }
    let count = 5000 - 16 - 2 - 99 - 40;
    let before = (1..=count).map(|n| tiles(n, &files)).max().unwrap();
    build(count, &mut files, RADIX);
    let after = (1..=count).map(|n| tiles(n, &files)).max().unwrap();
    assert!(before > 100 && after <= 4 * RADIX, "{before} {after}");
}

/// A chain that changes as a store's does, and the files that its logs are in.
struct Changing {
    random: Random,
    logs: Vec<u64>,
    /// Of which logs each file was made.
    files: Vec<(u32, Vec<u64>)>,
    newest: u64,
}

impl Changing {
    fn log(&mut self) -> u64 {
        self.newest += 1;
        self.newest
    }

    fn change(&mut self) {
        let count = self.logs.len() as u64;
        let at = self.random.below(count) as usize;
        match self.random.below(8) {
            0 => {
                self.logs.drain(..at.min(9));
            }
            1..=3 => {
                let end = self.logs.len().min(at + 2 + self.random.below(20) as usize);
                let merged = self.log();
                self.logs.splice(at..end, [merged]);
            }
            4 => {
                let at = self.random.below(self.files.len().max(1) as u64) as usize;
                self.files.drain(at..self.files.len().min(at + 1));
            }
            _ => {}
        }
        for _ in 0..self.random.below(10) + 1 {
            let log = self.log();
            self.logs.push(log);
        }
        let Self { logs, files, .. } = self;
        files.retain(|(_, of)| logs.windows(of.len()).any(|run| run == of));
    }

    fn placed(&self) -> Vec<Placed> {
        let place = |(level, of): &(u32, Vec<u64>)| {
            let start = self.logs.iter().position(|log| *log == of[0]).unwrap();
            let logs = start..start + of.len();
            let file = listed(*level, &logs);
            Placed { logs, file }
        };
        self.files.iter().map(place).collect()
    }
}

#[test]
fn however_the_chain_changes_files_are_made_once() {
    for (seed, radix) in (0..12).zip([2, 3, 4, 16].into_iter().cycle()) {
        let mut chain = Changing {
            random: Random::new(seed),
            logs: (0..200).collect(),
            files: Vec::new(),
            newest: 200,
        };
        for round in 0..150 {
            chain.change();
            while let Some(job) = plan::next(chain.logs.len(), &chain.placed(), radix) {
                let of = chain.logs[job.logs()].to_vec();
                let again = chain.files.iter().any(|(_, known)| *known == of);
                assert!(!again, "seed {seed}, round {round}: {job:?} is made twice");
                chain.files.push((job.level, of));
            }
            let levels = chain.files.iter().map(|(level, _)| *level).max();
            let most = radix * (levels.unwrap_or(0) as usize + 1);
            let tiles = tiles(chain.logs.len(), &chain.placed());
            assert!(tiles <= most, "seed {seed}, round {round}: {tiles}, {most}");
        }
    }
}

/// Entries of some length, with gaps, of any kind.
fn pieces(count: u64) -> Vec<Piece> {
    let mut at = 0;
    let piece = |n: u64| {
        let len = 512 * (1 + n % 7);
        at += 512 * (n % 3);
        let extent = Extent::new(ByteOffset::new(at), ByteLen::new(len)).unwrap();
        at += len;
        let (kind, data) = match n % 5 {
            0 => (ExtentKind::Zeroes, 0),
            1 => (ExtentKind::Discard, 0),
            _ => (ExtentKind::Write, (n * 4099) % ((1 << 20) - 4096)),
        };
        Piece {
            source: SourceNumber::new((n % 4096) as usize),
            entry: IndexEntry {
                extent,
                kind,
                frame: FrameNumber::new((n % 10_007) as u32),
                at: DataOffset::new(data as u32),
            },
        }
    };
    (0..count).map(piece).collect()
}

fn head(size: VolumeSize) -> Head {
    Head {
        volume: VolumeId::from_bytes([7; 16]),
        run: Run([9; 32]),
        level: 3,
        logs: 4096,
        first: Epoch::new(5),
        last: Epoch::new(4100),
        size,
        entries: 0,
    }
}

fn write(path: &std::path::Path, pieces: &[Piece], size: VolumeSize) -> LevelFile {
    let mut writer = LevelWriter::create(path.to_owned(), head(size)).unwrap();
    for piece in pieces {
        writer.push(*piece).unwrap();
    }
    let (head, bytes) = writer.finish().unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().len(), bytes.get());
    LevelFile::open(path, &head, &Arc::new(Fences::default())).unwrap()
}

#[test]
fn a_file_gives_back_what_was_put_in() {
    let folder = tempfile::tempdir().unwrap();
    // None, one, a page, one more; one row of fences and two.
    for count in [0, 1, 169, 170, 1000, 169 * 508, 169 * 508 + 1, 200_000] {
        let pieces = pieces(count);
        let end = pieces.last().map_or(512, |last| last.extent().end().get());
        let size = VolumeSize::new(end);
        let file = Arc::new(write(&folder.path().join("level"), &pieces, size));
        let all = LevelStream::new(Arc::clone(&file), size.extent()).unwrap();
        let all: Vec<Piece> = all.map(Result::unwrap).collect();
        assert!(all == pieces, "{count}");
        for n in 0..50 {
            let at = end / 50 * n + n * 77 % 512;
            let within = Extent::between(ByteOffset::new(at), ByteOffset::new(end.min(at + 9000)));
            let found = LevelStream::new(Arc::clone(&file), within).unwrap();
            let found: Vec<Piece> = found.map(Result::unwrap).collect();
            let first = pieces.partition_point(|piece| piece.extent().end() <= within.offset());
            let expected = pieces[first..].iter().map_while(|piece| {
                let entry = piece.entry.clip(within)?;
                Some(Piece { entry, ..*piece })
            });
            let expected: Vec<Piece> = expected.collect();
            assert!(found == expected, "{count} from {at}");
        }
    }
}

#[test]
fn what_is_longer_than_an_entry_becomes_several() {
    let folder = tempfile::tempdir().unwrap();
    let size = VolumeSize::new(i64::MAX as u64);
    let entry = IndexEntry {
        extent: size.extent(),
        kind: ExtentKind::Discard,
        frame: FrameNumber::ZERO,
        at: DataOffset::default(),
    };
    let source = SourceNumber::new(3);
    let file = write(
        &folder.path().join("level"),
        &[Piece { source, entry }],
        size,
    );
    let mut at = ByteOffset::ZERO;
    for piece in LevelStream::new(Arc::new(file), size.extent()).unwrap() {
        let piece = piece.unwrap();
        assert_eq!((piece.extent().offset(), piece.kind()), (at, entry.kind));
        at = piece.extent().end();
    }
    assert_eq!(at, size.extent().end());
}
