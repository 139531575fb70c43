//! The project's words: one thing, one name (docs/glossary.md). Only the words that mean
//! nothing else are looked for; the rest is left to the reader of a change.

use tidy::{Line, Source, expect_none, has_word, lines, sources};

/// What not to say, and what to say.
const WORDS: [(&str, &str); 5] = [
    ("vdisk", "volume"),
    ("chunk", "block, or extent"),
    ("checkpoint", "epoch, or recovery point"),
    ("slave", "replica"),
    ("dst", "target"),
];

/// Others' words for others' things: a line that names the owner may use them.
const OWNERS: [&str; 6] = [
    "ext4",
    "xfs",
    "sqlite",
    "systemd",
    "filesystem",
    "site recovery",
];

/// Names that say nothing of what is in them.
const EMPTY_NAMES: [&str; 6] = ["util", "utils", "helper", "helpers", "manager", "misc"];

#[test]
fn one_thing_has_one_name() {
    let mut offences = Vec::new();
    for source in sources().iter().filter(|s| s.is_product()) {
        for (number, Line { code, comment }) in lines(&source.text).iter().enumerate() {
            let text = format!("{code} {comment}").to_lowercase();
            if OWNERS.iter().any(|owner| text.contains(owner)) {
                continue;
            }
            for (word, instead) in WORDS {
                if has_word(&text, word) {
                    let path = &source.path;
                    offences.push(format!("{path}:{}: {word}: say {instead}", number + 1));
                }
            }
        }
    }
    expect_none(
        "a thing has the name that docs/glossary.md gives it",
        &offences,
    );
}

#[test]
fn files_are_named_for_what_they_do() {
    let empty = |source: &Source| {
        let stem = |part: &str| EMPTY_NAMES.contains(&part.trim_end_matches(".rs"));
        source.is_rust() && source.path.split('/').any(stem)
    };
    let offences: Vec<String> = sources()
        .into_iter()
        .filter(empty)
        .map(|s| s.path)
        .collect();
    expect_none("a file is named for what it does", &offences);
}
