//! VmbChannelRestoreFromBuffer, EvtVmbChannelRestorePacket and VmbPacketRestore: every status and its
//! condition, the decisions D-5, D-19 and D-23 to D-31, and that a restore is all or nothing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::sync::{Arc, Mutex};

use common::keeper::{Asked, Kept, Trickle, bring_back, chunks, saved};
use common::raw::as_bus;
use common::{Answers, Device, Pair, lock, packet, send};
use kmcl::{
    Channel, ChannelError, ChannelState, Error, NtStatus, Packet, ReadError, RestoreError,
    RestoreFromError, Restored, SendFlags, ServerFlags,
};
use saved_state::Damage;
use saved_state::testing::rechain;
use vmbus_ring::Word;

/// A state with so many packets in flight, and the guest that has them.
fn state_of(outgoing: usize) -> (Kept, Vec<u8>) {
    let kept = Kept::paused();
    (0..outgoing).for_each(|pointer| kept.send(pointer));
    let state = saved(&kept.channel);
    (kept, state)
}

/// The channel in another process: its rings have come, nothing is restored yet.
fn successor(mut kept: Kept) -> Kept {
    let next = kept.successor();
    kept.channel.freeze().unwrap().move_away();
    assert_eq!(kept.keeper.answers.take(), [], "they end elsewhere");
    next.reopen(true);
    next
}

/// A successor of a channel with so many packets, and its state.
fn moved(outgoing: usize) -> (Kept, Vec<u8>) {
    let (kept, state) = state_of(outgoing);
    (successor(kept), state)
}

/// As a channel is before anything was restored, and after everything was undone.
fn is_untouched(kept: &Kept, what: &str) {
    assert_eq!(kept.channel.outgoing_in_use(), (0, 0), "{what}");
    assert_eq!(kept.channel.incoming_outstanding(), 0, "{what}");
    assert_eq!(kept.channel.stop_reason(), None, "{what}");
}

/// The guest completes all that is in its ring; the server starts and hears of it.
fn all_complete(kept: &mut Kept) -> Vec<common::Answer> {
    if kept.channel.state() != ChannelState::Active {
        kept.start();
    }
    for read in kept.guest().read() {
        kept.guest().complete(read.transaction_id, &[7; 8]);
    }
    kept.process();
    kept.keeper.answers.take()
}

/// STATUS_SUCCESS with the final chunk, STATUS_MORE_PROCESSING_REQUIRED before: pieces, and joins of
/// consecutive pieces, of whole chunks.
#[test]
fn whole_chunks_come_in_any_pieces() {
    for per_buffer in [1, 2, 3, 100] {
        let (mut kept, state) = moved(5);
        let chunks = chunks(&state);
        let pieces: Vec<_> = chunks.chunks(per_buffer).map(<[_]>::concat).collect();
        for (at, piece) in pieces.iter().enumerate() {
            let restored = kept.channel.restore_from_buffer(piece).unwrap();
            let last = at + 1 == pieces.len();
            let expected = if last { Restored::Complete } else { Restored::More };
            assert_eq!(restored, expected);
            let status = if last { NtStatus::SUCCESS } else { NtStatus::MORE_PROCESSING_REQUIRED };
            assert_eq!(restored.status(), status);
            assert_eq!(kept.channel.outgoing_in_use().1, if last { 5 } else { 0 });
        }
        assert_eq!(all_complete(&mut kept).len(), 5);
        kept.end();
    }
}

/// The conveniences: a session, and any `Read`, however little it gives at a time.
#[test]
fn a_session_and_a_read_restore_as_well() {
    for most in [1, 7, 4096] {
        let (mut kept, state) = moved(3);
        kept.channel.restore_from(Trickle(&state, most)).unwrap();
        assert_eq!(all_complete(&mut kept).len(), 3);
        kept.end();
    }
    let (kept, state) = moved(3);
    let mut restore = kept.channel.restore().unwrap();
    for chunk in chunks(&state) {
        let _more = restore.feed(chunk).unwrap();
    }
    assert!(restore.feed(&[]).is_err(), "it is over");
    drop(restore);
    assert_eq!(kept.channel.outgoing_in_use(), (0, 3));
    kept.end();
}

