//! From a [`Command`] to bytes.

use super::{
    Cdb, CdbForm, Command, EncodeError, Extent, MAX_CDB_BYTES, ModeSense,
    SERVICE_ACTION_READ_CAPACITY_16, opcode,
};

impl Command {
    /// The command's bytes; [`Command::parse`] gives the command back.
    ///
    /// # Errors
    /// [`EncodeError`] for a form that the command does not have, or a value too large for its form.
    pub fn encode(&self) -> Result<Cdb, EncodeError> {
        use opcode::*;
        Ok(match *self {
            Self::TestUnitReady => Writer::new(TEST_UNIT_READY, CdbForm::Six),
            Self::RequestSense { descriptor_format, allocation } => {
                Writer::new(REQUEST_SENSE, CdbForm::Six)
                    .byte(1, u8::from(descriptor_format))
                    .byte(4, allocation)
            }
            Self::Inquiry { page, allocation } => Writer::new(INQUIRY, CdbForm::Six)
                .byte(1, u8::from(page.is_some()))
                .byte(2, page.unwrap_or(0))
                .bytes(3, &allocation.to_be_bytes()),
            Self::ModeSense(sense) => mode_sense(&sense)?,
            Self::ReadCapacity10 => Writer::new(READ_CAPACITY_10, CdbForm::Ten),
            Self::ReadCapacity16 { allocation } => {
                Writer::new(SERVICE_ACTION_IN_16, CdbForm::Sixteen)
                    .byte(1, SERVICE_ACTION_READ_CAPACITY_16)
                    .bytes(10, &allocation.to_be_bytes())
            }
            Self::Read(read) => Writer::extent(&[READ_6, READ_10, READ_12, READ_16], &read.extent)?
                .flag(1, 3, read.fua, &read.extent)?,
            Self::Write(write) => Writer::extent(
                &[WRITE_6, WRITE_10, WRITE_12, WRITE_16],
                &write.extent,
            )?
            .flag(1, 3, write.fua, &write.extent)?,
            Self::Verify { extent, compare } => {
                Writer::extent(&[NONE, VERIFY_10, VERIFY_12, VERIFY_16], &extent)?
                    .byte(1, (compare as u8) << 1)
            }
            Self::SynchronizeCache { extent, immediate } => {
                Writer::extent(&[NONE, SYNCHRONIZE_CACHE_10, NONE, SYNCHRONIZE_CACHE_16], &extent)?
                    .byte(1, u8::from(immediate) << 1)
            }
            Self::Unmap { parameter_bytes } => {
                Writer::new(UNMAP, CdbForm::Ten).bytes(7, &parameter_bytes.to_be_bytes())
            }
            Self::WriteSame { extent, unmap, no_data } => {
                let writer = Writer::extent(&[NONE, WRITE_SAME_10, NONE, WRITE_SAME_16], &extent)?;
                if no_data && extent.form != CdbForm::Sixteen {
                    return Err(no_such_form(WRITE_SAME_10, extent.form));
                }
                writer.byte(1, u8::from(unmap) << 3 | u8::from(no_data))
            }
            Self::ReportLuns { select, allocation } => Writer::new(REPORT_LUNS, CdbForm::Twelve)
                .byte(2, select)
                .bytes(6, &allocation.to_be_bytes()),
            Self::StartStopUnit { immediate, power_condition, load_eject, start } => {
                fits(START_STOP_UNIT, u64::from(power_condition), 4)?;
                Writer::new(START_STOP_UNIT, CdbForm::Six)
                    .byte(1, u8::from(immediate))
                    .byte(4, power_condition << 4 | u8::from(load_eject) << 1 | u8::from(start))
            }
        }
        .cdb())
    }
}

/// Stands for "no such form" in a list of operation codes. It is TEST UNIT READY's code, which has
/// no forms to choose from.
const NONE: u8 = opcode::TEST_UNIT_READY;

