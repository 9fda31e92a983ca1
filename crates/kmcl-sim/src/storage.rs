//! The guest's use of its disk: stamped writes and reads, judged.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use kmcl::Guid;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmbus_guest::GuestBus;
use vsc_storage::ledger::{End, Ledger, Operation};
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::{Buffer, ClientConfig, Completion, Error, Request, StorageClient};
use vsp_storage::ScsiAddress;

use crate::disk::{BLOCK_BYTES, BLOCKS};
use crate::log::Log;
use crate::rng::Rng;

/// The controller's instance.
pub(crate) const INSTANCE: Guid = Guid::from_u128(0x7363_7369_0000_0000_0000_0000_0000_0001);

/// Where the disk is.
pub(crate) const ADDRESS: ScsiAddress = ScsiAddress::new(0, 0, 1);

/// Most blocks of a request.
const MAX_BLOCKS: u64 = 12;

/// The token of a flush, of which there is one at a time; the ledger does not know it.
const FLUSH: u64 = u64::MAX;

/// How a request ended, for its user.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StorageEnd {
    /// It moved this many bytes.
    Done(u32),
    /// The medium refused.
    Failed,
}

/// See the module.
pub(crate) struct StorageUser {
    log: Arc<Log>,
    config: ClientConfig,
    bus: GuestBus,
    client: Option<StorageClient>,
    /// More is to be done at once.
    more: bool,
    /// Decides what is asked for, apart from when: the same in every run of a seed.
    workload: Rng,
    left: u32,
    next: Option<Planned>,
    ledger: Ledger,
    /// Reads under way, and where to.
    reads: BTreeMap<u64, u32>,
    flushing: bool,
    flushes: u64,
    ends: BTreeMap<u64, StorageEnd>,
    buffers: Vec<Buffer>,
}

/// The request that is to be made next.
#[derive(Clone, Debug)]
enum Planned {
    Write(Range<u64>),
    Read(Range<u64>),
    Flush,
}

/// Something that the user does by itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Chore {
    /// Opens the controller.
    Open,
    /// Does what the client has to do.
    Run,
    /// Sends the next request.
    Submit,
}

impl StorageUser {
    pub(crate) fn new(
        bus: &GuestBus,
        log: &Arc<Log>,
        requests: u32,
        depth: u16,
        sub_channels: u16,
        ring_pages: u32,
        mut workload: Rng,
    ) -> Self {
        let mut config = ClientConfig::default();
        config.instance = Some(INSTANCE);
        config.queue_depth = depth;
        config.sub_channels = sub_channels;
        config.ring_pages = ring_pages;
        let ledger = Ledger::new(workload.next(), BLOCK_BYTES, BLOCKS);
        Self {
            log: Arc::clone(log),
            config,
            bus: bus.clone(),
            client: None,
            more: false,
            workload,
            left: requests,
            next: None,
            ledger: ledger.expect("blocks of 512 bytes can be stamped"),
            reads: BTreeMap::new(),
            flushing: false,
            flushes: 0,
            ends: BTreeMap::new(),
            buffers: Vec::new(),
        }
    }

    /// Whether every request was sent and has ended.
    pub(crate) fn is_done(&self) -> bool {
        self.left == 0 && self.next.is_none() && self.in_flight() == 0 && self.client.is_some()
    }

    /// Requests that have not ended.
    pub(crate) fn in_flight(&self) -> u64 {
        self.ledger.counts().under_way + u64::from(self.flushing)
    }

    pub(crate) fn ends(&self) -> &BTreeMap<u64, StorageEnd> {
        &self.ends
    }

    /// What can be done now.
    pub(crate) fn chores(&mut self, mut found: impl FnMut(Chore)) {
        let Some(client) = &self.client else { return found(Chore::Open) };
        if self.more || is_readable(client) {
            found(Chore::Run);
        }
        if client.is_ready() && self.next_is_possible() {
            found(Chore::Submit);
        }
    }

    /// Plans the next request, if there is none, and says whether it may be sent: no two requests
    /// under way touch the same block, so that what each read sees follows from the plan alone.
    fn next_is_possible(&mut self) -> bool {
        if self.next.is_none() && self.left > 0 {
            self.left -= 1;
            self.next = Some(self.plan());
        }
        let has_room = self.client.as_ref().is_some_and(|it| it.in_flight() < it.queue_depth());
        has_room
            && match &self.next {
                None => false,
                Some(Planned::Flush) => !self.flushing,
                Some(Planned::Write(blocks) | Planned::Read(blocks)) => {
                    !self.ledger.is_busy(blocks.clone())
                }
            }
    }

    fn plan(&mut self) -> Planned {
        let rng = &mut self.workload;
        let blocks = rng.between(1, MAX_BLOCKS);
        let first = rng.below(BLOCKS - blocks + 1);
        match rng.below(12) {
            0 => Planned::Flush,
            1..=7 => Planned::Write(first..first + blocks),
            _ => Planned::Read(first..first + blocks),
        }
    }

    pub(crate) fn do_chore(&mut self, chore: Chore) {
        match chore {
            Chore::Open => self.open(),
            Chore::Run => self.run(),
            Chore::Submit => self.submit(),
        }
    }

    fn open(&mut self) {
        let client = StorageClient::open(Arc::new(self.bus.clone()), self.config.clone());
        self.client = Some(client.expect("memory and descriptors enough"));
        self.more = true;
    }

