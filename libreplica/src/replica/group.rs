//! The volumes that belong together, seen from the store: those of which points were made in one
//! moment, as the disks of a machine are protected (`protect --group`). Who recovers one of
//! them recovers the others as they were then.

use hrl_format::VolumeKey;

use super::failover::Choice;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{PointId, VolumeId};
use crate::record::Consistency;
use crate::store::{Point, PointSelector, Store, VolumeReader};

const GROUP: &str = "find the volumes of the group";

/// A volume of a group, and its part of the group's point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupMember {
    /// The volume.
    pub volume: VolumeId,
    /// What it is called.
    pub name: String,
    /// Its point.
    pub point: PointId,
}

/// The volumes of `store` that share a point with `volume`, itself among them, by name. Which
/// point: the one that is meant if it is the group's, of a time the newest of the group at or
/// before it. `key` opens those that are encrypted: without it nobody can tell which points
/// belong together.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is no such point; [`ErrorKind::Invalid`] for a moment between
/// points, which is one volume's; [`ErrorKind::Key`]; those of reading the store.
pub fn group_of(
    store: &Store,
    volume: VolumeId,
    key: Option<&VolumeKey>,
    choice: Choice,
) -> Result<Vec<GroupMember>> {
    let own = reader(store, volume, key)?;
    let points = own.points()?;
    let point = choose(&own, &points, choice)?;
    let group = point.and_then(|point| point.group).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, GROUP)
            .volume(volume)
            .detail("it has no such recovery point that was made together with another volume's")
            .advice("`replica points --json` shows which have a `group`")
    })?;
    let mut members = Vec::new();
    for entry in store.volumes()? {
        let Ok(catalogue) = entry.catalogue else {
            continue;
        };
        let points = reader(store, entry.id, key)?.points()?;
        let part = points.into_iter().find(|point| point.group == Some(group));
        members.extend(part.map(|point| GroupMember {
            volume: entry.id,
            name: catalogue.name,
            point: point.id,
        }));
    }
    members.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(members)
}

fn reader(store: &Store, volume: VolumeId, key: Option<&VolumeKey>) -> Result<VolumeReader> {
    let plain = store.volume(volume, None)?;
    match (plain.catalogue()?.key, key) {
        // Of another's key nothing can be told: it is no volume of this group.
        (Some(id), Some(key)) if key.key_id() == id => store.volume(volume, Some(key.clone())),
        _ => Ok(plain),
    }
}

fn choose<'a>(
    own: &VolumeReader,
    points: &'a [Point],
    choice: Choice,
) -> Result<Option<&'a Point>> {
    let newest = |is_it: &dyn Fn(&Point) -> bool| {
        let mut newest_first = points.iter().rev();
        newest_first.find(|point| point.group.is_some() && is_it(point))
    };
    Ok(match choice {
        Choice::Latest | Choice::LatestProcessed => newest(&|_| true),
        Choice::LatestApplication => newest(&|p| p.consistency == Consistency::Application),
        Choice::State(PointSelector::Latest) => newest(&|_| true),
        Choice::State(PointSelector::AtOrBefore(time)) => newest(&|point| point.time <= time),
        Choice::State(PointSelector::Id(id)) => newest(&|point| point.id == id),
        Choice::State(PointSelector::Moment(moment)) => {
            return Err(Error::new(ErrorKind::Invalid, GROUP)
                .volume(own.id())
                .detail(format!("{moment} is a moment of one volume alone"))
                .advice("name a point, or a time"));
        }
    })
}
