//! Machines that run: QEMU as a child of ours, what its guest says on the serial console, and
//! whether the guest lives. It knows disks by where they can be read and written, not what
//! is behind them.
//!
//! ```text
//! guest      the child process, from its start to its end
//! standing   a machine that goes on when we end
//! console    what the guest says, so much of it as is kept
//! life       waits for the sign of life
//! qmp        QEMU's own protocol
//! agent      the guest agent's
//! firmware   the files that UEFI takes
//! ```

mod agent;
mod console;
mod firmware;
mod guest;
mod json_lines;
mod life;
mod qmp;
mod standing;

pub use console::{Console, KEPT_HEAD, KEPT_TAIL};
pub use guest::{BootSpec, Guest, WorkFolder};
pub use life::Observed;
pub use standing::Standing;
