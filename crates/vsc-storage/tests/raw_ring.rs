//! A client against a server that writes into the ring whatever it likes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod raw;

use kmcl::ChannelError;
use proptest::prelude::*;
use raw::{Asked, connected, success};
use vmbus_wire::packet::PacketKind;
use vsc_storage::wire::scsi::cdb::Command;
use vsc_storage::wire::srb::ScsiAddress;
use vsc_storage::{Error, Notice, Request, StorageClient};

const LUN: ScsiAddress = ScsiAddress::new(0, 0, 0);

fn submit(client: &mut StorageClient, token: u64) {
    let buffer = client.allocate(4096).unwrap();
    let cdb = Command::read(token, 1).encode().unwrap();
    client.submit(Request::new(LUN, cdb).reading(buffer, 0, 512).with_token(token)).unwrap();
}

#[test]
fn answers_with_wrong_ids_end_nothing_and_the_right_one_ends_its_request_once() {
    let (mut client, mut server) = connected();
    submit(&mut client, 7);
    let [asked] = server.requests().try_into().ok().unwrap();
    let answer = success(&asked.packet, 512);
    for wrong in [0, 1, asked.id + 1, asked.id ^ 1 << 63, asked.id | 1 << 32, u64::MAX] {
        if wrong != asked.id {
            server.answer(wrong, &answer);
        }
    }
    client.process().unwrap();
    assert!(client.next_completion().is_none());
    server.answer(asked.id, &answer);
    server.answer(asked.id, &answer);
    client.process().unwrap();
    assert_eq!(client.next_completion().map(|end| (end.token, end.result)), Some((7, Ok(512))));
    assert!(client.next_completion().is_none());

    // The next request takes the slot; the old answer is not its answer.
    submit(&mut client, 8);
    server.answer(asked.id, &answer);
    client.process().unwrap();
    assert!(client.next_completion().is_none());
    let [asked] = server.requests().try_into().ok().unwrap();
    server.answer(asked.id, &success(&asked.packet, 512));
    client.process().unwrap();
    assert_eq!(client.next_completion().map(|end| (end.token, end.result)), Some((8, Ok(512))));
}

#[test]
fn packets_of_kinds_without_meaning_end_the_client() {
    for kind in [PacketKind::TransferPages, PacketKind::EstablishGpadl, PacketKind::Cancel] {
        let (mut client, mut server) = connected();
        submit(&mut client, 1);
        server.put(kind, 0, &[0; 64]);
        let error = client.process().unwrap_err();
        assert!(matches!(error, Error::Channel(ChannelError::Kind(_) | ChannelError::Incoming(_))));
        assert_eq!(client.next_completion().map(|end| end.result), Some(Err(error)));
        assert_eq!(client.failure(), Some(error));
        server.link.closed();
    }
}

/// What a hostile server can do between two turns of the client.
#[derive(Clone, Debug)]
enum Action {
    /// An answer to a request in flight, chosen by this number, with these bytes.
    Answer(usize, Vec<u8>),
    /// The honest answer to it.
    Honest(usize),
    /// A packet of any kind with any id.
    Packet(usize, u64, Vec<u8>),
    /// The client makes another request.
    Submit,
}

fn action() -> impl Strategy<Value = Action> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        2 => (any::<usize>(), bytes()).prop_map(|(at, bytes)| Action::Answer(at, bytes)),
        4 => any::<usize>().prop_map(Action::Honest),
        1 => (any::<usize>(), any::<u64>(), bytes())
            .prop_map(|(kind, id, bytes)| Action::Packet(kind, id, bytes)),
        4 => Just(Action::Submit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a server puts into the ring, nothing panics, and every request that was accepted
    /// ends exactly once, at the latest when the client is given up.
    #[test]
    fn every_request_ends_once(actions in proptest::collection::vec(action(), 1..40)) {
        let (mut client, mut server) = connected();
        let mut asked: Vec<Asked> = Vec::new();
        let (mut submitted, mut ended) = (0, vec![]);
        for action in actions {
            match action {
                Action::Submit if client.failure().is_none() && client.in_flight() < 16 => {
                    submit(&mut client, submitted);
                    submitted += 1;
                }
                Action::Submit => {}
                Action::Answer(at, bytes) if !asked.is_empty() => {
                    let asked = asked.swap_remove(at % asked.len());
                    server.put(PacketKind::Completion, asked.id, &bytes);
                }
                Action::Honest(at) if !asked.is_empty() => {
                    let asked = asked.swap_remove(at % asked.len());
                    server.answer(asked.id, &success(&asked.packet, 512));
                }
                Action::Answer(..) | Action::Honest(_) => {}
                Action::Packet(kind, id, bytes) => {
                    let kind = PacketKind::ALL[kind % PacketKind::ALL.len()];
                    server.put(kind, id, &bytes);
                }
            }
            if client.failure().is_some() {
                break; // the rings are not the server's any more
            }
            asked.extend(server.requests());
            let _ = client.process();
            ended.extend(std::iter::from_fn(|| client.next_completion()));
            while let Some(notice) = client.next_notice() {
                prop_assert!(matches!(
                    notice,
                    Notice::EnumerateBus | Notice::RemoveDevice | Notice::Event
                ));
            }
        }
        if client.failure().is_none() {
            drop(server.link);
            while client.failure().is_none() {
                let _ = client.process();
            }
        }
        ended.extend(std::iter::from_fn(|| client.next_completion()));
        let mut tokens: Vec<_> = ended.iter().map(|end| end.token).collect();
        tokens.sort_unstable();
        prop_assert_eq!(tokens, (0..submitted).collect::<Vec<_>>());
        prop_assert!(ended.iter().all(|end| end.buffer.is_some()));
    }
}
