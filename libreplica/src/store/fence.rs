//! The fence: a volume has one primary, that of its newest generation. Whoever was promoted
//! made a new generation under the volume's lock; an older primary that comes back is told so,
//! with where and when, and what it may do. Two generations of one number are a fork (a copy of
//! the store was put back, or two were promoted apart): refused with both named, for nobody can
//! say which of them is to stay.

use hrl_format::id::Generation;

use super::catalogue::Catalogue;
use super::recovery::Recovery;
use crate::error::{Error, ErrorKind, Result};
use crate::time::rfc3339;

const FENCE: &str = "write to the volume";

/// Whether a primary of `theirs` may write to the volume.
pub(super) fn check(catalogue: &Catalogue, theirs: Generation) -> Result<()> {
    let ours = catalogue.generation.generation();
    if ours == theirs {
        return Ok(());
    }
    let error = |kind| Error::new(kind, FENCE).volume(catalogue.volume);
    if ours.number > theirs.number {
        let (who, advice) = told(&catalogue.recovery);
        return Err(error(ErrorKind::Fenced)
            .detail(format!(
                "it was promoted to generation {}, and this is the primary of generation {}{who}",
                ours.number, theirs.number
            ))
            .advice(advice));
    }
    if ours.number == theirs.number {
        return Err(error(ErrorKind::Foreign)
            .detail(format!(
                "a fork: the store holds generation {} {}, and this is the primary of {}",
                ours.number, ours.id, theirs.id
            ))
            .advice("decide which side is to stay: `replica reprotect VOLUME --discard SIDE`"));
    }
    Err(error(ErrorKind::Foreign)
        .detail(format!(
            "the store holds generation {}, older than this primary's {}: an older copy of the \
             store was put in its place",
            ours.number, theirs.number
        ))
        .advice("give the volume its newer store back, or protect it into another one"))
}

/// Where it was promoted, and what the old primary may do.
fn told(recovery: &Recovery) -> (String, &'static str) {
    let who = recovery.promotion().map_or(String::new(), |promotion| {
        let time = rfc3339(promotion.time);
        format!("; `{}` took over at {time}", promotion.host)
    });
    let advice = match recovery {
        Recovery::Replicating => {
            "another side is its primary now; `replica unprotect` here, or `replica failback` to \
             take it back"
        }
        Recovery::FailedOver(_) | Recovery::Committed(_) => {
            "do not use this side's disk: it is behind. On the other side `replica commit` and \
             `replica reprotect`, then `replica failback` here"
        }
        Recovery::Reversing(_) => {
            "do not use this side's disk: `replica failback` brings it up to date and takes over"
        }
    };
    (who, advice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::geometry::Geometry;
    use crate::store::{Store, VolumeSpec};
    use crate::units::{BlockSize, GenerationNumber, SectorSize, VolumeSize};
    use hrl_format::id::GenerationId;

    #[test]
    fn only_the_newest_generation_writes() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::create(&folder.path().join("store")).unwrap();
        let geometry = Geometry {
            size: VolumeSize::new(1 << 20),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        };
        let id = store
            .create_volume(VolumeSpec::new("v", geometry).unwrap())
            .unwrap();
        let reader = store.volume(id, None).unwrap();
        let ours = reader.catalogue().unwrap().generation.generation();
        drop(store.volume_writer_of(id, None, ours).unwrap());
        let kind = |generation: Generation| {
            let refused = store.volume_writer_of(id, None, generation);
            refused.unwrap_err().kind()
        };
        let fork = Generation {
            id: GenerationId::random().unwrap(),
            ..ours
        };
        assert_eq!(kind(fork), ErrorKind::Foreign);
        let older = Generation {
            number: GenerationNumber::new(0),
            ..ours
        };
        assert_eq!(kind(older), ErrorKind::Fenced);
        let newer = Generation {
            number: GenerationNumber::new(2),
            ..ours
        };
        assert_eq!(kind(newer), ErrorKind::Foreign);
        // Whoever holds the lock does not hide it.
        let _holder = store.volume_writer(id, None).unwrap();
        assert_eq!(kind(older), ErrorKind::Fenced);
        assert_eq!(kind(ours), ErrorKind::Busy);
    }
}
