//! The server is moved while a guest is at work: frozen, saved to a file, killed with SIGKILL, restored
//! in a new process, again and again.

mod dice;
mod mover;
mod workload;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::time::{Duration, Instant};

use serde::Serialize;

use self::dice::Dice;
use self::mover::{Mover, Restoring};
use self::workload::Workload;
use super::server::Server;
use crate::cli::{Demo, Target};
use crate::connection::Connection;
use crate::exit::{Failure, Result};
use crate::image::Image;
use crate::interrupt::Interrupt;
use crate::output::{Output, Table};
use crate::progress::Length;
use crate::size::Size;

/// Bytes of the disk that is written and read meanwhile: so few that every block is written often.
const DISK_BYTES: u64 = 16 << 20;

/// The disk's logical unit number: it is the second disk of the server.
const LUN: u8 = 1;

/// How long the guest waits for answers before it looks around.
const TURN: Duration = Duration::from_millis(10);

/// Seconds after which a silent server is given up, and one that is being moved.
const TIMEOUT_S: u64 = 30;

/// Where everything is.
pub(super) struct Place<'a> {
    pub(super) work: &'a Path,
    pub(super) socket: &'a Path,
    pub(super) disks: &'a [&'a Path],
}

/// What was shown.
#[derive(Serialize)]
pub(super) struct Moved {
    /// What `--seed` makes the same again.
    pub(super) seed: u64,
    /// Writes and reads that were sent and ended while the server was moved.
    pub(super) requests: u64,
    /// Blocks found to hold what they must, by reads and in the end by looking at each.
    pub(super) blocks_verified: u64,
    pub(super) moves: Vec<Move>,
}

/// One move.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Move {
    /// Requests that the guest had sent and that had not ended for it, while the server stood still.
    in_flight_of_guest: u64,
    /// Requests that the server had taken and not answered, in the saved state; of these:
    in_flight: u64,
    never_started: u64,
    cancelled: u64,
    finished: u64,
    buffer_bytes: u64,
    state_bytes: u64,
    /// Saves that were begun before and given up.
    given_up: u64,
    freeze_to_settled_us: u64,
    freeze_to_saved_us: u64,
    /// From the request for the save until the file was on the medium.
    file_us: u64,
    /// From the start of the new process until the guest had the first answer of it.
    restore_to_first_completion_us: u64,
}

/// Makes the disk that is worked on: all zeroes.
pub(super) fn make_disk(work: &Path) -> Result<std::path::PathBuf> {
    let path = work.join("moves.img");
    let made = std::fs::File::create(&path).and_then(|file| file.set_len(DISK_BYTES));
    made.map_err(|error| {
        Failure::system(
            format_args!("cannot make a disk in {}: {error}", work.display()),
            "name a directory with room for it with --work-dir",
        )
    })?;
    Ok(path)
}

/// Has the guest at work while the server is moved. Hands back the last server.
///
/// # Errors
/// A [`Failure`]: of kind mismatch for the first thing that is lost, doubled or wrong.
pub(super) fn run(
    arguments: &Demo,
    place: &Place<'_>,
    server: Server,
    output: &Output,
    interrupt: &Interrupt,
) -> Result<(Server, Moved)> {
    let seed = arguments.seed.unwrap_or_else(random_seed);
    let mut moved = Moved { seed, requests: 0, blocks_verified: 0, moves: Vec::new() };
    if arguments.moves == 0 {
        return Ok((server, moved));
    }
    tracing::info!(seed, "the server is moved");
    let target =
        Target { socket: place.socket.to_path_buf(), timeout: TIMEOUT_S, reconnect: TIMEOUT_S };
    let mut connection = Connection::open_next(&target, arguments.depth)?;
    let disk = connection.disk(LUN)?;
    let in_flight = AtomicUsize::new(0);
    let client = &mut connection.client;
    let mut workload = Workload::new(client, &disk, arguments.depth, seed, &in_flight)?;
    let stop = AtomicBool::new(false);
    let (restoring, restored) = mpsc::channel();
    let mover = Mover {
        back_end: arguments.back_end,
        moves: arguments.moves,
        longest: Duration::from_millis(arguments.move_every),
        buffer: arguments.save_buffer,
        work: place.work,
        socket: place.socket,
        disks: place.disks,
        stop: &stop,
        depth: usize::from(arguments.depth),
        in_flight: &in_flight,
        restoring,
    };
    let progress = output.progress("moving the server", Length::Unknown);
    let server = std::thread::scope(|scope| {
        let mover = scope.spawn(move || mover.run(server, Dice::new(!seed)));
        let worked = work(&mut workload, &restored, &mut moved, output, interrupt);
        stop.store(true, Ordering::Relaxed);
        let server = mover.join().unwrap_or_else(|_| {
            Err(Failure::system("the thread that moves the server has panicked", "report this"))
        });
        // Where both fail, the mover knows why: the guest only sees that its server is gone.
        match (server, worked) {
            (Err(failure), _) | (Ok(_), Err(failure)) => Err(failure),
            (Ok(server), Ok(())) => Ok(server),
        }
    })?;
    workload.drain()?;
    drop(progress);
    workload.verify()?;
    let file = Image::open(place.disks.get(usize::from(LUN)).copied().unwrap_or(place.work))?;
    file.forget_cached();
    workload.verify_with(|offset, data| file.read_at(offset, data))?;
    let counts = workload.counts();
    moved.requests = counts.ended;
    moved.blocks_verified = counts.blocks_judged;
    output.step(format_args!(
        "{} requests, {} moves, {} blocks verified: none lost, none twice",
        counts.ended,
        moved.moves.len(),
        counts.blocks_judged
    ))?;
    Ok((server, moved))
}

