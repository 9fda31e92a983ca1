//! The other process is killed, at whatever moment.
//!
//! The helper is this test program itself, run again with the name of one test and its task in the
//! environment.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use vmbus_unix::{BindError, ConnectionError, GuestOptions, HostOptions, UnixHost};

use crate::ends::*;

const TASK: &str = "VMBUS_UNIX_TEST_TASK";
const SOCKET: &str = "VMBUS_UNIX_TEST_SOCKET";

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

impl Drop for Helper {
    fn drop(&mut self) {
        let _dead_already = self.child.kill();
        let _status = self.child.wait();
    }
}

/// Not a test: what the other process does.
#[test]
#[ignore = "run by the tests that kill it"]
fn helper() {
    let Ok(task) = std::env::var(TASK) else { return };
    let socket = std::env::var_os(SOCKET).unwrap();
    let socket = Path::new(&socket);
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

/// Nothing of a guest is left, as soon as the server has seen its end.
fn await_rest(server: &Server) {
    eventually(|| {
        let usage = server.host.bus().usage();
        let left = (usage.held, usage.gpadls, usage.messages, server.host.guest());
        left == (0, 0, 0, None) && usage.channels == 1
    });
}
