//! The SCSI request block (SRB): one SCSI command on its way to a LUN and back.

use core::fmt;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::packet::PacketForm;
use crate::scsi::cdb::{Cdb, CdbError, Command, MAX_CDB_BYTES};

/// Bytes of an SRB that hold the CDB on the way out and sense data on the way back.
pub const SENSE_BYTES: usize = SENSE_BYTES_U8 as usize;
const SENSE_BYTES_U8: u8 = 20;

/// Sense bytes a request has room for, in protocols 2.0 and 4.2.
///
/// Source: Linux `drivers/scsi/storvsc_drv.c`, `PRE_WIN8_STORVSC_SENSE_BUFFER_SIZE`.
pub const COMPACT_SENSE_BYTES: usize = 18;

/// Body of [`Operation::EXECUTE_SRB`](crate::packet::Operation::EXECUTE_SRB) and of the answer to
/// it. Any bit pattern is a value of this type. The last four fields are absent, and read as zero,
/// in the compact form of the packet.
///
/// Source: Linux `drivers/scsi/storvsc_drv.c`, `struct vmscsi_request`.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct ScsiRequest {
    /// Bytes of this structure: 52, or 36 in the compact form.
    pub length: U16,
    /// How the transport fared; answers only.
    pub srb_status: SrbStatus,
    /// What the LUN said; answers only.
    pub scsi_status: ScsiStatus,
    /// Number of the controller in the guest; without meaning to the host.
    pub port: u8,
    /// Bus of the controller.
    pub path_id: u8,
    /// Target on the bus.
    pub target_id: u8,
    /// Logical unit of the target.
    pub lun: u8,
    /// Bytes used of `cdb_or_sense` in a request: the command; at most 16.
    pub cdb_length: u8,
    /// Request: bytes of sense data the guest takes; answer: bytes of it in `cdb_or_sense`.
    pub sense_info_length: u8,
    /// Direction of the data, see [`DataDirection`].
    pub data_in: u8,
    /// Zero.
    pub reserved: u8,
    /// Request: bytes to move; answer: bytes that were moved.
    pub data_transfer_length: U32,
    /// Request: the CDB; answer: sense data.
    pub cdb_or_sense: [u8; SENSE_BYTES],
    /// Zero.
    pub reserved2: U16,
    /// Tag of the command in the guest; without meaning to the host.
    pub queue_tag: u8,
    /// 0x20 simple, 0x21 head of queue, 0x22 ordered.
    pub queue_action: u8,
    /// Hints, see [`SrbFlags`].
    pub srb_flags: U32,
    /// Seconds the guest is willing to wait.
    pub timeout_s: U32,
    /// Without meaning to the host.
    pub queue_sort_key: U32,
}

const _: () = assert!(size_of::<ScsiRequest>() == 52);

impl ScsiRequest {
    /// `queue_action` of an ordinary command.
    pub const SIMPLE_QUEUE: u8 = 0x20;

    /// A request as the guest builds it: 60 seconds, simple queueing, 20 bytes for sense data.
    #[must_use]
    pub fn new(address: ScsiAddress, cdb: &Cdb, direction: DataDirection, data_bytes: u32) -> Self {
        let mut cdb_or_sense = [0; SENSE_BYTES];
        for (to, from) in cdb_or_sense.iter_mut().zip(cdb.as_bytes()) {
            *to = *from;
        }
        let direction_flag = match direction {
            DataDirection::Out => SrbFlags::DATA_OUT,
            DataDirection::In => SrbFlags::DATA_IN,
            DataDirection::None => SrbFlags::empty(),
        };
        Self {
            length: U16::new(PacketForm::Full.srb_bytes()),
            srb_status: SrbStatus::PENDING,
            scsi_status: ScsiStatus::GOOD,
            port: 0,
            path_id: address.path,
            target_id: address.target,
            lun: address.lun,
            cdb_length: cdb.length(),
            sense_info_length: SENSE_BYTES_U8,
            data_in: direction as u8,
            reserved: 0,
            data_transfer_length: U32::new(data_bytes),
            cdb_or_sense,
            reserved2: U16::ZERO,
            queue_tag: 0,
            queue_action: Self::SIMPLE_QUEUE,
            srb_flags: U32::new((SrbFlags::DISABLE_SYNCH_TRANSFER | direction_flag).bits()),
            timeout_s: U32::new(60),
            queue_sort_key: U32::ZERO,
        }
    }

    /// Which LUN the request is for.
    #[must_use]
    pub fn address(&self) -> ScsiAddress {
        ScsiAddress { path: self.path_id, target: self.target_id, lun: self.lun }
    }

