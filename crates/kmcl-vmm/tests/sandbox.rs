//! The sandbox on this kernel: each test runs this program again, as a process of its own that puts up the
//! walls and then tries them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

mod control_vm;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

use kmcl_vmm::control::Control;
use kmcl_vmm::control::client::Client;
use kmcl_vmm::sandbox::{Error, Files, Landlock, Paths, Report, Sandbox};
use libtest_mimic::{Arguments, Trial};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, Signal};

/// In the environment of a process that is to play a part of a test: which.
const PART: &str = "KMCL_SANDBOX_PART";

const SECCOMP: Sandbox = Sandbox { seccomp: true, landlock: Landlock::Off };
const LANDLOCK: Sandbox = Sandbox { seccomp: false, landlock: Landlock::WherePossible };

/// A part of a test, for a process of its own.
type Part = fn(&Path);

/// A test of a process that ends well, by what it shows and its part.
const TESTS: &[(&str, Part)] = &[
    ("a_forbidden_call_is_refused", calls),
    ("what_a_vm_does_is_let_through", ordinary),
    ("files_that_were_not_named_cannot_be_opened", files),
    ("threads_that_would_stay_outside_are_counted", threads),
    ("landlock_is_asked_for_or_required", required),
];

/// The part that does not end well.
const EXECUTE: &str = "execute";

/// Parts are played before there is a second thread, as a program would put up its walls.
fn main() {
    let Ok(name) = std::env::var(PART) else {
        let tests = TESTS.iter().map(|&(name, _)| {
            Trial::test(name, move || {
                let output = play(name);
                output.status.success().then_some(()).ok_or_else(|| format!("{output:#?}").into())
            })
        });
        let replaced = Trial::test("a_program_that_is_replaced_ends", || {
            a_program_that_is_replaced_ends();
            Ok(())
        });
        let tests = tests.chain([replaced]).collect();
        libtest_mimic::run(&Arguments::from_args(), tests).exit();
    };
    let directory = tempfile::tempdir().unwrap();
    match TESTS.iter().find(|(known, _)| *known == name) {
        Some((_, part)) => part(directory.path()),
        None if name == EXECUTE => execute(),
        None => panic!("there is no part {name}"),
    }
}

/// Plays a part in a process of its own.
fn play(name: &str) -> Output {
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.env(PART, name).stdin(Stdio::null()).output().unwrap()
}

fn calls(_: &Path) {
    // One that is there already is behind the wall, too.
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let before = thread::spawn(move || {
        wait.recv().unwrap();
        rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).err()
    });
    let report = SECCOMP.apply(&Paths::default()).unwrap();
    assert_eq!(report, Report { seccomp: true, files: Files::Unrestricted });
    go.send(()).unwrap();
    assert_eq!(before.join().unwrap(), Some(Errno::PERM), "a thread from before");

    let inet = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None);
    assert_eq!(inet.err(), Some(Errno::PERM), "a socket of the network");
    let parent: Pid = rustix::process::getppid().unwrap();
    let killed = rustix::process::kill_process(parent, Signal::URG);
    assert_eq!(killed.err(), Some(Errno::PERM), "a signal to another process");
    let link = std::os::unix::fs::symlink("/etc", "/tmp/kmcl-sandbox-link");
    assert_eq!(link.unwrap_err().kind(), io::ErrorKind::PermissionDenied, "a link");
    let program = Command::new("/bin/true").status();
    assert_eq!(program.unwrap_err().kind(), io::ErrorKind::PermissionDenied, "another process");
}

fn a_program_that_is_replaced_ends() {
    const SIGSYS: i32 = 31;
    let output = play(EXECUTE);
    assert_eq!(output.status.signal(), Some(SIGSYS), "{output:?}");
}

fn execute() {
    SECCOMP.apply(&Paths::default()).unwrap();
    panic!("{}", Command::new("/bin/true").exec());
}

