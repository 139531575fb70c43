//! The layer rule: in `libreplica`, imports run downward only, and siblings of a rank never
//! import each other. So each room can be read, tested and replaced with only what lies
//! below it in mind. The ranks are those of ARCHITECTURE.md.

use std::collections::BTreeMap;

use tidy::{Source, expect_none, lines, sources};

const ROOT: &str = "libreplica/src/";

const RANKS: [(&str, u8); 24] = [
    ("primary", 4),
    ("replica", 4),
    ("capture", 3),
    ("spool", 3),
    ("resync", 3),
    ("store", 3),
    ("protocol", 3),
    ("failover", 3),
    ("boot", 3),
    ("device", 2),
    ("bitmap", 2),
    ("digest", 2),
    ("sys", 1),
    ("geometry", 0),
    ("policy", 0),
    ("machine", 0),
    ("plan", 0),
    ("error", 0),
    ("time", 0),
    ("key_file", 0),
    // Of hrl-format, re-exported.
    ("id", 0),
    ("record", 0),
    ("units", 0),
    ("hrl_format", 0),
];

fn rank(room: &str) -> Option<u8> {
    RANKS.iter().find(|(name, _)| *name == room).map(|r| r.1)
}

/// The room of `libreplica/src/ROOM/...` or `libreplica/src/ROOM.rs`; `None` for `lib.rs`.
fn room(source: &Source) -> Option<&str> {
    let inside = source.path.strip_prefix(ROOT)?;
    let name = inside.split('/').next()?.trim_end_matches(".rs");
    (name != "lib").then_some(name)
}

/// The code of a file, comments and strings left out, as one text.
fn code(source: &Source) -> String {
    let lines = lines(&source.text);
    let code: Vec<&str> = lines.iter().map(|line| line.code.as_str()).collect();
    code.join("\n")
}

/// The first names behind each `prefix` in `code`, those of a `{...}` group included.
fn names_behind<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    let mut names = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        if code[..at].ends_with(part) {
            continue;
        }
        let rest = code[at + prefix.len()..].trim_start();
        let Some(group) = rest.strip_prefix('{') else {
            names.extend(rest.split(|c| !part(c)).next());
            continue;
        };
        let mut depth = 1;
        let mut start = 0;
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if (c == ',' && depth == 1) || depth == 0 {
                names.extend(group[start..i].trim().split(|c| !part(c)).next());
                start = i + 1;
            }
            if depth == 0 {
                break;
            }
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// Which room each name comes from that `lib.rs` lifts to the crate's top.
fn lifted(lib: &Source) -> BTreeMap<String, String> {
    let code = code(lib);
    let mut lifted = BTreeMap::new();
    for (at, _) in code.match_indices("pub use ") {
        let statement = &code[at + 8..];
        let statement = &statement[..statement.find(';').unwrap_or(statement.len())];
        let Some((room, _)) = statement.split_once("::") else {
            continue;
        };
        for name in statement.split(|c: char| !(c.is_alphanumeric() || c == '_')) {
            lifted.insert(name.to_owned(), room.trim().to_owned());
        }
    }
    lifted
}

#[test]
fn imports_run_downward_only() {
    let sources = sources();
    let lib = sources
        .iter()
        .find(|s| s.path == format!("{ROOT}lib.rs"))
        .unwrap();
    let lifted = lifted(lib);
    let mut offences = Vec::new();
    for source in sources.iter().filter(|s| s.is_rust()) {
        let Some(room) = room(source) else { continue };
        let Some(own) = rank(room) else {
            offences.push(format!("{}: `{room}` is no room of any rank", source.path));
            continue;
        };
        let code = code(source);
        let mut names = names_behind(&code, "crate::");
        // In a room's first file, `super` at the margin is the crate's top.
        if [format!("{ROOT}{room}.rs"), format!("{ROOT}{room}/mod.rs")].contains(&source.path) {
            names.extend(names_behind(&code, "\nuse super::"));
        }
        for name in names {
            let target = match rank(name) {
                Some(_) => name,
                None => lifted.get(name).map_or(name, String::as_str),
            };
            match rank(target) {
                _ if target == room => {}
                Some(theirs) if theirs < own => {}
                // Rank 0 is plain values: errors name ids, geometry returns errors.
                Some(0) if own == 0 => {}
                Some(theirs) => offences.push(format!(
                    "{}: {room} (rank {own}) imports {target} (rank {theirs})",
                    source.path
                )),
                None => offences.push(format!("{}: `crate::{name}` is of no room", source.path)),
            }
        }
    }
    expect_none(
        "imports run downward only, and never to a sibling",
        &offences,
    );
}

#[test]
fn the_rule_sees_groups_and_nesting() {
    let code =
        "use crate::{a::{x, y}, b::z, Error}; let v = crate::c::f(mycrate::d); use crate::e;";
    assert_eq!(names_behind(code, "crate::"), ["a", "b", "Error", "c", "e"]);
}
