//! Taking a branch up again: its sealed logs in order, and the one that a killed process left
//! unsealed. What of that is whole is written anew into a log of its own, for no log is
//! ever written on; then the torn one is removed.
//!
//! Frames are durable before anything of their seal is written. So if a log ends in a trailer and a
//! frame before it is not whole, that is damage and no crash: it is told, and nothing is removed.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use hrl_format::units::{Epoch, FileOffset, Timestamp};
use hrl_format::{ChainEnd, Ending, ErrorKind as LogErrorKind, Log, LogHeader, Scanner, VolumeKey};

use super::sealed::Sealed;
use super::tail::{LogSpec, Tail, seal};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::store::durable::{self, damaged};
use crate::store::layout::LogName;
use crate::store::moment::Moment;

const TAKE_UP: &str = "take up a branch";
/// Bytes of a log's header.
const HEADER: u64 = 4096;

/// The logs of the volume that lie between the point and the moment that the branch stands on.
pub(super) fn load_below(sealed: &mut Sealed, spec: &LogSpec) -> Result<()> {
    let Some(moment) = spec.info.moment else {
        return Ok(());
    };
    let folder = spec.folder.below();
    for (_, path) in logs_in(&folder)? {
        let log = sealed.open(&path, spec.key.as_ref())?;
        let cut = cut_of(moment, log.header().epochs.first);
        sealed.push(log, cut)?;
    }
    Ok(())
}

/// What counts of the log of `epoch`, if not all of it does.
fn cut_of(moment: Moment, epoch: Epoch) -> Option<hrl_format::units::Sequence> {
    moment.after.filter(|_| moment.epoch == epoch)
}

/// The branch's own logs. Returns where it goes on.
pub(super) fn load_own(sealed: &mut Sealed, spec: &LogSpec) -> Result<Tail> {
    let first = spec.info.epoch.next();
    let mut next = first;
    let mut follows = spec.info.follows.map(|link| ChainEnd {
        log: link.log,
        seal: Some(link.seal),
    });
    remove_unfinished(spec)?;
    let logs = logs_in(&spec.folder.logs())?;
    let mut logs = logs.into_iter().peekable();
    while let Some((name, path)) = logs.next() {
        // Only the last one may have been left unsealed.
        let settled = match logs.peek() {
            Some((next, _)) if next.first > name.first => Some(path),
            _ => settle(spec, path)?,
        };
        let Some(path) = settled else { continue };
        let log = sealed.open(&path, spec.key.as_ref())?;
        check_place(spec, log.header(), &path, (next, follows))?;
        follows = Some(log.end());
        next = next.next();
        sealed.push(log, None)?;
    }
    Ok(Tail::new(next, follows))
}

/// Whether a log is the branch's own, and of the epoch that is next.
fn check_place(
    spec: &LogSpec,
    header: &LogHeader,
    path: &Path,
    (next, follows): (Epoch, Option<ChainEnd>),
) -> Result<()> {
    let info = &spec.info;
    let sound = header.volume == info.volume
        && header.generation == info.generation.generation()
        && header.epochs.first == next
        && header.epochs.last == next
        && header.previous == follows.map(|end| end.log)
        && header.volume_size == info.size;
    match sound {
        true => Ok(()),
        false => Err(damaged(
            TAKE_UP,
            path,
            "it is not the next log of the branch",
        )),
    }
}

/// The sealed log for the last one, at `path`, which may be torn; `None` if nothing was ever in it.
fn settle(spec: &LogSpec, path: PathBuf) -> Result<Option<PathBuf>> {
    let file = File::open(&path).at(TAKE_UP, &path)?;
    if !has_header(&file, &path)? {
        durable::remove(&path)?;
        return Ok(None);
    }
    let log = match Log::open(file, spec.key.as_ref()) {
        Ok(log) => log,
        Err(e) if is_torn(&e) => return mend(spec, &path),
        Err(e) => return Err(Error::log(TAKE_UP, e).path(path)),
    };
    match end_of(spec, &path)? {
        Ending::Sealed(_) => Ok(Some(path)),
        Ending::Torn { at, cause } if at < log.frames_end() => {
            Err(damaged_frame(&path, at, &cause))
        }
        Ending::Torn { .. } => mend(spec, &path),
    }
}

/// How a log ends, all of it read.
fn end_of(spec: &LogSpec, path: &Path) -> Result<Ending> {
    let file = File::open(path).at(TAKE_UP, path)?;
    let mut scanner = scan(file, path, spec.key.as_ref())?;
    let wrong = |e| Error::log(TAKE_UP, e).path(path);
    while scanner.next_frame().map_err(wrong)?.is_some() {}
    let ending = scanner.ending().cloned();
    ending.ok_or_else(|| damaged(TAKE_UP, path, "it does not end"))
}

