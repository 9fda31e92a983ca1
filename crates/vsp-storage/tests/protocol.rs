//! The protocol of the channel, over real rings.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Gate, Guest, Host, LUN0, ram, sense, until};
use kmcl::bus::{BusEvent, EventSink, Residency};
use kmcl::{ChannelState, NtStatus};
use vstor_wire::packet::{Operation, PacketForm, VstorPacket};
use vstor_wire::protocol::{ChannelProperties, ProtocolVersion, SubChannelRequest};
use vstor_wire::scsi::cdb::Command;
use vstor_wire::scsi::sense::{AdditionalSense, SenseKey};
use vstor_wire::srb::{DataDirection, ScsiRequest, ScsiStatus, SrbStatus};

fn host() -> Host {
    Host::with_disk(4, ram(1 << 20))
}

fn create(count: u16) -> VstorPacket {
    VstorPacket::request(Operation::CREATE_SUB_CHANNELS)
        .with_body(&SubChannelRequest { count: count.into() })
}

#[test]
fn every_version_is_spoken_in_its_form() {
    for version in ProtocolVersion::ALL {
        let host = host();
        let guest = Guest::ready(&host.bus, version);
        let answer = guest.command(
            LUN0,
            Command::Inquiry { page: None, allocation: 36 },
            DataDirection::In,
            36,
        );
        assert_eq!(answer.srb_status, SrbStatus::SUCCESS, "{version}");
        assert_eq!(answer.data_transfer_length.get(), 36, "{version}");
        let mut data = [0; 36];
        guest.pages.slice().unwrap().read_at(0, &mut data).unwrap();
        assert_eq!(&data[8..24], b"Msft    Virtual ", "{version}");
        // An error brings its sense data, as much as the form has room for.
        let answer = guest.command(LUN0, Command::read(1 << 20, 1), DataDirection::In, 512);
        assert_eq!(answer.scsi_status, ScsiStatus::CHECK_CONDITION, "{version}");
        let found = sense(&answer).unwrap();
        assert_eq!(found.code, AdditionalSense::LOGICAL_BLOCK_ADDRESS_OUT_OF_RANGE, "{version}");
    }
}

#[test]
fn the_initialisation_may_come_in_the_short_form_and_srbs_may_not() {
    let host = host();
    let mut guest = Guest::open(&host.bus, 0);
    guest.form = PacketForm::Compact;
    guest.initialise(ProtocolVersion::WIN10);
    let cdb = Command::TestUnitReady.encode().unwrap();
    let srb = ScsiRequest::new(LUN0, &cdb, DataDirection::None, 0);
    let packet = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb);
    assert_eq!(guest.call(&packet).status(), NtStatus::INVALID_PARAMETER);
    guest.form = PacketForm::Full;
    assert_eq!(guest.execute(srb, 0).srb_status, SrbStatus::SUCCESS);
}

#[test]
fn nothing_but_the_initialisation_is_possible_before_its_end() {
    let host = host();
    let guest = Guest::open(&host.bus, 0);
    let steps = [
        Operation::BEGIN_INITIALIZATION,
        Operation::QUERY_PROTOCOL_VERSION,
        Operation::QUERY_PROPERTIES,
        Operation::END_INITIALIZATION,
    ];
    for step in 0..=steps.len() {
        for operation in [
            Operation::EXECUTE_SRB,
            Operation::RESET_LUN,
            Operation::RESET_BUS,
            Operation::RESET_ADAPTER,
            Operation::CREATE_SUB_CHANNELS,
        ] {
            let status = guest.call(&VstorPacket::request(operation)).status();
            let expected =
                if step < steps.len() { NtStatus::INVALID_DEVICE_STATE } else { NtStatus::SUCCESS };
            assert_eq!(status, expected, "{operation:?} before step {step}");
        }
        if let Some(&operation) = steps.get(step) {
            let mut packet = VstorPacket::request(operation);
            if operation == Operation::QUERY_PROTOCOL_VERSION {
                packet.body[..2].copy_from_slice(&[0x02, 0x06]);
            }
            assert_eq!(guest.call(&packet).status(), NtStatus::SUCCESS, "{operation:?}");
        }
    }
}

#[test]
fn operations_that_are_not_a_guests_are_refused() {
    let host = host();
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    for raw in [0, 1, 2, 11, 12, 14, 15, 16, 0x100, 0x8000_0003, u32::MAX] {
        let answer = guest.call(&VstorPacket::request(Operation::from_raw(raw)));
        assert_eq!(answer.status(), NtStatus::INVALID_DEVICE_REQUEST, "{raw:#x}");
    }
    assert!(guest.can_read(LUN0));
}

