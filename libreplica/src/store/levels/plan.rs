//! Which level files a point is read through, and which is to be made next.
//!
//! Files are made pass by pass. The tiles of the first pass are the logs; each pass makes a file of
//! every [`RADIX`] neighbours that no file of that pass covers, and hands on its files, and the
//! tiles between them, as the tiles of the next. So every file is a union of whole tiles below it.
//! Of those that end before a point as few are taken as cover all logs.
//! Where logs were folded or merged the files that they were in are gone; the gap is
//! filled again where it is long enough, and else its tiles stay what they are.

use std::collections::HashMap;
use std::ops::Range;

use super::layout::Run;
use super::manifest::Listed;
use crate::store::catalogue::LogEntry;
use crate::store::layout::VolumeFolder;

/// How many tiles become a file.
pub(super) const RADIX: usize = 16;
/// More levels than any store needs: each is sixteen times as long as the one below.
const MOST_LEVELS: u32 = 12;

/// A listed file and the logs of the chain that it stands for, if they are there still.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) logs: Range<usize>,
    pub(super) file: Listed,
}

/// Where a file belongs by its epochs; whether the logs there are those it was made of is for
/// [`is_of`] to say.
pub(super) fn place(file: &Listed, logs: &[LogEntry]) -> Option<Placed> {
    let start = logs.partition_point(|log| log.first < file.first);
    let end = start.checked_add(usize::try_from(file.logs).ok()?)?;
    let run = logs.get(start..end)?;
    let fits = run.first()?.first == file.first && run.last()?.last == file.last;
    fits.then_some(Placed {
        logs: start..end,
        file: *file,
    })
}

/// Whether the file was made of exactly these logs.
pub(super) fn is_of(placed: &Placed, folder: &VolumeFolder, logs: &[LogEntry]) -> bool {
    let run = logs.get(placed.logs.clone());
    run.is_some_and(|run| Run::of(folder.id(), run) == placed.file.run)
}

/// A part of the chain, and the file that stands for it, if it is not one log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) logs: Range<usize>,
    pub(super) file: Option<Listed>,
}

/// Covers `count` logs with as few tiles as can be, by the files that `use_it` does not refuse.
pub(super) fn cover<T>(
    count: usize,
    mut files: Vec<Placed>,
    mut use_it: impl FnMut(&Placed) -> Option<T>,
) -> Vec<(Range<usize>, Option<T>)> {
    files.retain(|file| file.logs.end <= count);
    let mut used: HashMap<Range<usize>, T> = HashMap::new();
    loop {
        let chosen = fewest(count, &files);
        let mut refused = Vec::new();
        for file in chosen.iter().filter_map(|&(_, file)| file) {
            if used.contains_key(&file.logs) {
                continue;
            }
            match use_it(file) {
                Some(of_use) => drop(used.insert(file.logs.clone(), of_use)),
                None => refused.push(file.file.run),
            }
        }
        if refused.is_empty() {
            let tile = |(logs, _)| {
                let file = used.remove(&logs);
                (logs, file)
            };
            return chosen.into_iter().map(tile).collect();
        }
        files.retain(|file| !refused.contains(&file.file.run));
    }
}

/// The shortest way through the logs; where a file is as short as logs alone, the file.
fn fewest(count: usize, files: &[Placed]) -> Vec<(Range<usize>, Option<&Placed>)> {
    let mut starting: HashMap<usize, Vec<&Placed>> = HashMap::new();
    for file in files {
        starting.entry(file.logs.start).or_default().push(file);
    }
    // From each log on: how many tiles it takes to the end, and the file to begin with.
    let mut ways: Vec<(usize, Option<&Placed>)> = vec![(0, None); count + 1];
    for at in (0..count).rev() {
        let alone = (ways[at + 1].0 + 1, None);
        let here = starting.get(&at).into_iter().flatten();
        let by_file = here.map(|&file| (ways[file.logs.end].0 + 1, Some(file)));
        let best = by_file.min_by_key(|&(tiles, _)| tiles);
        ways[at] = best.filter(|best| best.0 <= alone.0).unwrap_or(alone);
    }
    let mut at = 0;
    let next = || {
        let (_, file) = *ways.get(at).filter(|_| at < count)?;
        let logs = file.map_or(at..at + 1, |file| file.logs.clone());
        at = logs.end;
        Some((logs, file))
    };
    std::iter::from_fn(next).collect()
}

/// A file that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) level: u32,
    /// What it is made of, the oldest first.
    pub(super) parts: Vec<Part>,
}

impl Job {
    pub(super) fn logs(&self) -> Range<usize> {
        let start = self.parts.first().map_or(0, |part| part.logs.start);
        start..self.parts.last().map_or(start, |part| part.logs.end)
    }
}

/// The next file to make for a chain of `count` logs; the shortest first.
pub(super) fn next(count: usize, files: &[Placed], radix: usize) -> Option<Job> {
    let single = |log| Part {
        logs: log..log + 1,
        file: None,
    };
    let mut tiles: Vec<Part> = (0..count).map(single).collect();
    for level in 1..=MOST_LEVELS {
        let mut of_level: Vec<&Placed> = files.iter().filter(|f| f.file.level == level).collect();
        of_level.sort_by_key(|file| file.logs.start);
        let passed = pass(&tiles, &of_level);
        let run = passed
            .chunk_by(|a, b| !a.is_new && !b.is_new)
            .find(|run| run.len() >= radix && !run[0].is_new);
        if let Some(run) = run {
            let parts = run[..radix].iter().map(|tile| tile.part.clone()).collect();
            return Some(Job { level, parts });
        }
        // What is behind the last file of this pass may become one of it yet.
        let whole = passed.iter().rposition(|tile| tile.is_new)? + 1;
        let handed_on = passed.into_iter().take(whole);
        tiles = handed_on.map(|tile| tile.part).collect();
    }
    None
}

/// A tile behind a pass.
struct Passed {
    part: Part,
    /// Whether it is a file of this pass.
    is_new: bool,
}

/// Puts files in the place of the tiles that they cover. One that would cut a tile, as it may since
/// logs before it were merged, is left out; of several that begin at one place the longest counts.
fn pass(tiles: &[Part], files: &[&Placed]) -> Vec<Passed> {
    let mut passed: Vec<Passed> = Vec::with_capacity(tiles.len());
    let mut files = files.iter().peekable();
    let mut covered = 0;
    for (n, tile) in tiles.iter().enumerate() {
        if tile.logs.start < covered {
            continue;
        }
        let is_whole = |f: &Placed| {
            let ends = tiles[n..].partition_point(|t| t.logs.end < f.logs.end);
            let ends = tiles.get(n + ends).map(|t| t.logs.end);
            f.logs.start == tile.logs.start && ends == Some(f.logs.end)
        };
        let mut file: Option<&Placed> = None;
        while let Some(next) = files.next_if(|f| f.logs.start <= tile.logs.start) {
            let longer = file.is_none_or(|file| file.logs.end < next.logs.end);
            if longer && is_whole(next) {
                file = Some(next);
            }
        }
        let part = match file {
            Some(file) => Part {
                logs: file.logs.clone(),
                file: Some(file.file),
            },
            None => tile.clone(),
        };
        covered = part.logs.end;
        let is_new = file.is_some();
        passed.push(Passed { part, is_new });
    }
    passed
}
