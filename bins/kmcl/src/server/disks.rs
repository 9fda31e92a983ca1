//! The images of a server: opened, locked, and at the end flushed.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use vsp_storage::block::{Backend, CacheMode, Engine, FileOptions, ImageError, open_file};
use vsp_storage::{Disk, DiskOptions, ScsiAddress};

use crate::cli::{BackEnd, Cache, DiskSpec};
use crate::exit::{Exit, Failure, Result};

/// Most disks of one server: the LUNs that guests look at on one target.
const MAX_DISKS: usize = 64;

/// Threads for each image where io_uring is not to be had.
const THREADS: usize = 4;

/// An image that is open and locked.
struct Opened {
    spec: DiskSpec,
    disk: Arc<Disk>,
    backend: &'static str,
}

/// Every image of a server.
pub(crate) struct Disks(Vec<Opened>);

impl Disks {
    /// Opens the images in `specs`, the first of which is LUN 0, and so on.
    ///
    /// # Errors
    /// A [`Failure`] that says which one cannot be had, and why.
    pub(crate) fn open(specs: &[DiskSpec], backend: BackEnd) -> Result<Self> {
        if specs.len() > MAX_DISKS {
            return Err(Failure::usage(
                format_args!("{} disks, at most {MAX_DISKS} are possible", specs.len()),
                "start a second server",
            ));
        }
        let opened = specs.iter().map(|spec| open(spec, backend));
        Ok(Self(opened.collect::<Result<_>>()?))
    }

    /// Each disk and its address.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (ScsiAddress, &Arc<Disk>)> {
        (0..).zip(&self.0).map(|(lun, opened)| (ScsiAddress::new(0, 0, lun), &opened.disk))
    }

    /// Bytes of all of them together.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|opened| opened.disk.backend().bytes()).sum()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// How the first one is read and written.
    pub(crate) fn backend(&self) -> &'static str {
        self.0.first().map_or("none", |opened| opened.backend)
    }

    /// Brings to the medium what guests have written and not flushed.
    ///
    /// # Errors
    /// A [`Failure`] of kind disk.
    pub(crate) fn flush(&self) -> Result<()> {
        for Opened { spec, .. } in self.0.iter().filter(|opened| !opened.spec.read_only) {
            File::open(&spec.path).and_then(|file| file.sync_all()).map_err(|error| {
                Failure::disk(
                    format_args!("cannot flush {}: {error}", spec.path.display()),
                    "what guests wrote last and did not flush may be lost; check the file system",
                )
            })?;
        }
        Ok(())
    }
}

fn open(spec: &DiskSpec, backend: BackEnd) -> Result<Opened> {
    let (engine, name) = match backend {
        BackEnd::Auto | BackEnd::IoUring => (Engine::IoUring, "io_uring"),
        BackEnd::Threads => (Engine::Threads(THREADS), "threads"),
    };
    let (opened, name) = match (open_with(spec, engine), backend) {
        (Err(ImageError::Resources { .. }), BackEnd::Auto) => {
            (open_with(spec, Engine::Threads(THREADS)), "threads")
        }
        (opened, _) => (opened, name),
    };
    let opened = opened.map_err(image_failure)?;
    let options = DiskOptions { sector_bytes: spec.sector, serial: serial(&spec.path) };
    let disk = Disk::new(opened, &options).map_err(|error| Failure::disk(error, ""))?;
    Ok(Opened { spec: spec.clone(), disk, backend: name })
}

fn open_with(spec: &DiskSpec, engine: Engine) -> Result<Arc<dyn Backend>, ImageError> {
    let cache = match spec.cache {
        Cache::Direct => CacheMode::Direct,
        Cache::Buffered => CacheMode::Buffered,
    };
    let options =
        FileOptions { read_only: spec.read_only, cache, engine, sector_bytes: spec.sector };
    open_file(&spec.path, &options)
}

/// A serial number that stays with the image: a hash of where it is (FNV-1a, 64 bits).
fn serial(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let hash =
        path.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("{hash:016X}")
}

fn image_failure(error: ImageError) -> Failure {
    let exit = match error {
        ImageError::Resources { .. } => Exit::System,
        _ => Exit::Disk,
    };
    Failure::new(exit, error, "")
}
