//! A server saves itself: everything stands still, the state goes to whoever asked for it, and then the
//! server is over or goes on.

use std::io::{self, BufWriter, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kmcl::SaveOptions;
use saved_state::file::{FileWriteError, FileWriter};
use saved_state::text::Producer;
use saved_state::{FormatVersion, Save, SaveStep, StreamKind};
use vmbus_host::HeldBus;
use vmbus_unix::{HeldHost, HoldError, UnixHost};
use vsp_storage::{ControllerError, FrozenController, ScsiController};

use crate::control::{Kind, Parts, SaveRequest, Saved, receive, send};
use crate::exit::{Exit, Failure, Result};

/// What becomes of the server.
#[derive(Debug)]
pub(super) enum After {
    /// It goes on.
    GoesOn,
    /// It is over: its guest goes on elsewhere. Whoever asked learns of its end by the end of this
    /// connection.
    Moved(UnixStream),
}

/// Everything that stands still. Dropped in this order: a saved state must be void before any channel
/// does something that it does not know of.
struct Still<'a> {
    host: HeldHost<'a>,
    bus: HeldBus,
    controller: FrozenController,
}

impl<'a> Still<'a> {
    /// Has everything stand still and waits, at most `settle`, for requests that run.
    fn stand(
        host: &'a UnixHost,
        controller: &ScsiController,
        settle: Duration,
    ) -> Result<Self, Failure> {
        let host = host.hold().map_err(hold_failure)?;
        let bus = host.host().bus().hold();
        let controller = controller.freeze().map_err(freeze_failure)?;
        let still = Self { host, bus, controller };
        if !still.controller.wait(Some(settle)) {
            let running = still.controller.running();
            return Err(Failure::disk(
                format_args!(
                    "{running} requests still run after {} s and cannot be cancelled",
                    settle.as_secs_f64()
                ),
                "nothing was saved and the server goes on; see what keeps the disk",
            ));
        }
        Ok(still)
    }

    /// Writes the saved state to `out`. Returns its bytes, and how many requests are in flight in it.
    fn write(&self, request: &SaveRequest, out: &mut impl Write) -> Result<(u64, u32), Failure> {
        let options = SaveOptions { format: FormatVersion::NEWEST, producer: producer() };
        let buffer = request.buffer_bytes as usize;
        let mut file = FileWriter::new(options.format, options.producer);
        let transport = self.host.save(&options).map_err(|error| {
            Failure::peer(
                format_args!("the connection cannot be saved: {error}"),
                "end the guest, or have it reconnect",
            )
        })?;
        file.add("connection", 0, Stepped { save: transport, buffer });
        let bus = self.bus.save(&options).map_err(unsavable)?;
        file.add("bus", 0, Stepped { save: bus, buffer });
        for stream in self.controller.streams(&options).map_err(freeze_failure)? {
            file.add(&stream.name, stream.index, Stepped { save: stream.save, buffer });
        }
        let written = file.write_to(out).map_err(write_failure)?;
        let streams = written.streams.iter().map(|(entry, _)| entry);
        let channels = streams.filter(|entry| entry.stream == StreamKind::CHANNEL);
        Ok((written.bytes, channels.map(|entry| entry.items).sum()))
    }

    /// The guest goes on elsewhere.
    fn move_away(self) {
        let Self { host, bus, controller } = self;
        controller.move_away();
        bus.move_away();
        host.move_away();
    }
}

/// The program that saves, for the header of each stream.
fn producer() -> Producer {
    const NAME: &str = concat!("kmcl ", env!("CARGO_PKG_VERSION"));
    Producer::new(NAME).unwrap_or(Producer::EMPTY)
}

/// Does what `request` asks for. Whatever fails, the server goes on.
pub(super) fn save(
    host: &UnixHost,
    controller: &ScsiController,
    stream: UnixStream,
    request: &SaveRequest,
) -> After {
    match try_save(host, controller, &stream, request) {
        Ok(Some(still)) => {
            still.move_away();
            After::Moved(stream)
        }
        Ok(None) => After::GoesOn,
        Err(failure) => {
            tracing::warn!(%failure, "not saved");
            if let Ok(reason) = serde_json::to_vec(&failure) {
                // Whoever asked may be gone, and may be the reason.
                let _ = send(&mut &stream, Kind::Failed, &reason);
            }
            After::GoesOn
        }
    }
}

/// Returns what stands still if the server is to end.
fn try_save<'a>(
    host: &'a UnixHost,
    controller: &ScsiController,
    stream: &UnixStream,
    request: &SaveRequest,
) -> Result<Option<Still<'a>>, Failure> {
    let began = Instant::now();
    let still = Still::stand(host, controller, Duration::from_millis(request.settle_ms))?;
    let settled = began.elapsed();
    let mut out = BufWriter::with_capacity(64 << 10, stream);
    let (bytes, in_flight) = still.write(request, &mut Parts(&mut out))?;
    out.flush().map_err(|error| lost(&error))?;
    let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let saved =
        Saved { in_flight, settled_us: micros(settled), saved_us: micros(began.elapsed()), bytes };
    let kept = if request.go_on {
        drop(still);
        None
    } else {
        Some(still)
    };
    let summary = serde_json::to_vec(&saved).map_err(unsavable)?;
    send(&mut out, Kind::Saved, &summary)
        .and_then(|()| out.flush())
        .map_err(|error| lost(&error))?;
    let Some(still) = kept else { return Ok(None) };
    match receive(&mut &*stream, &mut Vec::new()) {
        Ok(Kind::Keep) => Ok(Some(still)),
        Ok(_) => Err(lost(&io::ErrorKind::InvalidData.into())),
        Err(error) => Err(lost(&error)),
    }
}

/// A [`Save`] that is given buffers of a certain size only, unless a chunk needs more.
struct Stepped<S> {
    save: S,
    buffer: usize,
}

impl<S: Save> Save for Stepped<S> {
    type Error = S::Error;

    fn step(&mut self, room: &mut [u8]) -> Result<SaveStep, S::Error> {
        let most = self.buffer.clamp(1, room.len().max(1));
        let step = self.save.step(room.get_mut(..most).unwrap_or_default())?;
        if step.written > 0 || step.done || step.needed <= most || step.needed > room.len() {
            return Ok(step);
        }
        // The next chunk is larger than the buffer: just that chunk.
        self.save.step(room.get_mut(..step.needed).unwrap_or_default())
    }
}

fn lost(error: &io::Error) -> Failure {
    Failure::system(format_args!("whoever asked for the saved state is gone: {error}"), "")
}

fn unsavable(error: impl std::fmt::Display) -> Failure {
    Failure::system(format_args!("the state cannot be saved: {error}"), "report this")
}

fn write_failure(error: FileWriteError) -> Failure {
    match error {
        FileWriteError::Output(error) => lost(&error),
        error => unsavable(error),
    }
}

fn hold_failure(error: HoldError) -> Failure {
    Failure::peer(format_args!("the server cannot be held: {error}"), "try again")
}

fn freeze_failure(error: ControllerError) -> Failure {
    Failure::new(
        Exit::System,
        format_args!("the controller cannot be frozen: {error}"),
        "try again",
    )
}
