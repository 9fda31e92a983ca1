//! A disk image: an open, locked file or block device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, SeekFrom, StatxFlags, fcntl_setfl, fstat,
    statx,
};
use rustix::io::Errno;

use super::IoError;

/// Alignment to assume for direct I/O where the system does not tell.
const DEFAULT_DIRECT_ALIGNMENT: u32 = 4096;

/// How the page cache of the host is used.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum CacheMode {
    /// Past the cache (`O_DIRECT`) for every request that is aligned well enough, on a file system
    /// that can; the guest has a cache of its own.
    #[default]
    Direct,
    /// Through the cache.
    Buffered,
}

/// Why a file cannot be a disk. Every message says what to do.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// There is none.
    #[error("disk image {path:?} does not exist: check the path, or create the image first")]
    NotFound {
        /// As given.
        path: PathBuf,
    },
    /// It may not be read.
    #[error("disk image {path:?} may not be read: change its permissions, or run as its owner")]
    NotReadable {
        /// As given.
        path: PathBuf,
    },
    /// It may be read, perhaps, but not written.
    #[error(
        "disk image {path:?} may not be written: change its permissions, or serve it read-only"
    )]
    NotWritable {
        /// As given.
        path: PathBuf,
    },
    /// It is a directory, a socket, a pipe, a character device.
    #[error("{path:?} is a {kind}: give a regular file or a block device as disk image")]
    NotAFile {
        /// As given.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// It has no bytes.
    #[error("disk image {path:?} is empty: give it a size first, e.g. with truncate(1)")]
    Empty {
        /// As given.
        path: PathBuf,
    },
    /// Its size is odd.
    #[error(
        "disk image {path:?} has {bytes} bytes, no multiple of the sector size {sector}: \
         choose the right sector size, or pad it with truncate --size=%{sector}"
    )]
    NotWholeSectors {
        /// As given.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// Bytes per sector.
        sector: u32,
    },
    /// Somebody else serves it.
    #[error(
        "disk image {path:?} is in use: stop the other process, or serve a copy; \
         two that only read can share it"
    )]
    InUse {
        /// As given.
        path: PathBuf,
    },
    /// The path led to another file the second time.
    #[error("disk image {path:?} was replaced while it was opened: try again")]
    Replaced {
        /// As given.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot {action} disk image {path:?}: {errno}")]
    System {
        /// As given.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        errno: Errno,
    },
    /// The system has no threads, descriptors or memory left for a back end.
    #[error("cannot {action}: {errno}; close other programs or raise the limits")]
    Resources {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        errno: Errno,
    },
}

/// An open image. Its lock lasts as long as the value.
#[derive(Debug)]
pub(super) struct Image {
    file: OwnedFd,
    direct: Option<Direct>,
    bytes: u64,
    is_device: bool,
    read_only: bool,
    /// Direct I/O was refused although it was promised.
    no_direct: AtomicBool,
    /// The file system cannot punch holes.
    no_punch: AtomicBool,
    /// The file system cannot zero ranges.
    no_zero_range: AtomicBool,
    /// A flush has failed: earlier writes may be lost.
    lost_writes: AtomicBool,
}

/// The same file, opened past the page cache.
#[derive(Debug)]
struct Direct {
    file: OwnedFd,
    memory_alignment: u32,
    offset_alignment: u32,
}

