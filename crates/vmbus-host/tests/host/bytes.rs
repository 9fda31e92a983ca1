//! Messages written down byte by byte from the protocol's tables, not by the code under test.

use vmbus_host::limits::MAX_CHANNEL_ID;
use vmbus_wire::guid::Guid;

/// A message under construction.
#[derive(Clone)]
pub(crate) struct Bytes(Vec<u8>);

/// A message's header.
pub(crate) fn message(kind: u32) -> Bytes {
    Bytes(Vec::new()).u32(kind).u32(0)
}

impl Bytes {
    pub(crate) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }
    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    pub(crate) fn guid(mut self, value: Guid) -> Self {
        self.0.extend(value.to_bytes());
        self
    }
    pub(crate) fn fill(mut self, byte: u8, count: usize) -> Self {
        self.0.extend(std::iter::repeat_n(byte, count));
        self
    }
    pub(crate) fn words(mut self, words: &[u64]) -> Self {
        words.iter().for_each(|word| self.0.extend(word.to_le_bytes()));
        self
    }
    pub(crate) fn done(self) -> Vec<u8> {
        self.0
    }
}

pub(crate) const V0_13: u32 = 0x0000_000d;
pub(crate) const V1_1: u32 = 0x0001_0001;
pub(crate) const V2_4: u32 = 0x0002_0004;
pub(crate) const V3_0: u32 = 0x0003_0000;
pub(crate) const V4_0: u32 = 0x0004_0000;
pub(crate) const V4_1: u32 = 0x0004_0001;
pub(crate) const V5_0: u32 = 0x0005_0000;
pub(crate) const V5_1: u32 = 0x0005_0001;
pub(crate) const V5_2: u32 = 0x0005_0002;
pub(crate) const V5_3: u32 = 0x0005_0003;
pub(crate) const V6_0: u32 = 0x0006_0000;

pub(crate) const VERSIONS: [u32; 11] =
    [V0_13, V1_1, V2_4, V3_0, V4_0, V4_1, V5_0, V5_1, V5_2, V5_3, V6_0];

// What the guest sends.

/// Bytes 16 to 23 of INITIATE_CONTACT from 5.0 on.
pub(crate) fn target(sint: u8, vtl: u8, features: u32) -> u64 {
    u64::from(sint) | u64::from(vtl) << 8 | u64::from(features) << 32
}

pub(crate) fn contact(version: u32, vp: u32, union: u64) -> Bytes {
    message(14).u32(version).u32(vp).u64(union).u64(0).u64(0)
}

/// What a plain guest of this version sends: no interrupt page, SINT 2, no features.
pub(crate) fn plain_contact(version: u32, vp: u32) -> Vec<u8> {
    contact(version, vp, if version >= V5_0 { target(2, 0, 0) } else { 0 }).done()
}

pub(crate) fn request_offers() -> Vec<u8> {
    message(3).done()
}
pub(crate) fn open(channel: u32, open_id: u32, gpadl: u32, vp: u32, offset: u32) -> Vec<u8> {
    message(5).u32(channel).u32(open_id).u32(gpadl).u32(vp).u32(offset).fill(0x5a, 120).done()
}
pub(crate) fn open_v2(mut open: Vec<u8>, connection: u32, flag: u16) -> Vec<u8> {
    open.extend(Bytes(Vec::new()).u32(connection).u16(flag).u16(0).done());
    open
}
pub(crate) fn close(channel: u32) -> Vec<u8> {
    message(7).u32(channel).done()
}
pub(crate) fn gpadl_header(
    channel: u32,
    gpadl: u32,
    buflen: u16,
    count: u16,
    words: &[u64],
) -> Vec<u8> {
    message(8).u32(channel).u32(gpadl).u16(buflen).u16(count).words(words).done()
}
pub(crate) fn gpadl_body(gpadl: u32, words: &[u64]) -> Vec<u8> {
    message(9).u32(0).u32(gpadl).words(words).done()
}
pub(crate) fn gpadl_teardown(channel: u32, gpadl: u32) -> Vec<u8> {
    message(11).u32(channel).u32(gpadl).done()
}
pub(crate) fn release(channel: u32) -> Vec<u8> {
    message(13).u32(channel).done()
}
pub(crate) fn unload() -> Vec<u8> {
    message(16).done()
}
pub(crate) fn open_reserved(channel: u32, vp: u32, sint: u32, gpadl: u32, offset: u32) -> Vec<u8> {
    message(18).u32(channel).u32(vp).u32(sint).u32(gpadl).u32(offset).done()
}
pub(crate) fn close_reserved(channel: u32, vp: u32, sint: u32) -> Vec<u8> {
    message(19).u32(channel).u32(vp).u32(sint).done()
}
pub(crate) fn tl_connect(endpoint: Guid, service: Guid) -> Vec<u8> {
    message(21).guid(endpoint).guid(service).done()
}
pub(crate) fn modify(channel: u32, vp: u32) -> Vec<u8> {
    message(22).u32(channel).u32(vp).done()
}
pub(crate) fn modify_connection(parent_to_child: u64, child_to_parent: u64) -> Vec<u8> {
    message(25).u64(parent_to_child).u64(child_to_parent).done()
}
pub(crate) fn pause() -> Vec<u8> {
    message(27).done()
}
pub(crate) fn resume() -> Vec<u8> {
    message(29).done()
}