    /// The command's bytes.
    ///
    /// # Errors
    /// [`SrbError::CdbLength`] if the SRB claims more than a CDB can have, or none.
    pub fn cdb(&self) -> Result<&[u8], SrbError> {
        let claimed = usize::from(self.cdb_length);
        match self.cdb_or_sense.get(..claimed) {
            Some(cdb) if (1..=MAX_CDB_BYTES).contains(&claimed) => Ok(cdb),
            _ => Err(SrbError::CdbLength { claimed: self.cdb_length }),
        }
    }

    /// The command.
    ///
    /// # Errors
    /// [`CdbError`]; a CDB of a length that [`Self::cdb`] refuses is cut off, or its rest ignored.
    #[inline]
    pub fn command(&self) -> Result<Command, CdbError> {
        let (cdb, _) = self.cdb_or_sense.split_first_chunk().ok_or(CdbError::Empty)?;
        Command::parse_padded(cdb, usize::from(self.cdb_length))
    }

    /// Direction of the data.
    ///
    /// # Errors
    /// [`SrbError::Direction`] for a value that is none.
    pub fn direction(&self) -> Result<DataDirection, SrbError> {
        match self.data_in {
            0 => Ok(DataDirection::Out),
            1 => Ok(DataDirection::In),
            2 => Ok(DataDirection::None),
            claimed => Err(SrbError::Direction { claimed }),
        }
    }

    /// Checks the `length` field against the form of the packet the SRB came in.
    ///
    /// # Errors
    /// [`SrbError::Length`].
    pub fn check_length(&self, form: PacketForm) -> Result<(), SrbError> {
        let (claimed, expected) = (self.length.get(), form.srb_bytes());
        if claimed == expected { Ok(()) } else { Err(SrbError::Length { claimed, expected }) }
    }

    /// The sense data of an answer, or `None` if it has none.
    #[must_use]
    pub fn sense(&self) -> Option<&[u8]> {
        if !self.srb_status.has_autosense() {
            return None;
        }
        self.cdb_or_sense.get(..usize::from(self.sense_info_length))
    }

    /// Makes this request its own answer without sense data.
    pub fn finish(&mut self, srb: SrbStatus, scsi: ScsiStatus, moved_bytes: u32) {
        self.srb_status = srb;
        self.scsi_status = scsi;
        self.data_transfer_length = U32::new(moved_bytes);
        self.sense_info_length = 0;
    }

    /// Makes this request its own answer: CHECK CONDITION with `sense`, cut to what the guest takes.
    pub fn finish_with_sense(&mut self, srb: SrbStatus, moved_bytes: u32, sense: &[u8]) {
        let room = usize::from(self.sense_info_length);
        self.finish(srb, ScsiStatus::CHECK_CONDITION, moved_bytes);
        self.cdb_or_sense = [0; SENSE_BYTES];
        for (to, from) in self.cdb_or_sense.iter_mut().zip(sense.iter().take(room)) {
            *to = *from;
            self.sense_info_length += 1;
        }
        if self.sense_info_length > 0 {
            self.srb_status = srb.with_autosense();
        }
    }
}

/// What is wrong with an SRB, before its command is looked at. Always the guest's doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SrbError {
    /// The `length` field does not fit the packet.
    #[error("SRB claims a length of {claimed} bytes in a packet where it has {expected}")]
    Length {
        /// What the field says.
        claimed: u16,
        /// What the packet's form asks for.
        expected: u16,
    },
    /// The CDB is empty or longer than 16 bytes.
    #[error("SRB claims a CDB of {claimed} bytes; 1 to 16 are possible")]
    CdbLength {
        /// What the field says.
        claimed: u8,
    },
    /// The direction is none of the three.
    #[error("SRB claims data direction {claimed}; 0, 1 and 2 are defined")]
    Direction {
        /// What the field says.
        claimed: u8,
    },
}

/// Address of a logical unit on a controller.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ScsiAddress {
    /// Bus of the controller.
    pub path: u8,
    /// Target on the bus.
    pub target: u8,
    /// Logical unit of the target.
    pub lun: u8,
}

impl ScsiAddress {
    /// The address of logical unit `lun` of `target` on bus `path`.
    #[must_use]
    pub const fn new(path: u8, target: u8, lun: u8) -> Self {
        Self { path, target, lun }
    }
}

impl fmt::Display for ScsiAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path, self.target, self.lun)
    }
}

/// Which way a command's data moves; the values of the SRB's `data_in`.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub enum DataDirection {
    /// From the guest to the device.
    Out = 0,
    /// From the device to the guest.
    In = 1,
    /// There is none.
    None = 2,
}

