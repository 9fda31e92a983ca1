//! The control interface over its socket, with a VM that only takes notes.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

mod control_vm;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use control_vm::NotedVm;
use kmcl_vmm::control::client::{Client, Error as ClientError};
use kmcl_vmm::control::{
    Compression, Control, ControlError, Error, ErrorKind, MAX_BODY_BYTES, MAX_CONNECTIONS,
    MAX_HEAD_BYTES, RemoveDiskRequest, SaveRequest, ShutdownRequest, State,
};

struct Served {
    vm: Arc<NotedVm>,
    control: Control,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

fn serve() -> Served {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let vm = Arc::new(NotedVm::new());
    let control = Control::serve(&path, Arc::clone(&vm) as _).unwrap();
    Served { vm, control, path, _dir: dir }
}

impl Served {
    fn client(&self) -> Client {
        Client::connect(&self.path).unwrap()
    }

    fn stream(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// Sends bytes and gives all that comes, up to the end of the connection.
    fn said(&self, bytes: &[u8]) -> String {
        let mut stream = self.stream();
        // Who refuses need not read on.
        let _refused = stream.write_all(bytes);
        let _ended = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _reset = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }
}

fn kind<T>(result: Result<T, ClientError>) -> Option<ErrorKind> {
    match result {
        Err(ClientError::Refused(error)) => Some(error.kind),
        Err(error) => panic!("{error}"),
        Ok(_) => None,
    }
}

fn save_request() -> SaveRequest {
    SaveRequest {
        destination: "/srv/saved".into(),
        compression: Compression::Zstd,
        keep_running: true,
    }
}

#[test]
fn every_request_reaches_the_vm_as_it_was_asked() {
    let served = serve();
    let mut client = served.client();
    let info = client.info().unwrap();
    assert_eq!((info.state, info.pid), (State::Running, std::process::id()));
    assert_eq!(client.counters().unwrap().0["exits"]["hlt"], 7);
    client.pause().unwrap();
    client.resume().unwrap();
    assert_eq!(client.save(&save_request()).unwrap().memory_bytes, 1 << 30);
    client.shutdown(&ShutdownRequest { force: true }).unwrap();
    client.reboot(&ShutdownRequest::default()).unwrap();
    let disk = serde_json::from_str(r#"{"id": "d", "path": "/d", "cache": "direct"}"#).unwrap();
    let address = client.add_disk(&disk).unwrap();
    assert_eq!((address.id.as_str(), address.controller, address.lun), ("d", 0, 3));
    client.remove_disk(&RemoveDiskRequest { id: "d".into() }).unwrap();
    let expected = [
        "info".into(),
        "counters".into(),
        "pause".into(),
        "resume".into(),
        format!("{:?}", save_request()),
        "saved".into(),
        "shutdown force=true".into(),
        "reboot force=false".into(),
        format!("{disk:?}"),
        "remove d".into(),
    ];
    assert_eq!(served.vm.notes(), expected);
}

/// What a VM answers comes to whoever asked, with its kind.
#[test]
fn each_kind_of_error_comes_back() {
    let served = serve();
    let mut client = served.client();
    for kind_of in ErrorKind::ALL {
        served.vm.fail_with(Some(ControlError::new(kind_of, format!("for {kind_of:?}"))));
        for result in [client.pause(), client.save(&save_request()).map(|_| ())] {
            match result {
                Err(ClientError::Refused(error)) => {
                    assert_eq!((error.kind, error.message), (kind_of, format!("for {kind_of:?}")));
                }
                other => panic!("{kind_of:?}: {other:?}"),
            }
        }
    }
    served.vm.fail_with(None);
    client.pause().unwrap();
}

/// A save takes as long as it takes; questions do not wait for it, changes do, in their order.
#[test]
fn a_long_change_holds_back_changes_and_no_questions() {
    let served = serve();
    let gate = served.vm.hold_saves();
    let (path, mut asking) = (served.path.clone(), served.client());
    let save = thread::spawn(move || asking.save(&save_request()));
    served.vm.wait_for(|notes| notes.iter().any(|note| note.starts_with("SaveRequest")));
    let pause = thread::spawn(move || Client::connect(&path).unwrap().pause());
    let mut client = served.client();
    for _ in 0..3 {
        assert_eq!(client.info().unwrap().state, State::Saving);
        client.counters().unwrap();
    }
    assert!(!served.vm.notes().contains(&"pause".to_owned()));
    drop(gate);
    save.join().unwrap().unwrap();
    pause.join().unwrap().unwrap();
    assert!(served.vm.notes().contains(&"pause".to_owned()));
}

#[test]
fn a_vm_that_panics_is_answered_for() {
    let served = serve();
    served.vm.panic_on_pause();
    assert_eq!(kind(served.client().pause()), Some(ErrorKind::Failed));
    assert_eq!(kind(served.client().resume()), None, "the thread goes on");
}

#[test]
fn whoever_goes_away_in_the_middle_leaves_nothing_behind() {
    let served = serve();
    let gate = served.vm.hold_saves();
    let mut stream = served.stream();
    let body = serde_json::to_string(&save_request()).unwrap();
    let length = body.len();
    write!(stream, "PUT /api/v1/vm.save HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}")
        .unwrap();
    served.vm.wait_for(|notes| notes.iter().any(|note| note.starts_with("SaveRequest")));
    drop(stream);
    drop(gate);
    served.client().pause().unwrap();
    assert!(served.vm.notes().contains(&"saved".to_owned()), "what was begun was ended");
    // Cut off anywhere.
    let whole = format!("PUT /api/v1/vm.save HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
    for end in 0..whole.len() {
        served.stream().write_all(&whole.as_bytes()[..end]).unwrap();
    }
    served.client().info().unwrap();
    assert_eq!(served.vm.notes().iter().filter(|note| *note == "saved").count(), 1);
}

/// The answers to what is no request, as a stranger to HTTP, a fuzzer or a mistyped command would send it.
#[test]
fn malformed_requests_are_told_so_and_disturb_nobody() {
    let served = serve();
    let put = |name: &str, fields: &str, body: &str| {
        let length = body.len();
        format!("PUT /api/v1/{name} HTTP/1.1\r\nContent-Length: {length}\r\n{fields}\r\n{body}")
    };
    let long_path = "x".repeat(MAX_HEAD_BYTES);
    for (request, status) in [
        ("\u{0}\u{1}\u{2}".into(), "400"),
        ("hello\r\n\r\n".into(), "400"),
        ("GET /api/v1/vm.info HTTP/1.1\r\n".into(), "400"),
        ("GET /api/v1/vm.info HTTP/2.0\r\n\r\n".into(), "505"),
        (format!("GET /{long_path} HTTP/1.1\r\n\r\n"), "431"),
        (format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(40)), "431"),
        ("GET /etc/passwd HTTP/1.1\r\n\r\n".into(), "404"),
        ("GET /api/v1/../../etc HTTP/1.1\r\n\r\n".into(), "404"),
        ("DELETE /api/v1/vm.info HTTP/1.1\r\n\r\n".into(), "405"),
        ("HEAD /api/v1/vm.info HTTP/1.1\r\n\r\n".into(), "405"),
        (put("vm.save", "Transfer-Encoding: chunked\r\n", "0\r\n\r\n"), "411"),
        (put("vm.save", "Content-Length: 1\r\n", "{}"), "400"),
        (put("vm.save", "", "{"), "400"),
        (put("vm.save", "", &"[".repeat(60_000)), "400"),
        (put("vm.save", "", r#"{"destination": 5}"#), "400"),
        (put("vm.save", "", &"x".repeat(MAX_BODY_BYTES)), "400"),
        (put("vm.save", "", &"x".repeat(MAX_BODY_BYTES + 1)), "413"),
        (put("vm.save", "", &"x".repeat(8 << 20)), "413"),
        (put("vm.pause", "", r#"{"hard": true}"#), "400"),
        (put("vm.remove-disk", "", "null"), "400"),
    ] {
        let start: String = request.chars().take(70).collect();
        let answer = served.said(request.as_bytes());
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{start:?}: {answer:?}");
    }
    served.client().info().unwrap();
    assert_eq!(served.vm.notes(), ["info"], "none of them was a call");
}

#[test]
fn slow_and_silent_peers_disturb_nobody() {
    let served = serve();
    // A request that never ends, one whose answer is never read, and those who say nothing.
    let mut never_ends = served.stream();
    never_ends.write_all(b"PUT /api/v1/vm.save HTTP/1.1\r\nContent-Le").unwrap();
    let mut never_reads = served.stream();
    never_reads.set_nonblocking(true).unwrap();
    let one = b"GET /api/v1/vm.counters HTTP/1.1\r\n\r\n";
    let mut asked = 0;
    while never_reads.write(one).is_ok() && asked < 1_000_000 {
        asked += 1;
    }
    assert!(asked < 1_000_000, "requests are taken without end while no answer is read");
    let silent: Vec<_> = (0..8).map(|_| served.stream()).collect();
    let mut client = served.client();
    for _ in 0..10 {
        client.info().unwrap();
    }
    drop((never_ends, never_reads, silent));
}

/// The owner's own idle connections do not lock the owner out; requests under way do, with an answer.
#[test]
fn connections_are_bounded_and_the_idle_make_room() {
    let served = serve();
    let idle: Vec<_> = (0..2 * MAX_CONNECTIONS).map(|_| served.stream()).collect();
    for _ in 0..2 * MAX_CONNECTIONS {
        served.client().info().unwrap();
    }
    drop(idle);

    let begun: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| {
            let mut stream = served.stream();
            stream.write_all(b"GET /api/v1/vm.in").unwrap();
            stream
        })
        .collect();
    // The last of them may be taken for idle until its bytes are seen: ask until none is.
    let turned_away = (0..MAX_CONNECTIONS + 1).find_map(|_| {
        let mut stream = served.stream();
        stream.write_all(b"GET /api/v1/vm.in").unwrap();
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).is_ok().then_some(answer)
    });
    assert_eq!(turned_away.as_ref().map(|answer| &answer[..]), Some(&b"HTTP/1.1 503"[..]));
    drop(begun);
    // They are gone as soon as that is seen.
    loop {
        match served.client().info() {
            Ok(_) => break,
            Err(ClientError::Refused(error)) if error.kind == ErrorKind::Busy => {
                thread::yield_now()
            }
            Err(ClientError::Connection(_)) => thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn requests_may_follow_one_another_without_waiting() {
    let served = serve();
    let one = "GET /api/v1/vm.info HTTP/1.1\r\n\r\n";
    let pause = "PUT /api/v1/vm.pause HTTP/1.1\r\n\r\n";
    let answers = served.said(format!("{one}{pause}{one}").as_bytes());
    let statuses: Vec<_> = answers.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(statuses, ["200", "204", "200"]);
    assert_eq!(served.vm.notes(), ["info", "pause", "info"]);
}

/// The answer to the save that ends the program is not lost with the program.
#[test]
fn closing_waits_for_what_is_under_way() {
    let served = serve();
    let gate = served.vm.hold_saves();
    let mut asking = served.client();
    let mut waiting = served.client();
    let mut idle = served.client();
    let save = thread::spawn(move || asking.save(&save_request()));
    served.vm.wait_for(|notes| notes.iter().any(|note| note.starts_with("SaveRequest")));
    let pause = thread::spawn(move || waiting.pause());
    let Served { vm, control, path, _dir } = served;
    let closing = thread::spawn(move || drop(control));
    // Nobody is let in from the begin of the end.
    while Client::connect(&path).is_ok() {
        thread::yield_now();
    }
    assert!(!path.exists());
    drop(gate);
    assert!(save.join().unwrap().is_ok());
    closing.join().unwrap();
    let paused = pause.join().unwrap();
    let held_back = match &paused {
        Err(ClientError::Refused(error)) => error.kind == ErrorKind::Busy,
        Err(ClientError::Connection(_)) => true,
        _ => false,
    };
    assert!(held_back, "{paused:?}");
    assert!(matches!(idle.info(), Err(ClientError::Connection(_))));
    assert!(!vm.notes().contains(&"pause".to_owned()));
    assert_eq!(Arc::strong_count(&vm), 1, "nothing of it is left");
}

#[test]
fn a_path_in_use_is_not_taken() {
    let served = serve();
    let vm: Arc<NotedVm> = Arc::new(NotedVm::new());
    let again = Control::serve(&served.path, Arc::clone(&vm) as _);
    assert!(matches!(again, Err(Error::InUse(_))), "{again:?}");
    let file = served.path.with_extension("txt");
    std::fs::write(&file, "").unwrap();
    let at_file = Control::serve(&file, Arc::clone(&vm) as _);
    assert!(matches!(at_file, Err(Error::NotASocket(_))), "{at_file:?}");
    let nowhere = Control::serve(&served.path.join("x"), vm);
    assert!(matches!(nowhere, Err(Error::Listen { .. })), "{nowhere:?}");
    served.client().info().unwrap();
}

#[test]
fn a_client_says_why_nobody_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["absent".to_owned(), "x".repeat(200)] {
        let error = Client::connect(&dir.path().join(name)).unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
    }
}

/// With the client that everybody has, where there is one.
#[test]
fn curl_works() {
    let served = serve();
    let curl = |arguments: &[&str]| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--max-time", "20", "--unix-socket"]);
        command.arg(&served.path).args(arguments).stdin(Stdio::null());
        command.args(["--write-out", " %{http_code}"]).output()
    };
    let Ok(info) = curl(&["http://vm/api/v1/vm.info"]) else { return };
    let info = String::from_utf8(info.stdout).unwrap();
    assert!(info.starts_with(r#"{"state":"running""#) && info.ends_with("} 200"), "{info}");
    let save = r#"{"destination": "/srv/saved", "compression": "zstd", "keep_running": true}"#;
    let long = format!("{save}{}", " ".repeat(MAX_BODY_BYTES - save.len()));
    let held_back = ["-H", "Expect: 100-continue", "-X", "PUT"];
    let url = "http://vm/api/v1/vm.save";
    for (arguments, body, expected) in [
        (&["-X", "PUT"][..], save, "} 200"),
        (&held_back[..], long.as_str(), "} 200"),
        (&["-X", "PUT"][..], "{}", "} 400"),
        (&["-X", "POST"][..], save, "} 405"),
    ] {
        let mut all = arguments.to_vec();
        all.extend(["-d", body, url]);
        let output = curl(&all).unwrap();
        let answer = String::from_utf8(output.stdout).unwrap();
        assert!(answer.ends_with(expected), "{arguments:?}: {answer} {:?}", output.stderr);
    }
    let paused = curl(&["-X", "PUT", "http://vm/api/v1/vm.pause"]).unwrap();
    assert_eq!(paused.stdout, b" 204");
}
