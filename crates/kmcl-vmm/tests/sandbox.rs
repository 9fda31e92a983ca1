//! The sandbox on this kernel: each test runs this program again, as a process of its own that puts up the
//! walls and then tries them.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

mod control_vm;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

use kmcl_vmm::control::Control;
use kmcl_vmm::control::client::Client;
use kmcl_vmm::memory::{self, Load, Ram, save_memory};
use kmcl_vmm::sandbox::{Error, Files, Landlock, Paths, Report, Sandbox};
use kvm_ioctls::Kvm;
use libtest_mimic::{Arguments, Trial};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType};
use rustix::process::{Pid, Signal};
use vmbus_memory::GuestMemory;
use vsp_storage::block::{
    Backend, Buffers, CacheMode, Engine, FileOptions, IoOperation, IoOutcome, IoRequest, open_file,
};

/// In the environment of a process that is to play a part of a test: which, and an empty directory for it.
const PART: &str = "KMCL_SANDBOX_PART";
const DIRECTORY: &str = "KMCL_SANDBOX_DIRECTORY";

const SECCOMP: Sandbox = Sandbox { seccomp: true, landlock: Landlock::Off };
const LANDLOCK: Sandbox = Sandbox { seccomp: false, landlock: Landlock::WherePossible };

/// A part of a test, for a process of its own.
type Part = fn(&Path);

/// A test of a process that ends well, by what it shows and its part.
const TESTS: &[(&str, Part)] = &[
    ("a_forbidden_call_is_refused", calls),
    ("what_every_program_does_is_let_through", ordinary),
    ("disks_are_read_and_written", disks),
    ("memory_is_saved_and_restored", memory),
    ("processors_run", processors),
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
    let directory = PathBuf::from(std::env::var(DIRECTORY).unwrap());
    match TESTS.iter().find(|(known, _)| *known == name) {
        Some((_, part)) => part(&directory),
        None if name == EXECUTE => execute(),
        None => panic!("there is no part {name}"),
    }
}

/// Plays a part in a process of its own, which could not remove its directory.
fn play(name: &str) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.env(PART, name).env(DIRECTORY, directory.path());
    program.stdin(Stdio::null()).output().unwrap()
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

/// Threads, files, sockets, waiting, a panic, the control interface.
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
    let mut ready = [PollFd::new(&event, PollFlags::IN)];
    assert_eq!(poll(&mut ready, None), Ok(1));
    thread::sleep(std::time::Duration::from_millis(1));
    let panicked = thread::spawn(|| panic!("it must end like any other")).join();
    assert!(panicked.is_err());
}

/// A disk that is added later, by each engine and through each cache.
fn disks(directory: &Path) {
    let paths = Paths { write: vec![directory.to_owned()], ..Paths::default() };
    Sandbox::default().apply(&paths).unwrap();
    let memory = GuestMemory::memfd(1 << 20).unwrap();
    let image = directory.join("disk.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    for engine in [Engine::IoUring, Engine::Threads(2)] {
        for cache in [CacheMode::Buffered, CacheMode::Direct] {
            let options = FileOptions { engine, cache, ..FileOptions::default() };
            let disk = open_file(&image, &options).unwrap();
            let written = [0x5a; 4096];
            memory.write(0, &written).unwrap();
            perform(&*disk, &memory, IoOperation::Write { fua: true }, 0);
            perform(&*disk, &memory, IoOperation::Read, 8192);
            let mut read = [0; 4096];
            memory.read(8192, &mut read).unwrap();
            assert_eq!(read, written, "{engine:?} {cache:?}");
        }
    }
}

/// Moves 4 KiB between the begin of a disk and `gpa`.
fn perform(disk: &dyn Backend, memory: &GuestMemory, operation: IoOperation, gpa: u64) {
    let mut buffers = Buffers::new();
    buffers.set(memory, [(gpa, 4096)], 4096).unwrap();
    let request = IoRequest { token: 0, operation, offset: 0, bytes: 4096, buffers };
    let mut done = Vec::new();
    disk.submit(&mut vec![request], &mut done);
    while done.is_empty() {
        let fd = disk.completion_fd().unwrap();
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], None).unwrap();
        disk.reap(&mut done);
    }
    let outcome = done.pop().map(|done| done.outcome);
    assert!(matches!(outcome, Some(IoOutcome::Done(Ok(())))), "{outcome:?}");
}

/// A VM that is saved, and another that is restored, at once and while it runs.
fn memory(directory: &Path) {
    let paths = Paths { write: vec![directory.to_owned()], ..Paths::default() };
    Sandbox::default().apply(&paths).unwrap();
    let ram = Ram::new(64 << 20).unwrap();
    ram.memory().write(0x1234, b"contents").unwrap();
    for compression in
        [memory::Compression::None, memory::Compression::Zstd { level: memory::ZSTD_LEVEL }]
    {
        let file = directory.join(format!("{compression:?}"));
        let index = save_memory(&ram, &file, compression, &mut |_| {}).unwrap();
        let failed = Box::new(|error| panic!("{error}"));
        for load in [Load::Eager, Load::Lazy { failed }] {
            let what = format!("{compression:?} {load:?}");
            let restored = Ram::restore(&file, &index, load, false, &mut |_| {}).unwrap();
            let mut read = [0; 8];
            restored.memory().read(0x1234, &mut read).unwrap();
            assert_eq!(&read, b"contents", "{what}");
            restored.wait_until_loaded().unwrap();
        }
    }
}

/// As far as this machine's KVM goes: nothing of it is refused by the sandbox.
fn processors(_: &Path) {
    let Ok(before) = Kvm::new() else { return eprintln!("this machine has no KVM") };
    let before = before.create_vm().map(drop);
    Sandbox::default().apply(&Paths::default()).unwrap();
    let vm = Kvm::new().unwrap().create_vm();
    assert_eq!(vm.is_ok(), before.is_ok(), "{:?}", vm.err());
    let Ok(vm) = vm else { return };
    let vcpu = thread::spawn(move || {
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let registers = vcpu.get_regs().unwrap();
        vcpu.set_regs(&registers).unwrap();
        // There is no memory, so it does not get far.
        vcpu.run().map(drop).map_err(|error| Errno::from_raw_os_error(error.errno())).err()
    });
    assert_ne!(vcpu.join().unwrap(), Some(Errno::PERM));
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
    let program = std::env::current_exe().unwrap();
    let program = program.to_str().unwrap();
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
        ("read this program", File::open(program).is_ok(), true),
        ("write this program", write(program), false),
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
