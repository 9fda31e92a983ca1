//! Every lie that a control message can tell, each in its own row: it is refused with its numbers,
//! answered where a guest waits for an answer, and changes nothing; the rest of the bus works on.

use vmbus_host::limits::{
    MAX_GPADLS_PER_CHANNEL, MAX_HVSOCK_REQUESTS, MAX_INCOMPLETE_GPADLS, MAX_WAITING_MESSAGES,
};
use vmbus_host::{Channel, Config, GpadlRefusal, OfferId, PostError, Refusal, RingRefusal, Usage};
use vmbus_wire::message::{GpadlError, MessageError, MessageType};
use vmbus_wire::ranges::RangeError;
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::Version;

use crate::bytes::*;
use crate::machine::*;

/// The ring of the channel that must not notice.
const BYSTANDER_RING: u32 = 0x200;
const INSUFFICIENT_RESOURCES: u32 = 0xc000_009a;
const PAGES: [u64; 8] = [10, 11, 12, 13, 20, 21, 22, 23];

/// A guest of 6.0 with all features and channels 1, 2 and 3, of which 2 is open.
fn guest() -> (Machine, Vec<OfferId>) {
    let (mut machine, offers) = Machine::connected_v6(3);
    machine.create_gpadl(2, BYSTANDER_RING, &PAGES);
    machine.ok(&v6_open(2, BYSTANDER_RING, 0, 4));
    machine.effects();
    machine.open_result(offers[1], NtStatus::SUCCESS);
    machine.messages();
    (machine, offers)
}

/// OPEN_CHANNEL with the signals that the channel would have anyway.
fn v6_open(channel: u32, gpadl: u32, vp: u32, offset: u32) -> Vec<u8> {
    v6_open_by(
        channel,
        gpadl,
        vp,
        offset,
        0x2000 | channel,
        u16::try_from(channel & 0xffff).unwrap(),
    )
}

fn v6_open_by(
    channel: u32,
    gpadl: u32,
    vp: u32,
    offset: u32,
    connection: u32,
    flag: u16,
) -> Vec<u8> {
    open_v2(open(channel, 0x99, gpadl, vp, offset), connection, flag)
}

/// What must not change when a message is refused.
fn essence(machine: &Machine) -> (Usage, Vec<(OfferId, Channel)>) {
    let channels = machine.host.channels().map(|(id, channel)| (id, channel.clone())).collect();
    (Usage { messages: 0, ..machine.host.usage() }, channels)
}

struct Row {
    name: &'static str,
    /// What happens before.
    before: fn(&mut Machine, &[OfferId]),
    lie: Vec<u8>,
    refusal: Refusal,
    answers: Vec<Vec<u8>>,
}

fn nothing(_: &mut Machine, _: &[OfferId]) {}

/// Runs the rows; `changes`: the lie is found out at the end of something, which then ends.
#[track_caller]
fn refused(rows: Vec<Row>, changes: bool) {
    for Row { name, before, lie, refusal, answers } in rows {
        let (mut machine, offers) = guest();
        before(&mut machine, &offers);
        machine.effects();
        machine.messages();
        let essence_before = essence(&machine);

        let result = machine.post(&lie);
        assert_eq!(result, Err(PostError::Refused(refusal)), "{name}");
        assert_eq!(result.unwrap_err().hypercall_status(), 0, "{name}");
        assert_eq!(machine.messages(), answers, "{name}");
        assert_eq!(machine.effects(), [], "{name}");
        if !changes {
            assert_eq!(essence(&machine), essence_before, "{name}");
        }

        // The other channels work on, and so does the bus.
        machine.close(offers[1], 2, BYSTANDER_RING);
        machine.create_gpadl(2, BYSTANDER_RING, &PAGES);
        machine.ok(&v6_open(2, BYSTANDER_RING, 0, 4));
        let hot = machine.offer(77);
        machine.open_result(offers[1], NtStatus::SUCCESS);
        assert_eq!(machine.messages().len(), 2, "{name}");
        machine.revoke(hot);
        machine.messages();
        machine.wind_down();
    }
}

