//! The tree in its file, updated in place: header (4096 bytes), region entries (40 bytes
//! each), then from the next 4-KiB boundary the leaves (16 bytes each). A file made
//! new is sparse: zeroes say "unknown". 16 TiB of 64-KiB blocks take 4 GiB.
//!
//! A region's digest guards its leaves, a CRC32 each region entry and the header; what
//! is damaged is found when it is read and never taken for knowledge. An update marks
//! the file first ([`super::Update`]), so that a crash in the middle is seen.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hrl_format::id::{Generation, VolumeId};
use hrl_format::record::Root;
use hrl_format::units::{ByteOffset, Epoch};

use super::header::{BadHeader, HEADER_SPACE, Header};
use super::leaf::{Leaf, LeafFunction};
use super::region::{
    LEAVES_PER_REGION, RegionDigest, RegionEntry, RegionNumber, RootHasher, Stored,
};
use super::update::Update;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::geometry::{BlockNumber, Geometry, Run};

/// How many region entries are read at a time.
const ENTRIES_PER_READ: usize = 1024;

/// Whose tree it is. A tree is opened only as what it was created as.
#[derive(Clone, Debug)]
pub struct TreeSpec {
    /// The volume whose blocks it describes.
    pub volume: VolumeId,
    /// The generation whose epochs it follows.
    pub generation: Generation,
    /// The volume's size and block size.
    pub geometry: Geometry,
    /// How its leaves are made.
    pub function: LeafFunction,
}

/// Whether the tree can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeState {
    /// It says what the volume was at the end of this epoch; zero before the first.
    Clean {
        /// The last epoch applied.
        epoch: Epoch,
    },
    /// The agent died while `applying` was applied over `epoch`. Leaves may be of either.
    /// Apply the same changes of `applying` again, from its log, or create the tree anew.
    Interrupted {
        /// The last epoch applied as a whole.
        epoch: Epoch,
        /// The epoch to be applied again.
        applying: Epoch,
    },
}

/// The digest tree of one volume, in its file.
///
/// ```
/// use libreplica::digest::{DigestTree, LeafFunction, TreeSpec};
/// use libreplica::geometry::{BlockNumber, Geometry};
/// use libreplica::id::{Generation, VolumeId};
/// use libreplica::units::{BlockSize, Epoch, SectorSize, VolumeSize};
///
/// let function = LeafFunction::plain();
/// let spec = TreeSpec {
///     volume: VolumeId::random()?,
///     generation: Generation::default(),
///     geometry: Geometry { size: VolumeSize::new(8192), block: BlockSize::MIN, sector: SectorSize::B512 },
///     function: function.clone(),
/// };
/// let folder = tempfile::tempdir()?;
/// let mut tree = DigestTree::create(&folder.path().join("tree"), &spec)?;
/// let blocks = [0, 1].map(BlockNumber::new);
/// tree.apply(Epoch::new(1), blocks.map(|n| (n, Some(function.leaf(n, &[5; 4096])))))?;
/// assert!(tree.root().is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DigestTree {
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) header: Header,
    function: LeafFunction,
}