/// D-5: accepted in every state at rest, before the rings come and after; refused elsewhere, and while
/// packets are in use.
#[test]
fn a_channel_is_restored_while_it_rests_and_has_no_packets() {
    let refuses = |channel: &Channel, state: &[u8]| {
        let before = (channel.state(), channel.outgoing_in_use());
        let refused = channel.restore_from_buffer(state).unwrap_err();
        assert_eq!(refused, RestoreError::State { state: before.0 });
        assert_eq!(refused.status(), NtStatus::INVALID_DEVICE_STATE);
        assert!(channel.restore().is_err());
        assert_eq!((channel.state(), channel.outgoing_in_use()), before);
    };
    // Before enable, before the rings, and after them.
    for stage in 0..3 {
        let (mut old, state) = state_of(4);
        let next = old.successor();
        old.channel.freeze().unwrap().move_away();
        if stage == 1 {
            next.channel.enable().unwrap();
        }
        if stage == 2 {
            next.reopen(true);
        }
        assert_eq!(next.channel.restore_from_buffer(&state), Ok(Restored::Complete), "{stage}");
        assert_eq!(next.channel.outgoing_in_use(), (0, 4));
        refuses(&next.channel, &state);
        let mut next = next;
        if stage < 2 {
            next.reopen(true);
        }
        assert_eq!(next.channel.state(), ChannelState::Paused);
        assert_eq!(all_complete(&mut next).len(), 4);
        refuses(&next.channel, &state);
        next.channel.pause();
        next.send(1);
        refuses(&next.channel, &state);
        next.end();
    }
    // Closed: the offer stands.
    let (next, state) = moved(0);
    next.close();
    assert_eq!(next.channel.state(), ChannelState::Closed);
    assert_eq!(next.channel.restore_from_buffer(&state), Ok(Restored::Complete));
    next.end();
    // Frozen, or being saved.
    let (next, state) = moved(0);
    let frozen = next.channel.freeze().unwrap();
    refuses(&next.channel, &state);
    frozen.thaw();
    let save = next.channel.save().unwrap();
    refuses(&next.channel, &state);
    drop(save);
    assert_eq!(next.channel.restore_from_buffer(&state), Ok(Restored::Complete));
    next.end();
    // A client's.
    let pair = Pair::new(Device::new());
    refuses(&pair.client, &state);
}

/// D-5: a channel that is offered anew after the restore has no peer for what was in flight.
#[test]
fn packets_of_a_channel_that_is_offered_anew_are_cancelled() {
    let (mut old, state) = state_of(3);
    let flags = ServerFlags::FORCE_NEW_CHANNEL;
    let next = Kept::on(&old.bus, |channel| channel.server_init_set_flags(flags).unwrap());
    old.guest = None;
    assert_eq!(next.channel.restore_from_buffer(&state), Ok(Restored::Complete));
    let ended = next.keeper.answers.take();
    assert_eq!(ended.len(), 3);
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED));
    is_untouched(&next, "offered anew");
    old.end();
    next.end();
}

