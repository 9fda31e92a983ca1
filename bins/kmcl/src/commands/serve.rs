//! `kmcl serve`: disk images as a VSP, for one guest process after another.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use kmcl::Guid;
use kmcl_worker::WorkerError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Serialize;
use vmbus_unix::{BindError, UnixHost};
use vsp_storage::block::{Backend, CacheMode, Engine, FileOptions, ImageError, open_file};
use vsp_storage::{
    ControllerConfig, ControllerError, Disk, DiskOptions, Driver, ScsiAddress, ScsiController,
};

use crate::cli::{BackEnd, Cache, DiskSpec, Serve};
use crate::exit::{Exit, Failure, Result};
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::size::Size;
use crate::workers::{self, Workers};

/// The instance by which guests know the controller: always the same, so that they know it again.
const CONTROLLER: Guid = Guid::from_u128(0x6b6d_636c_7363_7369_8000_0000_0000_0001);

/// Most disks of one server: the LUNs that guests look at on one target.
const MAX_DISKS: usize = 64;

/// Subchannels that guests may ask for.
const MAX_SUB_CHANNELS: u16 = 8;

/// Threads for each image where io_uring is not to be had.
const THREADS: usize = 4;

/// The line that says that guests may connect.
#[derive(Serialize)]
struct Ready<'a> {
    event: &'static str,
    socket: &'a Path,
    disks: usize,
    bytes: u64,
    backend: &'static str,
    workers: u16,
    pid: u32,
}

/// An image that is open and locked.
struct Opened<'a> {
    spec: &'a DiskSpec,
    disk: Arc<Disk>,
    backend: &'static str,
}

pub(crate) fn run(arguments: &Serve, output: &Output) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    if arguments.disks.len() > MAX_DISKS {
        return Err(Failure::usage(
            format_args!("{} disks, at most {MAX_DISKS} are possible", arguments.disks.len()),
            "start a second server",
        ));
    }
    let opened = arguments.disks.iter().map(|spec| open(spec, arguments.back_end.backend));
    let opened = opened.collect::<Result<Vec<_>>>()?;
    let host = UnixHost::bind(&arguments.socket).map_err(bind_failure)?;
    let count = arguments.back_end.workers.unwrap_or_else(workers::default_count);
    let workers = Workers::start(count).map_err(worker_failure)?;
    let controller = offer(&host, workers, &opened).map_err(controller_failure)?;

    let bytes = opened.iter().map(|opened| opened.disk.backend().bytes()).sum();
    let backend = opened.first().map_or("none", |opened| opened.backend);
    let ready = Ready {
        event: "ready",
        socket: &arguments.socket,
        disks: opened.len(),
        bytes,
        backend,
        workers: count,
        pid: std::process::id(),
    };
    let (disks, socket) = (opened.len(), arguments.socket.display());
    let noun = if disks == 1 { "disk" } else { "disks" };
    let line = format!("serving {disks} {noun}, {}, at {socket} with {backend}", Size(bytes));
    output.announce(&ready, &line)?;

    let result = drive(&host, &interrupt, arguments.until_eof);
    controller.close();
    drop(host);
    result.and(flush(&opened))
}

fn open(spec: &DiskSpec, backend: BackEnd) -> Result<Opened<'_>> {
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
    Ok(Opened { spec, disk, backend: name })
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

/// A controller with all disks, offered to the guests of `host`.
fn offer(
    host: &UnixHost,
    workers: Arc<Workers>,
    opened: &[Opened<'_>],
) -> Result<ScsiController, ControllerError> {
    let mut config = ControllerConfig::new(CONTROLLER);
    config.max_sub_channels = MAX_SUB_CHANNELS;
    let bus = Arc::new(host.bus().clone());
    let controller = ScsiController::new(bus, workers as Arc<dyn Driver>, config)?;
    for (opened, lun) in opened.iter().zip(0..) {
        controller.attach(ScsiAddress::new(0, 0, lun), Arc::clone(&opened.disk))?;
    }
    controller.offer()?;
    Ok(controller)
}

/// Takes care of guests until this process is told to end.
fn drive(host: &UnixHost, interrupt: &Interrupt, until_eof: bool) -> Result<()> {
    let stdin = std::io::stdin();
    let failed = |error: std::io::Error| {
        Failure::system(format_args!("cannot wait for guests: {error}"), "start again")
    };
    loop {
        let mut fds = vec![PollFd::new(host, PollFlags::IN), PollFd::new(interrupt, PollFlags::IN)];
        if until_eof {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
        // Whatever comes on standard input, its end is all that is waited for, and nothing is sent.
        let mut others = fds.iter().skip(1);
        if others.any(|fd| !fd.revents().is_empty()) {
            return Ok(());
        }
        host.ready();
    }
}

/// Brings to the medium what guests have written and not flushed.
fn flush(opened: &[Opened<'_>]) -> Result<()> {
    for Opened { spec, .. } in opened.iter().filter(|opened| !opened.spec.read_only) {
        File::open(&spec.path).and_then(|file| file.sync_all()).map_err(|error| {
            Failure::disk(
                format_args!("cannot flush {}: {error}", spec.path.display()),
                "what guests wrote last and did not flush may be lost; check the file system",
            )
        })?;
    }
    Ok(())
}

fn image_failure(error: ImageError) -> Failure {
    let exit = match error {
        ImageError::Resources { .. } => Exit::System,
        _ => Exit::Disk,
    };
    Failure::new(exit, error, "")
}

fn bind_failure(error: BindError) -> Failure {
    match error {
        BindError::InUse { .. } => {
            Failure::peer(format_args!("the socket {error}"), "choose another --socket")
        }
        BindError::NotASocket { .. } => {
            Failure::peer(error, "choose a --socket path where nothing is, or remove it")
        }
        BindError::PathTooLong { .. } => Failure::usage(error, "choose a shorter --socket path"),
        _ => Failure::system(error, "choose a --socket in a directory that can be written"),
    }
}

fn worker_failure(error: WorkerError) -> Failure {
    Failure::system(
        format_args!("cannot start the workers: {error}"),
        "use fewer --workers, or allow this process more threads and open files (ulimit)",
    )
}

fn controller_failure(error: ControllerError) -> Failure {
    match error {
        ControllerError::Lun(_) => Failure::disk(error, "name each image once"),
        _ => Failure::system(error, "allow this process more memory and open files (ulimit)"),
    }
}
