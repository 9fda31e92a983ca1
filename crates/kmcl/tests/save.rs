//! VmbChannelSaveBegin, Continue and End, and EvtVmbChannelSavePacket: every status and its condition,
//! and the decisions D-5, D-14 to D-18, D-20 to D-24, D-30 and D-32.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::Arc;

use common::keeper::{Asked, Kept, chunks, saved};
use common::{Device, Pair, lock, send};
use kmcl::bus::BusEvent;
use kmcl::{
    Channel, ChannelSaveError, ChannelState, Error, MAX_DRIVER_STATE, NtStatus, Save, SaveContinue,
    SaveOptions, Side,
};
use proptest::prelude::*;
use saved_state::FormatVersion;
use saved_state::channel::{ChannelRecord, IncomingPacketRecord, KINDS, OutgoingPacketRecord};
use saved_state::{Decode, Record, StreamKind, StreamReader};

const NOTHING: SaveContinue =
    SaveContinue { status: NtStatus::INVALID_DEVICE_STATE, bytes_filled: 0, bytes_required: 0 };

fn kept(outgoing: std::ops::Range<usize>) -> Kept {
    let kept = Kept::paused();
    outgoing.for_each(|pointer| kept.send(pointer));
    kept
}

/// The records of a kind in a state, looked at one by one.
fn records<T: for<'a> Decode<'a>>(state: &[u8], mut look: impl FnMut(T)) {
    let mut reader = StreamReader::new(StreamKind::CHANNEL, KINDS);
    let mut input = state;
    while let Some(chunk) = reader.read(&mut input).unwrap() {
        if chunk.kind() == <T as Record>::KIND.kind {
            look(chunk.decode().unwrap());
        }
    }
    reader.finish().unwrap();
}

/// D-14, D-15, D-16, D-19: BUFFER_TOO_SMALL writes nothing and says what the next chunk needs, which is
/// enough; BUFFER_OVERFLOW writes whole chunks and says it as well; SUCCESS needs nothing more. Outputs
/// are always written.
#[test]
fn each_step_says_what_it_wrote_and_what_the_next_one_needs() {
    let kept = kept(0..3);
    let state = saved(&kept.channel);
    let lengths: Vec<_> = chunks(&state).iter().map(|chunk| chunk.len()).collect();
    assert_eq!(lengths.len(), 6, "header, channel, three packets, end");
    kept.channel.save_begin().unwrap();
    let mut buffer = vec![0; state.len()];
    let mut written = Vec::new();
    for (at, &length) in lengths.iter().enumerate() {
        let required = u32::try_from(length).unwrap();
        for too_small in [0, length - 1] {
            let expected = SaveContinue {
                status: NtStatus::BUFFER_TOO_SMALL,
                bytes_filled: 0,
                bytes_required: required,
            };
            assert_eq!(kept.channel.save_continue(&mut buffer[..too_small]), expected, "{at}");
        }
        let step = kept.channel.save_continue(&mut buffer[..length]);
        let next = lengths.get(at + 1).map(|&next| u32::try_from(next).unwrap());
        let status = next.map_or(NtStatus::SUCCESS, |_| NtStatus::BUFFER_OVERFLOW);
        let bytes_required = next.unwrap_or(0);
        assert_eq!(step, SaveContinue { status, bytes_filled: required, bytes_required }, "{at}");
        written.extend_from_slice(&buffer[..length]);
    }
    assert_eq!(written, state);
    kept.channel.save_end();
    kept.end();
}

