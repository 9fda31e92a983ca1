//! A checker of what disks hold: every write is stamped, every read is judged.
//!
//! A user of a disk tells the [`Ledger`] about each write and read when it is sent and when it ends.
//! The data of a write is made by the ledger: each block of it says which write it belongs to and
//! where it must be. From the bytes of a block the ledger therefore knows exactly which write they
//! are, and whether the block may hold that write:
//!
//! - the last one that has succeeded, or one that was in flight together with it;
//! - or one that is in flight still, or has failed: such a write may have been done or not;
//! - never one that another has replaced for certain, and never again one after a read has seen it
//!   replaced.
//!
//! The judgement is exact: a block is accused if and only if no order of all its writes and reads, each
//! at one moment between its begin and its end, explains what was seen. Reads that were under way
//! together with writes are judged by the same rule. A block that is torn, belongs elsewhere, or holds
//! bytes that nobody wrote is accused as well; so is a request that ends twice, or never.
//!
//! The unit of all this is a block that the disk writes and reads whole. Where a back end may tear a
//! block whose requests overlap, as page caches do, keep requests of one block from overlapping:
//! [`Ledger::is_busy`] tells.
//!
//! ```
//! use vsc_storage::ledger::{End, Ledger};
//!
//! let mut ledger = Ledger::new(42, 512, 1000)?;
//! let write = ledger.write(7..8).ok_or("no such block")?;
//! let mut disk = vec![0; 512];
//! write.fill(&mut disk); // the request is sent, and the device writes the block
//! ledger.end_write(write.operation, End::Succeeded)?;
//! ledger.judge(7, &disk)?;
//! disk.fill(0); // the device loses it
//! let violation = ledger.judge(7, &disk).unwrap_err();
//! assert_eq!(violation.to_string(), "block 7 holds zeroes, already replaced by write 1");
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

mod history;
mod stamp;
mod violation;

use std::collections::BTreeMap;
use std::ops::Range;

use self::history::{History, Moment};
pub use self::stamp::Writer;
use self::stamp::{Content, LINE_BYTES, MAX_BLOCK_BYTES};
pub use self::violation::Violation;

/// A request that a ledger knows, by its number: 1 for the first, and so on. Writes and reads are
/// counted together.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Operation(u64);

impl Operation {
    /// Its number, for a request's token.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }

    /// The request with this number, from a request's token.
    #[must_use]
    pub fn from_number(number: u64) -> Self {
        Self(number)
    }
}

/// A write that was just announced: makes its data.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StampedWrite {
    /// Names it when it ends.
    pub operation: Operation,
    seed: u64,
    first_block: u64,
    block_bytes: usize,
}

impl StampedWrite {
    /// Stamps `into`, the data of the write, block after block.
    pub fn fill(&self, into: &mut [u8]) {
        for (block, bytes) in (self.first_block..).zip(into.chunks_exact_mut(self.block_bytes)) {
            stamp::stamp(self.seed, self.operation.0, block, bytes);
        }
    }
}

/// How a write ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    /// It was done.
    Succeeded,
    /// It was refused or failed: it may have been done or not, and is not done from now on.
    Failed,
}

/// What a ledger has seen.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[non_exhaustive]
pub struct Counts {
    /// Writes that were announced.
    pub writes: u64,
    /// Reads that were announced.
    pub reads: u64,
    /// Writes and reads that have ended, each once.
    pub ended: u64,
    /// Of these, the ones that have failed.
    pub failed: u64,
    /// Ends of requests that had ended before, or that nobody had sent.
    pub duplicated: u64,
    /// Requests that have not ended. At the end of everything: lost.
    pub under_way: u64,
    /// Blocks that were looked at.
    pub blocks_judged: u64,
    /// Blocks that held what they must not.
    pub blocks_accused: u64,
}

/// Why there is no ledger for such a disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "blocks of {block_bytes} bytes cannot be stamped: not a power of two from {LINE_BYTES} to {MAX_BLOCK_BYTES}"
)]
pub struct BlockSizeError {
    /// Bytes of a block.
    pub block_bytes: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Write,
    Read,
}

#[derive(Clone, Debug)]
struct UnderWay {
    kind: Kind,
    begin: Moment,
    blocks: Range<u64>,
}

