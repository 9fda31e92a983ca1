//! Saved states that lie to a channel: a typed error that names the place, the channel as before, nothing
//! leaked, and memory within a stated multiple of what was given.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]
#![allow(unsafe_code, reason = "an allocator that counts has to be an allocator")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use common::keeper::{Kept, chunks, hand_over, saved};
use kmcl::{
    Channel, ChannelState, NtStatus, RESTORE_BYTES_PER_BYTE, RestoreError, Restored,
    SaveRestorePacket,
};
use proptest::prelude::*;
use saved_state::channel::{
    CHANNEL, ChannelRecord, Fence, HandedBack, INCOMING_PACKET, IncomingPacketRecord, KINDS,
    OUTGOING_PACKET, OutgoingPacketRecord, Place, Side,
};
use saved_state::end::{END, EndRecord};
use saved_state::testing::{Handmade, chunk, rechain};
use saved_state::{Encode, RecordKind};
use vmbus_wire::packet::GpaDirectHeader;

struct Counting;

thread_local! {
    /// Of this thread alone: bytes in use, and the most of them.
    static IN_USE: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn count(more: usize, less: usize) {
    let _a_thread_that_ends_has_none = IN_USE.try_with(|counts| {
        let (in_use, peak) = counts.get();
        let high = in_use.wrapping_add(more);
        counts.set((high.wrapping_sub(less), peak.max(high)));
    });
}

// SAFETY: every call goes to the system's allocator, unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps the promises that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: `ptr` came from `System`, as `alloc` shows, with the same layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Most bytes in use while `work` runs beyond those before, and those left after it.
fn memory<T>(work: impl FnOnce() -> T) -> (usize, isize, T) {
    // From 1 TiB on: what is freed that was there before does not wrap around.
    const BASE: usize = 1 << 40;
    IN_USE.set((BASE, BASE));
    let result = work();
    let (in_use, peak) = IN_USE.get();
    (peak - BASE, in_use.wrapping_sub(BASE).cast_signed(), result)
}

/// A channel with rings that are resumed and nothing restored, and a state with packets of every sort.
fn channel_and_state() -> (Kept, Vec<u8>) {
    let mut old = Kept::paused_with(small_completions);
    old.start();
    for id in 0..6 {
        old.guest().send(id, 2);
    }
    old.process();
    old.keeper.when_frozen(|packet| match packet.transaction_id() % 3 {
        0 => packet.complete(&[5; 16]),
        1 => hand_over(packet),
        _ => packet.cancelled().hand_over(&[6; 9]).unwrap(),
    });
    for pointer in 0..12 {
        common::send(&old.channel, pointer, &[4; 3000], &old.keeper.answers);
    }
    let (queued, in_flight) = old.channel.outgoing_in_use();
    assert!(queued > 0 && in_flight > 0);
    let frozen = old.channel.freeze().unwrap();
    let state = saved(frozen.channel());
    let mut next = Kept::on(&old.bus, small_completions);
    next.guest = old.guest.take();
    frozen.move_away();
    next.reopen(true);
    (next, state)
}

/// Leaves room in the ring for packets of the server's beside the promised completions.
fn small_completions(channel: &Channel) {
    channel.init_set_maximum_completion_size(64).unwrap();
}

/// The channel is as it was: nothing in use, every packet of its driver's ended as cancelled.
fn is_as_before(kept: &Kept, what: &str) {
    assert_eq!(kept.channel.state(), ChannelState::Paused, "{what}");
    assert_eq!(kept.channel.outgoing_in_use(), (0, 0), "{what}");
    assert_eq!(kept.channel.incoming_outstanding(), 0, "{what}");
    assert_eq!(kept.channel.stop_reason(), None, "{what}");
    let ended = kept.keeper.answers.take();
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED), "{what}");
    let restored = kept.keeper.take_asked().len();
    assert_eq!(ended.len(), restored, "{what}");
}

/// The channel takes the right state after all that, and everything in it ends once.
fn takes_it(mut kept: Kept, state: &[u8], what: &str) {
    assert_eq!(kept.channel.restore_from_buffer(state), Ok(Restored::Complete), "{what}");
    kept.start();
    let mut completions = Vec::new();
    let mut answered = 0;
    loop {
        kept.process();
        kept.keeper.take_held().into_iter().for_each(|packet| packet.complete(&[1; 8]));
        let read = kept.guest().read();
        if read.is_empty() {
            break;
        }
        for read in read {
            match read.kind {
                vmbus_wire::packet::PacketKind::Completion => completions.push(read.transaction_id),
                _ => {
                    answered += 1;
                    kept.guest().complete(read.transaction_id, &[]);
                }
            }
        }
    }
    completions.sort_unstable();
    assert_eq!(completions, [0, 1, 2, 3, 4, 5], "{what}");
    assert_eq!(answered, 12, "{what}");
    assert_eq!(kept.channel.outgoing_in_use(), (0, 0), "{what}");
    kept.end();
}