/// D-17: SaveContinue without SaveBegin or after success, and a second SaveBegin, are refused, outputs 0;
/// SaveEnd without SaveBegin does nothing, and allows the next one.
#[test]
fn calls_out_of_order_are_refused() {
    let kept = kept(0..1);
    let channel = &kept.channel;
    let mut buffer = vec![0; 4096];
    channel.save_end();
    assert_eq!(channel.save_continue(&mut buffer), NOTHING, "without SaveBegin");
    channel.save_begin().unwrap();
    for refused in [channel.save_begin().unwrap_err(), channel.save().unwrap_err()] {
        assert_eq!(refused.status(), NtStatus::INVALID_DEVICE_STATE, "{refused}");
    }
    assert_eq!(channel.save_continue(&mut buffer).status, NtStatus::SUCCESS);
    assert_eq!(channel.save_continue(&mut buffer), NOTHING, "after STATUS_SUCCESS");
    assert!(channel.save_begin().is_err(), "before SaveEnd");
    channel.save_end();
    channel.save_end();
    assert_eq!(channel.save_continue(&mut buffer), NOTHING, "after SaveEnd");
    channel.save_begin().unwrap();
    channel.save_end();
    let mut session = channel.save().unwrap();
    assert!(channel.save_begin().is_err());
    while !session.step(&mut buffer).unwrap().done {}
    assert_eq!(session.step(&mut buffer), Err(ChannelSaveError::Over));
    drop(session);
    channel.save_begin().unwrap();
    channel.save_end();
    kept.end();
}

/// D-5, D-32: a channel is saved when it is enabled and not Active; elsewhere the save is refused, and
/// nothing has changed.
#[test]
fn a_channel_is_saved_while_it_rests() {
    let mut kept = Kept::disabled();
    let refuses = |channel: &Channel, state| {
        assert_eq!(channel.state(), state);
        let refused = channel.save_begin().unwrap_err();
        assert_eq!(refused, Error::State { function: "save", state });
        assert_eq!(channel.state(), state);
    };
    refuses(&kept.channel, ChannelState::Disabled);
    kept.channel.enable().unwrap();
    assert_eq!(kept.channel.state(), ChannelState::Enabled);
    saved(&kept.channel);
    kept.open();
    assert_eq!(kept.channel.state(), ChannelState::Paused);
    saved(&kept.channel);
    kept.start();
    refuses(&kept.channel, ChannelState::Active);
    // Pausing: a packet is with the device, and new ones would escape the snapshot just the same.
    kept.guest().send(1, 1);
    kept.process();
    kept.channel.begin_pause();
    refuses(&kept.channel, ChannelState::Pausing);
    kept.keeper.take_held().into_iter().for_each(|packet| packet.complete(&[]));
    kept.channel.process(1);
    assert_eq!(kept.channel.state(), ChannelState::Paused);
    saved(&kept.channel);
    kept.close();
    assert_eq!(kept.channel.state(), ChannelState::Closed);
    saved(&kept.channel);
    kept.end();

    let pair = Pair::open(Device::new());
    pair.client.pause();
    assert!(pair.client.save_begin().is_err(), "a client's channel");
    pair.close();
}

/// D-11, D-5: pausing waits for incoming packets only; what the guest has not completed is in flight all
/// the same, and that is what is saved.
#[test]
fn outgoing_packets_survive_the_pause_and_are_saved() {
    let mut kept = Kept::active();
    kept.send(7);
    kept.guest().send(1, 1);
    kept.process();
    let held = kept.keeper.take_held();
    assert_eq!(held.len(), 1);
    held.into_iter().for_each(|packet| packet.complete(&[]));
    kept.channel.pause();
    assert_eq!(kept.channel.outgoing_in_use(), (0, 1));
    let mut seen = Vec::new();
    records(&saved(&kept.channel), |record: OutgoingRecord| seen.push(record.0));
    assert_eq!(seen, [7]);
    kept.end();
}

/// What the tests look at of an outgoing packet: how long its driver's state is.
struct OutgoingRecord(usize);

impl Record for OutgoingRecord {
    const KIND: &'static saved_state::KindInfo = OutgoingPacketRecord::<'static>::KIND;
}

impl Decode<'_> for OutgoingRecord {
    fn decode(payload: &[u8]) -> Result<Self, saved_state::FieldError> {
        Ok(Self(OutgoingPacketRecord::decode(payload)?.driver_state.len()))
    }
}

