//! Disk images as plain files: making one, copying one, and judging whether bytes are the right ones.
//! Nothing here knows VMBus: it is the other witness when data that went through VMBus is compared.

pub(crate) mod compare;
pub(crate) mod copy;
pub(crate) mod ext4;
pub(crate) mod pattern;

use std::fs::File;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::exit::{Failure, Result};

/// Bytes of a sector: the unit in which images are measured.
pub(crate) const SECTOR: u64 = 512;

/// A disk image that is open, with its size.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) bytes: u64,
}

impl Image {
    /// Opens the image at `path` for reading, and refuses what cannot be a disk.
    ///
    /// # Errors
    /// A [`Failure`] of kind disk that says what is wrong with the file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let image = Self::open_any(path)?;
        let (bytes, shown) = (image.bytes, path.display());
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(Failure::disk(
                format_args!(
                    "{shown} has {bytes} bytes, which is no whole number of 512-byte sectors"
                ),
                format_args!("grow it with: truncate -s %{SECTOR} {shown}"),
            ));
        }
        Ok(image)
    }

    /// As [`Self::open`], for a file of any size.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub(crate) fn open_any(path: &Path) -> Result<Self> {
        let shown = path.display();
        // Not blocking, or a pipe would keep us here until somebody writes to it.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let opened = rustix::fs::open(path, flags, Mode::empty()).map_err(std::io::Error::from);
        let file = opened.map(File::from).map_err(|error| {
            let advice = match error.kind() {
                std::io::ErrorKind::NotFound => "check the path",
                std::io::ErrorKind::PermissionDenied => "make the file readable for this user",
                _ => "check the file and what it is stored on",
            };
            Failure::disk(format_args!("cannot open the disk image {shown}: {error}"), advice)
        })?;
        let metadata = file.metadata().map_err(|error| {
            Failure::disk(format_args!("cannot examine {shown}: {error}"), "check the file system")
        })?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(Failure::disk(
                format_args!("{shown} is a directory, not a disk image"),
                "name a file, or make an image of the directory with mkfs.ext4 -d",
            ));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Failure::disk(
                format_args!("{shown} is neither a file nor a block device"),
                "name a disk image",
            ));
        }
        let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|error| {
            Failure::disk(format_args!("cannot measure {shown}: {error}"), "check the file system")
        })?;
        Ok(Self { path: path.to_path_buf(), file, bytes })
    }

    /// Holds the image against whoever serves it for writing, as long as this value lives.
    ///
    /// # Errors
    /// A [`Failure`] of kind disk if somebody does.
    pub(crate) fn lock_shared(&self) -> Result<()> {
        match rustix::fs::flock(&self.file, rustix::fs::FlockOperation::NonBlockingLockShared) {
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Failure::disk(
                format_args!("{} is in use by another process", self.path.display()),
                "stop that one, or name a copy",
            )),
            // A file system without locks has nobody who holds one.
            _ => Ok(()),
        }
    }

    /// Asks the system to drop what it keeps of the file in memory, so that the next read shows what
    /// the file system really has. Best effort: what is dirty or in use stays.
    pub(crate) fn forget_cached(&self) {
        let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
    }

    /// Reads `into` from byte `offset` on, through the page cache of this process's own view.
    ///
    /// # Errors
    /// A [`Failure`] of kind disk, also where the file has become shorter.
    pub(crate) fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, into, offset).map_err(|error| {
            Failure::disk(
                format_args!(
                    "cannot read {} bytes at byte {offset} of {}: {error}",
                    into.len(),
                    self.path.display()
                ),
                "check the file and what it is stored on",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    #[test]
    fn what_cannot_be_a_disk_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: u64| {
            let path = dir.path().join(name);
            File::create(&path).unwrap().set_len(bytes).unwrap();
            path
        };
        for (path, expected) in [
            (file("good", 1024), Ok(1024)),
            (file("empty", 0), Err("no whole number of 512-byte sectors")),
            (file("odd", 1000), Err("no whole number of 512-byte sectors")),
            (dir.path().join("missing"), Err("cannot open")),
            (dir.path().to_path_buf(), Err("is a directory")),
            (PathBuf::from("/dev/null"), Err("neither a file nor a block device")),
        ] {
            match (Image::open(&path), expected) {
                (Ok(image), Ok(bytes)) => assert_eq!(image.bytes, bytes, "{path:?}"),
                (Err(failure), Err(part)) => {
                    assert_eq!(failure.exit, Exit::Disk, "{path:?}");
                    assert!(failure.to_string().contains(part), "{path:?}: {failure}");
                }
                (got, expected) => panic!("{path:?}: {got:?} instead of {expected:?}"),
            }
        }
    }
}
