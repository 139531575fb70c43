//! Names, stores, labels and policies as operators write them: nonsense is told before a daemon is
//! asked.

use std::path::PathBuf;

use hrl_format::record::Tag;
use libreplica::policy::Retention;
use libreplica::store::{PointSelector, check_name};
use libreplica::time::parse_rfc3339;
use libreplica::{Error, ErrorKind, Result};

use crate::store_folder::store_folder;

/// A volume's name, as it was written.
///
/// # Errors
/// When nothing can be called so.
pub fn name(text: &str) -> Result<String> {
    check_name(text).map(|()| text.to_owned())
}

/// A store, as it was written.
///
/// # Errors
/// When it names none.
pub fn store(text: &str) -> Result<String> {
    store_folder(text).map(|_| text.to_owned())
}

/// A list of tiers, as it was written.
///
/// # Errors
/// When it is none.
pub fn tiers(text: &str) -> Result<String> {
    text.parse::<Retention>().map(|_| text.to_owned())
}

/// A point's label, as it was written.
///
/// # Errors
/// When it is too long, or would upset a terminal.
pub fn label(text: &str) -> Result<String> {
    let refuse = |why: String| Err(Error::new(ErrorKind::Invalid, "label a point").detail(why));
    if text.len() > Tag::LABEL_MAX {
        return refuse(format!("a label has at most {} bytes", Tag::LABEL_MAX));
    }
    if text.contains(char::is_control) {
        return refuse(format!("{text:?} holds control characters"));
    }
    Ok(text.to_owned())
}

/// Which state of a volume is meant: a point's id, `latest`, a moment, or a time.
///
/// # Errors
/// When it is none of these.
pub fn selector(text: &str) -> Result<PointSelector> {
    if text == "latest" {
        return Ok(PointSelector::Latest);
    }
    if let Ok(id) = text.parse() {
        return Ok(PointSelector::Id(id));
    }
    if let Ok(moment) = text.parse() {
        return Ok(PointSelector::Moment(moment));
    }
    parse_rfc3339(text)
        .map(PointSelector::AtOrBefore)
        .map_err(|_| {
            Error::new(ErrorKind::Invalid, "find the point").detail(format!(
                "`{text}` is no point: an id as `replica points` lists it, `latest`, \
                 a time such as 2026-11-21T10:00:00.25Z, or a moment such as 7:41 \
                 (EPOCH:SEQ) expected"
            ))
        })
}

/// The path of a Unix socket: `unix:PATH`, made absolute.
///
/// # Errors
/// When it is something else.
pub fn unix_socket(text: &str) -> Result<PathBuf> {
    let refuse = || {
        Error::new(ErrorKind::Invalid, "name a socket")
            .detail(format!("`{text}` is not of the form unix:PATH"))
    };
    let path = text.strip_prefix("unix:").filter(|path| !path.is_empty());
    std::path::absolute(path.ok_or_else(refuse)?).map_err(|error| refuse().source(error))
}
