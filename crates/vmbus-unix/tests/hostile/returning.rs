//! Processes that pretend to be the guest of a saved state: each gets its reason, the host waits on,
//! and the guest itself goes on.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kmcl::{
    Channel, ChannelState, Guid, IncomingPacket, ProcessPacket, Save, SaveOptions, SendFlags, Side,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use saved_state::transport::{KINDS, TransportRecord, TransportRegionRecord};
use saved_state::{StreamKind, StreamReader};
use tempfile::TempDir;
use vmbus_host::HostBus;
use vmbus_memory::GuestMemory;
use vmbus_unix::frame::{HelloRegion, Kind, MAX_DOORBELLS_PER_FRAME, ResumeClaim};
use vmbus_unix::{
    GuestOptions, HostEvent, HostOptions, Reason, RestoringHost, UnixGuest, UnixHost,
};
use zerocopy::IntoBytes;

use crate::raw::*;

const INTERFACE: Guid = Guid::from_u128(0x77);

struct Null;

impl ProcessPacket for Null {
    fn process_packet(&self, _: &Channel, packet: IncomingPacket) {
        packet.complete(&[]);
    }
}

/// A server that was saved with a channel open, the guest that waits for the next one, and what the
/// saved state says of it.
struct Saved {
    transport: Vec<u8>,
    bus: Vec<u8>,
    channel: Vec<u8>,
    record: TransportRecord,
    regions: Vec<TransportRegionRecord>,
    guest: UnixGuest,
    client: Channel,
    path: PathBuf,
    _directory: TempDir,
}

impl Saved {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmbus");
        let host = UnixHost::bind(&path).unwrap();
        let device = device(host.bus());
        let options = GuestOptions { reconnect: Some(PATIENCE), ..GuestOptions::new(1 << 20) };
        let guest = std::thread::scope(|scope| {
            let connecting = scope.spawn(|| UnixGuest::connect_with(&path, options).unwrap());
            while !connecting.is_finished() {
                host.wait(Some(Duration::from_millis(1))).unwrap();
                host.drive().unwrap();
            }
            connecting.join().unwrap()
        });
        let client = Channel::allocate(Side::Client, Arc::new(guest.bus().clone()));
        client.client_init_set_target_pnp(INTERFACE, None, None).unwrap();
        client.enable().unwrap();
        eventually(|| {
            host.drive().unwrap();
            guest.drive().unwrap();
            device.process(1);
            client.process(1);
            [&client, &device].iter().all(|channel| channel.state() == ChannelState::Active)
        });
        let held = host.hold().unwrap();
        let frozen = device.freeze().unwrap();
        let options = SaveOptions::default();
        let transport = bytes(held.save(&options).unwrap());
        let bus = bytes(held.bus().save(&options).unwrap());
        let channel = bytes(frozen.save().unwrap());
        frozen.move_away();
        held.move_away();
        drop((device, host));
        eventually(|| {
            guest.drive().unwrap();
            !guest.is_linked()
        });
        let (record, regions) = records(&transport);
        Self {
            transport,
            bus,
            channel,
            record,
            regions,
            guest,
            client,
            path,
            _directory: directory,
        }
    }

    fn restoring(&self) -> RestoringHost {
        let options = HostOptions::default();
        UnixHost::bind_restoring(&self.path, options, &self.transport, &self.bus).unwrap()
    }

    /// What the guest itself would say.
    fn returning(&self) -> Returning {
        let TransportRecord { connection_id, epoch, posts, messages, .. } = &self.record;
        let name: [u8; 16] = connection_id[..].try_into().unwrap();
        let claim = ResumeClaim {
            connection_id: Guid::from_bytes(name),
            epoch: (*epoch).into(),
            posts: (*posts).into(),
            answers: (*posts).into(),
            messages: (*messages).into(),
        };
        let regions = self.regions.iter().map(|r| region(r.gpa, r.len, r.file_offset)).collect();
        let (memory, _) = self.guest.bus().memory().regions()[0].backing().unwrap();
        let descriptors = vec![event(), memory.try_clone_to_owned().unwrap()];
        let doorbells = vec![vec![(1, event())]];
        Returning { claim, regions, count: 1, announced: 1, descriptors, doorbells }
    }
}

fn device(bus: &HostBus) -> Channel {
    let device = Channel::allocate(Side::Server, Arc::new(bus.clone()));
    device.server_init_set_target_interface_id(INTERFACE, Guid::from_u128(1)).unwrap();
    device.init_set_process_packet_callbacks(Arc::new(Null)).unwrap();
    device.enable().unwrap();
    device.start();
    device
}

