//! A restored channel and its rings: they go on where they were, once, whatever was done to them
//! meanwhile, or were opened anew. Design, promises 1 and 7.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use common::keeper::{Kept, all_complete, chunks, is_untouched, moved, saved, state_of};
use common::{packet, send};
use kmcl::{Channel, ChannelError, ChannelState, NtStatus, RestoreError, Restored, SendFlags};
use saved_state::testing::rechain;
use vmbus_ring::Word;

/// Rings of another size than those that were saved.
#[test]
fn rings_of_another_size_are_refused() {
    let (old, state) = state_of(1);
    let mut next = Kept::on(&old.bus, |_| ());
    next.channel.enable().unwrap();
    let peer = old.bus.open_prepared(9, 8, |_| ());
    next.channel.process(8);
    // The bus says that they are those of before.
    next.close();
    let (reader, writer) = (peer.reader(), peer.writer());
    next.guest = Some(common::keeper::Guest { peer, reader, writer });
    next.reopen(true);
    let refused = next.channel.restore_from_buffer(&state).unwrap_err();
    let setting = "incoming_ring_bytes";
    assert_eq!(
        refused,
        RestoreError::Setting { chunk: 1, setting, saved: 7 * 4096, here: 8 * 4096 }
    );
    assert_eq!(next.keeper.answers.take().len(), 1);
    is_untouched(&next, "other rings");
    next.end();
    old.end();
}

/// Design, promise 7: both rings are looked at and the guest is signalled once, for the kicks that were
/// given before the save; whether the rings come first or the state.
#[test]
fn restored_means_running() {
    for rings_first in [false, true] {
        let (mut old, _) = state_of(0);
        let state = saved(&old.channel);
        let mut next = old.successor();
        old.channel.freeze().unwrap().move_away();
        // While nobody is there the guest sends, and its kick goes nowhere.
        next.guest().send(5, 1);
        let signals = next.guest().peer.signals();
        if rings_first {
            next.reopen(true);
            next.channel.restore_from(&state[..]).unwrap();
        } else {
            next.channel.restore_from(&state[..]).unwrap();
            next.reopen(true);
        }
        assert!(next.guest().peer.signals() > signals, "{rings_first}");
        next.start();
        next.channel.process(8);
        assert_eq!(next.keeper.take_held().len(), 1, "nobody rang for it");
        next.channel.disable();
    }
}

/// Transaction ids that were given before a restore are not given again, also by the one after it.
#[test]
fn ids_of_transactions_are_never_given_twice() {
    let mut kept = Kept::active();
    let mut seen = std::collections::BTreeSet::new();
    for round in 0..4 {
        for _ in 0..3 {
            (0..10).for_each(|pointer| kept.send(pointer));
            let ids: Vec<_> = kept.guest().read().iter().map(|read| read.transaction_id).collect();
            for &id in &ids {
                assert!(seen.insert(id), "{id:#x} again, round {round}");
            }
            // Half of them stay in flight.
            ids.iter().step_by(2).for_each(|&id| kept.guest().complete(id, &[]));
            kept.process();
        }
        let in_flight = kept.channel.outgoing_in_use();
        assert_eq!(in_flight, (0, (round + 1) * 15));
        let frozen = kept.channel.freeze().unwrap();
        let state = saved(&kept.channel);
        let next = kept.successor();
        frozen.move_away();
        next.reopen(true);
        next.channel.restore_from(&state[..]).unwrap();
        assert_eq!(next.channel.outgoing_in_use(), in_flight);
        next.start();
        kept = next;
    }
    let open: Vec<_> = seen.iter().copied().collect();
    open.iter().for_each(|&id| kept.guest().complete(id, &[]));
    kept.process();
    assert_eq!(kept.channel.outgoing_in_use(), (0, 0));
    kept.end();
}

/// A state that says that slots were used less often than they were: ids in flight are still not given
/// once more.
#[test]
fn a_lie_about_the_uses_of_ids_gives_none_twice() {
    for lie in [0, 1, u32::MAX] {
        let (kept, state) = moved(3);
        let state = with_channel(&state, |record| record.transaction_uses = lie);
        let mut kept = kept;
        kept.guest().read();
        kept.channel.restore_from(&state[..]).unwrap();
        kept.start();
        (0..5).for_each(|pointer| kept.send(pointer));
        let ids: Vec<_> = kept.guest().read().iter().map(|read| read.transaction_id).collect();
        assert!(ids.iter().all(|id| ![1, 2, 3].contains(id)), "{ids:x?}");
        for id in (1..=3).chain(ids) {
            kept.guest().complete(id, &[]);
        }
        kept.process();
        assert_eq!(kept.keeper.answers.take().len(), 8, "{lie}");
        kept.end();
    }
}