impl DigestTree {
    /// Creates the file at `path`, with every leaf unknown.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if there is a file already; [`ErrorKind::Full`], or
    /// [`ErrorKind::Io`] if it cannot be written.
    pub fn create(path: &Path, spec: &TreeSpec) -> Result<Self> {
        let operation = "create the digest tree";
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .at(operation, path)?;
        let tree = Self {
            file,
            path: path.to_owned(),
            header: Header {
                volume: spec.volume,
                generation: spec.generation,
                geometry: spec.geometry,
                function: spec.function.id(),
                epoch: Epoch::ZERO,
                applying: None,
                root: None,
            },
            function: spec.function.clone(),
        };
        tree.file.set_len(tree.file_len()).at(operation, path)?;
        tree.write_header()?;
        tree.file.sync_all().at(operation, path)?;
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("."));
        let handle = File::open(folder).at(operation, folder)?;
        handle.sync_all().at(operation, folder)?;
        Ok(tree)
    }

    /// Opens the tree at `path`, which must have been created with the same `spec`. Ask
    /// [`Self::state`] next.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Damaged`] if the header is not whole or the
    /// file too short; [`ErrorKind::Unsupported`] for a later version;
    /// [`ErrorKind::Foreign`] if it is of another volume or generation;
    /// [`ErrorKind::Resized`] if of another size or block size; [`ErrorKind::Key`] if made
    /// with another key, or with one, or without. All but the first mean: remove it, create it
    /// anew, and resync.
    pub fn open(path: &Path, spec: &TreeSpec) -> Result<Self> {
        let operation = "open the digest tree";
        let refuse = |kind, detail: String| {
            let error = Error::new(kind, operation).path(path).detail(detail);
            Err(error.advice("a resync makes it anew"))
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .at(operation, path)?;
        let present = file.metadata().at(operation, path)?.len();
        if present < HEADER_SPACE {
            return refuse(ErrorKind::Damaged, format!("only {present} bytes long"));
        }
        let mut bytes = [0; Header::LEN];
        file.read_exact_at(&mut bytes, 0).at(operation, path)?;
        let header = match Header::decode(&bytes) {
            Ok(header) => header,
            Err(BadHeader::Magic) => return refuse(ErrorKind::Damaged, "not a digest tree".into()),
            Err(BadHeader::Damaged) => {
                return refuse(ErrorKind::Damaged, "its header is damaged".into());
            }
            Err(BadHeader::Version(version)) => {
                return refuse(
                    ErrorKind::Unsupported,
                    format!("version {version} of the format"),
                );
            }
        };
        if header.volume != spec.volume {
            return refuse(
                ErrorKind::Foreign,
                format!("it is of volume {}, not {}", header.volume, spec.volume),
            );
        }
        if header.generation != spec.generation {
            return refuse(
                ErrorKind::Foreign,
                format!(
                    "it is of generation {}, not {}",
                    header.generation.number, spec.generation.number
                ),
            );
        }
        let units = |geometry: &Geometry| (geometry.size, geometry.block);
        if units(&header.geometry) != units(&spec.geometry) {
            return refuse(
                ErrorKind::Resized,
                format!(
                    "it is of {} bytes in blocks of {}, not {} in {}",
                    header.geometry.size,
                    header.geometry.block.get(),
                    spec.geometry.size,
                    spec.geometry.block.get()
                ),
            );
        }
        if header.function != spec.function.id() {
            return refuse(
                ErrorKind::Key,
                "its leaves were made with another key".into(),
            );
        }
        let tree = Self {
            file,
            path: path.to_owned(),
            header,
            function: spec.function.clone(),
        };
        if present != tree.file_len() {
            return refuse(
                ErrorKind::Damaged,
                format!("{present} bytes long, {} expected", tree.file_len()),
            );
        }
        Ok(tree)
    }

    /// Whether it can be trusted, and up to which epoch it goes.
    pub const fn state(&self) -> TreeState {
        let epoch = self.header.epoch;
        match self.header.applying {
            None => TreeState::Clean { epoch },
            Some(applying) => TreeState::Interrupted { epoch, applying },
        }
    }

    /// The volume's size and block size.
    pub const fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// How its leaves are made.
    pub const fn function(&self) -> &LeafFunction {
        &self.function
    }

    /// The root after the last epoch; `None` if a leaf is unknown or an update was
    /// interrupted.
    pub const fn root(&self) -> Option<Root> {
        match self.header.applying {
            None => self.header.root,
            Some(_) => None,
        }
    }

    /// Starts an update to the state at the end of `epoch`.
    ///
    /// # Errors
    /// [`ErrorKind::State`] if `epoch` is not after the last one, or an interrupted update to
    /// another epoch must be redone first; else as for writing the file.
    pub fn update(&mut self, epoch: Epoch) -> Result<Update<'_>> {
        Update::begin(self, epoch)
    }

    /// Updates to the state at the end of `epoch`: these blocks have these leaves now; `None`
    /// makes a leaf unknown. Ascending order is fastest.
    ///
    /// # Errors
    /// As [`Self::update`], [`Update::set`] and [`Update::finish`].
    pub fn apply<I>(&mut self, epoch: Epoch, changes: I) -> Result<()>
    where
        I: IntoIterator<Item = (BlockNumber, Option<Leaf>)>,
    {
        let mut update = self.update(epoch)?;
        for (block, leaf) in changes {
            update.set(block, leaf)?;
        }
        update.finish()
    }

    /// The leaf of `block`; `None` if it is unknown.
    ///
    /// # Errors
    /// As [`Self::leaves`].
    pub fn get(&self, block: BlockNumber) -> Result<Option<Leaf>> {
        let end = BlockNumber::new(block.get().saturating_add(1));
        self.leaves(Run { start: block, end })
            .next()
            .map_or(Ok(None), |item| item.map(|(_, leaf)| leaf))
    }

    /// The leaves of `run`, cut at the volume's end, in order. Reads a region (16 KiB) at a
    /// time. An item is an error if its region is damaged ([`ErrorKind::Damaged`]) or cannot be
    /// read; the iteration ends with it.
    pub fn leaves(&self, run: Run) -> Leaves<'_> {
        Leaves {
            tree: self,
            next: run.start.get(),
            end: run.end.get().min(self.header.geometry.blocks()),
            region: Vec::new(),
        }
    }

    /// The digests of all regions, in order: `None` for a region with an unknown leaf.
    /// An item is an error if its entry is damaged or cannot be read; the iteration ends
    /// with it.
    pub const fn regions(&self) -> Regions<'_> {
        Regions {
            tree: self,
            next: 0,
            buffer: Vec::new(),
            at: 0,
        }
    }

    /// Reads everything and names the regions whose digest is not that of their leaves, or
    /// whose entry is damaged. After an interrupted update these may be many.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn check(&self) -> Result<Vec<RegionNumber>> {
        let mut damaged = Vec::new();
        for number in (0..RegionNumber::count(&self.header.geometry)).map(RegionNumber::new) {
            match self.read_region(number) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Damaged => damaged.push(number),
                Err(error) => return Err(error),
            }
        }
        Ok(damaged)
    }

    /// The leaves of a region as stored, checked against its digest.
    pub(super) fn read_region(&self, number: RegionNumber) -> Result<Vec<u8>> {
        let mut entry = [0; RegionEntry::LEN];
        self.file
            .read_exact_at(&mut entry, entry_offset(number))
            .at("read the digest tree", &self.path)?;
        let leaves = self.read_region_unchecked(number)?;
        match RegionEntry::decode(number, &entry) {
            Some(stored) if stored.agrees_with(number, &leaves) => Ok(leaves),
            _ => Err(self.damaged(number)),
        }
    }

    pub(super) fn read_region_unchecked(&self, number: RegionNumber) -> Result<Vec<u8>> {
        let count = number.blocks(&self.header.geometry).count();
        let mut leaves = vec![0; count as usize * Leaf::LEN];
        self.file
            .read_exact_at(&mut leaves, self.leaves_offset(number))
            .at("read the digest tree", &self.path)?;
        Ok(leaves)
    }

    pub(super) fn write_region(&self, number: RegionNumber, leaves: &[u8]) -> Result<()> {
        let entry = RegionEntry::of(number, leaves).encode(number);
        self.file
            .write_all_at(leaves, self.leaves_offset(number))
            .and_then(|()| self.file.write_all_at(&entry, entry_offset(number)))
            .at("update the digest tree", &self.path)
    }

    pub(super) fn write_header(&self) -> Result<()> {
        self.file
            .write_all_at(&self.header.encode(), 0)
            .at("update the digest tree", &self.path)
    }

    pub(super) fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .at("flush the digest tree", &self.path)
    }

    /// The root from the region entries; `None` if a leaf is unknown.
    pub(super) fn compute_root(&self) -> Result<Option<Root>> {
        let mut hasher = RootHasher::new(&self.header.geometry, &self.function);
        for region in self.regions() {
            match region? {
                (_, Some(digest)) => hasher.region(&digest),
                (_, None) => return Ok(None),
            }
        }
        Ok(Some(hasher.finish()))
    }

    fn damaged(&self, number: RegionNumber) -> Error {
        Error::new(ErrorKind::Damaged, "read the digest tree")
            .path(&self.path)
            .offset(ByteOffset::new(self.leaves_offset(number)))
            .detail(format!("region {number} is not what its digest says"))
            .advice("a resync makes the tree anew")
    }

    fn leaves_offset(&self, number: RegionNumber) -> u64 {
        leaves_start(&self.header.geometry) + number.get() * LEAVES_PER_REGION * Leaf::LEN as u64
    }

    fn file_len(&self) -> u64 {
        let geometry = &self.header.geometry;
        leaves_start(geometry) + geometry.blocks() * Leaf::LEN as u64
    }
}

