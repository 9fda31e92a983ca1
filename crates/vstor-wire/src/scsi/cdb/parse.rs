//! From bytes to a [`Command`].

use super::{
    ByteCheck, CdbError, CdbForm, Command, Extent, MAX_CDB_BYTES, ModeSense, PageControl,
    SERVICE_ACTION_READ_CAPACITY_16, Transfer, opcode,
};

impl Command {
    /// Reads a command. Bytes after its end are ignored: guests pad.
    ///
    /// # Errors
    /// [`CdbError`], which also says how a LUN has to refuse the command.
    pub fn parse(cdb: &[u8]) -> Result<Self, CdbError> {
        let mut padded = [0; MAX_CDB_BYTES];
        for (to, from) in padded.iter_mut().zip(cdb) {
            *to = *from;
        }
        Self::parse_padded(&padded, cdb.len())
    }

    /// As [`Self::parse`], for a command that is the first `length` bytes of `cdb`, where it lies: what
    /// an SRB has. Saves the copy.
    ///
    /// # Errors
    /// As for [`Self::parse`].
    #[inline]
    pub fn parse_padded(cdb: &[u8; MAX_CDB_BYTES], length: usize) -> Result<Self, CdbError> {
        if length == 0 {
            return Err(CdbError::Empty);
        }
        let form = form_of(cdb[0])?;
        let needed = form.bytes();
        if length < usize::from(needed) {
            return Err(CdbError::TooShort { opcode: cdb[0], needed, got: length });
        }
        let fields = Fields(cdb);
        fields.refuse_bits(needed - 1, 0x04)?; // NACA: this transport has no ACA
        fields.command(form)
    }
}

/// The length of a known command's CDB, from its operation code.
#[inline]
fn form_of(code: u8) -> Result<CdbForm, CdbError> {
    use opcode::*;
    Ok(match code {
        TEST_UNIT_READY | REQUEST_SENSE | READ_6 | WRITE_6 | INQUIRY | MODE_SENSE_6
        | START_STOP_UNIT => CdbForm::Six,
        READ_CAPACITY_10 | READ_10 | WRITE_10 | VERIFY_10 | SYNCHRONIZE_CACHE_10
        | WRITE_SAME_10 | UNMAP | MODE_SENSE_10 => CdbForm::Ten,
        REPORT_LUNS | READ_12 | WRITE_12 | VERIFY_12 => CdbForm::Twelve,
        READ_16 | WRITE_16 | VERIFY_16 | SYNCHRONIZE_CACHE_16 | WRITE_SAME_16
        | SERVICE_ACTION_IN_16 => CdbForm::Sixteen,
        _ => return Err(CdbError::UnknownOpcode { opcode: code }),
    })
}

/// The bytes of a CDB. Those after its end mean nothing.
struct Fields<'a>(&'a [u8; MAX_CDB_BYTES]);