/// D-19: a chunk that is cut, unknown, damaged, missing, doubled, swapped or another channel's fails with
/// STATUS_INVALID_PARAMETER_2 before any callback of that chunk; the channel is as before (design:
/// all or nothing), and takes the right state then.
#[test]
fn a_wrong_chunk_is_refused_before_its_callback() {
    type Spoil = fn(&[&[u8]], &[&[u8]]) -> Vec<u8>;
    let rows: [(&str, Spoil, usize, RestoreError); 7] = [
        (
            "cut",
            |c, _| c.concat()[..c[..4].concat().len() - 1].to_vec(),
            1,
            RestoreError::Read(ReadError::Damaged {
                chunk: 3,
                offset: 0,
                why: Damage::Cut { needed: 0, available: 0 },
            }),
        ),
        (
            "no chunk",
            |c, _| [c[..4].concat(), b"what is this, some sort of a chunk?".to_vec()].concat(),
            2,
            RestoreError::Read(ReadError::Damaged {
                chunk: 4,
                offset: 0,
                why: Damage::Magic { found: *b"what" },
            }),
        ),
        (
            "missing",
            |c, _| [c[0], c[1], c[3], c[4], c[5]].concat(),
            0,
            RestoreError::Read(ReadError::Damaged {
                chunk: 2,
                offset: 0,
                why: Damage::Sequence { found: 3, expected: 2 },
            }),
        ),
        (
            "doubled",
            |c, _| [c[0], c[1], c[2], c[2], c[3], c[4], c[5]].concat(),
            1,
            RestoreError::Read(ReadError::Damaged {
                chunk: 3,
                offset: 0,
                why: Damage::Sequence { found: 2, expected: 3 },
            }),
        ),
        (
            "swapped",
            |c, _| [c[0], c[1], c[3], c[2], c[4], c[5]].concat(),
            0,
            RestoreError::Read(ReadError::Damaged {
                chunk: 2,
                offset: 0,
                why: Damage::Sequence { found: 3, expected: 2 },
            }),
        ),
        (
            "from another stream",
            |c, other| [c[0], c[1], c[2], other[3], c[4], c[5]].concat(),
            1,
            RestoreError::Read(ReadError::Damaged {
                chunk: 3,
                offset: 0,
                why: Damage::Chain { found: 0, expected: 0 },
            }),
        ),
        (
            "after the end",
            |c, _| [c.concat(), c[0].to_vec()].concat(),
            3,
            RestoreError::Read(ReadError::AfterEnd { offset: 0, bytes: 0 }),
        ),
    ];
    for (what, spoil, callbacks, expected) in rows {
        let (mut kept, state) = moved(3);
        let (other, other_state) = state_of(6);
        let spoilt = spoil(&chunks(&state), &chunks(&other_state));
        let refused = kept.channel.restore_from_buffer(&spoilt).unwrap_err();
        assert_eq!(shape(&refused), shape(&expected), "{what}: {refused}");
        assert_eq!(refused.status(), NtStatus::INVALID_PARAMETER_2, "{what}");
        assert_eq!(kept.keeper.take_asked().len(), callbacks, "{what}");
        let cancelled = kept.keeper.answers.take();
        assert_eq!(cancelled.len(), callbacks, "{what}");
        assert!(cancelled.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED));
        is_untouched(&kept, what);
        assert_eq!(kept.channel.restore_from_buffer(&state), Ok(Restored::Complete), "{what}");
        assert_eq!(all_complete(&mut kept).len(), 3, "{what}");
        other.end();
        kept.end();
    }
}

/// An error without the numbers that depend on lengths and checksums.
fn shape(error: &RestoreError) -> String {
    let text = format!("{error:?}");
    let quiet = ["offset", "needed", "available", "bytes"];
    let mut parts: Vec<_> = text
        .split(", ")
        .filter(|part| !quiet.iter().any(|name| part.trim_start().contains(&format!("{name}: "))))
        .map(str::to_owned)
        .collect();
    if text.contains("Chain") {
        parts.retain(|part| !part.contains("found") && !part.contains("expected"));
    }
    parts.concat()
}

/// The state of another channel is refused by its header.
#[test]
fn another_channels_state_is_refused() {
    let (old, state) = state_of(1);
    let next = Kept::on(&old.bus, |channel| {
        channel.server_init_set_target_interface_id(common::TYPE, common::raw::OTHER).unwrap();
    });
    let refused = next.channel.restore_from_buffer(&state).unwrap_err();
    assert!(matches!(refused, RestoreError::Read(ReadError::OtherInterface { .. })), "{refused}");
    assert_eq!(refused.status(), NtStatus::INVALID_PARAMETER_2);
    old.end();
    next.end();
}

