//! Guests with open channels that come and go leave no descriptor and no mapping. Alone in its
//! process, as it counts them all.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests stop at surprises")]

#[path = "unix/ends.rs"]
#[expect(dead_code, reason = "shared with other tests, which use the rest")]
mod ends;

use ends::{Client, Seen, Server, eventually, expect};

/// Descriptors of this process, and mappings of guests' memory.
fn held() -> (usize, usize) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (descriptors, maps.lines().filter(|line| line.contains("/memfd:")).count())
}

#[test]
fn guests_come_and_go_and_leave_nothing() {
    let server = Server::start();
    let one = |leave: fn(Client)| {
        let client = Client::connect(server.path());
        expect(&server.seen, Seen::Opened);
        expect(&server.seen, Seen::Started);
        assert_eq!(client.echo(b"some work").unwrap()[..9], b"some work"[..]);
        assert!(held().1 > 0);
        leave(client);
        expect(&server.seen, Seen::Closed);
        eventually(|| server.host.guest().is_none() && server.host.bus().usage().held == 0);
    };
    one(drop); // what is made once and kept, is made now
    let before = held();
    for _ in 0..20 {
        one(drop);
        one(|client| {
            client.channel.disable();
            client.guest.bus().unload().unwrap();
        });
        // The connection ends under an open channel, with a packet on its way.
        one(|client| {
            client.worker.remove(&client.channel);
            let _packet = client.channel.packet_allocate().unwrap();
        });
    }
    eventually(|| held() == before);
    assert_eq!(before.1, 0, "no memory of a guest that is gone is mapped");
}
