//! The socket at which a VM is controlled: made so that only its owner can come in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, fchmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with, sockopt,
};
use rustix::process::{Uid, geteuid};

/// Connections that may wait to be taken.
const BACKLOG: i32 = 16;

/// A socket that listens. Dropping it removes its path.
#[derive(Debug)]
pub(super) struct Door {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the path when it was made: what else is there by now is not ours.
    made: (u64, u64),
    owner: Uid,
}

impl Door {
    /// Listens at `path`. A socket that is there and at which nobody listens is replaced.
    ///
    /// # Errors
    /// [`Errno::ADDRINUSE`] where somebody listens, [`Errno::EXIST`] where something else than a socket is,
    /// others of the system's.
    pub(super) fn open(path: &Path) -> Result<Self, Errno> {
        let address = SocketAddrUnix::new(path)?;
        match lstat(path) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) != FileType::Socket => {
                return Err(Errno::EXIST);
            }
            Ok(_) if listens(&address)? => return Err(Errno::ADDRINUSE),
            Ok(_) => unlink(path)?,
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        let socket = socket()?;
        // The path takes its permissions from the socket: it is never open to others.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &address)?;
        let status = lstat(path)?;
        let made = (status.st_dev, status.st_ino);
        listen(&socket, BACKLOG)?;
        Ok(Self { socket, path: path.to_owned(), made, owner: geteuid() })
    }

    /// Takes a connection that waits; `Ok(None)` where there is none. It does not block.
    ///
    /// # Errors
    /// What the system says; a shortage of descriptors or memory among it.
    pub(super) fn accept(&self) -> Result<Option<Visitor>, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match accept_with(&self.socket, flags) {
            Ok(socket) => {
                // Who cannot be asked is nobody's owner.
                let uid = sockopt::socket_peercred(&socket).ok().map(|peer| peer.uid);
                Ok(Some(Visitor {
                    welcome: uid.is_some_and(|uid| self.welcomes(uid)),
                    uid,
                    socket,
                }))
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn welcomes(&self, uid: Uid) -> bool {
        uid == self.owner || uid.is_root()
    }
}

/// Somebody who has connected.
#[derive(Debug)]
pub(super) struct Visitor {
    pub(super) socket: OwnedFd,
    /// Whose process it was that connected.
    pub(super) uid: Option<Uid>,
    /// Whether that is the owner, or root.
    pub(super) welcome: bool,
}

fn socket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn listens(address: &SocketAddrUnix) -> Result<bool, Errno> {
    match connect(&socket()?, address) {
        // Full is listened at, too.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Readable when somebody waits.
impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        if lstat(&self.path).is_ok_and(|found| (found.st_dev, found.st_ino) == self.made)
            && let Err(error) = unlink(&self.path).map_err(io::Error::from)
        {
            tracing::warn!(path = ?self.path, %error, "cannot remove the control socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn only_its_owner_and_root_are_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let mut door = Door::open(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{mode:o}");
        let _peer = UnixStream::connect(&path).unwrap();
        let visitor = door.accept().unwrap().unwrap();
        assert!(visitor.welcome);
        assert_eq!(visitor.uid, Some(geteuid()));
        assert!(door.accept().unwrap().is_none());
        door.owner = Uid::from_raw(4000);
        for (uid, welcome) in [(4000, true), (0, true), (4001, false), (u32::MAX - 1, false)] {
            assert_eq!(door.welcomes(Uid::from_raw(uid)), welcome, "uid {uid}");
        }
    }

    #[test]
    fn a_path_is_taken_only_where_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), "").unwrap();
        drop(UnixListener::bind(at("stale")).unwrap());
        let _used = UnixListener::bind(at("used")).unwrap();
        for (name, expected) in [
            ("file", Some(Errno::EXIST)),
            ("used", Some(Errno::ADDRINUSE)),
            ("no/such", Some(Errno::NOENT)),
            ("stale", None),
            ("new", None),
        ] {
            assert_eq!(Door::open(&at(name)).err(), expected, "{name}");
        }
        let long = at(&"x".repeat(120));
        assert_eq!(Door::open(&long).err(), Some(Errno::NAMETOOLONG));
    }

    #[test]
    fn the_path_goes_with_it_unless_it_is_somebody_elses_by_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        drop(Door::open(&path).unwrap());
        assert!(!path.exists());
        let door = Door::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "mine").unwrap();
        drop(door);
        assert!(path.exists());
    }
}
