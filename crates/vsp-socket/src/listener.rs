//! Unix sockets by their names: the one that programs of the host connect to, and those that they listen
//! at.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, fchmod, flock, lstat, open};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};

use crate::error::BindError;

/// Bytes that the address of a Unix socket has for its path, besides the zero at its end.
pub(crate) const MAX_PATH: usize = 107;

/// Bytes that a port adds to the path: an underscore and ten digits.
const PORT_BYTES: usize = 11;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Where a program listens for the guest's connections to `port`.
pub(crate) fn path_of_port(path: &Path, port: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    PathBuf::from(name)
}

/// A socket that listens at a path, for this user only. Dropping it removes the path.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the path when it was made: what else is there by now is not ours.
    made: (u64, u64),
}

impl Listener {
    /// Listens at `path`. The socket of a process that is gone is replaced.
    pub(crate) fn bind(path: &Path) -> Result<Self, BindError> {
        let failed = |call| {
            move |error: Errno| BindError::System {
                path: path.to_owned(),
                call,
                source: error.into(),
            }
        };
        let len = path.as_os_str().as_bytes().len();
        let too_long = || BindError::PathTooLong { path: path.to_owned(), len };
        if len > MAX_PATH - PORT_BYTES {
            return Err(too_long());
        }
        let address = SocketAddrUnix::new(path).map_err(|_| too_long())?;
        // Of two processes that find the same old socket dead, the second must not remove what the first
        // has put there.
        let _directory = lock_directory(path).map_err(failed("flock"))?;
        remove_stale(path, &address)?;
        let socket = stream_socket().map_err(failed("socket"))?;
        // The path takes its permissions from the socket: it is never open to others.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("fchmod"))?;
        bind(&socket, &address).map_err(failed("bind"))?;
        let status = lstat(path).map_err(failed("lstat"))?;
        let listener = Self { socket, path: path.to_owned(), made: (status.st_dev, status.st_ino) };
        listen(&listener.socket, BACKLOG).map_err(failed("listen"))?;
        Ok(listener)
    }

    /// The next program that has connected, if any. Does not wait.
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
        // Without it, what the check finds may change before it is acted upon.
        let _directory = lock_directory(&self.path);
        if let Ok(status) = lstat(&self.path)
            && (status.st_dev, status.st_ino) == self.made
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = ?self.path, %error, "cannot remove the socket");
        }
    }
}

/// What has become of a connection to a program of the host.
#[derive(Debug)]
pub(crate) enum Connected {
    /// It is there.
    To(OwnedFd),
    /// The program's queue of connections is full.
    Busy,
    /// Nobody listens, or the system refuses.
    Refused(Errno),
}

/// Connects to whoever listens at `path`. Does not wait.
pub(crate) fn connect_to(path: &Path) -> Connected {
    let connected = || {
        let address = SocketAddrUnix::new(path)?;
        let socket = stream_socket()?;
        connect(&socket, &address)?;
        Ok(socket)
    };
    match connected() {
        Ok(socket) => Connected::To(socket),
        Err(Errno::AGAIN | Errno::INTR) => Connected::Busy,
        Err(error) => Connected::Refused(error),
    }
}

fn stream_socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Locks the directory of `path` against others who make or remove a socket there, which takes them less
/// than a millisecond.
fn lock_directory(path: &Path) -> Result<File, Errno> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory = open(directory, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    // In a directory of many users, any of them can hold the lock for ever; ours is not worth waiting.
    for _ in 0..LOCK_TRIES {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::AGAIN | Errno::INTR) => std::thread::yield_now(),
            result => return result.map(|()| directory.into()),
        }
    }
    Err(Errno::AGAIN)
}

/// How often the directory's lock is asked for.
const LOCK_TRIES: usize = 100_000;

/// Removes the socket of a process that is gone. Leaves everything else, and says so.
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
    let probe = stream_socket().map_err(failed("socket"))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {}
        Err(Errno::NOENT) => return Ok(()),
        // A full queue, or a socket of another type: somebody is there.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => {
            return Err(BindError::InUse { path: path.to_owned() });
        }
        Err(error) => return Err(failed("connect")(error)),
    }
    let unlink = |source| BindError::System { path: path.to_owned(), call: "unlink", source };
    std::fs::remove_file(path).map_err(unlink)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    use super::*;

    #[test]
    fn the_path_is_there_as_long_as_the_listener_and_for_its_user_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = Listener::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let _program = UnixStream::connect(&path).unwrap();
        assert!(listener.accept().unwrap().is_some());
        assert!(listener.accept().unwrap().is_none());
        assert!(matches!(Listener::bind(&path), Err(BindError::InUse { .. })));
        drop(listener);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn a_dead_socket_is_replaced_and_nothing_else_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        drop(UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&path).unwrap();
        // Whoever takes the place while we are there keeps it.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "data").unwrap();
        drop(listener);
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        assert!(matches!(Listener::bind(&path), Err(BindError::NotASocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_path_must_have_room_for_a_port() {
        for (len, fits) in [(MAX_PATH - PORT_BYTES, true), (MAX_PATH - PORT_BYTES + 1, false)] {
            let path = Path::new("/nowhere").join("x".repeat(len - "/nowhere/".len()));
            let error = Listener::bind(&path).unwrap_err();
            assert_eq!(matches!(error, BindError::PathTooLong { .. }), !fits, "{len}: {error}");
            let longest = SocketAddr::from_pathname(path_of_port(&path, u32::MAX));
            assert_eq!(longest.is_ok(), fits, "{len}: what programs can bind");
        }
    }

    #[test]
    fn a_port_is_part_of_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let absent = connect_to(&path_of_port(&path, 52));
        assert!(matches!(absent, Connected::Refused(Errno::NOENT)), "{absent:?}");
        let program = UnixListener::bind(directory.path().join("vsock_52")).unwrap();
        let there = connect_to(&path_of_port(&path, 52));
        assert!(matches!(there, Connected::To(_)), "{there:?}");
        program.accept().unwrap();
        drop(program);
        let dead = connect_to(&path_of_port(&path, 52));
        assert!(matches!(dead, Connected::Refused(Errno::CONNREFUSED)), "{dead:?}");
    }
}