/// What is known about the content of one disk, which is all zeroes at first. See the module.
///
/// Memory grows with the blocks that were touched and with the requests under way, and not with the
/// number of requests; except that a read that never ends has every later write of its blocks
/// remembered.
#[derive(Clone, Debug)]
pub struct Ledger {
    seed: u64,
    block_bytes: usize,
    blocks: u64,
    now: Moment,
    /// Requests so far.
    operations: u64,
    under_way: BTreeMap<u64, UnderWay>,
    histories: BTreeMap<u64, History>,
    counts: Counts,
}

impl Ledger {
    /// A ledger for a disk of `blocks` blocks of `block_bytes` bytes each, all zeroes. The seed goes
    /// into every stamp, so that what another ledger wrote is not taken for this one's.
    ///
    /// # Errors
    /// [`BlockSizeError`].
    pub fn new(seed: u64, block_bytes: u32, blocks: u64) -> Result<Self, BlockSizeError> {
        let bytes = block_bytes as usize;
        if !block_bytes.is_power_of_two() || bytes < LINE_BYTES || block_bytes > MAX_BLOCK_BYTES {
            return Err(BlockSizeError { block_bytes });
        }
        Ok(Self {
            seed,
            block_bytes: bytes,
            blocks,
            now: 0,
            operations: 0,
            under_way: BTreeMap::new(),
            histories: BTreeMap::new(),
            counts: Counts::default(),
        })
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Blocks of the disk.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Announces a write of `blocks`, which is about to be sent. `None` where they are not all on the
    /// disk, or none.
    pub fn write(&mut self, blocks: Range<u64>) -> Option<StampedWrite> {
        let (operation, now) = self.begin(Kind::Write, &blocks)?;
        self.counts.writes += 1;
        for block in blocks.clone() {
            self.histories.entry(block).or_default().begin_write(operation.0, now);
        }
        let (seed, block_bytes) = (self.seed, self.block_bytes);
        Some(StampedWrite { operation, seed, first_block: blocks.start, block_bytes })
    }

    /// Announces a read of `blocks`, which is about to be sent. `None` where they are not all on the
    /// disk, or none.
    pub fn read(&mut self, blocks: Range<u64>) -> Option<Operation> {
        let (operation, now) = self.begin(Kind::Read, &blocks)?;
        self.counts.reads += 1;
        for block in blocks {
            self.histories.entry(block).or_default().begin_read(now);
        }
        Some(operation)
    }

    fn begin(&mut self, kind: Kind, blocks: &Range<u64>) -> Option<(Operation, Moment)> {
        if blocks.is_empty() || blocks.end > self.blocks {
            return None;
        }
        self.operations += 1;
        let begin = self.tick();
        let under_way = UnderWay { kind, begin, blocks: blocks.clone() };
        self.under_way.insert(self.operations, under_way);
        Some((Operation(self.operations), begin))
    }

    fn tick(&mut self) -> Moment {
        self.now += 1;
        self.now
    }

    /// A write has ended.
    ///
    /// # Errors
    /// [`Violation::Duplicate`] and [`Violation::Unasked`].
    pub fn end_write(&mut self, operation: Operation, end: End) -> Result<(), Violation> {
        let write = self.take(Kind::Write, operation)?;
        let now = self.tick();
        self.counts.failed += u64::from(end == End::Failed);
        for block in write.blocks {
            if let Some(history) = self.histories.get_mut(&block) {
                history.end_write(operation.0, end == End::Succeeded, now);
            }
        }
        Ok(())
    }

    /// A read has ended with `data`.
    ///
    /// # Errors
    /// The first thing that is wrong: with the end itself, the length of the data, or what one of the
    /// blocks holds. Every block is looked at and counted.
    pub fn end_read(&mut self, operation: Operation, data: &[u8]) -> Result<(), Violation> {
        let read = self.take(Kind::Read, operation)?;
        let now = self.tick();
        let blocks = read.blocks.end - read.blocks.start;
        let needed = blocks.saturating_mul(self.block_bytes as u64);
        let mut judged = Ok(());
        if data.len() as u64 != needed {
            judged = Err(Violation::Length { operation, got: data.len() as u64, needed });
        }
        for (block, bytes) in read.blocks.clone().zip(data.chunks_exact(self.block_bytes)) {
            judged = judged.and(self.look(block, bytes, read.begin, now));
        }
        self.forget_read(&read);
        judged
    }

    /// A read has failed, and there is nothing to judge.
    ///
    /// # Errors
    /// [`Violation::Duplicate`] and [`Violation::Unasked`].
    pub fn fail_read(&mut self, operation: Operation) -> Result<(), Violation> {
        let read = self.take(Kind::Read, operation)?;
        self.counts.failed += 1;
        self.forget_read(&read);
        Ok(())
    }

    fn forget_read(&mut self, read: &UnderWay) {
        for block in read.blocks.clone() {
            if let Some(history) = self.histories.get_mut(&block) {
                history.end_read(read.begin);
            }
        }
    }

    /// The request `operation` of kind `kind`, which ends now.
    fn take(&mut self, kind: Kind, operation: Operation) -> Result<UnderWay, Violation> {
        let matching = |under_way: &UnderWay| under_way.kind == kind;
        if self.under_way.get(&operation.0).is_some_and(matching)
            && let Some(under_way) = self.under_way.remove(&operation.0)
        {
            self.counts.ended += 1;
            return Ok(under_way);
        }
        self.counts.duplicated += 1;
        let known = (1..=self.operations).contains(&operation.0);
        if known && !self.under_way.contains_key(&operation.0) {
            return Err(Violation::Duplicate { operation });
        }
        Err(Violation::Unasked { operation })
    }

    /// Judges what block `block` holds at this moment, as a read that begins and ends now.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn judge(&mut self, block: u64, bytes: &[u8]) -> Result<(), Violation> {
        let (begin, now) = (self.tick(), self.tick());
        self.look(block, bytes, begin, now)
    }

