//! Tests of the retention policy: what its words mean; and, over random points, times and
//! policies, that applying it often comes to the same as applying it once.

use std::collections::BTreeMap;

use hrl_format::id::PointId;
use hrl_format::record::Consistency;
use hrl_format::units::Timestamp;
use proptest::prelude::*;

use super::{Candidate, Retention};
use crate::error::ErrorKind;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_nanos(seconds * 1_000_000_000)
}

fn seconds(point: &Candidate) -> i64 {
    point.time.as_nanos() / 1_000_000_000
}

fn point(time: i64, consistency: Consistency) -> Candidate {
    Candidate {
        id: PointId::at(at(time)).unwrap(),
        time: at(time),
        consistency,
    }
}

fn points(times: &[i64]) -> Vec<Candidate> {
    let crash = |time: &i64| point(*time, Consistency::Crash);
    times.iter().map(crash).collect()
}

fn policy(text: &str) -> Retention {
    text.parse().unwrap()
}

/// What is left of `points` after the policy was applied at `now`.
fn apply(policy: &Retention, points: &[Candidate], now: i64) -> Vec<Candidate> {
    let gone = policy.expired(points, at(now));
    let kept = points.iter().filter(|point| !gone.contains(&point.id));
    kept.copied().collect()
}

fn kept(text: &str, times: &[i64], now: i64) -> Vec<i64> {
    let left = apply(&policy(text), &points(times), now);
    left.iter().map(seconds).collect()
}

#[test]
fn every_spelling_means_what_it_prints() {
    for (text, printed) in [
        ("24h", "all:24h"),
        ("all:24h", "all:24h"),
        ("1d", "all:24h"),
        ("#100", "#100"),
        ("90s,#3", "all:90s,#3"),
        ("all:2h,all:7d,#9,#3", "all:7d,#3"),
        (" 5m , #1", "all:5m,#1"),
        ("all:2h,1h:24h,1d:14d", "all:2h,1h:24h,1d:14d"),
        ("24h:14d, 60m:1d ,2h", "all:2h,1h:24h,1d:14d"),
        ("1h:2h,1h:24h,1h:3h", "1h:24h"),
        ("1h:1h,#2", "1h:1h,#2"),
    ] {
        let policy: Retention = text.parse().unwrap();
        assert_eq!(policy.to_string(), printed, "{text}");
        assert_eq!(printed.parse::<Retention>().unwrap(), policy);
    }
    assert_eq!(Retention::default(), policy("all:2h,1h:24h"));
}

#[test]
fn nonsense_is_invalid() {
    for bad in [
        "",
        "24",
        "h",
        "24h,",
        "all",
        "all:",
        "#0",
        "#",
        "#-1",
        "0h",
        "+1h",
        "-1h",
        "1.5h",
        "24H",
        "1h:",
        ":1h",
        "every:1h",
        "99999999999999999999d",
        "213503982334602d",
        "1h:2h:3h",
        "\u{661}h",
        "0h:1h",
        "1h:0h",
    ] {
        let error = bad.parse::<Retention>().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}: {error}");
    }
    let swapped = "all:2h,24h:1h".parse::<Retention>().unwrap_err();
    assert!(swapped.to_string().contains("`1d:1h`"), "{swapped}");
}

#[test]
fn age_and_count_drop_the_oldest_and_never_the_newest() {
    assert_eq!(kept("10s", &[100, 89, 90, 95], 100), [100, 90, 95]);
    assert_eq!(kept("#2", &[1, 2, 3, 4], 100), [3, 4]);
    assert_eq!(kept("10s,#1", &[95, 96, 97], 100), [97]);
    assert_eq!(kept("#5,10s", &[1, 2, 95], 100), [95]);
    assert_eq!(kept("1s", &[1, 2, 3], 1_000_000), [3]);
    assert_eq!(kept("1s", &[500, 90], 100), [500]);
    assert_eq!(kept("1s", &[], 100), [] as [i64; 0]);
}

