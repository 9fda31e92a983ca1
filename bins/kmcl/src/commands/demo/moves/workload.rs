//! Random writes and reads of a disk, with many in flight, every one of them judged.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use vsc_storage::ledger::{Counts, End, Ledger, Operation, Violation};
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::{Buffer, Completion, DiskInfo, Extent, Request, StorageClient};

use super::dice::Dice;
use crate::exit::{Exit, Failure, Result};

/// Bytes of a block of the ledger: the disk's blocks are smaller, and none is written by itself.
pub(super) const BLOCK_BYTES: u32 = 4096;

/// Most blocks of one request: short ones, so that the server has more to do than the guest.
const MAX_BLOCKS: u64 = 4;

/// Places that are tried for a request before it is left out for now: all could be in use.
const TRIES: u32 = 8;

/// Most requests that are made before they are sent, all with one signal.
const BURST: usize = 256;

/// One request in so many is a read.
const READS: u64 = 3;

/// One write in so many is to be on the medium before it is answered, which takes a disk a while: so there
/// are always requests in flight, however fast the rest is.
const THROUGH: u64 = 4;

/// How long the server may bring nothing while requests are in flight, and is not being moved.
const PATIENCE: Duration = Duration::from_secs(30);

/// Requests in flight, and the judge.
pub(super) struct Workload<'a> {
    client: &'a mut StorageClient,
    disk: &'a DiskInfo,
    ledger: Ledger,
    dice: Dice,
    /// Requests in flight: whether each is a write, and its bytes.
    running: HashMap<u64, (bool, u32)>,
    spare: Vec<Buffer>,
    scratch: Vec<u8>,
    /// When something has ended last.
    heard: Instant,
    /// How many are in flight, for whoever moves the server.
    in_flight: &'a AtomicUsize,
}

impl<'a> Workload<'a> {
    /// Nothing in flight yet. The disk is all zeroes.
    ///
    /// # Errors
    /// A [`Failure`] of kind system where there is no memory for data.
    pub(super) fn new(
        client: &'a mut StorageClient,
        disk: &'a DiskInfo,
        depth: u16,
        seed: u64,
        in_flight: &'a AtomicUsize,
    ) -> Result<Self> {
        let blocks = disk.bytes() / u64::from(BLOCK_BYTES);
        let ledger = Ledger::new(seed, BLOCK_BYTES, blocks).map_err(|e| Failure::system(e, ""))?;
        client.set_queue_depth(depth);
        let most = u32::try_from(MAX_BLOCKS).unwrap_or(1) * BLOCK_BYTES;
        let spare = (0..depth).map(|_| client.allocate(most)).collect::<Result<_, _>>()?;
        Ok(Self {
            client,
            disk,
            ledger,
            dice: Dice::new(seed),
            running: HashMap::new(),
            spare,
            scratch: Vec::new(),
            heard: Instant::now(),
            in_flight,
        })
    }

    /// What was seen so far.
    pub(super) fn counts(&self) -> Counts {
        self.ledger.counts()
    }

    /// Makes requests and sends them, as long as there are buffers, [`BURST`] at most.
    ///
    /// # Errors
    /// That of the client.
    pub(super) fn send(&mut self) -> Result<()> {
        let mut burst = VecDeque::with_capacity(BURST);
        while burst.len() < BURST
            && let Some(buffer) = self.spare.pop()
            && let Some(request) = self.request(buffer)?
        {
            burst.push_back(request);
        }
        while !burst.is_empty() {
            let sent = self.client.submit_each(|| burst.pop_front());
            sent.map_err(|refused| refused.error)?;
        }
        self.in_flight.store(self.running.len(), Ordering::Relaxed);
        Ok(())
    }

    /// A random request, if there is a place for one. Requests in flight never overlap: a file may tear
    /// what two of them do to one block.
    fn request(&mut self, buffer: Buffer) -> Result<Option<Request>> {
        let place = (0..TRIES).find_map(|_| {
            let first = self.dice.below(self.ledger.blocks());
            let blocks = first..(first + self.dice.size(MAX_BLOCKS)).min(self.ledger.blocks());
            (!self.ledger.is_busy(blocks.clone())).then_some(blocks)
        });
        let Some(blocks) = place else {
            self.spare.push(buffer);
            return Ok(None);
        };
        let bytes = u32::try_from(blocks.end - blocks.start).unwrap_or(0) * BLOCK_BYTES;
        let extent = Extent { offset: blocks.start * u64::from(BLOCK_BYTES), bytes };
        let lba = extent.offset / u64::from(self.disk.block_bytes);
        let count = bytes / self.disk.block_bytes;
        let is_read = self.dice.below(READS) == 0;
        let command = if is_read {
            Command::read(lba, count)
        } else {
            Command::write(lba, count, self.dice.below(THROUGH) == 0)
        };
        let cdb = command.encode().map_err(vsc_storage::Error::from)?;
        let request = Request::new(self.disk.address, cdb);
        let (operation, request) = if is_read {
            (self.ledger.read(blocks), request.reading(buffer, 0, bytes))
        } else {
            let write = self.ledger.write(blocks);
            if let Some(write) = &write {
                self.scratch.resize(bytes as usize, 0);
                write.fill(&mut self.scratch);
                buffer.copy_from(&self.scratch)?;
            }
            (write.map(|write| write.operation), request.writing(buffer, 0, bytes))
        };
        let Some(operation) = operation else { return Ok(None) }; // the blocks are all on the disk
        self.running.insert(operation.number(), (!is_read, bytes));
        Ok(Some(request.with_token(operation.number())))
    }

