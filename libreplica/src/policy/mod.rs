//! Policy: how much capture keeps when the target is behind ([`Mode`]), and which recovery
//! points are kept ([`Retention`]). Pure: nothing here reads a clock or a file.

mod duration;
mod retention;
#[cfg(test)]
mod tests;

pub use duration::parse_duration;
pub use retention::{Candidate, Retention};

/// How much capture knows of what changed. It falls when the target is behind, and climbs
/// back by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Which blocks.
    #[default]
    Bitmap,
    /// Which extents, in which order.
    Metadata,
    /// Every write with its data, in order.
    Data,
}

impl Mode {
    /// As it stands in JSON: a lower-case word.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bitmap => "bitmap",
            Self::Metadata => "metadata",
            Self::Data => "data",
        }
    }
}
