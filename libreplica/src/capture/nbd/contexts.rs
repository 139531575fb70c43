//! What block status tells about a volume ("Metadata querying"): `base:allocation`, which
//! the protocol defines, and `qemu:dirty-bitmap:NAME`, which QEMU does, once for every NAME
//! that changes are known since.

use std::ops::ControlFlow;

use crate::bitmap::Bitmap;
use crate::error::Result;
use crate::geometry::Geometry;
use crate::units::{ByteLen, ByteOffset, Extent};

/// Whether bytes changed since a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// They are as they were.
    Unchanged,
    /// They may have changed.
    Changed,
}

/// Consecutive bytes of which the same is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// How many.
    pub len: ByteLen,
    /// What is true of them.
    pub since: Since,
}

/// What changed, by the names that it is known since: given by whoever keeps recovery points.
/// Asked by one thread of the server, for which nothing waits but the answers.
pub trait Contexts: Send + Sync {
    /// The names, without `qemu:dirty-bitmap:`; mostly `since-POINTID`.
    fn list(&self) -> Vec<String>;

    /// Tells `visit` the stretches of `extent` in order, from its first byte on, until it
    /// breaks. They need not be as long as they could be.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] if the name is not known any more; what reading failed
    /// with. The client is told, and no more.
    fn dirty(
        &self,
        name: &str,
        extent: Extent,
        visit: &mut dyn FnMut(Stretch) -> ControlFlow<()>,
    ) -> Result<()>;
}

/// No names: for a volume without recovery points.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoContexts;

impl Contexts for NoContexts {
    fn list(&self) -> Vec<String> {
        Vec::new()
    }

    fn dirty(
        &self,
        name: &str,
        _: Extent,
        _: &mut dyn FnMut(Stretch) -> ControlFlow<()>,
    ) -> Result<()> {
        Err(crate::Error::new(crate::ErrorKind::NotFound, "say what changed").detail(name))
    }
}

/// The stretches of `extent`, of which the blocks in `set` have changed. For
/// [`Contexts::dirty`].
pub fn stretches(
    set: &Bitmap,
    geometry: &Geometry,
    extent: Extent,
    visit: &mut dyn FnMut(Stretch) -> ControlFlow<()>,
) {
    let mut at = extent.offset();
    let mut tell = |to: ByteOffset, since| {
        let len = Extent::between(at, to).len();
        at = to;
        if len == ByteLen::default() {
            return ControlFlow::Continue(());
        }
        visit(Stretch { len, since })
    };
    let Some(first) = geometry.run_of(extent).map(|run| run.start) else {
        return;
    };
    for run in set.runs().from(first) {
        let Some(changed) = geometry.extent_of(run).intersect(extent) else {
            break;
        };
        if tell(changed.offset(), Since::Unchanged).is_break()
            || tell(changed.end(), Since::Changed).is_break()
        {
            return;
        }
    }
    let _ = tell(extent.end(), Since::Unchanged);
}

/// What one context says about a range: few stretches, each unlike the one before.
#[derive(Debug)]
pub(super) struct Stretches {
    /// Length and state of each, as they go on the wire.
    list: Vec<(u32, u32)>,
    most: usize,
}

/// Stretches that are told in one reply at most.
const STRETCHES_MAX: usize = 4096;
/// `qemu:dirty-bitmap`'s bit for what has changed.
const DIRTY: u32 = 1;

impl Stretches {
    /// None yet. With `one`, the first is all that is wanted.
    pub fn new(one: HowMany) -> Self {
        let most = match one {
            HowMany::One => 1,
            HowMany::Many => STRETCHES_MAX,
        };
        Self {
            list: Vec::new(),
            most,
        }
    }

    /// Adds one; breaks when there is no use for more.
    pub fn add(&mut self, len: ByteLen, state: u32) -> ControlFlow<()> {
        // No request is longer than 32 bits can say.
        let len = u32::try_from(len.get()).unwrap_or(u32::MAX);
        let count = self.list.len();
        match self.list.last_mut() {
            _ if len == 0 => {}
            Some((last, same)) if *same == state => *last = last.saturating_add(len),
            _ if count == self.most => return ControlFlow::Break(()),
            _ => self.list.push((len, state)),
        }
        ControlFlow::Continue(())
    }

    pub fn list(&self) -> &[(u32, u32)] {
        &self.list
    }
}

/// How many stretches a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HowMany {
    /// As many as there are, up to a limit.
    Many,
    /// The first.
    One,
}

/// A context that a client has chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`.
    Allocation,
    /// `qemu:dirty-bitmap:` and this.
    Dirty(String),
}

pub(super) const ALLOCATION: &str = "base:allocation";
pub(super) const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

impl Context {
    /// All that there are, if changes are known since `names`.
    pub(super) fn all(names: Vec<String>) -> Vec<Self> {
        let mut all = vec![Self::Allocation];
        all.extend(names.into_iter().map(Self::Dirty));
        all
    }

    /// Its name.
    pub fn name(&self) -> String {
        match self {
            Self::Allocation => ALLOCATION.to_owned(),
            Self::Dirty(name) => format!("{DIRTY_BITMAP}{name}"),
        }
    }

    /// What it says about `extent`.
    pub(super) fn stretches(
        &self,
        contexts: &dyn Contexts,
        extent: Extent,
        many: HowMany,
    ) -> Result<Stretches> {
        let mut found = Stretches::new(many);
        match self {
            // A block device does not say what it holds: all of it is data.
            Self::Allocation => {
                let _ = found.add(extent.len(), 0);
            }
            Self::Dirty(name) => {
                let mut left = extent.len().get();
                contexts.dirty(name, extent, &mut |stretch| {
                    let len = stretch.len.get().min(left);
                    left -= len;
                    let state = match stretch.since {
                        Since::Unchanged => 0,
                        Since::Changed => DIRTY,
                    };
                    found.add(ByteLen::new(len), state)
                })?;
                if found.list.is_empty() {
                    // What nothing was said about may have changed.
                    let _ = found.add(extent.len(), DIRTY);
                }
            }
        }
        Ok(found)
    }
}
