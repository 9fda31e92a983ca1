//! The states under `tests/golden/v1/`: what each is, how it is made, and how it is restored.
//!
//! They are made once, by the release whose format they are in, and never again: a change of the code
//! that cannot restore them breaks a promise. [`STATES`] makes new ones when a version of the format is
//! new, or when a state of a new kind is to be kept.

use saved_state::machine::SynicMode;

use crate::bus::{self, Machine};
use crate::channel::{self, Fate, Server, Setup, external, request};
use crate::guest::Standing;
use crate::{machine, services, sockets, storage};

/// A state that is restored for ever.
pub struct Golden {
    /// Name of the file, without its extension `.state`.
    pub name: &'static str,
    /// What it is the state of, for the list that people read.
    pub about: &'static str,
    /// Makes it; `None` for what takes a program and two processes.
    pub make: Option<fn() -> Vec<u8>>,
    /// Restores it, and sees to it that what was in flight ends as it should.
    pub restore: fn(&[u8]),
}

/// All of them.
pub const STATES: &[Golden] = &[
    channel("channel-never-opened", "a channel that is offered, and was not opened", || {
        Server::new(Setup::default()).move_away()
    }),
    channel("channel-idle", "an open channel, both rings empty, nothing in flight", || {
        let server = Server::new(Setup::default());
        let _rings = server.open(Standing::default());
        server.channel.start();
        server.run();
        server.move_away()
    }),
    channel(
        "channel-paused",
        "a channel that was paused, not frozen: nothing incoming is in flight",
        || {
            let server = Server::new(Setup::default());
            let _rings = server.open(Standing::default());
            server.channel.start();
            server.run();
            server.send(3, b"answer me");
            server.channel.pause();
            let mut state = Vec::new();
            kmcl::Save::write_to(&mut server.channel.save().unwrap(), &mut state).unwrap();
            state
        },
    ),
    channel("incoming-1-never-started", "one request that its device had not begun with", || {
        with_requests(Setup::default(), 1, |_| Fate::NeverStarted)
    }),
    channel(
        "incoming-1-cancelled",
        "one request that its device had cancelled, with the device's own state",
        || with_requests(Setup::default(), 1, |_| Fate::Cancelled),
    ),
    channel(
        "incoming-1-finished",
        "one request that has finished, and whose result was held",
        || with_requests(Setup::default(), 1, |_| Fate::Finished),
    ),
    channel("incoming-1-deferred", "one request that waited for a thread that may sleep", || {
        with_requests(Setup::default(), 1, |_| Fate::Deferred)
    }),
    channel(
        "incoming-256-mixed",
        "256 requests: never started, cancelled and finished in turn, the last deferred",
        || {
            with_requests(Setup::default(), 256, |number| match number {
                255 => Fate::Deferred,
                _ if number % 3 == 0 => Fate::NeverStarted,
                _ if number % 3 == 1 => Fate::Cancelled,
                _ => Fate::Finished,
            })
        },
    ),
    channel(
        "incoming-external-data",
        "requests with external data, and one with an area of the device's alone",
        || {
            let server = Server::new(Setup::default());
            let mut rings = server.open(Standing::default());
            server.channel.start();
            rings.request(1, &external(512), &request(Fate::NeverStarted, 1, 64));
            rings.request(2, &external(4096), &request(Fate::Cancelled, 2, 64));
            rings.request(u64::MAX, &[], &request(Fate::NeverStarted, 3, 8));
            server.run();
            server.move_away()
        },
    ),
    channel(
        "outgoing-in-ring",
        "packets that the device had sent, and the guest had not completed",
        || {
            let server = Server::new(Setup::default());
            let _rings = server.open(Standing::default());
            server.channel.start();
            server.run();
            server.send(7, &[7; 100]);
            server.move_away()
        },
    ),
    channel(
        "outgoing-queued",
        "packets that the device had sent, more than the ring holds",
        || {
            let server = Server::new(Setup { pages: (3, 2), ..Setup::default() });
            let _rings = server.open(Standing::default());
            server.channel.start();
            server.run();
            server.send(20, &[9; 400]);
            server.move_away()
        },
    ),
    channel("both-ways", "64 requests of the guest's and 64 packets of the device's", || {
        let server = Server::new(Setup::default());
        let mut rings = server.open(Standing::default());
        server.channel.start();
        for number in 0..64 {
            rings.request(u64::from(number) << 40, &[], &request(Fate::Cancelled, number, 100));
        }
        server.run();
        server.send(64, &[1; 64]);
        server.move_away()
    }),
    channel("pipe", "a pipe, with requests and packets in flight", || {
        let server = Server::new(Setup { pipe: true, external: (0, 0), ..Setup::default() });
        let mut rings = server.open(Standing::default());
        server.channel.start();
        for number in 0..4 {
            let payload = request(Fate::NeverStarted, number, 64);
            rings.request(u64::from(number), &[], &piped(&payload));
        }
        server.run();
        server.send(4, &[1; 64]);
        server.move_away()
    }),
    channel("stopped", "a channel that a bad packet of the guest's had stopped", || {
        let server = Server::new(Setup::default());
        let mut rings = server.open(Standing::default());
        server.channel.start();
        rings.request(1, &[], &request(Fate::NeverStarted, 1, 64));
        server.run();
        rings.damage();
        server.run();
        assert!(server.channel.stop_reason().is_some());
        server.move_away()
    }),
    bus("bus-nobody-connected", "two offers, and no guest", || {
        let mut machine = Machine::new();
        machine.offer(1);
        machine.offer(2);
        machine.save()
    }),
    bus("bus-connecting", "a guest that has asked for a version, and not read the answer", || {
        let mut machine = Machine::new();
        machine.offer(1);
        machine.say(&machine.contact());
        machine.save()
    }),
    bus(
        "bus-half-received-gpadls",
        "GPADLs of which the header has come, and a part of the pages",
        || {
            let (mut machine, _) = Machine::connected(2);
            machine.gpadl(1, 0xe1e10, 100, 0);
            machine.gpadl(2, 0xe1e11, 100, 1);
            machine.gpadl(2, 0xe1e12, 20, 0);
            machine.save()
        },
    ),
    bus(
        "bus-half-open",
        "a channel that the guest wants opened, its device has not answered",
        || {
            let (mut machine, _) = Machine::connected(1);
            machine.ask_to_open(1, 0xe1e10);
            machine.save()
        },
    ),
    bus("bus-open", "three channels: open, open and to be modified, being closed", || {
        let (mut machine, offers) = Machine::connected(3);
        for (&offer, channel) in offers.iter().zip(1..) {
            machine.open(offer, channel, 0xe1e10 + channel);
        }
        machine.ask_to_modify(2);
        machine.ask_to_close(3);
        machine.save()
    }),
    bus(
        "bus-queued-messages",
        "messages that the guest has not read: an offer, a rescind, answers",
        || {
            let (mut machine, offers) = Machine::connected(2);
            machine.open(offers[0], 1, 0xe1e10);
            machine.gpadl(1, 0xe1e20, 300, 11);
            machine.offer(3);
            machine.host.revoke(offers[1], &mut machine.effects);
            machine.save()
        },
    ),
    bus("bus-socket-requests", "requests for sockets that nobody has answered", || {
        let (mut machine, _) = Machine::connected(1);
        machine.ask_for_socket();
        machine.save()
    }),
    bus(
        "bus-unloading",
        "a guest that ends its connection while a device holds on to its channel",
        || {
            let (mut machine, offers) = Machine::connected(1);
            machine.open(offers[0], 1, 0xe1e10);
            machine.unload();
            machine.save()
        },
    ),
    storage(
        "storage-silent",
        "a controller whose guest has opened the channel, and said nothing",
        || storage::Server::after(0).move_away(),
    ),
    storage("storage-begun", "after BEGIN_INITIALIZATION", || {
        storage::Server::after(1).move_away()
    }),
    storage("storage-version", "after QUERY_PROTOCOL_VERSION", || {
        storage::Server::after(2).move_away()
    }),
    storage("storage-properties", "after QUERY_PROPERTIES", || {
        storage::Server::after(3).move_away()
    }),
    storage(
        "storage-ready",
        "a controller with two disks that takes requests, none in flight",
        || storage::Server::after(4).move_away(),
    ),
    storage(
        "storage-in-flight",
        "32 writes: some had not started, some ran and were cancelled",
        || {
            let mut server = storage::Server::after(4);
            server.write(32, 4);
            server.move_away()
        },
    ),
    services("services-closed", "integration services that nobody has opened", || {
        services::Server::new().move_away()
    }),
    services(
        "services-versions-offered",
        "a guest that has not read which versions there are",
        || services::Server::offered().move_away(),
    ),
    services(
        "services-versions-chosen",
        "a guest that has chosen; the host has not looked",
        || {
            let mut server = services::Server::offered();
            server.answer(services::NEWEST);
            server.move_away()
        },
    ),
    services("services-refused", "a guest that knows none of the versions", || {
        let mut server = services::Server::offered();
        server.refuse();
        server.move_away()
    }),
    services("services-agreed", "the newest versions: 3.0, 3.2 and 4.0; nothing is asked", || {
        services::Server::agreed(services::NEWEST).move_away()
    }),
    services("services-agreed-oldest", "version 1.0 of each, and of the framework", || {
        services::Server::agreed(services::OLDEST).move_away()
    }),
    services(
        "services-asked",
        "a heartbeat, a sample of the time and a reboot that the guest has not read",
        || {
            let mut server = services::Server::agreed(services::NEWEST);
            server.ask();
            server.move_away()
        },
    ),
    services(
        "services-shutdown-accepted",
        "the same, and the guest has answered; the host has not looked",
        || {
            let mut server = services::Server::agreed(services::NEWEST);
            server.ask();
            server.answer(services::NEWEST);
            server.move_away()
        },
    ),
    services(
        "services-rings-full",
        "a guest that does not read: its rings are full, and one packet of each waits",
        || {
            let mut server = services::Server::agreed(services::NEWEST);
            server.fill();
            server.move_away()
        },
    ),
    sockets("sockets-none", "a bus with sockets, and no connection", || {
        sockets::Server::new().move_away(false)
    }),
    sockets(
        "sockets-both-ways",
        "a bus, and connections from the guest and from its host; one more is asked for",
        || {
            let mut server = sockets::Server::new();
            server.guest_connects(10_000, 52);
            server.host_connects(1024);
            server.host_connects(1025);
            server.move_away(true)
        },
    ),
    machine(
        "machine-kernel",
        "one processor; KVM provides Hyper-V's interfaces, timers run",
        || machine::machine(1, SynicMode::Kernel, b""),
    ),
    machine(
        "machine-user",
        "two processors, one of which waits; the VMM provides the interfaces; something is typed",
        || machine::machine(2, SynicMode::User, b"root\n"),
    ),
    memory(
        "memory-plain",
        "64 MiB of memory, three parts of them not zeros, as they are",
        machine::plain_memory,
    ),
    memory("memory-zstd", "the same, compressed", machine::compressed_memory),
    Golden {
        name: "server-between-processes",
        about: "a whole server, as `kmcl save` keeps it: transport, bus, controller, two channels with requests in flight",
        make: None,
        restore: storage::assert_is_a_server,
    },
];

