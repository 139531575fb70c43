//! What a guest says on its serial console. It may talk without end, so only how it began and
//! what it said last are kept; a text is looked for in all of it as it comes.

use std::collections::VecDeque;

/// Bytes that are kept of the beginning.
pub const KEPT_HEAD: usize = 64 << 10;

/// Bytes that are kept of the end.
pub const KEPT_TAIL: usize = 192 << 10;

/// What came from a console.
#[derive(Debug, Default)]
pub struct Console {
    head: Vec<u8>,
    tail: VecDeque<u8>,
    total: u64,
    wanted: Vec<u8>,
    /// The last bytes, in which a wanted text may have begun.
    recent: Vec<u8>,
    found: bool,
}

impl Console {
    /// Nothing yet; looks for `wanted`, if it is anything.
    pub fn new(wanted: &str) -> Self {
        Self {
            wanted: wanted.as_bytes().to_vec(),
            ..Self::default()
        }
    }

    /// Takes what came next.
    pub fn push(&mut self, data: &[u8]) {
        self.total += data.len() as u64;
        self.look(data);
        let room = KEPT_HEAD - self.head.len();
        let (first, rest) = data.split_at(room.min(data.len()));
        self.head.extend_from_slice(first);
        let rest = &rest[rest.len().saturating_sub(KEPT_TAIL)..];
        let spare = (self.tail.len() + rest.len()).saturating_sub(KEPT_TAIL);
        self.tail.drain(..spare);
        self.tail.extend(rest);
    }

    fn look(&mut self, data: &[u8]) {
        if self.found || self.wanted.is_empty() {
            return;
        }
        self.recent.extend_from_slice(data);
        let mut windows = self.recent.windows(self.wanted.len());
        self.found = windows.any(|window| window == self.wanted);
        let needless = self.recent.len().saturating_sub(self.wanted.len() - 1);
        self.recent.drain(..needless);
    }

    /// Whether the wanted text was there.
    pub const fn has_found(&self) -> bool {
        self.found
    }

    /// How many bytes came.
    pub const fn total(&self) -> u64 {
        self.total
    }

    /// What is kept, with a line that says how much is left out where it is.
    pub fn kept(&self) -> Vec<u8> {
        let mut kept = self.head.clone();
        let left_out = self.total - (self.head.len() + self.tail.len()) as u64;
        if left_out > 0 {
            kept.extend_from_slice(format!("\n[{left_out} bytes are left out]\n").as_bytes());
        }
        kept.extend(&self.tail);
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_wherever_it_is_cut() {
        let said = b"one\r\nready\r\n";
        for at in 0..said.len() {
            let mut console = Console::new("ready");
            console.push(&said[..at]);
            assert_eq!(console.has_found(), at >= 10, "{at}");
            console.push(&said[at..]);
            assert!(console.has_found(), "{at}");
            assert_eq!(console.kept(), said);
        }
        let mut one_by_one = Console::new("ready");
        for byte in said {
            one_by_one.push(&[*byte]);
        }
        assert!(one_by_one.has_found());
        let mut nothing_wanted = Console::new("");
        nothing_wanted.push(said);
        assert!(!nothing_wanted.has_found());
    }

    #[test]
    fn beginning_and_end_of_an_endless_talk_are_kept() {
        let mut console = Console::new("never");
        let line = |n: usize| format!("line {n}\n");
        for n in 0..200_000 {
            console.push(line(n).as_bytes());
        }
        let kept = String::from_utf8(console.kept()).unwrap();
        assert!(kept.len() < KEPT_HEAD + KEPT_TAIL + 64);
        assert!(kept.starts_with("line 0\nline 1\n") && kept.ends_with("line 199999\n"));
        assert!(kept.contains(" bytes are left out]\n"));
        let mut at_once = Console::new("");
        at_once.push(&vec![b'x'; 10 << 20]);
        assert_eq!(at_once.total(), 10 << 20);
        assert!(at_once.kept().len() < KEPT_HEAD + KEPT_TAIL + 64);
    }
}