fn gpadl_refusal(message: MessageType, gpadl: u32, reason: GpadlRefusal) -> Refusal {
    Refusal::Gpadl { message, gpadl, reason }
}

/// A row about GPADL_HEADER for GPADL 5 of channel 1.
fn header(name: &'static str, lie: Vec<u8>, reason: GpadlRefusal, status: u32) -> Row {
    let refusal = gpadl_refusal(MessageType::GpadlHeader, 5, reason);
    Row { name, before: nothing, lie, refusal, answers: vec![gpadl_created(1, 5, status)] }
}

#[test]
fn lies_about_gpadls() {
    let whole = |count: u16, words: &[u64]| gpadl_messages(1, 5, count, words).remove(0);
    let range = |error: RangeError| GpadlRefusal::from(error);
    let bad = INVALID_PARAMETER;
    let rows = vec![
        header(
            "no ranges",
            gpadl_header(1, 5, 16, 0, &[4096, 1]),
            GpadlError::NoRanges.into(),
            bad,
        ),
        header(
            "a length that is no multiple of 8",
            gpadl_header(1, 5, 17, 1, &[4096, 1]),
            GpadlError::OddLength { range_buflen: 17 }.into(),
            bad,
        ),
        header(
            "a length of nothing",
            gpadl_header(1, 5, 0, 1, &[]),
            GpadlError::TooShort { range_buflen: 0, range_count: 1 }.into(),
            bad,
        ),
        header(
            "more ranges than the length can hold",
            gpadl_header(1, 5, 40, u16::MAX, &[4096, 1, 4096, 2, 3]),
            GpadlError::TooShort { range_buflen: 40, range_count: u16::MAX }.into(),
            bad,
        ),
        header(
            "a range of no bytes",
            whole(1, &[0, 1]),
            range(RangeError::Empty { range: 0 }),
            bad,
        ),
        header(
            "a range that starts behind its first page",
            whole(1, &[1 | 4096 << 32, 1, 2]),
            range(RangeError::ByteOffset { range: 0, byte_offset: 4096 }),
            bad,
        ),
        header(
            "a range whose end overflows",
            whole(1, &[0xffff_ffff | 1 << 32, 1]),
            range(RangeError::Overflow { range: 0, byte_count: u32::MAX, byte_offset: 1 }),
            bad,
        ),
        header(
            "a page too few",
            whole(1, &[4097, 1]),
            range(RangeError::Truncated { range: 0, pages: 2, words: 1 }),
            bad,
        ),
        header(
            "a page too many",
            whole(1, &[4096, 1, 2]),
            range(RangeError::TrailingWords { words: 1 }),
            bad,
        ),
        header(
            "a second range that is missing",
            whole(2, &[3 * 4096, 1, 2, 3]),
            range(RangeError::Truncated { range: 1, pages: 1, words: 0 }),
            bad,
        ),
        header(
            "a page whose address overflows",
            whole(1, &[4096, 1 << 52]),
            range(RangeError::Pfn { range: 0, pfn: 1 << 52 }),
            bad,
        ),
        header(
            "a page in a hole of the RAM",
            whole(1, &[8192, 1, NOT_RAM]),
            GpadlRefusal::NotRam { pfn: NOT_RAM },
            bad,
        ),
        header(
            "the page behind the RAM",
            whole(1, &[8192, 4095, 4096]),
            GpadlRefusal::NotRam { pfn: 4096 },
            bad,
        ),
        Row {
            before: |machine, _| machine.create_gpadl(1, 5, &[1]),
            ..header("an id that is taken", whole(1, &[4096, 1]), GpadlRefusal::Duplicate, bad)
        },
        Row {
            before: |machine, _| machine.ok(&gpadl_header(1, 5, 24, 1, &[8192])),
            ..header("an id that is arriving", whole(1, &[4096, 1]), GpadlRefusal::Duplicate, bad)
        },
        Row {
            before: |machine, _| machine.ok(&gpadl_header(3, 5, 24, 1, &[8192])),
            ..header(
                "an id under which another channel's bodies arrive",
                gpadl_header(1, 5, 24, 1, &[8192]),
                GpadlRefusal::IdBusy,
                bad,
            )
        },
        Row {
            before: |machine, _| {
                for id in 0..MAX_GPADLS_PER_CHANNEL {
                    machine.create_gpadl(1, 0x1000 + u32::try_from(id).unwrap(), &[1]);
                }
            },
            ..header(
                "more GPADLs than a channel may have",
                whole(1, &[4096, 1]),
                GpadlRefusal::TooManyOfChannel { count: MAX_GPADLS_PER_CHANNEL },
                INSUFFICIENT_RESOURCES,
            )
        },
    ];
    refused(rows, false);
}

