//! One vector or more per message: literal bytes, and the value they stand for.

use super::*;
use crate::guid::Guid;

/// 16 bytes that differ from one another and between the uses of a GUID in one message.
const GUID_A: [u8; 16] = [
    0xa0, 0xa1, 0xa2, 0xa3, 0xa4, 0xa5, 0xa6, 0xa7, 0xa8, 0xa9, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf,
];
const GUID_B: [u8; 16] = [
    0xb0, 0xb1, 0xb2, 0xb3, 0xb4, 0xb5, 0xb6, 0xb7, 0xb8, 0xb9, 0xba, 0xbb, 0xbc, 0xbd, 0xbe, 0xbf,
];
const GUID_C: [u8; 16] = [
    0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xca, 0xcb, 0xcc, 0xcd, 0xce, 0xcf,
];

/// Device-defined bytes, told apart from zeroes at both ends.
fn user_data() -> [u8; 120] {
    let mut bytes = [0; 120];
    bytes[0] = 0xd0;
    bytes[119] = 0xd1;
    bytes
}

pub(super) struct GuestVector {
    pub(super) negotiated: Option<Negotiated>,
    pub(super) bytes: Vec<u8>,
    pub(super) message: GuestMessage<'static>,
}

pub(super) struct HostVector {
    pub(super) negotiated: Option<Negotiated>,
    pub(super) bytes: Vec<u8>,
    pub(super) message: HostMessage,
}

fn initiate_contact(version: u32, target: [u8; 8]) -> InitiateContact {
    InitiateContact {
        version: version.into(),
        target_message_vp: 0x1413_1211.into(),
        interrupt_page_or_target: target,
        parent_to_child_monitor_gpa: 0x1f1e_1d1c_1b1a_1918.into(),
        child_to_parent_monitor_gpa: 0x2726_2524_2322_2120.into(),
    }
}

fn open_channel() -> OpenChannel {
    OpenChannel {
        channel_id: 0x0b0a_0908.into(),
        open_id: 0x0f0e_0d0c.into(),
        ring_gpadl_id: 0x1312_1110.into(),
        target_vp: 0x1716_1514.into(),
        downstream_page_offset: 0x1b1a_1918.into(),
        user_data: user_data(),
    }
}

/// The bytes from 8 up to `end`, each its own offset.
const COUNTED: [u8; 24] =
    [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31];

