//! The other process is killed, at whatever moment.
//!
//! The helper is this test program itself, run again with the name of one test and its task in the
//! environment.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kmcl_worker::Worker;
use vmbus_unix::{
    BindError, ConnectionError, GuestEvent, GuestOptions, HostOptions, Reason, UnixHost,
};

use crate::ends::*;
use crate::moves::{Saved, quick_device};

const TASK: &str = "VMBUS_UNIX_TEST_TASK";
const SOCKET: &str = "VMBUS_UNIX_TEST_SOCKET";

/// The streams that a server leaves to the next one, beside its socket.
const STREAMS: [&str; 3] = ["transport", "bus", "channel"];

/// What a client does between its start and its end, in steps that it tells of.
const STEPS: [&str; 6] = ["connected", "open", "echo 0", "echo 1", "echo 200", "closed"];

/// Another process. Dropping it kills it.
struct Helper {
    child: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

impl Helper {
    fn start(task: &str, socket: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "killed::helper", "--nocapture", "--include-ignored"])
            .env(TASK, task)
            .env(SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Reads until the helper says `line`.
    fn await_line(&mut self, line: &str) {
        for read in self.lines.by_ref() {
            if read.unwrap().ends_with(line) {
                return;
            }
        }
        panic!("the helper ended before {line:?}");
    }
}

impl Helper {
    /// SIGKILL.
    fn kill(&mut self) {
        let _dead_already = self.child.kill();
        let _status = self.child.wait();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Not a test: what the other process does.
#[test]
#[ignore = "run by the tests that kill it"]
fn helper() {
    let Ok(task) = std::env::var(TASK) else { return };
    let socket = std::env::var_os(SOCKET).unwrap();
    let socket = Path::new(&socket);
    if task == "mover" {
        return serve_until_killed(socket);
    }
    std::thread::spawn(|| {
        // Nobody writes there: it ends with whoever started us.
        let _end = std::io::stdin().read_line(&mut String::new());
        std::process::exit(0);
    });
    match task.as_str() {
        "client" => {
            let client = Client::start(socket, GuestOptions::new(MEMORY)).unwrap();
            println!("connected");
            expect(&client.seen, Seen::Opened);
            expect(&client.seen, Seen::Started);
            println!("open");
            for number in 0..=200u64 {
                assert_eq!(client.echo(&number.to_le_bytes()).unwrap(), number.to_le_bytes());
                println!("echo {number}");
            }
            client.channel.disable();
            println!("closed");
            wait_to_be_killed();
        }
        "server" => {
            let _server = Server::start_at(socket, HostOptions::default(), 1);
            println!("serving");
            wait_to_be_killed();
        }
        other => panic!("{other}"),
    }
}

/// Serves one device: a new one, or the one that another process has left. Saves it when it is told to,
/// and then does nothing more.
fn serve_until_killed(socket: &Path) {
    let stream = |name| socket.with_file_name(name);
    let worker = Worker::spawn("server").unwrap();
    let (host, device) = if stream("channel").exists() {
        let [transport, bus, channel] = STREAMS.map(|name| std::fs::read(stream(name)).unwrap());
        let options = HostOptions::default();
        let restoring = UnixHost::bind_restoring(socket, options, &transport, &bus).unwrap();
        let device = quick_device(restoring.bus());
        device.enable().unwrap();
        device.restore_from(&channel[..]).unwrap();
        assert!(restoring.drive_until_back(PATIENCE).unwrap());
        (restoring.finish().unwrap(), device)
    } else {
        let host = UnixHost::bind(socket).unwrap();
        let device = quick_device(host.bus());
        device.enable().unwrap();
        (host, device)
    };
    let host = Arc::new(host);
    worker.add(&device).unwrap();
    worker.add_source(Arc::clone(&host), Arc::new(Drive(Arc::clone(&host)))).unwrap();
    device.start();
    println!("serving");
    if std::io::stdin().read_line(&mut String::new()).unwrap() == 0 {
        return; // whoever started us is gone
    }
    let held = host.hold().unwrap();
    let frozen = device.freeze().unwrap();
    assert!(frozen.wait(Some(PATIENCE)));
    let saved = Saved::of(&held, &frozen);
    for (name, bytes) in STREAMS.into_iter().zip([saved.transport, saved.bus, saved.channel]) {
        std::fs::write(stream(name), bytes).unwrap();
    }
    println!("saved");
    wait_to_be_killed();
}

fn wait_to_be_killed() {
    loop {
        std::thread::park();
    }
}

#[test]
fn a_client_killed_at_any_step_leaves_the_server_whole() {
    let server = Server::start();
    for round in 0..3 {
        for step in STEPS {
            let mut helper = Helper::start("client", server.path());
            helper.await_line(step);
            drop(helper);
            // The next one is not kept out, whether the server has seen the end of the last or not.
            let client = Client::connect(server.path());
            assert_eq!(client.echo(b"next....").unwrap(), b"next....", "{round}: {step}");
            drop(client);
            await_rest(&server);
        }
    }
}

/// Between the steps as well: the moment is not the test's to choose.
#[test]
fn a_client_killed_at_any_moment_leaves_the_server_whole() {
    let server = Server::start();
    for microseconds in (0..40).map(|n| n * n * 25) {
        let helper = Helper::start("client", server.path());
        let moment = Instant::now() + Duration::from_micros(microseconds);
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        drop(helper);
    }
    let client = Client::connect(server.path());
    for number in 0..100u64 {
        assert_eq!(client.echo(&number.to_le_bytes()).unwrap(), number.to_le_bytes());
    }
    drop(client);
    await_rest(&server);
}

#[test]
fn when_the_server_is_killed_the_client_knows_within_a_second() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vmbus");
    for _ in 0..3 {
        let mut helper = Helper::start("server", &socket);
        helper.await_line("serving");
        let client = Client::connect(&socket);
        assert_eq!(client.echo(b"alive...").unwrap(), b"alive...");
        assert!(matches!(UnixHost::bind(&socket), Err(BindError::InUse { .. })));

        // A call that waits for an answer learns of it.
        let channel = &client.channel;
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                while echo(channel, b"still...").is_ok() {}
                Instant::now()
            });
            let killed = Instant::now();
            drop(helper);
            let failed = waiting.join().unwrap();
            assert!(failed.duration_since(killed) < Duration::from_secs(1));
        });
        expect(&client.seen, Seen::Closed);
        assert!(matches!(client.guest.lost().as_deref(), Some(ConnectionError::Closed)));
        client.channel.disable();
        assert_eq!(client.guest.bus().counts().rings, 0);
        // Its socket is still there; the next server takes its place.
        assert!(socket.exists());
    }
    let _server = Server::start_at(&socket, HostOptions::default(), 1);
    Client::connect(&socket);
}

