//! The tree against a model that keeps every block's content, with crashes between the
//! marks, and with damage.

use std::env;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use hrl_format::id::{Generation, GenerationId, VolumeId};
use hrl_format::record::Root;
use hrl_format::units::{BlockSize, ByteLen, Epoch, GenerationNumber, SectorSize, VolumeSize};
use proptest::prelude::*;

use super::header::{HEADER_SPACE, Header};
use super::region::RegionEntry;
use super::*;
use crate::ErrorKind;
use crate::geometry::{BlockNumber, Geometry, Run};

const BLOCK: usize = 4096;

fn cases() -> u32 {
    env::var("REPLICA_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(64)
}

fn spec(bytes: u64, function: LeafFunction) -> TreeSpec {
    TreeSpec {
        volume: VolumeId::from_bytes([1; 16]),
        generation: Generation {
            number: GenerationNumber::new(1),
            id: GenerationId::from_bytes([2; 16]),
        },
        geometry: Geometry {
            size: VolumeSize::new(bytes),
            block: BlockSize::MIN,
            sector: SectorSize::B512,
        },
        function,
    }
}

fn run(start: u64, end: u64) -> Run {
    Run {
        start: BlockNumber::new(start),
        end: BlockNumber::new(end),
    }
}

/// A volume whose blocks are each filled with one byte; `None` where it is not known.
struct Model {
    spec: TreeSpec,
    blocks: Vec<Option<u8>>,
}

impl Model {
    fn new(spec: TreeSpec) -> Self {
        let blocks = vec![None; spec.geometry.blocks() as usize];
        Self { spec, blocks }
    }

    fn leaf(&self, n: usize) -> Option<Leaf> {
        let number = BlockNumber::new(n as u64);
        let len = self.spec.geometry.block_len(number).get() as usize;
        self.blocks[n].map(|fill| self.spec.function.leaf(number, &[fill; BLOCK][..len]))
    }

    fn change(&mut self, changes: &[(usize, Option<u8>)]) -> Vec<(BlockNumber, Option<Leaf>)> {
        let change = |(at, fill): &(usize, Option<u8>)| {
            let n = at % self.blocks.len();
            self.blocks[n] = *fill;
            (BlockNumber::new(n as u64), self.leaf(n))
        };
        changes.iter().map(change).collect()
    }

    /// By the streaming builder, in pieces of `piece` bytes; `None` if a block is unknown.
    fn root(&self, piece: usize) -> Option<Root> {
        let mut image = Vec::new();
        for (n, fill) in self.blocks.iter().enumerate() {
            let len = self
                .spec
                .geometry
                .block_len(BlockNumber::new(n as u64))
                .get() as usize;
            image.resize(image.len() + len, (*fill)?);
        }
        let mut builder = RootBuilder::new(self.spec.geometry, self.spec.function.clone());
        for piece in image.chunks(piece) {
            if piece.iter().all(|byte| *byte == 0) {
                builder.zeroes(ByteLen::new(piece.len() as u64)).unwrap();
            } else {
                builder.data(piece).unwrap();
            }
        }
        Some(builder.finish().unwrap())
    }

    fn must_equal(&self, tree: &DigestTree, piece: usize) {
        assert_eq!(tree.root(), self.root(piece));
        let leaves: Vec<_> = tree
            .leaves(run(0, u64::MAX))
            .map(|item| item.unwrap().1)
            .collect();
        assert_eq!(
            leaves,
            (0..self.blocks.len())
                .map(|n| self.leaf(n))
                .collect::<Vec<_>>()
        );
        assert_eq!(tree.check().unwrap(), []);
    }
}

/// One epoch: its changes, and after how many of them the agent dies, if it does.
#[derive(Clone, Debug)]
struct Round {
    changes: Vec<(usize, Option<u8>)>,
    dies_after: Option<usize>,
}

fn rounds() -> impl Strategy<Value = Vec<Round>> {
    let change = (0..4000_usize, prop::option::weighted(0.95, 0..4_u8));
    let changes = prop::collection::vec(change, 0..60);
    let round = (changes, prop::option::weighted(0.3, 0..60_usize));
    let round = round.prop_map(|(changes, dies_after)| Round {
        changes,
        dies_after,
    });
    prop::collection::vec(round, 1..8)
}

fn function() -> impl Strategy<Value = LeafFunction> {
    prop_oneof![
        Just(LeafFunction::plain()),
        Just(LeafFunction::keyed(&[9; 32]))
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn the_tree_is_its_model_whatever_is_applied_and_wherever_it_dies(
        bytes in 1..2600 * BLOCK as u64,
        function in function(),
        baseline in any::<bool>(),
        piece in 1..20_000_usize,
        rounds in rounds(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tree");
        let spec = spec(bytes, function);
        let mut model = Model::new(spec.clone());
        let mut tree = DigestTree::create(&path, &spec).unwrap();
        let mut epoch = Epoch::ZERO;
        if baseline {
            epoch = epoch.next();
            let all: Vec<_> = (0..model.blocks.len()).map(|n| (n, Some((n % 3) as u8))).collect();
            tree.apply(epoch, model.change(&all)).unwrap();
            model.must_equal(&tree, piece);
        }
        for round in rounds {
            let last = epoch;
            epoch = epoch.next();
            let changes = model.change(&round.changes);
            if let Some(after) = round.dies_after {
                let mut update = tree.update(epoch).unwrap();
                for (block, leaf) in changes.iter().take(after) {
                    update.set(*block, *leaf).unwrap();
                }
                drop(update);
                tree = DigestTree::open(&path, &spec).unwrap();
                let seen = TreeState::Interrupted { epoch: last, applying: epoch };
                prop_assert_eq!(tree.state(), seen);
                prop_assert_eq!(tree.root(), None);
                let other = tree.update(epoch.next()).map(drop).unwrap_err();
                prop_assert_eq!(other.kind(), ErrorKind::State);
            }
            let preview = tree.preview_root(&changes.iter().copied().collect()).unwrap();
            let interrupted = round.dies_after.is_some();
            tree.apply(epoch, changes).unwrap();
            prop_assert_eq!(tree.state(), TreeState::Clean { epoch });
            let expected = if interrupted { None } else { tree.root() };
            prop_assert_eq!(preview, expected);
            model.must_equal(&tree, piece);
        }
        let reopened = DigestTree::open(&path, &spec).unwrap();
        prop_assert_eq!(reopened.state(), TreeState::Clean { epoch });
        model.must_equal(&reopened, piece);
    }
}

/// A volume of two and a half regions, all of it known.
fn known(folder: &Path) -> (Model, DigestTree, PathBuf) {
    let spec = spec(2500 * BLOCK as u64 + 512, LeafFunction::plain());
    let path = folder.join("tree");
    let mut model = Model::new(spec.clone());
    let mut tree = DigestTree::create(&path, &spec).unwrap();
    let all: Vec<_> = (0..model.blocks.len())
        .map(|n| (n, Some((n % 251) as u8)))
        .collect();
    tree.apply(Epoch::new(1), model.change(&all)).unwrap();
    model.must_equal(&tree, 1 << 20);
    (model, tree, path)
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
}

#[test]
fn a_flipped_bit_of_the_header_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (model, _, path) = known(folder.path());
    for at in 0..Header::LEN as u64 {
        flip(&path, at);
        let error = DigestTree::open(&path, &model.spec).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "byte {at}: {error}");
        flip(&path, at);
    }
    DigestTree::open(&path, &model.spec).unwrap();
}

#[test]
fn a_flipped_bit_of_a_region_is_found_and_forgotten() {
    let folder = tempfile::tempdir().unwrap();
    let (mut model, _, path) = known(folder.path());
    let entries = (0..3).map(|n| {
        (
            n,
            HEADER_SPACE + n * RegionEntry::LEN as u64,
            RegionEntry::LEN,
        )
    });
    let leaves = (0..3).map(|n| {
        (
            n,
            8192 + n * 1024 * 16,
            if n == 2 { 453 * 16 } else { 1024 * 16 },
        )
    });
    for (number, start, len) in entries.chain(leaves) {
        for at in (start..start + len as u64).step_by(if len > 40 { 997 } else { 1 }) {
            flip(&path, at);
            let tree = DigestTree::open(&path, &model.spec).unwrap();
            assert_eq!(
                tree.check().unwrap(),
                [RegionNumber::new(number)],
                "byte {at}"
            );
            let error = tree.get(BlockNumber::new(number * 1024 + 7)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Damaged, "byte {at}: {error}");
            flip(&path, at);
        }
    }

    flip(&path, 8192 + 1024 * 16 + 5);
    let mut tree = DigestTree::open(&path, &model.spec).unwrap();
    let block = BlockNumber::new(1030);
    let error = tree
        .apply(Epoch::new(2), [(block, model.leaf(1030))])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Damaged);
    let mut update = tree.update(Epoch::new(2)).unwrap();
    update.forget(run(1000, 2100)).unwrap();
    update.finish().unwrap();
    model.blocks[1000..2100].fill(None);
    model.must_equal(&tree, 1);
}

