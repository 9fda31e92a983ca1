//! The storage VSP in C, with a client in Rust in another process, moved again and again with requests in
//! flight: frozen, saved to a file, killed, restored in a new process. Every block is judged by the
//! ledger of `vsc-storage`, every request ends once, and none is lost.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kmcl_worker::{Source, Worker};
use vmbus_unix::{GuestOptions, UnixGuest};
use vsc_storage::ledger::{End, Ledger, Operation};
use vsc_storage::wire::scsi::cdb::Command as Cdb;
use vsc_storage::wire::srb::ScsiAddress;
use vsc_storage::{Buffer, ClientConfig, DiskInfo, Request, StorageClient};

const DISK_BYTES: u64 = 4 << 20;
const BLOCK: u32 = 4096;
const MAX_BLOCKS: u64 = 4;
const DEPTH: u16 = 64;
const MOVES: u32 = 12;
/// Requests that end between two moves.
const BETWEEN: u64 = 300;
/// Nothing depends on it but the end of a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running VSP. Killed when dropped.
struct Vsp {
    child: Child,
    /// Gone once it was told to end.
    input: Option<ChildStdin>,
    lines: BufReader<ChildStdout>,
}

impl Vsp {
    fn start(program: &Path, arguments: &[&Path]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }

    /// Saved and moved away; then killed, so that it can do nothing about it. Requests that were handed
    /// over, and those of them that had been before.
    fn save_and_kill(mut self, state: &Path) -> (u32, u32) {
        writeln!(self.input.as_mut().unwrap(), "save {}", state.display()).unwrap();
        let said = self.line();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let numbers: Vec<u32> = said
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect();
        assert!(said.starts_with("saved: ") && numbers.len() == 2, "{said:?}");
        (numbers[0], numbers[1])
    }
}

impl Drop for Vsp {
    fn drop(&mut self) {
        let _gone_already = self.child.kill();
        let _gone_already = self.child.wait();
    }
}

/// The control messages of the guest's bus.
struct Control(Arc<UnixGuest>);

impl Source for Control {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

/// Requests at random, all of them judged.
struct Workload<'a> {
    client: StorageClient,
    disk: &'a DiskInfo,
    ledger: Ledger,
    dice: u64,
    running: HashMap<u64, bool>,
    spare: Vec<Buffer>,
    ended: u64,
}

impl Workload<'_> {
    fn roll(&mut self, sides: u64) -> u64 {
        self.dice = self.dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695);
        (self.dice >> 33) % sides
    }

    fn request(&mut self, buffer: Buffer) -> Option<Request> {
        let first = self.roll(self.ledger.blocks());
        let blocks = first..(first + 1 + self.roll(MAX_BLOCKS)).min(self.ledger.blocks());
        if self.ledger.is_busy(blocks.clone()) {
            self.spare.push(buffer);
            return None;
        }
        let sectors = u64::from(BLOCK / self.disk.block_bytes);
        let (lba, count) = (first * sectors, (blocks.end - blocks.start) * sectors);
        let bytes = u32::try_from(blocks.end - blocks.start).unwrap() * BLOCK;
        let count = u32::try_from(count).unwrap();
        let is_write = self.roll(3) != 0;
        let (operation, request) = if is_write {
            let write = self.ledger.write(blocks).unwrap();
            let mut data = vec![0; bytes as usize];
            write.fill(&mut data);
            buffer.copy_from(&data).unwrap();
            let through = self.roll(4) == 0;
            let request =
                Request::new(self.disk.address, Cdb::write(lba, count, through).encode().unwrap());
            (write.operation, request.writing(buffer, 0, bytes))
        } else {
            let operation = self.ledger.read(blocks).unwrap();
            let request = Request::new(self.disk.address, Cdb::read(lba, count).encode().unwrap());
            (operation, request.reading(buffer, 0, bytes))
        };
        self.running.insert(operation.number(), is_write);
        Some(request.with_token(operation.number()))
    }

    fn send(&mut self) {
        while let Some(buffer) = self.spare.pop() {
            let Some(request) = self.request(buffer) else { break };
            assert!(self.client.submit(request).is_ok());
        }
    }

    /// Judges what comes within a moment.
    fn judge(&mut self) {
        self.client.wait(Duration::from_millis(10)).unwrap();
        while let Some(completion) = self.client.next_completion() {
            let moved = completion.result.unwrap();
            let is_write = self.running.remove(&completion.token).expect("ended twice");
            let operation = Operation::from_number(completion.token);
            let buffer = completion.buffer.unwrap();
            if is_write {
                self.ledger.end_write(operation, End::Succeeded).unwrap();
            } else {
                let mut data = vec![0; moved as usize];
                buffer.copy_to(&mut data).unwrap();
                self.ledger.end_read(operation, &data).unwrap();
            }
            self.spare.push(buffer);
            self.ended += 1;
        }
    }

    fn run_until(&mut self, mut over: impl FnMut(&Self) -> bool) {
        let began = Instant::now();
        while !over(self) {
            self.send();
            self.judge();
            assert!(began.elapsed() < PATIENCE, "{} requests are lost", self.running.len());
        }
    }
}