/// How the transport fared with a request: a code in bits 5:0 and two flags.
///
/// Source: Windows driver reference, `SCSI_REQUEST_BLOCK`, `SrbStatus`.
#[repr(transparent)]
#[derive(
    Clone, Copy, Eq, Hash, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct SrbStatus(pub u8);

impl SrbStatus {
    /// Not finished; what a request carries.
    pub const PENDING: Self = Self(0x00);
    /// Done.
    pub const SUCCESS: Self = Self(0x01);
    /// Cancelled at the guest's wish.
    pub const ABORTED: Self = Self(0x02);
    /// The LUN refused or failed; the SCSI status says how.
    pub const ERROR: Self = Self(0x04);
    /// The LUN or the controller can take no more just now.
    pub const BUSY: Self = Self(0x05);
    /// The SRB itself makes no sense.
    pub const INVALID_REQUEST: Self = Self(0x06);
    /// No such bus.
    pub const INVALID_PATH_ID: Self = Self(0x07);
    /// No such device.
    pub const NO_DEVICE: Self = Self(0x08);
    /// It took too long.
    pub const TIMEOUT: Self = Self(0x09);
    /// The target did not answer.
    pub const SELECTION_TIMEOUT: Self = Self(0x0a);
    /// Ended by a reset.
    pub const BUS_RESET: Self = Self(0x0e);
    /// More or less data than the buffer was meant for.
    pub const DATA_OVERRUN: Self = Self(0x12);
    /// No such LUN. Linux takes the LUN away.
    pub const INVALID_LUN: Self = Self(0x20);
    /// No such target.
    pub const INVALID_TARGET_ID: Self = Self(0x21);
    /// The host is at fault.
    pub const INTERNAL_ERROR: Self = Self(0x30);

    const AUTOSENSE_VALID: u8 = 0x80;

    /// The code, without flags.
    #[must_use]
    pub const fn code(self) -> Self {
        Self(self.0 & 0x3f)
    }

    /// The same with the flag that says that sense data came along.
    #[must_use]
    pub const fn with_autosense(self) -> Self {
        Self(self.0 | Self::AUTOSENSE_VALID)
    }

    /// Whether sense data came along.
    #[must_use]
    pub const fn has_autosense(self) -> bool {
        self.0 & Self::AUTOSENSE_VALID != 0
    }

    /// The name of a known code.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.code() {
            Self::PENDING => "pending",
            Self::SUCCESS => "success",
            Self::ABORTED => "aborted",
            Self::ERROR => "error",
            Self::BUSY => "busy",
            Self::INVALID_REQUEST => "invalid request",
            Self::INVALID_PATH_ID => "invalid path",
            Self::NO_DEVICE => "no device",
            Self::TIMEOUT => "timeout",
            Self::SELECTION_TIMEOUT => "selection timeout",
            Self::BUS_RESET => "bus reset",
            Self::DATA_OVERRUN => "data overrun",
            Self::INVALID_LUN => "invalid LUN",
            Self::INVALID_TARGET_ID => "invalid target",
            Self::INTERNAL_ERROR => "internal error",
            _ => return None,
        })
    }
}

impl fmt::Display for SrbStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:#04x})", self.0),
            None => write!(f, "SRB status {:#04x}", self.0),
        }
    }
}

impl fmt::Debug for SrbStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a logical unit says about a command.
///
/// Source: SAM-5, 5.3 Status.
#[repr(transparent)]
#[derive(
    Clone, Copy, Eq, Hash, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct ScsiStatus(pub u8);

impl ScsiStatus {
    /// Done.
    pub const GOOD: Self = Self(0x00);
    /// Not done; sense data says why.
    pub const CHECK_CONDITION: Self = Self(0x02);
    /// Cannot take the command now.
    pub const BUSY: Self = Self(0x08);
    /// Holds as many commands as it can.
    pub const TASK_SET_FULL: Self = Self(0x28);

    /// The name of a known status.
    #[must_use]
    pub const fn name(self) -> Option<&'static str> {
        Some(match self {
            Self::GOOD => "GOOD",
            Self::CHECK_CONDITION => "CHECK CONDITION",
            Self::BUSY => "BUSY",
            Self::TASK_SET_FULL => "TASK SET FULL",
            _ => return None,
        })
    }
}

impl fmt::Display for ScsiStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "SCSI status {:#04x}", self.0),
        }
    }
}

impl fmt::Debug for ScsiStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

