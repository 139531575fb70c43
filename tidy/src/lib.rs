//! Reads the repository's own text for the tests that keep the house rules. It looks at
//! text, not at a parsed syntax tree: a rule that a few lines of plain matching can keep
//! is one that a person can keep, too, and the crate needs no dependency that way.

mod lexer;

use std::fs;
use std::path::{Path, PathBuf};

pub use lexer::{Line, lines};

/// A text file of the repository.
#[derive(Debug)]
pub struct Source {
    /// Its path from the repository's top, with `/` between the parts.
    pub path: String,
    /// All of it.
    pub text: String,
}

impl Source {
    /// Whether it is Rust.
    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether it is product code: below a crate's `src/`, and not this crate's.
    pub fn is_product(&self) -> bool {
        self.is_rust() && self.path.contains("/src/") && !self.path.starts_with("tidy/")
    }
}

/// Folders that hold what was built or found, not what was written.
const SKIPPED: [&str; 6] = [
    ".git",
    "target",
    "corpus",
    "artifacts",
    "coverage",
    "golden",
];

/// The repository's top folder.
pub fn top() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Every text file of the repository, in order of its path. Binary files are left out.
///
/// # Panics
/// When the repository cannot be read: then there is nothing to check.
#[allow(clippy::panic)]
pub fn sources() -> Vec<Source> {
    let top = top();
    let mut found = Vec::new();
    let mut folders = vec![top.clone()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("list {}: {error}", folder.display()));
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_symlink() || SKIPPED.contains(&name.as_ref()) {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(text) = fs::read_to_string(&path) {
                let path = path.strip_prefix(&top).unwrap_or(&path);
                let path = path.to_string_lossy().into_owned();
                found.push(Source { path, text });
            }
        }
    }
    assert!(found.len() > 10, "no sources below {}", top.display());
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Whether `text` holds `word` by itself, not as a part of a longer word or identifier.
pub fn has_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

/// Fails with the whole list when `offences` is not empty.
///
/// # Panics
/// Then.
pub fn expect_none(rule: &str, offences: &[String]) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}
