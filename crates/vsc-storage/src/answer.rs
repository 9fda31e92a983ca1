//! Judging an answer: from the bytes of a completion to a result.

use kmcl::NtStatus;
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::scsi::sense::SenseData;
use vstor_wire::srb::{ScsiAddress, ScsiRequest, ScsiStatus, SrbStatus};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::error::{AnswerError, Error, ScsiError};

/// What a request was, as far as its answer has to fit it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Asked {
    /// A SCSI command that was to move this many bytes.
    Command { address: ScsiAddress, opcode: u8, bytes: u32 },
    /// Something else.
    Operation(Operation),
}

/// An answer: as many bytes of the peer's as any has, and how many of them came. In the compact form
/// the rest is zeros.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Payload {
    packet: VstorPacket,
    len: usize,
}

impl Payload {
    /// A private copy of what the ring brought.
    pub(crate) fn new(payload: &[u8]) -> Self {
        let packet = match VstorPacket::read_from_prefix(payload) {
            Ok((packet, _)) => packet,
            Err(_) => {
                let mut packet = VstorPacket::new_zeroed();
                for (to, from) in packet.as_mut_bytes().iter_mut().zip(payload) {
                    *to = *from;
                }
                packet
            }
        };
        Self { packet, len: payload.len() }
    }
}

/// The vstor packet in `payload`, the data of a completion: at least one packet of `form` long, as
/// the ring pads to 8 bytes and later versions may add to it.
pub(crate) fn read(payload: &Payload, form: PacketForm) -> Result<&VstorPacket, AnswerError> {
    let Payload { packet, len } = payload;
    if *len < form.bytes() {
        return Err(AnswerError::Length { got: *len, needed: form.bytes() });
    }
    match packet.operation {
        Operation::COMPLETE_IO => Ok(packet),
        operation => Err(AnswerError::Operation { operation }),
    }
}

/// Bytes moved by a command that succeeded without a doubt; `None` is for [`judge`] to explain.
#[inline]
pub(crate) fn success(asked: Asked, packet: &VstorPacket) -> Option<u32> {
    let Asked::Command { bytes, .. } = asked else { return None };
    let srb: ScsiRequest = packet.body();
    let moved = srb.data_transfer_length.get();
    let good = srb.srb_status == SrbStatus::SUCCESS
        && srb.scsi_status == ScsiStatus::GOOD
        && packet.status() == NtStatus::SUCCESS;
    (good && moved <= bytes).then_some(moved)
}