fn entry_offset(number: RegionNumber) -> u64 {
    HEADER_SPACE + number.get() * RegionEntry::LEN as u64
}

fn leaves_start(geometry: &Geometry) -> u64 {
    entry_offset(RegionNumber::new(RegionNumber::count(geometry))).next_multiple_of(4096)
}

/// Leaves in order; see [`DigestTree::leaves`].
#[derive(Debug)]
pub struct Leaves<'a> {
    tree: &'a DigestTree,
    next: u64,
    end: u64,
    /// The leaves, as stored, of the region that `next` is in; empty before it is read.
    region: Vec<u8>,
}

impl Iterator for Leaves<'_> {
    type Item = Result<(BlockNumber, Option<Leaf>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let block = BlockNumber::new(self.next);
        let within = (self.next % LEAVES_PER_REGION) as usize;
        if self.region.is_empty() || within == 0 {
            match self.tree.read_region(RegionNumber::of(block)) {
                Ok(leaves) => self.region = leaves,
                Err(error) => {
                    self.end = self.next;
                    return Some(Err(error));
                }
            }
        }
        self.next += 1;
        let mut leaf = [0; Leaf::LEN];
        leaf.copy_from_slice(&self.region[within * Leaf::LEN..][..Leaf::LEN]);
        Some(Ok((block, Leaf::from_stored(leaf))))
    }
}

