//! Descriptions of guest memory ("GPA descriptor lists"): messages 8 to 12.
//!
//! A GPADL is a list of ranges (see [`crate::ranges`]) of up to 8191 words, which one message rarely
//! holds: GPADL_HEADER carries the first of its words, GPADL_BODY messages the rest, in order.
//!
//! Whoever receives one takes [`GpadlHeader::word_count`] for what is to come, collects words up to
//! that number from the header and its bodies, and has [`GpaRanges::parse`] check the whole. The parse
//! of the messages themselves does not look at the ranges, so that a host can answer a malformed
//! description with GPADL_CREATED and a failure instead of leaving the guest without an answer.
//! Whoever sends one iterates over [`GpadlMessages`].

use core::iter::FusedIterator;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{HEADER_SIZE, MAX_MESSAGE_SIZE, MessageBuffer, MessageError, MessageType, read};
use crate::ranges::GpaRanges;
use crate::status::NtStatus;

/// Most words in one GPADL_HEADER: a range's header and 26 PFNs.
pub const MAX_HEADER_WORDS: usize =
    (MAX_MESSAGE_SIZE - HEADER_SIZE - size_of::<GpadlHeaderFields>()) / 8;

/// Most words in one GPADL_BODY.
pub const MAX_BODY_WORDS: usize =
    (MAX_MESSAGE_SIZE - HEADER_SIZE - size_of::<GpadlBodyFields>()) / 8;

/// Most words in one GPADL: what the 16-bit length in its header can say.
pub const MAX_GPADL_WORDS: usize = u16::MAX as usize / 8;

const _: () = assert!(MAX_HEADER_WORDS == 27 && MAX_BODY_WORDS == 28 && MAX_GPADL_WORDS == 8191);

/// What GPADL_HEADER carries in front of its words.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct GpadlHeaderFields {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: chosen by the guest, unique among its living GPADLs.
    pub gpadl_id: U32,
    /// At 16: bytes of all ranges, their headers included, over all messages.
    pub range_buflen: U16,
    /// At 18: number of ranges.
    pub range_count: U16,
}

/// What GPADL_BODY carries in front of its words.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct GpadlBodyFields {
    /// At 8: the number of the message. Guests leave it 0; ignored.
    pub message_number: U32,
    /// At 12: the GPADL that goes on.
    pub gpadl_id: U32,
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<GpadlHeaderFields>() == 20);
    assert!(HEADER_SIZE + size_of::<GpadlBodyFields>() == 16);
};

/// 8 GPADL_HEADER, 20 bytes and up to 27 words: a description begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GpadlHeader<'a> {
    /// What precedes the words.
    pub fields: GpadlHeaderFields,
    words: &'a [U64], // at most MAX_HEADER_WORDS
}

impl<'a> GpadlHeader<'a> {
    /// A header with these words; no rule of ranges is checked.
    ///
    /// # Errors
    /// [`GpadlError::TooManyWords`] for more than [`MAX_HEADER_WORDS`].
    pub const fn new(fields: GpadlHeaderFields, words: &'a [U64]) -> Result<Self, GpadlError> {
        if words.len() > MAX_HEADER_WORDS {
            return Err(GpadlError::TooManyWords { words: words.len(), most: MAX_HEADER_WORDS });
        }
        Ok(Self { fields, words })
    }