/// Cut after any byte: in the middle of a chunk it is damage, between two the rest may still come.
#[test]
fn a_state_may_end_anywhere() {
    let (kept, state) = channel_and_state();
    let ends: Vec<_> = chunks(&state)
        .iter()
        .scan(0, |at, chunk| {
            *at += chunk.len();
            Some(*at)
        })
        .collect();
    for len in 0..state.len() {
        let mut restore = kept.channel.restore().unwrap();
        match restore.feed(&state[..len]) {
            Ok(restored) => {
                assert_eq!(restored, Restored::More);
                assert!(len == 0 || ends.contains(&len), "{len}");
            }
            Err(error) => {
                assert!(!ends.contains(&len), "{len}: {error}");
                let text = error.to_string();
                assert!(text.contains("chunk"), "{len}: {text}");
            }
        }
        drop(restore);
        is_as_before(&kept, "cut");
    }
    takes_it(kept, &state, "cut");
}

/// Any bit flipped: found out before anything of its chunk is used.
#[test]
fn any_bit_may_be_flipped() {
    let (kept, state) = channel_and_state();
    for bit in 0..state.len() * 8 {
        // Every bit of the beginning and of one packet of each sort; a few of all others.
        if bit > 500 * 8 && bit % 37 != 0 {
            continue;
        }
        let mut spoilt = state.clone();
        spoilt[bit / 8] ^= 1 << (bit % 8);
        assert!(kept.channel.restore_from_buffer(&spoilt).is_err(), "bit {bit}");
        is_as_before(&kept, "flipped");
    }
    takes_it(kept, &state, "flipped");
}

/// What a channel's record and packets may be, in a stream whose framing is in order.
struct Made {
    channel: ChannelRecord,
    packets: Vec<(RecordKind, Vec<u8>)>,
}

fn encoded<R: Encode>(record: &R) -> Vec<u8> {
    let mut message = vec![0; record.encoded_len()];
    record.encode(&mut message).unwrap();
    message
}

impl Made {
    /// The channel of a state, without packets.
    fn like(state: &[u8]) -> Self {
        let chunk = saved_state::Chunk::alone(chunks(state)[1], KINDS).unwrap();
        let channel =
            ChannelRecord { outgoing_packets: 0, incoming_packets: 0, ..chunk.decode().unwrap() };
        Self { channel, packets: Vec::new() }
    }

    fn incoming(&mut self, record: &IncomingPacketRecord<'_>) -> &mut Self {
        self.channel.incoming_packets += 1;
        self.packets.push((INCOMING_PACKET, encoded(record)));
        self
    }

    fn outgoing(&mut self, record: &OutgoingPacketRecord<'_>) -> &mut Self {
        self.channel.outgoing_packets += 1;
        self.packets.push((OUTGOING_PACKET, encoded(record)));
        self
    }

    /// With the header of `state`.
    fn bytes(&self, state: &[u8]) -> Vec<u8> {
        let mut bytes = chunks(state)[0].to_vec();
        // What it says of chunks is not known beforehand here: 0, wherever that is.
        let all = u32::try_from(chunks(state).len()).unwrap().to_le_bytes();
        let at = bytes.windows(4).position(|four| four == all).unwrap();
        bytes[at..at + 4].fill(0);
        let mut sequence = 1;
        let mut put = |bytes: &mut Vec<u8>, kind, message: &[u8], last| {
            let handmade = Handmade { sequence, kind, version: 1, mandatory: true, last };
            bytes.extend(chunk(handmade, message));
            sequence += 1;
        };
        put(&mut bytes, CHANNEL, &encoded(&self.channel), false);
        for (kind, message) in &self.packets {
            put(&mut bytes, *kind, message, false);
        }
        let count = u32::try_from(2 + self.packets.len()).unwrap();
        let end = EndRecord { chunks: count, bytes: bytes.len() as u64 };
        put(&mut bytes, END, &encoded(&end), true);
        rechain(&mut bytes);
        bytes
    }
}

fn incoming() -> IncomingPacketRecord<'static> {
    IncomingPacketRecord {
        order: 0,
        transaction_id: 1,
        wants_completion: true,
        fence: Fence::NeverStarted,
        handed_back: HandedBack::No,
        payload: &[1; 8],
        extension: &[],
        refused_external_bytes: 0,
        client_context: &[],
        device_state: &[],
    }
}

