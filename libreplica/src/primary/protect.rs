//! Protecting a device: everything that can be wrong is found before anything is changed,
//! and what was made is taken away again when a later step fails.

use std::path::Path;
use std::sync::Arc;

use hrl_format::VolumeKey;
use hrl_format::id::{Generation, VolumeId};
use hrl_format::units::Extent;

use crate::device::{BlockDevice, DevNo, Layers};
use crate::error::{Error, ErrorKind, Result};
use crate::geometry::Geometry;
use crate::key_file::read_key_file;
use crate::policy::Retention;
use crate::primary::config::{Phase, Rest, Shipping, VolumeConfig};
use crate::primary::environment::Environment;
use crate::primary::exclusions::Exclusions;
use crate::primary::fingerprint;
use crate::primary::inline::{Ending, Inline};
use crate::primary::member::{Member, Sink, Source, block_size};
use crate::primary::source::open_reader;
use crate::primary::spec::{Exclusion, ProtectSpec, Siblings};
use crate::store::{Store, VolumeSpec};
use crate::time::rfc3339;

const PROTECT: &str = "protect the device";

/// Attaches to the device and makes its place in the store. Durable when it returns.
///
/// # Errors
/// See [`crate::primary::Primary::protect`].
pub fn protect(
    environment: &Environment,
    spec: ProtectSpec,
    others: &[VolumeConfig],
) -> Result<(VolumeConfig, Member)> {
    let device = BlockDevice::open(&spec.device)?;
    let name = spec
        .name
        .clone()
        .unwrap_or_else(|| device.name().to_owned());
    refuse_taken(&device, &name, others)?;
    refuse_mixed(&device, &spec, others)?;
    refuse_cycles(&device, &spec, environment)?;
    if spec.siblings == Siblings::Refuse {
        refuse_siblings(&device, &spec, others)?;
    }
    let _: Retention = spec.retain.parse()?;
    let key = spec.key_file.as_deref().map(read_key_file).transpose()?;
    let geometry = Geometry {
        size: device.size(),
        block: block_size(spec.block, device.size()),
        sector: device.logical_sector(),
    };
    let excluded = excluded(&device, &geometry, &spec.exclude)?;
    let store = Store::open_or_create(&spec.store)?;
    let place = place(&store, &spec, &name, geometry, key.as_ref(), &device)?;
    let config = VolumeConfig {
        id: place.id,
        name,
        device: spec.device,
        size_bytes: device.size().get(),
        block_bytes: geometry.block.get(),
        store: spec.store,
        every: spec.every,
        retain: spec.retain,
        key_file: spec.key_file,
        group: spec.group,
        exclude: excluded.into_iter().map(Into::into).collect(),
        left_out: Vec::new(),
        spool: spec.spool,
        capture: spec.capture,
        phase: place.phase,
        shipping: Shipping::On,
        generation: Some(place.generation.into()),
        coming_home: None,
        rest: Rest::InUse,
        revision: 0,
    };
    let (source, inline) = attach(&config, device, environment)?;
    let is_new = place.new.is_some();
    let made = make_image(
        environment,
        &config,
        source.geometry(),
        &store,
        place.new,
        key.as_ref(),
    );
    match made {
        Ok(sink) => {
            let member = Member::with(&config, source, sink).served(inline);
            Ok((config, member))
        }
        Err(error) => {
            undo(environment, config.id, source, is_new.then_some(&store));
            inline.iter().for_each(|inline| end(inline));
            Err(error)
        }
    }
}

/// Begins to capture what changes.
fn attach(
    config: &VolumeConfig,
    device: BlockDevice,
    environment: &Environment,
) -> Result<(Source, Option<Arc<Inline>>)> {
    if !config.capture.is_inline() {
        return Ok((Source::attach(config, device, environment)?, None));
    }
    environment.state.make_volume_dir(config.id)?;
    // What changes before the first copy is copied by it.
    let begun = Inline::begin(config, &device, environment, |_| Ok(()));
    let (inline, _) = begun.inspect_err(|_| forget(environment, config.id))?;
    match Source::inline(config, device, &inline) {
        Ok(source) => Ok((source, Some(Arc::new(inline)))),
        Err(error) => {
            end(&inline);
            forget(environment, config.id);
            Err(error)
        }
    }
}

fn end(inline: &Inline) {
    if let Err(error) = inline.end(Ending::Volume) {
        tracing::warn!("something of a volume is left behind: {error}");
    }
}

fn forget(environment: &Environment, id: VolumeId) {
    if let Err(error) = environment.state.forget(id) {
        tracing::warn!(volume = %id, "something of it is left behind: {error}");
    }
}

/// Takes away what was made of a volume that cannot be protected after all; of the store,
/// if it is `new` there. Each step is tried, whatever became of the one before.
fn undo(environment: &Environment, id: VolumeId, source: Source, new: Option<&Store>) {
    let taken_back = new.map_or(Ok(()), |store| store.take_back_volume(id));
    for undone in [source.release(), environment.state.forget(id), taken_back] {
        match undone {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(volume = %id, "something of it is left behind: {error}");
            }
            _ => {}
        }
    }
}