const fn channel(name: &'static str, about: &'static str, make: fn() -> Vec<u8>) -> Golden {
    Golden { name, about, make: Some(make), restore: channel::assert_goes_on }
}

const fn bus(name: &'static str, about: &'static str, make: fn() -> Vec<u8>) -> Golden {
    Golden { name, about, make: Some(make), restore: bus::assert_goes_on }
}

const fn storage(name: &'static str, about: &'static str, make: fn() -> Vec<u8>) -> Golden {
    Golden { name, about, make: Some(make), restore: storage::assert_goes_on }
}

const fn services(name: &'static str, about: &'static str, make: fn() -> Vec<u8>) -> Golden {
    Golden { name, about, make: Some(make), restore: services::assert_goes_on }
}

const fn sockets(name: &'static str, about: &'static str, make: fn() -> Vec<u8>) -> Golden {
    Golden { name, about, make: Some(make), restore: sockets::assert_goes_on }
}

const fn machine(name: &'static str, about: &'static str, make: fn() -> Vec<u8>) -> Golden {
    Golden { name, about, make: Some(make), restore: machine::assert_is_a_machine }
}

const fn memory(name: &'static str, about: &'static str, make: fn() -> Vec<u8>) -> Golden {
    Golden { name, about, make: Some(make), restore: machine::assert_memory_comes_back }
}

/// A channel with `count` requests, each with its own id, length and fate.
fn with_requests(setup: Setup, count: u16, fate: fn(u16) -> Fate) -> Vec<u8> {
    let server = Server::new(setup);
    let mut rings = server.open(Standing::default());
    server.channel.start();
    for number in 0..count {
        let [low, _] = number.to_le_bytes();
        let len = 16 + usize::from(number) % 13 * 8;
        rings.request(0x1000 + u64::from(number), &[], &request(fate(number), low, len));
    }
    server.run_at_dispatch();
    server.move_away()
}

/// A message with a pipe's header in front.
fn piped(payload: &[u8]) -> Vec<u8> {
    let mut bytes = 1_u32.to_le_bytes().to_vec();
    bytes.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Every state that is made here, with its name.
pub fn made() -> impl Iterator<Item = (&'static str, Vec<u8>)> {
    STATES.iter().filter_map(|golden| Some((golden.name, golden.make?())))
}