/// One process after the other is killed, and its place taken. The guest asks and asks, and hears nothing
/// of it.
#[test]
fn a_server_goes_on_in_another_process_after_sigkill() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("vmbus");
    let mut helper = Helper::start("mover", &socket);
    helper.await_line("serving");
    let options = GuestOptions { reconnect: Some(PATIENCE), ..GuestOptions::new(MEMORY) };
    let client = Client::connect_with(&socket, options).unwrap();
    let (channel, guest) = (&client.channel, &client.guest);
    let (answered, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let number = answered.load(Ordering::Relaxed).to_le_bytes();
                assert_eq!(echo(channel, &number).unwrap(), number);
                answered.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..8 {
            let before = answered.load(Ordering::Relaxed);
            eventually(|| answered.load(Ordering::Relaxed) > before || asking.is_finished());
            assert!(!asking.is_finished());
            writeln!(helper.child.stdin.as_ref().unwrap(), "save").unwrap();
            helper.await_line("saved");
            helper.kill();
            helper = Helper::start("mover", &socket);
            helper.await_line("serving");
        }
        over.store(true, Ordering::Relaxed);
    });
    let resumed = |events: Vec<GuestEvent>| {
        events.iter().filter(|event| matches!(event, GuestEvent::Resumed { .. })).count()
    };
    assert_eq!(resumed(guest.take_events()), 8);
    assert!(guest.lost().is_none());
    drop(helper);
    // A process that has saved nothing since: the guest finds its state used.
    let helper = Helper::start("mover", &socket);
    eventually(|| guest.lost().is_some());
    let lost = guest.lost().unwrap();
    assert!(matches!(*lost, ConnectionError::Refused { reason: Reason::Stale, .. }), "{lost}");
    drop(helper);
}

/// Nothing of a guest is left, as soon as the server has seen its end.
fn await_rest(server: &Server) {
    eventually(|| {
        let usage = server.host.bus().usage();
        let left = (usage.held, usage.gpadls, usage.messages, server.host.guest());
        left == (0, 0, 0, None) && usage.channels == 1
    });
}
