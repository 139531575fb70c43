//! What the daemon does for each request: the seam between the control socket and the
//! library's [`Primary`].

use std::sync::Arc;
use std::time::Duration;

use hrl_format::id::Generation;
use hrl_format::record::Consistency;
use hrl_format::units::{BlockSize, ByteLen, ByteOffset, Extent, GenerationNumber};
use libreplica::primary::{Exclusion, PointOptions, Primary, ProtectSpec, Siblings};
use libreplica::replica::{Adopted, ExportSpec, Exports, Wanted, Written};
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
    /// The stores' volumes that it was told of.
    pub adopted: Adopted,
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
        Request::Unprotect { volume } => match primary.unprotect(&volume) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                // What was only adopted is forgotten by the same word.
                let forgotten = served.adopted.forget(&volume);
                forgotten.map_err(|_| error).map(|()| Answer::Done)
            }
            done => done.map(|()| Answer::Done),
        },
        Request::Retire { volume } => primary.retire(&volume).map(|()| Answer::Done),
        Request::PrepareHomecoming { volume } => {
            let path = primary.prepare_homecoming(&volume)?;
            Ok(Answer::Device { path })
        }
        Request::AnnounceHomecoming {
            volume,
            number,
            generation,
        } => {
            let wrong = |e| Error::new(ErrorKind::Invalid, "bring the volume home").source(e);
            let coming = Generation {
                number: GenerationNumber::new(number),
                id: generation.parse().map_err(wrong)?,
            };
            let announced = primary.announce_homecoming(&volume, coming);
            announced.map(|()| Answer::Done)
        }
        Request::CameHome { volume } => primary.came_home(&volume).map(|()| Answer::Done),
        Request::Adopt {
            store,
            volume,
            key_file,
        } => {
            let (volume, key_file) = (volume.as_deref(), key_file.as_deref());
            let volumes = served.adopted.adopt(&store, volume, key_file)?;
            Ok(Answer::Adopted { volumes })
        }
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
        Request::Location { volume } => location(served, &volume).map(Answer::Location),
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

/// Where a volume lies that is protected from here, or adopted.
fn location(served: &Served, volume: &str) -> Result<Location> {
    match served.primary.config(volume) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let adopted = served.adopted.find(volume)?;
            Ok(Location {
                id: adopted.volume,
                store: adopted.store,
                key_file: adopted.key_file,
            })
        }
        config => config.map(|config| Location {
            id: config.id.to_string(),
            store: config.store,
            key_file: config.key_file,
        }),
    }
}

fn status(served: &Served, volume: Option<&str>) -> Result<Answer> {
    let mut open = served.exports.list();
    open.retain(|export| volume.is_none_or(|v| export.name == v || export.volume == v));
    let mut adopted = served.adopted.list();
    adopted.retain(|a| volume.is_none_or(|v| a.volume.name == v || a.volume.volume == v));
    let is_known = !open.is_empty() || !adopted.is_empty();
    let volumes = match served.primary.status(volume) {
        // A volume of which something is open need not be protected from here.
        Err(error) if error.kind() == ErrorKind::NotFound && is_known => Vec::new(),
        volumes => volumes?,
    };
    Ok(Answer::Status {
        volumes,
        open,
        adopted,
    })
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
            let at = location(served, &request.volume)?;
            let id = at.id.parse();
            let id = id.map_err(|e| Error::new(ErrorKind::Damaged, OPEN).source(e))?;
            (at.store, id, request.key_file.or(at.key_file))
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