/// D-23: a packet without private state comes back without any.
#[test]
fn private_state_comes_back_as_it_was_saved() {
    let (kept, state) = moved(3);
    kept.channel.restore_from(&state[..]).unwrap();
    let own: Vec<_> = kept
        .keeper
        .take_asked()
        .into_iter()
        .map(|asked| match asked {
            Asked::Restore(lib, own) => {
                assert_ne!(lib, 0);
                own
            }
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(own, [vec![], vec![1; 1], vec![2; 2]]);
    kept.end();
}

/// D-24: without callbacks a packet cannot be restored.
#[test]
fn a_packet_without_restore_callback_is_refused() {
    let (old, state) = state_of(1);
    let (empty, nothing) = state_of(0);
    let bare = |state: &[u8]| {
        let channel = common::server(&as_bus(&old.bus), &Device::new());
        channel.init_set_maximum_external_data(8192, 2).unwrap();
        channel.restore_from_buffer(state)
    };
    let refused = bare(&state).unwrap_err();
    assert_eq!(refused, RestoreError::NoCallback { chunk: 2 });
    assert_eq!(refused.status(), NtStatus::INVALID_DEVICE_STATE);
    assert_eq!(bare(&nothing), Ok(Restored::Complete), "there is nothing to call back for");
    old.end();
    empty.end();
}

/// D-25: completion routine and pointer are the driver's to set; without a routine the packet is freed.
#[test]
fn routine_and_pointer_are_what_the_driver_sets() {
    let (mut kept, state) = moved(2);
    kept.keeper.when_restored(|keeper, channel, lib, own| {
        let mut packet = channel.packet_allocate().unwrap();
        assert_eq!(packet.pointer(), 0);
        if own.is_empty() {
            packet.set_pointer(77);
            packet.set_completion_routine(Arc::clone(&keeper.answers) as _);
        }
        packet.restore(lib).unwrap();
        Ok(())
    });
    kept.channel.restore_from(&state[..]).unwrap();
    assert_eq!(kept.channel.outgoing_in_use(), (0, 2));
    let ended = all_complete(&mut kept);
    assert_eq!(ended, [(77, NtStatus::SUCCESS, vec![7; 8])]);
    assert_eq!(kept.channel.outgoing_in_use(), (0, 0));
    kept.end();
}

/// Design, promise 2, in the place of D-26: a callback that fails ends the restore with its status; what
/// came back before ends with STATUS_CANCELLED, and the channel is as it was before the first chunk.
#[test]
fn a_callback_that_fails_undoes_the_restore() {
    for (restores, fails_at) in [(false, 0), (false, 2), (true, 2), (true, 3)] {
        let (mut kept, state) = moved(4);
        kept.keeper.when_restored(move |keeper, channel, lib, own| {
            let fails = own.len() == fails_at;
            if !fails || restores {
                bring_back(keeper, channel, lib, own)?;
            }
            if fails { Err(NtStatus::NOT_SUPPORTED) } else { Ok(()) }
        });
        let refused = kept.channel.restore_from_buffer(&state).unwrap_err();
        let chunk = 2 + u32::try_from(fails_at).unwrap();
        let status = NtStatus::NOT_SUPPORTED;
        assert_eq!(refused, RestoreError::Driver { chunk, status });
        assert_eq!(refused.status(), status);
        let ended = kept.keeper.answers.take();
        assert_eq!(ended.len(), fails_at + usize::from(restores));
        assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED));
        is_untouched(&kept, "undone");
        // The same channel takes it once its driver can.
        kept.keeper.when_restored(bring_back);
        kept.channel.restore_from(&state[..]).unwrap();
        assert_eq!(all_complete(&mut kept).len(), 4);
        kept.end();
    }
}

/// A later chunk that never comes: the session is dropped, or the source ends. All is undone; what was
/// sent meanwhile goes out.
#[test]
fn a_restore_that_nobody_finishes_is_undone() {
    for from_read in [false, true] {
        let (mut kept, state) = moved(3);
        let most = chunks(&state)[..4].concat();
        if from_read {
            let refused = kept.channel.restore_from(&most[..]).unwrap_err();
            let RestoreFromError::State(refused) = refused else { panic!("{refused}") };
            let bytes = most.len() as u64;
            assert_eq!(refused, RestoreError::Read(ReadError::Unfinished { chunks: 4, bytes }));
        } else {
            let mut restore = kept.channel.restore().unwrap();
            assert_eq!(restore.feed(&most), Ok(Restored::More));
            assert!(kept.channel.restore().is_err(), "one at a time");
            assert!(kept.channel.save().is_err());
            assert!(kept.channel.freeze().is_err());
            kept.send(9);
            let read = kept.guest().read();
            assert!(read.iter().all(|read| read.payload != 9_usize.to_le_bytes()), "it waits");
            drop(restore);
            assert_eq!(kept.guest().read().len(), 1, "and is sent");
            assert_eq!(kept.channel.outgoing_in_use(), (0, 1));
        }
        let ended = kept.keeper.answers.take();
        assert_eq!(ended.len(), 2);
        assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::CANCELLED));
        kept.end();
    }
}