#[test]
fn a_spaced_tier_keeps_the_oldest_of_each_interval() {
    let every_second: Vec<i64> = (0..100).collect();
    assert_eq!(
        kept("all:5s,10s:1m", &every_second, 99),
        [30, 40, 50, 60, 70, 80, 90, 94, 95, 96, 97, 98, 99]
    );
    // The interval in which we are has its point from the first on.
    assert_eq!(kept("10s:1m", &[50, 51, 52], 52), [50, 52]);
    // All of an interval expires together, not before its end is too old.
    assert_eq!(kept("10s:20s", &[10, 13, 99], 40), [10, 99]);
    assert_eq!(kept("10s:20s", &[10, 13, 99], 41), [99]);
    // What was dropped by hand is made up for by what is left.
    assert_eq!(kept("10s:1m", &[55, 57, 61], 62), [55, 61]);
    // Before 1970 as after it.
    assert_eq!(kept("10s:1m", &[-11, -10, -1, 0, 9], 9), [-11, -10, 0, 9]);
    assert_eq!(
        kept("all:5s,10s:1m,#3", &every_second, 99),
        [97, 98, 99],
        "the newest of all that is kept"
    );
    assert_eq!(kept("10s:1m,#2", &every_second, 99), [90, 99]);
}

#[test]
fn a_point_that_promises_more_is_preferred() {
    use Consistency::{Application, Crash, Filesystem};
    let hour = [
        point(10, Crash),
        point(11, Filesystem),
        point(12, Application),
        point(13, Application),
        point(14, Filesystem),
        point(99, Crash),
    ];
    let left = |count: usize| {
        let left = apply(&policy("10s:1m"), &hour[..count], 20);
        left.iter().map(seconds).collect::<Vec<_>>()
    };
    assert_eq!(left(1), [10]);
    assert_eq!(left(2), [11]);
    // The newest is never dropped, whatever it promises.
    assert_eq!(left(4), [12, 13]);
    assert_eq!(left(6), [12, 99]);
}

#[test]
fn moments_are_kept_as_far_back_as_every_point_is() {
    let since = |text: &str| policy(text).moments_since(at(100)).map(Timestamp::as_nanos);
    assert_eq!(since("10s,5s:60s"), Some(at(90).as_nanos()));
    assert_eq!(since("5s:60s"), Some(at(100).as_nanos()));
    assert_eq!(since("#3"), None);
    assert_eq!(since("106751991167300d,#3"), Some(i64::MIN));
}

fn any_consistency() -> impl Strategy<Value = Consistency> {
    prop_oneof![
        6 => Just(Consistency::Crash),
        2 => Just(Consistency::Filesystem),
        1 => Just(Consistency::Application),
    ]
}

/// Points of some twenty minutes.
fn any_points() -> impl Strategy<Value = Vec<Candidate>> {
    let one = (0..1200_i64, any_consistency());
    let point = one.prop_map(|(time, consistency)| point(time, consistency));
    prop::collection::vec(point, 1..150)
}

/// Policies without a count, of seconds and minutes.
fn any_tiers() -> impl Strategy<Value = String> {
    let all = prop::option::of((1..300_u32).prop_map(|age| format!("all:{age}s")));
    let spaced = (1..90_u32, 0..600_u32)
        .prop_map(|(interval, more)| format!("{interval}s:{}s", interval + more));
    let spaced = prop::collection::vec(spaced, 1..4);
    (all, spaced).prop_map(|(all, spaced)| {
        let tiers: Vec<String> = all.into_iter().chain(spaced).collect();
        tiers.join(",")
    })
}

fn sorted(mut points: Vec<Candidate>) -> Vec<Candidate> {
    points.sort_by_key(|point| (point.time, point.id));
    points
}

