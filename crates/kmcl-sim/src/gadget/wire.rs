//! The messages between the second device and its driver.

use kmcl::Guid;
use vmbus_wire::guid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The type of the channel.
pub(crate) const INTERFACE: Guid = guid::Guid::from_u128(0x6761_6467_6574_0000_0000_0000_0000_0001);

/// The one instance of it.
pub(crate) const INSTANCE: Guid = guid::Guid::from_u128(0x6761_6467_6574_0000_0000_0000_0000_0002);

/// Guest to device: does something once, and counts it in the GPADL.
pub(crate) const WORK: u32 = 1;
/// Guest to device: as `WORK`, and no completion is wanted.
pub(crate) const NOTE: u32 = 2;
/// Guest to device: maps the GPADL whose handle is the argument.
pub(crate) const MAP: u32 = 3;
/// Guest to device: unmaps it.
pub(crate) const UNMAP: u32 = 4;
/// Device to guest.
pub(crate) const EVENT: u32 = 5;

/// Bytes of the longest message.
pub(crate) const MAX_BYTES: u32 = 600;

/// Pages of the driver's GPADL.
pub(crate) const GPADL_PAGES: u32 = 2;

/// Counters in it, of 8 bytes each: work number n counts in counter n modulo this.
pub(crate) const COUNTERS: u64 = 512;

/// How the device goes about a `WORK`.
pub(crate) mod manner {
    /// At once, by a thread that may sleep. 0 is at once, by any.
    pub(crate) const PASSIVE: u32 = 1;
    /// Later.
    pub(crate) const LATER: u32 = 2;
    /// Now, and completed later.
    pub(crate) const COMPLETED_LATER: u32 = 3;
    /// Much later.
    pub(crate) const LONG: u32 = 4;
    /// How many there are.
    pub(crate) const COUNT: u64 = 5;
}

/// Any message.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, PartialEq)]
pub(crate) struct Message {
    pub(crate) kind: U32,
    pub(crate) manner: U32,
    /// Counts the sender's messages from 1.
    pub(crate) number: U64,
    pub(crate) argument: U64,
}

/// Any completion.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, FromBytes, Immutable, IntoBytes, KnownLayout, PartialEq)]
pub(crate) struct Answer {
    /// That of the message.
    pub(crate) number: U64,
    /// What follows from it: [`expected`], where nothing went wrong.
    pub(crate) value: U64,
}

/// The value that goes with a number.
pub(crate) const fn expected(number: u64) -> u64 {
    number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5a5a
}

impl Message {
    pub(crate) fn new(kind: u32, manner: u32, number: u64, argument: u64) -> Self {
        Self {
            kind: kind.into(),
            manner: manner.into(),
            number: number.into(),
            argument: argument.into(),
        }
    }

    /// Its bytes, and more, so that the rings fill: how many follows from its number, and so does each.
    pub(crate) fn padded(&self) -> Vec<u8> {
        let number = self.number.get();
        let mut bytes = self.as_bytes().to_vec();
        let padding = expected(number).to_le_bytes();
        let len = usize::try_from(number * 104 % 570).unwrap_or(0);
        bytes.extend(padding.iter().cycle().take(len));
        bytes
    }

    /// The message in a payload, if it is whole.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        let (message, _) = Self::read_from_prefix(payload).ok()?;
        let whole = message.padded();
        // The ring pads to 8 bytes.
        (payload.get(..whole.len()) == Some(&whole[..])).then_some(message)
    }
}

impl Answer {
    pub(crate) fn to(number: u64) -> Self {
        Self { number: number.into(), value: expected(number).into() }
    }

    /// The number, if the answer is whole.
    pub(crate) fn parse(payload: &[u8]) -> Option<u64> {
        let (answer, _) = Self::read_from_prefix(payload).ok()?;
        let number = answer.number.get();
        (answer.value.get() == expected(number)).then_some(number)
    }
}
