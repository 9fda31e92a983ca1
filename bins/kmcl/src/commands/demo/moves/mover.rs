//! Whoever moves the server, in a thread of its own: the guest notices nothing but a pause.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use saved_state::inspect::{ALL_KINDS, PacketRow, What, inspect_file};

use super::dice::Dice;
use super::{Move, micros};
use crate::cli::{BackEndArgs, MAX_SAVE_BUFFER};
use crate::commands::demo::server::Server;
use crate::exit::{Failure, Result};
use crate::saver::Saver;
use crate::size::Size;

/// How often a pause between two moves looks whether it is over before its time.
const GLANCE: Duration = Duration::from_millis(20);

/// How long requests that run may take to settle.
const SETTLE: Duration = Duration::from_secs(10);

/// One move in so many is made at any moment, the others when the guest has much in flight.
const ANY_MOMENT: u64 = 4;

/// How long a move waits for that.
const LOAD_PATIENCE: Duration = Duration::from_millis(200);

/// One save in so many is given up before it is made again.
const GIVEN_UP: u64 = 4;

/// A move whose new server is starting.
pub(super) struct Restoring {
    /// When it was started.
    pub(super) began: Instant,
    /// The move, as far as it is known.
    pub(super) this: Move,
}

/// What it takes to move a server.
pub(super) struct Mover<'a> {
    pub(super) back_end: BackEndArgs,
    pub(super) moves: u16,
    /// Longest pause between two moves.
    pub(super) longest: Duration,
    /// Always the same buffer, if it was asked for.
    pub(super) buffer: Option<Size>,
    pub(super) work: &'a Path,
    pub(super) socket: &'a Path,
    pub(super) disks: &'a [&'a Path],
    pub(super) stop: &'a AtomicBool,
    /// Most requests that the guest has in flight.
    pub(super) depth: usize,
    /// Requests that the guest has in flight.
    pub(super) in_flight: &'a AtomicUsize,
    pub(super) restoring: Sender<Restoring>,
}

impl Mover<'_> {
    /// Moves `server` as often as it is to be moved, and hands back the last one.
    ///
    /// # Errors
    /// Whatever keeps the server from being saved or restored.
    pub(super) fn run(self, mut server: Server, mut dice: Dice) -> Result<Server> {
        let state = self.work.join("server.state");
        for _ in 0..self.moves {
            self.pause(Duration::from_micros(dice.below(micros(self.longest) + 1)));
            if dice.below(ANY_MOMENT) != 0 {
                self.wait_for_load();
            }
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            server = self.move_once(server, &state, &mut dice)?;
        }
        Ok(server)
    }

    /// Waits a little for the guest to have much in flight.
    fn wait_for_load(&self) {
        let until = Instant::now() + LOAD_PATIENCE;
        while !self.stop.load(Ordering::Relaxed)
            && self.in_flight.load(Ordering::Relaxed) < self.depth / 4 * 3
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn pause(&self, length: Duration) {
        let until = Instant::now() + length;
        while !self.stop.load(Ordering::Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(GLANCE));
        }
    }

    fn move_once(&self, server: Server, state: &Path, dice: &mut Dice) -> Result<Server> {
        let buffer = self.buffer.unwrap_or_else(|| Size(dice.size(MAX_SAVE_BUFFER)));
        let saver = Saver::new(self.socket, buffer, SETTLE);
        let mut given_up = 0;
        while dice.below(GIVEN_UP) == 0 {
            saver.give_up_after(dice.size(1 << 16))?;
            given_up += 1;
        }
        let asked = Instant::now();
        let (saved, frozen) = saver.save_to(state, false)?;
        let file_us = micros(asked.elapsed());
        let in_flight_of_guest = self.in_flight.load(Ordering::Relaxed);
        server.kill();
        drop(frozen);
        let packets = count_packets(state)?;
        let this = Move {
            in_flight_of_guest: in_flight_of_guest as u64,
            in_flight: packets.never_started + packets.cancelled + packets.finished,
            never_started: packets.never_started,
            cancelled: packets.cancelled,
            finished: packets.finished,
            buffer_bytes: buffer.0,
            state_bytes: saved.bytes,
            given_up,
            freeze_to_settled_us: saved.settled_us,
            freeze_to_saved_us: saved.saved_us,
            file_us,
            restore_to_first_completion_us: 0, // the guest's to know
        };
        // The guest may have ended already, with a reason of its own.
        let _ = self.restoring.send(Restoring { began: Instant::now(), this });
        let (server, _) = Server::restore(state, self.back_end, self.disks, self.socket)?;
        Ok(server)
    }
}

/// Incoming packets in flight, by what became of them.
#[derive(Default)]
struct Packets {
    never_started: u64,
    cancelled: u64,
    finished: u64,
}

/// Reads the file again that was just written, as anybody would.
fn count_packets(path: &Path) -> Result<Packets> {
    let bytes = std::fs::read(path).map_err(|error| {
        Failure::system(format_args!("cannot read {}: {error}", path.display()), "")
    })?;
    let mut packets = Packets::default();
    for piece in inspect_file(&bytes, ALL_KINDS) {
        if let Some(error) = piece.piece.damage {
            return Err(Failure::mismatch(
                piece.piece.offset,
                format_args!("{} is damaged: {error}", path.display()),
            ));
        }
        let What::Record(record) = &piece.piece.what else { continue };
        match PacketRow::of(record).filter(|row| row.incoming).map(|row| row.condition) {
            Some("never started") => packets.never_started += 1,
            Some("cancelled") => packets.cancelled += 1,
            Some(_) => packets.finished += 1,
            None => {}
        }
    }
    Ok(packets)
}