/// What `packet`, the answer, says about what was `asked`: bytes moved, or the error.
#[cold]
pub(crate) fn judge(asked: Asked, packet: &VstorPacket) -> Result<u32, Error> {
    let (address, opcode, bytes) = match asked {
        Asked::Operation(operation) => {
            return match packet.status() {
                NtStatus::SUCCESS => Ok(0),
                status => Err(Error::Refused { operation, status }),
            };
        }
        Asked::Command { address, opcode, bytes } => (address, opcode, bytes),
    };
    let srb: ScsiRequest = packet.body();
    let moved = srb.data_transfer_length.get();
    // An overrun keeps the length that was asked for; every other answer says what was moved.
    if moved > bytes {
        return Err(AnswerError::Moved { claimed: moved, asked: bytes }.into());
    }
    let succeeded =
        srb.srb_status.code() == SrbStatus::SUCCESS && srb.scsi_status == ScsiStatus::GOOD;
    if !succeeded {
        return Err(Error::Scsi(ScsiError {
            address,
            opcode,
            srb_status: srb.srb_status,
            scsi_status: srb.scsi_status,
            sense: srb.sense().and_then(|sense| SenseData::parse_fixed(sense).ok()),
            moved,
        }));
    }
    // The packet's own status is that of the transport; an SRB that succeeded and a packet that
    // failed contradict each other, and the failure is believed.
    match packet.status() {
        status if status.is_success() => Ok(moved),
        status => Err(Error::Refused { operation: Operation::EXECUTE_SRB, status }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vstor_wire::scsi::cdb::Command;
    use vstor_wire::scsi::sense::{AdditionalSense, SenseKey};
    use vstor_wire::srb::DataDirection;

    use super::*;

    const ADDRESS: ScsiAddress = ScsiAddress::new(0, 0, 2);
    const READ: Asked = Asked::Command { address: ADDRESS, opcode: 0x28, bytes: 4096 };

    fn request() -> ScsiRequest {
        let cdb = Command::read(8, 8).encode().unwrap();
        ScsiRequest::new(ADDRESS, &cdb, DataDirection::In, 4096)
    }

    fn answer(change: impl FnOnce(&mut ScsiRequest)) -> VstorPacket {
        let mut srb = request();
        change(&mut srb);
        VstorPacket::answer(NtStatus::SUCCESS).with_body(&srb)
    }

    fn scsi_error(srb: u8, scsi: ScsiStatus, sense: Option<SenseData>, moved: u32) -> Error {
        Error::Scsi(ScsiError {
            address: ADDRESS,
            opcode: 0x28,
            srb_status: SrbStatus(srb),
            scsi_status: scsi,
            sense,
            moved,
        })
    }

    #[test]
    fn answers_are_judged() {
        let sense = SenseData::new(SenseKey::MediumError, AdditionalSense::UNRECOVERED_READ_ERROR)
            .with_block(9);
        let good = |moved| {
            move |srb: &mut ScsiRequest| srb.finish(SrbStatus::SUCCESS, ScsiStatus::GOOD, moved)
        };
        for (name, packet, expected) in [
            ("all", answer(good(4096)), Ok(4096)),
            ("some", answer(good(512)), Ok(512)),
            ("none", answer(good(0)), Ok(0)),
            (
                "too much",
                answer(good(4097)),
                Err(AnswerError::Moved { claimed: 4097, asked: 4096 }.into()),
            ),
            (
                "sense",
                answer(|srb| srb.finish_with_sense(SrbStatus::ERROR, 512, &sense.to_fixed())),
                Err(scsi_error(0x84, ScsiStatus::CHECK_CONDITION, Some(sense), 512)),
            ),
            (
                "sense that is none",
                answer(|srb| srb.finish_with_sense(SrbStatus::ERROR, 0, &[0xff; 18])),
                Err(scsi_error(0x84, ScsiStatus::CHECK_CONDITION, None, 0)),
            ),
            (
                "sense without the flag",
                answer(|srb| {
                    srb.finish_with_sense(SrbStatus::ERROR, 0, &sense.to_fixed());
                    srb.srb_status = SrbStatus::ERROR;
                }),
                Err(scsi_error(0x04, ScsiStatus::CHECK_CONDITION, None, 0)),
            ),
            (
                "sense longer than there is room",
                answer(|srb| {
                    srb.finish_with_sense(SrbStatus::ERROR, 0, &sense.to_fixed());
                    srb.sense_info_length = 255;
                }),
                Err(scsi_error(0x84, ScsiStatus::CHECK_CONDITION, None, 0)),
            ),
            (
                "no LUN",
                answer(|srb| srb.finish(SrbStatus::INVALID_LUN, ScsiStatus::GOOD, 0)),
                Err(scsi_error(0x20, ScsiStatus::GOOD, None, 0)),
            ),
            (
                "success that is none",
                answer(|srb| srb.finish(SrbStatus::SUCCESS, ScsiStatus::BUSY, 0)),
                Err(scsi_error(0x01, ScsiStatus::BUSY, None, 0)),
            ),
            (
                "not finished",
                answer(|srb| srb.finish(SrbStatus::PENDING, ScsiStatus::GOOD, 0)),
                Err(scsi_error(0x00, ScsiStatus::GOOD, None, 0)),
            ),
            (
                "contradiction",
                {
                    let mut packet = answer(good(4096));
                    packet.status = NtStatus::UNSUCCESSFUL.0.into();
                    packet
                },
                Err(Error::Refused {
                    operation: Operation::EXECUTE_SRB,
                    status: NtStatus::UNSUCCESSFUL,
                }),
            ),
        ] {
            assert_eq!(judge(READ, &packet), expected, "{name}");
            assert_eq!(success(READ, &packet), expected.ok(), "{name}");
        }
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        let bytes = answer(|_| {}).bytes(PacketForm::Full).to_vec();
        for (payload, form, expected) in [
            (&bytes[..], PacketForm::Full, Ok(())),
            (&bytes[..48], PacketForm::Compact, Ok(())),
            (&[bytes.clone(), vec![0; 8]].concat(), PacketForm::Full, Ok(())),
            (&bytes[..56], PacketForm::Full, Err(AnswerError::Length { got: 56, needed: 64 })),
            (&bytes[..40], PacketForm::Compact, Err(AnswerError::Length { got: 40, needed: 48 })),
            (&[], PacketForm::Full, Err(AnswerError::Length { got: 0, needed: 64 })),
        ] {
            assert_eq!(
                read(&Payload::new(payload), form).map(|_| ()),
                expected,
                "{} bytes",
                payload.len()
            );
        }
        let mut other = bytes;
        other[0] = 11;
        assert_eq!(
            read(&Payload::new(&other), PacketForm::Full),
            Err(AnswerError::Operation { operation: Operation::ENUMERATE_BUS })
        );
    }

    proptest! {
        /// Whatever bytes come, a success never claims more than was asked for.
        #[test]
        fn any_bytes_are_judged(
            payload in proptest::collection::vec(any::<u8>(), 0..80), fix_operation: bool
        ) {
            let mut payload = payload;
            if fix_operation && payload.len() >= 4 {
                payload[..4].copy_from_slice(&[1, 0, 0, 0]);
            }
            if let Ok(packet) = read(&Payload::new(&payload), PacketForm::Full)
            {
                let judged = judge(READ, packet);
                prop_assert!(judged.is_err() || judged.is_ok_and(|moved| moved <= 4096));
                // The short way never says more than the long one.
                prop_assert!(success(READ, packet).is_none_or(|moved| judged == Ok(moved)));
            }
        }
    }
}