#[test]
fn lies_in_gpadl_bodies_and_teardowns() {
    let body = |reason| gpadl_refusal(MessageType::GpadlBody, 5, reason);
    let teardown = |reason| gpadl_refusal(MessageType::GpadlTeardown, 5, reason);
    let begin: fn(&mut Machine, &[OfferId]) =
        |machine, _| machine.ok(&gpadl_header(1, 5, 24, 1, &[8192]));
    let row = |name, before, lie, refusal, answers| Row { name, before, lie, refusal, answers };
    let rows = vec![
        row(
            "a body for nothing",
            nothing,
            gpadl_body(5, &[1]),
            body(GpadlRefusal::NoHeader),
            vec![],
        ),
        row("a body of no words", begin, gpadl_body(5, &[]), body(GpadlRefusal::EmptyBody), vec![]),
        row(
            "a body for a whole GPADL",
            |machine, _| machine.create_gpadl(1, 5, &[1]),
            gpadl_body(5, &[1]),
            body(GpadlRefusal::NoHeader),
            vec![],
        ),
        row(
            "taking back what never was",
            nothing,
            gpadl_teardown(1, 5),
            teardown(GpadlRefusal::Unknown),
            vec![gpadl_torndown(5)],
        ),
        row(
            "taking back another channel's GPADL",
            |machine, _| machine.create_gpadl(3, 5, &[1]),
            gpadl_teardown(1, 5),
            teardown(GpadlRefusal::Unknown),
            vec![gpadl_torndown(5)],
        ),
        row(
            "taking back what has not arrived",
            begin,
            gpadl_teardown(1, 5),
            teardown(GpadlRefusal::Incomplete { have: 1, total: 3 }),
            vec![],
        ),
        row(
            "taking a ring back twice",
            |machine, offers| {
                machine.create_gpadl(1, 5, &PAGES);
                machine.ok(&v6_open(1, 5, 0, 4));
                machine.open_result(offers[0], NtStatus::SUCCESS);
                machine.ok(&gpadl_teardown(1, 5));
            },
            gpadl_teardown(1, 5),
            teardown(GpadlRefusal::TearingDown),
            vec![],
        ),
    ];
    refused(rows, false);
    // The last body shows that all of it is wrong: the GPADL is gone, and the guest told.
    let rows = vec![row(
        "a page that is not RAM, at the end",
        begin,
        gpadl_body(5, &[1, NOT_RAM]),
        body(GpadlRefusal::NotRam { pfn: NOT_RAM }),
        vec![gpadl_created(1, 5, INVALID_PARAMETER)],
    )];
    refused(rows, true);
}

