//! What happens to disks and processes while they are in use.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod support;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use rustix::process::Signal;
use support::{Server, content, finish, image, kmcl, part, signal, text, wait};

/// A client that writes until something ends it.
const ENDLESS_WRITES: [&str; 7] =
    ["bench", "randwrite", "--overwrite", "--seconds", "600", "--timeout", "60"];

/// When the file was written last.
fn modified(path: &Path) -> SystemTime {
    std::fs::metadata(path).unwrap().modified().unwrap()
}

#[test]
fn nobody_at_the_socket_is_an_error_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let started = Instant::now();
    kmcl(["disk", "info", "--socket", text(&missing)]).fails(4, "missing");
    let file = image(dir.path(), "file", 512);
    kmcl(["disk", "info", "--socket", text(&file)]).fails(4, "file");
    // A server that was killed leaves its socket behind.
    let dead = dir.path().join("dead");
    drop(UnixListener::bind(&dead).unwrap());
    kmcl(["disk", "info", "--socket", text(&dead)]).fails(4, "dead");
    let long = dir.path().join("x".repeat(200));
    kmcl(["disk", "info", "--socket", text(&long)]).fails(4, "xxx");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
}

#[test]
fn a_second_client_is_told_that_the_server_is_busy_and_the_first_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 1 << 20);
    let server = Server::start([&disk]);
    // The first client cannot finish before somebody reads what it writes.
    let mut first = server.disk_command(["read"]).spawn().unwrap();
    let mut data = vec![0];
    first.stdout.as_mut().unwrap().read_exact(&mut data).unwrap();
    let started = Instant::now();
    server.disk(["info", "--timeout", "5"]).fails(4, "another");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    let ran = finish(first).ok();
    data.extend(ran.stdout);
    assert!(data == content(1 << 20, 1), "the first client got wrong data");
    // As soon as the first one is gone, others are welcome.
    while !server.disk(["verify", "--against", text(&disk)]).status.success() {
        assert!(started.elapsed() < Duration::from_secs(20), "the server stays busy");
    }
}

#[test]
fn a_server_that_is_killed_is_an_error_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 8 << 20);
    for reads in [true, false] {
        let mut server = Server::start([&disk]);
        let client = if reads {
            let mut client = server.disk_command(["read", "--timeout", "60"]).spawn().unwrap();
            client.stdout.as_mut().unwrap().read_exact(&mut [0; 4096]).unwrap();
            client
        } else {
            let before = modified(&disk);
            let client = server.disk_command(ENDLESS_WRITES).spawn().unwrap();
            while modified(&disk) == before {}
            client
        };
        server.child.kill().unwrap();
        let killed = Instant::now();
        server.child.wait().unwrap();
        let ran = finish(client);
        assert!(killed.elapsed() < Duration::from_secs(1), "{:?} {ran:?}", killed.elapsed());
        ran.fails(4, "server");
    }
}

#[test]
fn a_server_that_is_stopped_is_given_up_after_the_time_out() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 8 << 20);
    let server = Server::start([&disk]);
    let mut client = server.disk_command(["read", "--timeout", "1"]).spawn().unwrap();
    client.stdout.as_mut().unwrap().read_exact(&mut [0; 4096]).unwrap();
    signal(&server.child, Signal::STOP);
    finish(client).fails(4, "silent");
    server.disk(["info", "--timeout", "1"]).fails(4, "does not answer");
    signal(&server.child, Signal::CONT);
    let started = Instant::now();
    while !server.disk(["verify", "--against", text(&disk)]).status.success() {
        assert!(started.elapsed() < Duration::from_secs(20), "the server does not come back");
    }
}

#[test]
fn a_client_that_is_killed_at_any_moment_harms_neither_the_server_nor_the_data() {
    const HALF: u64 = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 2 * HALF);
    let server = Server::start([&disk]);
    let mut first = content(2 * HALF, 1);
    let untouched = first.split_off(HALF as usize);
    // What was there, and what clients tried to write.
    let mut known = vec![first];
    let data = dir.path().join("data");
    for moment in 0..24 {
        known.push(content(HALF, 100 + moment));
        std::fs::write(&data, known.last().unwrap()).unwrap();
        let arguments = ["write", "--depth", "8", "--input", text(&data)];
        let before = modified(&disk);
        let mut client = server.disk_command(arguments).spawn().unwrap();
        // One half: from the start of the process, over connecting and writing, to its end. The other
        // half: in the middle of writing for certain.
        while moment % 2 == 0 && modified(&disk) == before && client.try_wait().unwrap().is_none() {
        }
        std::thread::sleep(Duration::from_micros(moment * 400));
        client.kill().unwrap();
        client.wait().unwrap();

        // The next client is served, sees what the file holds, and what nobody wrote is as it was.
        let started = Instant::now();
        let next = loop {
            let ran = server.disk(["verify", "--against", text(&disk)]);
            if ran.status.code() != Some(4) {
                break ran;
            }
            assert!(started.elapsed() < Duration::from_secs(10), "moment {moment}: {ran:?}");
        };
        next.ok();
        assert!(part(&disk, HALF, HALF as usize) == untouched, "moment {moment}");
        // Every block of the first half holds old or new data, and nothing else.
        let now = part(&disk, 0, HALF as usize);
        for (index, block) in now.chunks(512).enumerate() {
            let at = index * 512;
            let is_known = known.iter().rev().any(|known| known[at..at + 512] == *block);
            assert!(is_known, "moment {moment}: block {index} holds what nobody wrote");
        }
    }
    // And a client that is left alone finds everything in order.
    std::fs::write(&data, content(HALF, 7)).unwrap();
    server.disk(["write", "--input", text(&data)]).ok();
    assert!(part(&disk, 0, HALF as usize) == content(HALF, 7));
    server.stop().ok();
}