/// What a VM does goes on: threads, files, sockets, waiting, the control interface.
fn ordinary(directory: &Path) {
    let socket = directory.join("control");
    let write = vec![directory.to_owned()];
    let paths = Paths { write, sockets: vec![socket.clone()], ..Paths::default() };
    Sandbox::default().apply(&paths).unwrap();

    let vm = Arc::new(control_vm::NotedVm::new());
    let control = Control::serve(&socket, vm).unwrap();
    let asked = thread::Builder::new().name("asks".into()).spawn(move || {
        let mut client = Client::connect(&socket).unwrap();
        client.pause().unwrap();
        client.info().unwrap()
    });
    assert_eq!(asked.unwrap().join().unwrap().pid, std::process::id());
    drop(control);

    let (made, renamed) = (directory.join("state.new"), directory.join("state"));
    let file = File::create_new(&made).unwrap();
    file.set_len(1 << 20).unwrap();
    file.write_all_at(b"saved", 4096).unwrap();
    file.sync_all().unwrap();
    fs::rename(&made, &renamed).unwrap();
    File::open(directory).unwrap().sync_all().unwrap();
    fs::create_dir(directory.join("vm")).unwrap();
    fs::copy(&renamed, directory.join("vm/copy")).unwrap();
    fs::remove_dir_all(directory.join("vm")).unwrap();

    let memory = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&memory, 1 << 20).unwrap();
    rustix::fs::fcntl_add_seals(&memory, rustix::fs::SealFlags::SHRINK).unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
    let mut ready = [rustix::event::PollFd::new(&event, rustix::event::PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut ready, None), Ok(1));
    thread::sleep(std::time::Duration::from_millis(1));
    let panicked = thread::spawn(|| panic!("it must end like any other")).join();
    assert!(panicked.is_err());
}

fn files(directory: &Path) {
    let at = |name: &str| directory.join(name);
    for name in ["read", "write", "other"] {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join("file"), "contents").unwrap();
    }
    fs::write(at("image"), "contents").unwrap();
    let open_before = File::open(at("other/file")).unwrap();
    let paths = Paths {
        read: vec![at("read")],
        write: vec![at("write"), at("image")],
        sockets: vec![at("sockets/vm")],
    };
    // A directory that is not there.
    assert!(matches!(LANDLOCK.apply(&paths), Err(Error::Path { .. })));
    fs::create_dir(at("sockets")).unwrap();
    let report = LANDLOCK.apply(&paths).unwrap();
    let Files::Restricted { abi } = report.files else {
        assert_eq!(report.files, Files::Unsupported);
        return eprintln!("this kernel has no landlock");
    };
    assert!(abi >= 1);
    let read = |name: &str| fs::read(at(name)).is_ok();
    let write = |name: &str| OpenOptions::new().write(true).open(at(name)).is_ok();
    let make = |name: &str| File::create_new(at(name)).is_ok();
    let remove = |name: &str| fs::remove_file(at(name)).is_ok();
    let listen = |name: &str| UnixListener::bind(at(name)).is_ok();
    for (what, done, expected) in [
        ("read what may be read", read("read/file"), true),
        ("write what may be read", write("read/file"), false),
        ("remove what may be read", remove("read/file"), false),
        ("read what may be written", read("write/file"), true),
        ("write what may be written", write("write/file"), true),
        ("make a file", make("write/new"), true),
        ("remove a file", remove("write/new"), true),
        ("write an image", write("image"), true),
        ("read what was not named", read("other/file"), false),
        ("remove what was not named", remove("other/file"), false),
        ("make what was not named", make("new"), false),
        ("read the system's files", fs::read("/etc/passwd").is_ok(), false),
        ("read a link out", fs::read(at("write/../other/file")).is_ok(), false),
        ("listen among the sockets", listen("sockets/vm"), true),
        ("make a file among them", make("sockets/file"), false),
        ("listen elsewhere", listen("read/vm"), false),
        ("execute", Command::new("/bin/true").status().is_ok(), false),
    ] {
        assert_eq!(done, expected, "{what}");
    }
    let mut byte = [0];
    assert_eq!(open_before.read_at(&mut byte, 0).unwrap(), 1, "what is open stays open");
}

/// Files are restricted thread by thread: nobody is left outside without a word.
fn threads(directory: &Path) {
    fs::write(directory.join("secret"), "").unwrap();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let secret = directory.join("secret");
    let other = thread::spawn(move || {
        wait.recv().unwrap();
        fs::read(secret).is_ok()
    });
    let applied = LANDLOCK.apply(&Paths::default());
    go.send(()).unwrap();
    let outside = other.join().unwrap();
    match applied {
        Err(Error::Threads { count: 2 }) => {}
        Ok(Report { files: Files::Restricted { .. }, .. }) => assert!(!outside),
        Ok(Report { files: Files::Unsupported, .. }) => eprintln!("this kernel has no landlock"),
        other => panic!("{other:?}"),
    }
}

/// Whether this kernel has it or not, the answer is the right one.
fn required(directory: &Path) {
    let strict = Sandbox { seccomp: false, landlock: Landlock::Required };
    let paths = Paths { read: vec![directory.to_owned()], ..Paths::default() };
    match strict.apply(&paths) {
        Ok(Report { seccomp: false, files: Files::Restricted { .. } }) => {
            assert!(fs::read("/etc/passwd").is_err());
        }
        Err(Error::NoLandlock) => {
            assert_eq!(LANDLOCK.apply(&paths).unwrap().files, Files::Unsupported);
        }
        other => panic!("{other:?}"),
    }
}