/// D-18: with nothing in flight there is still a state, a header and a terminator among it, and restoring
/// it succeeds.
#[test]
fn nothing_in_flight_is_saved_as_that() {
    for open in [false, true] {
        let mut kept = Kept::disabled();
        kept.channel.enable().unwrap();
        if open {
            kept.open();
        }
        let state = saved(&kept.channel);
        assert_eq!(chunks(&state).len(), 3, "header, channel, end");
        assert_eq!(kept.keeper.take_asked(), []);
        let next = Kept::disabled();
        let restored = next.channel.restore_from_buffer(&state).unwrap();
        assert_eq!(restored.status(), NtStatus::SUCCESS);
        kept.end();
        next.end();
    }
}

/// D-20, D-23: the packets are those in use when SaveBegin is called; the driver is asked when a packet's
/// chunk is built, never by SaveBegin or SaveEnd, first for the size, then for the state if there is one,
/// and once, however often the buffer is too small.
#[test]
fn the_driver_is_asked_once_per_packet_when_its_chunk_is_built() {
    let kept = kept(0..3);
    let channel = &kept.channel;
    channel.save_begin().unwrap();
    kept.send(9); // after the snapshot
    assert_eq!(kept.keeper.take_asked(), []);
    let mut state = Vec::new();
    let mut small = vec![0; 1];
    let mut asked = Vec::new();
    loop {
        let step = channel.save_continue(&mut small);
        state.extend_from_slice(&small[..step.bytes_filled as usize]);
        asked.push(kept.keeper.take_asked());
        match step.status {
            NtStatus::SUCCESS => break,
            NtStatus::BUFFER_TOO_SMALL => small = vec![0; step.bytes_required as usize],
            NtStatus::BUFFER_OVERFLOW => small = vec![0; 1],
            status => panic!("{status}"),
        }
    }
    asked.retain(|asked| !asked.is_empty());
    assert_eq!(
        asked,
        [
            vec![Asked::Size(0)],
            vec![Asked::Size(1), Asked::Save(1, 1)],
            vec![Asked::Size(2), Asked::Save(2, 2)],
        ]
    );
    channel.save_end();
    assert_eq!(kept.keeper.take_asked(), []);
    let mut sizes = Vec::new();
    records(&state, |record: OutgoingRecord| sizes.push(record.0));
    assert_eq!(sizes, [0, 1, 2]);
    assert_eq!(channel.outgoing_in_use(), (0, 4), "what was sent meanwhile is sent");
    kept.end();
}

