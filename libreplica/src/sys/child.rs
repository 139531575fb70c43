//! Child processes that do not outlive us, however we end: the kernel kills them.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Has the kernel kill what `command` starts as soon as the thread that starts it ends. So that
/// thread has to be one that lasts, such as a command's first.
pub fn die_with_thread(command: &mut Command) -> &mut Command {
    let before_exec = || {
        let set = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
        set.map_err(io::Error::from)
    };
    // SAFETY: between fork and exec it makes one system call, and allocates nothing.
    unsafe { command.pre_exec(before_exec) }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    #[test]
    fn a_child_ends_with_the_thread_that_started_it() {
        let starter = std::thread::spawn(|| {
            let mut sleep = Command::new("sleep");
            let child = super::die_with_thread(sleep.arg("60")).stdin(Stdio::null());
            child.spawn().unwrap()
        });
        let mut child = starter.join().unwrap();
        let ended = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&ended),
            Some(9)
        );
    }
}
