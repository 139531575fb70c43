//! What the daemon does for each request: the seam between the control socket and the
//! library's [`Primary`].

use std::sync::Arc;
use std::time::Duration;

use hrl_format::record::Consistency;
use hrl_format::units::{BlockSize, ByteLen, ByteOffset, Extent};
use libreplica::primary::{Exclusion, PointOptions, Primary, ProtectSpec, Siblings};
use libreplica::replica::{ExportSpec, Exports, Wanted, Written};
use libreplica::store::{BranchPurpose, Store};
use libreplica::{Error, ErrorKind, Result};

use crate::control::protocol::{
    Answer, Exclude, Location, OpenRequest, PointRequest, ProtectRequest, Request,
};
use crate::text;

/// What the daemon has.
pub struct Served {
    /// The volumes that it protects.
    pub primary: Arc<Primary>,
    /// The points that it has open.
    pub exports: Exports,
}

/// Carries out `request`.
///
/// # Errors
/// Whatever it fails with; the server turns it into an answer.
pub fn answer(served: &Served, request: Request) -> Result<Answer> {
    let primary = &served.primary;
    match request {
        Request::Protect(request) => {
            let protected = primary.protect(protect_spec(request)?)?;
            Ok(Answer::Protected {
                id: protected.id.to_string(),
                name: protected.name,
                address: protected.address,
            })
        }
        Request::Wait { volume } => primary.wait_until_replicating(&volume).map(Answer::settled),
        Request::Unprotect { volume } => primary.unprotect(&volume).map(|()| Answer::Done),
        Request::UnprotectStale => primary
            .remove_stale()
            .map(|removed| Answer::Stale { removed }),
        Request::Pause { volume } => primary.pause(&volume).map(|()| Answer::Done),
        Request::Resume { volume } => primary.resume(&volume).map(|()| Answer::Done),
        Request::Status { volume } => status(served, volume.as_deref()),
        Request::Open(request) => open(served, request),
        Request::Close { what, keep } => {
            let written = if keep {
                Written::Kept
            } else {
                Written::Discarded
            };
            let export = served.exports.close(&what, written)?;
            Ok(Answer::Export { export })
        }
        Request::Point(request) => point(primary, request),
        Request::Location { volume } => location(primary, &volume),
        Request::Verify { volume } => primary
            .verify(&volume)
            .map(|report| Answer::Verified { report }),
        Request::Resync { volume } => primary.resync(&volume).map(|()| Answer::Done),
    }
}

fn protect_spec(request: ProtectRequest) -> Result<ProtectSpec> {
    let block = request
        .block_bytes
        .map(|bytes| {
            BlockSize::new(bytes).ok_or_else(|| {
                Error::new(ErrorKind::Invalid, "protect the device")
                    .detail(format!("{bytes} bytes is no block size"))
            })
        })
        .transpose()?;
    let exclude = request
        .exclude
        .into_iter()
        .map(exclusion)
        .collect::<Result<Vec<_>>>()?;
    Ok(ProtectSpec {
        device: request.device,
        store: request.store,
        name: request.name,
        every: Duration::from_millis(request.every_ms),
        retain: request.retain,
        block,
        key_file: request.key_file,
        group: request.group,
        exclude,
        spool: request.spool,
        capture: request.capture,
        siblings: if request.force {
            Siblings::LeaveOut
        } else {
            Siblings::Refuse
        },
    })
}

fn exclusion(exclude: Exclude) -> Result<Exclusion> {
    match exclude {
        Exclude::Partition(path) => Ok(Exclusion::Partition(path)),
        Exclude::Range { offset, len } => Extent::new(ByteOffset::new(offset), ByteLen::new(len))
            .map(Exclusion::Range)
            .ok_or_else(|| {
                Error::new(ErrorKind::Invalid, "protect the device")
                    .detail(format!("{offset}+{len} is no range"))
            }),
    }
}

fn point(primary: &Arc<Primary>, request: PointRequest) -> Result<Answer> {
    let minimum = request
        .consistency
        .map(|text| {
            text.parse::<Consistency>()
                .map_err(|source| Error::new(ErrorKind::Invalid, "make a point").source(source))
        })
        .transpose()?;
    let options = PointOptions {
        minimum,
        label: text::label(&request.label)?,
    };
    let limit = Duration::from_millis(request.timeout_ms);
    primary
        .point(&request.volume, &options, limit)
        .map(|point| Answer::Point { point })
}

fn location(primary: &Arc<Primary>, volume: &str) -> Result<Answer> {
    let config = primary.config(volume)?;
    Ok(Answer::Location(Location {
        id: config.id.to_string(),
        store: config.store,
        key_file: config.key_file,
    }))
}

fn status(served: &Served, volume: Option<&str>) -> Result<Answer> {
    let mut open = served.exports.list();
    open.retain(|export| volume.is_none_or(|v| export.name == v || export.volume == v));
    let volumes = match served.primary.status(volume) {
        // A volume of which something is open need not be protected from here.
        Err(error) if error.kind() == ErrorKind::NotFound && !open.is_empty() => Vec::new(),
        volumes => volumes?,
    };
    Ok(Answer::Status { volumes, open })
}

fn open(served: &Served, request: OpenRequest) -> Result<Answer> {
    const OPEN: &str = "open a point";
    let wanted = match (request.point, request.branch) {
        (Some(point), _) => {
            let selector = text::selector(&point)?;
            match request.read_only {
                true => Wanted::Read(selector),
                false => Wanted::Write(selector, BranchPurpose::Open),
            }
        }
        (None, Some(branch)) => {
            let id = branch.parse();
            Wanted::Branch(id.map_err(|e| Error::new(ErrorKind::Invalid, OPEN).source(e))?)
        }
        (None, None) => return Err(Error::new(ErrorKind::Invalid, OPEN).detail("nothing to open")),
    };
    let (store, volume, key_file) = match request.store {
        Some(store) => {
            let volume = Store::open(&store)?.find(&request.volume)?;
            (store, volume, request.key_file)
        }
        None => {
            let config = served.primary.config(&request.volume)?;
            (
                config.store,
                config.id,
                request.key_file.or(config.key_file),
            )
        }
    };
    let export = served.exports.open(&ExportSpec {
        store,
        volume,
        key_file,
        wanted,
        socket: request.socket,
    })?;
    Ok(Answer::Export { export })
}
