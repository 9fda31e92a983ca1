//! A VMBus ring's reader and writer: batches, index protocols, when to signal.
//!
//! A ring lies in memory that an untrusted peer writes at the same time. Both ends keep the index
//! they own privately and treat the other's as a claim, checked at every read; a packet's
//! descriptor is copied once and checked before anything is believed.
//!
//! Both ends work in batches. [`RingWriter::push`] and [`RingReader::advance`] are private to this
//! side until `publish` shows the whole batch with one index store and says whether the peer must
//! be signalled, at most once per batch.
//!
//! # When to signal
//!
//! A signal is a hint: whoever gets one checks both rings. It may be given without need, never
//! withheld. Two protocols decide (vmbus-wire section 4, "Signalling"):
//!
//! | who waits | for | says so by | the other side signals when |
//! |---|---|---|---|
//! | reader | a packet | clearing `interrupt_mask`: [`RingReader::unmask_and_check`] | it publishes into an empty ring: [`RingWriter::publish`] |
//! | writer | space | setting `pending_send_size`: [`RingWriter::request_space`] | free space crosses that size: [`RingReader::publish`] |
//!
//! In both, each side stores one word and then loads the other's: [`WriteEnd`] and [`ReadEnd`] say
//! at each fence what both sides do. They are generic over the control words, so that the loom
//! models in `tests/loom.rs` run this code and no imitation of it.

#![forbid(unsafe_code)]

mod error;
mod index;
mod reader;
mod words;
mod writer;

pub use error::{Index, RingError};
pub use index::{ReadEnd, WriteEnd};
pub use reader::{RingPacket, RingReader};
pub use words::{ControlWords, Word, initialize};
pub use writer::{OutgoingPacket, PushError, RingWriter, packet_ring_bytes};
