//! The demonstration, as the README has it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::{command, content, finish, image, kmcl, signal, text};

/// What is in `dir`.
fn entries(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A demonstration that is at work for some time, in `dir`; and the process id of its server.
fn long_demo(dir: &Path) -> (std::process::Child, Pid) {
    let disk = dir.join("disk");
    std::fs::File::create(&disk).unwrap().set_len(2 << 30).unwrap();
    let arguments = ["demo", "--write-limit", "4G", "--disk", text(&disk), "--work-dir", text(dir)];
    let mut demo = command(arguments).spawn().unwrap();
    let mut lines = BufReader::new(demo.stdout.as_mut().unwrap()).lines();
    let server = lines.find_map(|line| {
        let line = line.unwrap();
        let rest = line.strip_prefix("server is process ")?;
        rest.split(',').next()?.parse().ok()
    });
    (demo, Pid::from_raw(server.unwrap()).unwrap())
}

#[test]
fn an_interrupted_demonstration_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (demo, server) = long_demo(dir.path());
    signal(&demo, Signal::INT);
    finish(demo).fails(5, "interrupted");
    assert_eq!(entries(dir.path()), ["disk"]);
    assert!(kill_process(server, Signal::TERM).is_err(), "the server still runs");
}

#[test]
fn a_demonstration_whose_server_is_killed_says_so_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let (demo, server) = long_demo(dir.path());
    kill_process(server, Signal::KILL).unwrap();
    let killed = Instant::now();
    let ran = finish(demo);
    assert!(killed.elapsed() < Duration::from_secs(1), "{:?} {ran:?}", killed.elapsed());
    ran.fails(4, "server");
    assert_eq!(entries(dir.path()), ["disk"]);
}

#[test]
fn a_server_ends_when_its_demonstration_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut demo, server) = long_demo(dir.path());
    demo.kill().unwrap();
    demo.wait().unwrap();
    let started = Instant::now();
    while rustix::process::test_kill_process(server).is_ok() {
        assert!(started.elapsed() < Duration::from_secs(10), "the server still runs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_ext4_image_is_made_and_proven() {
    for backend in ["io_uring", "threads"] {
        let ran = kmcl(["demo", "--json", "--size", "16M", "--backend", backend]).ok();
        assert!(ran.text().contains("\"lost\": 0"), "{}", ran.text());
        let shown = ran.json();
        assert_eq!(shown["image_bytes"], 16 << 20, "{backend}");
        assert_eq!(shown["back_end"], backend);
        assert_eq!(shown["file_system"], "clean, says e2fsck", "{backend}");
        assert_eq!(shown["storage_protocol"], "6.2", "{backend}");
        assert_eq!(shown["moves"].as_array().unwrap().len(), 5, "{backend}");
        assert_eq!(shown["duplicated"], 0, "{backend}");
        let bytes = |name: &str| shown[name].as_u64().unwrap();
        assert!(bytes("image_files") > 0, "{backend}");
        // Read whole, read again; written in order, a quarter at random, written back.
        assert!(bytes("bytes_read") >= 2 * (16 << 20), "{backend}");
        assert_eq!(bytes("bytes_written"), (2 * 4 + 1) * (4 << 20), "{backend}");
        assert!(bytes("bytes_verified") >= 4 * (16 << 20), "{backend}");
        assert!(bytes("bytes_unmapped") > 0, "{backend}");
    }
}

#[test]
fn a_given_image_is_proven_and_never_changed() {
    let dir = tempfile::tempdir().unwrap();
    // Odd in every way that is allowed: no power of two, no multiple of a page.
    let bytes = (5 << 20) + 3 * 512;
    let disk = image(dir.path(), "disk", bytes);
    let ran = kmcl(["demo", "--json", "--disk", text(&disk), "--work-dir", text(dir.path())]).ok();
    let shown = ran.json();
    assert_eq!(shown["lost"], 0);
    assert_eq!(shown["image_bytes"], bytes);
    assert_eq!(shown["file_system"], "not ext4, not checked");
    assert!(std::fs::read(&disk).unwrap() == content(bytes, 1), "the original was changed");
    assert_eq!(entries(dir.path()), ["disk"], "something is left behind");
}

#[test]
fn a_large_disk_is_overwritten_in_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 32 << 20);
    let shown = kmcl(["demo", "--json", "--disk", text(&disk), "--write-limit", "4M"]).ok().json();
    assert_eq!(shown["lost"], 0);
    assert_eq!(shown["bytes_written"].as_u64(), Some((2 * 4 + 1) << 20));
    assert!(shown["bytes_read"].as_u64().unwrap() >= (32 + 4) << 20);
}

#[test]
fn people_get_a_table() {
    let text = kmcl(["demo", "--size", "8M"]).ok().text();
    for line in [
        "lost                   0",
        "duplicated             0",
        "bytes verified",
        "clean, says e2fsck",
        "VMBus",
    ] {
        assert!(text.contains(line), "{line:?} in {text}");
    }
}

#[test]
fn without_room_it_says_so() {
    kmcl(["demo", "--size", "8M", "--work-dir", "/nowhere/at/all"]).fails(5, "--work-dir");
    kmcl(["demo", "--size", "8M", "--work-dir", "/proc"]).fails(5, "--work-dir");
}
