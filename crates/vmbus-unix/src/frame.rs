//! What goes over the socket: one frame per datagram, some with descriptors (`SCM_RIGHTS`).
//!
//! | kind | from | `a` | `b` | payload | descriptors |
//! |---|---|---|---|---|---|
//! | [`Kind::Hello`] | guest | [`RESUMABLE`], or 0 | 0 | [`Greeting`], then a [`HelloRegion`] per region | attention event, then one per region |
//! | [`Kind::Welcome`] | host | 0 | 0 | [`Greeting`] | event port |
//! | [`Kind::Welcome`] | host | [`RESUMABLE`] | 0 | [`Greeting`], then the [name](ResumeClaim::connection_id) of the connection | event port, epoch |
//! | [`Kind::Refused`] | host | [`Reason`](crate::Reason) | 0 | [`Greeting`], then text | none |
//! | [`Kind::Post`] | guest | connection id | event flag | a VMBus message | the channel's doorbell, with OPEN_CHANNEL |
//! | [`Kind::Posted`] | host | status | 0 | none | none |
//! | [`Kind::Message`] | host | VP | SINT | a VMBus message | none |
//! | [`Kind::Listening`] | host | connection id | 0 | none | what signals it |
//! | [`Kind::Resume`] | guest | 0 | doorbells that follow | [`Greeting`], [`ResumeClaim`], then a [`HelloRegion`] per region | attention event, then one per region |
//! | [`Kind::Doorbells`] | guest | 0 | 0 | an event flag (4 bytes) for each | as many as there are flags |
//! | [`Kind::Resumed`] | host | 0 | 0 | [`Greeting`], then the [posts](ResumeClaim::posts) taken (8 bytes) | event port, epoch |
//!
//! `Hello`, `Resume` and their answers keep the form given here in every version of the transport, as far
//! as the [`Greeting`]: so two ends of different versions can say so.
//!
//! All numbers are little-endian. Source: this crate.

use vmbus_wire::guid::Guid;
use vmbus_wire::message::MAX_MESSAGE_SIZE;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::error::FrameError;

/// The version of what this module describes. Both ends must have the same.
pub const TRANSPORT_VERSION: u32 = 1;

/// Begins every [`Greeting`].
pub const MAGIC: [u8; 8] = *b"vmbus/ux";

/// Most regions that a guest's memory may consist of. Their descriptors travel in one datagram, in
/// which Linux allows 253.
pub const MAX_HELLO_REGIONS: usize = 64;

/// Most bytes of text in a refusal.
pub const MAX_REASON_TEXT: usize = 200;

/// In `Hello`: the guest would go on with another process that serves, see [`crate::resume`]. In
/// `Welcome`: the host can be saved, and lets it.
pub const RESUMABLE: u32 = 1;

/// Most doorbells in one frame.
pub const MAX_DOORBELLS_PER_FRAME: usize = MAX_HELLO_REGIONS;

/// Most descriptors in one frame.
pub(crate) const MAX_DESCRIPTORS: usize = 1 + MAX_HELLO_REGIONS;

/// The start of every frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct FrameHeader {
    /// [`Kind`].
    pub kind: U32,
    /// Bytes of the payload, which fills the rest of the datagram.
    pub payload_len: U32,
    /// Depends on the kind.
    pub a: U32,
    /// Depends on the kind.
    pub b: U32,
}

/// What both ends show first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct Greeting {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`TRANSPORT_VERSION`].
    pub transport_version: U32,
    /// In `Hello`, the number of regions; otherwise 0.
    pub regions: U32,
}

/// A region of the guest's memory. Addresses, lengths and offsets are bytes, whole pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct HelloRegion {
    /// Guest physical address.
    pub gpa: U64,
    /// Length.
    pub len: U64,
    /// Where in the descriptor's file it starts.
    pub fd_offset: U64,
}

/// What a guest says of the connection that it wants to go on with: which one it is, and how far it
/// has come. Any numbers may come; the host holds them against its saved state.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct ResumeClaim {
    /// What the host has named the connection when it began. Chosen at random: nothing else has that
    /// name.
    pub connection_id: Guid,
    /// What stands in the file that the host has given along with the name.
    pub epoch: U64,
    /// Messages that the guest has posted, the last one perhaps not yet answered.
    pub posts: U64,
    /// Answers that it has got: as many, or one less.
    pub answers: U64,
    /// Messages of the host that it has taken.
    pub messages: U64,
}