fn bytes(mut save: impl Save) -> Vec<u8> {
    let mut bytes = Vec::new();
    save.write_to(&mut bytes).unwrap();
    bytes
}

fn records(mut stream: &[u8]) -> (TransportRecord, Vec<TransportRegionRecord>) {
    let mut reader = StreamReader::new(StreamKind::TRANSPORT, KINDS);
    let record = reader.read(&mut stream).unwrap().unwrap().decode().unwrap();
    let mut regions = Vec::new();
    while let Some(chunk) = reader.read(&mut stream).unwrap() {
        regions.push(chunk.decode().unwrap());
    }
    (record, regions)
}

/// What somebody says who claims to be the guest.
struct Returning {
    claim: ResumeClaim,
    regions: Vec<HelloRegion>,
    /// Regions that the greeting speaks of.
    count: u32,
    /// Doorbells that it speaks of.
    announced: u32,
    descriptors: Vec<OwnedFd>,
    /// Frames of doorbells.
    doorbells: Vec<Vec<(u32, OwnedFd)>>,
}

impl Returning {
    /// Says it, as far as anybody listens.
    fn say(&self, raw: &Raw) {
        let greeting = greeting(self.count);
        let parts: [&[u8]; 3] =
            [greeting.as_bytes(), self.claim.as_bytes(), self.regions.as_bytes()];
        let hello = frame(Kind::Resume as u32, 0, self.announced, &parts);
        let descriptors: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        raw.send(&hello, &descriptors);
        for some in &self.doorbells {
            let flags: Vec<u8> = some.iter().flat_map(|(flag, _)| flag.to_le_bytes()).collect();
            let descriptors: Vec<_> = some.iter().map(|(_, event)| event.as_fd()).collect();
            let bytes = frame(Kind::Doorbells as u32, 0, 0, &[&flags]);
            if raw.try_send(&bytes, &descriptors).is_err() {
                return; // turned away already
            }
        }
    }
}

fn settle(restoring: &RestoringHost) -> Vec<HostEvent> {
    let mut more = false;
    while more || restoring.wait(Some(Duration::ZERO)).unwrap() {
        more = restoring.drive().unwrap();
    }
    restoring.take_events()
}

type Row = (&'static str, fn(&mut Returning), Reason, &'static str);