/// A channel that is started, or disabled, in the middle of a restore cannot be restored any more.
#[test]
fn a_restore_ends_where_the_channel_goes_on() {
    let (kept, state) = moved(3);
    let chunks = chunks(&state);
    assert_eq!(kept.channel.restore_from_buffer(&chunks[..4].concat()), Ok(Restored::More));
    kept.start();
    let refused = kept.channel.restore_from_buffer(&chunks[4..].concat()).unwrap_err();
    assert_eq!(refused, RestoreError::State { state: ChannelState::Active });
    assert_eq!(kept.keeper.answers.take().len(), 2, "cancelled");
    is_untouched(&kept, "started");
    kept.end();

    let (kept, state) = moved(3);
    let chunks = common::keeper::chunks(&state);
    let mut restore = kept.channel.restore().unwrap();
    assert_eq!(restore.feed(&chunks[..4].concat()), Ok(Restored::More));
    kept.channel.disable();
    assert_eq!(kept.keeper.answers.take().len(), 2, "cancelled");
    assert!(restore.feed(chunks[4]).is_err());
    kept.end();
}

/// D-27: a driver that does not bring its packet back gives the transaction up; the guest's completion of
/// it finds nobody.
#[test]
fn a_transaction_that_its_driver_gives_up_is_dropped() {
    let (mut kept, state) = moved(3);
    kept.keeper.when_restored(|keeper, channel, lib, own| {
        if own.len() == 1 { Ok(()) } else { bring_back(keeper, channel, lib, own) }
    });
    kept.channel.restore_from(&state[..]).unwrap();
    assert_eq!(kept.channel.outgoing_in_use(), (0, 2));
    let mut pointers: Vec<_> = all_complete(&mut kept).into_iter().map(|ended| ended.0).collect();
    pointers.sort_unstable();
    assert_eq!(pointers, [1000, 1002]);
    assert_eq!(kept.channel.stop_reason(), None);
    kept.end();
}

/// D-28: VmbPacketRestore on a packet that cannot be it, with a wrong size, or other bytes than those of
/// the callback; the packet comes back each time.
#[test]
fn only_the_bytes_of_the_callback_restore_a_packet() {
    let (kept, state) = moved(2);
    let elsewhere = Kept::disabled();
    let other = elsewhere.channel.clone();
    let foreign = chunks(&state)[3].to_vec(); // the other packet's
    kept.keeper.when_restored(move |keeper, channel, lib, own| {
        if own.len() == 1 {
            return bring_back(keeper, channel, lib, own);
        }
        let refused = |packet: Packet, lib: &[u8]| {
            let refused = packet.restore(lib).unwrap_err();
            drop(refused.packet);
            refused.error.status()
        };
        let mine = || channel.packet_allocate().unwrap();
        let theirs = other.packet_allocate().unwrap();
        assert_eq!(refused(theirs, lib), NtStatus::INVALID_PARAMETER_1, "another channel's");
        for len in [0, 1, lib.len() - 1] {
            assert_eq!(refused(mine(), &lib[..len]), NtStatus::INVALID_PARAMETER_3, "{len}");
        }
        assert_eq!(refused(mine(), &[lib, &[0]].concat()), NtStatus::INVALID_PARAMETER_3);
        let mut same_size = foreign.clone();
        same_size.resize(lib.len(), 0);
        assert_eq!(refused(mine(), &same_size), NtStatus::INVALID_PARAMETER_2, "another packet's");
        for bit in 0..lib.len() * 8 {
            let mut damaged = lib.to_vec();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(refused(mine(), &damaged), NtStatus::INVALID_PARAMETER_2, "bit {bit}");
        }
        let mut packet = mine();
        packet.set_completion_routine(Arc::clone(&keeper.answers) as _);
        let copy = lib.to_vec();
        packet.restore(&copy).unwrap();
        assert_eq!(refused(mine(), lib), NtStatus::INVALID_PARAMETER_2, "a second time");
        Ok(())
    });
    kept.channel.restore_from(&state[..]).unwrap();
    assert_eq!(kept.channel.outgoing_in_use(), (0, 2));
    let outside = kept.channel.packet_allocate().unwrap().restore(&state).unwrap_err();
    assert_eq!(outside.error.status(), NtStatus::INVALID_PARAMETER_1, "outside the callback");
    drop(outside);
    kept.end();
    elsewhere.end();
}