/// A state with its channel's record changed, checksums and all.
fn with_channel(
    state: &[u8],
    change: impl FnOnce(&mut saved_state::channel::ChannelRecord),
) -> Vec<u8> {
    use saved_state::channel::{CHANNEL, ChannelRecord, KINDS};
    use saved_state::testing::{Handmade, chunk};
    use saved_state::{Chunk, Encode};
    let chunks = chunks(state);
    let mut record: ChannelRecord = Chunk::alone(chunks[1], KINDS).unwrap().decode().unwrap();
    change(&mut record);
    let mut message = vec![0; Encode::encoded_len(&record)];
    record.encode(&mut message).unwrap();
    let handmade =
        Handmade { sequence: 1, kind: CHANNEL, version: 1, mandatory: true, last: false };
    let made = chunk(handmade, &message);
    let before = chunks[1].len();
    let mut state = [chunks[0], &made, &chunks[2..].concat()].concat();
    if made.len() != before {
        // The totals that the end states.
        let ranges = saved_state::testing::chunk_ranges(&state);
        let end = ranges.last().unwrap().clone();
        let record = saved_state::end::EndRecord {
            chunks: u32::try_from(ranges.len() - 1).unwrap(),
            bytes: end.start as u64,
        };
        let mut message = vec![0; Encode::encoded_len(&record)];
        record.encode(&mut message).unwrap();
        let handmade = Handmade {
            sequence: record.chunks,
            kind: saved_state::end::END,
            version: 1,
            mandatory: true,
            last: true,
        };
        state.truncate(end.start);
        state.extend(chunk(handmade, &message));
    }
    rechain(&mut state);
    state
}

/// The guest has opened the channel anew: what was in the old rings has nobody, what was queued is sent
/// into the new ones.
#[test]
fn a_channel_that_was_opened_anew_gets_only_what_was_queued() {
    for rings_first in [false, true] {
        let mut old = Kept::active();
        old.guest().send(5, 1);
        old.process();
        for pointer in 0..30 {
            send(&old.channel, pointer, &[9; 2000], &old.keeper.answers);
        }
        let (queued, in_flight) = old.channel.outgoing_in_use();
        let frozen = old.channel.freeze().unwrap();
        let state = saved(&old.channel);
        let mut next = old.successor();
        frozen.move_away();
        if rings_first {
            next.guest = None;
            next.channel.enable().unwrap();
            next.open();
            next.channel.restore_from(&state[..]).unwrap();
        } else {
            next.channel.restore_from(&state[..]).unwrap();
            next.channel.enable().unwrap();
            next.open();
        }
        let ended = next.keeper.answers.take();
        assert_eq!(ended.len(), in_flight, "{rings_first}");
        assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED));
        next.start();
        let mut sent = 0;
        while sent < queued {
            let read = next.guest().read();
            sent += read.len();
            assert!(!read.is_empty());
            next.process();
        }
        assert_eq!(next.keeper.take_again(), [], "the packet from the old ring is nobody's");
        assert_eq!(next.channel.outgoing_in_use(), (0, queued));
        next.end();
    }
}

/// Rings into which a state was restored go on: a state is not restored into them again.
#[test]
fn rings_are_restored_once() {
    let (mut kept, state) = moved(2);
    kept.channel.restore_from(&state[..]).unwrap();
    assert_eq!(all_complete(&mut kept).len(), 2);
    kept.channel.pause();
    // Stale by now: the rings have moved on.
    kept.channel.restore_from(&state[..]).unwrap();
    let ended = kept.keeper.answers.take();
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED));
    assert_eq!(ended.len(), 2);
    kept.send(6);
    let read = kept.guest().read();
    assert_eq!(read.len(), 1, "the ring is where it was: {read:?}");
    assert_eq!(all_complete(&mut kept).len(), 0);
    kept.end();
}

