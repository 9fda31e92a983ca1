//! Vstor packets: what every packet on a storage channel carries, in either direction.

use core::fmt;

use vmbus_wire::status::NtStatus;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::srb::ScsiRequest;

/// Bytes of a packet's body in the full form.
pub const BODY_BYTES: usize = 52;

/// Bytes of the largest vstor packet; what a storage channel needs as its maximum packet size.
pub const MAX_PACKET_BYTES: usize = size_of::<VstorPacket>();

/// A vstor packet. Any bit pattern is a value of this type.
///
/// | offset | field |
/// |---|---|
/// | 0 | operation, see [`Operation`] |
/// | 4 | flags, see [`VstorPacket::COMPLETION_WANTED`] |
/// | 8 | status, an NTSTATUS; only the host's matters |
/// | 12 | body, by operation: [`ScsiRequest`] or one of [`protocol`](crate::protocol) |
///
/// Source: Linux `drivers/scsi/storvsc_drv.c`, `struct vstor_packet`.
#[repr(C)]
#[derive(Clone, Copy, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned)]
pub struct VstorPacket {
    /// What is asked for, or [`Operation::COMPLETE_IO`] in every answer.
    pub operation: Operation,
    /// Bit 0: the sender wants an answer.
    pub flags: U32,
    /// Result, in answers.
    pub status: U32,
    /// Depends on the operation; all zero where the operation has none.
    pub body: [u8; BODY_BYTES],
}

const _: () = assert!(size_of::<VstorPacket>() == 64);

impl VstorPacket {
    /// Flag: the sender wants an answer.
    pub const COMPLETION_WANTED: u32 = 1;

    /// A request for `operation` that wants an answer, with an empty body.
    #[must_use]
    pub fn request(operation: Operation) -> Self {
        Self {
            operation,
            flags: U32::new(Self::COMPLETION_WANTED),
            status: U32::ZERO,
            body: [0; BODY_BYTES],
        }
    }

    /// An answer with `status` and an empty body.
    #[must_use]
    pub fn answer(status: NtStatus) -> Self {
        Self {
            operation: Operation::COMPLETE_IO,
            flags: U32::ZERO,
            status: U32::new(status.0),
            body: [0; BODY_BYTES],
        }
    }

    /// A message of the host that no one answers: [`Operation::ENUMERATE_BUS`] or
    /// [`Operation::REMOVE_DEVICE`].
    #[must_use]
    pub fn notice(operation: Operation) -> Self {
        Self { operation, flags: U32::ZERO, status: U32::ZERO, body: [0; BODY_BYTES] }
    }

    /// The same packet with `body` at the start of an otherwise zero body.
    #[must_use]
    pub fn with_body<T: Body>(mut self, body: &T) -> Self {
        self.body = [0; BODY_BYTES];
        // `Body` promises that the value fits.
        let _ = body.write_to_prefix(&mut self.body);
        self
    }

    /// The body, read as what the operation says it is.
    #[must_use]
    pub fn body<T: Body>(&self) -> T {
        // `Body` promises that the body is long enough.
        T::read_from_prefix(&self.body).map_or_else(|_| T::new_zeroed(), |(body, _)| body)
    }

    /// The body as an SRB, in place.
    #[must_use]
    pub fn srb(&self) -> &ScsiRequest {
        zerocopy::transmute_ref!(&self.body)
    }

    /// The body as an SRB, in place.
    #[must_use]
    pub fn srb_mut(&mut self) -> &mut ScsiRequest {
        zerocopy::transmute_mut!(&mut self.body)
    }

    /// Makes a request its own answer: same body, which the caller goes on to fill in.
    pub fn make_answer(&mut self, status: NtStatus) {
        self.operation = Operation::COMPLETE_IO;
        self.flags = U32::ZERO;
        self.status = U32::new(status.0);
    }

    /// The result an answer reports.
    #[must_use]
    pub fn status(&self) -> NtStatus {
        NtStatus(self.status.get())
    }

