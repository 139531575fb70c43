//! What every file must be: short, begun with prose, with nothing left over, and safe
//! outside the one room for unsafe code.

use tidy::{Source, expect_none, has_word, lines, sources};

const LONGEST: usize = 600;
const AIM: usize = 300;

fn rust() -> impl Iterator<Item = Source> {
    sources().into_iter().filter(Source::is_rust)
}

#[test]
fn files_are_short() {
    let mut offences = Vec::new();
    for source in rust() {
        let count = source.text.lines().count();
        if count > LONGEST {
            offences.push(format!("{}: {count} lines", source.path));
        } else if count > AIM {
            println!("{count} lines, {AIM} aimed at: {}", source.path);
        }
    }
    expect_none("a file has at most 600 lines", &offences);
}

#[test]
fn files_open_with_prose() {
    let mut offences = Vec::new();
    for source in rust() {
        let opening: usize = source
            .text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .map(|line| line.len() - 3)
            .sum();
        if opening < 40 {
            offences.push(source.path);
        }
    }
    expect_none(
        "a file opens with `//!` prose on what it does and why so",
        &offences,
    );
}

#[test]
fn nothing_is_left_over() {
    // Put together here, so that this file does not offend.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("X", "XX"),
    ];
    let code = [
        concat!("to", "do!"),
        concat!("unimpl", "emented!"),
        concat!("db", "g!("),
        concat!("#[ign", "ore"),
    ];
    let mut offences = Vec::new();
    for source in sources().iter().filter(|s| s.path != "Cargo.lock") {
        for (number, line) in source.text.lines().enumerate() {
            let word = words.iter().find(|word| has_word(line, word));
            let code = code
                .iter()
                .filter(|_| source.is_rust())
                .find(|code| line.contains(**code));
            if let Some(found) = word.or(code) {
                offences.push(format!("{}:{}: {found}", source.path, number + 1));
            }
        }
    }
    expect_none("nothing is left to be done in a file", &offences);
}

#[test]
fn unsafe_stands_in_sys_only() {
    let mut offences = Vec::new();
    for source in rust() {
        let tests = source.path.contains("/tests/") || source.path.contains("/benches/");
        if tests || source.path.starts_with("libreplica/src/sys") {
            continue;
        }
        for (number, line) in lines(&source.text).iter().enumerate() {
            if has_word(&line.code, "unsafe") || line.code.contains("allow(unsafe_code") {
                offences.push(format!("{}:{}", source.path, number + 1));
            }
        }
    }
    expect_none("unsafe code stands in libreplica/src/sys/ only", &offences);
}

#[test]
fn no_path_of_somebodys_machine() {
    let places = [
        concat!("/wo", "rk/"),
        concat!("/ro", "ot/"),
        concat!("/ho", "me/"),
    ];
    let mut offences = Vec::new();
    for source in sources() {
        for (number, line) in source.text.lines().enumerate() {
            if places.iter().any(|place| line.contains(place)) {
                offences.push(format!("{}:{}: {}", source.path, number + 1, line.trim()));
            }
        }
    }
    expect_none("no file names a folder of somebody's machine", &offences);
}
