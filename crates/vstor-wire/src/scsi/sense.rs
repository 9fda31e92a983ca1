//! Sense data: why a command was not done.

use core::fmt;

/// Bytes of sense data in fixed format.
pub const FIXED_SENSE_BYTES: usize = 18;

/// Bytes of sense data in descriptor format without descriptors.
pub const DESCRIPTOR_SENSE_BYTES: usize = 8;

/// Response codes: current and deferred errors, in fixed and descriptor format.
const FIXED_CURRENT: u8 = 0x70;
const FIXED_DEFERRED: u8 = 0x71;
const DESCRIPTOR_CURRENT: u8 = 0x72;

/// The kind of an error.
///
/// Source: SPC-4, 4.5.6 Sense key and additional sense code definitions.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum SenseKey {
    /// Nothing to say.
    NoSense = 0x0,
    /// Done, with a recovery.
    RecoveredError = 0x1,
    /// The LUN cannot be reached.
    NotReady = 0x2,
    /// The medium is at fault.
    MediumError = 0x3,
    /// The device is at fault.
    HardwareError = 0x4,
    /// The command is at fault.
    IllegalRequest = 0x5,
    /// Something has changed; the command was not looked at.
    UnitAttention = 0x6,
    /// The medium is protected.
    DataProtect = 0x7,
    /// Blank medium.
    BlankCheck = 0x8,
    /// Vendor specific.
    VendorSpecific = 0x9,
    /// A copy was ended.
    CopyAborted = 0xa,
    /// The device ended the command.
    AbortedCommand = 0xb,
    /// Reserved.
    Reserved = 0xc,
    /// The medium is full.
    VolumeOverflow = 0xd,
    /// The data differs from that on the medium.
    Miscompare = 0xe,
    /// Done.
    Completed = 0xf,
}

impl SenseKey {
    /// The key in the low four bits of `raw`.
    #[must_use]
    pub const fn from_raw(raw: u8) -> Self {
        match raw & 0xf {
            0x0 => Self::NoSense,
            0x1 => Self::RecoveredError,
            0x2 => Self::NotReady,
            0x3 => Self::MediumError,
            0x4 => Self::HardwareError,
            0x5 => Self::IllegalRequest,
            0x6 => Self::UnitAttention,
            0x7 => Self::DataProtect,
            0x8 => Self::BlankCheck,
            0x9 => Self::VendorSpecific,
            0xa => Self::CopyAborted,
            0xb => Self::AbortedCommand,
            0xc => Self::Reserved,
            0xd => Self::VolumeOverflow,
            0xe => Self::Miscompare,
            _ => Self::Completed,
        }
    }
}

/// What exactly is wrong: additional sense code and qualifier. A peer may send any value.
///
/// Source: SPC-4, annex E.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct AdditionalSense {
    /// Additional sense code.
    pub asc: u8,
    /// Additional sense code qualifier.
    pub ascq: u8,
}

