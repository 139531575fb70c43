//! What the daemon does for each request: the seam between the control socket and the
//! library's [`Primary`].

use std::sync::Arc;
use std::time::Duration;

use hrl_format::record::Consistency;
use hrl_format::units::{BlockSize, ByteLen, ByteOffset, Extent};
use libreplica::primary::{Exclusion, PointOptions, Primary, ProtectSpec, Siblings};
use libreplica::{Error, ErrorKind, Result};

use crate::control::protocol::{Answer, Exclude, Location, PointRequest, ProtectRequest, Request};
use crate::text;

/// Carries out `request`.
///
/// # Errors
/// Whatever it fails with; the server turns it into an answer.
pub fn answer(primary: &Arc<Primary>, request: Request) -> Result<Answer> {
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
        Request::Status { volume } => primary
            .status(volume.as_deref())
            .map(|volumes| Answer::Status { volumes }),
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