/// Where a volume goes in the store.
struct Place {
    id: VolumeId,
    phase: Phase,
    generation: Generation,
    /// What to make there; none: the image is there.
    new: Option<VolumeSpec>,
}

fn make_image(
    environment: &Environment,
    config: &VolumeConfig,
    geometry: Geometry,
    store: &Store,
    new: Option<VolumeSpec>,
    key: Option<&VolumeKey>,
) -> Result<Sink> {
    if let Some(spec) = new {
        store.create_volume(spec)?;
    }
    let writer = config.writer(store, key.cloned())?;
    environment.state.save(config)?;
    Sink::new(config, geometry, writer, key, environment)
}

fn refuse_taken(device: &BlockDevice, name: &str, others: &[VolumeConfig]) -> Result<()> {
    for other in others {
        let same = other.device == device.path()
            || BlockDevice::open(&other.device).is_ok_and(|known| known.devno() == device.devno());
        if same {
            return Err(Error::new(ErrorKind::Exists, PROTECT)
                .path(device.path())
                .detail(format!(
                    "it is protected already, as volume {} ({})",
                    other.name, other.id
                ))
                .advice("`replica status` shows how it is"));
        }
        if other.name == name {
            return Err(Error::new(ErrorKind::Exists, PROTECT)
                .path(device.path())
                .detail(format!(
                    "the name `{name}` is taken by {} ({})",
                    other.device.display(),
                    other.id
                ))
                .advice("give it another --name"));
        }
    }
    Ok(())
}

/// A group's moment is a freeze, or a cut of streams; ranges are left out of copies only.
fn refuse_mixed(device: &BlockDevice, spec: &ProtectSpec, others: &[VolumeConfig]) -> Result<()> {
    let refused = |detail: String, advice: &str| {
        Err(Error::new(ErrorKind::Invalid, PROTECT)
            .path(device.path())
            .detail(detail)
            .advice(advice))
    };
    if spec.capture.is_inline() && !spec.exclude.is_empty() {
        return refused(
            "nothing can be left out where every write is captured".to_owned(),
            "leave --exclude away, or use --capture ebpf",
        );
    }
    let mixed = others.iter().find(|other| {
        spec.group.is_some()
            && other.group == spec.group
            && other.capture.is_inline() != spec.capture.is_inline()
    });
    match mixed {
        None => Ok(()),
        Some(other) => refused(
            format!(
                "{} of the same group is captured by {}",
                other.name,
                other.capture.as_str()
            ),
            "capture all volumes of a group by ebpf, or all by nbd or ublk",
        ),
    }
}

/// A store or a spool on the volume itself would be changed by each change it takes in; and on
/// another that is served by this agent, it would depend on itself.
fn refuse_cycles(
    device: &BlockDevice,
    spec: &ProtectSpec,
    environment: &Environment,
) -> Result<()> {
    let state_dir = environment.options.state_dir.clone();
    let layers = Layers::above(&[device])?;
    let state = spec.capture.is_inline().then_some(&state_dir);
    let places = [
        ("the state folder", state),
        ("the store", Some(&spec.store)),
        ("the spool", spec.spool.as_ref()),
    ];
    for (what, path) in places {
        if let Some(path) = path
            && layers.hold(path)?
        {
            return Err(Error::new(ErrorKind::Invalid, PROTECT)
                .path(device.path())
                .detail(format!(
                    "{what}, {}, lies on this very device",
                    path.display()
                ))
                .advice(
                    "choose a folder on another disk: each epoch would dirty the next, \
                         and the image would be lost with the disk",
                ));
        }
    }
    environment.refuse_served("the store", &spec.store)?;
    let spool = spec.spool.as_ref();
    spool.map_or(Ok(()), |spool| {
        environment.refuse_served("the spool", spool)
    })
}

/// Finds the disks that share a filesystem or a stacked device with this one.
fn refuse_siblings(
    device: &BlockDevice,
    spec: &ProtectSpec,
    others: &[VolumeConfig],
) -> Result<()> {
    let layers = Layers::above(&[device])?;
    let group: Vec<DevNo> = others
        .iter()
        .filter(|other| spec.group.is_some() && other.group == spec.group)
        .filter_map(|other| BlockDevice::open(&other.device).ok())
        .flat_map(|other| {
            Layers::above(&[&other])
                .map(|l| l.devices().collect())
                .unwrap_or_else(|_| vec![])
        })
        .collect();
    let missing: Vec<_> = layers
        .beside()
        .into_iter()
        .filter(|other| !group.contains(other))
        .map(|other| other.to_string())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Invalid, PROTECT)
        .path(device.path())
        .detail(format!(
            "it belongs together with {}, not protected in the same group",
            missing.join(", ")
        ))
        .advice(
            "protect each with the same --group, the first with --force; \
                 or leave the others out with --force",
        ))
}