    /// Judges and counts what was read from a block between two moments.
    fn look(
        &mut self,
        block: u64,
        bytes: &[u8],
        begin: Moment,
        now: Moment,
    ) -> Result<(), Violation> {
        self.counts.blocks_judged += 1;
        let judged = self.judge_content(block, bytes, begin, now);
        self.counts.blocks_accused += u64::from(judged.is_err());
        judged
    }

    fn judge_content(
        &mut self,
        block: u64,
        bytes: &[u8],
        begin: Moment,
        now: Moment,
    ) -> Result<(), Violation> {
        if bytes.len() != self.block_bytes {
            return Err(Violation::BlockLength { block, got: bytes.len() });
        }
        let write = match stamp::read(self.seed, bytes) {
            Content::Nothing => 0,
            Content::Whole { block: home, write } if home != block => {
                return Err(Violation::Misplaced { block, byte: 0, write, home, home_byte: 0 });
            }
            Content::Whole { write, .. } if write == 0 || write > self.operations => {
                return Err(Violation::Unissued { block, write });
            }
            Content::Whole { write, .. } => write,
            Content::Torn { byte, before, after } => {
                return Err(Violation::Torn { block, byte, before, after });
            }
            Content::Shifted { byte, write, block: home, home: home_byte } => {
                return Err(Violation::Misplaced { block, byte, write, home, home_byte });
            }
            Content::OtherSeed { seed } => return Err(Violation::OtherSeed { block, seed }),
            Content::Unknown => return Err(Violation::Unknown { block }),
        };
        let writer = |write| if write == 0 { Writer::Nobody } else { Writer::Write(write) };
        let history = self.histories.entry(block).or_default();
        let judged = history.saw(write, begin, now);
        judged.map_err(|by| Violation::Superseded { block, found: writer(write), by: writer(by) })
    }

    /// Whether a request under way touches one of `blocks`.
    #[must_use]
    pub fn is_busy(&self, blocks: Range<u64>) -> bool {
        self.under_way
            .values()
            .any(|other| other.blocks.start < blocks.end && blocks.start < other.blocks.end)
    }

    /// Requests that have not ended, oldest first, with their blocks.
    pub fn under_way(&self) -> impl Iterator<Item = (Operation, Range<u64>)> {
        self.under_way.iter().map(|(number, request)| (Operation(*number), request.blocks.clone()))
    }

    /// What was seen so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts { under_way: self.under_way.len() as u64, ..self.counts }
    }
}

#[cfg(test)]
mod tests;