/// What there is at the end if the policy is applied at each of `runs`, to the points made by
/// then, as an agent does.
fn applied_often(policy: &Retention, points: &[Candidate], runs: &[i64]) -> Vec<Candidate> {
    let mut left: Vec<Candidate> = Vec::new();
    let mut before = i64::MIN;
    for &now in runs {
        let new = points
            .iter()
            .filter(|p| (before..now).contains(&seconds(p)));
        left.extend(new);
        left = apply(policy, &left, now);
        before = now;
    }
    left
}

proptest! {
    #[test]
    fn often_comes_to_the_same_as_once(
        points in any_points(),
        tiers in any_tiers(),
        mut runs in prop::collection::vec(0..1600_i64, 1..40),
    ) {
        let policy = policy(&tiers);
        runs.sort_unstable();
        let last = *runs.last().unwrap();
        let made: Vec<_> = points.iter().copied().filter(|p| seconds(p) < last).collect();
        let often = applied_often(&policy, &points, &runs);
        prop_assert_eq!(sorted(often), sorted(apply(&policy, &made, last)), "{}", tiers);
    }

    #[test]
    fn a_count_is_never_passed_and_never_costs_the_newest(
        points in any_points(),
        tiers in any_tiers(),
        count in 1..20_usize,
        mut runs in prop::collection::vec(0..1600_i64, 1..40),
    ) {
        let policy = policy(&format!("{tiers},#{count}"));
        runs.sort_unstable();
        let last = *runs.last().unwrap();
        let made = points.iter().filter(|p| seconds(p) < last);
        let newest = made.map(|point| (point.time, point.id)).max();
        let often = applied_often(&policy, &points, &runs);
        prop_assert!(often.len() <= count);
        prop_assert_eq!(often.iter().map(|point| (point.time, point.id)).max(), newest);
        prop_assert_eq!(&apply(&policy, &often, last), &often);
    }

    /// Whatever the clock does between two runs.
    #[test]
    fn never_the_newest_and_one_an_interval(
        points in any_points(),
        (interval, more) in (1..90_i64, 0..600_i64),
        all in 1..300_i64,
        runs in prop::collection::vec(-500..2500_i64, 1..10),
    ) {
        let policy = policy(&format!("all:{all}s,{interval}s:{}s", interval + more));
        let mut left = points.clone();
        for now in runs {
            let newest = left.iter().map(|point| (point.time, point.id)).max();
            left = apply(&policy, &left, now);
            prop_assert_eq!(&apply(&policy, &left, now), &left, "again, at once");
            prop_assert_eq!(left.iter().map(|point| (point.time, point.id)).max(), newest);
            let mut buckets: BTreeMap<i64, usize> = BTreeMap::new();
            for point in &left {
                let is_newest = Some((point.time, point.id)) == newest;
                if now - seconds(point) > all && !is_newest {
                    *buckets.entry(seconds(point).div_euclid(interval)).or_default() += 1;
                }
            }
            prop_assert!(buckets.values().all(|&points| points == 1), "{:?}", buckets);
            let oldest = now - interval - more;
            prop_assert!(buckets.keys().all(|bucket| (bucket + 1) * interval >= oldest));
        }
    }

    /// Members of a group have other ids, and points of their own behind the common ones.
    #[test]
    fn a_group_keeps_the_same_of_its_common_points(
        points in any_points(),
        tiers in any_tiers(),
        now in 0..1600_i64,
    ) {
        // Of one member no two points are of one moment.
        let mut ours = sorted(points);
        ours.dedup_by_key(|point| point.time);
        let theirs: Vec<_> = ours.iter().map(|p| point(seconds(p), p.consistency)).collect();
        let policy = policy(&tiers);
        let times = |points: Vec<Candidate>| points.iter().map(seconds).collect::<Vec<_>>();
        prop_assert_eq!(times(apply(&policy, &ours, now)), times(apply(&policy, &theirs, now)));
    }
}
