//! The private copy of an incoming packet, and the pool that these come from.
//!
//! Everything a packet needs is allocated when the channel opens. Two things are allocated later, and
//! kept until the channel closes, so that a channel at work allocates nothing: room for a payload
//! above [`INLINE_PAYLOAD`] bytes, since few channels carry such, and none of them in every packet.

use std::ops::Range;
use std::sync::Arc;

use vmbus_memory::GuestMemory;
use vmbus_wire::packet::ExtensionError;
use vmbus_wire::packet::extension::gpa_direct;
use vmbus_wire::ranges::GpaRanges;

use crate::bus::Residency;
use crate::external::outside;
use crate::incoming::Level;
use crate::settings::Settings;

/// Payload bytes for which each pooled packet has room from the start.
pub(crate) const INLINE_PAYLOAD: u32 = 1024;

/// External data of a packet, as far as it is known before a device asks for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum External {
    /// The packet has none.
    None,
    /// Checked ranges: the first `words` words of the extension, behind its first.
    Ranges { words: usize, range_count: u32, total_bytes: u64 },
    /// More than the channel was set up for, in bytes; not copied (D-40).
    TooMuch { bytes: u64 },
    /// Pages that are not RAM.
    NotMemory { gpa: u64, len: u64 },
}

/// See the module. Boxed, because it travels from pool to receiver to device and back.
pub(crate) struct Body {
    /// Its number in the order of delivery, on this channel since it opened.
    pub(crate) order: u64,
    /// The opening of the channel that it belongs to.
    pub(crate) opening: u64,
    pub(crate) transaction_id: u64,
    pub(crate) wants_completion: bool,
    /// What the thread that delivers it may do.
    pub(crate) level: Level,
    pub(crate) external: External,
    /// Where the message is within the payload buffer: a pipe's header comes before it.
    start: usize,
    end: usize,
    payload: Vec<u8>,
    extension: Box<[u64]>,
    /// Words of the present packet's extension.
    extension_words: usize,
    /// Most bytes of a completion.
    completion_limit: usize,
    /// Most bytes of external data.
    external_limit: u32,
    context: Box<[u8]>,
    /// What the ranges name. In every body, so that looking at external data takes no lock.
    memory: GuestMemory,
    residency: Option<Arc<dyn Residency>>,
}

impl Body {
    fn new(
        settings: &Settings,
        memory: &GuestMemory,
        residency: Option<&Arc<dyn Residency>>,
    ) -> Self {
        // A completion is kept in the same place.
        let payload = settings.maximum_packet_size.max(settings.completion_size());
        let payload = payload.min(INLINE_PAYLOAD).next_multiple_of(8);
        Self {
            order: 0,
            opening: 0,
            transaction_id: 0,
            wants_completion: false,
            level: Level::Dispatch,
            external: External::None,
            start: 0,
            end: 0,
            payload: vec![0; payload as usize],
            extension: vec![0; 1 + settings.external_words()].into(),
            extension_words: 0,
            completion_limit: settings.completion_size() as usize,
            external_limit: settings.external_data_size,
            context: vec![0; settings.client_context_size as usize].into(),
            memory: memory.clone(),
            residency: residency.cloned(),
        }
    }

    /// Makes the body that of a new packet and returns room for its payload of `len` bytes.
    pub(crate) fn begin(
        &mut self,
        transaction_id: u64,
        wants_completion: bool,
        len: usize,
    ) -> &mut [u8] {
        self.transaction_id = transaction_id;
        self.wants_completion = wants_completion;
        self.external = External::None;
        self.extension_words = 0;
        self.start = 0;
        self.end = len;
        if !self.context.is_empty() {
            self.context.fill(0);
        }
        if self.payload.len() < len {
            self.payload.resize(len, 0);
        }
        self.payload.get_mut(..len).unwrap_or_default()
    }

    /// Room for an extension of `words` words, or `None` if it is more than was asked for.
    pub(crate) fn extension_room(&mut self, words: usize) -> Option<&mut [u64]> {
        self.extension.get_mut(..words)
    }