fn outgoing(place: Place<'static>) -> OutgoingPacketRecord<'static> {
    OutgoingPacketRecord { order: 0, place, extension: &[], driver_state: &[] }
}

/// Valid checksums over nonsense: each is refused for what it is, by chunk, record and field.
#[test]
fn nonsense_is_refused_by_name() {
    type Make = fn(&mut Made);
    const BIG: &[u8] = &[7; 8192];
    let rows: [(&str, &[&str], Make); 20] = [
        ("a client's", &["chunk 1", "channel.channel", "side"], |made| {
            made.channel.side = Side::Client.into();
        }),
        ("a read index outside of the ring", &["chunk 1", "read_index", "0xfffffff8"], |made| {
            made.channel.read_index = u32::MAX - 7;
        }),
        ("a write index between two packets", &["chunk 1", "write_index", "5"], |made| {
            made.channel.write_index = 5;
        }),
        ("rings of no size", &["chunk 1", "outgoing_ring_bytes", "28672"], |made| {
            made.channel.outgoing_ring_bytes = 0;
        }),
        ("another subchannel's", &["chunk 1", "subchannel_index"], |made| {
            made.channel.subchannel_index = 5;
        }),
        ("more packets than there are", &["chunk 2", "channel.incoming_packet", "7"], |made| {
            made.channel.incoming_packets = 7;
        }),
        ("fewer packets than there are", &["chunk 2", "channel.incoming_packet"], |made| {
            made.incoming(&incoming()).channel.incoming_packets = 0;
        }),
        ("as many packets as there are numbers", &["chunk 1", "4294967295"], |made| {
            made.channel.outgoing_packets = u32::MAX;
        }),
        ("more packets than the pool", &["chunk 1", "incoming_packet", "257"], |made| {
            made.channel.incoming_packets = 257;
        }),
        ("packets of a channel that was not open", &["chunk 1", "incoming_packets"], |made| {
            made.incoming(&incoming()).channel.open = false;
        }),
        ("in the ring of a channel that was not open", &["chunk 2", "place"], |made| {
            made.outgoing(&outgoing(Place::InRing { transaction_id: 1 })).channel.open = false;
        }),
        ("a transaction twice", &["chunk 3", "transaction_id", "0x100000001"], |made| {
            let packet = outgoing(Place::InRing { transaction_id: 1 << 32 | 1 });
            made.outgoing(&packet).outgoing(&packet);
        }),
        ("a transaction that is none", &["chunk 2", "transaction_id"], |made| {
            made.outgoing(&outgoing(Place::InRing { transaction_id: 7 << 32 }));
        }),
        ("a message that fits no ring", &["chunk 2", "message"], |made| {
            made.outgoing(&outgoing(Place::Queued { message: BIG, transaction: true }));
        }),
        ("external data of a server's", &["chunk 2", "extension"], |made| {
            let packet = outgoing(Place::Queued { message: &[], transaction: true });
            made.outgoing(&OutgoingPacketRecord { extension: &[0; 8], ..packet });
        }),
        ("a completion that fits no ring", &["chunk 2", "completion"], |made| {
            let fence = Fence::Finished { completion: BIG };
            made.incoming(&IncomingPacketRecord { fence, payload: &[], ..incoming() });
        }),
        ("a payload of an odd length", &["chunk 2", "payload", "13"], |made| {
            made.incoming(&IncomingPacketRecord { payload: &[1; 13], ..incoming() });
        }),
        ("a context that was not asked for", &["chunk 2", "client_context"], |made| {
            made.incoming(&IncomingPacketRecord { client_context: &[1; 8], ..incoming() });
        }),
        ("handed back, and cancelled", &["chunk 2", "handed_back"], |made| {
            let handed_back = HandedBack::AtPassive;
            made.incoming(&IncomingPacketRecord {
                handed_back,
                fence: Fence::Cancelled,
                ..incoming()
            });
        }),
        ("external data that is none", &["chunk 2", "extension"], |made| {
            made.incoming(&IncomingPacketRecord { extension: &[0xff; 16], ..incoming() });
        }),
    ];
    let (kept, state) = channel_and_state();
    for (what, names, make) in rows {
        let mut made = Made::like(&state);
        make(&mut made);
        let error = kept.channel.restore_from_buffer(&made.bytes(&state)).unwrap_err();
        assert_eq!(error.status(), NtStatus::INVALID_PARAMETER_2, "{what}: {error}");
        let text = error.to_string();
        for name in names {
            assert!(text.contains(name), "{what}: no {name} in: {text}");
        }
        is_as_before(&kept, what);
    }
    // Without anything wrong the same stream is taken.
    let mut made = Made::like(&state);
    made.channel.write_index =
        kept.guest.as_ref().unwrap().peer.from_channel.word(vmbus_ring::Word::WriteIndex);
    let probe = made.bytes(&state);
    assert_eq!(kept.channel.restore_from_buffer(&probe), Ok(Restored::Complete));
    kept.end();
}

/// A record in the wrong place, or none at all.
#[test]
fn records_out_of_order_are_refused() {
    let (kept, state) = channel_and_state();
    let handmade =
        |sequence, kind, last| Handmade { sequence, kind, version: 1, mandatory: true, last };
    let channel = encoded(&Made::like(&state).channel);
    let packet = encoded(&incoming());
    for (first, second, expected) in [
        (
            INCOMING_PACKET,
            None,
            RestoreError::Order { chunk: 1, record: "channel.incoming_packet" },
        ),
        (CHANNEL, Some(CHANNEL), RestoreError::Order { chunk: 2, record: "channel.channel" }),
    ] {
        let mut bytes = chunks(&state)[0].to_vec();
        let message = if first == CHANNEL { &channel } else { &packet };
        bytes.extend(chunk(handmade(1, first, false), message));
        if let Some(second) = second {
            bytes.extend(chunk(handmade(2, second, false), &channel));
        }
        rechain(&mut bytes);
        assert_eq!(kept.channel.restore_from_buffer(&bytes), Err(expected));
        is_as_before(&kept, "out of order");
    }
    takes_it(kept, &state, "out of order");
}

/// Pages outside the guest's memory come back as what they are: the device is told when it asks for them.
#[test]
fn external_data_outside_of_memory_is_told_to_the_device() {
    let (mut kept, state) = channel_and_state();
    let extension: Vec<u8> = [GpaDirectHeader::new(1).to_word(), 8, u64::MAX >> 12]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    let mut made = Made::like(&state);
    made.incoming(&IncomingPacketRecord { extension: &extension, ..incoming() });
    kept.channel.restore_from(&made.bytes(&state)[..]).unwrap();
    kept.start();
    kept.process();
    let packet = kept.keeper.take_held().remove(0);
    let error = packet.external_data(kmcl::ExternalDataFlags::empty()).err().unwrap();
    assert!(matches!(error, kmcl::Error::NotMemory { .. }), "{error}");
    packet.complete(&[]);
    assert_eq!(kept.guest().completions().len(), 1);
    kept.end();
}

/// A driver that takes nothing but what the library needs of it.
struct Bare;

impl SaveRestorePacket for Bare {
    fn restore_packet(&self, channel: &Channel, lib: &[u8], _: &[u8]) -> Result<(), NtStatus> {
        let packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
        packet.restore(lib).map_err(|refused| refused.error.status())
    }
}

/// The smallest packets there are, as many as a state may have, for a channel whose rings have not come
/// and whose messages may be large: memory stays within the stated multiple of the bytes, and is given
/// back.
#[test]
fn memory_is_within_a_multiple_of_the_bytes() {
    let (kept, state) = channel_and_state();
    let set_up = |channel: &Channel| {
        channel.init_set_maximum_packet_size(256 << 10).unwrap();
        channel.init_set_maximum_packet_count(60_000).unwrap();
        channel.server_init_set_save_restore_packet_callbacks(Arc::new(Bare)).unwrap();
    };
    type Fill = fn(&mut Made, u32);
    let small_incoming: Fill = |made, id| {
        let fence = Fence::Finished { completion: &[] };
        made.incoming(&IncomingPacketRecord {
            transaction_id: id.into(),
            fence,
            payload: &[],
            ..incoming()
        });
    };
    let in_ring: Fill = |made, id| {
        let transaction_id = u64::from(id) + 1;
        made.outgoing(&outgoing(Place::InRing { transaction_id }));
    };
    let queued: Fill = |made, _| {
        made.outgoing(&outgoing(Place::Queued { message: &[], transaction: false }));
    };
    let large: Fill = |made, id| {
        if id % 1000 == 0 {
            made.incoming(&IncomingPacketRecord {
                payload: &[9; 64 << 10],
                device_state: &[9; 64 << 10],
                ..incoming()
            });
        }
    };
    for (what, fill) in [
        ("incoming", small_incoming),
        ("in the ring", in_ring),
        ("queued", queued),
        ("large", large),
    ] {
        let mut made = Made::like(&state);
        made.channel.maximum_packet_size = 256 << 10;
        made.channel.maximum_completion_size = 256 << 10;
        made.channel.maximum_packet_count = 60_000;
        (0..60_000).for_each(|id| fill(&mut made, id));
        let bytes = made.bytes(&state);
        let next = Kept::on(&kept.bus, set_up);
        // All but the end, then nothing more: the most that a state can make a channel keep.
        let most = &bytes[..chunks(&bytes).iter().rev().skip(1).map(|chunk| chunk.len()).sum()];
        for (what, pieces) in [(what, vec![most]), ("in pieces", chunks(most))] {
            let (peak, left, ()) = memory(|| {
                let mut restore = next.channel.restore().unwrap();
                for piece in pieces.iter() {
                    assert_eq!(restore.feed(piece), Ok(Restored::More));
                }
            });
            let bound = RESTORE_BYTES_PER_BYTE * most.len() + 16384;
            assert!(peak <= bound, "{what}: {peak} bytes for {}", most.len());
            // The pool keeps a thousand idle packet objects.
            assert!(left < 1024 * 400, "{what}: {left} bytes left");
        }
        next.end();
    }
    kept.end();
}

/// Ten gigabytes claimed in ten bytes, in every length that there is.
#[test]
fn a_claimed_length_takes_no_memory() {
    let (kept, state) = channel_and_state();
    let chunks = chunks(&state);
    let mut claims = Vec::new();
    // A chunk's own length.
    for length in [u32::MAX, 4 << 20, 1 << 30] {
        let mut bytes = chunks[..3].concat();
        let at = chunks[0].len() + chunks[1].len() + 4;
        bytes[at..at + 4].copy_from_slice(&length.to_le_bytes());
        claims.push(bytes);
    }
    // A field's, under a right checksum: ten gigabytes of payload in ten bytes.
    for kind in [CHANNEL, INCOMING_PACKET, OUTGOING_PACKET] {
        for field in [5_u8, 6, 7, 18] {
            let [low, high] = [field << 3 | 2, 1];
            let key = if field < 16 { vec![low] } else { vec![0x80 | 0x12, high] };
            let message = [key, vec![0x80, 0x80, 0x80, 0x80, 0x28, 1, 2, 3, 4]].concat();
            let mut bytes = chunks[0].to_vec();
            let mut sequence = 1;
            if kind != CHANNEL {
                bytes.extend_from_slice(chunks[1]);
                sequence = 2;
            }
            let handmade = Handmade { sequence, kind, version: 1, mandatory: true, last: false };
            bytes.extend(chunk(handmade, &message));
            rechain(&mut bytes);
            claims.push(bytes);
        }
    }
    for bytes in claims {
        let (peak, left, result) = memory(|| kept.channel.restore_from_buffer(&bytes));
        let error = result.unwrap_err();
        let bound = RESTORE_BYTES_PER_BYTE * bytes.len() + 16384;
        assert!(peak <= bound, "{error}: {peak} bytes for {}", bytes.len());
        assert!(left < 1024, "{error}: {left} bytes left");
        assert!(error.to_string().contains("chunk"), "{error}");
        is_as_before(&kept, "claimed");
    }
    takes_it(kept, &state, "claimed");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is changed, checksums put right: an error and the channel as before, or a restore.
    #[test]
    fn anything_under_right_checksums_is_taken_or_refused(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        swap in any::<Option<(prop::sample::Index, prop::sample::Index)>>(),
    ) {
        let (kept, state) = channel_and_state();
        let mut spoilt = state.clone();
        if let Some((one, other)) = swap {
            let mut all: Vec<_> = chunks(&state).iter().map(|chunk| chunk.to_vec()).collect();
            let (one, other) = (one.index(all.len()), other.index(all.len()));
            all.swap(one, other);
            spoilt = all.concat();
        }
        for (at, value) in &changes {
            let at = at.index(spoilt.len());
            spoilt[at] = *value;
        }
        rechain(&mut spoilt);
        match kept.channel.restore_from_buffer(&spoilt) {
            Err(_) => {
                is_as_before(&kept, "changed");
                takes_it(kept, &state, "changed");
            }
            Ok(_) => {
                kept.channel.start();
                kept.channel.process(64);
                kept.end();
            }
        }
    }

    /// Bytes without any sense.
    #[test]
    fn noise_is_refused(noise in prop::collection::vec(any::<u8>(), 1..600)) {
        let (kept, _) = channel_and_state();
        prop_assert!(kept.channel.restore_from_buffer(&noise).is_err());
        is_as_before(&kept, "noise");
        kept.end();
    }
}