/// Bytes of the header.
pub(crate) const HEADER_SIZE: usize = size_of::<FrameHeader>();

const HELLO_SIZE: usize = size_of::<Greeting>() + MAX_HELLO_REGIONS * size_of::<HelloRegion>();

const RESUME_SIZE: usize = HELLO_SIZE + size_of::<ResumeClaim>();

/// Bytes of the longest frame.
pub(crate) const MAX_FRAME_SIZE: usize = HEADER_SIZE + RESUME_SIZE;

const _: () = {
    assert!(size_of::<FrameHeader>() == 16);
    assert!(size_of::<Greeting>() == 16);
    assert!(size_of::<HelloRegion>() == 24);
    assert!(size_of::<ResumeClaim>() == 48);
    assert!(4 * MAX_DOORBELLS_PER_FRAME <= HELLO_SIZE);
    assert!(MAX_DOORBELLS_PER_FRAME <= MAX_DESCRIPTORS);
    assert!(MAX_MESSAGE_SIZE <= HELLO_SIZE);
    assert!(size_of::<Greeting>() + MAX_REASON_TEXT <= HELLO_SIZE);
};

impl Greeting {
    /// Ours.
    pub(crate) fn new(regions: usize) -> Self {
        Self {
            magic: MAGIC,
            transport_version: TRANSPORT_VERSION.into(),
            regions: u32::try_from(regions).unwrap_or(u32::MAX).into(),
        }
    }
}

/// What a frame is for.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Kind {
    /// The guest introduces itself, and donates its memory.
    Hello = 1,
    /// The host has taken the guest.
    Welcome = 2,
    /// The host has not, or wants no more of it. The last frame.
    Refused = 3,
    /// The guest posts a message (HvPostMessage).
    Post = 4,
    /// The host answers a post.
    Posted = 5,
    /// The host puts a message into a slot.
    Message = 6,
    /// The host listens for signals to a connection.
    Listening = 7,
    /// The guest wants to go on with a connection whose host is gone.
    Resume = 8,
    /// What the host rings for the guest's channels; after [`Kind::Resume`].
    Doorbells = 9,
    /// The host goes on with the connection.
    Resumed = 10,
}

impl Kind {
    /// The kind of this number.
    #[must_use]
    pub const fn from_wire(value: u32) -> Option<Self> {
        Some(match value {
            1 => Self::Hello,
            2 => Self::Welcome,
            3 => Self::Refused,
            4 => Self::Post,
            5 => Self::Posted,
            6 => Self::Message,
            7 => Self::Listening,
            8 => Self::Resume,
            9 => Self::Doorbells,
            10 => Self::Resumed,
            _ => return None,
        })
    }
}

/// A frame as bytes, on its way out.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    /// A frame whose payload is `parts`, one after the other.
    pub(crate) fn new(kind: Kind, a: u32, b: u32, parts: &[&[u8]]) -> Self {
        let payload_len = parts.iter().map(|part| part.len()).sum::<usize>();
        let header = FrameHeader {
            kind: (kind as u32).into(),
            payload_len: u32::try_from(payload_len).unwrap_or(u32::MAX).into(), // at most a frame
            a: a.into(),
            b: b.into(),
        };
        let mut bytes = Vec::with_capacity(HEADER_SIZE + payload_len);
        bytes.extend_from_slice(header.as_bytes());
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        debug_assert!(bytes.len() <= MAX_FRAME_SIZE, "frame too long: our fault");
        Self { bytes }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// A frame that came, checked as far as all frames are alike.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct FrameRef<'a> {
    pub(crate) kind: Kind,
    pub(crate) a: u32,
    pub(crate) b: u32,
    pub(crate) payload: &'a [u8],
}

