//! Saved states, whole and damaged, and what is found in them.

use kmcl::Guid;
use saved_state::StreamKind;
use saved_state::channel::Fence;
use saved_state::channel::{ChannelRecord, HandedBack, KINDS, Side};
use saved_state::file::FileWriter;
use saved_state::testing::{chunk_ranges, rechain, stream_ranges};
use saved_state::text::Producer;
use saved_state::{Encode, FormatVersion, Save, SaveStep, Step, StreamInfo, StreamWriter};
use vsc_storage::wire::packet::PacketForm;
use vsc_storage::wire::srb::{DataDirection, ScsiAddress, ScsiRequest};

use super::*;

/// A stream that is there already, as something to be saved.
struct Ready(Vec<u8>, usize);

impl Save for Ready {
    type Error = std::fmt::Error;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, Self::Error> {
        let next = chunk_ranges(&self.0).into_iter().find(|range| range.start >= self.1);
        let Some(range) = next else { return Ok(SaveStep { written: 0, needed: 0, done: true }) };
        let Some(room) = buffer.get_mut(..range.len()) else {
            return Ok(SaveStep { written: 0, needed: range.len(), done: false });
        };
        room.copy_from_slice(&self.0[range.clone()]);
        self.1 = range.end;
        Ok(SaveStep { written: range.len(), needed: 0, done: range.end == self.0.len() })
    }
}

/// The stream of a frozen SCSI channel, with so many packets in flight.
fn channel(instance: u128, packets: u32) -> Vec<u8> {
    let info = StreamInfo {
        stream: StreamKind::CHANNEL,
        flags: HeaderFlags::FROZEN,
        interface_type: SCSI_INTERFACE,
        interface_instance: Guid::from_u128(instance),
        producer: Producer::new("kmcl 0.1.0").unwrap(),
        chunks: 0,
        bytes: 0,
        items: packets,
    };
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
    let mut stream = vec![0; 1 << 20];
    let mut filled = 0;
    let mut put = |step: &mut dyn FnMut(&mut [u8]) -> Step| match step(&mut stream[filled..]) {
        Step::Written { bytes } => filled += bytes,
        Step::Needs { bytes } => panic!("{bytes} more bytes"),
    };
    put(&mut |room| writer.header(room).unwrap());
    let record =
        ChannelRecord { side: Side::Server.into(), open: true, frozen: true, ..Default::default() };
    put(&mut |room| writer.record(&record, room).unwrap());
    for order in 0..packets {
        let cdb = Command::write(u64::from(order) * 8, 8, false).encode().unwrap();
        let srb = ScsiRequest::new(ScsiAddress::new(0, 0, 0), &cdb, DataDirection::Out, 4096);
        let payload = VstorPacket::request(Operation::EXECUTE_SRB).with_body(&srb);
        let fence = match order % 3 {
            0 => Fence::NeverStarted,
            1 => Fence::Cancelled,
            _ => Fence::Finished { completion: &[0; 64] },
        };
        let packet = IncomingPacketRecord {
            order,
            transaction_id: u64::from(order) + 7,
            wants_completion: true,
            fence,
            handed_back: HandedBack::No,
            payload: payload.bytes(PacketForm::Full),
            extension: &[0; 24],
            refused_external_bytes: 0,
            client_context: &[],
            device_state: &[1; 9],
        };
        assert!(packet.encoded_len() > 64);
        put(&mut |room| writer.record(&packet, room).unwrap());
    }
    put(&mut |room| writer.end(room).unwrap());
    stream.truncate(filled);
    stream
}

fn file() -> Vec<u8> {
    let mut writer = FileWriter::new(FormatVersion::NEWEST, Producer::new("kmcl 0.1.0").unwrap());
    writer.add("disk", 0, Ready(channel(1, 4), 0));
    writer.add("disk, 1", 1, Ready(channel(1, 3), 0));
    let mut file = Vec::new();
    writer.write_to(&mut file).unwrap();
    file
}

/// Offsets of all packets, and of all other records, as they are in a file.
fn found(state: &State) -> Vec<u64> {
    let packets = state.streams.iter().flat_map(|stream| &stream.packets);
    let records = state.streams.iter().flat_map(|stream| &stream.records);
    let mut found: Vec<u64> = packets.map(|packet| packet.offset).collect();
    found.extend(records.map(|record| record.offset));
    found.sort_unstable();
    found
}