pub(super) fn guest_vectors() -> Vec<GuestVector> {
    let everything = v6_0(FeatureFlags::all());
    let row = |negotiated, bytes, message| GuestVector { negotiated, bytes, message };
    let two_words: &'static [zerocopy::little_endian::U64] =
        std::vec::Vec::leak(vec![0x0000_0010_0000_1ff0.into(), 0x2322_2120_1f1e_1d1c.into()]);
    vec![
        row(V5_3, wire(8, &[(0, &[3])]), GuestMessage::RequestOffers),
        row(
            V5_3,
            wire(
                148,
                &[
                    (0, &[5]),
                    (8, &[0x08, 0x09, 0x0a, 0x0b]),
                    (12, &[0x0c, 0x0d, 0x0e, 0x0f]),
                    (16, &[0x10, 0x11, 0x12, 0x13]),
                    (20, &[0x14, 0x15, 0x16, 0x17]),
                    (24, &[0x18, 0x19, 0x1a, 0x1b]),
                    (28, &[0xd0]),
                    (147, &[0xd1]),
                ],
            ),
            GuestMessage::OpenChannel(open_channel()),
        ),
        row(
            v6_0(FeatureFlags::GUEST_SPECIFIED_SIGNAL_PARAMETERS),
            wire(
                156,
                &[
                    (0, &[5]),
                    (8, &[0x08, 0x09, 0x0a, 0x0b]),
                    (12, &[0x0c, 0x0d, 0x0e, 0x0f]),
                    (16, &[0x10, 0x11, 0x12, 0x13]),
                    (20, &[0x14, 0x15, 0x16, 0x17]),
                    (24, &[0x18, 0x19, 0x1a, 0x1b]),
                    (28, &[0xd0]),
                    (147, &[0xd1]),
                    (148, &[0x94, 0x95, 0x96, 0x97]),
                    (152, &[0x98, 0x99]),
                    (154, &[0x01, 0x00]),
                ],
            ),
            GuestMessage::OpenChannelV2(OpenChannelV2 {
                open: open_channel(),
                connection_id: 0x9796_9594.into(),
                event_flag: 0x9998.into(),
                flags: 1.into(),
            }),
        ),
        row(
            V5_3,
            wire(12, &[(0, &[7]), (8, &[0x08, 0x09, 0x0a, 0x0b])]),
            GuestMessage::CloseChannel(CloseChannel { channel_id: 0x0b0a_0908.into() }),
        ),
        row(
            V5_3,
            wire(
                36,
                &[
                    (0, &[8]),
                    (8, &[0x08, 0x09, 0x0a, 0x0b]),
                    (12, &[0x0c, 0x0d, 0x0e, 0x0f]),
                    (16, &[0x20, 0x01]),
                    (18, &[0x02, 0x00]),
                    (20, &[0xf0, 0x1f, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00]),
                    (28, &[0x1c, 0x1d, 0x1e, 0x1f, 0x20, 0x21, 0x22, 0x23]),
                ],
            ),
            GuestMessage::GpadlHeader(
                GpadlHeader::new(
                    gpadl::GpadlHeaderFields {
                        channel_id: 0x0b0a_0908.into(),
                        gpadl_id: 0x0f0e_0d0c.into(),
                        range_buflen: 0x0120.into(),
                        range_count: 2.into(),
                    },
                    two_words,
                )
                .unwrap(),
            ),
        ),
        row(
            V5_3,
            wire(
                32,
                &[
                    (0, &[9]),
                    (8, &[0x08, 0x09, 0x0a, 0x0b]),
                    (12, &[0x0c, 0x0d, 0x0e, 0x0f]),
                    (16, &[0xf0, 0x1f, 0x00, 0x00, 0x10, 0x00, 0x00, 0x00]),
                    (24, &[0x1c, 0x1d, 0x1e, 0x1f, 0x20, 0x21, 0x22, 0x23]),
                ],
            ),
            GuestMessage::GpadlBody(
                GpadlBody::new(
                    gpadl::GpadlBodyFields {
                        message_number: 0x0b0a_0908.into(),
                        gpadl_id: 0x0f0e_0d0c.into(),
                    },
                    two_words,
                )
                .unwrap(),
            ),
        ),
        row(
            V5_3,
            wire(
                16,
                &[(0, &[11]), (8, &[0x08, 0x09, 0x0a, 0x0b]), (12, &[0x0c, 0x0d, 0x0e, 0x0f])],
            ),
            GuestMessage::GpadlTeardown(GpadlTeardown {
                channel_id: 0x0b0a_0908.into(),
                gpadl_id: 0x0f0e_0d0c.into(),
            }),
        ),
        row(
            V5_3,
            wire(12, &[(0, &[13]), (8, &[0x08, 0x09, 0x0a, 0x0b])]),
            GuestMessage::RelIdReleased(RelIdReleased { channel_id: 0x0b0a_0908.into() }),
        ),
        // Linux's: 5.3 at SINT 2.
        row(
            None,
            wire(
                40,
                &[
                    (0, &[14]),
                    (8, &[0x03, 0x00, 0x05, 0x00]),
                    (12, &[0x11, 0x12, 0x13, 0x14]),
                    (16, &[2]),
                    (17, &[0]),
                    (24, &[0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f]),
                    (32, &[0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27]),
                ],
            ),
            GuestMessage::InitiateContact(initiate_contact(0x0005_0003, [2, 0, 0, 0, 0, 0, 0, 0])),
        ),
        // Boot firmware's: 0.13 with an interrupt page.
        row(
            None,
            wire(
                40,
                &[
                    (0, &[14]),
                    (8, &[0x0d, 0x00, 0x00, 0x00]),
                    (12, &[0x11, 0x12, 0x13, 0x14]),
                    (16, &[0x00, 0x10, 0x32, 0x54, 0x06, 0x00, 0x00, 0x00]),
                    (24, &[0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f]),
                    (32, &[0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27]),
                ],
            ),
            GuestMessage::InitiateContact(initiate_contact(
                0xd,
                0x0000_0006_5432_1000_u64.to_le_bytes(),
            )),
        ),
        // 6.0, asking for all features: the client id is there.
        row(
            everything,
            wire(
                56,
                &[
                    (0, &[14]),
                    (8, &[0x00, 0x00, 0x06, 0x00]),
                    (12, &[0x11, 0x12, 0x13, 0x14]),
                    (16, &[0x02]),
                    (17, &[0x01]),
                    (20, &[0xff, 0x00, 0x00, 0x00]),
                    (24, &[0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f]),
                    (32, &[0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27]),
                    (40, &GUID_A),
                ],
            ),
            GuestMessage::InitiateContactV2(InitiateContactV2 {
                contact: initiate_contact(0x0006_0000, [2, 1, 0, 0, 0xff, 0, 0, 0]),
                client_id: Guid::from_bytes(GUID_A),
            }),
        ),
        row(V5_3, wire(8, &[(0, &[16])]), GuestMessage::Unload),
        row(
            V5_3,
            wire(
                28,
                &[
                    (0, &[18]),
                    (8, &COUNTED[0..4]),
                    (12, &COUNTED[4..8]),
                    (16, &COUNTED[8..12]),
                    (20, &COUNTED[12..16]),
                    (24, &COUNTED[16..20]),
                ],
            ),
            GuestMessage::OpenReservedChannel(OpenReservedChannel {
                channel_id: 0x0b0a_0908.into(),
                target_vp: 0x0f0e_0d0c.into(),
                target_sint: 0x1312_1110.into(),
                ring_gpadl_id: 0x1716_1514.into(),
                downstream_page_offset: 0x1b1a_1918.into(),
            }),
        ),
        row(
            None,
            wire(
                20,
                &[(0, &[19]), (8, &COUNTED[0..4]), (12, &COUNTED[4..8]), (16, &COUNTED[8..12])],
            ),
            GuestMessage::CloseReservedChannel(CloseReservedChannel {
                channel_id: 0x0b0a_0908.into(),
                target_vp: 0x0f0e_0d0c.into(),
                target_sint: 0x1312_1110.into(),
            }),
        ),
        row(
            V5_3,
            wire(40, &[(0, &[21]), (8, &GUID_A), (24, &GUID_B)]),
            GuestMessage::TlConnectRequest(TlConnectRequest {
                endpoint_id: Guid::from_bytes(GUID_A),
                service_id: Guid::from_bytes(GUID_B),
            }),
        ),
        row(
            V5_3,
            wire(56, &[(0, &[21]), (8, &GUID_A), (24, &GUID_B), (40, &GUID_C)]),
            GuestMessage::TlConnectRequestV2(TlConnectRequestV2 {
                request: TlConnectRequest {
                    endpoint_id: Guid::from_bytes(GUID_A),
                    service_id: Guid::from_bytes(GUID_B),
                },
                silo_id: Guid::from_bytes(GUID_C),
            }),
        ),
        row(
            V5_3,
            wire(16, &[(0, &[22]), (8, &COUNTED[0..4]), (12, &COUNTED[4..8])]),
            GuestMessage::ModifyChannel(ModifyChannel {
                channel_id: 0x0b0a_0908.into(),
                target_vp: 0x0f0e_0d0c.into(),
            }),
        ),
        row(
            v6_0(FeatureFlags::MODIFY_CONNECTION),
            wire(24, &[(0, &[25]), (8, &COUNTED[0..8]), (16, &COUNTED[8..16])]),
            GuestMessage::ModifyConnection(ModifyConnection {
                parent_to_child_monitor_gpa: 0x0f0e_0d0c_0b0a_0908.into(),
                child_to_parent_monitor_gpa: 0x1716_1514_1312_1110.into(),
            }),
        ),
        row(v6_0(FeatureFlags::PAUSE_RESUME), wire(8, &[(0, &[27])]), GuestMessage::Pause),
        row(v6_0(FeatureFlags::PAUSE_RESUME), wire(8, &[(0, &[29])]), GuestMessage::Resume),
    ]
}

