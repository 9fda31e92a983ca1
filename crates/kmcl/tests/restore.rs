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

use common::keeper::{
    Asked, Kept, Trickle, all_complete, bring_back, chunks, is_untouched, moved, saved, state_of,
    successor,
};
use common::raw::as_bus;
use common::{Answers, Device, Pair, lock, packet, send};
use kmcl::{
    Channel, ChannelState, Error, NtStatus, Packet, ReadError, RestoreError, RestoreFromError,
    Restored, SendFlags, ServerFlags,
};
use saved_state::Damage;
use saved_state::testing::rechain;

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