    fn run(&mut self) {
        let Some(client) = &mut self.client else { return };
        // Without time to wait: quiets what rang, and does what there is to do.
        match client.wait(std::time::Duration::ZERO) {
            Ok(more) => self.more = more,
            Err(error) => {
                self.more = false;
                self.log.violation(format_args!("the storage client has failed: {error}"));
            }
        }
        let ended: Vec<Completion> =
            std::iter::from_fn(|| self.client.as_mut()?.next_completion()).collect();
        for completion in ended {
            self.end(completion);
        }
    }

    fn submit(&mut self) {
        let Some(planned) = self.next.take() else { return };
        self.log.line(format_args!("storage {planned:?}"));
        let request = match &planned {
            Planned::Flush => {
                self.flushing = true;
                self.flushes += 1;
                Request::new(ADDRESS, encode(&Command::synchronize_cache())).with_token(FLUSH)
            }
            Planned::Write(blocks) => {
                let buffer = self.take_buffer();
                let write = self.ledger.write(blocks.clone()).expect("blocks of the disk");
                let (mut data, bytes) = room(blocks);
                write.fill(&mut data);
                buffer.copy_from(&data).expect("room for the data");
                let fua = self.workload.once_in(4);
                let cdb = encode(&Command::write(blocks.start, count(blocks), fua));
                let request = Request::new(ADDRESS, cdb).writing(buffer, 0, bytes);
                request.with_token(write.operation.number())
            }
            Planned::Read(blocks) => {
                let buffer = self.take_buffer();
                let operation = self.ledger.read(blocks.clone()).expect("blocks of the disk");
                let (_, bytes) = room(blocks);
                self.reads.insert(operation.number(), bytes);
                let cdb = encode(&Command::read(blocks.start, count(blocks)));
                let request = Request::new(ADDRESS, cdb).reading(buffer, 0, bytes);
                request.with_token(operation.number())
            }
        };
        let client = self.client.as_mut().expect("the chore asks for it");
        if let Err(refused) = client.submit(request) {
            self.log.violation(format_args!("{planned:?} refused: {}", refused.error));
        }
    }

    fn take_buffer(&mut self) -> Buffer {
        let bytes = u32::try_from(MAX_BLOCKS).unwrap_or(0) * BLOCK_BYTES;
        self.buffers.pop().unwrap_or_else(|| {
            let client = self.client.as_ref().expect("the chore asks for it");
            client.allocate(bytes).expect("pages enough")
        })
    }

    fn end(&mut self, completion: Completion) {
        let Completion { token, buffer, result } = completion;
        self.log.line(format_args!("storage {token} ended: {result:?}"));
        let end = match result {
            Ok(bytes) => StorageEnd::Done(bytes),
            Err(Error::Scsi(_)) => StorageEnd::Failed,
            Err(error) => {
                return self.log.violation(format_args!("storage {token} ended: {error}"));
            }
        };
        if token == FLUSH {
            if !std::mem::take(&mut self.flushing) {
                self.log.violation(format_args!("a flush ended twice"));
            }
            return;
        }
        let operation = Operation::from_number(token);
        let judged = match (self.reads.remove(&token), end) {
            (Some(bytes), StorageEnd::Done(_)) => {
                let mut data = vec![0; bytes as usize];
                let copied = buffer.as_ref().map(|buffer| buffer.copy_to(&mut data));
                copied.expect("its buffer comes back").expect("as long as it was");
                self.ledger.end_read(operation, &data)
            }
            (Some(_), StorageEnd::Failed) => self.ledger.fail_read(operation),
            (None, StorageEnd::Done(_)) => self.ledger.end_write(operation, End::Succeeded),
            (None, StorageEnd::Failed) => self.ledger.end_write(operation, End::Failed),
        };
        if let Err(violation) = judged {
            self.log.violation(format_args!("storage {token}: {violation}"));
        }
        self.ends.insert(token, end);
        self.buffers.extend(buffer);
    }

    /// Judges what is on the disk at the end.
    pub(crate) fn judge(&mut self, content: impl Fn(u64) -> Vec<u8>) {
        for block in 0..BLOCKS {
            if let Err(violation) = self.ledger.judge(block, &content(block)) {
                self.log.violation(format_args!("at the end, {violation}"));
            }
        }
        let counts = self.ledger.counts();
        if counts.under_way != 0 || counts.duplicated != 0 {
            self.log.violation(format_args!("at the end, {counts:?}"));
        }
    }

    /// Closes the channel.
    pub(crate) fn close(&mut self) {
        self.buffers.clear();
        self.client = None;
    }
}

fn encode(command: &Command) -> vsc_storage::wire::scsi::cdb::Cdb {
    command.encode().expect("a command of a small disk")
}

fn count(blocks: &Range<u64>) -> u32 {
    u32::try_from(blocks.end - blocks.start).unwrap_or(0) // at most MAX_BLOCKS
}

/// Room for the data of some blocks, and its length.
fn room(blocks: &Range<u64>) -> (Vec<u8>, u32) {
    let bytes = count(blocks) * BLOCK_BYTES;
    (vec![0; bytes as usize], bytes)
}

/// Whether the client was rung. Asks the system, and does not wait.
fn is_readable(client: &StorageClient) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) == Ok(1)
}
