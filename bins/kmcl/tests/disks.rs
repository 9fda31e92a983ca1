//! Serving and using disks: what goes in comes out, and what cannot be is refused.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod support;

use std::fs::File;
use std::path::Path;

use support::{Server, content, image, kmcl, kmcl_with_input, part, text};

#[test]
fn what_is_written_is_read_again_and_is_in_the_file() {
    for backend in ["auto", "io_uring", "threads"] {
        let dir = tempfile::tempdir().unwrap();
        let disk = image(dir.path(), "disk", 3 << 20);
        let server = Server::start_with([&disk], ["--backend", backend, "--workers", "2"]);
        let data = content(1 << 20, 2);
        let file = dir.path().join("data");
        std::fs::write(&file, &data).unwrap();
        let written = server
            .disk(["write", "--json", "--offset", "512K", "--input", text(&file)])
            .ok()
            .json();
        assert_eq!(written["bytes_written"], 1 << 20, "{backend}");
        assert_eq!(part(&disk, 512 << 10, 1 << 20), data, "{backend}");

        let back = server.disk(["read", "--offset", "512K", "--length", "1M"]).ok();
        assert!(back.stdout == data, "{backend}: read differs from what was written");
        let whole = server.disk(["verify", "--json", "--against", text(&disk)]).ok().json();
        assert_eq!(whole["bytes_verified"], 3 << 20, "{backend}");
        assert!(server.stop().ok().status.success());
    }
}

#[test]
fn any_bytes_can_be_read_and_the_last_block_keeps_its_rest() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 1 << 20);
    let original = content(1 << 20, 1);
    let server = Server::start([&disk]);
    for (offset, length) in [(0, 1), (511, 2), (1000, 5000), ((1 << 20) - 7, 7), (9, 0)] {
        let arguments = ["read", "--offset", &offset.to_string(), "--length", &length.to_string()];
        let read = server.disk(arguments).ok();
        assert!(read.stdout == original[offset..offset + length], "{length} bytes at {offset}");
    }
    let ran = kmcl_with_input(["disk", "write", "--socket", text(&server.socket)], b"hello");
    ran.ok();
    let now = part(&disk, 0, 1 << 20);
    assert_eq!(&now[..5], b"hello");
    assert!(now[5..] == original[5..], "something else was changed");
    let arguments = ["disk", "write", "--offset", "512", "--length", "3", "--socket"];
    kmcl_with_input(arguments.iter().chain(&[text(&server.socket)]), b"abcdef").ok();
    assert_eq!(
        part(&disk, 510, 6),
        [original[510], original[511], b'a', b'b', b'c', original[515]]
    );
}

#[test]
fn requests_beyond_the_disk_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 64 << 10);
    let big = image(dir.path(), "big", 65 << 10);
    let server = Server::start([&disk]);
    server.disk(["read", "--offset", "65K"]).fails(2, "65536");
    server.disk(["read", "--offset", "60K", "--length", "5K"]).fails(2, "65536");
    server.disk(["write", "--input", text(&big)]).fails(2, "beyond the end");
    server.disk(["write", "--offset", "100", "--input", text(&disk)]).fails(2, "beyond the end");
    let ran = kmcl_with_input(["disk", "write", "--socket", text(&server.socket)], &[0; 65537]);
    ran.fails(2, "beyond the end");
    std::fs::write(&disk, content(64 << 10, 1)).unwrap();
    let small = image(dir.path(), "small", 512);
    server.disk(["write", "--offset", "100", "--input", text(&small)]).fails(2, "multiples of 512");
    server.disk(["verify", "--against", text(&disk), "--length", "1M"]).fails(2, "--length");
    server.disk(["verify", "--against", text(&big)]).fails(2, "65536");
    server.disk(["bench", "randwrite", "--bytes", "4K"]).fails(2, "--overwrite");
    server.disk(["bench", "--block-size", "1000"]).fails(2, "multiple of 512");
    server.disk(["bench", "--block-size", "1G"]).fails(2, "1073741824");
    server.disk(["info", "--lun", "0"]).fails(2, "--lun");
    server.disk(["read", "--lun", "7"]).fails(3, "no disk with LUN 7");
    assert!(part(&disk, 0, 64 << 10) == content(64 << 10, 1), "the disk was changed");
}

#[test]
fn the_first_difference_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 2 << 20);
    let other = dir.path().join("other");
    let mut bytes = content(2 << 20, 1);
    bytes[1_500_001] ^= 1;
    std::fs::write(&other, &bytes).unwrap();
    let server = Server::start([&disk]);
    server.disk(["verify", "--against", text(&other)]).fails(1, "byte 1500001");
    let ran = server.disk(["verify", "--json", "--against", text(&other)]).fails(1, "1500001");
    let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(error["error"]["first_difference"], 1_500_001);
    assert_eq!(error["error"]["kind"], "mismatch");
}

