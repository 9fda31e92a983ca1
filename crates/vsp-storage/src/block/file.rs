//! Opening an image file as a back end.

use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::image::Image;
use super::threads::ThreadBackend;
use super::uring::UringBackend;
use super::{Backend, CacheMode, ImageError};

/// Requests of one file that are with the kernel at a time; further ones wait.
pub const QUEUE_DEPTH: u32 = 256;

/// Most requests of one file that may be in flight, waiting ones included; further ones are refused
/// as busy. A controller of 65 channels with 256 packets each stays below.
pub(super) const QUEUE_MAX: usize = 1 << 15;

/// Most threads a pool may have.
pub const MAX_THREADS: usize = 64;

/// What performs the requests of a file.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Engine {
    /// io_uring where the kernel allows it, else four threads.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// A pool of this many threads, 1 to [`MAX_THREADS`].
    Threads(usize),
}

/// Threads that stand in for io_uring.
const DEFAULT_THREADS: usize = 4;

/// How to open an image file.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// Refuse writes. Several processes may serve one image that way.
    pub read_only: bool,
    /// How to use the host's page cache.
    pub cache: CacheMode,
    /// What performs requests.
    pub engine: Engine,
    /// Bytes per sector, of which the file must be a multiple.
    pub sector_bytes: u32,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            cache: CacheMode::default(),
            engine: Engine::default(),
            sector_bytes: 512,
        }
    }
}

/// Opens the raw image at `path`, a regular file or a block device, and locks it: exclusively, or
/// shared if it is read-only.
///
/// # Errors
/// [`ImageError`], each with a message that says what to do.
pub fn open_file(path: &Path, options: &FileOptions) -> Result<Arc<dyn Backend>, ImageError> {
    let FileOptions { read_only, cache, engine, sector_bytes } = *options;
    let image = Arc::new(Image::open(path, read_only, cache, sector_bytes)?);
    let refused = |action| move |errno| ImageError::Resources { action, errno };
    let threads = |image, count: usize| -> Result<Arc<dyn Backend>, ImageError> {
        ThreadBackend::new(image, count.clamp(1, MAX_THREADS))
            .map(|backend| Arc::new(backend) as Arc<dyn Backend>)
            .map_err(refused("start threads for disk I/O"))
    };
    match engine {
        Engine::Threads(count) => threads(image, count),
        Engine::IoUring | Engine::Auto => match UringBackend::new(Arc::clone(&image)) {
            Ok(backend) => Ok(Arc::new(backend)),
            Err(errno) if engine == Engine::IoUring => {
                Err(refused("set up io_uring for disk I/O")(errno))
            }
            Err(errno) => {
                log_fallback(path, errno);
                threads(image, DEFAULT_THREADS)
            }
        },
    }
}

fn log_fallback(path: &Path, errno: Errno) {
    tracing::info!(?path, %errno, "io_uring is refused; disk I/O is done by threads");
}
