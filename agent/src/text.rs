//! Names, stores, labels and policies as operators write them: nonsense is told before a daemon is
//! asked.

use hrl_format::record::Tag;
use libreplica::policy::Retention;
use libreplica::store::check_name;
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
