//! The driver of the protected side: it joins capture to the store, and brings
//! filesystems to rest for the points that it makes.

pub mod hooks;
pub mod quiesce;
pub mod watchdog;