/// Makes the constants and their names from one list, so that neither can lack the other.
macro_rules! additional_sense {
    ($($(#[$doc:meta])* $name:ident = $asc:literal / $ascq:literal, $text:literal;)*) => {
        impl AdditionalSense {
            $($(#[$doc])* pub const $name: Self = Self::new($asc, $ascq);)*

            /// The standard's name of a known code.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match (self.asc, self.ascq) {
                    $(($asc, $ascq) => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

additional_sense! {
    /// Nothing to add.
    NONE = 0x00 / 0x00, "no additional sense information";
    /// A write failed.
    WRITE_ERROR = 0x0c / 0x00, "write error";
    /// A read failed.
    UNRECOVERED_READ_ERROR = 0x11 / 0x00, "unrecovered read error";
    /// The list in the data-out buffer is cut off.
    PARAMETER_LIST_LENGTH_ERROR = 0x1a / 0x00, "parameter list length error";
    /// VERIFY found other data than the guest's.
    MISCOMPARE_DURING_VERIFY = 0x1d / 0x00, "miscompare during verify operation";
    /// No such command.
    INVALID_COMMAND_OPERATION_CODE = 0x20 / 0x00, "invalid command operation code";
    /// The disk ends before.
    LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE = 0x21 / 0x00, "logical block address out of range";
    /// A field of the CDB asks for the unsupported.
    INVALID_FIELD_IN_CDB = 0x24 / 0x00, "invalid field in CDB";
    /// No such LUN.
    LOGICAL_UNIT_NOT_SUPPORTED = 0x25 / 0x00, "logical unit not supported";
    /// A field of the list in the data-out buffer asks for the unsupported.
    INVALID_FIELD_IN_PARAMETER_LIST = 0x26 / 0x00, "invalid field in parameter list";
    /// The disk is read-only.
    WRITE_PROTECTED = 0x27 / 0x00, "write protected";
    /// There is no room behind a thinly provisioned disk.
    SPACE_ALLOCATION_FAILED_WRITE_PROTECT = 0x27 / 0x07, "space allocation failed write protect";
    /// The LUN was reset.
    RESET_OCCURRED = 0x29 / 0x00, "power on, reset, or bus device reset occurred";
    /// The disk has another size than before.
    CAPACITY_DATA_HAS_CHANGED = 0x2a / 0x09, "capacity data has changed";
    /// The device has no values that survive a loss of power.
    SAVING_PARAMETERS_NOT_SUPPORTED = 0x39 / 0x00, "saving parameters not supported";
    /// LUNs have come or gone on this target.
    REPORTED_LUNS_DATA_HAS_CHANGED = 0x3f / 0x0e, "reported LUNs data has changed";
    /// The device itself has failed.
    INTERNAL_TARGET_FAILURE = 0x44 / 0x00, "internal target failure";
    /// The command's data is not what the transport brought.
    DATA_PHASE_ERROR = 0x4b / 0x00, "data phase error";
}

impl AdditionalSense {
    /// A code by its two numbers.
    #[must_use]
    pub const fn new(asc: u8, ascq: u8) -> Self {
        Self { asc, ascq }
    }
}

impl fmt::Display for AdditionalSense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:02x}/{:02x})", self.asc, self.ascq),
            None => write!(f, "{:02x}/{:02x}", self.asc, self.ascq),
        }
    }
}

impl fmt::Debug for AdditionalSense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Which field of a command or of its parameter list is in error.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct FieldPointer {
    /// The field is in the CDB, not in the data-out buffer.
    pub in_cdb: bool,
    /// Byte in which the field starts.
    pub byte: u16,
    /// Highest bit of the field in that byte, if that matters.
    pub bit: Option<u8>,
}

impl FieldPointer {
    /// A field of the CDB.
    #[must_use]
    pub const fn cdb(byte: u16) -> Self {
        Self { in_cdb: true, byte, bit: None }
    }

    /// A field of the list in the data-out buffer.
    #[must_use]
    pub const fn parameter(byte: u16) -> Self {
        Self { in_cdb: false, byte, bit: None }
    }

    /// The same, with its highest bit; only the low three bits of `bit` count.
    #[must_use]
    pub const fn with_bit(self, bit: u8) -> Self {
        Self { bit: Some(bit & 7), ..self }
    }
}

/// Sense data.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct SenseData {
    /// The kind of the error.
    pub key: SenseKey,
    /// The error.
    pub code: AdditionalSense,
    /// For errors of the medium: the first block in error. Fixed format holds 32 bits of it.
    pub information: Option<u32>,
    /// For errors of the command: the field.
    pub field: Option<FieldPointer>,
}

impl SenseData {
    /// No sense: what REQUEST SENSE answers when there is nothing to report.
    pub const NONE: Self = Self::new(SenseKey::NoSense, AdditionalSense::NONE);

    /// An error without further detail.
    #[must_use]
    pub const fn new(key: SenseKey, code: AdditionalSense) -> Self {
        Self { key, code, information: None, field: None }
    }

    /// The same, with the first block in error. An address beyond 32 bits does not fit the fixed
    /// format and is left out.
    #[must_use]
    pub fn with_block(self, lba: u64) -> Self {
        Self { information: u32::try_from(lba).ok(), ..self }
    }

    /// The same, with the field in error.
    #[must_use]
    pub const fn with_field(self, field: FieldPointer) -> Self {
        Self { field: Some(field), ..self }
    }

    /// Fixed format, current error.
    ///
    /// Source: SPC-4, 4.5.3.
    #[must_use]
    pub fn to_fixed(&self) -> [u8; FIXED_SENSE_BYTES] {
        let mut out = [0; FIXED_SENSE_BYTES];
        out[0] = FIXED_CURRENT;
        if let Some(information) = self.information {
            out[0] |= 0x80; // VALID
            [out[3], out[4], out[5], out[6]] = information.to_be_bytes();
        }
        out[2] = self.key as u8;
        out[7] = 10; // bytes that follow
        out[12] = self.code.asc;
        out[13] = self.code.ascq;
        if let Some(field) = self.field {
            // Sense-key specific bytes: SKSV, C/D, BPV, bit pointer, field pointer.
            out[15] = 0x80 | u8::from(field.in_cdb) << 6;
            if let Some(bit) = field.bit {
                out[15] |= 0x08 | (bit & 7);
            }
            [out[16], out[17]] = field.byte.to_be_bytes();
        }
        out
    }

    /// Descriptor format without descriptors, current error: key and code only.
    ///
    /// Source: SPC-4, 4.5.2.
    #[must_use]
    pub fn to_descriptor(&self) -> [u8; DESCRIPTOR_SENSE_BYTES] {
        [DESCRIPTOR_CURRENT, self.key as u8, self.code.asc, self.code.ascq, 0, 0, 0, 0]
    }

    /// Reads sense data in fixed format. Bytes that are cut off read as zero, from the fourth on.
    ///
    /// # Errors
    /// [`SenseError`] for fewer than three bytes, or another format.
    pub fn parse_fixed(bytes: &[u8]) -> Result<Self, SenseError> {
        let (&[first, _, third], _) =
            bytes.split_first_chunk().ok_or(SenseError::TooShort { got: bytes.len() })?;
        let response = first & 0x7f;
        if response != FIXED_CURRENT && response != FIXED_DEFERRED {
            return Err(SenseError::Format { response });
        }
        let at = |i: usize| bytes.get(i).copied().unwrap_or(0);
        let specific = at(15);
        Ok(Self {
            key: SenseKey::from_raw(third),
            code: AdditionalSense::new(at(12), at(13)),
            information: (first & 0x80 != 0)
                .then(|| u32::from_be_bytes([at(3), at(4), at(5), at(6)])),
            field: (specific & 0x80 != 0 && third & 0xf == SenseKey::IllegalRequest as u8).then(
                || FieldPointer {
                    in_cdb: specific & 0x40 != 0,
                    byte: u16::from_be_bytes([at(16), at(17)]),
                    bit: (specific & 0x08 != 0).then_some(specific & 7),
                },
            ),
        })
    }
}

impl fmt::Display for SenseData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.key, self.code)?;
        if let Some(lba) = self.information {
            write!(f, ", block {lba}")?;
        }
        if let Some(field) = self.field {
            let place = if field.in_cdb { "CDB" } else { "parameter list" };
            write!(f, ", {place} byte {}", field.byte)?;
        }
        Ok(())
    }
}