/// D-21, D-22: whatever a driver's callback does wrong ends the save with its status, nothing written, and
/// the channel goes on as if nothing had been saved.
#[test]
fn a_callback_that_fails_ends_the_save() {
    type Make = fn(&Kept);
    let rows: [(&str, Make, ChannelSaveError, NtStatus); 6] = [
        (
            "the first call fails",
            |kept| *lock(&kept.keeper.on_size) = Arc::new(|_, _| Err(NtStatus::NOT_SUPPORTED)),
            ChannelSaveError::Driver { status: NtStatus::NOT_SUPPORTED },
            NtStatus::NOT_SUPPORTED,
        ),
        (
            "the second call fails",
            |kept| *lock(&kept.keeper.on_save) = Arc::new(|_, _, _| Err(NtStatus::DEVICE_BUSY)),
            ChannelSaveError::Driver { status: NtStatus::DEVICE_BUSY },
            NtStatus::DEVICE_BUSY,
        ),
        (
            "more than its buffer",
            |kept| *lock(&kept.keeper.on_save) = Arc::new(|_, _, _| Ok(6)),
            ChannelSaveError::DriverOverran { written: 6, room: 5 },
            NtStatus::INVALID_BUFFER_SIZE,
        ),
        (
            "as much more as there are numbers",
            |kept| *lock(&kept.keeper.on_save) = Arc::new(|_, _, _| Ok(u32::MAX)),
            ChannelSaveError::DriverOverran { written: u32::MAX, room: 5 },
            NtStatus::INVALID_BUFFER_SIZE,
        ),
        (
            "asks for too much",
            |kept| *lock(&kept.keeper.on_size) = Arc::new(|_, _| Ok(MAX_DRIVER_STATE + 1)),
            ChannelSaveError::DriverState { bytes: MAX_DRIVER_STATE + 1 },
            NtStatus::INVALID_BUFFER_SIZE,
        ),
        (
            "asks for all there is",
            |kept| *lock(&kept.keeper.on_size) = Arc::new(|_, _| Ok(u32::MAX)),
            ChannelSaveError::DriverState { bytes: u32::MAX },
            NtStatus::INVALID_BUFFER_SIZE,
        ),
    ];
    for (what, make, error, status) in rows {
        let mut kept = kept(5..7);
        make(&kept);
        assert_eq!(error.status(), status, "{what}");
        let mut buffer = vec![0; 1 << 20];
        // The session.
        let mut save = kept.channel.save().unwrap();
        assert_eq!(save.step(&mut buffer), Err(error), "{what}");
        assert_eq!(save.step(&mut buffer), Err(ChannelSaveError::Over), "{what}");
        drop(save);
        // The documented calls.
        kept.channel.save_begin().unwrap();
        let failed = SaveContinue { status, bytes_filled: 0, bytes_required: 0 };
        assert_eq!(kept.channel.save_continue(&mut buffer), failed, "{what}");
        assert_eq!(kept.channel.save_continue(&mut buffer), NOTHING, "{what}");
        kept.channel.save_end();
        assert_eq!(kept.channel.outgoing_in_use(), (0, 2), "{what}");
        let ids: Vec<_> = kept.guest().read().iter().map(|read| read.transaction_id).collect();
        ids.iter().for_each(|&id| kept.guest().complete(id, &[1; 8]));
        kept.start();
        kept.process();
        assert_eq!(kept.keeper.answers.take().len(), 2, "{what}");
        kept.end();
    }
}

/// D-21: a driver that asks for more each time is asked once for each packet, and its chunk goes into a
/// buffer of the size that was said.
#[test]
fn a_driver_that_wants_more_each_time_is_not_asked_again() {
    let kept = kept(1..2);
    let asked = Arc::new(std::sync::atomic::AtomicU32::new(1000));
    *lock(&kept.keeper.on_size) =
        Arc::new(move |_, _| Ok(asked.fetch_add(1000, std::sync::atomic::Ordering::Relaxed)));
    let mut save = kept.channel.save().unwrap();
    let mut buffer = vec![0; 1];
    let mut steps = 0;
    loop {
        let step = save.step(&mut buffer).unwrap();
        if step.done {
            break;
        }
        if step.written == 0 {
            buffer.resize(step.needed, 0);
        }
        steps += 1;
        assert!(steps < 100, "no end in sight");
    }
    drop(save);
    assert!(buffer.len() < 2000, "{}", buffer.len());
    kept.end();
}

/// D-22: what counts is what the second call says that it wrote, if that is less than it had asked for.
#[test]
fn a_driver_may_write_less_than_it_asked_for() {
    let kept = kept(5..6);
    *lock(&kept.keeper.on_save) = Arc::new(|_, _, buffer| {
        assert!(buffer.len() >= 5);
        buffer.fill(0xee);
        Ok(2)
    });
    let mut sizes = Vec::new();
    records(&saved(&kept.channel), |record: OutgoingRecord| sizes.push(record.0));
    assert_eq!(sizes, [2]);
    kept.end();
}