#[test]
fn lies_about_rings() {
    let bad_ring = |reason| Refusal::Ring { channel_id: 1, gpadl: 5, reason };
    let answers = || vec![open_result(1, 0x99, INVALID_PARAMETER)];
    let row = |name, before, lie, reason| Row {
        name,
        before,
        lie,
        refusal: bad_ring(reason),
        answers: answers(),
    };
    let ring: fn(&mut Machine, &[OfferId]) = |machine, _| machine.create_gpadl(1, 5, &PAGES);
    let split = |offset| RingRefusal::Split { offset, pages: 8 };
    let rows = vec![
        row("no such GPADL", nothing, v6_open(1, 5, 0, 4), GpadlRefusal::Unknown.into()),
        row(
            "another channel's GPADL",
            |machine, _| machine.create_gpadl(3, 5, &PAGES),
            v6_open(1, 5, 0, 4),
            GpadlRefusal::Unknown.into(),
        ),
        row(
            "a GPADL that has not arrived",
            |machine, _| machine.ok(&gpadl_header(1, 5, 8 * 9, 1, &[8 * 4096, 1, 2, 3, 4])),
            v6_open(1, 5, 0, 4),
            GpadlRefusal::Incomplete { have: 5, total: 9 }.into(),
        ),
        row(
            "several ranges",
            |machine, _| machine.all_ok(&gpadl_messages(1, 5, 2, &[8192, 1, 2, 8192, 3, 4])),
            v6_open(1, 5, 0, 2),
            RingRefusal::Ranges { ranges: 2 },
        ),
        row(
            "a range that starts inside a page",
            |machine, _| {
                machine.all_ok(&gpadl_messages(1, 5, 1, &[16384 | 8 << 32, 1, 2, 3, 4, 6]));
            },
            v6_open(1, 5, 0, 2),
            RingRefusal::Unaligned { byte_count: 16384, byte_offset: 8 },
        ),
        row(
            "a range that ends inside a page",
            |machine, _| machine.all_ok(&gpadl_messages(1, 5, 1, &[16383, 1, 2, 3, 4])),
            v6_open(1, 5, 0, 2),
            RingRefusal::Unaligned { byte_count: 16383, byte_offset: 0 },
        ),
        row("no first ring", ring, v6_open(1, 5, 0, 0), split(0)),
        row("a first ring of no data", ring, v6_open(1, 5, 0, 1), split(1)),
        row("a second ring of no data", ring, v6_open(1, 5, 0, 7), split(7)),
        row("no second ring", ring, v6_open(1, 5, 0, 8), split(8)),
        row("a split behind the end", ring, v6_open(1, 5, 0, 9), split(9)),
        row("a split far behind the end", ring, v6_open(1, 5, 0, u32::MAX), split(u32::MAX)),
        row(
            "a GPADL that is being taken back",
            |machine, offers| {
                machine.create_gpadl(1, 5, &PAGES);
                machine.ok(&v6_open(1, 5, 0, 4));
                machine.open_result(offers[0], NtStatus::SUCCESS);
                machine.ok(&close(1));
                machine.ok(&gpadl_teardown(1, 5));
            },
            v6_open(1, 5, 0, 4),
            GpadlRefusal::TearingDown.into(),
        ),
    ];
    refused(rows, false);
}

