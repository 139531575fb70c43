//! The crash simulator: it stands in the store's one door to the disk (`durable.rs`), takes
//! note of every step, and rebuilds the folder as a crash behind any step could leave it.
//! What a sync made durable is there; of the rest as much as the kind of crash leaves.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::durable::Step;
use super::random::Random;

/// Kills this process with SIGKILL before the step of this number, counted from 0.
pub(super) const KILL_AT: &str = "REPLICA_TEST_KILL_AT";
/// Where the killed process works.
pub(super) const CHILD_PATH: &str = "REPLICA_TEST_CHILD";

thread_local! {
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

/// The steps of the store in one folder, by the thread that began to record.
#[derive(Clone, Debug, Default)]
pub(super) struct Recorder {
    root: PathBuf,
    steps: Vec<Owned>,
}

#[derive(Clone, Debug)]
enum Owned {
    CreateFolder(PathBuf),
    CreateFile(PathBuf),
    Change(PathBuf, Change),
    SyncFile(PathBuf),
    Rename(PathBuf, PathBuf),
    Link(PathBuf, PathBuf),
    Remove(PathBuf),
    SyncFolder(PathBuf),
}

/// A change to the content of a file.
#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Punch(usize, usize),
    SetLen(usize),
}

/// What is left of what was not synced.
#[derive(Clone, Copy, Debug)]
pub(super) enum Loss {
    /// All: only the process died.
    Nothing,
    /// Nothing.
    Everything,
    /// Names, not contents: files that are there, empty or as they were.
    Contents,
    /// Contents, not names.
    Names,
    /// For each name and each write the toss of a coin.
    Some(u64),
}

/// Called by the store before each step.
pub(in super::super) fn record(step: Step<'_>) {
    kill_if_due(step);
    RECORDER.with_borrow_mut(|recorder| {
        if let Some(recorder) = recorder {
            recorder.note(step);
        }
    });
}

fn kill_if_due(step: Step<'_>) {
    static AT: OnceLock<Option<(usize, PathBuf)>> = OnceLock::new();
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let at = AT.get_or_init(|| {
        let at = std::env::var(KILL_AT).ok()?.parse().ok()?;
        Some((at, std::env::var_os(CHILD_PATH)?.into()))
    });
    // The sync of its parent is no step in the folder, and no recorder counts it.
    if let Some((at, root)) = at
        && path_of(step).starts_with(root)
        && COUNT.fetch_add(1, Ordering::Relaxed) == *at
    {
        let me = nix::unistd::getpid();
        nix::sys::signal::kill(me, nix::sys::signal::SIGKILL).unwrap();
    }
}

fn path_of(step: Step<'_>) -> &Path {
    match step {
        Step::CreateFolder(path)
        | Step::CreateFile(path)
        | Step::Write(path, ..)
        | Step::Punch(path, _)
        | Step::SetLen(path, _)
        | Step::SyncFile(path)
        | Step::Rename(path, _)
        | Step::Link(_, path)
        | Step::Remove(path)
        | Step::SyncFolder(path) => path,
    }
}

/// Records what this thread does in `root`, which must be empty.
pub(super) fn start(root: &Path) {
    let root = root.to_owned();
    RECORDER.set(Some(Recorder {
        root,
        steps: Vec::new(),
    }));
}

/// How many steps there were since [`start`].
pub(super) fn steps() -> usize {
    RECORDER.with_borrow(|recorder| recorder.as_ref().map_or(0, |r| r.steps.len()))
}

/// Ends the recording.
pub(super) fn stop() -> Recorder {
    RECORDER.take().unwrap_or_default()
}

impl Recorder {
    fn note(&mut self, step: Step<'_>) {
        let root = self.root.clone();
        let inner = |path: &Path| path.strip_prefix(&root).map(Path::to_owned);
        let owned = match step {
            Step::CreateFolder(path) => inner(path).map(Owned::CreateFolder),
            Step::CreateFile(path) => inner(path).map(Owned::CreateFile),
            Step::Write(path, at, data) => inner(path)
                .map(|p| Owned::Change(p, Change::Write(at.get() as usize, data.to_vec()))),
            Step::Punch(path, extent) => {
                let (start, end) = (extent.offset().get(), extent.end().get());
                inner(path).map(|p| Owned::Change(p, Change::Punch(start as usize, end as usize)))
            }
            Step::SetLen(path, len) => {
                inner(path).map(|p| Owned::Change(p, Change::SetLen(len.get() as usize)))
            }
            Step::SyncFile(path) => inner(path).map(Owned::SyncFile),
            Step::Rename(from, to) => inner(from).and_then(|f| Ok(Owned::Rename(f, inner(to)?))),
            Step::Link(from, to) => inner(from).and_then(|f| Ok(Owned::Link(f, inner(to)?))),
            Step::Remove(path) => inner(path).map(Owned::Remove),
            Step::SyncFolder(path) => inner(path).map(Owned::SyncFolder),
        };
        // A step outside of the folder (the sync of its parent) cannot be lost with it.
        self.steps.extend(owned.ok());
    }

