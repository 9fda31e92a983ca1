//! A number that both processes can see, that one of them raises at once and for good, and that is
//! still there when that process is gone.
//!
//! It stands in a file in memory of which both have a descriptor. A frame would not do: it can wait
//! for room in the socket, and be lost with the process that wanted to send it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, fcntl_get_seals, memfd_create};
use rustix::io::{Errno, pread, pwrite};

use crate::error::ConnectionError;

/// The end of whoever raises it.
#[derive(Debug)]
pub(crate) struct Epoch {
    file: OwnedFd,
    value: u64,
}

impl Epoch {
    /// One that stands at `value`.
    pub(crate) fn new(value: u64) -> Result<Self, Errno> {
        // Without `MFD_ALLOW_SEALING`: nobody can seal it against our writing.
        let file = memfd_create("vmbus-epoch", MemfdFlags::CLOEXEC)?;
        let mut epoch = Self { file, value };
        epoch.set(value)?;
        Ok(epoch)
    }

    pub(crate) fn value(&self) -> u64 {
        self.value
    }

    /// From now on it stands at `value`, for the peer too.
    pub(crate) fn set(&mut self, value: u64) -> Result<(), Errno> {
        loop {
            match pwrite(&self.file, &value.to_le_bytes(), 0) {
                Ok(8) => break,
                Ok(_) => return Err(Errno::IO),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        self.value = value;
        Ok(())
    }

    /// One higher. What was saved before is void.
    pub(crate) fn raise(&mut self) -> Result<(), Errno> {
        self.set(self.value.wrapping_add(1)) // 64 bits: not in a lifetime
    }
}

impl AsFd for Epoch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The other end.
#[derive(Debug)]
pub(crate) struct PeerEpoch(OwnedFd);

impl PeerEpoch {
    /// Takes what a peer has sent. Only files in memory have seals, and they are read without
    /// waiting for anybody.
    pub(crate) fn from_peer(file: OwnedFd) -> Result<Self, ConnectionError> {
        fcntl_get_seals(&file).map_err(|_| ConnectionError::NotAnEpoch)?;
        Ok(Self(file))
    }

    /// What stands in it. A peer that has emptied the file has no epoch that anybody has saved.
    pub(crate) fn value(&self) -> u64 {
        let mut bytes = [0; 8];
        match pread(&self.0, &mut bytes, 0) {
            Ok(8) => u64::from_le_bytes(bytes),
            Ok(_) | Err(_) => u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};

    use super::*;

    #[test]
    fn it_is_seen_at_once_and_outlives_its_owner() {
        let mut epoch = Epoch::new(41).unwrap();
        let peer = PeerEpoch::from_peer(epoch.file.try_clone().unwrap()).unwrap();
        assert_eq!((peer.value(), epoch.value()), (41, 41));
        epoch.raise().unwrap();
        assert_eq!((peer.value(), epoch.value()), (42, 42));
        drop(epoch);
        assert_eq!(peer.value(), 42);
    }

    #[test]
    fn a_peer_cannot_keep_it_from_being_raised() {
        let mut epoch = Epoch::new(1).unwrap();
        let theirs = epoch.file.try_clone().unwrap();
        assert_eq!(fcntl_add_seals(&theirs, SealFlags::WRITE), Err(Errno::PERM));
        ftruncate(&theirs, 0).unwrap();
        let peer = PeerEpoch::from_peer(theirs).unwrap();
        assert_eq!(peer.value(), u64::MAX);
        epoch.raise().unwrap();
        assert_eq!(peer.value(), 2);
    }

    #[test]
    fn only_files_in_memory_are_taken() {
        let (pipe, _other) = std::io::pipe().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let process = std::fs::File::open("/proc/self/stat").unwrap();
        let table: [(&str, OwnedFd); 3] =
            [("pipe", pipe.into()), ("null", null.into()), ("process", process.into())];
        for (what, fd) in table {
            assert!(PeerEpoch::from_peer(fd).is_err(), "{what}");
        }
    }
}