#[test]
fn a_short_or_long_file_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let (model, _, path) = known(folder.path());
    let len = fs::metadata(&path).unwrap().len();
    for other in [0, 100, 4095, 4096, len - 1, len + 1] {
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(other)
            .unwrap();
        let error = DigestTree::open(&path, &model.spec).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Damaged, "{other}: {error}");
    }
}

#[test]
fn only_the_same_tree_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let (model, _, path) = known(folder.path());
    let kind = |change: fn(&mut TreeSpec)| {
        let mut spec = model.spec.clone();
        change(&mut spec);
        DigestTree::open(&path, &spec).unwrap_err().kind()
    };
    assert_eq!(kind(|s| s.volume = VolumeId::NIL), ErrorKind::Foreign);
    assert_eq!(
        kind(|s| s.generation.id = GenerationId::NIL),
        ErrorKind::Foreign
    );
    assert_eq!(
        kind(|s| s.geometry.size = VolumeSize::new(4096)),
        ErrorKind::Resized
    );
    assert_eq!(
        kind(|s| s.geometry.block = BlockSize::MAX),
        ErrorKind::Resized
    );
    assert_eq!(
        kind(|s| s.function = LeafFunction::keyed(&[0; 32])),
        ErrorKind::Key
    );
    let error = DigestTree::create(&path, &model.spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exists);
    let error = DigestTree::open(&folder.path().join("none"), &model.spec).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