/// Packets sent between the coming of the rings and the restore would be written over: refused.
#[test]
fn rings_that_were_written_to_are_not_restored() {
    let (kept, state) = moved(2);
    let packet = packet(&kept.channel, 1, &kept.keeper.answers);
    packet.send(&[1; 8], None, SendFlags::empty()).unwrap();
    assert_eq!(kept.channel.outgoing_in_use(), (0, 0));
    let refused = kept.channel.restore_from_buffer(&state).unwrap_err();
    assert_eq!(refused, RestoreError::State { state: ChannelState::Paused });
    kept.end();
}

/// Save, restore, save again: the same bytes, before the rings have come and after.
#[test]
fn a_restored_channel_saves_the_same_bytes() {
    for rings_first in [false, true] {
        let mut old = Kept::active();
        for id in 0..4 {
            old.guest().send(id, 3);
        }
        old.process();
        (0..30).for_each(|pointer| old.send(pointer));
        // Two are completed, two handed over: then the channel rests, paused, with all of it waiting.
        let frozen = old.channel.freeze().unwrap();
        let first = saved(&old.channel);
        let next = old.successor();
        frozen.move_away();
        if rings_first {
            next.reopen(true);
        }
        next.channel.restore_from(&first[..]).unwrap();
        if !rings_first {
            next.channel.enable().unwrap();
        }
        let second = saved(&next.channel);
        assert_eq!(second, saved(&next.channel));
        let mut after = next;
        let third = {
            let next = after.successor();
            after.channel.freeze().unwrap().move_away();
            next.reopen(true);
            next.channel.restore_from(&second[..]).unwrap();
            let third = saved(&next.channel);
            after = next;
            third
        };
        assert_eq!(second, third, "{rings_first}");
        // What was saved by the first, which was Active and frozen, differs in nothing but that.
        let (first, second) = (chunks(&first), chunks(&second));
        assert_eq!(first.len(), second.len());
        let packets = 2..first.len() - 1;
        for (first, second) in first[packets.clone()].iter().zip(&second[packets]) {
            assert_eq!(first[..first.len() - 8], second[..second.len() - 8]);
        }
        after.start();
        after.process();
        assert_eq!(after.keeper.take_again().len(), 4);
        after.end();
    }
}

/// What the guest says of the rings while nobody is there is not believed: the channel goes on where the
/// state says, or is refused with what does not fit.
#[test]
fn a_guest_that_changes_the_rings_meanwhile_gains_nothing() {
    // Our own indices: the saved ones count.
    let (mut old, state) = state_of(2);
    assert_eq!(old.guest().read().len(), 2);
    let mut kept = old.successor();
    old.channel.freeze().unwrap().move_away();
    let index = kept.guest().peer.from_channel.word(Word::WriteIndex);
    for (lie, word) in [(index + 64, Word::WriteIndex), (0, Word::WriteIndex)] {
        kept.guest().peer.from_channel.set_word(word, lie);
    }
    kept.guest().peer.to_channel.set_word(Word::ReadIndex, 512);
    kept.reopen(true);
    kept.channel.restore_from(&state[..]).unwrap();
    assert_eq!(kept.guest().peer.from_channel.word(Word::WriteIndex), index);
    assert_eq!(kept.guest().peer.to_channel.word(Word::ReadIndex), 0);
    kept.end();

    // The guest's own: an index that is none stops the channel or refuses its rings, nothing more.
    for (ring, word, lie) in [
        ("read", Word::ReadIndex, 0xffff_fff8),
        ("read", Word::ReadIndex, 3),
        ("write", Word::WriteIndex, 0xffff_fff8),
        ("write", Word::WriteIndex, 5),
    ] {
        let (kept, state) = moved(1);
        let peer = &kept.guest.as_ref().unwrap().peer;
        if ring == "read" {
            peer.from_channel.set_word(word, lie);
        } else {
            peer.to_channel.set_word(word, lie);
        }
        match kept.channel.restore_from_buffer(&state) {
            Err(refused) => {
                assert!(matches!(refused, RestoreError::Ring { chunk: 1, .. }), "{refused}");
                assert_eq!(ring, "read");
                assert_eq!(kept.keeper.answers.take().len(), 1, "cancelled");
                is_untouched(&kept, "a bad index");
            }
            Ok(restored) => {
                assert_eq!((ring, restored), ("write", Restored::Complete));
                kept.start();
                kept.channel.process(8);
                let reason = kept.channel.stop_reason();
                assert!(matches!(reason, Some(ChannelError::Incoming(_))), "{reason:?}");
            }
        }
        kept.channel.disable();
    }
}