pub(super) fn host_vectors() -> Vec<HostVector> {
    let row = |negotiated, bytes, message| HostVector { negotiated, bytes, message };
    let response = VersionResponse {
        version_supported: 1,
        connection_state: 2,
        padding: 0.into(),
        selected_version_or_connection_id: 0x0f0e_0d0c.into(),
    };
    vec![
        row(
            V5_3,
            wire(
                196,
                &[
                    (0, &[1]),
                    (8, &GUID_A),
                    (24, &GUID_B),
                    (56, &[0x11, 0x20]),
                    (58, &[0x3a, 0x3b]),
                    (60, &[0xd0]),
                    (179, &[0xd1]),
                    (180, &[0xb4, 0xb5]),
                    (182, &[0xb6, 0xb7]),
                    (184, &[0xb8, 0xb9, 0xba, 0xbb]),
                    (188, &[0xbc]),
                    (189, &[0xbd]),
                    (190, &[0xbe, 0xbf]),
                    (192, &[0xc0, 0xc1, 0xc2, 0xc3]),
                ],
            ),
            HostMessage::OfferChannel(OfferChannel {
                interface_id: Guid::from_bytes(GUID_A),
                instance_id: Guid::from_bytes(GUID_B),
                reserved: [0; 16],
                flags: 0x2011.into(),
                mmio_megabytes: 0x3b3a.into(),
                user_defined: user_data(),
                subchannel_index: 0xb5b4.into(),
                mmio_megabytes_optional: 0xb7b6.into(),
                channel_id: 0xbbba_b9b8.into(),
                monitor_id: 0xbc,
                monitor_allocated: 0xbd,
                is_dedicated_interrupt: 0xbfbe.into(),
                connection_id: 0xc3c2_c1c0.into(),
            }),
        ),
        row(
            V5_3,
            wire(12, &[(0, &[2]), (8, &COUNTED[0..4])]),
            HostMessage::RescindChannelOffer(RescindChannelOffer {
                channel_id: 0x0b0a_0908.into(),
            }),
        ),
        row(V5_3, wire(8, &[(0, &[4])]), HostMessage::AllOffersDelivered),
        row(
            V5_3,
            wire(
                20,
                &[(0, &[6]), (8, &COUNTED[0..4]), (12, &COUNTED[4..8]), (16, &COUNTED[8..12])],
            ),
            HostMessage::OpenChannelResult(OpenChannelResult {
                channel_id: 0x0b0a_0908.into(),
                open_id: 0x0f0e_0d0c.into(),
                status: 0x1312_1110.into(),
            }),
        ),
        row(
            V5_3,
            wire(
                20,
                &[(0, &[10]), (8, &COUNTED[0..4]), (12, &COUNTED[4..8]), (16, &COUNTED[8..12])],
            ),
            HostMessage::GpadlCreated(GpadlCreated {
                channel_id: 0x0b0a_0908.into(),
                gpadl_id: 0x0f0e_0d0c.into(),
                status: 0x1312_1110.into(),
            }),
        ),
        row(
            V5_3,
            wire(12, &[(0, &[12]), (8, &COUNTED[0..4])]),
            HostMessage::GpadlTorndown(GpadlTorndown { gpadl_id: 0x0b0a_0908.into() }),
        ),
        row(
            V5_3,
            wire(16, &[(0, &[15]), (8, &[1]), (9, &[2]), (12, &COUNTED[4..8])]),
            HostMessage::VersionResponse(response),
        ),
        row(
            v6_0(FeatureFlags::all()),
            wire(16, &[(0, &[15])]),
            HostMessage::VersionResponse(VersionResponse::UNSUPPORTED),
        ),
        row(
            v6_0(FeatureFlags::all()),
            wire(20, &[(0, &[15]), (8, &[1]), (9, &[2]), (12, &COUNTED[4..8]), (16, &[0x2d])]),
            HostMessage::VersionResponseV2(VersionResponseV2 {
                response,
                supported_features: 0x2d.into(),
            }),
        ),
        row(
            v6_0(FeatureFlags::all()),
            wire(
                40,
                &[
                    (0, &[15]),
                    (8, &[1]),
                    (9, &[2]),
                    (12, &COUNTED[4..8]),
                    (16, &[0x40]),
                    (24, &[0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f]),
                    (32, &[0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27]),
                ],
            ),
            HostMessage::VersionResponseV3(VersionResponseV3 {
                response: VersionResponseV2 { response, supported_features: 0x40.into() },
                padding: 0.into(),
                parent_to_child_monitor_gpa: 0x1f1e_1d1c_1b1a_1918.into(),
                child_to_parent_monitor_gpa: 0x2726_2524_2322_2120.into(),
            }),
        ),
        row(V5_3, wire(8, &[(0, &[17])]), HostMessage::UnloadComplete),
        row(
            V5_3,
            wire(12, &[(0, &[20]), (8, &COUNTED[0..4])]),
            HostMessage::CloseReservedResponse(CloseReservedResponse {
                channel_id: 0x0b0a_0908.into(),
            }),
        ),
        row(
            V5_3,
            wire(44, &[(0, &[23]), (8, &GUID_A), (24, &GUID_B), (40, &[0x36, 0x02, 0x00, 0xc0])]),
            HostMessage::TlConnectResult(TlConnectResult {
                endpoint_id: Guid::from_bytes(GUID_A),
                service_id: Guid::from_bytes(GUID_B),
                status: 0xc000_0236.into(),
            }),
        ),
        row(
            V5_3,
            wire(16, &[(0, &[24]), (8, &COUNTED[0..4]), (12, &COUNTED[4..8])]),
            HostMessage::ModifyChannelResponse(ModifyChannelResponse {
                channel_id: 0x0b0a_0908.into(),
                status: 0x0f0e_0d0c.into(),
            }),
        ),
        row(
            v6_0(FeatureFlags::MODIFY_CONNECTION),
            wire(9, &[(0, &[26]), (8, &[1])]),
            HostMessage::ModifyConnectionResponse(ModifyConnectionResponse { connection_state: 1 }),
        ),
        row(v6_0(FeatureFlags::PAUSE_RESUME), wire(8, &[(0, &[28])]), HostMessage::PauseResponse),
    ]
}

