//! A server that has no descriptor left for those who connect. Alone in its process, as it takes
//! them all away.

use std::os::fd::AsRawFd;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmbus_unix::{ConnectionError, HostEvent, UnixHost};

#[test]
fn a_server_without_descriptors_waits_for_some() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vmbus");
    let host = UnixHost::bind(&path).unwrap();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let client = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    connect(&client, &SocketAddrUnix::new(&path).unwrap()).unwrap();

    let limit = getrlimit(Resource::Nofile);
    // The lowest number that is free becomes the first that is not allowed.
    let free = u64::try_from(client.try_clone().unwrap().as_raw_fd()).unwrap();
    setrlimit(Resource::Nofile, Rlimit { current: Some(free), ..limit }).unwrap();
    host.drive().unwrap();
    let events = host.take_events();
    assert!(matches!(events[..], [HostEvent::AcceptFailed { .. }]), "{events:?}");
    // Somebody still waits; but looking again at once would be of no use, and is not asked for.
    assert!(!host.wait(Some(Duration::ZERO)).unwrap());

    setrlimit(Resource::Nofile, limit).unwrap();
    drop(client);
    let events = loop {
        assert!(host.wait(Some(Duration::from_secs(30))).unwrap());
        host.drive().unwrap();
        let events = host.take_events();
        if !events.is_empty() {
            break events;
        }
    };
    assert!(
        matches!(events[..], [HostEvent::Refused { reason: ConnectionError::Closed }]),
        "accepted, and gone by then: {events:?}"
    );
}