    /// Reads a packet from the payload of a ring packet, and says which form it had. The compact
    /// form gives a body that ends in zeros.
    ///
    /// # Errors
    /// [`PacketLengthError`] for a payload of neither form's length.
    pub fn parse(payload: &[u8]) -> Result<(Self, PacketForm), PacketLengthError> {
        if let Ok(packet) = Self::read_from_bytes(payload) {
            return Ok((packet, PacketForm::Full));
        }
        let mut packet = Self::new_zeroed();
        match packet.as_mut_bytes().get_mut(..PacketForm::Compact.bytes()) {
            Some(room) if room.len() == payload.len() => {
                room.copy_from_slice(payload);
                Ok((packet, PacketForm::Compact))
            }
            _ => Err(PacketLengthError { got: payload.len() }),
        }
    }

    /// What is asked for in the payload of a ring packet, and in which form, without reading on;
    /// `None` for a payload of neither form's length.
    #[inline]
    #[must_use]
    pub fn peek(payload: &[u8]) -> Option<(Operation, PacketForm)> {
        let form = match payload.len() {
            64 => PacketForm::Full,
            48 => PacketForm::Compact,
            _ => return None,
        };
        let (operation, _) = Operation::read_from_prefix(payload).ok()?;
        Some((operation, form))
    }

    /// The bytes to send, in `form`.
    #[must_use]
    pub fn bytes(&self, form: PacketForm) -> &[u8] {
        self.as_bytes().get(..form.bytes()).unwrap_or_default()
    }
}

impl fmt::Debug for VstorPacket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VstorPacket")
            .field("operation", &self.operation)
            .field("flags", &self.flags.get())
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

/// What a packet's body may be read as. Implementors fit into [`BODY_BYTES`].
pub trait Body: FromBytes + IntoBytes + Immutable {}

/// The two lengths of a vstor packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PacketForm {
    /// 64 bytes: protocol 5.1 and later.
    Full,
    /// 48 bytes, without the last four fields of the SRB: protocols 2.0 and 4.2; later guests may use
    /// it up to the moment a version is agreed.
    Compact,
}

impl PacketForm {
    /// Length of a packet in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Full => 64,
            Self::Compact => 48,
        }
    }

    /// Length in bytes of the SRB in a packet of this form; the value of its `length` field.
    #[must_use]
    pub const fn srb_bytes(self) -> u16 {
        match self {
            Self::Full => 52,
            Self::Compact => 36,
        }
    }
}

/// A payload is neither 64 nor 48 bytes long, so it is no vstor packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("vstor packet of {got} bytes; the protocol has 64 and 48")]
pub struct PacketLengthError {
    /// Length of the payload in bytes.
    pub got: usize,
}

/// What a vstor packet asks for. A peer may send any value; the constants are those with a meaning.
///
/// Source: Linux `drivers/scsi/storvsc_drv.c`, `enum vstor_packet_operation`.
#[repr(transparent)]
#[derive(
    Clone, Copy, Eq, Hash, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
)]
pub struct Operation(U32);