    /// Waits a little for answers, and judges those that come. Returns how many came.
    ///
    /// # Errors
    /// A [`Failure`] of kind mismatch for what a disk must not hold or a server must not do; of kind peer
    /// where nothing comes for long; that of the client.
    pub(super) fn judge(&mut self, limit: Duration) -> Result<u64> {
        self.client.wait(limit)?;
        let mut judged = 0;
        while let Some(completion) = self.client.next_completion() {
            self.end(completion)?;
            judged += 1;
        }
        self.in_flight.store(self.running.len(), Ordering::Relaxed);
        if judged > 0 || self.running.is_empty() {
            self.heard = Instant::now();
        } else if self.heard.elapsed() > PATIENCE {
            let lost = self.running.len();
            return Err(Failure::new(
                Exit::Mismatch,
                format_args!("{lost} requests are lost: nothing has ended for {PATIENCE:?}"),
                "this must not be; report it with the seed",
            ));
        }
        Ok(judged)
    }

    fn end(&mut self, completion: Completion) -> Result<()> {
        let operation = Operation::from_number(completion.token);
        let running = self.running.remove(&completion.token);
        let judged = match (&completion.result, running, &completion.buffer) {
            (Err(error), ..) => return Err((*error).into()),
            (Ok(moved), Some((false, bytes)), Some(buffer)) if *moved == bytes => {
                self.scratch.resize(bytes as usize, 0);
                buffer.copy_to(&mut self.scratch)?;
                self.ledger.end_read(operation, &self.scratch)
            }
            (Ok(moved), Some((false, _)), _) => {
                let got = u64::from(*moved);
                let data = vec![0; usize::try_from(got).unwrap_or(0)];
                self.ledger.end_read(operation, &data)
            }
            (Ok(_), ..) => self.ledger.end_write(operation, End::Succeeded),
        };
        self.spare.extend(completion.buffer);
        judged.map_err(|violation| accuse(&violation))
    }

    /// Waits until nothing is in flight.
    ///
    /// # Errors
    /// As for [`Self::judge`].
    pub(super) fn drain(&mut self) -> Result<()> {
        while !self.running.is_empty() {
            self.judge(Duration::from_millis(100))?;
        }
        Ok(())
    }

    /// Reads every block and judges it. Nothing may be in flight.
    ///
    /// # Errors
    /// As for [`Self::judge`].
    pub(super) fn verify(&mut self) -> Result<u64> {
        let step = self.client.max_transfer_bytes().min(256 << 10);
        let ledger = &mut self.ledger;
        let extents = Extent::cut(0, self.disk.bytes(), step);
        self.client
            .read_extents(self.disk, extents, |offset, data| judge_all(ledger, offset, data))?;
        Ok(ledger.blocks())
    }

    /// Judges every block as `read` has it, which reads bytes of the disk from an offset on.
    ///
    /// # Errors
    /// As for [`Self::judge`].
    pub(super) fn verify_with(
        &mut self,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<u64> {
        let mut data = Vec::new();
        for extent in Extent::cut(0, self.disk.bytes(), 256 << 10) {
            data.resize(extent.bytes as usize, 0);
            read(extent.offset, &mut data)?;
            judge_all(&mut self.ledger, extent.offset, &data)?;
        }
        Ok(self.ledger.blocks())
    }
}

fn judge_all(ledger: &mut Ledger, offset: u64, data: &[u8]) -> Result<()> {
    let first = offset / u64::from(BLOCK_BYTES);
    for (block, bytes) in (first..).zip(data.chunks(BLOCK_BYTES as usize)) {
        ledger.judge(block, bytes).map_err(|violation| accuse(&violation))?;
    }
    Ok(())
}

fn accuse(violation: &Violation) -> Failure {
    let block = match violation {
        Violation::Superseded { block, .. }
        | Violation::Torn { block, .. }
        | Violation::Misplaced { block, .. }
        | Violation::Unissued { block, .. }
        | Violation::OtherSeed { block, .. }
        | Violation::Unknown { block }
        | Violation::BlockLength { block, .. } => *block,
        _ => 0,
    };
    Failure::mismatch(block * u64::from(BLOCK_BYTES), violation)
}
