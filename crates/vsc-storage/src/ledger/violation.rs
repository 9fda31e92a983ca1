//! What a disk or a server can be accused of.

use super::{Operation, Writer};

/// Something that a disk must not hold, or a server must not do.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The block holds what another write has replaced: a write was lost, or an old one was done again.
    #[error("block {block} holds {found}, already replaced by {by}")]
    Superseded {
        /// The block.
        block: u64,
        /// Who wrote what it holds.
        found: Writer,
        /// Who wrote what was there after it.
        by: Writer,
    },
    /// The block holds parts of different content.
    #[error("block {block} is torn: {before} up to byte {byte}, {after} from there on")]
    Torn {
        /// The block.
        block: u64,
        /// First byte in the block of something else.
        byte: usize,
        /// Who wrote the first part.
        before: Writer,
        /// Who wrote what follows.
        after: Writer,
    },
    /// The block holds what belongs elsewhere.
    #[error(
        "block {block} holds at byte {byte} what write {write} wrote to byte {home_byte} of block {home}"
    )]
    Misplaced {
        /// The block.
        block: u64,
        /// The byte in it from which on this is so.
        byte: usize,
        /// Who wrote it.
        write: u64,
        /// The block that it was written to.
        home: u64,
        /// The byte of that block.
        home_byte: u64,
    },
    /// The block holds a write that nobody has announced.
    #[error("block {block} holds write {write}, which was never sent")]
    Unissued {
        /// The block.
        block: u64,
        /// The write.
        write: u64,
    },
    /// The block holds what another ledger wrote.
    #[error("block {block} holds the stamp of a ledger with seed {seed:#x}")]
    OtherSeed {
        /// The block.
        block: u64,
        /// The seed of that ledger.
        seed: u64,
    },
    /// The block holds bytes that are neither zeroes nor a stamp.
    #[error("block {block} holds bytes that nobody wrote")]
    Unknown {
        /// The block.
        block: u64,
    },
    /// What was said to be the content of a block is longer or shorter than one.
    #[error("block {block} was read with {got} bytes")]
    BlockLength {
        /// The block.
        block: u64,
        /// Bytes that came.
        got: usize,
    },
    /// A read succeeded with more or less data than was asked for.
    #[error("read {} ended with {got} of {needed} bytes", .operation.number())]
    Length {
        /// The read.
        operation: Operation,
        /// Bytes that came.
        got: u64,
        /// Bytes that were asked for.
        needed: u64,
    },
    /// A request has ended a second time.
    #[error("request {} has ended twice", .operation.number())]
    Duplicate {
        /// The request.
        operation: Operation,
    },
    /// A request has ended that was not sent, or as something that it is not.
    #[error("request {} has ended and was never sent", .operation.number())]
    Unasked {
        /// The request.
        operation: Operation,
    },
}