/// Makes the constants and their names from one list, so that neither can lack the other.
macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)*) => {
        impl Operation {
            $($(#[$doc])* pub const $name: Self = Self(U32::new($value));)*

            /// The name of a known operation.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0.get() {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

operations! {
    /// Either side's answer to any request.
    COMPLETE_IO = 1;
    /// Host: a LUN is gone.
    REMOVE_DEVICE = 2;
    /// Guest: perform a SCSI command; body [`ScsiRequest`].
    EXECUTE_SRB = 3;
    /// Guest: end what one LUN is doing.
    RESET_LUN = 4;
    /// Guest: end what the controller is doing.
    RESET_ADAPTER = 5;
    /// Guest: end what one bus (path) of the controller is doing.
    RESET_BUS = 6;
    /// Guest: first step of the initialisation.
    BEGIN_INITIALIZATION = 7;
    /// Guest: last step of the initialisation.
    END_INITIALIZATION = 8;
    /// Guest: proposes a version; body [`ProtocolVersionBody`](crate::protocol::ProtocolVersionBody).
    QUERY_PROTOCOL_VERSION = 9;
    /// Guest: asks for the controller's properties; the answer's body is
    /// [`ChannelProperties`](crate::protocol::ChannelProperties).
    QUERY_PROPERTIES = 10;
    /// Host: LUNs have come or gone, look again.
    ENUMERATE_BUS = 11;
    /// Guest: asks for the names of Fibre Channel ports; the answer's body is
    /// [`FibreChannelPorts`](crate::protocol::FibreChannelPorts).
    FCHBA_DATA = 12;
    /// Guest: asks for subchannels; body [`SubChannelRequest`](crate::protocol::SubChannelRequest).
    CREATE_SUB_CHANNELS = 13;
    /// Host: an event on a LUN, for guests that asked for such.
    EVENT_NOTIFICATION = 14;
}

impl Operation {
    /// An operation by number.
    #[must_use]
    pub const fn from_raw(raw: u32) -> Self {
        Self(U32::new(raw))
    }

    /// The number on the wire.
    #[must_use]
    pub const fn raw(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Debug for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "operation {}", self.raw()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{ProtocolVersion, ProtocolVersionBody};

    /// 0, 1, 2, ...
    fn ascending() -> [u8; 64] {
        let mut next = 0..;
        [(); 64].map(|()| next.next().unwrap())
    }

    #[test]
    fn exactly_two_lengths_are_packets() {
        for length in 0..=80usize {
            let payload = std::vec![0xa5u8; length];
            let expected = match length {
                64 => Ok(PacketForm::Full),
                48 => Ok(PacketForm::Compact),
                got => Err(PacketLengthError { got }),
            };
            let got = VstorPacket::parse(&payload).map(|(_, form)| form);
            assert_eq!(got, expected, "length={length}");
            let peeked = expected.ok().map(|form| (Operation::from_raw(0xa5a5_a5a5), form));
            assert_eq!(VstorPacket::peek(&payload), peeked, "length={length}");
        }
    }

    #[test]
    fn the_compact_form_lacks_only_the_end_of_the_body() {
        let full: [u8; 64] = ascending();
        let (packet, form) = VstorPacket::parse(&full[..48]).unwrap();
        assert_eq!(packet.bytes(form), &full[..48]);
        assert_eq!(packet.bytes(PacketForm::Full)[48..], [0; 16]);
    }

    #[test]
    fn a_version_query_has_these_bytes() {
        let packet = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION)
            .with_body(&ProtocolVersionBody::new(ProtocolVersion::WIN10));
        let mut expected = [0u8; 64];
        expected[..16].copy_from_slice(&[9, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0x02, 0x06, 0, 0]);
        assert_eq!(packet.as_bytes(), expected);
    }

    #[test]
    fn a_request_becomes_its_own_answer() {
        let (mut packet, _) = VstorPacket::parse(&ascending()).unwrap();
        assert_eq!((packet.srb().path_id, packet.srb().lun), (17, 19));
        packet.srb_mut().lun = 0xff;
        packet.make_answer(NtStatus::SUCCESS);
        let mut expected = ascending();
        expected[..12].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        expected[19] = 0xff;
        assert_eq!(packet.as_bytes(), expected);
    }

    #[test]
    fn an_answer_has_these_bytes() {
        let packet = VstorPacket::answer(NtStatus::REVISION_MISMATCH);
        let mut expected = [0u8; 64];
        expected[..12].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0, 0x59, 0, 0, 0xc0]);
        assert_eq!(packet.as_bytes(), expected);
        assert_eq!(packet.status(), NtStatus::REVISION_MISMATCH);
    }

    #[test]
    fn every_operation_has_the_protocols_number() {
        for (raw, name) in [
            (0, None),
            (1, Some("COMPLETE_IO")),
            (2, Some("REMOVE_DEVICE")),
            (3, Some("EXECUTE_SRB")),
            (4, Some("RESET_LUN")),
            (5, Some("RESET_ADAPTER")),
            (6, Some("RESET_BUS")),
            (7, Some("BEGIN_INITIALIZATION")),
            (8, Some("END_INITIALIZATION")),
            (9, Some("QUERY_PROTOCOL_VERSION")),
            (10, Some("QUERY_PROPERTIES")),
            (11, Some("ENUMERATE_BUS")),
            (12, Some("FCHBA_DATA")),
            (13, Some("CREATE_SUB_CHANNELS")),
            (14, Some("EVENT_NOTIFICATION")),
            (15, None),
            (u32::MAX, None),
        ] {
            assert_eq!(Operation::from_raw(raw).name(), name, "raw={raw}");
        }
    }
}
