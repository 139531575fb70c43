//! Tells code from comments from strings in Rust, line by line, so that a rule about code
//! does not trip over a word in a sentence, nor one about prose over an identifier.

/// One line of a Rust file, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Line {
    /// The code, with the content of strings and characters left out.
    pub code: String,
    /// The text of comments.
    pub comment: String,
}

#[derive(Clone, Copy)]
enum State {
    Code,
    LineComment,
    /// How deep: block comments nest.
    BlockComment(u32),
    Text,
    /// How many `#` end it.
    RawText(usize),
}

/// The lines of `source`, taken apart.
pub fn lines(source: &str) -> Vec<Line> {
    let mut lines = vec![Line::default()];
    let mut state = State::Code;
    let mut rest = source;
    while let Some(c) = rest.chars().next() {
        let (next, taken) = step(state, rest);
        if c == '\n' {
            lines.push(Line::default());
            state = match state {
                State::LineComment => State::Code,
                other => other,
            };
            rest = &rest[1..];
            continue;
        }
        if let Some(line) = lines.last_mut() {
            match (state, next) {
                (State::LineComment | State::BlockComment(_), _)
                | (_, State::LineComment | State::BlockComment(_)) => {
                    line.comment.push_str(&rest[..taken]);
                }
                (State::Code, State::Code) => line.code.push_str(&rest[..taken]),
                _ => {}
            }
        }
        state = next;
        rest = &rest[taken..];
    }
    lines
}

/// What follows `rest`'s first token in `state`: the state behind it, and its length.
fn step(state: State, rest: &str) -> (State, usize) {
    let first = rest.chars().next().map_or(1, char::len_utf8);
    match state {
        State::LineComment => (State::LineComment, first),
        State::BlockComment(depth) if rest.starts_with("/*") => (State::BlockComment(depth + 1), 2),
        State::BlockComment(1) if rest.starts_with("*/") => (State::Code, 2),
        State::BlockComment(depth) if rest.starts_with("*/") => (State::BlockComment(depth - 1), 2),
        State::BlockComment(depth) => (State::BlockComment(depth), first),
        State::Text if rest.starts_with("\\\n") => (State::Text, 1),
        State::Text if rest.starts_with('\\') => {
            let escaped = rest[1..].chars().next().map_or(0, char::len_utf8);
            (State::Text, 1 + escaped)
        }
        State::Text if rest.starts_with('"') => (State::Code, 1),
        State::Text => (State::Text, first),
        State::RawText(hashes) => {
            let end = format!("\"{}", "#".repeat(hashes));
            if rest.starts_with(&end) {
                (State::Code, end.len())
            } else {
                (State::RawText(hashes), first)
            }
        }
        State::Code => step_code(rest, first),
    }
}

fn step_code(rest: &str, first: usize) -> (State, usize) {
    if rest.starts_with("//") {
        return (State::LineComment, 2);
    }
    if rest.starts_with("/*") {
        return (State::BlockComment(1), 2);
    }
    if rest.starts_with('"') {
        return (State::Text, 1);
    }
    if let Some(raw) = rest.strip_prefix('r') {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            return (State::RawText(hashes), 2 + hashes);
        }
    }
    // An identifier is one token, so that the `r` that ends it starts no raw string.
    let word = rest.len()
        - rest
            .trim_start_matches(|c: char| c.is_alphanumeric() || c == '_')
            .len();
    if word > 0 {
        return (State::Code, word);
    }
    (State::Code, character(rest).unwrap_or(first))
}

/// The length of the character literal that `rest` starts with; a lifetime is none.
fn character(rest: &str) -> Option<usize> {
    let inner = rest.strip_prefix('\'')?;
    let c = inner.chars().next()?;
    let body = if c == '\\' {
        1 + inner[1..].chars().next()?.len_utf8()
    } else {
        c.len_utf8()
    };
    let end = inner[body..].find('\'')? + body;
    // `'\u{1F600}'` is the longest; `'a` of a lifetime has no end right behind it.
    (end == body || (c == '\\' && end <= 10)).then_some(end + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(source: &str) -> (String, String) {
        let lines = lines(source);
        let join = |part: fn(&Line) -> &str| lines.iter().map(part).collect::<Vec<_>>().join("|");
        (join(|line| &line.code), join(|line| &line.comment))
    }

    #[test]
    fn comments_and_strings_are_no_code() {
        let (code, comment) = of("let a = \"un // safe\"; // why\nlet b = 1; /* x /* y */ z */ c");
        assert_eq!(code, "let a = ; |let b = 1;  c");
        assert_eq!(comment, "// why|/* x /* y */ z */");
    }

    #[test]
    fn raw_strings_characters_and_lifetimes() {
        let (code, _) =
            of("f(r#\"a \" // b\"#, '\"', '\\'', 'x', b'\\\\'); fn g<'a>(v: &'a str) {}");
        assert!(
            code.starts_with("f(, '\"', '\\'', 'x', b'\\\\');"),
            "{code}"
        );
        assert!(code.ends_with("fn g<'a>(v: &'a str) {}"), "{code}");
    }

    #[test]
    fn a_name_that_ends_in_r_starts_no_raw_string() {
        let (code, _) = of("for\"x\" y");
        assert_eq!(code, "for y");
    }

    #[test]
    fn strings_over_several_lines_keep_the_line_numbers() {
        let lines = lines("a(\"one\\\n two\nthree\");\nb");
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[3].code, "b");
    }
}