/// D-24: without callbacks packets have no private state; nobody is asked for any.
#[test]
fn without_callbacks_packets_are_saved_without_private_state() {
    let device = Device::new();
    let pair = Pair::open(device);
    let answers = Arc::default();
    for pointer in 0..3 {
        send(&pair.server, pointer, &[1; 8], &answers);
    }
    pair.server.pause();
    let mut sizes = Vec::new();
    records(&saved(&pair.server), |record: OutgoingRecord| sizes.push(record.0));
    assert_eq!(sizes, [0, 0, 0]);
    pair.server.start();
    pair.pump();
    assert_eq!(answers.take().len(), 3);
    pair.close();
}

/// VmbServerChannelInitSetSaveRestorePacketCallbacks: a server's channel that is Disabled; else
/// STATUS_INVALID_PARAMETER_1 (D-1, D-59).
#[test]
fn callbacks_are_set_on_a_servers_channel_that_is_disabled() {
    let kept = Kept::paused();
    let keeper = kept.keeper.clone();
    let refused =
        kept.channel.server_init_set_save_restore_packet_callbacks(keeper.clone()).unwrap_err();
    assert_eq!(refused.status(), NtStatus::INVALID_PARAMETER_1);
    let client = Channel::allocate(Side::Client, common::raw::as_bus(&kept.bus));
    let refused = client.server_init_set_save_restore_packet_callbacks(keeper.clone()).unwrap_err();
    assert_eq!(refused.status(), NtStatus::INVALID_PARAMETER_1);
    kept.channel.disable();
    kept.channel.server_init_set_save_restore_packet_callbacks(keeper).unwrap();
    kept.end();
}

/// D-30: sizes are 32 bits; no chunk is near their end.
#[test]
fn no_chunk_is_near_the_end_of_32_bits() {
    let kept = kept(1..2);
    *lock(&kept.keeper.on_size) = Arc::new(|_, _| Ok(MAX_DRIVER_STATE));
    let state = saved(&kept.channel);
    let longest = chunks(&state).iter().map(|chunk| chunk.len()).max().unwrap();
    assert!(longest > MAX_DRIVER_STATE as usize);
    assert!(longest <= saved_state::limits::MAX_CHUNK_BYTES as usize);
    kept.end();
}

/// A state is written in the version that is asked for. There is one so far.
#[test]
fn an_older_format_is_written_on_request() {
    let kept = kept(0..2);
    for &format in FormatVersion::ALL {
        let options = SaveOptions { format, ..SaveOptions::default() };
        let mut state = Vec::new();
        kept.channel.save_with(&options).unwrap().write_to(&mut state).unwrap();
        let mut reader = StreamReader::new(StreamKind::CHANNEL, KINDS);
        reader.read(&mut &*state).unwrap();
        assert_eq!(reader.header().unwrap().format_version, format.number());
    }
    assert_eq!(FormatVersion::ALL.len(), 1, "a second version needs a test of what it leaves out");
    kept.end();
}

/// While a save is under way nothing is sent and life-cycle events wait; thrown away, it has changed
/// nothing, and what has waited goes on.
#[test]
fn a_save_that_is_thrown_away_has_changed_nothing() {
    for throw in [0, 1, 2] {
        let mut kept = kept(0..4);
        let before = saved(&kept.channel);
        let mut save = kept.channel.save().unwrap();
        if throw > 0 {
            let _some = save.step(&mut vec![0; 400 * throw]).unwrap();
        }
        assert_eq!(kept.guest().read().len(), 4);
        kept.send(4);
        assert_eq!(kept.guest().read(), [], "nothing leaves during a save");
        kept.channel.start();
        assert_eq!(kept.channel.state(), ChannelState::Paused, "life-cycle events wait");
        drop(save);
        assert_eq!(kept.channel.state(), ChannelState::Active);
        assert_eq!(kept.guest().read().len(), 1, "and go on");
        kept.channel.pause();
        let after = saved(&kept.channel);
        let (before, after) = (chunks(&before), chunks(&after));
        let message = before[2].len() - 8; // then come the checksums
        assert_eq!(before[2][..message], after[2][..message], "packets are where they were");
        assert_eq!((before.len(), after.len()), (7, 8));
        kept.end();
    }
}