#[test]
fn a_whole_file_is_explained() {
    let file = file();
    let state = State::read(&file);
    assert!(state.damage.is_empty(), "{:?}", state.damage);
    let kinds: Vec<_> =
        state.streams.iter().map(|s| s.header.as_ref().unwrap().kind.clone()).collect();
    assert_eq!(kinds, ["contents", "channel", "channel", "contents"]);
    let names: Vec<_> = state.streams.iter().map(|stream| stream.name.as_deref()).collect();
    assert_eq!(names, [None, Some("disk"), Some("disk, 1"), None]);
    assert_eq!(state.streams.iter().map(|stream| stream.bytes).sum::<u64>(), file.len() as u64);
    let packets = &state.streams[1].packets;
    let conditions: Vec<_> = packets.iter().map(|packet| packet.condition).collect();
    assert_eq!(conditions, ["never started", "cancelled", "finished", "never started"]);
    assert_eq!(packets[2].request.as_deref(), Some("write 8 blocks at 16"));
    assert_eq!((packets[2].transaction_id, packets[2].completion_bytes), (Some(9), 64));
    assert_eq!((packets[2].message_bytes, packets[2].own_state_bytes), (64, 9));
    let sizes = &state.streams[1].sizes;
    assert_eq!(sizes.iter().map(|tally| tally.count).collect::<Vec<_>>(), [1, 4, 1]);
    let header = state.streams[1].header.as_ref().unwrap();
    assert!(header.frozen && header.items == 4, "{header:?}");
}

#[test]
fn a_single_stream_is_explained() {
    let state = State::read(&channel(1, 2));
    assert!(state.damage.is_empty(), "{:?}", state.damage);
    assert_eq!((state.streams.len(), state.streams[0].packets.len()), (1, 2));
}

/// Whatever byte is damaged: it is seen, it is told where, and every record that does not hold the
/// byte is shown.
#[test]
fn any_damaged_byte_is_found_and_the_rest_is_shown() {
    let good = file();
    let all = found(&State::read(&good));
    let chunks: Vec<_> = stream_ranges(&good)
        .into_iter()
        .flat_map(|stream| {
            let base = stream.start;
            let chunks = chunk_ranges(&good[stream]);
            chunks.into_iter().map(move |chunk| base + chunk.start..base + chunk.end)
        })
        .collect();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        let state = State::read(&bad);
        let hit = chunks.iter().find(|chunk| chunk.contains(&at)).unwrap();
        let told = |damage: &Damage| {
            (damage.offset..damage.offset + damage.bytes.max(1)).contains(&(hit.start as u64))
        };
        assert!(state.damage.iter().any(told), "byte {at}: {:?}", state.damage);
        let shown = found(&state);
        for offset in all.iter().filter(|offset| **offset != hit.start as u64) {
            assert!(shown.contains(offset), "byte {at}: the record at {offset} is not shown");
        }
    }
}

#[test]
fn a_file_that_is_cut_anywhere_is_damaged_and_shown_up_to_there() {
    let good = file();
    let all = found(&State::read(&good));
    for length in 1..good.len() {
        let state = State::read(&good[..length]);
        assert!(!state.damage.is_empty(), "cut to {length} bytes");
        // The record whose chunk ends behind the cut is the last one before it.
        let whole = all.iter().filter(|offset| **offset < length as u64).count();
        assert!(found(&state).len() + 1 >= whole, "cut to {length} bytes");
    }
}

#[test]
fn streams_that_do_not_belong_together_are_found() {
    let good = file();
    let ranges = stream_ranges(&good);
    let without = [&good[..ranges[1].start], &good[ranges[2].start..]].concat();
    let swapped = [
        &good[ranges[0].clone()],
        &good[ranges[2].clone()],
        &good[ranges[1].clone()],
        &good[ranges[3].clone()],
    ]
    .concat();
    let mut other = good.clone();
    let place = ranges[1].start + chunk_ranges(&good[ranges[1].clone()])[2].start + 24;
    other[place] ^= 1; // a number in a packet, and every checksum right
    rechain(&mut other[ranges[1].clone()]);
    for (name, bytes) in [("missing", without), ("swapped", swapped), ("of another save", other)] {
        let state = State::read(&bytes);
        assert!(!state.damage.is_empty(), "{name}");
        assert!(state.streams.iter().all(|stream| stream.header.is_some()), "{name}");
    }
}

proptest::proptest! {
    /// Any bytes at all are explained, and never twice as many streams as there are bytes.
    #[test]
    fn anything_is_explained(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..4096),
        cut in 0_usize..8192,
    ) {
        let state = State::read(&bytes);
        proptest::prop_assert!(state.damage.len() <= bytes.len() + 1);
        proptest::prop_assert!(state.is_foreign() || bytes.starts_with(b"\x89KMCL"));
        let good = file();
        let cut = cut.min(good.len());
        let state = State::read(&[&good[..cut], &bytes, &good[cut..]].concat());
        proptest::prop_assert!(bytes.is_empty() || !state.damage.is_empty());
    }
}