fn excluded(
    device: &BlockDevice,
    geometry: &Geometry,
    exclude: &[Exclusion],
) -> Result<Vec<Extent>> {
    let place = |exclusion: &Exclusion| match exclusion {
        Exclusion::Range(extent) => range(device, *extent),
        Exclusion::Partition(path) => partition(device, path),
    };
    let excluded: Vec<Extent> = exclude.iter().map(place).collect::<Result<_>>()?;
    let is_nothing = |extent: &&Extent| Exclusions::new(geometry, [**extent]).ranges().is_empty();
    match excluded.iter().find(is_nothing) {
        None => Ok(excluded),
        Some(extent) => Err(Error::new(ErrorKind::Invalid, PROTECT)
            .path(device.path())
            .detail(format!(
                "only whole blocks are left out, and the range {extent} holds no whole block of \
                 {} bytes",
                geometry.block.get()
            ))
            .advice("name a longer range, or a smaller --block-size")),
    }
}

fn range(device: &BlockDevice, extent: Extent) -> Result<Extent> {
    extent.intersect(device.size().extent()).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, PROTECT)
            .path(device.path())
            .detail(format!(
                "the range {extent} lies past its {} bytes",
                device.size()
            ))
    })
}

fn partition(device: &BlockDevice, path: &Path) -> Result<Extent> {
    use std::os::unix::fs::MetadataExt;
    let number = std::fs::metadata(path).map(|meta| DevNo::from_stat(meta.rdev()));
    let found = device.partitions()?.into_iter().find(|partition| {
        number
            .as_ref()
            .is_ok_and(|number| *number == partition.devno)
    });
    found.map(|partition| partition.extent).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, PROTECT)
            .path(device.path())
            .detail(format!("{} is no partition of it", path.display()))
            .advice("name one of its partitions, or a range OFFSET+LENGTH")
    })
}

/// The volume's place in the store: a new one; or, with force, the image of that name,
/// carried over by hand or left by another state folder, which is then compared by
/// checksums so that only what differs is shipped.
fn place(
    store: &Store,
    spec: &ProtectSpec,
    name: &str,
    geometry: Geometry,
    key: Option<&VolumeKey>,
    device: &BlockDevice,
) -> Result<Place> {
    match store.find(name) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(id) if spec.siblings == Siblings::LeaveOut => {
            let (phase, generation) = seeded(store, id, geometry, key, device)?;
            return Ok(Place {
                id,
                phase,
                generation,
                new: None,
            });
        }
        Ok(id) => {
            return Err(Error::new(ErrorKind::Exists, PROTECT)
                .path(store.path())
                .detail(format!("the store has a volume `{name}` already: {id}"))
                .advice(
                    "give this one another --name; or --force to go on with that image, \
                         after comparing it by checksums",
                ));
        }
    }
    let mut volume = VolumeSpec::new(name, geometry)?;
    volume.key = key.map(VolumeKey::key_id);
    Ok(Place {
        id: volume.id,
        phase: Phase::Baseline,
        generation: volume.generation,
        new: Some(volume),
    })
}

fn seeded(
    store: &Store,
    id: VolumeId,
    geometry: Geometry,
    key: Option<&VolumeKey>,
    device: &BlockDevice,
) -> Result<(Phase, Generation)> {
    let writer = store.volume_writer(id, key.cloned())?;
    let catalogue = writer.catalogue();
    let generation = catalogue.generation.generation();
    if let Some(promotion) = catalogue.recovery.promotion() {
        // What is written there is the newest copy: nothing older may be shipped over it.
        return Err(Error::new(ErrorKind::Fenced, PROTECT)
            .path(store.path())
            .volume(id)
            .detail(format!(
                "its image is in use in place of the source, by `{}` since {}",
                promotion.host,
                rfc3339(promotion.time)
            ))
            .advice("`replica failback` brings the device up to date and takes over"));
    }
    if catalogue.size != geometry.size || catalogue.block != geometry.block {
        return Err(Error::new(ErrorKind::Resized, PROTECT)
            .path(store.path())
            .volume(id)
            .detail(format!(
                "its image has {} bytes in blocks of {}, the device {} in {}",
                catalogue.size,
                catalogue.block.get(),
                geometry.size,
                geometry.block.get()
            ))
            .advice("give the device another --name, or the same --block-size"));
    }
    if catalogue.base.is_none() {
        return Ok((Phase::Baseline, generation));
    }
    let mut reader = open_reader(device)?;
    let likeness = fingerprint::compare(&mut reader, &geometry, &mut writer.read_tip()?)?;
    if !likeness.agrees() {
        return Err(Error::new(ErrorKind::Foreign, PROTECT)
            .path(device.path())
            .volume(id)
            .detail(format!(
                "the image `{}` in the store is of another disk: of {} of its blocks that were \
                 looked at, the device has {}",
                catalogue.name, likeness.looked, likeness.same
            ))
            .advice("give the device another --name"));
    }
    let phase = Phase::Resync {
        cause: "the image was there before: seeding".to_owned(),
    };
    Ok((phase, generation))
}