fn mode_sense(sense: &ModeSense) -> Result<Writer, EncodeError> {
    let (code, long) = match sense.form {
        CdbForm::Six if sense.long_lba_accepted => {
            return Err(no_such_form(opcode::MODE_SENSE_10, sense.form));
        }
        CdbForm::Six => (opcode::MODE_SENSE_6, false),
        CdbForm::Ten => (opcode::MODE_SENSE_10, sense.long_lba_accepted),
        form => return Err(no_such_form(opcode::MODE_SENSE_10, form)),
    };
    fits(code, u64::from(sense.page), 6)?;
    let writer = Writer::new(code, sense.form)
        .byte(1, u8::from(long) << 4 | u8::from(sense.disable_block_descriptors) << 3)
        .byte(2, (sense.control as u8) << 6 | sense.page)
        .byte(3, sense.subpage);
    if sense.form == CdbForm::Ten {
        return Ok(writer.bytes(7, &sense.allocation.to_be_bytes()));
    }
    match u8::try_from(sense.allocation) {
        Ok(allocation) => Ok(writer.byte(4, allocation)),
        Err(_) => Err(does_not_fit(code, u64::from(sense.allocation), 8)),
    }
}

/// A CDB in the making.
struct Writer {
    bytes: [u8; MAX_CDB_BYTES],
    form: CdbForm,
}

impl Writer {
    fn new(code: u8, form: CdbForm) -> Self {
        let mut bytes = [0; MAX_CDB_BYTES];
        bytes[0] = code;
        Self { bytes, form }
    }

    /// A command on `extent`; `codes` are its operation codes by ascending form.
    fn extent(codes: &[u8; 4], extent: &Extent) -> Result<Self, EncodeError> {
        let Extent { form, lba, blocks } = *extent;
        let [six, ten, twelve, sixteen] = *codes;
        let code = match form {
            CdbForm::Six => six,
            CdbForm::Ten => ten,
            CdbForm::Twelve => twelve,
            CdbForm::Sixteen => sixteen,
        };
        if code == NONE {
            return Err(no_such_form(ten, form));
        }
        let mut writer = Self::new(code, form);
        let b = &mut writer.bytes;
        let [_, _, _, _, low @ ..] = lba.to_be_bytes();
        match form {
            CdbForm::Six => {
                fits(code, lba, 21)?;
                if blocks == 0 || blocks > 256 {
                    return Err(does_not_fit(code, u64::from(blocks), 8));
                }
                [_, b[1], b[2], b[3]] = low;
                [b[4], ..] = blocks.to_le_bytes(); // 256 becomes 0
            }
            CdbForm::Ten => {
                fits(code, lba, 32)?;
                fits(code, u64::from(blocks), 16)?;
                [b[2], b[3], b[4], b[5]] = low;
                [.., b[7], b[8]] = blocks.to_be_bytes();
            }
            CdbForm::Twelve => {
                fits(code, lba, 32)?;
                [b[2], b[3], b[4], b[5]] = low;
                [b[6], b[7], b[8], b[9]] = blocks.to_be_bytes();
            }
            CdbForm::Sixteen => {
                [b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9]] = lba.to_be_bytes();
                [b[10], b[11], b[12], b[13]] = blocks.to_be_bytes();
            }
        }
        Ok(writer)
    }

    /// A bit that the 6-byte form does not have.
    fn flag(self, at: usize, bit: u8, set: bool, extent: &Extent) -> Result<Self, EncodeError> {
        match (set, extent.form) {
            (false, _) => Ok(self),
            (true, CdbForm::Six) => Err(no_such_form(self.bytes[0], extent.form)),
            (true, _) => Ok(self.byte(at, 1 << bit)),
        }
    }

    fn byte(self, at: usize, value: u8) -> Self {
        self.bytes(at, &[value])
    }

    fn bytes(mut self, at: usize, value: &[u8]) -> Self {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(value) {
            *to = *from;
        }
        self
    }

    fn cdb(self) -> Cdb {
        Cdb { bytes: self.bytes, length: self.form.bytes() }
    }
}

fn no_such_form(opcode: u8, form: CdbForm) -> EncodeError {
    EncodeError::NoSuchForm { opcode, bytes: form.bytes() }
}

fn does_not_fit(opcode: u8, value: u64, bits: u8) -> EncodeError {
    EncodeError::DoesNotFit { opcode, value, bits }
}

fn fits(opcode: u8, value: u64, bits: u8) -> Result<(), EncodeError> {
    if value >> bits == 0 { Ok(()) } else { Err(does_not_fit(opcode, value, bits)) }
}