/// D-29: a newer version is STATUS_REVISION_MISMATCH, whatever else the state has.
#[test]
fn a_newer_version_is_refused_as_such() {
    let (kept, mut state) = moved(2);
    let (version, needs) = header_versions(&state);
    state[version..version + 2].copy_from_slice(&2_u16.to_le_bytes());
    state[needs..needs + 2].copy_from_slice(&2_u16.to_le_bytes());
    rechain(&mut state);
    let refused = kept.channel.restore_from_buffer(&state).unwrap_err();
    assert!(matches!(refused, RestoreError::Read(ReadError::Revision { .. })), "{refused}");
    assert_eq!(refused.status(), NtStatus::REVISION_MISMATCH);
    is_untouched(&kept, "newer");
    kept.end();
}

/// Where a header has its version, and that of the oldest reader: found by what is there, and by what
/// the reader says when it changes.
fn header_versions(state: &[u8]) -> (usize, usize) {
    let ones = (12..64).step_by(2).filter(|&at| state[at..at + 2] == [1, 0]);
    let ones: Vec<_> = ones.take(2).collect();
    (ones[0], ones[1])
}

/// D-31: what is restored is the library's client, the server's driver; a channel without packets in
/// flight restores without asking it anything.
#[test]
fn a_state_without_packets_asks_the_driver_nothing() {
    let (kept, state) = moved(0);
    kept.channel.restore_from(&state[..]).unwrap();
    assert_eq!(kept.keeper.take_asked(), []);
    kept.end();
}

/// A channel that was set up otherwise is refused, with what was different.
#[test]
fn a_channel_that_was_set_up_otherwise_is_refused() {
    type SetUp = fn(&Channel);
    let rows: [(&str, u64, u64, SetUp); 7] = [
        ("maximum_packet_size", 4096, 2048, |channel| {
            channel.init_set_maximum_packet_size(2048).unwrap();
        }),
        ("maximum_external_data", 8192, 4096, |channel| {
            channel.init_set_maximum_external_data(4096, 2).unwrap();
        }),
        ("maximum_external_ranges", 2, 3, |channel| {
            channel.init_set_maximum_external_data(8192, 3).unwrap();
        }),
        ("maximum_completion_size", 4096, 64, |channel| {
            channel.init_set_maximum_completion_size(64).unwrap();
        }),
        ("maximum_packet_count", 256, 12, |channel| {
            channel.init_set_maximum_packet_count(12).unwrap();
        }),
        ("client_context_size", 0, 16, |channel| {
            channel.init_set_client_context_size(16).unwrap();
        }),
        ("pipe", 0, 1, |channel| {
            channel.server_init_set_flags(ServerFlags::OFFER_AS_PIPE).unwrap();
        }),
    ];
    let (old, state) = state_of(1);
    for (setting, saved, here, set_up) in rows {
        let next = Kept::on(&old.bus, set_up);
        let refused = next.channel.restore_from_buffer(&state).unwrap_err();
        assert_eq!(refused, RestoreError::Setting { chunk: 1, setting, saved, here });
        assert_eq!(refused.status(), NtStatus::INVALID_PARAMETER_2);
        let text = refused.to_string();
        assert!(text.contains("chunk 1") && text.contains("channel.channel"), "{text}");
        assert_eq!(next.keeper.take_asked(), []);
        next.end();
    }
    old.end();
}

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

/// Queued packets go out before new ones, in their order, once the channel may send.
#[test]
fn queued_packets_come_before_new_ones() {
    let mut old = Kept::paused();
    for pointer in 0..30_usize {
        send(&old.channel, pointer, &[pointer.to_le_bytes(); 250].concat(), &old.keeper.answers);
    }
    let (queued, in_flight) = old.channel.outgoing_in_use();
    assert!(queued > 0);
    let state = saved(&old.channel);
    let mut next = successor({
        let mut read = old.guest().read();
        assert_eq!(read.len(), in_flight);
        read.clear();
        old
    });
    let mut restore = next.channel.restore().unwrap();
    next.send(100); // during the restore
    for chunk in chunks(&state) {
        let _more = restore.feed(chunk).unwrap();
    }
    drop(restore);
    next.send(101);
    let mut order = Vec::new();
    loop {
        let read = next.guest().read();
        if read.is_empty() {
            break;
        }
        order.extend(read.iter().map(|read| read.payload[0]));
        next.channel.process(64);
    }
    let expected: Vec<_> =
        (in_flight..30).chain([100, 101]).map(|n| u8::try_from(n).unwrap()).collect();
    assert_eq!(order, expected);
    assert_eq!(next.channel.outgoing_in_use(), (0, 32));
    next.end();
}

