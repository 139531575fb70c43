//! The plan's text, its steps, its journal and the next step, each by itself; and a run that is killed
//! behind every entry, which does each thing once all the same.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::error::ErrorKind;

const PLAN: &str = r#"
    name = "shop"
    [[group]]
    name = "databases"
    before = [{ name = "announce", run = ["/bin/announce"], timeout = "90s" }]
    [[group.volume]]
    volume = "db1"
    store = "/backup/store"
    key_file = "/etc/db1.key"
    point = "latest-application"
    nbd = "unix:/run/db1.nbd"
    [[group.machine]]
    volume = "db1"
    [[group.after]]
    name = "dns"
    confirm = "db leads here"
    modes = ["planned", "unplanned"]
    [[group]]
    name = "web"
    [[group.volume]]
    volume = "web1"
    store = "file:///backup/store"
    nbd = "unix:/run/web1.nbd"
"#;

fn plan() -> Plan {
    Plan::from_toml(PLAN).unwrap()
}

fn ids(mode: Mode) -> Vec<String> {
    let plan = plan();
    plan.steps(mode).into_iter().map(|step| step.id).collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn steps_are_in_order_and_a_test_ends_in_cleaning_up() {
    let earnest = [
        "databases/before/announce",
        "databases/volume/db1",
        "databases/machine/db1",
        "databases/after/dns",
        "web/volume/web1",
    ];
    assert_eq!(ids(Mode::Unplanned), earnest);
    assert_eq!(ids(Mode::Planned), earnest);
    let test = [
        "databases/before/announce",
        "databases/volume/db1",
        "databases/machine/db1",
        "web/volume/web1",
        "web/cleanup/web1",
        "databases/cleanup/db1",
    ];
    assert_eq!(ids(Mode::Test), test);
    let plan = plan();
    assert_eq!(
        plan.groups[0].volumes[0].point,
        PointPolicy::LatestApplication
    );
    assert_eq!(plan.groups[1].volumes[0].point, PointPolicy::Latest);
}

#[test]
fn a_slip_of_the_pen_is_refused() {
    for (from, to, words) in [
        ("timeout", "timout", &["timout"][..]),
        ("point = ", "points = ", &["points"]),
        (
            "latest-application",
            "newest",
            &["newest", "latest-processed"],
        ),
        ("90s", "90", &["announce", "no duration"]),
        (
            "confirm = ",
            "run = ['/bin/x']\nconfirm = ",
            &["dns", "either"],
        ),
        ("\"/bin/announce\"", "", &["announce", "runs nothing"]),
        ("/bin/announce", "announce", &["no absolute path"]),
        ("\"dns\"", "\"announce\"", &["`announce` is there twice"]),
        ("\"web\"", "\"databases\"", &["`databases` is there twice"]),
        ("\"web1\"", "\"db1\"", &["`db1` is there twice"]),
        ("/run/web1.nbd", "/run/db1.nbd", &["/run/db1.nbd", "twice"]),
        ("unix:/run/web1", "unix:run/web1", &["unix:/PATH"]),
        ("\"/backup/store\"", "\"store\"", &["no absolute path"]),
        ("\"dns\"", "\"d n s\"", &["d n s", "letters"]),
        (
            "machine]]\n    volume = \"db1\"",
            "machine]]\n    volume = \"web1\"",
            &["before it"],
        ),
    ] {
        assert!(PLAN.contains(from), "{from}");
        let error = Plan::from_toml(&PLAN.replace(from, to)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        for word in words {
            assert!(error.to_string().contains(word), "{to}: {error}");
        }
    }
}

/// One run of a plan's command, up to the end or to `killed_after` entries. `log` takes each
/// thing that is really done.
fn run(journal: &mut Vec<u8>, mode: Mode, killed_after: usize, did: &mut Vec<String>) -> bool {
    let plan = plan();
    let digest = PlanDigest::of(PLAN);
    let parsed = Journal::parse(journal).unwrap();
    journal.truncate(parsed.whole);
    let mut written = 0;
    let mut progress = if parsed.entries.is_empty() {
        let opened = Entry::opened("shop", digest, mode, "b", String::new());
        journal.extend(opened.line().unwrap().bytes());
        written += 1;
        Progress::new(&plan, mode)
    } else {
        Progress::replay(&plan, &digest, &parsed.entries).unwrap()
    };
    let confirmed = names(&["dns"]);
    while written < killed_after {
        let time = String::new();
        let entries = match progress.next(&confirmed) {
            Next::Nothing => return true,
            Next::End => vec![Entry::Ended {
                time,
                ending: Ending::Completed,
            }],
            Next::Ask { step, .. } => panic!("{} is asked for", step.id),
            Next::Confirmed { step, .. } | Next::Do { step, .. } => {
                let step = step.id.clone();
                // Whether it was done before is to be seen at what it leaves behind.
                vec![
                    Entry::Begun {
                        step: step.clone(),
                        time: time.clone(),
                    },
                    Entry::Done {
                        step,
                        time,
                        outcome: Outcome::CleanedUp,
                    },
                ]
            }
        };
        for entry in entries {
            if written == killed_after {
                // In the middle of a line.
                journal.extend(&entry.line().unwrap().as_bytes()[..9]);
                return false;
            }
            if let Entry::Done { step, .. } = &entry
                && !did.contains(step)
            {
                did.push(step.clone());
            }
            journal.extend(entry.line().unwrap().bytes());
            progress.take(&entry).unwrap();
            written += 1;
        }
    }
    false
}

proptest! {
    #[test]
    fn killed_anywhere_it_comes_to_its_end_in_order(
        kills in proptest::collection::vec(1_usize..5, 0..12),
        test in any::<bool>(),
    ) {
        let mode = if test { Mode::Test } else { Mode::Unplanned };
        let (mut journal, mut did) = (Vec::new(), Vec::new());
        for kill in kills {
            run(&mut journal, mode, kill, &mut did);
        }
        prop_assert!(run(&mut journal, mode, usize::MAX, &mut did));
        prop_assert_eq!(&did, &ids(mode));
        let entries = Journal::parse(&journal).unwrap().entries;
        let done = entries.iter().filter(|entry| matches!(entry, Entry::Done { .. }));
        prop_assert_eq!(done.count(), did.len());
    }

    #[test]
    fn no_bytes_are_too_odd_for_a_journal(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Journal::parse(&bytes);
    }
}

fn begun(step: &str) -> Entry {
    Entry::Begun {
        step: step.into(),
        time: String::new(),
    }
}

fn done(step: &str) -> Entry {
    Entry::Done {
        step: step.into(),
        time: String::new(),
        outcome: Outcome::CleanedUp,
    }
}

fn failed(step: &str) -> Entry {
    Entry::Failed {
        step: step.into(),
        time: String::new(),
        why: "no".into(),
    }
}

#[test]
fn a_script_that_failed_is_run_again_or_taken_as_done() {
    let plan = plan();
    let mut progress = Progress::new(&plan, Mode::Unplanned);
    let script = "databases/before/announce";
    assert!(
        progress
            .refuses("announce")
            .unwrap()
            .contains("not run yet")
    );
    assert!(progress.refuses("db1").unwrap().contains("no manual step"));
    assert_eq!(progress.refuses("dns"), None);
    progress.take(&begun(script)).unwrap();
    progress.take(&failed(script)).unwrap();
    assert_eq!(progress.refuses("announce"), None);
    let next = progress.next(&names(&[]));
    assert!(matches!(next, Next::Do { attempt: 2, .. }), "{next:?}");
    let next = progress.next(&names(&["announce"]));
    assert!(matches!(next, Next::Confirmed { step, .. } if step.id == script));
}

#[test]
fn a_manual_step_waits() {
    let plan = plan();
    let mut progress = Progress::new(&plan, Mode::Planned);
    for step in &ids(Mode::Planned)[..3] {
        progress.take(&begun(step)).unwrap();
        progress.take(&done(step)).unwrap();
    }
    let next = progress.next(&names(&["announce"]));
    assert!(matches!(next, Next::Ask { step, .. } if step.name == "dns"));
    let next = progress.next(&names(&["dns"]));
    assert!(matches!(next, Next::Confirmed { step, .. } if step.name == "dns"));
}

#[test]
fn what_a_test_left_open_is_found() {
    let plan = plan();
    let mut progress = Progress::new(&plan, Mode::Test);
    assert_eq!(progress.left_open(), Vec::<&Step<'_>>::new());
    for step in &ids(Mode::Test)[..1] {
        progress.take(&begun(step)).unwrap();
        progress.take(&done(step)).unwrap();
    }
    progress.take(&begun("databases/volume/db1")).unwrap();
    let open: Vec<&str> = progress.left_open().iter().map(|s| s.id.as_str()).collect();
    assert_eq!(open, ["databases/cleanup/db1"]);
    // Before its turn, for the test is given up.
    progress.take(&begun("databases/cleanup/db1")).unwrap();
    progress.take(&done("databases/cleanup/db1")).unwrap();
    assert_eq!(progress.left_open(), Vec::<&Step<'_>>::new());
}

#[test]
fn what_cannot_have_happened_is_damage() {
    let plan = plan();
    let first = "databases/before/announce";
    for entries in [
        &[done(first)][..],
        &[failed(first)],
        &[begun("databases/volume/db1")],
        &[begun("web/volume/web2")],
        &[begun(first), done(first), done(first)],
        &[begun(first), done(first), begun(first)],
    ] {
        let mut progress = Progress::new(&plan, Mode::Unplanned);
        let taken = entries.iter().try_for_each(|entry| progress.take(entry));
        assert_eq!(taken.unwrap_err().kind(), ErrorKind::Damaged, "{entries:?}");
    }
}

#[test]
fn a_journal_of_another_plan_is_refused() {
    let plan = plan();
    let (digest, other) = (PlanDigest::of(PLAN), PlanDigest::of("name = 'x'"));
    let opened = Entry::opened("shop", other, Mode::Test, "b", String::new());
    let error = Progress::replay(&plan, &digest, &[opened]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Foreign);
    assert!(error.to_string().contains("--journal"), "{error}");
    let error = Progress::replay(&plan, &digest, &[begun("x")]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
}

#[test]
fn a_line_that_was_cut_off_did_not_happen() {
    let whole = begun("a").line().unwrap() + &done("a").line().unwrap();
    let parsed = Journal::parse(whole.as_bytes()).unwrap();
    assert_eq!(parsed.entries, [begun("a"), done("a")]);
    assert_eq!(parsed.whole, whole.len());
    for cut in begun("a").line().unwrap().len()..whole.len() {
        let parsed = Journal::parse(&whole.as_bytes()[..cut]).unwrap();
        assert_eq!(parsed.entries, [begun("a")], "cut at {cut}");
    }
    let damaged = whole.replacen("begun", "bogun", 1);
    let error = Journal::parse(damaged.as_bytes()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    assert!(error.to_string().contains("line 1"), "{error}");
}
