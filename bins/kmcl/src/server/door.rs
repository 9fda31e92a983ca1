//! The server's control socket: who may use it, and taking a request from it.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FileType, Mode, fchmod, lstat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
    sockopt,
};
use rustix::process::geteuid;

use crate::control::{MAX_REQUEST_BYTES, PATIENCE, PROTOCOL, SaveRequest, path_of};
use crate::exit::{Failure, Result};

/// Requests that may wait.
const BACKLOG: i32 = 4;

/// How long a process that has connected may take to say what it wants. The server waits meanwhile.
const REQUEST_PATIENCE: Duration = Duration::from_secs(1);

/// A control socket that listens. Dropping it removes its path.
#[derive(Debug)]
pub(super) struct Door {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the path when it was made: what else is there by now is not ours.
    made: (u64, u64),
}

impl Door {
    /// Listens beside `socket`, the socket for guests, which is this process's. So what is at the control
    /// socket's path was left behind by a server that is gone.
    ///
    /// # Errors
    /// A [`Failure`] of kind system or usage.
    pub(super) fn open(socket: &Path) -> Result<Self> {
        let path = path_of(socket);
        Self::open_at(&path).map_err(|error| {
            let what = format_args!("cannot listen at {}: {error}", path.display()).to_string();
            match error {
                Errno::NAMETOOLONG => Failure::usage(what, "choose a shorter --socket path"),
                Errno::EXIST => Failure::usage(what, "remove what is there"),
                _ => Failure::system(what, "choose a --socket in a directory that can be written"),
            }
        })
    }

    fn open_at(path: &Path) -> Result<Self, Errno> {
        let address = SocketAddrUnix::new(path)?;
        match lstat(path) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Socket => {
                rustix::fs::unlink(path)?;
            }
            Ok(_) => return Err(Errno::EXIST),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The path takes its permissions from the socket: it is never open to others.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &address)?;
        let status = lstat(path)?;
        let made = (status.st_dev, status.st_ino);
        listen(&socket, BACKLOG)?;
        Ok(Self { socket, path: path.to_owned(), made })
    }

    /// Takes the next request, if one waits and comes from this user or from root. Waits
    /// [`REQUEST_PATIENCE`] at most; whoever says nothing sensible is not answered.
    pub(super) fn request(&self) -> Option<(UnixStream, SaveRequest)> {
        let socket = accept_with(&self.socket, SocketFlags::CLOEXEC).ok()?;
        let peer = sockopt::socket_peercred(&socket).ok()?.uid;
        if peer != geteuid() && !peer.is_root() {
            tracing::warn!(uid = peer.as_raw(), "somebody else asked for a save");
            return None;
        }
        match read_request(UnixStream::from(socket)) {
            Ok(asked) => Some(asked),
            Err(error) => {
                tracing::warn!(%error, "no request came over the control socket");
                None
            }
        }
    }
}

fn read_request(stream: UnixStream) -> io::Result<(UnixStream, SaveRequest)> {
    stream.set_read_timeout(Some(REQUEST_PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = Vec::new();
    // Nothing comes after the line before it is answered.
    BufReader::new((&stream).take(MAX_REQUEST_BYTES)).read_until(b'\n', &mut line)?;
    let request: SaveRequest = serde_json::from_slice(&line)?;
    if request.protocol != PROTOCOL {
        return Err(io::Error::other(format!("protocol version {}", request.protocol)));
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok((stream, request))
}

/// Readable when a request waits.
impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if lstat(&self.path).is_ok_and(|found| (found.st_dev, found.st_ino) == self.made)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = ?self.path, %error, "cannot remove the control socket");
        }
    }
}