/// One move on a thread of its own, while requests go on: what was handed over, and the new process.
fn begin_move(vsp: Vsp, program: &Path, places: [&Path; 3]) -> Receiver<((u32, u32), Vsp)> {
    let (send, receive) = channel();
    let program = program.to_owned();
    let places = places.map(Path::to_owned);
    std::thread::spawn(move || {
        let [socket, image, state] = &places;
        let handed_over = vsp.save_and_kill(state);
        let mut vsp = Vsp::start(&program, &[socket, image, state]);
        let said = vsp.line();
        assert!(said.starts_with("goes on at "), "{said:?}");
        send.send((handed_over, vsp)).unwrap();
    });
    receive
}

#[test]
fn the_storage_vsp_in_c_moves_with_requests_in_flight() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (program, socket, image, state) = (at("vsp"), at("socket"), at("image"), at("state"));
    std::fs::File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
    let source = common::root().join("examples/c/storage_vsp.c");
    common::build(
        &source,
        &program,
        &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    );
    let mut vsp = Vsp::start(&program, &[&socket, &image]);
    let said = vsp.line();
    assert!(said.starts_with("serves at "), "{said:?}");

    let mut options = GuestOptions::new(64 << 20);
    options.reconnect = Some(PATIENCE);
    let guest = Arc::new(UnixGuest::connect_with(&socket, options).unwrap());
    let worker = Worker::spawn("vmbus").unwrap();
    worker.add_source(Arc::clone(&guest), Arc::new(Control(Arc::clone(&guest)))).unwrap();
    let mut config = ClientConfig::default();
    config.queue_depth = DEPTH;
    config.request_timeout = PATIENCE;
    let mut client = StorageClient::connect(Arc::new(guest.bus().clone()), config).unwrap();
    let disks = client.scan().unwrap();
    let [disk] = &disks[..] else { panic!("{disks:?}") };
    assert_eq!((disk.bytes(), disk.address), (DISK_BYTES, ScsiAddress::new(0, 0, 0)));
    assert_eq!(disk.revision, "C1.0");

    let bytes = u32::try_from(MAX_BLOCKS).unwrap() * BLOCK;
    let spare = (0..DEPTH).map(|_| client.allocate(bytes).unwrap()).collect();
    let ledger = Ledger::new(7, BLOCK, DISK_BYTES / u64::from(BLOCK)).unwrap();
    let mut workload =
        Workload { client, disk, ledger, dice: 7, running: HashMap::new(), spare, ended: 0 };

    let (mut in_flight, mut twice) = (0, 0);
    for _ in 0..MOVES {
        let goal = workload.ended + BETWEEN;
        workload.run_until(|it| it.ended >= goal);
        let moving = begin_move(vsp, &program, [&socket, &image, &state]);
        let mut moved = None;
        workload.run_until(|_| {
            moved = moving.try_recv().ok();
            moved.is_some()
        });
        let ((handed_over, before), next) = moved.unwrap();
        in_flight += handed_over;
        twice += before;
        vsp = next;
    }
    // Nothing more is sent, and everything ends.
    let began = Instant::now();
    while !workload.running.is_empty() {
        workload.judge();
        assert!(began.elapsed() < PATIENCE, "{} requests are lost", workload.running.len());
    }
    let mut block_data = vec![0; BLOCK as usize];
    for block in 0..workload.ledger.blocks() {
        workload.client.read(disk, block * u64::from(BLOCK), &mut block_data).unwrap();
        workload.ledger.judge(block, &block_data).unwrap();
    }
    println!(
        "{} requests, {in_flight} handed over in {MOVES} moves, {twice} not the first time",
        workload.ended
    );
    assert!(in_flight > 0, "no request was in flight in any of {MOVES} moves");

    // The end that an owner gives it: everything is let go of.
    drop(workload);
    drop(worker);
    drop(guest);
    vsp.input = None;
    assert!(vsp.child.wait().unwrap().success());
}