    pub(super) fn len(&self) -> usize {
        self.steps.len()
    }

    /// Makes in `target` what a crash before step `at` leaves.
    pub(super) fn rebuild(&self, at: usize, loss: Loss, target: &Path) {
        let mut disk = Disk::default();
        for step in &self.steps[..at] {
            disk.apply(step);
        }
        disk.write_to(target, loss);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Folder,
    File(usize),
}

#[derive(Debug, Default)]
struct File {
    durable: Vec<u8>,
    pending: Vec<Change>,
}

/// A filesystem that keeps apart what is durable.
#[derive(Debug, Default)]
struct Disk {
    files: Vec<File>,
    now: BTreeMap<PathBuf, Node>,
    durable: BTreeMap<PathBuf, Node>,
}

impl Disk {
    fn file(&mut self, path: &Path) -> &mut File {
        match self.now.get(path) {
            Some(Node::File(number)) => &mut self.files[*number],
            other => panic!("{} is {other:?}", path.display()),
        }
    }

    fn apply(&mut self, step: &Owned) {
        match step {
            Owned::CreateFolder(path) => {
                self.now.insert(path.clone(), Node::Folder);
            }
            Owned::CreateFile(path) => {
                if let Some(Node::File(number)) = self.now.get(path) {
                    self.files[*number].pending.push(Change::SetLen(0));
                } else {
                    self.files.push(File::default());
                    let node = Node::File(self.files.len() - 1);
                    self.now.insert(path.clone(), node);
                }
            }
            Owned::Change(path, change) => self.file(path).pending.push(change.clone()),
            Owned::SyncFile(path) => {
                let file = self.file(path);
                for change in std::mem::take(&mut file.pending) {
                    change.apply(&mut file.durable);
                }
            }
            Owned::Rename(from, to) => {
                let node = self.now.remove(from).unwrap();
                self.now.insert(to.clone(), node);
            }
            Owned::Link(from, to) => {
                let node = self.now[from];
                self.now.insert(to.clone(), node);
            }
            Owned::Remove(path) => {
                self.now.remove(path);
            }
            Owned::SyncFolder(folder) => {
                let here = |path: &PathBuf, _: &mut Node| path.parent() == Some(folder);
                self.durable.retain(|path, node| !here(path, node));
                let names = self
                    .now
                    .iter()
                    .filter(|(path, _)| path.parent() == Some(folder));
                self.durable
                    .extend(names.map(|(path, node)| (path.clone(), *node)));
            }
        }
    }

    fn names(&self, loss: Loss) -> BTreeMap<PathBuf, Node> {
        match loss {
            Loss::Nothing | Loss::Contents => self.now.clone(),
            Loss::Everything | Loss::Names => self.durable.clone(),
            Loss::Some(seed) => {
                let mut random = Random::new(seed);
                let mut names = BTreeMap::new();
                for path in self.now.keys().chain(self.durable.keys()) {
                    let side = if random.coin() {
                        &self.now
                    } else {
                        &self.durable
                    };
                    if let Some(node) = side.get(path) {
                        names.insert(path.clone(), *node);
                    }
                }
                names
            }
        }
    }

    fn write_to(&self, target: &Path, loss: Loss) {
        let mut random = match loss {
            Loss::Some(seed) => Random::new(!seed),
            _ => Random::new(0),
        };
        // A name sorts behind that of its folder. What is in a lost folder is lost.
        for (path, node) in self.names(loss) {
            let path = target.join(path);
            if !path.parent().unwrap().is_dir() {
                continue;
            }
            match node {
                Node::Folder => fs::create_dir(&path).unwrap(),
                Node::File(number) => {
                    let file = &self.files[number];
                    let mut content = file.durable.clone();
                    for change in &file.pending {
                        let kept = match loss {
                            Loss::Nothing | Loss::Names => true,
                            Loss::Everything | Loss::Contents => false,
                            Loss::Some(_) => random.coin(),
                        };
                        if kept {
                            change.apply(&mut content);
                        }
                    }
                    fs::write(&path, content).unwrap();
                }
            }
        }
    }
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write(at, data) => {
                let end = at + data.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*at..end].copy_from_slice(data);
            }
            Self::Punch(start, end) => {
                let end = (*end).min(content.len());
                content[(*start).min(end)..end].fill(0);
            }
            Self::SetLen(len) => content.resize(*len, 0),
        }
    }
}
