//! A message as bytes, on its way out or in.

use core::fmt;
use core::ops::Deref;

use zerocopy::little_endian::U64;
use zerocopy::{Immutable, IntoBytes};

use super::{HEADER_SIZE, MAX_MESSAGE_SIZE, MessageError, MessageHeader, MessageType};

/// A message of at most [`MAX_MESSAGE_SIZE`] bytes, stored in place. Derefs to its bytes.
#[derive(Clone)]
pub struct MessageBuffer {
    bytes: [u8; MAX_MESSAGE_SIZE], // zero behind the message
    len: usize,                    // at most MAX_MESSAGE_SIZE
}

impl MessageBuffer {
    /// A message of no bytes.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: [0; MAX_MESSAGE_SIZE], len: 0 }
    }

    /// A copy of a message.
    ///
    /// # Errors
    /// [`MessageError::TooLong`].
    pub fn copy_from(message: &[u8]) -> Result<Self, MessageError> {
        if message.len() > MAX_MESSAGE_SIZE {
            return Err(MessageError::TooLong { len: message.len() });
        }
        let mut buffer = Self::new();
        buffer.push(message);
        Ok(buffer)
    }

    /// Bytes of the message.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "at most 240")]
    pub const fn size(&self) -> u8 {
        self.len as u8
    }

    /// The message and zeroes behind it.
    #[must_use]
    pub const fn padded(&self) -> [u8; MAX_MESSAGE_SIZE] {
        self.bytes
    }

    /// Forgets what there is and begins a message of this type.
    pub(super) fn begin(&mut self, message: MessageType) {
        *self = Self::new();
        let header = MessageHeader { message_type: message.to_wire().into(), padding: 0.into() };
        self.push(header.as_bytes());
    }

    /// Replaces what there is by the message of this type and body.
    pub(super) fn put<Body: IntoBytes + Immutable>(&mut self, message: MessageType, body: &Body) {
        const { assert!(HEADER_SIZE + size_of::<Body>() <= MAX_MESSAGE_SIZE) };
        self.begin(message);
        self.push(body.as_bytes());
    }

    /// Appends words; the caller has made sure that they fit.
    pub(super) fn push_words(&mut self, words: impl Iterator<Item = u64>) {
        for word in words {
            self.push(U64::new(word).as_bytes());
        }
    }

    /// Appends bytes; the caller has made sure that they fit.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let end = self.len + bytes.len();
        debug_assert!(end <= MAX_MESSAGE_SIZE, "a message of {end} bytes: our fault");
        if let Some(room) = self.bytes.get_mut(self.len..end) {
            room.copy_from_slice(bytes);
            self.len = end;
        }
    }
}

impl Default for MessageBuffer {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for MessageBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl AsRef<[u8]> for MessageBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl PartialEq for MessageBuffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for MessageBuffer {}

impl fmt::Debug for MessageBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MessageBuffer").field(&&**self).finish()
    }
}