/// The error for a log of which a frame was durable once and is not whole any more.
fn damaged_frame(path: &Path, at: FileOffset, cause: &hrl_format::Error) -> Error {
    let why = format!("from byte {at} on, though what lies there was synced once: {cause}");
    damaged(TAKE_UP, path, why).advice(
        "the log was left as it is: put the file back from a copy of the store; or give up what \
         was written to this branch, and open the point anew",
    )
}

/// Whether a log was not sealed, or not to its end.
fn is_torn(error: &hrl_format::Error) -> bool {
    matches!(
        error.kind(),
        LogErrorKind::NotSealed | LogErrorKind::Cut | LogErrorKind::Damaged | LogErrorKind::Foreign
    )
}

/// Whether anything was ever in a log: its header is durable before anything else of it, so that
/// one whose making was cut short is empty, or zeroes.
fn has_header(mut file: &File, path: &Path) -> Result<bool> {
    let mut header = Vec::new();
    let read = file.by_ref().take(HEADER).read_to_end(&mut header);
    read.at(TAKE_UP, path)?;
    Ok(header.iter().any(|&byte| byte != 0))
}

/// Writes what is whole of a torn log into a new one, and puts that in its place.
fn mend(spec: &LogSpec, torn: &Path) -> Result<Option<PathBuf>> {
    let file = File::open(torn).at(TAKE_UP, torn)?;
    let mut scanner = scan(file, torn, spec.key.as_ref())?;
    let old = scanner.header().clone();
    let follows = old.previous.map(|log| ChainEnd {
        log,
        seal: old.previous_seal,
    });
    let header = spec.header(old.epochs.first, follows)?;
    let path = spec.path(&header);
    let scratch = path.with_added_extension(SCRATCH);
    let mut writer = spec.create(&scratch, header)?;
    let wrong = |e| Error::log(TAKE_UP, e).path(torn);
    while let Some(entry) = scanner.next_record().map_err(wrong)? {
        let time: Timestamp = entry.time;
        let appended = writer.append(&entry.record, time);
        appended.map_err(|e| Error::log(TAKE_UP, e).path(&scratch))?;
    }
    if let Some(Ending::Torn { at, cause }) = scanner.ending() {
        say_what_is_cut(torn, *at, cause)?;
    }
    seal(writer, &scratch)?;
    durable::rename(&scratch, &path)?;
    durable::sync_folder(&spec.folder.logs())?;
    durable::remove(torn)?;
    Ok(Some(path))
}

/// What lies behind the last whole frame of a torn log was never synced, or is part of its seal.
fn say_what_is_cut(torn: &Path, at: FileOffset, cause: &hrl_format::Error) -> Result<()> {
    let len = std::fs::metadata(torn).at(TAKE_UP, torn)?.len();
    let log = torn.display();
    match len.saturating_sub(at.get()) {
        0 => tracing::info!(%log, %at, "a log of a branch was not sealed, and is whole"),
        bytes => tracing::warn!(
            %log, %at, bytes, %cause,
            "a log of a branch was not sealed: what is not whole at its end is left out"
        ),
    }
    Ok(())
}

fn scan(file: File, path: &Path, key: Option<&VolumeKey>) -> Result<Scanner<BufReader<File>>> {
    Scanner::new(BufReader::with_capacity(1 << 20, file), key)
        .map_err(|e| Error::log(TAKE_UP, e).path(path))
}

/// What a log that is being written anew is called until it is sealed.
const SCRATCH: &str = "new";

/// What a crash left of [`mend`]: the half of a new log, or the torn one beside the new.
fn remove_unfinished(spec: &LogSpec) -> Result<()> {
    let folder = spec.folder.logs();
    for name in durable::names_in(&folder)? {
        if name.ends_with(&format!(".{SCRATCH}")) {
            durable::remove(&folder.join(name))?;
        }
    }
    let logs = logs_in(&folder)?;
    for pair in logs.windows(2) {
        let [(first, a), (second, b)] = pair else {
            continue;
        };
        if first.first != second.first {
            continue;
        }
        let is_sealed = |path: &Path| {
            let file = File::open(path).at(TAKE_UP, path)?;
            if Log::open(file, spec.key.as_ref()).is_err() {
                return Ok(false);
            }
            let end = end_of(spec, path)?;
            Ok::<_, Error>(matches!(end, Ending::Sealed(_)))
        };
        let torn = match (is_sealed(a)?, is_sealed(b)?) {
            (true, false) => b,
            (false, true) => a,
            _ => {
                let why = format!("two logs of epoch {}", first.first);
                return Err(Error::new(ErrorKind::Damaged, TAKE_UP)
                    .path(&folder)
                    .detail(why));
            }
        };
        durable::remove(torn)?;
    }
    Ok(())
}

/// The logs in a folder, by epoch.
fn logs_in(folder: &Path) -> Result<Vec<(LogName, PathBuf)>> {
    let names = durable::names_in(folder)?.into_iter();
    let logs = names.filter_map(|name| Some((LogName::parse(&name)?, folder.join(name))));
    Ok(logs.collect())
}