#[test]
fn every_guest_message_reads_and_writes_its_bytes() {
    for GuestVector { negotiated, bytes, message } in guest_vectors() {
        assert_eq!(GuestMessage::parse(&bytes, negotiated), Ok(message), "{bytes:x?}");
        assert_eq!(&*message.to_buffer(), bytes, "{message:?}");
    }
}

#[test]
fn every_host_message_reads_and_writes_its_bytes() {
    for HostVector { negotiated, bytes, message } in host_vectors() {
        assert_eq!(HostMessage::parse(&bytes, negotiated), Ok(message), "{bytes:x?}");
        assert_eq!(&*message.to_buffer(), bytes, "{message:?}");
    }
}

#[test]
fn there_is_a_vector_of_every_type() {
    let guest = guest_vectors().into_iter().map(|vector| vector.message.message_type());
    let host = host_vectors().into_iter().map(|vector| vector.message.message_type());
    let with_vector: std::collections::BTreeSet<MessageType> = guest.chain(host).collect();
    assert!(with_vector.into_iter().eq(MessageType::ALL));
}

#[test]
fn trailing_bytes_are_tolerated() {
    for GuestVector { negotiated, bytes, message } in guest_vectors() {
        // Of these three the size decides what they are; `forms` and `gpadls` look at them.
        if matches!(
            message,
            GuestMessage::TlConnectRequest(_)
                | GuestMessage::GpadlBody(_)
                | GuestMessage::GpadlHeader(_)
        ) {
            continue;
        }
        let mut padded = bytes.clone();
        padded.resize(MAX_MESSAGE_SIZE, 0xee);
        assert_eq!(GuestMessage::parse(&padded, negotiated), Ok(message), "{bytes:x?}");
    }
    for HostVector { negotiated, bytes, message } in host_vectors() {
        let mut padded = bytes.clone();
        padded.resize(MAX_MESSAGE_SIZE, 0xee);
        assert_eq!(HostMessage::parse(&padded, negotiated), Ok(message), "{bytes:x?}");
    }
}

