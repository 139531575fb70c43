//! Descriptors sent over a Unix socket (`SCM_RIGHTS`). nix hands them out as bare numbers;
//! here they become owned the moment they arrive, so that none can leak.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// The most descriptors that [`receive`] takes in one message.
pub const MAX_FDS: usize = 64;

/// Sends `bytes` as one message of a packet socket, with `fds`.
///
/// # Errors
/// As sendmsg(2); `EPIPE` without a signal if the peer is gone; `EINVAL` past [`MAX_FDS`].
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[RawFd]) -> nix::Result<()> {
    if fds.len() > MAX_FDS {
        return Err(nix::errno::Errno::EINVAL);
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() {
        &rights[..0]
    } else {
        &rights[..]
    };
    let iov = [IoSlice::new(bytes)];
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &iov,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map(drop)
}

/// Receives one message into `bytes`: its length (0 at the end) and its descriptors, which
/// are closed on exec.
///
/// # Errors
/// As recvmsg(2).
pub fn receive(socket: impl AsFd, bytes: &mut [u8]) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut iov = [IoSliceMut::new(bytes)];
    let message = recvmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &mut iov,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just installed these descriptors for this message;
            // nothing else knows their numbers.
            fds.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    Ok((message.bytes, fds))
}
