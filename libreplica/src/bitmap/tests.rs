//! The bitmap against a model, a sorted set of block numbers; its memory against the
//! promise.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{Bitmap, Layout};
use crate::geometry::{BlockNumber, Run};
use crate::units::{BlockSize, VolumeSize};

fn run(start: u64, len: u64) -> Run {
    Run {
        start: BlockNumber::new(start),
        end: BlockNumber::new(start + len),
    }
}

/// The runs of a model, as the bitmap must give them.
fn runs_of(model: &BTreeSet<u64>) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &block in model {
        match runs.last_mut() {
            Some((_, end)) if *end == block => *end += 1,
            _ => runs.push((block, block + 1)),
        }
    }
    runs
}

fn assert_same(bitmap: &Bitmap, model: &BTreeSet<u64>) {
    let runs: Vec<_> = bitmap
        .runs()
        .map(|r| (r.start.get(), r.end.get()))
        .collect();
    assert_eq!(runs, runs_of(model));
    assert_eq!(bitmap.count(), model.len() as u64);
    assert_eq!(bitmap.is_empty(), model.is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Set(u64, u64),
    ClearRun(u64, u64),
    Clear,
    Merge(Vec<(u64, u64)>),
    MergeRun(Vec<(u64, u64)>, (u64, u64)),
    TakeAway,
}

/// Sizes around the edges of all three levels, and starts anywhere in them.
fn steps() -> impl Strategy<Value = (u64, Vec<Step>)> {
    let blocks = prop_oneof![
        1..200_u64,
        4000..4200_u64,
        262_100..262_200_u64,
        300_000..800_000_u64
    ];
    blocks.prop_flat_map(|blocks| {
        let extent = move || {
            let len = prop_oneof![1..3_u64, 60..70_u64, 1..10_000_u64];
            (0..blocks + 10, len)
        };
        let step = prop_oneof![
            6 => extent().prop_map(|(at, len)| Step::Set(at, len)),
            3 => extent().prop_map(|(at, len)| Step::ClearRun(at, len)),
            1 => Just(Step::Clear),
            2 => prop::collection::vec(extent(), 0..4).prop_map(Step::Merge),
            2 => (prop::collection::vec(extent(), 0..4), extent())
                .prop_map(|(runs, only)| Step::MergeRun(runs, only)),
            1 => Just(Step::TakeAway),
        ];
        (Just(blocks), prop::collection::vec(step, 1..20))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn behaves_like_a_set((blocks, steps) in steps()) {
        let bitmap = Bitmap::new(blocks);
        let mut model = BTreeSet::new();
        let inside = |at: u64, len: u64| at..(at + len).min(blocks).max(at);
        for step in steps {
            match step {
                Step::Set(at, len) => {
                    bitmap.set_run(run(at, len));
                    model.extend(inside(at, len));
                }
                Step::ClearRun(at, len) => {
                    bitmap.clear_run(run(at, len));
                    model.retain(|block| !(at..at + len).contains(block));
                }
                Step::Clear => {
                    bitmap.clear();
                    model.clear();
                }
                Step::Merge(runs) => {
                    let other = Bitmap::new(blocks);
                    for &(at, len) in &runs {
                        other.set_run(run(at, len));
                    }
                    let mut either: BTreeSet<u64> = model.clone();
                    either.extend(runs.iter().flat_map(|&(at, len)| inside(at, len)));
                    prop_assert_eq!(
                        Bitmap::count_union(&[&bitmap, &other, &other]),
                        either.len() as u64
                    );
                    bitmap.merge_from(&other);
                    model = either;
                }
                Step::MergeRun(runs, (from, span)) => {
                    let other = Bitmap::new(blocks);
                    for &(at, len) in &runs {
                        other.set_run(run(at, len));
                        let both = inside(at, len).filter(|n| (from..from + span).contains(n));
                        model.extend(both);
                    }
                    bitmap.merge_run_from(&other, run(from, span));
                }
                Step::TakeAway => {
                    let to = Bitmap::new(blocks);
                    bitmap.take_into(&to);
                    assert_same(&to, &model);
                    model.clear();
                }
            }
            assert_same(&bitmap, &model);
        }
        for block in [0, 1, 63, 64, blocks / 2, blocks - 1, blocks, blocks + 1] {
            prop_assert_eq!(bitmap.test(BlockNumber::new(block)), model.contains(&block));
        }
    }
}

#[test]
fn sixteen_tebibytes_in_64_kib_blocks_take_at_most_34_mib() {
    let blocks = BlockSize::new(64 << 10)
        .unwrap()
        .count_in(VolumeSize::new(16 << 40));
    let layout = Layout::for_blocks(blocks);
    assert!(
        layout.words() * 8 <= 34 << 20,
        "{} bytes",
        layout.words() * 8
    );
    // And it works at that size, to the last block.
    let bitmap = Bitmap::new(blocks);
    bitmap.set(BlockNumber::new(blocks - 1));
    bitmap.set_run(run(blocks / 2 - 1, 2));
    let runs: Vec<_> = bitmap.runs().map(|r| r.range()).collect();
    assert_eq!(runs, [blocks / 2 - 1..blocks / 2 + 1, blocks - 1..blocks]);
}

#[test]
fn all_blocks_are_one_run() {
    let bitmap = Bitmap::new(5000);
    bitmap.set_all();
    assert_eq!(bitmap.runs().collect::<Vec<_>>(), [run(0, 5000)]);
    assert_eq!(
        bitmap.runs().from(BlockNumber::new(77)).next(),
        Some(run(77, 5000 - 77))
    );
}

#[test]
fn a_word_that_only_the_level_above_names_is_passed_over() {
    // As a kill between two instructions leaves it.
    let bitmap = Bitmap::new(64 * 64 * 64 * 2);
    bitmap.set(BlockNumber::new(70));
    bitmap.set(BlockNumber::new(64 * 64 * 64 + 7));
    bitmap.levels().level0[1].store(0, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(bitmap.count(), 1);
    let run = bitmap.runs().next().unwrap();
    assert_eq!(run.start.get(), 64 * 64 * 64 + 7);
}

#[test]
fn threads_lose_no_bit() {
    let bitmap = Bitmap::new(100_000);
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let bitmap = &bitmap;
            scope.spawn(move || {
                for block in (thread..100_000).step_by(4) {
                    bitmap.set(BlockNumber::new(block));
                }
            });
        }
    });
    assert_eq!(bitmap.count(), 100_000);
    assert_eq!(bitmap.runs().count(), 1);
}