#[test]
fn packets_of_any_other_length_are_refused() {
    let host = host();
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    let request = VstorPacket::request(Operation::QUERY_PROPERTIES);
    let mut bytes = request.bytes(PacketForm::Full).to_vec();
    bytes.resize(256, 0);
    for length in (0..=256usize).step_by(8) {
        let answer = guest.call_bytes(&bytes[..length], None);
        let (answer, _) = VstorPacket::parse(&answer).unwrap();
        let expected = match length {
            48 | 64 => NtStatus::INVALID_DEVICE_STATE, // read, and out of order
            _ => NtStatus::INVALID_PARAMETER,
        };
        assert_eq!(answer.status(), expected, "{length}");
    }
    assert!(guest.can_read(LUN0));
}

#[test]
fn properties_are_told() {
    let host = host();
    let guest = Guest::open(&host.bus, 0);
    let mut version = VstorPacket::request(Operation::QUERY_PROTOCOL_VERSION);
    version.body[..2].copy_from_slice(&[0x00, 0x07]);
    guest.call(&VstorPacket::request(Operation::BEGIN_INITIALIZATION));
    assert_eq!(guest.call(&version).status(), NtStatus::REVISION_MISMATCH);
    version.body[..2].copy_from_slice(&[0x02, 0x06]);
    assert_eq!(guest.call(&version).status(), NtStatus::SUCCESS);
    let answer = guest.call(&VstorPacket::request(Operation::QUERY_PROPERTIES));
    let properties: ChannelProperties = answer.body();
    assert_eq!(properties.max_sub_channel_count.get(), 4);
    assert_eq!(properties.flags.get(), 1);
    assert_eq!(properties.max_transfer_bytes.get(), 0x40000);
}

#[test]
fn subchannels_carry_srbs_and_nothing_else() {
    let host = host();
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    assert_eq!(guest.call(&create(5)).status(), NtStatus::INVALID_PARAMETER);
    assert_eq!(guest.call(&create(3)).status(), NtStatus::SUCCESS);
    assert_eq!(guest.call(&create(1)).status(), NtStatus::INVALID_DEVICE_STATE);
    let subs: Vec<Guest> = (1..=3).map(|index| Guest::open(&host.bus, index)).collect();
    for sub in &subs {
        assert!(sub.can_read(LUN0));
        for operation in [
            Operation::BEGIN_INITIALIZATION,
            Operation::QUERY_PROTOCOL_VERSION,
            Operation::QUERY_PROPERTIES,
            Operation::END_INITIALIZATION,
            Operation::CREATE_SUB_CHANNELS,
        ] {
            let answer = sub.call(&VstorPacket::request(operation));
            assert_eq!(answer.status(), NtStatus::INVALID_DEVICE_STATE, "{operation:?}");
        }
        let answer = sub.call(&VstorPacket::request(Operation::RESET_BUS));
        assert_eq!(answer.status(), NtStatus::SUCCESS);
    }
    assert!(guest.can_read(LUN0));
}

#[test]
fn starting_over_withdraws_the_subchannels_of_before() {
    let host = host();
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    for round in 0..3 {
        // Refused as long as those of the round before are still closing.
        until("subchannels were never granted", || {
            guest.call(&create(2)).status() == NtStatus::SUCCESS
        });
        let sub = Guest::open(&host.bus, 2);
        assert!(sub.can_read(LUN0), "{round}");
        guest.initialise(ProtocolVersion::WIN8);
        until("the subchannel was not withdrawn", || {
            sub.channel.process(64);
            sub.channel.state() == ChannelState::Disabled
        });
        assert!(guest.can_read(LUN0), "{round}");
    }
}

#[test]
fn a_channel_that_is_closed_and_opened_again_begins_anew() {
    let host = host();
    for round in 0..5 {
        let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
        assert!(guest.can_read(LUN0), "{round}");
        if round % 2 == 0 {
            guest.call(&create(1));
        }
        drop(guest);
        let guest = Guest::open(&host.bus, 0);
        let answer = guest.call(&VstorPacket::request(Operation::EXECUTE_SRB));
        assert_eq!(answer.status(), NtStatus::INVALID_DEVICE_STATE, "{round}");
    }
    assert_eq!(host.controller().in_flight(), (0, 0));
}

