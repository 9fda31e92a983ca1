//! A server: images, a controller, a socket for guests, and one for whoever asks for a save.

mod disks;
mod door;
mod restoring;
mod saving;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kmcl::Guid;
use kmcl_vmm::Workers;
use kmcl_worker::WorkerError;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Serialize;
use vmbus_unix::{BindError, UnixHost};
use vsp_storage::{ControllerConfig, ControllerError, Driver, ScsiController};

use self::disks::Disks;
use self::door::Door;
use self::restoring::Restoring;
use self::saving::After;
use crate::cli::Served;
use crate::exit::{Failure, Result};
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::size::Size;

/// The instance by which guests know the controller: always the same, so that they know it again.
const CONTROLLER: Guid = Guid::from_u128(0x6b6d_636c_7363_7369_8000_0000_0000_0001);

/// Subchannels that guests may ask for.
const MAX_SUB_CHANNELS: u16 = 8;

/// The line that says that guests may connect, or that the guest is back.
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

/// A server that is at work. Fields are dropped in this order.
pub(crate) struct Server<'a> {
    arguments: &'a Served,
    door: Door,
    controller: ScsiController,
    host: UnixHost,
    disks: Disks,
    workers: u16,
}

impl<'a> Server<'a> {
    /// A server that waits for its first guest.
    ///
    /// # Errors
    /// A [`Failure`] that says which image, socket or part of this machine is not to be had.
    pub(crate) fn start(arguments: &'a Served) -> Result<Self> {
        let disks = Disks::open(&arguments.disks, arguments.back_end.backend)?;
        let host = UnixHost::bind(&arguments.socket).map_err(bind_failure)?;
        let (workers, count) = start_workers(arguments)?;
        let controller = offer(&host, workers, &disks).map_err(controller_failure)?;
        let door = Door::open(&arguments.socket)?;
        Ok(Self { arguments, door, controller, host, disks, workers: count })
    }

    /// The server that was saved to the file at `state`, once its guest is back, which may take `limit`.
    ///
    /// # Errors
    /// As for [`Self::start`]; of kind mismatch for a file that is damaged or of something else, of kind
    /// peer where the guest does not come. The saved state is as good as it was.
    pub(crate) fn restore(
        arguments: &'a Served,
        state: &Path,
        limit: Duration,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let disks = Disks::open(&arguments.disks, arguments.back_end.backend)?;
        let (workers, count) = start_workers(arguments)?;
        let restoring = Restoring::from_file(state, &arguments.socket, &disks, workers)?;
        let door = Door::open(&arguments.socket)?;
        let (host, controller) = restoring.go_on(limit, interrupt)?;
        Ok(Self { arguments, door, controller, host, disks, workers: count })
    }

    /// Says that the server is at work, as `event`.
    ///
    /// # Errors
    /// A [`Failure`] of kind system.
    pub(crate) fn announce(&self, output: &Output, event: &'static str) -> Result<()> {
        let (disks, bytes, backend) = (self.disks.len(), self.disks.bytes(), self.disks.backend());
        let ready = Ready {
            event,
            socket: &self.arguments.socket,
            disks,
            bytes,
            backend,
            workers: self.workers,
            pid: std::process::id(),
        };
        let noun = if disks == 1 { "disk" } else { "disks" };
        let line = format!(
            "{} {disks} {noun}, {}, at {} with {backend}",
            if event == "restored" { "restored, serving" } else { "serving" },
            Size(bytes),
            self.arguments.socket.display()
        );
        output.announce(&ready, &line)
    }

    /// Takes care of guests until this process is told to end, or the server is saved and goes on
    /// elsewhere.
    ///
    /// # Errors
    /// A [`Failure`] of kind system, or of kind disk where an image cannot be flushed.
    pub(crate) fn run(self, interrupt: &Interrupt) -> Result<()> {
        let result = self.drive(interrupt);
        let Self { door, controller, host, disks, .. } = self;
        drop(door); // before the path belongs to another server
        match result {
            Ok(Some(_)) => drop(controller), // its channels are over already
            _ => controller.close(),
        }
        drop(host);
        let flushed = disks.flush();
        drop(disks);
        // Whoever asked for the move hears of the end only now: the images are free.
        result.map(drop).and(flushed)
    }

    /// Drives the server. Returns the connection of whoever has moved it away, if it was that.
    fn drive(&self, interrupt: &Interrupt) -> Result<Option<std::os::unix::net::UnixStream>> {
        let stdin = std::io::stdin();
        let failed = |error: std::io::Error| {
            Failure::system(format_args!("cannot wait for guests: {error}"), "start again")
        };
        loop {
            let mut fds = vec![
                PollFd::new(&self.host, PollFlags::IN),
                PollFd::new(&self.door, PollFlags::IN),
                PollFd::new(interrupt, PollFlags::IN),
            ];
            if self.arguments.until_eof {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
            // Whatever comes on standard input, its end is all that is waited for, and nothing is sent.
            if fds.iter().skip(2).any(|fd| !fd.revents().is_empty()) {
                return Ok(None);
            }
            let asked = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            if asked && let Some((stream, request)) = self.door.request() {
                match saving::save(&self.host, &self.controller, stream, &request) {
                    After::GoesOn => {}
                    After::Moved(stream) => return Ok(Some(stream)),
                }
            }
            self.host.ready();
        }
    }
}

fn start_workers(arguments: &Served) -> Result<(Arc<Workers>, u16)> {
    let count = arguments.back_end.workers.unwrap_or_else(Workers::default_count);
    let workers = Workers::start(count).map_err(worker_failure)?;
    Ok((workers, count))
}

fn controller_config() -> ControllerConfig {
    let mut config = ControllerConfig::new(CONTROLLER);
    config.max_sub_channels = MAX_SUB_CHANNELS;
    config
}

/// A controller with all disks, offered to the guests of `host`.
fn offer(
    host: &UnixHost,
    workers: Arc<Workers>,
    disks: &Disks,
) -> Result<ScsiController, ControllerError> {
    let bus = Arc::new(host.bus().clone());
    let controller = ScsiController::new(bus, workers as Arc<dyn Driver>, controller_config())?;
    for (address, disk) in disks.iter() {
        controller.attach(address, Arc::clone(disk))?;
    }
    controller.offer()?;
    Ok(controller)
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
