//! Thousands of connections, and threads: nothing is left of them, and nothing stands still for want of a
//! signal.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test may stop at its first surprise"
)]

mod common;

use std::error::Error;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Got, World, open_descriptors, read_some, stream, write_some};
use kmcl::Channel;
use kmcl_worker::{Source, Worker};
use vsp_socket::{Driver, SocketBroker, SocketConfig};

/// However they end.
#[test]
fn thousands_one_after_the_other_leave_nothing() {
    let mut world = World::new();
    let listener = world.listener(52);
    let bytes = stream(20_000, 1);
    let mut before = 0;
    for round in 0..3000 {
        if round == 30 {
            before = open_descriptors();
        }
        match round % 6 {
            0 => {
                // The guest closes first.
                let (mut socket, mut program) = world.guest_connects(&listener, 52);
                let sent = socket.send(&bytes);
                socket.finish();
                socket.close();
                world.settle();
                assert!(matches!(read_some(&mut program), Got::Bytes(got) if got == bytes[..sent]));
            }
            1 => {
                // The program closes first.
                let (mut socket, mut program) = world.host_connects(1024);
                write_some(&mut program, &bytes);
                drop(program);
                world.settle();
                assert!(!socket.recv(usize::MAX).is_empty());
                socket.close();
            }
            2 => {
                // Nobody listens in the guest.
                let _program = world.program(b"CONNECT 7\n");
                world.tick(round * 10_000);
                world.tick(round * 10_000 + 2000);
            }
            3 => {
                // Nobody listens on the host.
                world.ask(53);
            }
            4 => {
                // The guest gives up before it opens.
                world.ask(52);
                world.settle();
                listener.accept().unwrap();
                world.tick(round * 10_000);
                world.tick(round * 10_000 + 2000);
            }
            _ => {
                // In the middle of everything.
                let (mut socket, mut program) = world.guest_connects(&listener, 52);
                socket.send(&bytes);
                write_some(&mut program, &bytes);
                drop(program);
                socket.close();
            }
        }
        world.settle();
        assert_eq!(world.counts(), (0, 0, 0, 0), "round {round}");
    }
    world.assert_nothing_left();
    assert_eq!(open_descriptors(), before);
}

struct OneWorker(Worker);

impl Driver for OneWorker {
    fn add_channel(&self, channel: &Channel) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.0.add(channel)?)
    }
    fn remove_channel(&self, channel: &Channel) {
        self.0.remove(channel);
    }
}

struct Sockets(Arc<SocketBroker>);

impl Source for Sockets {
    fn ready(&self) -> bool {
        self.0.ready()
    }
}

/// A program that sends back what it gets, until its end.
fn echo(listener: UnixListener, connections: usize) {
    listener.set_nonblocking(false).unwrap();
    let serve = |mut program: UnixStream| {
        let mut bytes = vec![0; 3000];
        loop {
            match program.read(&mut bytes).unwrap() {
                0 => break program.shutdown(Shutdown::Write).unwrap(),
                read => program.write_all(&bytes[..read]).unwrap(),
            }
        }
    };
    let programs: Vec<_> = (0..connections)
        .map(|_| {
            let program = listener.accept().unwrap().0;
            std::thread::spawn(move || serve(program))
        })
        .collect();
    programs.into_iter().for_each(|it| it.join().unwrap());
}

/// Channels on one worker's thread, the broker on the same or another one, the guest on a third, programs
/// on their own: all of it comes back, with no turn but those that signals ask for. It is frozen and thawed
/// meanwhile.
#[test]
fn threads_lose_no_signal() {
    const CONNECTIONS: usize = 12;
    for workers in [1, 2] {
        let mut world = World::without_broker();
        world.connect_guest();
        let listener = world.listener(52);
        let driver = Arc::new(OneWorker(Worker::spawn("channels").unwrap()));
        let other = (workers == 2).then(|| Worker::spawn("sockets").unwrap());
        let config = SocketConfig::new(world.path());
        let broker = SocketBroker::new(world.bus.clone(), driver.clone(), config).unwrap();
        let broker = Arc::new(broker);
        let source = Arc::new(Sockets(broker.clone()));
        let serving = other.as_ref().unwrap_or(&driver.0);
        let source = serving.add_source(broker.clone(), source).unwrap();
        let programs = std::thread::spawn(move || echo(listener, CONNECTIONS));
        let is_over = Arc::new(AtomicBool::new(false));
        let freezer = std::thread::spawn({
            let (broker, is_over) = (broker.clone(), is_over.clone());
            move || {
                let mut freezes = 0_u32;
                while !is_over.load(Ordering::SeqCst) {
                    drop(broker.freeze().unwrap());
                    freezes += 1;
                    std::thread::sleep(Duration::from_micros(300));
                }
                freezes
            }
        });

        let ports: Vec<u32> = (0..CONNECTIONS).map(|_| world.ask(52)).collect();
        let until = Instant::now() + Duration::from_secs(60);
        let late = || assert!(Instant::now() < until, "never");
        while world.offers().len() < CONNECTIONS {
            late();
            std::thread::yield_now();
        }
        let bytes = stream(300_000, 7);
        let mut sockets: Vec<_> = ports
            .iter()
            .map(|port| {
                let mut opening = world.begin_open(52, *port, common::RING_PAGES);
                while !opening.is_answered() {
                    late();
                    std::thread::yield_now();
                }
                (opening.finish().unwrap(), 0, Vec::new())
            })
            .collect();
        while sockets.iter().any(|(socket, ..)| !socket.is_at_end) {
            late();
            for (socket, sent, got) in &mut sockets {
                if *sent < bytes.len() {
                    *sent += socket.send(&bytes[*sent..]);
                    if *sent == bytes.len() {
                        socket.finish();
                    }
                }
                got.extend(socket.recv(7000));
            }
        }
        programs.join().unwrap();
        for (socket, _, got) in sockets {
            assert!(got == bytes, "{} bytes came back", got.len());
            socket.close();
        }
        is_over.store(true, Ordering::SeqCst);
        assert!(freezer.join().unwrap() > 0);
        while world.bus.usage().channels != 0 {
            late();
            std::thread::yield_now();
        }
        serving.remove_source(source);
        assert_eq!(broker.counts().connections, 0);
        drop(broker);
        world.assert_guest_has_nothing();
    }
}
