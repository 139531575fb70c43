//! Waiting until no BPF program runs that began before now. membarrier(GLOBAL) is a grace
//! period of the kernel's RCU, and a tracing program runs inside one read section of it.

use std::io;

const CMD_QUERY: libc::c_int = 0;
const CMD_GLOBAL: libc::c_int = 1;

fn membarrier(command: libc::c_int) -> io::Result<libc::c_long> {
    // SAFETY: takes plain numbers, touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Whether [`global`] can be used here: not where some CPUs run without a timer tick
/// (`nohz_full`), nor where the kernel has no membarrier.
pub fn offered() -> bool {
    membarrier(CMD_QUERY).is_ok_and(|mask| mask & libc::c_long::from(CMD_GLOBAL) != 0)
}

/// Returns once every CPU has left the BPF program it was running. Takes milliseconds.
///
/// # Errors
/// `EINVAL` or `ENOSYS` where it is not [`offered`].
pub fn global() -> io::Result<()> {
    membarrier(CMD_GLOBAL).map(|_| ())
}
