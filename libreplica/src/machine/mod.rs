//! The machine that a volume belongs to, as far as it takes one to boot it elsewhere: a
//! definition in TOML, kept with the volume, the arguments that QEMU gets for it, and a libvirt
//! domain. Pure: text in, values or text out; who starts machines is `replica/boot/`.

mod arguments;
mod check;
mod definition;
mod libvirt;
mod memory;
mod network;
mod proof;

pub use arguments::{Accelerator, ConsoleEnd, Launch, Networks, Source, UefiFiles, qemu_arguments};
pub use definition::{Bus, Disk, Firmware, Life, MachineDefinition, MachineType};
pub use libvirt::domain_xml;
pub use memory::Memory;
pub use network::{Link, Network, NicModel, StaticAddress};
pub use proof::{Proof, Verdict};
