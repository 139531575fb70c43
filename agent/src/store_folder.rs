//! A store as operators name it: a folder, or a `file://` URL of one on this machine
//! (RFC 8089), whose path may hold percent escapes.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use libreplica::{Error, ErrorKind, Result};

/// The folder that is meant, as it was written: not yet absolute.
///
/// # Errors
/// [`ErrorKind::Invalid`] for nothing, a bad escape, another kind of URL, or one of another
/// machine.
pub fn store_folder(text: &str) -> Result<PathBuf> {
    let refuse = |why: &str| {
        Err(Error::new(ErrorKind::Invalid, "name a store")
            .detail(format!("`{text}` {why}"))
            .advice("a folder or file:///FOLDER is expected"))
    };
    if text.is_empty() {
        return refuse("is no name");
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Ok(text.into());
    };
    if !scheme.eq_ignore_ascii_case("file") {
        return refuse("is another kind of URL");
    }
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if !host.is_empty() && !host.eq_ignore_ascii_case("localhost") {
        return refuse("names another machine");
    }
    if path.is_empty() {
        return refuse("names no folder");
    }
    match decoded(path) {
        Some(path) => Ok(path),
        None => refuse("has a `%` that is not followed by two hexadecimal digits of a byte"),
    }
}

/// The path of a URL, its percent escapes resolved; `None` if one is none, or a zero byte,
/// which no path holds (RFC 3986, section 2.1).
fn decoded(path: &str) -> Option<PathBuf> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        let byte = u8::try_from(digit()? << 4 | digit()?).ok()?;
        if byte == 0 {
            return None;
        }
        bytes.push(byte);
    }
    Some(OsString::from_vec(bytes).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_folders() {
        for (text, folder) in [
            ("/a/b", "/a/b"),
            ("a", "a"),
            ("/a/sp%20ace", "/a/sp%20ace"),
            ("file:///a/sp%20ace", "/a/sp ace"),
            ("file://localhost/a%25%c3%A9", "/a%é"),
            ("FILE:///a", "/a"),
        ] {
            assert_eq!(store_folder(text).unwrap(), PathBuf::from(folder), "{text}");
        }
        for (text, why) in [
            ("", "no name"),
            ("file://", "no folder"),
            ("file://localhost", "no folder"),
            ("file://host/a", "another machine"),
            ("file:///a%2", "%"),
            ("file:///a%zz", "%"),
            ("file:///a%00", "%"),
            ("https://host/a", "another kind"),
        ] {
            let said = store_folder(text).unwrap_err().to_string();
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
