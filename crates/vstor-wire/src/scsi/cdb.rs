//! Command descriptor blocks (CDBs): the typed form of a command, read and written.

mod encode;
mod parse;
#[cfg(test)]
mod tests;

use super::sense::{AdditionalSense, FieldPointer, SenseData, SenseKey};

/// Bytes of the longest CDB an SRB carries.
pub const MAX_CDB_BYTES: usize = 16;

/// Operation codes of the commands in [`Command`].
///
/// Source: SPC-4 and SBC-3, one clause per command.
pub mod opcode {
    #![allow(missing_docs, reason = "each constant is the command's own name in SPC-4 or SBC-3")]

    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const VERIFY_10: u8 = 0x2f;
    pub const SYNCHRONIZE_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_16: u8 = 0x88;
    pub const WRITE_16: u8 = 0x8a;
    pub const VERIFY_16: u8 = 0x8f;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const VERIFY_12: u8 = 0xaf;
}

/// Service action of READ CAPACITY(16) under [`opcode::SERVICE_ACTION_IN_16`].
pub const SERVICE_ACTION_READ_CAPACITY_16: u8 = 0x10;

/// A SCSI command.
///
/// Bits that mean nothing to a disk without protection information (DPO, RARC, group numbers) are
/// accepted and dropped, as the standards allow; bits that ask for something such a disk cannot do
/// are a [`CdbError::InvalidField`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Command {
    /// TEST UNIT READY.
    TestUnitReady,
    /// REQUEST SENSE.
    RequestSense {
        /// Sense data in descriptor format, not fixed format.
        descriptor_format: bool,
        /// Room for the answer in bytes.
        allocation: u8,
    },
    /// INQUIRY.
    Inquiry {
        /// The vital product data page asked for, or `None` for the standard data.
        page: Option<u8>,
        /// Room for the answer in bytes.
        allocation: u16,
    },
    /// MODE SENSE(6) and MODE SENSE(10).
    ModeSense(ModeSense),
    /// READ CAPACITY(10).
    ReadCapacity10,
    /// READ CAPACITY(16).
    ReadCapacity16 {
        /// Room for the answer in bytes.
        allocation: u32,
    },
    /// READ(6), (10), (12) and (16).
    Read(Transfer),
    /// WRITE(6), (10), (12) and (16).
    Write(Transfer),
    /// VERIFY(10), (12) and (16).
    Verify {
        /// The blocks.
        extent: Extent,
        /// What they are compared with.
        compare: ByteCheck,
    },
    /// SYNCHRONIZE CACHE(10) and (16). `extent.blocks` 0 means up to the last block.
    SynchronizeCache {
        /// The blocks.
        extent: Extent,
        /// Answer before it is done.
        immediate: bool,
    },
    /// UNMAP.
    Unmap {
        /// Bytes of the parameter list in the data-out buffer.
        parameter_bytes: u16,
    },
    /// WRITE SAME(10) and (16). `extent.blocks` 0 means up to the last block, where a disk takes it.
    WriteSame {
        /// The blocks.
        extent: Extent,
        /// The disk may unmap them if they read as the data afterwards.
        unmap: bool,
        /// There is no data-out buffer: the data is zeros. WRITE SAME(16) only.
        no_data: bool,
    },
    /// REPORT LUNS.
    ReportLuns {
        /// Which of them: 0 all but the well known, 1 the well known, 2 all.
        select: u8,
        /// Room for the answer in bytes.
        allocation: u32,
    },
    /// START STOP UNIT.
    StartStopUnit {
        /// Answer before it is done.
        immediate: bool,
        /// Power condition; 0 means that `start` and `load_eject` count.
        power_condition: u8,
        /// Load or eject the medium.
        load_eject: bool,
        /// Start, not stop.
        start: bool,
    },
}

/// Which of a command's CDBs is used.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum CdbForm {
    /// 6 bytes: 21 bits of address, 1 to 256 blocks.
    Six,
    /// 10 bytes: 32 bits of address, 16 bits of length.
    Ten,
    /// 12 bytes: 32 bits of address, 32 bits of length.
    Twelve,
    /// 16 bytes: 64 bits of address, 32 bits of length.
    Sixteen,
}

impl CdbForm {
    /// Length of the CDB in bytes.
    #[must_use]
    pub const fn bytes(self) -> u8 {
        match self {
            Self::Six => 6,
            Self::Ten => 10,
            Self::Twelve => 12,
            Self::Sixteen => 16,
        }
    }
}

/// A run of logical blocks, and the CDB that names it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Extent {
    /// Which CDB.
    pub form: CdbForm,
    /// First logical block address.
    pub lba: u64,
    /// Number of blocks. READ(6) and WRITE(6) cannot say 0: there the field's 0 is 256 here.
    pub blocks: u32,
}

impl Extent {
    /// The run in the shortest of the 10-byte and 16-byte forms that holds it.
    #[must_use]
    pub fn new(lba: u64, blocks: u32) -> Self {
        let short = u32::try_from(lba).is_ok() && u16::try_from(blocks).is_ok();
        Self { form: if short { CdbForm::Ten } else { CdbForm::Sixteen }, lba, blocks }
    }
}