#[test]
fn updates_are_in_order_and_within_the_volume() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut tree, _) = known(folder.path());
    for stale in [0, 1] {
        let error = tree.update(Epoch::new(stale)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::State);
    }
    let past = (BlockNumber::new(2501), None);
    assert_eq!(
        tree.apply(Epoch::new(5), [past]).unwrap_err().kind(),
        ErrorKind::Invalid
    );
    assert_eq!(tree.get(BlockNumber::new(2501)).unwrap(), None);
}

#[test]
fn a_large_volume_costs_nothing_until_it_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(16 << 40, LeafFunction::plain());
    spec.geometry.block = BlockSize::new(64 << 10).unwrap();
    let path = folder.path().join("tree");
    let mut tree = DigestTree::create(&path, &spec).unwrap();
    let last = BlockNumber::new((1 << 28) - 1);
    let leaf = spec.function.leaf(last, &[1; 64 << 10]);
    tree.apply(Epoch::new(1), [(last, Some(leaf))]).unwrap();
    assert_eq!(tree.get(last).unwrap(), Some(leaf));
    assert_eq!(tree.root(), None);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&path).unwrap());
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks of 512 bytes");
}

#[test]
fn the_root_is_of_every_byte_and_of_where_it_is() {
    let spec = spec(3 * BLOCK as u64 + 100, LeafFunction::plain());
    let root = |image: &[u8]| {
        let mut builder = RootBuilder::new(spec.geometry, spec.function.clone());
        builder.data(image).unwrap();
        builder.finish().unwrap()
    };
    let mut image = vec![0; 3 * BLOCK + 100];
    let zero = root(&image);
    for at in [0, 4095, 4096, 3 * BLOCK, 3 * BLOCK + 99] {
        image[at] = 1;
        assert_ne!(root(&image), zero, "{at}");
        image[at] = 0;
    }
    image[0] = 1;
    let first = root(&image);
    image.swap(0, BLOCK);
    assert_ne!(root(&image), first);

    let mut builder = RootBuilder::new(spec.geometry, spec.function.clone());
    builder.data(&image[..5000]).unwrap();
    assert_eq!(builder.data(&image).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(builder.finish().unwrap_err().kind(), ErrorKind::Invalid);
}