#[test]
fn lies_about_channels_and_processors() {
    let state = |message, channel_id, state| Refusal::ChannelState { message, channel_id, state };
    let ring: fn(&mut Machine, &[OfferId]) = |machine, _| machine.create_gpadl(1, 5, &PAGES);
    let signals = |connection_id, event_flag| Refusal::SignalParameters {
        channel_id: 1,
        connection_id,
        event_flag,
    };
    let row = |name, before, lie, refusal, answers| Row { name, before, lie, refusal, answers };
    let not_opened = || vec![open_result(1, 0x99, INVALID_PARAMETER)];
    let vp = |message, vp| Refusal::Vp { message, vp, vp_count: VP_COUNT };
    use MessageType as M;
    let rows = vec![
        row("a VP too many", ring, v6_open(1, 5, 4, 4), vp(M::OpenChannel, 4), not_opened()),
        row(
            "nearly no interrupts",
            ring,
            v6_open(1, 5, u32::MAX - 1, 4),
            vp(M::OpenChannel, u32::MAX - 1),
            not_opened(),
        ),
        row("connection 0", ring, v6_open_by(1, 5, 0, 4, 0, 1), signals(0, 1), not_opened()),
        row("the message port", ring, v6_open_by(1, 5, 0, 4, 4, 1), signals(4, 1), not_opened()),
        row(
            "a connection of 25 bits",
            ring,
            v6_open_by(1, 5, 0, 4, 1 << 24, 1),
            signals(1 << 24, 1),
            not_opened(),
        ),
        row(
            "another channel's connection",
            ring,
            v6_open_by(1, 5, 0, 4, 0x2002, 1),
            signals(0x2002, 1),
            not_opened(),
        ),
        row("flag 0", ring, v6_open_by(1, 5, 0, 4, 9, 0), signals(9, 0), not_opened()),
        row(
            "a flag too high",
            ring,
            v6_open_by(1, 5, 0, 4, 9, 2048),
            signals(9, 2048),
            not_opened(),
        ),
        row(
            "opening what is open",
            nothing,
            v6_open(2, BYSTANDER_RING, 0, 4),
            state(M::OpenChannel, 2, "open"),
            vec![open_result(2, 0x99, INVALID_PARAMETER)],
        ),
        row(
            "opening what is opening",
            |machine, _| {
                machine.create_gpadl(1, 5, &PAGES);
                machine.ok(&v6_open(1, 5, 0, 4));
            },
            v6_open(1, 5, 0, 4),
            state(M::OpenChannel, 1, "opening"),
            not_opened(),
        ),
        row(
            "closing what is closed",
            nothing,
            close(1),
            state(M::CloseChannel, 1, "closed"),
            vec![],
        ),
        row(
            "closing what is opening",
            |machine, _| {
                machine.create_gpadl(1, 5, &PAGES);
                machine.ok(&v6_open(1, 5, 0, 4));
            },
            close(1),
            state(M::CloseChannel, 1, "opening"),
            vec![],
        ),
        row(
            "a release too early",
            nothing,
            release(1),
            state(M::RelIdReleased, 1, "not rescinded"),
            vec![],
        ),
        row(
            "a second release",
            |machine, offers| {
                machine.revoke(offers[0]);
                machine.ok(&release(1));
            },
            release(1),
            Refusal::UnknownChannel { message: M::RelIdReleased, channel_id: 1 },
            vec![],
        ),
        row(
            "moving the interrupts of what is closed",
            nothing,
            modify(1, 1),
            state(M::ModifyChannel, 1, "closed"),
            vec![modified(1, INVALID_PARAMETER)],
        ),
        row(
            "interrupts to no VP",
            nothing,
            modify(2, u32::MAX),
            vp(M::ModifyChannel, u32::MAX),
            vec![modified(2, INVALID_PARAMETER)],
        ),
        row(
            "interrupts to a VP too many",
            nothing,
            modify(2, 4),
            vp(M::ModifyChannel, 4),
            vec![modified(2, INVALID_PARAMETER)],
        ),
        row(
            "interrupts moved again before the answer",
            |machine, _| machine.ok(&modify(2, 1)),
            modify(2, 3),
            Refusal::ModifyTwice { channel_id: 2 },
            vec![],
        ),
        row(
            "a reserved channel answered by a VP too many",
            ring,
            open_reserved(1, 4, 2, 5, 4),
            vp(M::OpenReservedChannel, 4),
            vec![],
        ),
        row(
            "a reserved channel answered by SINT 16",
            ring,
            open_reserved(1, 0, 16, 5, 4),
            Refusal::Sint { message: M::OpenReservedChannel, sint: 16 },
            vec![],
        ),
        row(
            "a reserved channel where one is open",
            nothing,
            open_reserved(2, 0, 2, BYSTANDER_RING, 4),
            state(M::OpenReservedChannel, 2, "open"),
            vec![open_result(2, 0, INVALID_PARAMETER)],
        ),
        row(
            "closing an ordinary channel as a reserved one",
            nothing,
            close_reserved(2, 0, 2),
            state(M::CloseReservedChannel, 2, "open"),
            vec![],
        ),
        row(
            "closing a reserved channel as an ordinary one",
            |machine, offers| {
                machine.create_gpadl(1, 5, &PAGES);
                machine.ok(&open_reserved(1, 0, 2, 5, 4));
                machine.open_result(offers[0], NtStatus::SUCCESS);
            },
            close(1),
            state(M::CloseChannel, 1, "reserved"),
            vec![],
        ),
        row(
            "a reserved channel closed to SINT 256",
            nothing,
            close_reserved(1, 0, 256),
            Refusal::Sint { message: M::CloseReservedChannel, sint: 256 },
            vec![],
        ),
    ];
    refused(rows, false);
}