bitflags::bitflags! {
    /// Hints in an SRB. A host needs none of them: the direction is in `data_in`.
    ///
    /// Source: Windows driver reference, `SCSI_REQUEST_BLOCK`, `SrbFlags`.
    #[derive(Clone, Copy, Debug, Eq, PartialEq)]
    pub struct SrbFlags: u32 {
        /// The command is queued with `queue_action`.
        const QUEUE_ACTION_ENABLE = 0x0000_0002;
        /// No synchronous transfer negotiation.
        const DISABLE_SYNCH_TRANSFER = 0x0000_0008;
        /// Goes past a frozen queue.
        const BYPASS_FROZEN_QUEUE = 0x0000_0010;
        /// Data moves to the guest.
        const DATA_IN = 0x0000_0040;
        /// Data moves to the device.
        const DATA_OUT = 0x0000_0080;
        /// An error does not freeze the queue.
        const NO_QUEUE_FREEZE = 0x0000_0100;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Operation, VstorPacket};

    fn read_request() -> ScsiRequest {
        let cdb = Command::read(0x0102_0304, 8).encode().unwrap();
        ScsiRequest::new(ScsiAddress::new(1, 2, 3), &cdb, DataDirection::In, 4096)
    }

    #[test]
    fn a_read_request_has_these_bytes() {
        let packet = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&read_request());
        #[rustfmt::skip]
        let expected = [
            3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, // operation, flags, status
            52, 0, 0, 0, 0, 1, 2, 3, 10, 20, 1, 0, // length .. reserved
            0x00, 0x10, 0, 0, // transfer length
            0x28, 0, 1, 2, 3, 4, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // CDB
            0, 0, 0, 0x20, 0x48, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(packet.as_bytes(), expected);
    }

    #[test]
    fn answers_carry_as_much_sense_as_the_guest_takes() {
        let mut next = 0x70..;
        let sense: [u8; 18] = [(); 18].map(|()| next.next().unwrap());
        for (room, taken) in [(20, 18), (18, 18), (14, 14), (255, 18), (0, 0)] {
            let mut srb = read_request();
            srb.sense_info_length = room;
            srb.finish_with_sense(SrbStatus::ERROR, 512, &sense);
            assert_eq!(usize::from(srb.sense_info_length), taken, "room={room}");
            assert_eq!(srb.sense(), (taken > 0).then_some(&sense[..taken]), "room={room}");
            assert_eq!(srb.srb_status.0, if taken > 0 { 0x84 } else { 0x04 }, "room={room}");
            assert_eq!(srb.scsi_status, ScsiStatus::CHECK_CONDITION);
            assert_eq!(srb.data_transfer_length.get(), 512);
            assert_eq!(srb.cdb_or_sense[taken..], [0; 20][taken..], "room={room}");
        }
    }

    #[test]
    fn lies_about_lengths_and_direction_are_found() {
        let mut srb = read_request();
        for claimed in [0, 17, 20, 21, 255] {
            srb.cdb_length = claimed;
            assert_eq!(srb.cdb(), Err(SrbError::CdbLength { claimed }));
        }
        for (length, command) in [
            (0, Err(CdbError::Empty)),
            (9, Err(CdbError::TooShort { opcode: 0x28, needed: 10, got: 9 })),
            (10, Ok(Command::read(0x0102_0304, 8))),
            (16, Ok(Command::read(0x0102_0304, 8))),
        ] {
            srb.cdb_length = length;
            assert_eq!(srb.command(), command, "{length}");
        }
        srb.cdb_length = 16;
        assert_eq!(srb.cdb().map(<[u8]>::len), Ok(16));
        for claimed in [3, 0x80, 0xff] {
            srb.data_in = claimed;
            assert_eq!(srb.direction(), Err(SrbError::Direction { claimed }));
        }
        for (claimed, form, ok) in [
            (52, PacketForm::Full, true),
            (36, PacketForm::Compact, true),
            (36, PacketForm::Full, false),
            (52, PacketForm::Compact, false),
            (0, PacketForm::Full, false),
            (0xffff, PacketForm::Full, false),
        ] {
            srb.length = U16::new(claimed);
            assert_eq!(srb.check_length(form).is_ok(), ok, "claimed={claimed} form={form:?}");
        }
    }

    #[test]
    fn success_has_no_sense() {
        let mut srb = read_request();
        srb.finish(SrbStatus::SUCCESS, ScsiStatus::GOOD, 4096);
        assert_eq!(srb.sense(), None);
        assert_eq!(srb.sense_info_length, 0);
        assert_eq!(srb.srb_status.0, 1);
    }
}
