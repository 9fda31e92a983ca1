//! GPADLs: what the guest remembers of them, and how page lists become messages.

use kmcl::bus::{GpadlPages, PageRange};
use vmbus_wire::message::GpadlMessages;
use vmbus_wire::message::gpadl::MAX_GPADL_WORDS;
use vmbus_wire::ranges::{GpaRange, GpaRanges, RANGE_HEADER_WORDS};

use crate::error::RequestError;

/// Pages in a GPADL of one range.
pub const MAX_GPADL_PAGES: usize = MAX_GPADL_WORDS - RANGE_HEADER_WORDS;

/// GPADLs of one guest.
pub const MAX_GPADLS: usize = 8192;

/// GPADLs of one client endpoint that the host has not answered for yet.
pub const MAX_GPADLS_IN_PROGRESS: usize = 32;

/// Handles count up from here, as those of other guests do, so that a trace is easy to read.
pub(crate) const FIRST_GPADL: u32 = 0x000e_1e10;

/// A GPADL's record.
#[derive(Debug)]
pub(crate) struct Gpadl {
    pub(crate) channel: u32,
    pub(crate) owner: Owner,
    pub(crate) state: State,
}

/// Whose pages a GPADL describes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Owner {
    /// The channel's ring.
    Ring,
    /// A buffer of the client's.
    Client,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum State {
    /// The host has not answered. If `unwanted`, it is torn down as soon as it has.
    Creating { unwanted: bool, tell_torn_down: bool },
    /// The host has it.
    Created,
    /// GPADL_TEARDOWN is sent.
    TearingDown { tell_torn_down: bool },
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Creating { .. } => "being created",
            Self::Created => "created",
            Self::TearingDown { .. } => "being torn down",
        }
    }
}

/// The words that describe `pages`. There are at most [`MAX_GPADL_WORDS`].
pub(crate) fn words(pages: &GpadlPages) -> Result<Vec<u64>, RequestError> {
    let ranges = pages.ranges.len();
    let total = pages
        .ranges
        .iter()
        .fold(0usize, |sum, range| sum.saturating_add(RANGE_HEADER_WORDS + range.pfns.len()));
    if ranges == 0 || total > MAX_GPADL_WORDS {
        return Err(RequestError::GpadlSize { ranges, words: total });
    }
    let mut words = Vec::with_capacity(total);
    for (index, PageRange { byte_count, byte_offset, pfns }) in pages.ranges.iter().enumerate() {
        let range = GpaRange { byte_count: *byte_count, byte_offset: *byte_offset, pfns };
        if range.check().is_err() {
            return Err(RequestError::Range {
                range: index,
                byte_count: *byte_count,
                byte_offset: *byte_offset,
                pages: pfns.len(),
            });
        }
        words.push(range.header_word());
        words.extend_from_slice(pfns);
    }
    Ok(words)
}

/// The messages that describe `words`, which [`words`] has made of `ranges` ranges.
pub(crate) fn messages(
    channel_id: u32,
    gpadl_id: u32,
    words: &[u64],
    ranges: usize,
) -> Result<GpadlMessages<'_>, RequestError> {
    let size = RequestError::GpadlSize { ranges, words: words.len() };
    let count = u32::try_from(ranges).map_err(|_| size)?;
    let ranges = GpaRanges::parse(words, count).map_err(|_| size)?;
    GpadlMessages::new(channel_id, gpadl_id, ranges).map_err(|_| size)
}