#[test]
fn lies_about_the_connection() {
    let row = |name, before, lie, refusal, answers| Row { name, before, lie, refusal, answers };
    let (endpoint, service) = (instance(1), instance(2));
    let rows = vec![
        row(
            "offers wanted twice",
            nothing,
            request_offers(),
            Refusal::OffersRequestedTwice,
            vec![],
        ),
        row(
            "one monitor page",
            nothing,
            modify_connection(0, 4096),
            Refusal::MonitorPages {
                message: MessageType::ModifyConnection,
                parent_to_child: 0,
                child_to_parent: 4096,
            },
            vec![connection_modified(2)],
        ),
        row(
            "a resume without a pause",
            nothing,
            resume(),
            Refusal::Paused { message: MessageType::Resume, paused: false },
            vec![],
        ),
        row(
            "more socket requests than may wait",
            |machine, _| {
                for number in 0..u32::try_from(MAX_HVSOCK_REQUESTS).unwrap() {
                    machine.ok(&tl_connect(instance(number), instance(0)));
                }
            },
            tl_connect(endpoint, service),
            Refusal::TooManyHvsockRequests { count: MAX_HVSOCK_REQUESTS },
            vec![tl_result(endpoint, service, INSUFFICIENT_RESOURCES)],
        ),
    ];
    refused(rows, false);

    let (mut machine, _) = Machine::connected_v6(0);
    machine.ok(&pause());
    let twice = Refusal::Paused { message: MessageType::Pause, paused: true };
    assert_eq!(machine.post(&pause()), Err(twice.into()));
    let (mut machine, offers) = Machine::connected(V5_3, 1);
    machine.open(offers[0], 1, 5);
    machine.ok(&unload());
    assert_eq!(machine.post(&unload()), Err(Refusal::UnloadTwice.into()));
    machine.closed(offers[0]);
    assert_eq!(machine.messages(), [unload_complete()]);
}

#[test]
fn channels_that_are_not_there() {
    use MessageType as M;
    for channel_id in [0, 4, 2047, 2048, 1 << 16, u32::MAX] {
        let unknown = |message| Refusal::UnknownChannel { message, channel_id };
        let row = |name, lie, message, answers| Row {
            name,
            before: nothing,
            lie,
            refusal: unknown(message),
            answers,
        };
        let not_opened = |open_id| vec![open_result(channel_id, open_id, INVALID_PARAMETER)];
        let rows = vec![
            row("open", v6_open_by(channel_id, 5, 0, 4, 9, 9), M::OpenChannel, not_opened(0x99)),
            row("close", close(channel_id), M::CloseChannel, vec![]),
            row(
                "GPADL",
                gpadl_header(channel_id, 5, 16, 1, &[4096, 1]),
                M::GpadlHeader,
                vec![gpadl_created(channel_id, 5, INVALID_PARAMETER)],
            ),
            row(
                "teardown",
                gpadl_teardown(channel_id, 5),
                M::GpadlTeardown,
                vec![gpadl_torndown(5)],
            ),
            row("release", release(channel_id), M::RelIdReleased, vec![]),
            row(
                "reserved open",
                open_reserved(channel_id, 0, 2, 5, 4),
                M::OpenReservedChannel,
                not_opened(0),
            ),
            row(
                "reserved close",
                close_reserved(channel_id, 0, 2),
                M::CloseReservedChannel,
                vec![],
            ),
            row(
                "modify",
                modify(channel_id, 0),
                M::ModifyChannel,
                vec![modified(channel_id, INVALID_PARAMETER)],
            ),
        ];
        refused(rows, false);
    }
}