/// Two saves in a row give the same bytes, whichever way they are made.
#[test]
fn saves_in_a_row_give_the_same_bytes() {
    let kept = kept(0..20);
    let first = saved(&kept.channel);
    assert_eq!(saved(&kept.channel), first);
    kept.channel.save_begin().unwrap();
    let mut buffer = vec![0; 1 << 20];
    let step = kept.channel.save_continue(&mut buffer);
    assert_eq!((step.status, step.bytes_filled as usize), (NtStatus::SUCCESS, first.len()));
    assert_eq!(buffer[..first.len()], first);
    kept.channel.save_end();
    kept.end();
}

/// A disable in the middle of a save ends the save, and the channel with it: every packet ends once.
#[test]
fn a_disable_ends_the_save() {
    let kept = kept(0..4);
    let mut save = kept.channel.save().unwrap();
    let _half = save.step(&mut vec![0; 600]).unwrap();
    kept.channel.disable();
    assert_eq!(kept.channel.state(), ChannelState::Disabled);
    assert_eq!(save.step(&mut vec![0; 4096]), Err(ChannelSaveError::Over));
    let ended = kept.keeper.answers.take();
    assert_eq!(ended.len(), 4);
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED));
    // The next save is another one: what is left of the first does not end it.
    kept.channel.enable().unwrap();
    let mut second = kept.channel.save().unwrap();
    drop(save);
    assert!(second.step(&mut vec![0; 4096]).unwrap().done);
    drop(second);
    kept.end();
}

/// A close that comes during a save is handled after it.
#[test]
fn a_close_waits_for_the_end_of_the_save() {
    let kept = kept(0..2);
    let mut save = kept.channel.save().unwrap();
    kept.close();
    assert_eq!(kept.channel.state(), ChannelState::Paused);
    assert!(save.step(&mut vec![0; 4096]).unwrap().done);
    drop(save);
    assert_eq!(kept.channel.state(), ChannelState::Closed);
    let ended = kept.keeper.answers.take();
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::DEVICE_REMOVED));
    assert_eq!(ended.len(), 2);
    kept.end();
}

/// Inside the driver's callback nothing of the channel's life or its save can be begun, gone on with or
/// ended; the save is not disturbed.
#[test]
fn nothing_is_begun_or_ended_inside_a_save_callback() {
    let kept = kept(1..3);
    *lock(&kept.keeper.on_size) = Arc::new(|channel, pointer| {
        assert!(channel.save_begin().is_err());
        assert!(channel.save().is_err());
        assert!(channel.freeze().is_err());
        assert!(channel.restore().is_err());
        assert_eq!(channel.save_continue(&mut [0; 4096]), NOTHING);
        channel.save_end();
        Ok(u32::try_from(pointer).unwrap())
    });
    let session = saved(&kept.channel);
    kept.channel.save_begin().unwrap();
    let mut buffer = vec![0; 4096];
    let step = kept.channel.save_continue(&mut buffer);
    assert_eq!((step.status, step.bytes_filled as usize), (NtStatus::SUCCESS, session.len()));
    kept.channel.save_end();
    kept.end();
}