impl Fields<'_> {
    #[inline]
    fn command(&self, form: CdbForm) -> Result<Command, CdbError> {
        use opcode::*;
        let b = self.0;
        Ok(match b[0] {
            TEST_UNIT_READY => Command::TestUnitReady,
            REQUEST_SENSE => {
                Command::RequestSense { descriptor_format: b[1] & 1 != 0, allocation: b[4] }
            }
            INQUIRY => self.inquiry()?,
            MODE_SENSE_6 | MODE_SENSE_10 => Command::ModeSense(self.mode_sense(form)),
            READ_CAPACITY_10 => {
                self.refuse_bits(8, 0x01)?; // PMI
                self.refuse_set(2..6)?; // an address means something only with PMI
                Command::ReadCapacity10
            }
            SERVICE_ACTION_IN_16 => {
                if b[1] & 0x1f != SERVICE_ACTION_READ_CAPACITY_16 {
                    return Err(self.invalid(1, 4));
                }
                self.refuse_bits(14, 0x01)?; // PMI
                self.refuse_set(2..10)?;
                Command::ReadCapacity16 {
                    allocation: u32::from_be_bytes([b[10], b[11], b[12], b[13]]),
                }
            }
            READ_6 | READ_10 | READ_12 | READ_16 => Command::Read(self.transfer(form)?),
            WRITE_6 | WRITE_10 | WRITE_12 | WRITE_16 => Command::Write(self.transfer(form)?),
            VERIFY_10 | VERIFY_12 | VERIFY_16 => {
                self.refuse_bits(1, 0xe0)?; // VRPROTECT
                let compare = match (b[1] >> 1) & 3 {
                    0 => ByteCheck::Medium,
                    1 => ByteCheck::Blocks,
                    3 => ByteCheck::OneBlock,
                    _ => return Err(self.invalid(1, 2)),
                };
                Command::Verify { extent: self.extent(form), compare }
            }
            SYNCHRONIZE_CACHE_10 | SYNCHRONIZE_CACHE_16 => {
                Command::SynchronizeCache { extent: self.extent(form), immediate: b[1] & 0x02 != 0 }
            }
            UNMAP => {
                self.refuse_bits(1, 0x01)?; // ANCHOR
                Command::Unmap { parameter_bytes: u16::from_be_bytes([b[7], b[8]]) }
            }
            WRITE_SAME_10 | WRITE_SAME_16 => self.write_same(form)?,
            REPORT_LUNS => Command::ReportLuns {
                select: b[2],
                allocation: u32::from_be_bytes([b[6], b[7], b[8], b[9]]),
            },
            START_STOP_UNIT => Command::StartStopUnit {
                immediate: b[1] & 1 != 0,
                power_condition: b[4] >> 4,
                load_eject: b[4] & 2 != 0,
                start: b[4] & 1 != 0,
            },
            opcode => return Err(CdbError::UnknownOpcode { opcode }),
        })
    }

    fn inquiry(&self) -> Result<Command, CdbError> {
        let b = self.0;
        self.refuse_bits(1, 0x02)?; // CMDDT, obsolete
        let page = (b[1] & 1 != 0).then_some(b[2]);
        if page.is_none() {
            self.refuse_bits(2, 0xff)?;
        }
        Ok(Command::Inquiry { page, allocation: u16::from_be_bytes([b[3], b[4]]) })
    }

    fn mode_sense(&self, form: CdbForm) -> ModeSense {
        let b = self.0;
        let ten = form == CdbForm::Ten;
        ModeSense {
            form,
            disable_block_descriptors: b[1] & 0x08 != 0,
            long_lba_accepted: ten && b[1] & 0x10 != 0,
            control: match b[2] >> 6 {
                0 => PageControl::Current,
                1 => PageControl::Changeable,
                2 => PageControl::Default,
                _ => PageControl::Saved,
            },
            page: b[2] & 0x3f,
            subpage: b[3],
            allocation: if ten { u16::from_be_bytes([b[7], b[8]]) } else { u16::from(b[4]) },
        }
    }

    fn transfer(&self, form: CdbForm) -> Result<Transfer, CdbError> {
        if form == CdbForm::Six {
            return Ok(Transfer { extent: self.extent(form), fua: false });
        }
        self.refuse_bits(1, 0xe0)?; // RDPROTECT or WRPROTECT
        Ok(Transfer { extent: self.extent(form), fua: self.0[1] & 0x08 != 0 })
    }

    fn write_same(&self, form: CdbForm) -> Result<Command, CdbError> {
        let b = self.0;
        self.refuse_bits(1, 0xe0)?; // WRPROTECT
        self.refuse_bits(1, 0x10)?; // ANCHOR
        self.refuse_bits(1, 0x06)?; // PBDATA and LBDATA, obsolete: they would change the data
        Ok(Command::WriteSame {
            extent: self.extent(form),
            unmap: b[1] & 0x08 != 0,
            no_data: form == CdbForm::Sixteen && b[1] & 0x01 != 0,
        })
    }

    #[inline]
    fn extent(&self, form: CdbForm) -> Extent {
        let b = self.0;
        let lba32 = u64::from(u32::from_be_bytes([b[2], b[3], b[4], b[5]]));
        let (lba, blocks) = match form {
            CdbForm::Six => {
                let lba = u32::from_be_bytes([0, b[1] & 0x1f, b[2], b[3]]);
                (u64::from(lba), if b[4] == 0 { 256 } else { u32::from(b[4]) })
            }
            CdbForm::Ten => (lba32, u32::from(u16::from_be_bytes([b[7], b[8]]))),
            CdbForm::Twelve => (lba32, u32::from_be_bytes([b[6], b[7], b[8], b[9]])),
            CdbForm::Sixteen => {
                let low = u64::from(u32::from_be_bytes([b[6], b[7], b[8], b[9]]));
                (lba32 << 32 | low, u32::from_be_bytes([b[10], b[11], b[12], b[13]]))
            }
        };
        Extent { form, lba, blocks }
    }

    /// Fails if any bit of `mask` is set in a byte; the error points to the highest of them.
    #[inline]
    fn refuse_bits(&self, byte: u8, mask: u8) -> Result<(), CdbError> {
        let set = self.byte(byte) & mask;
        if set == 0 {
            return Ok(());
        }
        let bit = (0..8u8).rev().find(|bit| set & (1 << bit) != 0).unwrap_or(0);
        Err(self.invalid(byte, bit))
    }

    /// Fails if any of the bytes is not zero.
    fn refuse_set(&self, mut bytes: core::ops::Range<u8>) -> Result<(), CdbError> {
        bytes.try_for_each(|byte| self.refuse_bits(byte, 0xff))
    }

    fn invalid(&self, byte: u8, bit: u8) -> CdbError {
        CdbError::InvalidField { opcode: self.0[0], byte, bit, value: self.byte(byte) }
    }

    fn byte(&self, at: u8) -> u8 {
        self.0.get(usize::from(at)).copied().unwrap_or(0)
    }
}
