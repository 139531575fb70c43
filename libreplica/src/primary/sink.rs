//! The target side of a volume: its image in the store, and the digest tree that says
//! what the image holds.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use hrl_format::VolumeKey;
use hrl_format::units::{Epoch, Timestamp};

use crate::digest::{DigestTree, LeafFunction, TreeSpec, TreeState};
use crate::error::{ErrorKind, IoContext, Result};
use crate::geometry::{BlockNumber, Geometry};
use crate::key_file::read_key_file;
use crate::policy::Retention;
use crate::primary::config::VolumeConfig;
use crate::primary::environment::Environment;
use crate::primary::exclusions::blocks_of;
use crate::primary::status::{PointSummary, SpaceSummary, VolumeStatus, WaitingLogs};
use crate::store::{Store, VolumeWriter};

/// Bytes of the image read at a time while the tree is made anew.
const READ: usize = 4 << 20;

/// The target side of a volume.
#[derive(Debug)]
pub struct Sink {
    /// The image.
    pub writer: VolumeWriter,
    /// What the image holds.
    pub tree: DigestTree,
    /// How the tree's leaves are made.
    pub function: LeafFunction,
    retention: Retention,
    tree_path: PathBuf,
    spec: TreeSpec,
}

impl Sink {
    /// Opens the image and the tree, and brings the tree up to the image's newest epoch.
    ///
    /// # Errors
    /// When the store cannot be opened for writing, or the key is not the volume's. A tree
    /// that is missing or damaged is no error: it is made anew. If the image is older than the
    /// tree, `note` is given the cause, and must make it durable.
    pub fn bring_up(
        config: &VolumeConfig,
        geometry: Geometry,
        environment: &Environment,
        note: impl FnOnce(&str) -> Result<()>,
    ) -> Result<Self> {
        let key = config.key_file.as_deref().map(read_key_file).transpose()?;
        environment.refuse_served("the store", &config.store)?;
        let store = Store::open(&config.store)?;
        let writer = config.writer(&store, key.clone())?;
        let mut sink = Self::new(config, geometry, writer, key.as_ref(), environment)?;
        if sink.has_image() {
            if let Some(cause) = sink.is_not_as_it_was_left() {
                note(&cause)?;
            }
            sink.make_tree_current()?;
        }
        Ok(sink)
    }

    /// Why the image is not the one that this agent wrote to last. Epochs that it lacks were
    /// acknowledged: nothing else tells what they brought.
    fn is_not_as_it_was_left(&self) -> Option<String> {
        let newest = self.writer.catalogue().last_epoch();
        let (TreeState::Clean { epoch: known }
        | TreeState::Interrupted {
            applying: known, ..
        }) = self.tree.state();
        (known > newest).then(|| {
            format!(
                "the store ends in epoch {newest}, and epoch {known} was in it: an older copy \
                 was put in its place"
            )
        })
    }

    /// The sink of an image that is open already, with the tree as it is.
    ///
    /// # Errors
    /// As [`Self::bring_up`].
    pub fn new(
        config: &VolumeConfig,
        geometry: Geometry,
        writer: VolumeWriter,
        key: Option<&VolumeKey>,
        environment: &Environment,
    ) -> Result<Self> {
        let function = LeafFunction::for_volume(key);
        let spec = TreeSpec {
            volume: config.id,
            generation: writer.catalogue().generation.generation(),
            geometry,
            function: function.clone(),
        };
        let tree_path = environment.state.volume_dir(config.id).join("tree");
        let tree = match DigestTree::open(&tree_path, &spec) {
            Ok(tree) => tree,
            Err(error) => {
                if error.kind() != ErrorKind::NotFound {
                    tracing::warn!(volume = %config.id, "{error}");
                }
                renew(&tree_path, &spec)?
            }
        };
        let retention = config.retain.parse()?;
        Ok(Self {
            writer,
            tree,
            function,
            retention,
            tree_path,
            spec,
        })
    }

