//! How control messages travel between a guest and a hypervisor: the input of the hypercall that
//! posts one, and the slot in which one is delivered.
//!
//! Source: vmbus-wire section 1; hyperv-host sections 3 and 4.

use bitflags::bitflags;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::message::{MAX_MESSAGE_SIZE, MessageBuffer};

/// The message type, for a hypervisor, of everything that VMBus says. 0 marks an empty slot.
pub const VMBUS_MESSAGE_TYPE: u32 = 1;

/// The synthetic interrupt source that guests use for VMBus.
pub const VMBUS_SINT: u8 = 2;

/// Synthetic interrupt sources of a virtual processor.
pub const SINT_COUNT: u8 = 16;

/// Bytes of one slot of a message page, and of one source's flags in an event page.
pub const SLOT_SIZE: usize = 256;

/// Event flags per synthetic interrupt source.
pub const EVENT_FLAGS: u32 = 2048;

/// Connections to which guests post and which they signal, beside those of the offers.
pub mod connection {
    /// Control messages, all versions.
    pub const MESSAGE: u32 = 1;
    /// Signals by the interrupt page of versions before 2.4.
    pub const EVENT: u32 = 2;
    /// Monitored notifications.
    pub const MONITOR: u32 = 3;
    /// Control messages of clients that say where they want their answers: INITIATE_CONTACT from 5.0
    /// on.
    pub const MULTI_CLIENT_MESSAGE: u32 = 4;
    /// Control messages of a guest that runs in a virtual trust level of its own.
    pub const VTL2_REDIRECT_MESSAGE: u32 = 0x0080_0074;
    /// The bits of a connection id that count.
    pub const MASK: u32 = 0x00ff_ffff;
}

/// What the hypercall HvPostMessage takes: 256 bytes in guest memory, 8-byte aligned. Copied once,
/// then checked.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct PostMessageInput {
    /// At 0: where to, in the lower 24 bits; see [`connection`].
    pub connection_id: U32,
    /// At 4: zero.
    pub reserved: U32,
    /// At 8: [`VMBUS_MESSAGE_TYPE`].
    pub message_type: U32,
    /// At 12: bytes of the payload that are the message, at most 240.
    pub payload_size: U32,
    /// At 16: the message.
    pub payload: [u8; MAX_MESSAGE_SIZE],
}

impl PostMessageInput {
    /// The input that posts `message` to a connection.
    #[must_use]
    pub fn new(connection_id: u32, message: &MessageBuffer) -> Self {
        Self {
            connection_id: connection_id.into(),
            reserved: U32::ZERO,
            message_type: VMBUS_MESSAGE_TYPE.into(),
            payload_size: u32::from(message.size()).into(),
            payload: message.padded(),
        }
    }

    /// The connection that is posted to.
    #[must_use]
    pub const fn connection(&self) -> u32 {
        self.connection_id.get() & connection::MASK
    }

    /// The message, for [`GuestMessage::parse`](crate::message::GuestMessage::parse).
    ///
    /// # Errors
    /// [`SynicError`].
    pub fn message(&self) -> Result<&[u8], SynicError> {
        let message_type = self.message_type.get();
        if message_type != VMBUS_MESSAGE_TYPE {
            return Err(SynicError::MessageType { message_type });
        }
        let payload_size = self.payload_size.get();
        usize::try_from(payload_size)
            .ok()
            .and_then(|size| self.payload.get(..size))
            .ok_or(SynicError::PayloadSize { payload_size })
    }
}

/// One slot of a virtual processor's message page: 256 bytes in guest memory. Slot n is that of
/// synthetic interrupt source n. The hypervisor fills an empty slot, `message_type` last; the guest
/// empties it by storing 0 there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct MessageSlot {
    /// At 0: [`VMBUS_MESSAGE_TYPE`], or 0 in an empty slot.
    pub message_type: U32,
    /// At 4: bytes of the payload that are the message, at most 240.
    pub payload_size: u8,
    /// At 5: [`SlotFlags`].
    pub flags: u8,
    /// At 6: zero.
    pub reserved: U16,
    /// At 8: who sent it. Guests ignore it.
    pub sender: U64,
    /// At 16: the message.
    pub payload: [u8; MAX_MESSAGE_SIZE],
}

bitflags! {
    /// Flags of a message slot.
    #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
    pub struct SlotFlags: u8 {
        /// More messages wait for this slot: the guest is to say when it has emptied it.
        const MESSAGE_PENDING = 0x1;
    }
}

const _: () = {
    assert!(size_of::<PostMessageInput>() == SLOT_SIZE);
    assert!(size_of::<MessageSlot>() == SLOT_SIZE);
    assert!(EVENT_FLAGS as usize == SLOT_SIZE * 8);
    assert!(SLOT_SIZE * SINT_COUNT as usize == crate::PAGE_SIZE);
};