/// The guest's part: sends, judges, and notes when the first answer comes after each move. Ends when the
/// mover does.
fn work(
    workload: &mut Workload<'_>,
    restored: &mpsc::Receiver<Restoring>,
    moved: &mut Moved,
    output: &Output,
    interrupt: &Interrupt,
) -> Result<()> {
    let mut waiting: Option<(Instant, Move)> = None;
    loop {
        interrupt.check()?;
        workload.send()?;
        let judged = workload.judge(TURN)?;
        if judged > 0
            && let Some((began, mut this)) = waiting.take()
        {
            this.restore_to_first_completion_us = micros(began.elapsed());
            show(&this, moved.moves.len(), output)?;
            moved.moves.push(this);
        }
        if waiting.is_some() {
            continue;
        }
        match restored.try_recv() {
            Ok(Restoring { began, this }) => {
                // What the server before has answered is not an answer of the next one.
                while workload.judge(Duration::ZERO)? > 0 {}
                waiting = Some((began, this));
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => return Ok(()),
        }
    }
}

/// Shows a move as a row of a table.
fn show(this: &Move, before: usize, output: &Output) -> Result<()> {
    let ms = |micros: u64| format!("{:.1} ms", Duration::from_micros(micros).as_secs_f64() * 1e3);
    if before == 0 {
        output.step(format_args!(
            "{:>4} {:>9} {:>8} {:>7} {:>9} {:>8} {:>10} {:>8} {:>8}",
            "move",
            "in flight",
            "in rings",
            "unbegun",
            "cancelled",
            "finished",
            "buffers",
            "saved in",
            "answers"
        ))?;
    }
    let in_flight = this.in_flight_of_guest.max(this.in_flight);
    output.step(format_args!(
        "{:>4} {in_flight:>9} {:>8} {:>7} {:>9} {:>8} {:>10} {:>8} {:>8}",
        before + 1,
        in_flight - this.in_flight,
        this.never_started,
        this.cancelled,
        this.finished,
        Size(this.buffer_bytes).to_string(),
        ms(this.freeze_to_saved_us),
        ms(this.restore_to_first_completion_us),
    ))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A seed for whoever named none: nothing but different each time.
fn random_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanoseconds = since.map_or(0, |since| since.as_nanos());
    let seed = nanoseconds ^ u128::from(std::process::id()) << 32;
    Dice::new(u64::try_from(seed & u128::from(u64::MAX)).unwrap_or(0)).below(1 << 32)
}

impl Moved {
    /// The moves at a glance.
    pub(super) fn add_to(&self, table: Table) -> Table {
        if self.moves.is_empty() {
            return table;
        }
        table
            .pair("moves", format_args!("{}, seed {}", self.moves.len(), self.seed))
            .pair("requests while moving", self.requests)
            .pair("blocks verified", self.blocks_verified)
    }
}