/// What READ and WRITE say.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Transfer {
    /// The blocks.
    pub extent: Extent,
    /// Force unit access: a read comes from the medium, a write is on it before the answer. The
    /// 6-byte forms cannot say it.
    pub fua: bool,
}

/// What MODE SENSE says.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ModeSense {
    /// [`CdbForm::Six`] or [`CdbForm::Ten`]; decides the header of the answer.
    pub form: CdbForm,
    /// Leave the block descriptor out.
    pub disable_block_descriptors: bool,
    /// A long block descriptor may be used. 10-byte form only.
    pub long_lba_accepted: bool,
    /// Which values.
    pub control: PageControl,
    /// Which page; 0x3f is all of them.
    pub page: u8,
    /// Which subpage; 0xff is all of them.
    pub subpage: u8,
    /// Room for the answer in bytes; at most 255 in the 6-byte form.
    pub allocation: u16,
}

/// Which values of a mode page are asked for.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum PageControl {
    /// Those in use.
    Current = 0,
    /// A mask of those that can be changed.
    Changeable = 1,
    /// Those after a reset.
    Default = 2,
    /// Those kept over a loss of power.
    Saved = 3,
}

/// What VERIFY compares blocks with (BYTCHK).
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum ByteCheck {
    /// With nothing: that they can be read is enough.
    Medium = 0,
    /// With as many blocks in the data-out buffer.
    Blocks = 1,
    /// Each with the one block in the data-out buffer.
    OneBlock = 3,
}

/// Why a CDB is no [`Command`]. Always the guest's doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CdbError {
    /// There are no bytes.
    #[error("empty CDB")]
    Empty,
    /// A command this crate does not know.
    #[error("SCSI operation code {opcode:#04x} is not supported")]
    UnknownOpcode {
        /// First byte of the CDB.
        opcode: u8,
    },
    /// The CDB ends before the command does.
    #[error("SCSI command {opcode:#04x} has a CDB of {got} bytes, needs {needed}")]
    TooShort {
        /// First byte of the CDB.
        opcode: u8,
        /// Bytes the command has.
        needed: u8,
        /// Bytes there are.
        got: usize,
    },
    /// A field asks for what a disk cannot do.
    #[error(
        "SCSI command {opcode:#04x} asks for the unsupported in byte {byte}, bit {bit}: {value:#04x}"
    )]
    InvalidField {
        /// First byte of the CDB.
        opcode: u8,
        /// Byte of the CDB that holds the start of the field.
        byte: u8,
        /// Highest bit of the field in that byte.
        bit: u8,
        /// The byte's value.
        value: u8,
    },
}

impl CdbError {
    /// The sense data with which a LUN refuses the command.
    #[must_use]
    pub fn sense(&self) -> SenseData {
        match *self {
            Self::Empty | Self::UnknownOpcode { .. } => SenseData::new(
                SenseKey::IllegalRequest,
                AdditionalSense::INVALID_COMMAND_OPERATION_CODE,
            ),
            Self::TooShort { .. } => {
                SenseData::new(SenseKey::IllegalRequest, AdditionalSense::INVALID_FIELD_IN_CDB)
            }
            Self::InvalidField { byte, bit, .. } => {
                SenseData::new(SenseKey::IllegalRequest, AdditionalSense::INVALID_FIELD_IN_CDB)
                    .with_field(FieldPointer::cdb(u16::from(byte)).with_bit(bit))
            }
        }
    }
}

/// Why a [`Command`] has no CDB.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The command has no CDB of this form.
    #[error("SCSI command {opcode:#04x} has no CDB of {bytes} bytes")]
    NoSuchForm {
        /// Operation code of the command's 10-byte or only form.
        opcode: u8,
        /// Length of the form asked for.
        bytes: u8,
    },
    /// A value is too large for the form.
    #[error("{value} does not fit into a field of {bits} bits of SCSI command {opcode:#04x}")]
    DoesNotFit {
        /// Operation code.
        opcode: u8,
        /// The value.
        value: u64,
        /// Width of its field.
        bits: u8,
    },
}

/// The bytes of a command.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cdb {
    bytes: [u8; MAX_CDB_BYTES],
    length: u8,
}

impl Cdb {
    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..usize::from(self.length)).unwrap_or_default()
    }

    /// How many there are; at most [`MAX_CDB_BYTES`].
    #[must_use]
    pub fn length(&self) -> u8 {
        self.length
    }
}

impl Command {
    /// A READ of `blocks` blocks from `lba` on, in the 10-byte or the 16-byte form.
    #[must_use]
    pub fn read(lba: u64, blocks: u32) -> Self {
        Self::Read(Transfer { extent: Extent::new(lba, blocks), fua: false })
    }

    /// A WRITE of `blocks` blocks from `lba` on, in the 10-byte or the 16-byte form.
    #[must_use]
    pub fn write(lba: u64, blocks: u32, fua: bool) -> Self {
        Self::Write(Transfer { extent: Extent::new(lba, blocks), fua })
    }

    /// A SYNCHRONIZE CACHE(10) of the whole disk.
    #[must_use]
    pub fn synchronize_cache() -> Self {
        Self::SynchronizeCache { extent: Extent::new(0, 0), immediate: false }
    }
}