#[test]
fn a_reset_is_answered_when_what_it_concerns_has_ended() {
    for (operation, path, waits) in [
        (Operation::RESET_LUN, 0, true),
        (Operation::RESET_LUN, 1, false),
        (Operation::RESET_BUS, 0, true),
        (Operation::RESET_BUS, 1, false),
        (Operation::RESET_ADAPTER, 1, true),
    ] {
        let gate = Gate::new(1 << 20);
        let host = Host::with_disk(0, gate.clone());
        let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
        guest.send_command(LUN0, Command::read(0, 8), DataDirection::In, 4096);
        guest.send_command(LUN0, Command::write(0, 8, false), DataDirection::Out, 4096);
        until("the requests never came", || gate.waiting() == 2);
        assert_eq!(host.controller().in_flight(), (0, 2));

        let mut reset = ScsiRequest::new(
            LUN0,
            &Command::TestUnitReady.encode().unwrap(),
            DataDirection::None,
            0,
        );
        reset.path_id = path;
        let packet = VstorPacket::request(operation).with_body(&reset);
        if waits {
            guest.send(&packet, 0);
            until("the reset never came", || host.channel().incoming_outstanding() == 3);
            gate.open();
        } else {
            assert_eq!(guest.call(&packet).status(), NtStatus::SUCCESS);
            assert_eq!(gate.waiting(), 2);
            gate.open();
        }
        until("the requests never ended", || {
            guest.channel.process(64);
            guest.channel.outgoing_in_use() == (0, 0)
        });
        assert_eq!(host.controller().in_flight(), (0, 0), "{operation:?} {path}");
        until("the host never let go", || host.channel().incoming_outstanding() == 0);
    }
}

#[test]
fn a_channel_is_closed_only_when_its_requests_have_ended() {
    let gate = Gate::new(1 << 20);
    let host = Host::with_disk(0, gate.clone());
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    for _ in 0..5 {
        guest.send_command(LUN0, Command::write(0, 8, false), DataDirection::Out, 4096);
    }
    until("the requests never came", || gate.waiting() == 5);
    drop(guest);
    until("the close never came", || host.channel().state() == ChannelState::Closing);
    // As long as writes are under way it stays that way; guest memory and the disk are in use.
    assert_eq!(host.controller().in_flight(), (0, 5));
    assert_eq!(host.channel().state(), ChannelState::Closing);
    gate.open();
    until("the channel never closed", || host.channel().state() == ChannelState::Closed);
    assert_eq!(host.controller().in_flight(), (0, 0));
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    assert!(guest.can_read(LUN0));
}

#[test]
fn a_controller_goes_only_when_its_requests_have_ended() {
    let gate = Gate::new(1 << 20);
    let mut host = Host::with_disk(2, gate.clone());
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    assert_eq!(guest.call(&create(1)).status(), NtStatus::SUCCESS);
    let sub = Guest::open(&host.bus, 1);
    guest.send_command(LUN0, Command::write(0, 8, false), DataDirection::Out, 4096);
    sub.send_command(LUN0, Command::write(8, 8, false), DataDirection::Out, 4096);
    until("the requests never came", || gate.waiting() == 2);
    let controller = host.controller.take().unwrap();
    let closing = std::thread::spawn(move || controller.close());
    until("the closing never began", || host.driver.sources() == 0);
    assert!(!closing.is_finished());
    assert_eq!(gate.waiting(), 2);
    gate.open();
    closing.join().unwrap();
    assert_eq!(gate.waiting(), 0);
    for end in [guest, sub] {
        until("the offer was not withdrawn", || {
            end.channel.process(64);
            end.channel.state() == ChannelState::Disabled
        });
    }
}

/// Memory that is not there when it is first asked for.
#[derive(Default)]
struct Absent {
    asked: AtomicU32,
}

impl Residency for Absent {
    fn ensure(&self, _gpa: u64, _len: u64, events: &EventSink) -> bool {
        if self.asked.fetch_add(1, Ordering::SeqCst) > 0 {
            return true;
        }
        events.post(BusEvent::MemoryArrived);
        false
    }
}

#[test]
fn a_request_waits_for_memory_that_has_to_be_brought_in() {
    let host = host();
    let absent = Arc::new(Absent::default());
    host.bus.set_residency(absent.clone());
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    assert!(guest.can_read(LUN0));
    assert!(absent.asked.load(Ordering::SeqCst) >= 2, "delivered once more");
    until("the host never let go", || host.channel().incoming_outstanding() == 0);
}

#[test]
fn a_failure_of_the_back_end_reaches_the_guest_as_sense_data() {
    use vsp_storage::block::IoError;
    let gate = Gate::new(1 << 20);
    gate.open();
    let host = Host::with_disk(0, gate.clone());
    let guest = Guest::ready(&host.bus, ProtocolVersion::WIN10);
    let write = || guest.command(LUN0, Command::write(0, 8, false), DataDirection::Out, 4096);
    assert_eq!(write().data_transfer_length.get(), 4096);
    *gate.result.lock().unwrap() = Err(IoError::NoSpace);
    let answer = write();
    assert_eq!((answer.srb_status.0, answer.data_transfer_length.get()), (0x84, 0));
    let found = sense(&answer).unwrap();
    assert_eq!((found.key, found.code.asc, found.code.ascq), (SenseKey::DataProtect, 0x27, 7));
    *gate.result.lock().unwrap() = Err(IoError::Busy);
    let answer = write();
    assert_eq!((answer.srb_status, answer.scsi_status), (SrbStatus::BUSY, ScsiStatus::BUSY));
}
