//! The host's socket in the file system: made, replaced, guarded, removed.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, fchmod, flock, lstat, open};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};

use crate::error::BindError;

/// Bytes that the address of a Unix socket has for its path, besides the zero at its end.
const MAX_PATH: usize = 107;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// How long another server may hold the directory. It takes less than a millisecond; but in a
/// shared directory anybody can hold the lock.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// A socket that listens at a path. Dropping it removes the path.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the path when it was made: what else is there by now is not ours.
    made: (u64, u64),
}

impl Listener {
    /// Listens at `path`, for this user only. The socket of a server that is gone is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |call| {
            move |error: Errno| BindError::System {
                path: path.to_owned(),
                call,
                source: error.into(),
            }
        };
        let address =
            address(path).map_err(|len| BindError::PathTooLong { path: path.to_owned(), len })?;
        // Two servers that start at once must not both find the old socket dead, or one would
        // remove the other's: the directory is locked meanwhile, which leaves nothing behind.
        let _directory = lock_directory(path).map_err(failed("flock"))?;
        remove_stale(path, &address)?;

        let socket = new_socket().map_err(failed("socket"))?;
        // The path takes its permissions from the socket: it is never open to others.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("fchmod"))?;
        bind(&socket, &address).map_err(failed("bind"))?;
        let status = lstat(path).map_err(failed("lstat"))?;
        let listener = Self { socket, path: path.to_owned(), made: (status.st_dev, status.st_ino) };
        listen(&listener.socket, BACKLOG).map_err(failed("listen"))?;
        Ok(listener)
    }

    /// The next process that has connected, if any. Does not wait.
    pub(crate) fn accept(&self) -> Result<Option<OwnedFd>, Errno> {
        loop {
            match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => return Ok(Some(socket)),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Without it, what the check below finds may change before it is acted upon.
        let _directory = lock_directory(&self.path);
        if let Ok(status) = lstat(&self.path)
            && (status.st_dev, status.st_ino) == self.made
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = ?self.path, %error, "cannot remove the socket");
        }
    }
}

/// The address of a path, or the path's length if it is too long.
pub(crate) fn address(path: &Path) -> Result<SocketAddrUnix, usize> {
    let len = path.as_os_str().as_bytes().len();
    if len > MAX_PATH {
        return Err(len);
    }
    SocketAddrUnix::new(path).map_err(|_| len)
}

pub(crate) fn new_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Locks the directory of `path`, if nobody holds it for longer than [`LOCK_WAIT`].
fn lock_directory(path: &Path) -> Result<File, Errno> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = open(directory, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let give_up = Instant::now() + LOCK_WAIT;
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN | Errno::INTR) if Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => return result.map(|()| directory.into()),
        }
    }
}

/// Removes the socket of a server that is gone. Leaves everything else, and says so.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let failed = |call| {
        move |error: Errno| BindError::System { path: path.to_owned(), call, source: error.into() }
    };
    let status = match lstat(path) {
        Ok(status) => status,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(failed("lstat")(error)),
    };
    if FileType::from_raw_mode(status.st_mode) != FileType::Socket {
        return Err(BindError::NotASocket { path: path.to_owned() });
    }
    let probe = new_socket().map_err(failed("socket"))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        // A full backlog, or a socket of another type: somebody is there.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            return Err(BindError::InUse { path: path.to_owned() });
        }
        Err(error) => return Err(failed("connect")(error)),
    }
    std::fs::remove_file(path).map_err(|source| BindError::System {
        path: path.to_owned(),
        call: "unlink",
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// What a server leaves that was killed: a socket at the path, and nobody behind it.
    fn leave_dead(path: &Path) {
        let socket = new_socket().unwrap();
        bind(&socket, &address(path).unwrap()).unwrap();
    }

    #[test]
    fn the_path_is_there_as_long_as_the_listener_and_for_its_user_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn a_live_server_is_left_alone_and_a_dead_ones_socket_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(BindError::InUse { .. })));
        assert!(path.exists());
        drop(listener);
        leave_dead(&path);
        assert!(path.exists());
        let again = Listener::bind(&path).unwrap();
        drop(again);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_is_never_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(Listener::bind(&path), Err(BindError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        // Nor is what somebody has put in our place.
        let path = directory.path().join("socket");
        let listener = Listener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "data").unwrap();
        drop(listener);
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn impossible_paths_are_named() {
        let long = Path::new("/tmp").join("x".repeat(120));
        assert!(matches!(Listener::bind(&long), Err(BindError::PathTooLong { len: 125, .. })));
        let nowhere = Listener::bind(Path::new("/nonexistent/directory/socket"));
        assert!(matches!(nowhere, Err(BindError::System { .. })));
    }

    /// Of many servers that start at once on a dead server's path, one gets it.
    #[test]
    fn servers_that_start_at_once_do_not_remove_each_others_sockets() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        for round in 0..20 {
            leave_dead(&path);
            let bound = std::thread::scope(|scope| {
                let tries: Vec<_> = (0..4).map(|_| scope.spawn(|| Listener::bind(&path))).collect();
                let results: Vec<_> = tries.into_iter().map(|t| t.join().unwrap()).collect();
                results.into_iter().filter(Result::is_ok).count()
            });
            assert_eq!(bound, 1, "round {round}");
            assert!(!path.exists(), "round {round}");
        }
    }
}