    /// The words of the description that this message holds, at most those that `range_buflen` speaks
    /// of: what follows them is padding.
    #[must_use]
    pub const fn words(&self) -> &'a [U64] {
        self.words
    }

    /// Number of words of the whole description, this message's included.
    ///
    /// # Errors
    /// [`GpadlError`] where the number of bytes is not one of words, or cannot hold the ranges.
    pub fn word_count(&self) -> Result<usize, GpadlError> {
        let range_buflen = self.fields.range_buflen.get();
        let range_count = self.fields.range_count.get();
        if range_count == 0 {
            return Err(GpadlError::NoRanges);
        }
        if !range_buflen.is_multiple_of(8) {
            return Err(GpadlError::OddLength { range_buflen });
        }
        // A range takes two words or more: its header and a PFN.
        if u32::from(range_buflen) < u32::from(range_count) * 16 {
            return Err(GpadlError::TooShort { range_buflen, range_count });
        }
        Ok(usize::from(range_buflen) / 8)
    }

    pub(super) fn parse(body: &'a [u8]) -> Result<Self, MessageError> {
        let fields: GpadlHeaderFields = read(MessageType::GpadlHeader, body)?;
        let rest = body.get(size_of_val(&fields)..).unwrap_or_default();
        let described = usize::from(fields.range_buflen.get()) / 8;
        let words = whole_words(rest, described.min(MAX_HEADER_WORDS));
        Ok(Self { fields, words })
    }

    pub(super) fn encode(&self, buffer: &mut MessageBuffer) {
        buffer.put(MessageType::GpadlHeader, &self.fields);
        buffer.push(self.words.as_bytes());
    }
}

/// 9 GPADL_BODY, 16 bytes and up to 28 words: a description goes on. Names no channel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GpadlBody<'a> {
    /// What precedes the words.
    pub fields: GpadlBodyFields,
    words: &'a [U64], // at most MAX_BODY_WORDS
}

impl<'a> GpadlBody<'a> {
    /// A body with these words; no rule of ranges is checked.
    ///
    /// # Errors
    /// [`GpadlError::TooManyWords`] for more than [`MAX_BODY_WORDS`].
    pub const fn new(fields: GpadlBodyFields, words: &'a [U64]) -> Result<Self, GpadlError> {
        if words.len() > MAX_BODY_WORDS {
            return Err(GpadlError::TooManyWords { words: words.len(), most: MAX_BODY_WORDS });
        }
        Ok(Self { fields, words })
    }

    /// Every word of the message. Those beyond the description's
    /// [`word_count`](GpadlHeader::word_count) are padding.
    #[must_use]
    pub const fn words(&self) -> &'a [U64] {
        self.words
    }

    pub(super) fn parse(body: &'a [u8]) -> Result<Self, MessageError> {
        let fields: GpadlBodyFields = read(MessageType::GpadlBody, body)?;
        let rest = body.get(size_of_val(&fields)..).unwrap_or_default();
        Ok(Self { fields, words: whole_words(rest, MAX_BODY_WORDS) })
    }

    pub(super) fn encode(&self, buffer: &mut MessageBuffer) {
        buffer.put(MessageType::GpadlBody, &self.fields);
        buffer.push(self.words.as_bytes());
    }
}

/// As many whole words as `bytes` begin with, at most `most`. [`U64`] has no alignment: offset 20 is
/// as good as any.
fn whole_words(bytes: &[u8], most: usize) -> &[U64] {
    let count = most.min(bytes.len() / size_of::<U64>());
    match <[U64]>::ref_from_prefix_with_elems(bytes, count) {
        Ok((words, _padding)) => words,
        Err(_) => &[], // never: `count` words fit
    }
}

/// 10 GPADL_CREATED, 20 bytes: whether the host took the description. Always sent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct GpadlCreated {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: the GPADL.
    pub gpadl_id: U32,
    /// At 16: an NTSTATUS; guests take any but 0 for a failure.
    pub status: U32,
}

impl GpadlCreated {
    /// The answer for this GPADL.
    #[must_use]
    pub fn new(channel_id: u32, gpadl_id: u32, status: NtStatus) -> Self {
        Self { channel_id: channel_id.into(), gpadl_id: gpadl_id.into(), status: status.0.into() }
    }

    /// Whether the host took it.
    #[must_use]
    pub const fn nt_status(&self) -> NtStatus {
        NtStatus(self.status.get())
    }
}

/// 11 GPADL_TEARDOWN, 16 bytes: the guest wants the memory back.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct GpadlTeardown {
    /// At 8: the channel.
    pub channel_id: U32,
    /// At 12: the GPADL.
    pub gpadl_id: U32,
}

/// 12 GPADL_TORNDOWN, 12 bytes: the host has let go of the memory, and will not touch it again.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq, FromBytes, Immutable, IntoBytes, KnownLayout)]
pub struct GpadlTorndown {
    /// At 8: the GPADL.
    pub gpadl_id: U32,
}