impl Image {
    /// Opens, checks and locks the file at `path`.
    pub(super) fn open(
        path: &Path,
        read_only: bool,
        cache: CacheMode,
        sector: u32,
    ) -> Result<Self, ImageError> {
        let file = open(path, read_only, OFlags::empty())?;
        let stat = fstat(&file).map_err(system(path, "examine"))?;
        let is_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            other => return Err(not_a_file(path, other)),
        };
        let lock = if read_only {
            FlockOperation::NonBlockingLockShared
        } else {
            FlockOperation::NonBlockingLockExclusive
        };
        rustix::fs::flock(&file, lock).map_err(|errno| match errno {
            Errno::WOULDBLOCK => ImageError::InUse { path: path.to_owned() },
            errno => system(path, "lock")(errno),
        })?;
        // Of a block device, only the end tells the size. The position is not used otherwise.
        let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(system(path, "measure"))?;
        if bytes == 0 {
            return Err(ImageError::Empty { path: path.to_owned() });
        }
        if !bytes.is_multiple_of(u64::from(sector)) {
            return Err(ImageError::NotWholeSectors { path: path.to_owned(), bytes, sector });
        }
        let direct = match cache {
            CacheMode::Direct => Direct::open(path, read_only, (stat.st_dev, stat.st_ino))?,
            CacheMode::Buffered => None,
        };
        Ok(Self {
            file,
            direct,
            bytes,
            is_device,
            read_only,
            no_direct: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            lost_writes: AtomicBool::new(false),
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The file through the page cache.
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The file past the page cache, if it was opened that way too.
    pub(super) fn direct_file(&self) -> Option<BorrowedFd<'_>> {
        self.direct.as_ref().map(|direct| direct.file.as_fd())
    }

    /// Whether a transfer may go past the page cache: the alignments of memory and of the disk that
    /// it would need, or `None` if none does.
    pub(super) fn direct_alignments(&self) -> Option<(u32, u32)> {
        match &self.direct {
            Some(direct) if !self.no_direct.load(Ordering::Relaxed) => {
                Some((direct.memory_alignment, direct.offset_alignment))
            }
            _ => None,
        }
    }

    /// Whether the file is open both ways, so that kinds of writes must be kept apart.
    pub(super) fn has_two_paths(&self) -> bool {
        self.direct.is_some()
    }

    pub(super) fn can_punch(&self) -> bool {
        !self.no_punch.load(Ordering::Relaxed)
    }

    pub(super) fn can_zero_range(&self) -> bool {
        !self.no_zero_range.load(Ordering::Relaxed)
    }

    /// Direct I/O does not work after all.
    pub(super) fn give_up_direct(&self) {
        if !self.no_direct.swap(true, Ordering::Relaxed) {
            tracing::warn!("direct I/O was refused by the file system; using the page cache");
        }
    }

    pub(super) fn give_up_punch(&self) {
        self.no_punch.store(true, Ordering::Relaxed);
    }

    pub(super) fn give_up_zero_range(&self) {
        self.no_zero_range.store(true, Ordering::Relaxed);
    }

    /// Judges a flush that the system says went well or not.
    ///
    /// A system that failed to write data back reports it once, drops the data and calls later
    /// flushes a success. So the first failure counts for good. A file that became shorter has lost
    /// data as well.
    pub(super) fn judge_flush(&self, result: Result<(), Errno>) -> Result<(), IoError> {
        if let Err(errno) = result {
            self.lost_writes.store(true, Ordering::Relaxed);
            return Err(IoError::Write { at: 0, errno });
        }
        if self.lost_writes.load(Ordering::Relaxed) {
            return Err(IoError::Write { at: 0, errno: Errno::IO });
        }
        match fstat(&self.file) {
            Ok(stat) if !self.is_device => {
                let at = u64::try_from(stat.st_size).unwrap_or(0);
                if at < self.bytes { Err(IoError::EndOfMedium { at }) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }
}

impl Direct {
    /// Opens the file a second time, or says that it cannot be opened that way.
    fn open(path: &Path, read_only: bool, same: (u64, u64)) -> Result<Option<Self>, ImageError> {
        let file = match open(path, read_only, OFlags::DIRECT) {
            Ok(file) => file,
            Err(ImageError::System { errno: Errno::INVAL, .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let stat = fstat(&file).map_err(system(path, "examine"))?;
        if (stat.st_dev, stat.st_ino) != same {
            return Err(ImageError::Replaced { path: path.to_owned() });
        }
        let told = statx(&file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
            .ok()
            .filter(|told| told.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let (memory, offset) = match told {
            Some(told) => (told.stx_dio_mem_align, told.stx_dio_offset_align),
            None => (DEFAULT_DIRECT_ALIGNMENT, DEFAULT_DIRECT_ALIGNMENT),
        };
        // Zeros are the file system's way to say that it only pretends.
        let usable = memory.is_power_of_two() && offset.is_power_of_two();
        Ok(usable.then_some(Self { file, memory_alignment: memory, offset_alignment: offset }))
    }
}

fn open(path: &Path, read_only: bool, more: OFlags) -> Result<OwnedFd, ImageError> {
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    // NONBLOCK: a pipe must be refused, not waited for. It means nothing to files.
    let flags = access | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK | more;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT | Errno::NOTDIR => ImageError::NotFound { path: path.to_owned() },
        Errno::ISDIR => not_a_file(path, FileType::Directory),
        Errno::NXIO => not_a_file(path, FileType::Socket),
        Errno::ACCESS | Errno::PERM if read_only => {
            ImageError::NotReadable { path: path.to_owned() }
        }
        Errno::ACCESS | Errno::PERM | Errno::ROFS => {
            ImageError::NotWritable { path: path.to_owned() }
        }
        errno => system(path, "open")(errno),
    })?;
    // With it, io_uring would report what has to wait as an error.
    fcntl_setfl(&file, more).map_err(system(path, "open"))?;
    Ok(file)
}

fn system(path: &Path, action: &'static str) -> impl Fn(Errno) -> ImageError {
    move |errno| ImageError::System { path: path.to_owned(), action, errno }
}

fn not_a_file(path: &Path, file_type: FileType) -> ImageError {
    let kind = match file_type {
        FileType::Directory => "directory",
        FileType::Socket => "socket",
        FileType::Fifo => "pipe",
        FileType::CharacterDevice => "character device",
        _ => "special file",
    };
    ImageError::NotAFile { path: path.to_owned(), kind }
}