#[test]
fn an_image_that_shrinks_fails_its_own_requests_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (image(dir.path(), "a", 1 << 20), image(dir.path(), "b", 1 << 20));
    let server = Server::start([&a, &b]);
    File::options().write(true).open(&a).unwrap().set_len(512 << 10).unwrap();
    server.disk(["read", "--lun", "0", "--offset", "768K"]).fails(3, "disk");
    let first_half = server.disk(["read", "--lun", "0", "--length", "512K"]).ok();
    assert!(first_half.stdout == content(1 << 20, 1)[..512 << 10]);
    server.disk(["verify", "--lun", "1", "--against", text(&b)]).ok();
}

#[test]
fn a_full_file_system_is_said_and_the_other_disk_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let other = image(dir.path(), "other", 1 << 20);
    let mount = dir.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let socket_dir = tempfile::tempdir().unwrap();
    let socket = socket_dir.path().join("s");
    // A file system of 1 MiB with a disk of 16, in a mount namespace that ends with the server.
    let script = format!(
        "mount -t tmpfs -o size=1m tmpfs {mount} || exit 42\n\
         truncate -s 16M {mount}/disk || exit 42\n\
         exec {program} serve --socket {socket} --disk {mount}/disk --disk {other}",
        mount = text(&mount),
        program = env!("CARGO_BIN_EXE_kmcl"),
        socket = text(&socket),
        other = text(&other),
    );
    let mut probe = Command::new("unshare");
    probe.args(["-rm", "sh", "-c", &format!("mount -t tmpfs tmpfs {}", text(&mount))]);
    if !probe.output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: no user and mount namespaces here");
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", &script]);
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let server = Server::spawn(command, socket, socket_dir);
    let data = image(dir.path(), "data", 8 << 20);
    server.disk(["write", "--lun", "0", "--input", text(&data)]).fails(3, "no space left");
    server.disk(["write", "--lun", "1", "--input", text(&other)]).ok();
    server.disk(["verify", "--lun", "1", "--against", text(&other)]).ok();
}

#[test]
fn a_server_ends_cleanly_when_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 1 << 20);
    for end in [Signal::TERM, Signal::INT] {
        let mut server = Server::start([&disk]);
        let before = modified(&disk);
        let client = server.disk_command(ENDLESS_WRITES).spawn().unwrap();
        while modified(&disk) == before {}
        signal(&server.child, end);
        let status = wait(&mut server.child, Duration::from_secs(10));
        assert_eq!(status.code(), Some(0), "{end:?}");
        assert!(!server.socket.exists(), "{end:?}: the socket is left behind");
        let mut stderr = String::new();
        server.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!(stderr, "", "{end:?}");
        finish(client).fails(4, "server");
    }
}

#[test]
fn a_socket_that_somebody_listens_at_is_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (image(dir.path(), "a", 4096), image(dir.path(), "b", 4096));
    let server = Server::start([&a]);
    kmcl(["serve", "--disk", text(&b), "--socket", text(&server.socket)]).fails(4, "socket");
    server.disk(["verify", "--against", text(&a)]).ok();
    // What is not a socket is never removed.
    kmcl(["serve", "--disk", text(&b), "--socket", text(&a)]).fails(4, "a");
    assert!(part(&a, 0, 4096) == content(4096, 1));
    kmcl(["serve", "--disk", text(&b), "--socket", "/nowhere/at/all"]).fails(5, "/nowhere/at/all");
}

#[test]
fn what_is_damaged_behind_the_servers_back_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 1 << 20);
    let copy = image(dir.path(), "copy", 1 << 20);
    let server = Server::start([&disk]);
    server.disk(["verify", "--against", text(&copy)]).ok();
    File::options().write(true).open(&disk).unwrap().write_all_at(b"!", 777_777).unwrap();
    server.disk(["verify", "--against", text(&copy)]).fails(1, "777777");
}