impl MessageSlot {
    /// A slot that holds `message`, with no further one pending.
    #[must_use]
    pub fn new(message: &MessageBuffer) -> Self {
        Self {
            message_type: VMBUS_MESSAGE_TYPE.into(),
            payload_size: message.size(),
            flags: 0,
            reserved: U16::ZERO,
            sender: U64::ZERO,
            payload: message.padded(),
        }
    }

    /// Byte offset of a source's slot in the message page, and of its flags in the event page; `None`
    /// where there is no such source.
    #[must_use]
    pub const fn offset_of(sint: u8) -> Option<usize> {
        if sint < SINT_COUNT { Some(sint as usize * SLOT_SIZE) } else { None }
    }

    /// Whether there is no message.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.message_type.get() == 0
    }

    /// The message, for [`HostMessage::parse`](crate::message::HostMessage::parse).
    ///
    /// # Errors
    /// [`SynicError`]; an empty slot has message type 0.
    pub fn message(&self) -> Result<&[u8], SynicError> {
        let message_type = self.message_type.get();
        if message_type != VMBUS_MESSAGE_TYPE {
            return Err(SynicError::MessageType { message_type });
        }
        let payload_size = u32::from(self.payload_size);
        self.payload
            .get(..usize::from(self.payload_size))
            .ok_or(SynicError::PayloadSize { payload_size })
    }
}

/// Why a posted or delivered message was refused. Always the peer's doing.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SynicError {
    /// Not a message of VMBus.
    #[error("message of type {message_type:#x}, those of VMBus have type 1")]
    MessageType {
        /// The type as found.
        message_type: u32,
    },
    /// More than a message can have.
    #[error("payload of {payload_size} bytes, the longest has {MAX_MESSAGE_SIZE}")]
    PayloadSize {
        /// The size as found.
        payload_size: u32,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// UNLOAD, as posted to connection 4.
    fn unload() -> [u8; 256] {
        let mut bytes = [0; 256];
        bytes[..20].copy_from_slice(&[4, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0]);
        bytes
    }

    #[test]
    fn a_post_has_its_layout() {
        let message = MessageBuffer::copy_from(&[16, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let input = PostMessageInput::new(connection::MULTI_CLIENT_MESSAGE, &message);
        assert_eq!(input.as_bytes(), unload());
        assert_eq!(input.message(), Ok(&*message));
    }

    #[test]
    fn only_24_bits_of_a_connection_id_count() {
        let mut bytes = unload();
        bytes[3] = 0xaa;
        let input = PostMessageInput::read_from_bytes(&bytes).unwrap();
        assert_eq!(input.connection(), connection::MULTI_CLIENT_MESSAGE);
    }

    #[test]
    fn a_slot_has_its_layout() {
        let message = MessageBuffer::copy_from(&[17, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        let mut expected = [0; 256];
        expected[..20]
            .copy_from_slice(&[1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 0]);
        let slot = MessageSlot::new(&message);
        assert_eq!(slot.as_bytes(), expected);
        assert_eq!(slot.message(), Ok(&*message));
        assert!(!slot.is_empty());
        assert_eq!(MessageSlot::offset_of(VMBUS_SINT), Some(0x200));
        assert_eq!(MessageSlot::offset_of(15), Some(0xf00));
        assert_eq!(MessageSlot::offset_of(16), None);
    }

    #[test]
    fn bad_sizes_and_types_are_refused() {
        for (at, byte, expected) in [
            (12, 240, None),
            (12, 241, Some(SynicError::PayloadSize { payload_size: 241 })),
            (15, 0x80, Some(SynicError::PayloadSize { payload_size: 0x8000_0008 })),
            (8, 0, Some(SynicError::MessageType { message_type: 0 })),
            (9, 2, Some(SynicError::MessageType { message_type: 0x201 })),
        ] {
            let mut bytes = unload();
            bytes[at] = byte;
            let input = PostMessageInput::read_from_bytes(&bytes).unwrap();
            assert_eq!(input.message().err(), expected, "byte {at} = {byte}");
        }
        for (at, byte, expected) in [
            (4, 240, None),
            (4, 241, Some(SynicError::PayloadSize { payload_size: 241 })),
            (0, 0, Some(SynicError::MessageType { message_type: 0 })),
        ] {
            let message = MessageBuffer::copy_from(&[0; 8]).unwrap();
            let mut bytes: [u8; 256] = zerocopy::transmute!(MessageSlot::new(&message));
            bytes[at] = byte;
            let slot = MessageSlot::read_from_bytes(&bytes).unwrap();
            assert_eq!(slot.message().err(), expected, "byte {at} = {byte}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in proptest::array::uniform32(any::<u64>())) {
            let post: PostMessageInput = zerocopy::transmute!(bytes);
            let slot: MessageSlot = zerocopy::transmute!(bytes);
            prop_assert!(post.message().map_or(0, <[u8]>::len) <= MAX_MESSAGE_SIZE);
            prop_assert!(slot.message().map_or(0, <[u8]>::len) <= MAX_MESSAGE_SIZE);
        }
    }
}