const ROWS: &[Row] = &[
    ("no such connection", |r| r.claim.connection_id = Guid::ZERO, Reason::OtherGuest, "not of"),
    (
        "an older epoch",
        |r| r.claim.epoch = 0.into(),
        Reason::Stale,
        "is of epoch 1, the connection",
    ),
    ("a later epoch", |r| r.claim.epoch = 2.into(), Reason::Stale, "is in epoch 2"),
    ("the last epoch", |r| r.claim.epoch = u64::MAX.into(), Reason::Stale, "18446744073709551615"),
    (
        "a message too many",
        |r| r.claim.messages = (r.claim.messages.get() + 1).into(),
        Reason::Stale,
        "messages were given",
    ),
    ("no messages", |r| r.claim.messages = 0.into(), Reason::Stale, "the guest has 0"),
    (
        "no posts",
        |r| (r.claim.posts, r.claim.answers) = (0.into(), 0.into()),
        Reason::Stale,
        "posts",
    ),
    ("posts without end", |r| r.claim.posts = u64::MAX.into(), Reason::Stale, "posts were taken"),
    ("answers without end", |r| r.claim.answers = u64::MAX.into(), Reason::Stale, "answers"),
    (
        "everything without end",
        |r| {
            let most = u64::MAX.into();
            (r.claim.posts, r.claim.answers, r.claim.messages) = (most, most, most);
        },
        Reason::Stale,
        "18446744073709551615",
    ),
    (
        "other memory",
        |r| {
            let memory = GuestMemory::memfd(1 << 20).unwrap();
            let (fd, _) = memory.regions()[0].backing().unwrap();
            r.descriptors[1] = fd.try_clone_to_owned().unwrap();
        },
        Reason::OtherGuest,
        "region 0 of the memory is another",
    ),
    (
        "less of it",
        |r| r.regions[0].len = (1 << 16).into(),
        Reason::OtherGuest,
        "region 0 of the memory is another",
    ),
    (
        "in two pieces",
        |r| {
            r.regions = vec![region(0, 1 << 19, 0), region(1 << 19, 1 << 19, 1 << 19)];
            r.count = 2;
            r.descriptors.push(r.descriptors[1].try_clone().unwrap());
        },
        Reason::OtherGuest,
        "memory in 2 regions, it was saved with 1",
    ),
    ("no memory", |r| r.count = 0, Reason::Protocol, "0 regions"),
    ("regions without end", |r| r.count = u32::MAX, Reason::Protocol, "4294967295 regions"),
    ("regions that are not there", |r| r.count = 2, Reason::Protocol, "too few"),
    ("no descriptors", |r| r.descriptors.clear(), Reason::Protocol, "0 descriptors, it takes 2"),
    ("one", |r| drop(r.descriptors.pop()), Reason::Protocol, "1 descriptors, it takes 2"),
    ("three", |r| r.descriptors.push(event()), Reason::Protocol, "3 descriptors, it takes 2"),
    ("the other order", |r| r.descriptors.swap(0, 1), Reason::Protocol, "not a non-blocking"),
    ("doorbells without end", |r| r.announced = u32::MAX, Reason::Protocol, "4294967295 doorbells"),
    ("a doorbell too many", |r| r.announced = 2048, Reason::Protocol, "2048 doorbells, at most"),
    (
        "no doorbells",
        |r| {
            r.announced = 0;
            r.doorbells.clear();
        },
        Reason::Protocol,
        "no doorbell for event flag 1",
    ),
    ("another one", |r| r.doorbells[0][0].0 = 2, Reason::Protocol, "no doorbell for event flag 1"),
    ("flag 0", |r| r.doorbells[0][0].0 = 0, Reason::Protocol, "event flag 0 is outside"),
    ("flag 2048", |r| r.doorbells[0][0].0 = 2048, Reason::Protocol, "event flag 2048"),
    ("flag 65537", |r| r.doorbells[0][0].0 = 65_537, Reason::Protocol, "event flag 65537"),
    (
        "one twice",
        |r| {
            r.announced = 2;
            r.doorbells[0].push((1, event()));
        },
        Reason::Protocol,
        "two doorbells for event flag 1",
    ),
    (
        "one twice, in two frames",
        |r| {
            r.announced = 2;
            r.doorbells.push(vec![(1, event())]);
        },
        Reason::Protocol,
        "two doorbells for event flag 1",
    ),
    (
        "more than announced",
        |r| r.doorbells[0].push((2, event())),
        Reason::Protocol,
        "2 doorbells, 1 were to come",
    ),
    ("none in a frame", |r| r.doorbells[0].clear(), Reason::Protocol, "0 descriptors"),
    (
        "a pipe",
        |r| r.doorbells[0][0].1 = std::io::pipe().unwrap().0.into(),
        Reason::Protocol,
        "not a non-blocking eventfd",
    ),
];

#[test]
fn who_pretends_is_told_why_and_spoils_nothing() {
    let saved = Saved::new();
    let restoring = saved.restoring();
    let before = held();
    for (what, change, reason, text) in ROWS {
        let raw = Raw::connect(&saved.path);
        let mut returning = saved.returning();
        change(&mut returning);
        returning.say(&raw);
        let events = settle(&restoring);
        assert!(matches!(events[..], [HostEvent::Refused { .. }]), "{what}: {events:?}");
        let told = raw.assert_refused(*reason);
        assert!(told.contains(text), "{what}: {told:?} does not say {text:?}");
        assert!(!restoring.guest_is_back(), "{what}");
        drop((raw, returning));
    }
    assert_eq!(held(), before);

    // Other frames than the ones awaited.
    for (what, frames, text) in [
        (
            "doorbells first",
            vec![frame(9, 0, 0, &[&[1, 0, 0, 0]])],
            "Doorbells while waiting for its",
        ),
        ("half a claim", vec![frame(8, 0, 0, &[greeting(1).as_bytes(), &[0; 47]])], "too few"),
    ] {
        let raw = Raw::connect(&saved.path);
        frames.iter().for_each(|frame| raw.send(frame, &[]));
        assert!(matches!(settle(&restoring)[..], [HostEvent::Refused { .. }]), "{what}");
        let told = raw.assert_refused(Reason::Protocol);
        assert!(told.contains(text), "{what}: {told:?}");
    }
    let raw = Raw::connect(&saved.path);
    let mut returning = saved.returning();
    returning.doorbells.clear();
    returning.say(&raw);
    raw.send(&post(1, b"too early"), &[]);
    assert!(matches!(settle(&restoring)[..], [HostEvent::Refused { .. }]));
    assert!(raw.assert_refused(Reason::Protocol).contains("Post while waiting for its doorbells"));

    // One that says nothing more keeps nobody out.
    let silent = Raw::connect(&saved.path);
    returning.say(&silent);
    assert!(settle(&restoring).is_empty() && !restoring.guest_is_back());

    // And the guest itself.
    eventually(|| {
        saved.guest.drive().unwrap();
        restoring.drive().unwrap();
        restoring.guest_is_back()
    });
    assert!(saved.client.state() == ChannelState::Active && saved.guest.lost().is_none());
}