#[test]
fn every_truncation_says_what_was_needed() {
    /// Sizes of the forms that `full` bytes of a message may be cut down to.
    fn shorter_form(message: MessageType, full: usize) -> Option<usize> {
        match (message, full) {
            (MessageType::TlConnectRequest, 56) => Some(40), // the size decides
            (MessageType::GpadlHeader, 36) => Some(20),      // fewer words, or none
            (MessageType::GpadlBody, 32) => Some(16),
            _ => None,
        }
    }
    fn check(name: MessageType, bytes: &[u8], parse: impl Fn(&[u8]) -> Result<(), MessageError>) {
        for len in 0..bytes.len() {
            let got = parse(&bytes[..len]);
            if len < HEADER_SIZE {
                assert_eq!(got, Err(MessageError::NoHeader { len }), "{name} cut to {len}");
            } else if shorter_form(name, bytes.len()).is_some_and(|shorter| len >= shorter) {
                assert_eq!(got, Ok(()), "{name} cut to {len}");
            } else {
                let Err(MessageError::Truncated { message, needed, len: found }) = got else {
                    panic!("{name} cut to {len}: {got:?}");
                };
                assert_eq!((message, found), (name, len), "{name} cut to {len}");
                // Forms that extend a shorter one may miss that one first.
                let whole = shorter_form(name, bytes.len()).unwrap_or(bytes.len());
                assert!(needed > len && needed <= whole, "{name} cut to {len}: needs {needed}");
                assert!(needed >= name.min_size(), "{name} cut to {len}: needs {needed}");
            }
        }
    }
    for GuestVector { negotiated, bytes, message } in guest_vectors() {
        let parse = |cut: &[u8]| GuestMessage::parse(cut, negotiated).map(drop);
        check(message.message_type(), &bytes, parse);
    }
    for HostVector { negotiated, bytes, message } in host_vectors() {
        let parse = |cut: &[u8]| HostMessage::parse(cut, negotiated).map(drop);
        check(message.message_type(), &bytes, parse);
    }
}

#[test]
fn the_shortest_vectors_have_the_size_of_the_table() {
    for message in MessageType::ALL {
        let guest = guest_vectors()
            .into_iter()
            .filter(|vector| vector.message.message_type() == message)
            .map(|vector| vector.bytes.len());
        let host = host_vectors()
            .into_iter()
            .filter(|vector| vector.message.message_type() == message)
            .map(|vector| vector.bytes.len());
        let shortest = guest.chain(host).min().unwrap();
        // The GPADL vectors carry two words.
        let words = match message {
            MessageType::GpadlHeader | MessageType::GpadlBody => 16,
            _ => 0,
        };
        assert_eq!(shortest, message.min_size() + words, "{message}");
    }
}