const _: () = {
    assert!(HEADER_SIZE + size_of::<GpadlCreated>() == 20);
    assert!(HEADER_SIZE + size_of::<GpadlTeardown>() == 16);
    assert!(HEADER_SIZE + size_of::<GpadlTorndown>() == 12);
};

/// The messages that describe a list of ranges: one GPADL_HEADER, then as many GPADL_BODY as it takes.
#[derive(Clone, Debug)]
pub struct GpadlMessages<'a> {
    gpadl_id: u32,
    header: Option<GpadlHeaderFields>, // until it was given out
    words: &'a [u64],                  // not given out yet
}

impl<'a> GpadlMessages<'a> {
    /// The messages for these ranges.
    ///
    /// # Errors
    /// [`GpadlError::TooManyWords`] for more than [`MAX_GPADL_WORDS`], which is about 32 MB.
    pub fn new(channel_id: u32, gpadl_id: u32, ranges: GpaRanges<'a>) -> Result<Self, GpadlError> {
        let words = ranges.words();
        let too_many = GpadlError::TooManyWords { words: words.len(), most: MAX_GPADL_WORDS };
        let range_buflen = u16::try_from(size_of_val(words)).map_err(|_| too_many)?;
        // Fewer ranges than words.
        let range_count = u16::try_from(ranges.range_count()).map_err(|_| too_many)?;
        let header = GpadlHeaderFields {
            channel_id: channel_id.into(),
            gpadl_id: gpadl_id.into(),
            range_buflen: range_buflen.into(),
            range_count: range_count.into(),
        };
        Ok(Self { gpadl_id, header: Some(header), words })
    }

    fn take_words(&mut self, most: usize) -> impl Iterator<Item = u64> + use<'a> {
        let (now, later) = self.words.split_at_checked(most).unwrap_or((self.words, &[]));
        self.words = later;
        now.iter().copied()
    }
}

impl Iterator for GpadlMessages<'_> {
    type Item = MessageBuffer;

    fn next(&mut self) -> Option<MessageBuffer> {
        let mut buffer = MessageBuffer::new();
        if let Some(fields) = self.header.take() {
            buffer.put(MessageType::GpadlHeader, &fields);
            buffer.push_words(self.take_words(MAX_HEADER_WORDS));
        } else if self.words.is_empty() {
            return None;
        } else {
            let fields =
                GpadlBodyFields { message_number: U32::ZERO, gpadl_id: self.gpadl_id.into() };
            buffer.put(MessageType::GpadlBody, &fields);
            buffer.push_words(self.take_words(MAX_BODY_WORDS));
        }
        Some(buffer)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let in_bodies = match self.header {
            Some(_) => self.words.len().saturating_sub(MAX_HEADER_WORDS),
            None => self.words.len(),
        };
        let left = usize::from(self.header.is_some()) + in_bodies.div_ceil(MAX_BODY_WORDS);
        (left, Some(left))
    }
}

impl ExactSizeIterator for GpadlMessages<'_> {}

impl FusedIterator for GpadlMessages<'_> {}

/// Why a GPADL cannot be what its header says. The peer's doing, but for
/// [`GpadlError::TooManyWords`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GpadlError {
    /// A description of no ranges.
    #[error("a GPADL of no ranges")]
    NoRanges,
    /// The length is not a multiple of 8.
    #[error("a GPADL of {range_buflen} bytes, not a multiple of 8")]
    OddLength {
        /// Bytes of all ranges.
        range_buflen: u16,
    },
    /// The length cannot hold as many ranges.
    #[error("a GPADL of {range_count} ranges in {range_buflen} bytes, a range takes 16 or more")]
    TooShort {
        /// Bytes of all ranges.
        range_buflen: u16,
        /// Number of ranges.
        range_count: u16,
    },
    /// A description to be sent has more words than the message or the protocol can hold.
    #[error("{words} words, at most {most} fit")]
    TooManyWords {
        /// Words there are.
        words: usize,
        /// Most words that fit.
        most: usize,
    },
}