/// Packets that asked for no completion are queued and sent, and end when they are in the ring.
#[test]
fn queued_packets_without_a_completion_end_in_the_ring() {
    let old = Kept::paused();
    let mut queued = 0;
    while old.channel.outgoing_in_use().0 < 3 {
        let packet = packet(&old.channel, queued, &old.keeper.answers);
        packet.send(&[1; 4000], None, SendFlags::empty()).unwrap();
        queued += 1;
    }
    let state = saved(&old.channel);
    old.keeper.answers.take();
    let mut next = successor(old);
    next.channel.restore_from(&state[..]).unwrap();
    assert_eq!(next.channel.outgoing_in_use(), (3, 0));
    while next.channel.outgoing_in_use().0 != 0 {
        next.guest().read();
        next.channel.process(8);
    }
    let ended = next.keeper.answers.take();
    assert_eq!(ended.len(), 3);
    assert!(ended.iter().all(|(_, status, _)| *status == NtStatus::SUCCESS));
    next.end();
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

/// A driver's callback that panics leaves a channel that can be restored.
#[test]
fn a_callback_that_panics_undoes_the_restore() {
    let (mut kept, state) = moved(3);
    kept.keeper.when_restored(|keeper, channel, lib, own| {
        bring_back(keeper, channel, lib, own)?;
        assert!(own.len() < 2, "on purpose");
        Ok(())
    });
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        kept.channel.restore_from_buffer(&state)
    }));
    assert!(panicked.is_err());
    assert_eq!(kept.keeper.answers.take().len(), 3, "cancelled, the last one too");
    is_untouched(&kept, "panicked");
    kept.keeper.when_restored(bring_back);
    kept.channel.restore_from(&state[..]).unwrap();
    assert_eq!(all_complete(&mut kept).len(), 3);
    kept.end();
}

/// Inside the restore callback nothing of the channel's life can be begun; the restore goes on.
#[test]
fn nothing_is_begun_inside_a_restore_callback() {
    let (kept, state) = moved(2);
    let refusals = Arc::new(Mutex::new(Vec::new()));
    kept.keeper.when_restored({
        let (refusals, state) = (refusals.clone(), state.clone());
        move |keeper, channel, lib, own| {
            let mut refusals = lock(&refusals);
            refusals.push(channel.save().unwrap_err().status());
            refusals.push(channel.freeze().unwrap_err().status());
            refusals.push(channel.restore().unwrap_err().status());
            refusals.push(channel.restore_from_buffer(&state).unwrap_err().status());
            bring_back(keeper, channel, lib, own)
        }
    });
    kept.channel.restore_from(&state[..]).unwrap();
    assert_eq!(*lock(&refusals), [NtStatus::INVALID_DEVICE_STATE; 8]);
    assert_eq!(kept.channel.outgoing_in_use(), (0, 2));
    kept.end();
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

/// The loopback bus, end to end: a synchronous request is not taken along, it ends with its channel.
#[test]
fn a_request_that_a_thread_waits_for_is_not_saved() {
    let pair = Pair::open(Device::new());
    pair.server.pause();
    let answers = Arc::new(Answers::default());
    send(&pair.server, 3, &[1; 8], &answers);
    let state = saved(&pair.server);
    assert_eq!(chunks(&state).len(), 4);
    let error = pair.server.send_synchronous_request(
        &[1; 8],
        None,
        SendFlags::WAIT_FOR_COMPLETION,
        None,
        kmcl::Timeout::Immediate,
    );
    assert!(matches!(error, Err(Error::Argument { position: 5, .. })), "a server has none (D-48)");
    pair.server.start();
    pair.pump();
    assert_eq!(answers.take().len(), 1);
    pair.close();
}
