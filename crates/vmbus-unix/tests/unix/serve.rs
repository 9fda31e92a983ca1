//! Devices served to guests that come and go.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::mpsc::TryRecvError;
use std::time::Instant;

use kmcl::{Guid, NtStatus};
use vmbus_guest::{ConnectionEvent, ConnectionState};
use vmbus_unix::{
    BindError, ConnectError, ConnectionError, GuestEvent, HostOptions, Reason, UnixGuest, UnixHost,
};

use crate::ends::*;

#[test]
fn packets_cross_and_come_back() {
    let server = Server::start();
    let client = Client::connect(server.path());
    for number in 0..2000u64 {
        let payload = number.to_le_bytes().repeat(1 + usize::try_from(number % 60).unwrap());
        assert_eq!(client.echo(&payload).unwrap(), payload, "packet {number}");
    }
    assert_eq!(server.host.guest().unwrap().pid, i32::try_from(std::process::id()).unwrap());
}

#[test]
fn many_channels_share_a_connection() {
    let server = Server::start_with(HostOptions::default(), 8);
    let client = Client::connect(server.path());
    let others: Vec<_> = (2..=8)
        .map(|instance| driver(&client.guest, &client.worker, Guid::from_u128(instance)))
        .collect();
    for (channel, seen) in &others {
        expect(seen, Seen::Opened);
        expect(seen, Seen::Started);
        assert!(channel.get_interface_instance().to_u128() >= 2);
    }
    std::thread::scope(|scope| {
        for (channel, _) in &others {
            scope.spawn(|| {
                for number in 0..100u64 {
                    let payload = number.to_le_bytes();
                    assert_eq!(echo(channel, &payload).unwrap(), payload);
                }
            });
        }
    });
    assert_eq!(client.guest.bus().offers().len(), 8);
    for (channel, _) in others {
        channel.disable();
        client.worker.remove(&channel);
    }
}

#[test]
fn devices_stay_while_guests_come_and_go() {
    let server = Server::start();
    for round in 0..10u64 {
        let client = Client::connect(server.path());
        expect(&server.seen, Seen::Opened);
        expect(&server.seen, Seen::Started);
        assert_eq!(client.echo(&round.to_le_bytes()).unwrap(), round.to_le_bytes());
        if round % 2 == 0 {
            client.channel.disable(); // closes before it leaves
            expect(&server.seen, Seen::Closed);
            drop(client);
        } else {
            drop(client);
            expect(&server.seen, Seen::Closed);
        }
    }
}

#[test]
fn a_channel_is_closed_and_opened_again_on_one_connection() {
    let server = Server::start();
    let client = Client::connect(server.path());
    for round in 0..10u64 {
        assert_eq!(client.echo(&round.to_le_bytes()).unwrap(), round.to_le_bytes());
        client.channel.disable();
        expect(&client.seen, Seen::Closed);
        client.channel.enable().unwrap();
        expect(&client.seen, Seen::Opened);
        expect(&client.seen, Seen::Started);
    }
    assert_eq!(client.guest.bus().counts().rings, 1);
}

#[test]
fn a_device_that_is_taken_away_and_back_is_found_again() {
    let server = Server::start();
    let client = Client::connect(server.path());
    for _ in 0..5 {
        server.device().disable();
        expect(&client.seen, Seen::Closed);
        server.device().enable().unwrap();
        server.device().start();
        client.channel.enable().unwrap();
        expect(&client.seen, Seen::Opened);
        expect(&client.seen, Seen::Started);
        assert_eq!(client.echo(b"again...").unwrap(), b"again...");
    }
    // The former channels were released: there is one.
    eventually(|| client.guest.bus().counts().guest.channels == 1);
}

#[test]
fn a_guest_may_unload_and_connect_anew() {
    let server = Server::start();
    let client = Client::connect(server.path());
    for round in 0..6 {
        assert_eq!(client.echo(b"once more").unwrap()[..9], b"once more"[..]);
        if round % 2 == 0 {
            client.guest.bus().unload().unwrap();
            expect(&client.seen, Seen::Closed);
            eventually(|| client.guest.bus().state() == ConnectionState::Unloaded);
        }
        client.guest.bus().connect().unwrap(); // on a live connection this ends it first
        if round % 2 == 1 {
            expect(&client.seen, Seen::Closed);
        }
        client.channel.enable().unwrap();
        expect(&client.seen, Seen::Opened);
        expect(&client.seen, Seen::Started);
    }
    let counts = client.guest.bus().counts();
    assert_eq!((counts.rings, counts.guest.gpadls, counts.guest.quarantined), (1, 1, 0));
}