/// All messages of a GPADL of one range over these pages, from byte 0 on.
pub(crate) fn whole_pages(channel: u32, gpadl: u32, pfns: &[u64]) -> Vec<Vec<u8>> {
    let mut words = vec![pfns.len() as u64 * 4096];
    words.extend(pfns);
    gpadl_messages(channel, gpadl, 1, &words)
}

/// All messages of a GPADL of these words.
pub(crate) fn gpadl_messages(channel: u32, gpadl: u32, count: u16, words: &[u64]) -> Vec<Vec<u8>> {
    let buflen = u16::try_from(words.len() * 8).unwrap();
    let (first, rest) = words.split_at(words.len().min(27));
    let mut messages = vec![gpadl_header(channel, gpadl, buflen, count, first)];
    messages.extend(rest.chunks(28).map(|words| gpadl_body(gpadl, words)));
    messages
}

// What the host sends.

pub(crate) fn unsupported() -> Vec<u8> {
    message(15).fill(0, 8).done()
}
/// VERSION_RESPONSE below 6.0.
pub(crate) fn accepted(version: u32) -> Vec<u8> {
    message(15).u8(1).u8(0).u16(0).u32(if version >= V5_0 { 1 } else { version }).done()
}
pub(crate) fn accepted_v6(features: u32) -> Vec<u8> {
    message(15).u8(1).u8(0).u16(0).u32(1).u32(features).done()
}
pub(crate) fn all_offers() -> Vec<u8> {
    message(4).done()
}
pub(crate) fn rescind(channel: u32) -> Vec<u8> {
    message(2).u32(channel).done()
}
pub(crate) fn open_result(channel: u32, open_id: u32, status: u32) -> Vec<u8> {
    message(6).u32(channel).u32(open_id).u32(status).done()
}
pub(crate) fn gpadl_created(channel: u32, gpadl: u32, status: u32) -> Vec<u8> {
    message(10).u32(channel).u32(gpadl).u32(status).done()
}
pub(crate) fn gpadl_torndown(gpadl: u32) -> Vec<u8> {
    message(12).u32(gpadl).done()
}
pub(crate) fn unload_complete() -> Vec<u8> {
    message(17).done()
}
pub(crate) fn reserved_closed(channel: u32) -> Vec<u8> {
    message(20).u32(channel).done()
}
pub(crate) fn tl_result(endpoint: Guid, service: Guid, status: u32) -> Vec<u8> {
    message(23).guid(endpoint).guid(service).u32(status).done()
}
pub(crate) fn modified(channel: u32, status: u32) -> Vec<u8> {
    message(24).u32(channel).u32(status).done()
}
pub(crate) fn connection_modified(state: u8) -> Vec<u8> {
    message(26).u8(state).done()
}
pub(crate) fn paused() -> Vec<u8> {
    message(28).done()
}

/// OFFER_CHANNEL for a plain device.
pub(crate) fn offered(interface: Guid, instance: Guid, subchannel: u16, channel: u32) -> Vec<u8> {
    assert!((1..=MAX_CHANNEL_ID).contains(&channel));
    message(1)
        .guid(interface)
        .guid(instance)
        .fill(0, 16) // reserved
        .u16(0) // flags
        .u16(0) // MMIO
        .fill(0, 120)
        .u16(subchannel)
        .u16(0) // MMIO, optional
        .u32(channel)
        .u8(0xff) // no monitor
        .u8(0)
        .u16(1) // a dedicated interrupt
        .u32(0x2000 | channel)
        .done()
}

/// A word of a message.
pub(crate) fn u32_at(message: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(message[offset..offset + 4].try_into().unwrap())
}