#[test]
fn messages_that_are_none() {
    let row = |name, lie, error: MessageError| Row {
        name,
        before: nothing,
        lie,
        refusal: error.into(),
        answers: vec![],
    };
    let unknown = |message_type| MessageError::UnknownType { message_type };
    let rows = vec![
        row("nothing", vec![], MessageError::NoHeader { len: 0 }),
        row("seven bytes", vec![7, 0, 0, 0, 0, 0, 0], MessageError::NoHeader { len: 7 }),
        row("241 bytes", message(7).u32(2).fill(0, 229).done(), MessageError::TooLong { len: 241 }),
        row("type 0", message(0).fill(0, 232).done(), unknown(0)),
        row("type 30", message(30).fill(0, 232).done(), unknown(30)),
        row("type 2³²-1", message(u32::MAX).fill(0, 232).done(), unknown(u32::MAX)),
    ];
    refused(rows, false);
}

#[test]
fn messages_that_are_too_short() {
    let shortest = [
        (5, 156), // the long form, since its feature is negotiated
        (7, 12),
        (8, 20),
        (9, 16),
        (11, 16),
        (13, 12),
        (14, 40),
        (18, 28),
        (19, 20),
        (21, 40),
        (22, 16),
        (25, 24),
    ];
    for (kind, needed) in shortest {
        let name = MessageType::from_wire(kind).unwrap();
        for len in [8, needed - 1] {
            let mut lie = message(kind).fill(0, 232).done();
            lie.truncate(len);
            let refusal = MessageError::Truncated { message: name, needed, len }.into();
            let row = Row { name: name.name(), before: nothing, lie, refusal, answers: vec![] };
            refused(vec![row], false);
        }
    }
    // With a client id announced, INITIATE_CONTACT is longer.
    let lie = contact(V6_0, 0, target(2, 0, 0x8)).fill(0, 15).done();
    let message = MessageType::InitiateContact;
    let refusal = MessageError::Truncated { message, needed: 56, len: 55 }.into();
    refused(vec![Row { name: "client id", before: nothing, lie, refusal, answers: vec![] }], false);
}

#[test]
fn what_only_a_host_sends() {
    let from_host = [1, 2, 4, 6, 10, 12, 15, 17, 20, 23, 24, 26, 28];
    for kind in from_host {
        let name = MessageType::from_wire(kind).unwrap();
        let refusal = MessageError::NotFromGuest { message: name }.into();
        let lie = message(kind).u32(2).fill(0, 228).done();
        let row = || Row {
            name: name.name(),
            before: nothing,
            lie: lie.clone(),
            refusal,
            answers: vec![],
        };
        refused(vec![row()], false);
        // Nor before there is a connection.
        let mut machine = Machine::new();
        assert_eq!(machine.post(&lie), Err(PostError::Refused(refusal)));
    }
}

#[test]
fn what_is_not_there_before_the_connection_or_after_it() {
    let mut fresh = Machine::new();
    fresh.offer(1);
    let (mut unloaded, _) = Machine::connected_v6(1);
    unloaded.ok(&unload());
    let (mut unloading, offers) = Machine::connected(V5_3, 1);
    unloading.open(offers[0], 1, 5);
    unloading.ok(&unload());
    let (mut reset, _) = Machine::connected_v6(1);
    reset.reset();
    for (when, machine) in
        [("fresh", fresh), ("unloaded", unloaded), ("unloading", unloading), ("reset", reset)]
    {
        for kind in [3, 5, 7, 8, 9, 11, 13, 18, 21, 22, 25, 27, 29] {
            let mut machine = machine.clone();
            let waiting = machine.host.usage().messages;
            let name = MessageType::from_wire(kind).unwrap();
            let refused = machine.post(&message(kind).u32(1).fill(0, 228).done());
            let expected = Refusal::from(MessageError::NotConnected { message: name });
            assert_eq!(refused, Err(expected.into()), "{when}: {name}");
            assert_eq!(machine.host.usage().messages, waiting, "{when}: {name}");
        }
    }
}