    /// Checks the extension just copied: the description of external data. Later looks at it
    /// ([`Self::ranges`]) cannot fail any more.
    #[inline]
    pub(crate) fn check_external(&mut self, words: usize) -> Result<(), ExtensionError> {
        let extension = self.extension.get(..words).unwrap_or_default();
        let ranges = gpa_direct(extension)?;
        self.extension_words = words;
        let bytes = ranges.total_bytes();
        self.external = if bytes > u64::from(self.external_limit) {
            External::TooMuch { bytes }
        } else {
            match outside(&self.memory, ranges) {
                None => External::Ranges {
                    words: ranges.words().len(),
                    range_count: ranges.range_count(),
                    total_bytes: bytes,
                },
                Some((gpa, len)) => External::NotMemory { gpa, len },
            }
        };
        Ok(())
    }

    /// The ranges of the external data, if there are any within bounds.
    #[inline]
    pub(crate) fn ranges(&self) -> Option<GpaRanges<'_>> {
        let External::Ranges { words, range_count, total_bytes } = self.external else {
            return None;
        };
        let (_header, extension) = self.extension.split_first()?;
        Some(GpaRanges::from_checked(extension.get(..words)?, range_count, total_bytes))
    }

    /// Keeps a completion's payload where the packet's was, which is over; `false` where it does not
    /// fit there, or is more than room in the ring was promised for.
    #[inline]
    pub(crate) fn keep_completion(&mut self, payload: &[u8]) -> bool {
        if payload.len() > self.completion_limit {
            return false;
        }
        let Some(room) = self.payload.get_mut(..payload.len()) else { return false };
        room.copy_from_slice(payload);
        self.start = 0;
        self.end = payload.len();
        true
    }

    /// Makes a part of the payload the completion: that, or nothing.
    #[inline]
    pub(crate) fn keep_part(&mut self, part: Range<usize>) {
        let len = self.end - self.start;
        let part = if part.start <= part.end && part.end <= len { part } else { 0..0 };
        let end = part.end.min(part.start + self.completion_limit);
        debug_assert_eq!(end, part.end, "completion too large");
        self.end = self.start + end;
        self.start += part.start;
    }

    /// As [`Self::keep_completion`], with more room where that takes it: the packet may wait for long.
    pub(crate) fn hold_completion(&mut self, payload: &[u8]) {
        if self.payload.len() < payload.len() {
            self.payload.resize(payload.len(), 0);
        }
        if let Some(room) = self.payload.get_mut(..payload.len()) {
            room.copy_from_slice(payload);
        }
        self.start = 0;
        self.end = payload.len();
    }

    /// The extension of the present packet as the ring had it; empty without external data, or where
    /// that is too much to be kept.
    pub(crate) fn extension(&self) -> &[u64] {
        self.extension.get(..self.extension_words).unwrap_or_default()
    }

    #[inline]
    pub(crate) fn payload(&self) -> &[u8] {
        self.payload.get(self.start..self.end).unwrap_or_default()
    }

    /// Narrows the payload to the message behind a pipe's header.
    pub(crate) fn narrow(&mut self, start: usize, len: usize) {
        self.start = start;
        self.end = start + len;
    }

    #[inline]
    pub(crate) fn completion_limit(&self) -> usize {
        self.completion_limit
    }

    pub(crate) fn external_limit(&self) -> u32 {
        self.external_limit
    }

    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    #[inline]
    pub(crate) fn residency(&self) -> Option<&dyn Residency> {
        self.residency.as_deref()
    }

    pub(crate) fn context(&mut self) -> &mut [u8] {
        &mut self.context
    }

    pub(crate) fn saved_context(&self) -> &[u8] {
        &self.context
    }
}

/// A full pool for a channel that opens.
#[expect(
    clippy::vec_box,
    reason = "bodies move between owners all the time; a box moves as a word"
)]
pub(crate) fn fill(
    settings: &Settings,
    memory: &GuestMemory,
    residency: Option<&Arc<dyn Residency>>,
) -> Vec<Box<Body>> {
    let body = |_| Box::new(Body::new(settings, memory, residency));
    (0..settings.maximum_packet_count).map(body).collect()
}