#[test]
fn several_disks_have_their_options() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (image(dir.path(), "a", 1 << 20), image(dir.path(), "b", 2 << 20));
    let server = Server::start([
        format!("{},cache=buffered", text(&a)),
        format!("{},ro,sector=4096", text(&b)),
    ]);
    let info = server.disk(["info", "--json"]).ok().json();
    let disks = info["disks"].as_array().unwrap();
    assert_eq!(disks.len(), 2);
    for (disk, lun, bytes, block, read_only) in
        [(&disks[0], 0, 1 << 20, 512, false), (&disks[1], 1, 2 << 20, 4096, true)]
    {
        assert_eq!(disk["lun"], lun);
        assert_eq!(disk["bytes"], bytes, "LUN {lun}");
        assert_eq!(disk["block_bytes"], block, "LUN {lun}");
        assert_eq!(disk["read_only"], read_only, "LUN {lun}");
    }
    assert_ne!(disks[0]["serial"], disks[1]["serial"]);
    server.disk(["info"]).ok();
    server.disk(["verify", "--lun", "1", "--against", text(&b)]).ok();
    server.disk(["write", "--lun", "1", "--input", text(&a)]).fails(3, "read-only");
    server.disk(["write", "--lun", "0", "--input", text(&a)]).ok();
}

#[test]
fn every_workload_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 4 << 20);
    let server = Server::start([&disk]);
    for workload in ["read", "write", "randread", "randwrite"] {
        let arguments =
            ["bench", workload, "--json", "--bytes", "1M", "--depth", "4", "--overwrite"];
        let measured = server.disk(arguments).ok().json();
        assert_eq!(measured["workload"], workload);
        assert_eq!(measured["requests"], 256, "{workload}");
        assert_eq!(measured["bytes"], 1 << 20, "{workload}");
        let latency = |name: &str| measured["latency_us"][name].as_f64().unwrap();
        assert!(latency("p50") > 0.0 && latency("p50") <= latency("max"), "{measured}");
    }
    server.disk(["bench", "read", "--bytes", "1M", "--block-size", "64K"]).ok();
}

#[test]
fn data_does_not_mix_with_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 64 << 10);
    let server = Server::start([&disk]);
    server.disk(["read", "--json"]).fails(2, "--output");
    let target = dir.path().join("out");
    let report = server.disk(["read", "--json", "--output", text(&target)]).ok().json();
    assert_eq!(report["bytes_read"], 64 << 10);
    assert!(std::fs::read(&target).unwrap() == content(64 << 10, 1));
    server.disk(["read", "--output", "/nowhere/at/all"]).fails(5, "/nowhere/at/all");
    server.disk(["write", "--input", "/nowhere/at/all"]).fails(5, "/nowhere/at/all");
    server.disk(["verify", "--against", "/nowhere/at/all"]).fails(3, "/nowhere/at/all");
}

/// What cannot be a disk: its path, and what is said about it.
fn bad_disks(dir: &Path) -> Vec<(String, &'static str)> {
    let in_dir = |name: &str| text(&dir.join(name)).to_owned();
    let file = |name: &str, bytes: u64| {
        File::create(dir.join(name)).unwrap().set_len(bytes).unwrap();
        in_dir(name)
    };
    let pipe = |name: &str| {
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
        rustix::fs::mknodat(rustix::fs::CWD, dir.join(name), kind, mode, 0).unwrap();
        in_dir(name)
    };
    std::os::unix::fs::symlink("loop", dir.join("loop")).unwrap();
    std::os::unix::fs::symlink("nowhere", dir.join("dangling")).unwrap();
    vec![
        (in_dir("missing"), "missing"),
        (in_dir("dangling"), "dangling"),
        (in_dir("loop"), "loop"),
        (text(dir).to_owned(), "directory"),
        (file("odd", 1000), "1000 bytes"),
        (file("empty", 0), "empty"),
        (format!("{}/below", file("file", 512)), "below"),
        ("/dev/null".to_owned(), "/dev/null"),
        (pipe("pipe"), "pipe"),
    ]
}

#[test]
fn an_image_that_is_missing_a_directory_or_of_an_odd_size_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    for (disk, part) in bad_disks(dir.path()) {
        kmcl(["serve", "--disk", &disk, "--socket", text(&socket)]).fails(3, part);
        assert!(!socket.exists(), "{disk}: a socket is left behind");
        kmcl(["demo", "--disk", &disk]).fails(3, part);
    }
}

#[test]
fn an_image_that_may_not_be_read_is_refused() {
    if rustix::process::geteuid().is_root() {
        eprintln!("skipped: root may read everything");
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 4096);
    std::fs::set_permissions(&disk, std::fs::Permissions::from_mode(0o000)).unwrap();
    let socket = dir.path().join("s");
    kmcl(["serve", "--disk", text(&disk), "--socket", text(&socket)]).fails(3, "permission");
    kmcl(["demo", "--disk", text(&disk)]).fails(3, "Permission denied");
}

#[test]
fn an_image_that_is_served_already_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 1 << 20);
    let socket = dir.path().join("other");
    let server = Server::start([&disk]);
    kmcl(["serve", "--disk", text(&disk), "--socket", text(&socket)]).fails(3, "in use");
    kmcl(["demo", "--disk", text(&disk)]).fails(3, "in use");
    server.disk(["verify", "--against", text(&disk)]).ok();
    server.stop().ok();
    // Two that only read can share it.
    let read_only = format!("{},ro", text(&disk));
    let first = Server::start([&read_only]);
    let second = Server::start([&read_only]);
    first.disk(["verify", "--against", text(&disk)]).ok();
    second.disk(["verify", "--against", text(&disk)]).ok();
    kmcl(["serve", "--disk", text(&disk), "--socket", text(&socket)]).fails(3, "in use");
}