#[test]
fn what_a_version_does_not_have() {
    // (message, since)
    let table =
        [(18, V4_0), (21, V4_0), (22, V4_1), (25, u32::MAX), (27, u32::MAX), (29, u32::MAX)];
    for version in VERSIONS {
        for (kind, since) in table {
            let (mut machine, _) = Machine::connected(version, 1);
            let name = MessageType::from_wire(kind).unwrap();
            let result = machine.post(&message(kind).fill(0, 232).done());
            let not_there = Refusal::from(MessageError::NotInVersion {
                message: name,
                version: Version::from_wire(version).unwrap(),
                features: 0,
            });
            let is_absent = result == Err(not_there.into());
            assert_eq!(is_absent, version < since, "{name} under {version:#x}: {result:?}");
        }
    }
}

#[test]
fn no_more_pages_than_the_quota() {
    let mut machine = Machine::with(Config { gpadl_pages: 100, ..config() });
    machine.offer(1);
    machine.offer(2);
    machine.connect(V5_3);
    machine.ok(&request_offers());
    machine.messages();
    machine.create_gpadl(1, 5, &[1; 60]);
    // What a header announces counts, whether it has arrived or not.
    machine.ok(&gpadl_header(2, 6, 8 * 31, 1, &[]));
    let refusal = |asked, used| {
        let reason = GpadlRefusal::Quota { asked, used, quota: 100 };
        Err(gpadl_refusal(MessageType::GpadlHeader, 7, reason).into())
    };
    let eleven = whole_pages(2, 7, &[1; 11]).remove(0);
    assert_eq!(machine.post(&eleven), refusal(11, 90));
    assert_eq!(machine.messages(), [gpadl_created(2, 7, INSUFFICIENT_RESOURCES)]);
    machine.create_gpadl(2, 7, &[1; 10]);
    assert_eq!(machine.host.usage().gpadl_pages, 100);
    // A GPADL that turns out wrong gives its pages back, and so does one that is taken back.
    assert!(machine.post(&gpadl_body(6, &[0; 28])).is_ok());
    assert!(machine.post(&gpadl_body(6, &[0; 3])).is_err());
    machine.ok(&gpadl_teardown(1, 5));
    assert_eq!(machine.host.usage().gpadl_pages, 10);
    machine.wind_down();
}

#[test]
fn no_more_incomplete_gpadls_than_the_limit() {
    let offers = u32::try_from(MAX_INCOMPLETE_GPADLS / MAX_GPADLS_PER_CHANNEL).unwrap() + 1;
    let (mut machine, _) = Machine::connected(V5_3, offers);
    for number in 0..u32::try_from(MAX_INCOMPLETE_GPADLS).unwrap() {
        let per_channel = u32::try_from(MAX_GPADLS_PER_CHANNEL).unwrap();
        machine.ok(&gpadl_header(1 + number / per_channel, number, 24, 1, &[]));
    }
    let refused = machine.post(&gpadl_header(offers, 9999, 24, 1, &[]));
    let reason = GpadlRefusal::TooManyIncomplete { count: MAX_INCOMPLETE_GPADLS };
    assert_eq!(refused, Err(gpadl_refusal(MessageType::GpadlHeader, 9999, reason).into()));
    assert_eq!(machine.messages(), [gpadl_created(offers, 9999, INSUFFICIENT_RESOURCES)]);
    machine.create_gpadl(offers, 9999, &[1]); // one that is whole at once is none
    machine.wind_down();
}

#[test]
fn a_storm_of_lies_is_bounded_and_harms_nobody() {
    let (mut machine, offers) = guest();
    let mut busy = 0;
    for number in 0..100_000_u32 {
        match machine.host.guest_message(1, &gpadl_teardown(3, number), &mut Vec::new()) {
            Err(PostError::Busy { waiting }) => {
                assert_eq!(waiting, MAX_WAITING_MESSAGES);
                busy += 1;
            }
            other => assert!(matches!(other, Err(PostError::Refused(_))), "{other:?}"),
        }
    }
    assert_eq!(busy, 100_000 - MAX_WAITING_MESSAGES);
    assert_eq!(machine.messages().len(), MAX_WAITING_MESSAGES);
    machine.close(offers[1], 2, BYSTANDER_RING);
    machine.wind_down();
}