    /// Begins the tree anew, with every leaf unknown.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn renew_tree(&mut self) -> Result<()> {
        self.tree = renew(&self.tree_path, &self.spec)?;
        Ok(())
    }

    /// Brings the tree up to the image's newest epoch: by the epochs that it lacks, if
    /// their logs are there, else from the whole image.
    ///
    /// # Errors
    /// When image or tree cannot be read.
    pub fn make_tree_current(&mut self) -> Result<()> {
        let newest = self.writer.catalogue().last_epoch();
        let from = match self.tree.state() {
            TreeState::Clean { epoch } if epoch == newest && self.tree.root().is_some() => {
                return Ok(());
            }
            TreeState::Clean { epoch } if epoch < newest && epoch > Epoch::ZERO => Some(epoch),
            TreeState::Interrupted { epoch, applying }
                if applying <= newest && epoch > Epoch::ZERO =>
            {
                Some(epoch)
            }
            _ => None,
        };
        let changed = from.map_or(Ok(None), |epoch| self.writer.changed_since(epoch))?;
        if let Some(changed) = changed {
            match self.update_from_image(newest, changed) {
                Ok(()) if self.tree.root().is_some() => return Ok(()),
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::Damaged => {}
                Err(error) => return Err(error),
            }
        }
        self.renew_tree()?;
        let whole = self.spec.geometry.size.extent();
        self.update_from_image(newest, vec![whole])
    }

    fn update_from_image(
        &mut self,
        epoch: Epoch,
        extents: Vec<hrl_format::units::Extent>,
    ) -> Result<()> {
        let geometry = self.spec.geometry;
        let mut image = self.writer.read_tip()?;
        let mut buffer = vec![0; READ];
        let (tree, function) = (&mut self.tree, &self.function);
        // An interrupted update names the epoch that it must end in.
        let target = match tree.state() {
            TreeState::Interrupted { applying, .. } => applying,
            TreeState::Clean { .. } => epoch,
        };
        let mut update = tree.update(target)?;
        for extent in blocks_of(&geometry, extents) {
            let mut at = extent.offset().get();
            while at < extent.end().get() {
                let len = (extent.end().get() - at).min(READ as u64) as usize;
                let data = &mut buffer[..len];
                image.read_at(hrl_format::units::ByteOffset::new(at), data)?;
                let block = u64::from(geometry.block.get());
                for (n, bytes) in (at / block..).zip(data.chunks(block as usize)) {
                    let number = BlockNumber::new(n);
                    update.set(number, Some(function.leaf(number, bytes)))?;
                }
                at += len as u64;
            }
        }
        update.finish()?;
        if target < epoch {
            self.tree.apply(epoch, [])?;
        }
        Ok(())
    }

    /// Drops points that the policy no longer keeps. What they alone needed is folded step by
    /// step: [`VolumeWriter::fold_step`].
    ///
    /// # Errors
    /// When the store cannot be written.
    pub fn retain(&mut self) -> Result<()> {
        self.writer
            .retain(&self.retention, Timestamp::now())
            .map(drop)
    }

    /// Whether a first copy has ended in this image.
    pub fn has_image(&self) -> bool {
        self.writer.catalogue().base.is_some()
    }

    /// The time of the newest point.
    pub fn newest_time(&self) -> Option<Timestamp> {
        let points = &self.writer.catalogue().points;
        points.last().map(|point| point.time)
    }

    /// When the newest point was: what was written before is in the image. After a restart nothing
    /// better is known of the age of what is dirty.
    pub fn newest_moment(&self) -> Instant {
        let now = Instant::now();
        let age = self.newest_time().and_then(|time| {
            let nanos = Timestamp::now().as_nanos() - time.as_nanos();
            u64::try_from(nanos).ok().map(Duration::from_nanos)
        });
        age.and_then(|age| now.checked_sub(age)).unwrap_or(now)
    }

    /// Writes what the store knows into `status`.
    pub fn describe(&self, status: &mut VolumeStatus) {
        let catalogue = self.writer.catalogue();
        status.epoch = catalogue.last_epoch().get();
        status.generation = catalogue.generation.number.get();
        let waiting = catalogue.waiting();
        status.compaction_waits = WaitingLogs {
            logs: waiting.logs,
            bytes: waiting.bytes.get(),
        };
        status.space = Some(SpaceSummary::from(&self.writer.space()));
        if let Some(point) = catalogue.points.last()
            && status
                .last_point
                .as_ref()
                .is_none_or(|last| last.epoch != point.epoch.get())
        {
            status.last_point = Some(PointSummary::from(point));
        }
    }
}

fn renew(path: &std::path::Path, spec: &TreeSpec) -> Result<DigestTree> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).at("remove the old digest tree", path)?;
        }
        _ => {}
    }
    DigestTree::create(path, spec)
}
