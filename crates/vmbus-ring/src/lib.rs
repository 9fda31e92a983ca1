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

//! # Example
//!
//! Both ends in one thread; the second of two packets finds the reader awake.
//!
//! ```
//! use vmbus_memory::{GuestMemory, MappingBudget, RingPages};
//! use vmbus_ring::{OutgoingPacket, RingReader, RingWriter, initialize};
//! use vmbus_wire::packet::PacketKind;
//!
//! let memory = GuestMemory::memfd(16 * 4096)?;
//! let budget = MappingBudget::default();
//! // Page 3 is the control page; the data are pages 5 and 4, in this order.
//! let pages = || RingPages::map(&memory, &[3, 5, 4], &budget);
//! initialize(&pages()?);
//! let (mut writer, mut reader) = (RingWriter::new(pages()?)?, RingReader::new(pages()?)?);
//!
//! assert!(!reader.unmask_and_check()?); // nothing there: the reader may sleep
//! for (id, payload) in [(1, b"hello"), (2, b"world")] {
//!     writer.push(&OutgoingPacket {
//!         kind: PacketKind::InBand,
//!         wants_completion: false,
//!         transaction_id: id,
//!         extension: &[],
//!         payload: &[payload],
//!     })?;
//!     assert_eq!(writer.publish(), id == 1); // only the first packet needs a signal
//! }
//!
//! reader.mask(); // awake
//! let mut received = Vec::new();
//! while let Some(packet) = reader.peek()? {
//!     let mut payload = [0; 8]; // padded to a multiple of 8
//!     packet.copy_payload(&mut payload);
//!     received.push((packet.transaction_id, payload));
//!     reader.advance();
//! }
//! assert!(!reader.publish()); // the writer waits for no space
//! assert_eq!(received, [(1, *b"hello\0\0\0"), (2, *b"world\0\0\0")]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