/// D-42: a packet that its callback deferred, or handed back for memory that is not there, is nobody's;
/// a pause does not wait for it, and it is saved with the channel. So are the packets behind it: they
/// are still in the ring.
#[test]
fn packets_that_were_handed_back_are_saved_with_a_paused_channel() {
    for redeliver in [false, true] {
        let mut kept = Kept::disabled();
        let device = Device::on_packet(move |_, packet| match redeliver {
            true => packet.redeliver(),
            false => packet.defer_to_passive(),
        });
        kept.channel.init_set_process_packet_callbacks(device.clone()).unwrap();
        kept.channel.enable().unwrap();
        kept.open();
        kept.start();
        kept.guest().send(5, 2);
        kept.guest().send(6, 2);
        kept.channel.process_at(kmcl::Level::Dispatch, 64);
        assert_eq!(device.delivered(), 1);
        kept.channel.pause();
        assert_eq!(kept.channel.state(), ChannelState::Paused);
        let state = saved(&kept.channel);
        let mut incoming = Vec::new();
        records(&state, |Incoming(id)| incoming.push(id));
        assert_eq!(incoming, [5]);
        assert_eq!(saved(&kept.channel), state);

        // Elsewhere it comes first, as if for the first time, and the one behind it after it.
        let mut next = Kept::on(&kept.bus, |_| ());
        next.guest = kept.guest.take();
        next.reopen(true);
        next.channel.restore_from(&state[..]).unwrap();
        next.start();
        next.process();
        let held = next.keeper.take_held();
        let ids: Vec<_> = held.iter().map(|packet| packet.transaction_id()).collect();
        assert_eq!(ids, [5, 6]);
        held.into_iter().for_each(|packet| packet.complete(&[1; 8]));
        assert_eq!(next.guest().completions().len(), 2);
        assert_eq!(next.keeper.take_again(), [], "it had never been with the device");
        next.end();

        // And here it goes on as well.
        device.with_packets(|_, packet| packet.complete(&[]));
        assert!(kept.bus.post(BusEvent::MemoryArrived));
        kept.channel.disable();
    }
}

struct Incoming(u64);

impl Record for Incoming {
    const KIND: &'static saved_state::KindInfo = IncomingPacketRecord::<'static>::KIND;
}

impl Decode<'_> for Incoming {
    fn decode(payload: &[u8]) -> Result<Self, saved_state::FieldError> {
        Ok(Self(IncomingPacketRecord::decode(payload)?.transaction_id))
    }
}

/// Queued packets and those in flight are told apart, each in its order.
#[test]
fn queued_packets_are_saved_behind_those_in_flight() {
    let mut kept = Kept::paused();
    for pointer in 0..30 {
        send(&kept.channel, pointer, &[9; 2000], &kept.keeper.answers);
    }
    let (queued, in_flight) = kept.channel.outgoing_in_use();
    assert!(queued > 0 && in_flight > 0);
    let state = saved(&kept.channel);
    let mut sizes = Vec::new();
    records(&state, |record: OutgoingRecord| sizes.push(record.0));
    assert_eq!(sizes, (0..30).collect::<Vec<_>>());
    let mut record = ChannelRecord::default();
    records(&state, |found: ChannelRecord| record = found);
    assert_eq!((record.outgoing_packets, record.incoming_packets, record.open), (30, 0, true));
    assert_eq!(kept.guest().read().len(), in_flight);
    kept.end();
}

proptest! {
    /// Any sequence of buffer sizes, from nothing up, gives the same stream; every step makes progress or
    /// says how many bytes would.
    #[test]
    fn any_buffers_give_the_same_stream(
        packets in 0_usize..40,
        sizes in prop::collection::vec(prop_oneof![0_usize..40, 40_usize..400, 400_usize..20_000], 1..40),
    ) {
        let kept = kept(0..packets);
        let expected = saved(&kept.channel);
        let mut save = kept.channel.save().unwrap();
        let mut state = Vec::new();
        let mut least = 0;
        for size in sizes.iter().cycle() {
            let mut buffer = vec![0xaa; (*size).max(least)];
            let step = save.step(&mut buffer).unwrap();
            prop_assert!(step.written <= buffer.len());
            prop_assert!(buffer[step.written..].iter().all(|&byte| byte == 0xaa), "past what it says");
            state.extend_from_slice(&buffer[..step.written]);
            if step.done {
                prop_assert_eq!(step.needed, 0);
                break;
            }
            prop_assert!(step.needed > buffer.len() - step.written);
            prop_assert!(least == 0 || step.written >= least, "what was asked for is enough");
            // Now and then what was asked for is given at last.
            least = if step.written == 0 { step.needed } else { 0 };
        }
        prop_assert_eq!(state, expected);
        drop(save);
        kept.end();
    }
}
