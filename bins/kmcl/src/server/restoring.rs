//! A server out of a saved state.

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kmcl_vmm::Workers;
use saved_state::StreamKind;
use saved_state::file::{FileError, FileReader, check};
use saved_state::inspect::ALL_KINDS;
use vmbus_unix::{FinishError, HostOptions, NotFinished, RestoreError, RestoringHost, UnixHost};
use vsp_storage::{
    AttachError, ControllerRestoreError, EnableError, RestoringController, ScsiController,
};

use super::disks::Disks;
use super::{bind_failure, controller_config, controller_failure};
use crate::exit::{Exit, Failure, Result};
use crate::interrupt::Interrupt;

/// How often a wait for the guest looks whether it was interrupted.
const GLANCE: Duration = Duration::from_millis(100);

/// Why nothing may be restored from a file that is as it should be.
const ADVICE: &str = "restore an earlier state, or one of this server";

/// What goes on, once its guest is back.
pub(super) struct Restoring {
    host: RestoringHost,
    controller: RestoringController,
}

impl Restoring {
    /// Makes everything anew that the file at `path` tells of. All of the file is checked before any of
    /// it is used.
    ///
    /// # Errors
    /// A [`Failure`] that says what is wrong with the file, the disks or the socket. The saved state is as
    /// good as it was.
    pub(super) fn from_file(
        path: &Path,
        socket: &Path,
        disks: &Disks,
        workers: Arc<Workers>,
    ) -> Result<Self> {
        let unreadable = |error: std::io::Error| {
            Failure::system(
                format_args!("cannot read {}: {error}", path.display()),
                "check the path",
            )
        };
        let mut file = BufReader::new(File::open(path).map_err(unreadable)?);
        let damaged = |error| file_failure(path, error);
        check(&mut file, ALL_KINDS).map_err(damaged)?;
        file.rewind().map_err(unreadable)?;

        let mut file = FileReader::new(file).map_err(damaged)?;
        let mut next = |kind| next_stream(&mut file, path, kind);
        let transport = next(StreamKind::TRANSPORT)?;
        let bus = next(StreamKind::BUS)?;
        let device = next(StreamKind::DEVICE)?;
        let host = UnixHost::bind_restoring(socket, HostOptions::default(), &transport, &bus);
        let host = host.map_err(|error| match error {
            RestoreError::Bind(error) => bind_failure(error),
            error => wrong(path, error),
        })?;
        let bus = Arc::new(host.bus().clone());
        let controller = ScsiController::restoring(bus, workers, controller_config(), &device[..]);
        let mut controller = controller.map_err(|error| match error {
            ControllerRestoreError::Controller(error) => controller_failure(error),
            error => wrong(path, error),
        })?;
        for (address, disk) in disks.iter() {
            controller.attach(address, Arc::clone(disk)).map_err(attach_failure)?;
        }
        controller.enable().map_err(enable_failure)?;
        for index in 0..controller.channels() {
            let stream = file.next_stream().map_err(damaged)?;
            let stream = stream.ok_or_else(|| wrong(path, "a channel's state is missing"))?;
            controller.restore_channel(index, stream).map_err(|error| wrong(path, error))?;
        }
        if let Some(stream) = file.next_stream().map_err(damaged)? {
            let what = format!("it has the state of something else: {}", stream.entry());
            return Err(wrong(path, what));
        }
        Ok(Self { host, controller })
    }

    /// Waits until the guest is back, at most `limit`, and goes on.
    ///
    /// # Errors
    /// A [`Failure`] of kind peer where the guest does not come, or is another one; the saved state is as
    /// good as it was.
    pub(super) fn go_on(
        self,
        limit: Duration,
        interrupt: &Interrupt,
    ) -> Result<(UnixHost, ScsiController)> {
        let Self { mut host, controller } = self;
        let deadline = Instant::now() + limit;
        let host = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let is_back = host.drive_until_back(left.min(GLANCE)).map_err(|error| {
                Failure::system(format_args!("cannot wait for the guest: {error}"), "try again")
            })?;
            if is_back {
                match host.finish().map_err(|unfinished| *unfinished) {
                    Ok(host) => break host,
                    // It has gone again, and may come back once more.
                    Err(NotFinished { restoring, why: FinishError::NoGuest }) => host = restoring,
                    Err(NotFinished { why, .. }) => {
                        let what = format_args!("the guest cannot go on: {why}").to_string();
                        return Err(Failure::peer(what, ADVICE));
                    }
                }
            }
            interrupt.check()?;
            if left.is_zero() {
                return Err(Failure::peer(
                    format_args!("the guest has not come back within {} s", limit.as_secs()),
                    "the saved state is good as long as its guest looks for a server",
                ));
            }
        };
        let controller = controller.start().map_err(|error| {
            Failure::system(format_args!("the controller cannot go on: {error}"), "report this")
        })?;
        Ok((host, controller))
    }
}

/// All bytes of the next stream, which must be of this kind.
fn next_stream(file: &mut FileReader<impl Read>, path: &Path, kind: StreamKind) -> Result<Vec<u8>> {
    let stream = file.next_stream().map_err(|error| file_failure(path, error))?;
    let stream = stream.filter(|stream| stream.entry().stream == kind);
    let Some(mut stream) = stream else {
        return Err(wrong(path, format_args!("it has no state of a {kind} where one is due")));
    };
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().map_err(|error| file_failure(path, error))? {
        bytes.extend_from_slice(chunk);
    }
    Ok(bytes)
}

fn file_failure(path: &Path, error: FileError) -> Failure {
    match error {
        FileError::Source(error) => Failure::system(
            format_args!("cannot read {}: {error}", path.display()),
            "check the path",
        ),
        error => Failure::new(
            Exit::Mismatch,
            format_args!("{} is damaged: {error}", path.display()),
            "restore an earlier state; kmcl inspect shows what is left of this one",
        ),
    }
}

fn wrong(path: &Path, why: impl std::fmt::Display) -> Failure {
    Failure::new(
        Exit::Mismatch,
        format_args!("{} cannot be restored: {why}", path.display()),
        ADVICE,
    )
}

fn attach_failure(error: AttachError) -> Failure {
    match error {
        AttachError::Controller(error) => controller_failure(error),
        error => Failure::disk(error, "name the same images as before, in the same order"),
    }
}

fn enable_failure(error: EnableError) -> Failure {
    match error {
        EnableError::Controller(error) => controller_failure(error),
        error => Failure::disk(error, "name the same images as before, in the same order"),
    }
}