impl fmt::Debug for SenseData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Bytes are no sense data in fixed format.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SenseError {
    /// Fewer than three bytes.
    #[error("sense data of {got} bytes")]
    TooShort {
        /// Bytes there are.
        got: usize,
    },
    /// A response code other than 0x70 and 0x71.
    #[error("sense data with response code {response:#04x}, which is not the fixed format")]
    Format {
        /// The response code.
        response: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sense_data_has_these_bytes() {
        #[rustfmt::skip]
        let rows = [
            (SenseData::NONE,
             [0x70, 0, 0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (SenseData::new(SenseKey::MediumError, AdditionalSense::UNRECOVERED_READ_ERROR)
                .with_block(0x0102_0304),
             [0xf0, 0, 3, 1, 2, 3, 4, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0]),
            (SenseData::new(SenseKey::MediumError, AdditionalSense::WRITE_ERROR)
                .with_block(0x1_0000_0000),
             [0x70, 0, 3, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x0c, 0, 0, 0, 0, 0]),
            (SenseData::new(SenseKey::IllegalRequest, AdditionalSense::INVALID_FIELD_IN_CDB)
                .with_field(FieldPointer::cdb(2).with_bit(5)),
             [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xcd, 0, 2]),
            (SenseData::new(SenseKey::IllegalRequest,
                            AdditionalSense::INVALID_FIELD_IN_PARAMETER_LIST)
                .with_field(FieldPointer::parameter(0x0108)),
             [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x26, 0, 0, 0x80, 1, 8]),
        ];
        for (sense, bytes) in rows {
            assert_eq!(sense.to_fixed(), bytes, "{sense}");
            assert_eq!(SenseData::parse_fixed(&bytes), Ok(sense), "{sense}");
        }
        assert_eq!(
            SenseData::new(SenseKey::UnitAttention, AdditionalSense::RESET_OCCURRED)
                .to_descriptor(),
            [0x72, 6, 0x29, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn what_is_not_fixed_format_is_refused() {
        for (bytes, error) in [
            (&[][..], SenseError::TooShort { got: 0 }),
            (&[0x70, 0], SenseError::TooShort { got: 2 }),
            (&[0x72, 0, 0, 0], SenseError::Format { response: 0x72 }),
            (&[0x00, 0, 0, 0], SenseError::Format { response: 0 }),
            (&[0xff, 0, 0, 0], SenseError::Format { response: 0x7f }),
        ] {
            assert_eq!(SenseData::parse_fixed(bytes), Err(error), "{bytes:02x?}");
        }
        let cut = SenseData::parse_fixed(&[0x71, 0, 0x16]).unwrap();
        assert_eq!(cut, SenseData::new(SenseKey::UnitAttention, AdditionalSense::NONE));
    }

    proptest! {
        /// Whatever a peer sends is either read or refused.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..32)) {
            let _ = SenseData::parse_fixed(&bytes);
        }
    }
}