/// Region digests in order; see [`DigestTree::regions`].
#[derive(Debug)]
pub struct Regions<'a> {
    tree: &'a DigestTree,
    next: u64,
    buffer: Vec<u8>,
    at: usize,
}

impl Regions<'_> {
    fn fill(&mut self, left: u64) -> Result<()> {
        let entries = left.min(ENTRIES_PER_READ as u64) as usize;
        self.buffer.resize(entries * RegionEntry::LEN, 0);
        self.at = 0;
        let offset = entry_offset(RegionNumber::new(self.next));
        self.tree
            .file
            .read_exact_at(&mut self.buffer, offset)
            .at("read the digest tree", &self.tree.path)
    }
}

impl Iterator for Regions<'_> {
    type Item = Result<(RegionNumber, Option<RegionDigest>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let geometry = &self.tree.header.geometry;
        let count = RegionNumber::count(geometry);
        if self.next >= count {
            return None;
        }
        if self.at == self.buffer.len()
            && let Err(error) = self.fill(count - self.next)
        {
            self.next = count;
            return Some(Err(error));
        }
        let number = RegionNumber::new(self.next);
        let mut bytes = [0; RegionEntry::LEN];
        bytes.copy_from_slice(&self.buffer[self.at..][..RegionEntry::LEN]);
        self.at += RegionEntry::LEN;
        self.next += 1;
        match RegionEntry::decode(number, &bytes) {
            Some(Stored::Blank) => Some(Ok((number, None))),
            Some(Stored::Entry(entry)) => {
                let whole = u64::from(entry.known) == number.blocks(geometry).count();
                Some(Ok((number, whole.then_some(entry.digest))))
            }
            None => {
                self.next = count;
                Some(Err(self.tree.damaged(number)))
            }
        }
    }
}