/// As many doorbells as there can be, in as many frames as they take.
#[test]
fn a_guest_with_every_channel_there_can_be_comes_back() {
    let saved = Saved::new();
    let restoring = saved.restoring();
    let raw = Raw::connect(&saved.path);
    let mut returning = saved.returning();
    let flags: Vec<u32> = (1..=200).collect();
    returning.announced = 200;
    returning.doorbells = flags
        .chunks(MAX_DOORBELLS_PER_FRAME)
        .map(|some| some.iter().map(|&flag| (flag, event())).collect())
        .collect();
    returning.say(&raw);
    let events = settle(&restoring);
    assert!(matches!(events[..], [HostEvent::GuestBack { .. }]), "{events:?}");
    assert!(restoring.guest_is_back());
    let came = raw.receive().unwrap();
    assert_eq!((came.header.kind.get(), came.descriptors.len()), (Kind::Resumed as u32, 2));
    // It is not heard before the host goes on, and may leave again.
    raw.send(&post(1, b"x"), &[]);
    assert!(settle(&restoring).is_empty());
    // Another one is not its turn, be it the right one.
    let second = Raw::connect(&saved.path);
    assert!(matches!(settle(&restoring)[..], [HostEvent::Busy]));
    second.assert_refused(Reason::Busy);
    drop(raw);
    assert!(matches!(settle(&restoring)[..], [HostEvent::GuestGone { .. }]));
    assert!(!restoring.guest_is_back());

    // Nothing has come of it: the one that comes next finds everything as it was.
    eventually(|| {
        saved.guest.drive().unwrap();
        restoring.drive().unwrap();
        restoring.guest_is_back()
    });
    let device = device(restoring.bus());
    device.restore_from(&saved.channel[..]).unwrap();
    let host = restoring.finish().unwrap();
    device.start();
    let packet = saved.client.packet_allocate().unwrap();
    packet.send(b"are you there?", None, SendFlags::WAIT_FOR_COMPLETION).unwrap();
    eventually(|| {
        host.drive().unwrap();
        saved.guest.drive().unwrap();
        device.process(1);
        saved.client.process(1);
        saved.client.outgoing_in_use() == (0, 0)
    });
    assert_eq!(saved.client.state(), ChannelState::Active);
}

/// What was rung while there was no host, or just before, was perhaps not heard: everything is rung.
#[test]
fn whoever_is_back_hears_every_doorbell_once_the_host_goes_on() {
    let saved = Saved::new();
    let restoring = saved.restoring();
    let raw = Raw::connect(&saved.path);
    let returning = saved.returning();
    returning.say(&raw);
    assert!(matches!(settle(&restoring)[..], [HostEvent::GuestBack { .. }]));
    let (attention, doorbell) = (&returning.descriptors[0], &returning.doorbells[0][0].1);
    let is_rung = |event: &OwnedFd| {
        let mut fds = [PollFd::new(event, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    };
    let _device = device(restoring.bus());
    assert!(!is_rung(attention) && !is_rung(doorbell));
    // What it rings meanwhile is not lost either.
    let event_port = raw.receive().unwrap().descriptors.swap_remove(0);
    rustix::io::write(&event_port, &1u64.to_ne_bytes()).unwrap();
    assert!(!restoring.wait(Some(Duration::ZERO)).unwrap());
    let host = restoring.finish().unwrap();
    assert!(is_rung(attention) && is_rung(doorbell));
    assert_eq!(raw.receive().unwrap().header.kind, Kind::Listening as u32);
    assert!(host.wait(Some(Duration::ZERO)).unwrap(), "there is a signal to be heard");
    host.drive().unwrap();
    assert!(!is_rung(&event_port), "it was heard");
}
