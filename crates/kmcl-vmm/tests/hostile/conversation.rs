//! What a proper guest says to open a channel, use it and close it again: inputs of HvPostMessage. A
//! hostile one says it with mistakes, and not to the end.

use std::error::Error;

use vmbus_wire::guid::Guid;
use vmbus_wire::message::contact::MessageTarget;
use vmbus_wire::message::gpadl::GpadlMessages;
use vmbus_wire::message::{
    CloseChannel, GpadlTeardown, GuestMessage, InitiateContact, MessageBuffer, ModifyChannel,
    ModifyConnection, OpenChannel, RelIdReleased, TlConnectRequest,
};
use vmbus_wire::ranges::GpaRanges;
use vmbus_wire::synic::{VMBUS_MESSAGE_TYPE, VMBUS_SINT, connection};
use vmbus_wire::version::Version;

/// The connection by which the first channel is signalled: those of others follow.
pub(crate) const FIRST_CONNECTION: u32 = 1 | (VMBUS_SINT as u32) << 12;

/// GPADLs that the rings of the first two channels are in.
const RING_GPADLS: [u32; 2] = [0x51, 0x52];
/// One that is described by more than one message.
const LARGE_GPADL: u32 = 0x53;
/// Its pages.
const LARGE_PAGES: std::ops::Range<u64> = 0x1000..0x1064;

/// The whole conversation, in order.
pub(crate) fn messages(
    ring_pages: impl Iterator<Item = u64>,
) -> Result<Vec<[u8; 256]>, Box<dyn Error>> {
    let target =
        MessageTarget { sint: VMBUS_SINT, vtl: 0, reserved: 0.into(), feature_flags: 0.into() };
    let contact = InitiateContact::with_message_target(Version::V5_3, 0, target);
    let old = InitiateContact::with_interrupt_page(Version::V4_0, 0, 0x20_2000);
    let ring_pages: Vec<u64> = ring_pages.collect();
    let half = u32::try_from(ring_pages.len() / 2)?;
    let rings = gpadl(ring_pages);
    let large = gpadl(LARGE_PAGES.collect());

    let mut all = Vec::new();
    let mut say = |message: GuestMessage<'_>| all.push(input(&message.to_buffer(), false));
    say(GuestMessage::InitiateContact(contact));
    say(GuestMessage::RequestOffers);
    for (channel, gpadl) in (1..).zip(RING_GPADLS) {
        for message in GpadlMessages::new(channel, gpadl, GpaRanges::parse(&rings, 1)?)? {
            all.push(input(&message, true));
        }
        let open = OpenChannel {
            channel_id: channel.into(),
            open_id: (7 * channel).into(),
            ring_gpadl_id: gpadl.into(),
            target_vp: 0.into(),
            downstream_page_offset: half.into(),
            user_data: [channel.to_le_bytes()[0]; 120],
        };
        all.push(input(&GuestMessage::OpenChannel(open).to_buffer(), true));
    }
    for message in GpadlMessages::new(1, LARGE_GPADL, GpaRanges::parse(&large, 1)?)? {
        all.push(input(&message, true));
    }
    let pages = ModifyConnection {
        parent_to_child_monitor_gpa: 0x40_0000.into(),
        child_to_parent_monitor_gpa: 0x40_1000.into(),
    };
    let socket = TlConnectRequest {
        endpoint_id: Guid::from_u128(0x1234),
        service_id: Guid::from_u128(0x0000_0400_facb_11e6_bd58_6400_6a79_86d3),
    };
    let id = |channel_id: u32| channel_id.into();
    for message in [
        GuestMessage::ModifyChannel(ModifyChannel { channel_id: id(1), target_vp: id(0) }),
        GuestMessage::ModifyConnection(pages),
        GuestMessage::Pause,
        GuestMessage::Resume,
        GuestMessage::TlConnectRequest(socket),
        GuestMessage::GpadlTeardown(GpadlTeardown {
            channel_id: id(1),
            gpadl_id: LARGE_GPADL.into(),
        }),
        // While its rings are in use.
        GuestMessage::GpadlTeardown(GpadlTeardown {
            channel_id: id(1),
            gpadl_id: RING_GPADLS[0].into(),
        }),
        GuestMessage::CloseChannel(CloseChannel { channel_id: id(1) }),
        GuestMessage::CloseChannel(CloseChannel { channel_id: id(2) }),
        GuestMessage::RelIdReleased(RelIdReleased { channel_id: id(2) }),
        GuestMessage::Unload,
        GuestMessage::InitiateContact(old),
        GuestMessage::RequestOffers,
        GuestMessage::Unload,
    ] {
        all.push(input(&message.to_buffer(), true));
    }
    Ok(all)
}

/// Words of a GPADL of whole pages.
fn gpadl(pages: Vec<u64>) -> Vec<u64> {
    [vec![pages.len() as u64 * 4096], pages].concat()
}

/// `connected`: by the connection for any message; else by the one for a first contact.
fn input(message: &MessageBuffer, connected: bool) -> [u8; 256] {
    let by = if connected { connection::MESSAGE } else { connection::MULTI_CLIENT_MESSAGE };
    let head = [by, 0, VMBUS_MESSAGE_TYPE, message.size().into()].map(u32::to_le_bytes);
    let payload = message.padded();
    let mut bytes = head.as_flattened().iter().chain(&payload).copied();
    std::array::from_fn(|_| bytes.next().unwrap_or(0))
}
