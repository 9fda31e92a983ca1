//! The control page of a ring: the first page of each of a channel's two rings.
//!
//! Source: vmbus-wire section 4, "Ring memory and data packets".

use bitflags::bitflags;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Layout of a control page. Both sides write it while the other reads: it describes bytes, and is
/// never borrowed from shared memory. Code that runs a ring reads single words, at the offsets that
/// are this type's constants.
///
/// The writer of the ring owns `write_index`, `pending_send_size` and `feature_bits`; the reader
/// owns `read_index` and `interrupt_mask`.
#[repr(C)]
#[derive(Clone, Debug, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct ControlPage {
    /// `in`: where the next packet will be written. A byte offset into the data area, a multiple
    /// of 8, below its size. Equal to `read_index` when the ring is empty.
    pub write_index: U32,
    /// `out`: where the next packet will be read. The same unit and bounds.
    pub read_index: U32,
    /// Nonzero while the reader polls and wants no signal.
    pub interrupt_mask: U32,
    /// Bytes the writer waits for, or 0. The reader signals when it has freed that many.
    pub pending_send_size: U32,
    /// Zero.
    pub reserved: [U32; 12],
    /// [`FeatureBits`] of the ring.
    pub feature_bits: U32,
    /// Zero.
    pub reserved_rest: [U32; 1007],
}

impl ControlPage {
    /// Byte offset of the write index (`in`).
    pub const IN: u32 = 0x00;
    /// Byte offset of the read index (`out`).
    pub const OUT: u32 = 0x04;
    /// Byte offset of the reader's interrupt mask.
    pub const INTERRUPT_MASK: u32 = 0x08;
    /// Byte offset of the writer's request for space.
    pub const PENDING_SEND_SIZE: u32 = 0x0c;
    /// Byte offset of the feature bits.
    pub const FEATURE_BITS: u32 = 0x40;
}

const _: () = {
    use core::mem::offset_of;
    assert!(size_of::<ControlPage>() == crate::PAGE_SIZE);
    assert!(offset_of!(ControlPage, write_index) == ControlPage::IN as usize);
    assert!(offset_of!(ControlPage, read_index) == ControlPage::OUT as usize);
    assert!(offset_of!(ControlPage, interrupt_mask) == ControlPage::INTERRUPT_MASK as usize);
    assert!(offset_of!(ControlPage, pending_send_size) == ControlPage::PENDING_SEND_SIZE as usize);
    assert!(offset_of!(ControlPage, feature_bits) == ControlPage::FEATURE_BITS as usize);
};

bitflags! {
    /// What the sides of a ring can do.
    #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
    pub struct FeatureBits: u32 {
        /// The reader honours `pending_send_size`.
        const PENDING_SEND_SIZE = 0x1;
    }
}

/// Indices, packets and requests for space are multiples of this many bytes.
pub const ALIGNMENT: u32 = 8;

/// Bytes of the data area that stay free, so that a full ring differs from an empty one.
pub const RESERVED_BYTES: u32 = 8;

/// Fewest pages of one ring: its control page and a page of data.
pub const MIN_PAGES: u32 = 2;
