//! A server endpoint that is saved in the middle of its work, and goes on as another channel: every
//! transaction that was in flight ends exactly once.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::{Arc, Mutex};

use common::{Answers, Device, Pair, lock, send, server};
use kmcl::{
    Channel, ChannelState, IncomingPacket, NtStatus, Packet, ProcessPacket, ResumedPacket, Save,
    SaveRestorePacket, StateChange,
};

/// A device that keeps its packets, settles them when it is told to, and sends packets of its own.
#[derive(Default)]
struct Mover {
    held: Mutex<Vec<IncomingPacket>>,
    answers: Arc<Answers>,
    /// Whether packets are handed over (and completed after they have come back), or completed.
    completes: bool,
}

impl StateChange for Mover {}

impl ProcessPacket for Mover {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        lock(&self.held).push(packet);
    }

    fn resume_packet(&self, _: &Channel, packet: ResumedPacket) {
        let mut answer = packet.device_state().to_vec();
        answer.extend_from_slice(packet.packet().payload());
        packet.into_packet().complete(&answer);
    }

    fn freeze(&self, _: &Channel) {
        for (packet, number) in lock(&self.held).drain(..).zip(0_u8..) {
            if self.completes {
                packet.complete(&[number; 8]);
            } else {
                packet.never_started().hand_over(&[number; 8]).unwrap();
            }
        }
    }
}

impl SaveRestorePacket for Mover {
    fn state_size(&self, _: &Channel, packet: &Packet) -> Result<u32, NtStatus> {
        Ok(u32::try_from(packet.pointer() % 3 * 8).unwrap())
    }

    fn save_packet(
        &self,
        _: &Channel,
        packet: &Packet,
        buffer: &mut [u8],
    ) -> Result<u32, NtStatus> {
        buffer.fill(u8::try_from(packet.pointer()).unwrap());
        Ok(u32::try_from(buffer.len()).unwrap())
    }

    fn restore_packet(&self, channel: &Channel, lib: &[u8], own: &[u8]) -> Result<(), NtStatus> {
        let mut packet = channel.packet_allocate().ok_or(NtStatus::INSUFFICIENT_RESOURCES)?;
        packet.set_pointer(1000 + own.len());
        packet.set_completion_routine(Arc::clone(&self.answers) as _);
        packet.restore(lib).map_err(|refused| refused.error.status())
    }
}

fn mover(pair: &Pair, completes: bool) -> (Channel, Arc<Mover>) {
    let mover = Arc::new(Mover { completes, ..Mover::default() });
    let server = server(&(pair.bus.clone() as _), &pair.device);
    server.init_set_process_packet_callbacks(Arc::clone(&mover) as _).unwrap();
    server.init_set_state_change_callbacks(Arc::clone(&mover) as _).unwrap();
    server.server_init_set_save_restore_packet_callbacks(Arc::clone(&mover) as _).unwrap();
    (server, mover)
}

/// What a save of `channel` gives, through buffers that grow to what is needed.
fn save(channel: &Channel, first: usize) -> Vec<u8> {
    let mut save = channel.save().unwrap();
    let (mut state, mut buffer) = (Vec::new(), vec![0; first]);
    loop {
        let step = save.step(&mut buffer).unwrap();
        state.extend_from_slice(&buffer[..step.written]);
        if step.done {
            return state;
        }
        assert!(step.needed > 0);
        if step.written == 0 {
            buffer.resize(step.needed, 0);
        }
    }
}

fn moves(completes: bool) {
    let mut pair = Pair::new(Device::new());
    pair.driver = Device::holding();
    pair.client.init_set_process_packet_callbacks(Arc::clone(&pair.driver) as _).unwrap();
    let (first, first_mover) = mover(&pair, completes);
    pair.server = first;
    pair.enable();

    // Five packets of the client's are with the device, thirty of the server's in flight or queued:
    // the ring holds fewer.
    let client_answers = Arc::new(Answers::default());
    for number in 0..5 {
        send(&pair.client, number, &[u8::try_from(number).unwrap(); 16], &client_answers);
    }
    pair.pump();
    for number in 0..30 {
        send(&pair.server, number, &[7; 2048], &first_mover.answers);
    }
    pair.pump();
    assert_eq!(lock(&first_mover.held).len(), 5);
    let (queued, in_flight) = pair.server.outgoing_in_use();
    assert_eq!(queued + in_flight, 30);
    assert!(queued > 0 && in_flight > 0);

    let frozen = pair.server.freeze().unwrap();
    assert_eq!(frozen.running(), 0);
    let state = save(frozen.channel(), 1);
    assert_eq!(state, save(frozen.channel(), 1 << 20), "the buffers have no part in the bytes");
    frozen.move_away();
    assert_eq!(pair.server.state(), ChannelState::Disabled);

    let (second, second_mover) = mover(&pair, completes);
    second.enable().unwrap();
    second.process(64);
    assert_eq!(second.state(), ChannelState::Paused);
    second.restore_from(&state[..]).unwrap();
    assert_eq!(second.outgoing_in_use(), (queued, in_flight));
    second.start();
    pair.server = second;
    pair.pump();

    // The client completes what it gets, until all thirty have come: each once.
    let mut ended = Vec::new();
    while ended.len() < 30 {
        let held = pair.driver.take_held();
        assert!(!held.is_empty(), "only {} packets have come", ended.len());
        held.into_iter().for_each(|packet| packet.complete(&[9; 8]));
        pair.pump();
        ended.extend(second_mover.answers.take());
    }
    let states = |len: usize| ended.iter().filter(|(pointer, ..)| *pointer == 1000 + len).count();
    assert_eq!((states(0), states(8), states(16)), (10, 10, 10));
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::SUCCESS));
    assert_eq!(pair.server.outgoing_in_use(), (0, 0));
    let mut ends = client_answers.take();
    ends.sort();
    assert_eq!(ends.len(), 5);
    for (number, (pointer, status, payload)) in (0_u8..).zip(&ends) {
        assert_eq!((*pointer, *status), (usize::from(number), NtStatus::SUCCESS));
        let mut expected = vec![number; 8];
        if !completes {
            expected.extend([number; 16]);
        }
        assert_eq!(*payload, expected);
    }
    assert!(first_mover.answers.take().is_empty(), "the first server's packets end elsewhere");
    pair.close();
}

#[test]
fn packets_that_are_handed_over_come_again_elsewhere() {
    moves(false);
}

#[test]
fn completions_that_are_held_leave_elsewhere() {
    moves(true);
}

/// The client rings whoever serves it now.
#[test]
fn the_new_server_hears_the_client() {
    let mut pair = Pair::open(Device::echo());
    pair.server.freeze().unwrap().move_away();
    pair.server = server(&(pair.bus.clone() as _), &pair.device);
    pair.server.enable().unwrap();
    pair.server.start();
    pair.server.process(64);
    assert_eq!(pair.server.state(), ChannelState::Active);
    let is_readable = || {
        let doorbell = pair.server.doorbell_fd().unwrap();
        let mut fds =
            [rustix::event::PollFd::from_borrowed_fd(doorbell, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
    };
    pair.server.acknowledge();
    assert!(!is_readable());
    let answers = Arc::new(Answers::default());
    send(&pair.client, 1, &[1; 8], &answers);
    assert!(is_readable(), "nobody told the new server");
    pair.pump();
    assert_eq!(answers.take().len(), 1);
}