/// Requests beside channels cross as well, and have their answers.
#[test]
fn requests_of_the_guest_are_answered() {
    let server = Server::start();
    let client = Client::connect(server.path());
    let bus = client.guest.bus();
    let channel_id = bus.offers()[0].channel_id;
    drop(client.guest.take_events());
    let mut events = Vec::new();
    let mut next = || {
        eventually(|| {
            events.extend(client.guest.take_events());
            !events.is_empty()
        });
        match events.remove(0) {
            GuestEvent::Bus(event) => event,
            other => panic!("{other:?}"),
        }
    };

    bus.modify_channel(channel_id, 5).unwrap();
    let status = NtStatus::SUCCESS;
    assert_eq!(next(), ConnectionEvent::ChannelModified { channel_id, status });
    assert_eq!(client.echo(b"from VP 5").unwrap()[..9], b"from VP 5"[..]);

    bus.modify_connection(None).unwrap();
    assert!(matches!(next(), ConnectionEvent::ConnectionModified { .. }));

    let (endpoint_id, service_id) = (Guid::from_u128(1), Guid::from_u128(2));
    bus.connect_hvsock(endpoint_id, service_id, None).unwrap();
    let status = NtStatus::CONNECTION_REFUSED;
    assert_eq!(next(), ConnectionEvent::HvsockRefused { endpoint_id, service_id, status });

    bus.pause().unwrap();
    assert_eq!(next(), ConnectionEvent::Paused);
    server.device().disable();
    // The device is gone, and the guest hears of it when it wants to hear anything.
    assert_eq!(client.seen.try_recv(), Err(TryRecvError::Empty));
    bus.resume().unwrap();
    expect(&client.seen, Seen::Closed);
}

#[test]
fn a_second_guest_is_refused_at_once_and_taken_later() {
    let server = Server::start();
    let client = Client::connect(server.path());
    let started = Instant::now();
    for _ in 0..20 {
        let error = UnixGuest::connect(server.path(), MEMORY).unwrap_err();
        let ConnectError::Connection {
            source: ConnectionError::Refused { reason: Reason::Busy, text },
            ..
        } = &error
        else {
            panic!("{error}")
        };
        assert_eq!(text, "another guest is connected");
    }
    assert!(started.elapsed() < PATIENCE, "none of them waited for its time-out");
    assert_eq!(client.echo(b"still me").unwrap(), b"still me");
    drop(client);
    expect(&server.seen, Seen::Opened);
    expect(&server.seen, Seen::Started);
    expect(&server.seen, Seen::Closed);
    Client::connect(server.path());
}

#[test]
fn when_the_server_goes_every_channel_is_told() {
    let server = Server::start();
    let client = Client::connect(server.path());
    let path = server.path().to_owned();
    drop(server);
    expect(&client.seen, Seen::Closed); // by the rescind, or by the end of the connection
    let error = client.echo(b"anybody?").unwrap_err();
    assert!(!error.status().is_success(), "{error}");
    assert!(!path.exists());
    client.channel.disable();
    eventually(|| {
        let counts = client.guest.bus().counts();
        matches!(client.guest.lost().as_deref(), Some(ConnectionError::Closed))
            && (counts.rings, counts.guest.channels, counts.guest.gpadls) == (0, 0, 0)
    });
}

#[test]
fn nobody_there_is_said_so() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmbus");
    let error = UnixGuest::connect(&path, MEMORY).unwrap_err();
    assert!(matches!(error, ConnectError::NoServer { .. }), "{error}");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let error = UnixGuest::connect(&path, MEMORY).unwrap_err();
    assert!(
        matches!(error, ConnectError::NoServer { .. } | ConnectError::System { .. }),
        "{error}"
    );
    let long = Path::new("/tmp").join("x".repeat(200));
    assert!(matches!(UnixGuest::connect(long, MEMORY), Err(ConnectError::PathTooLong { .. })));
    for bytes in [0, 100, 4096] {
        let error = UnixGuest::connect(&path, bytes).unwrap_err();
        assert!(matches!(error, ConnectError::Memory { .. }), "{bytes}: {error}");
    }
}

#[test]
fn one_server_to_a_path() {
    let server = Server::start();
    let mode = std::fs::metadata(server.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let client = Client::connect(server.path());
    assert!(matches!(UnixHost::bind(server.path()), Err(BindError::InUse { .. })));
    assert_eq!(client.echo(b"no harm.").unwrap(), b"no harm.");
}