impl<'a> FrameRef<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let short = FrameError::TooShort { len: bytes.len() };
        let (header, payload) = FrameHeader::read_from_prefix(bytes).map_err(|_| short)?;
        let kind = header.kind.get();
        let kind = Kind::from_wire(kind).ok_or(FrameError::Kind { kind })?;
        let claimed = header.payload_len.get();
        if usize::try_from(claimed) != Ok(payload.len()) {
            return Err(FrameError::Length { kind, claimed, got: payload.len() });
        }
        Ok(Self { kind, a: header.a.get(), b: header.b.get(), payload })
    }

    /// The greeting that this frame begins its payload with, and what follows it.
    pub(crate) fn greeting(&self) -> Result<(Greeting, &'a [u8]), FrameError> {
        let len = self.payload.len();
        let short = FrameError::PayloadTooShort { kind: self.kind, len };
        let (greeting, rest) = Greeting::read_from_prefix(self.payload).map_err(|_| short)?;
        if greeting.magic != MAGIC {
            return Err(FrameError::Magic { magic: greeting.magic });
        }
        Ok((greeting, rest))
    }

    /// The VMBus message in the payload.
    pub(crate) fn message(&self) -> Result<&'a [u8], FrameError> {
        let len = self.payload.len();
        if len > MAX_MESSAGE_SIZE {
            return Err(FrameError::MessageTooLong { len });
        }
        Ok(self.payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_its_header_and_its_payload() {
        let frame = Frame::new(Kind::Post, 0x00ab_cdef, 7, &[b"one", b"", b"two"]);
        assert_eq!(
            frame.as_bytes(),
            b"\x04\0\0\0\x06\0\0\0\xef\xcd\xab\0\x07\0\0\0onetwo".as_slice()
        );
        let parsed = FrameRef::parse(frame.as_bytes()).unwrap();
        assert_eq!((parsed.kind, parsed.a, parsed.b), (Kind::Post, 0x00ab_cdef, 7));
        assert_eq!(parsed.payload, b"onetwo");
    }

    #[test]
    fn every_kind_reads_back() {
        for number in 0..16 {
            if let Some(kind) = Kind::from_wire(number) {
                assert_eq!(kind as u32, number);
            }
        }
        assert_eq!((1..=10).filter_map(Kind::from_wire).count(), 10);
    }

    #[test]
    fn nonsense_has_an_error_with_its_numbers() {
        let good = Frame::new(Kind::Posted, 0, 0, &[b"abc"]);
        let mut unknown = good.clone();
        unknown.bytes[0] = 99;
        let mut long = good.clone();
        long.bytes[4] = 4;
        let mut huge = good.clone();
        huge.bytes[4..8].fill(0xff);
        let kind = Kind::Posted;
        let table = [
            (vec![], FrameError::TooShort { len: 0 }),
            (good.bytes[..15].to_vec(), FrameError::TooShort { len: 15 }),
            (good.bytes[..18].to_vec(), FrameError::Length { kind, claimed: 3, got: 2 }),
            (long.bytes, FrameError::Length { kind, claimed: 4, got: 3 }),
            (huge.bytes, FrameError::Length { kind, claimed: u32::MAX, got: 3 }),
            (unknown.bytes, FrameError::Kind { kind: 99 }),
        ];
        for (bytes, expected) in table {
            assert_eq!(FrameRef::parse(&bytes), Err(expected), "{bytes:?}");
        }
    }

    #[test]
    fn a_greeting_is_known_by_its_magic() {
        let frame = Frame::new(Kind::Hello, 0, 0, &[Greeting::new(2).as_bytes(), b"rest"]);
        let (greeting, rest) = FrameRef::parse(frame.as_bytes()).unwrap().greeting().unwrap();
        assert_eq!((greeting.transport_version.get(), greeting.regions.get()), (1, 2));
        assert_eq!(rest, b"rest");
        let other = Frame::new(Kind::Hello, 0, 0, &[b"GET / HT", &[0; 8]]);
        let error = FrameRef::parse(other.as_bytes()).unwrap().greeting();
        assert_eq!(error, Err(FrameError::Magic { magic: *b"GET / HT" }));
        let short = Frame::new(Kind::Hello, 0, 0, &[&MAGIC]);
        let error = FrameRef::parse(short.as_bytes()).unwrap().greeting();
        assert_eq!(error, Err(FrameError::PayloadTooShort { kind: Kind::Hello, len: 8 }));
    }

    #[test]
    fn a_message_has_its_bound() {
        for (len, fits) in [(0, true), (240, true), (241, false)] {
            let frame = Frame::new(Kind::Message, 0, 2, &[&vec![0; len]]);
            let parsed = FrameRef::parse(frame.as_bytes()).unwrap();
            assert_eq!(parsed.message().is_ok(), fits, "{len}");
        }
    }
}