/// Room that was promised to completions has to be there still: a guest that takes its reading back
/// finds the channel refused, not overrun.
#[test]
fn promised_room_has_to_be_there() {
    let mut old = Kept::active();
    for id in 0..3 {
        old.guest().send(id, 1);
    }
    old.process();
    let frozen = old.channel.freeze().unwrap();
    let state = saved(&old.channel);
    let kept = old.successor();
    frozen.move_away();
    // All but a few bytes of the ring are unread, it says.
    let peer = &kept.guest.as_ref().unwrap().peer;
    peer.from_channel.set_word(Word::ReadIndex, 4096);
    kept.reopen(true);
    let refused = kept.channel.restore_from_buffer(&state).unwrap_err();
    assert!(
        matches!(refused, RestoreError::Room { chunk: 1, promised, free } if promised > free.into()),
        "{refused}"
    );
    is_untouched(&kept, "no room");
    // Nothing was taken from the pool: with an honest index it fits.
    let peer = &kept.guest.as_ref().unwrap().peer;
    peer.from_channel.set_word(Word::ReadIndex, 0);
    kept.channel.restore_from(&state[..]).unwrap();
    kept.start();
    kept.process();
    assert_eq!(kept.keeper.take_again().len(), 3);
    kept.end();
}

/// As many incoming packets as the pool has come back.
#[test]
fn a_whole_pool_comes_back() {
    const ALL: u32 = 20;
    let set_up = |channel: &Channel| {
        channel.init_set_maximum_packet_count(ALL).unwrap();
        channel.init_set_maximum_completion_size(64).unwrap();
    };
    let mut old = Kept::paused_with(set_up);
    old.start();
    for id in 0..u64::from(ALL) {
        old.guest().send(id, 2);
    }
    old.process();
    assert_eq!(old.channel.incoming_outstanding(), ALL);
    let frozen = old.channel.freeze().unwrap();
    let state = saved(&old.channel);
    let mut next = Kept::on(&old.bus, set_up);
    next.guest = old.guest.take();
    frozen.move_away();
    next.reopen(true);
    next.channel.restore_from(&state[..]).unwrap();
    next.start();
    next.process();
    let again = next.keeper.take_again();
    let order: Vec<_> = again.iter().map(|(_, _, payload)| u64::from(payload[0])).collect();
    assert_eq!(order, (0..u64::from(ALL)).collect::<Vec<_>>());
    next.keeper.take_held().into_iter().for_each(|packet| packet.complete(&[1; 8]));
    assert_eq!(next.guest().completions().len(), ALL as usize);
    // And are free for others.
    next.guest().send(100, 1);
    next.process();
    assert_eq!(next.keeper.take_held().len(), 1);
    next.channel.disable();
}

/// A channel that had stopped is stopped where it is restored.
#[test]
fn a_stopped_channel_comes_back_stopped() {
    let mut old = Kept::active();
    old.guest().send(1, 1);
    old.process();
    old.keeper.take_held().into_iter().for_each(kmcl::IncomingPacket::fail);
    assert_eq!(old.channel.stop_reason(), Some(ChannelError::PacketFailed));
    let frozen = old.channel.freeze().unwrap();
    let state = saved(&old.channel);
    let next = old.successor();
    frozen.move_away();
    next.reopen(true);
    next.channel.restore_from(&state[..]).unwrap();
    assert_eq!(next.channel.stop_reason(), Some(ChannelError::BeforeRestore));
    next.end();
}

/// A restore whose rings never come is undone when the channel is disabled.
#[test]
fn a_restore_whose_rings_never_come_ends_with_the_channel() {
    let mut old = Kept::active();
    old.guest().send(1, 1);
    old.process();
    (0..3).for_each(|pointer| old.send(pointer));
    let frozen = old.channel.freeze().unwrap();
    let state = saved(&old.channel);
    let next = old.successor();
    frozen.move_away();
    next.channel.enable().unwrap();
    next.channel.restore_from(&state[..]).unwrap();
    assert!(next.channel.restore().is_err(), "it has packets");
    next.channel.disable();
    let ended = next.keeper.answers.take();
    assert_eq!(ended.len(), 3);
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED));
    is_untouched(&next, "disabled");
    next.channel.restore_from(&state[..]).unwrap();
    next.end();
}
