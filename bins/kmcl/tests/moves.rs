//! Servers that are saved, killed and restored while guests use them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod support;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;
use support::{Ran, Server, command, content, finish, image, kmcl, text, wait};

const DISK_BYTES: u64 = 8 << 20;

/// A server of a disk of [`content`], and a guest that is reading it, with requests in flight, and that
/// nobody takes the data from yet.
struct Scene {
    dir: tempfile::TempDir,
    disk: PathBuf,
    server: Server,
    guest: Child,
    read: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = image(dir.path(), "disk", DISK_BYTES);
        let server = Server::start([&disk]);
        let mut guest = server.disk_command(["read", "--reconnect", "30"]).spawn().unwrap();
        let mut read = vec![0; 1 << 16];
        guest.stdout.as_mut().unwrap().read_exact(&mut read).unwrap();
        Self { dir, disk, server, guest, read }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn save_command(&self, more: &[&str]) -> Command {
        let mut command = command(["save", "--to", text(&self.state())]);
        command.arg("--socket").arg(&self.server.socket).args(more);
        command
    }

    fn save(&self, more: &[&str]) -> Ran {
        finish(self.save_command(more).spawn().unwrap())
    }

    fn restore_command(&self, disk: &Path) -> Command {
        let mut command = command(["restore", text(&self.state())]);
        command.arg("--socket").arg(&self.server.socket).arg("--disk").arg(disk);
        command
    }

    /// Ends the server with SIGKILL.
    fn kill_server(&mut self) {
        self.server.child.kill().unwrap();
        self.server.child.wait().unwrap();
    }

    /// Puts the server that was saved in the place of the one that is gone.
    fn restore(&mut self) {
        let command = self.restore_command(&self.disk.clone());
        let socket = self.server.socket.clone();
        self.server = Server::spawn(command, socket, tempfile::tempdir().unwrap());
    }

    /// The guest reads on to the end, and has the right data.
    fn guest_is_well(mut self) {
        self.guest.stdout.as_mut().unwrap().read_to_end(&mut self.read).unwrap();
        finish(self.guest).ok();
        assert!(self.read == content(DISK_BYTES, 1), "the guest got wrong data");
    }
}

#[test]
fn a_hundred_moves_lose_nothing() {
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    println!("again with: kmcl demo --size 8M --moves 100 --move-every 30 --seed {seed}");
    let seed = seed.to_string();
    let arguments =
        ["demo", "--json", "--size", "8M", "--moves", "100", "--move-every", "30", "--seed", &seed];
    let shown = kmcl(arguments).ok().json();
    assert_eq!((&shown["lost"], &shown["duplicated"]), (&0.into(), &0.into()), "{shown}");
    let moves = shown["moves"].as_array().unwrap();
    assert_eq!(moves.len(), 100);
    let numbers =
        |name: &str| moves.iter().map(|one| one[name].as_u64().unwrap()).collect::<Vec<_>>();
    let buffers = numbers("buffer_bytes");
    assert!(buffers.iter().all(|bytes| (1..=1 << 20).contains(bytes)), "{buffers:?}");
    assert!(buffers.iter().min() < Some(&16) && buffers.iter().max() > Some(&65536), "{buffers:?}");
    // What was in flight is chance; that nothing ever was would be none.
    assert!(numbers("in_flight").iter().sum::<u64>() > 100, "{:?}", numbers("in_flight"));
    assert!(numbers("in_flight_of_guest").iter().any(|count| *count >= 64));
    assert!(numbers("given_up").iter().sum::<u64>() > 0);
    assert!(shown["blocks_verified"].as_u64().unwrap() > 2 * 4096);
}

#[test]
fn a_server_is_saved_and_restored_under_a_guest() {
    let mut scene = Scene::new();
    let saved = scene.save(&["--json"]).ok().json();
    assert_eq!(wait(&mut scene.server.child, Duration::from_secs(20)).code(), Some(0));
    assert_eq!(saved["went_on"], false);
    assert_eq!(saved["bytes"], std::fs::metadata(scene.state()).unwrap().len());
    assert!(!scene.server.socket.exists(), "the socket was left behind");
    scene.restore();
    scene.guest_is_well();
}

#[test]
fn a_server_that_is_killed_while_frozen_is_restored() {
    let mut scene = Scene::new();
    // The saver is the last one to know: it is stopped once the file is there.
    let mut saver = scene.save_command(&["--buffer", "1"]).spawn().unwrap();
    while !scene.state().exists() {
        std::thread::yield_now();
    }
    scene.kill_server();
    wait(&mut saver, Duration::from_secs(20));
    scene.restore();
    scene.guest_is_well();
}

#[test]
fn a_state_is_good_again_and_again_until_somebody_goes_on_with_it() {
    let mut scene = Scene::new();
    scene.save(&[]).ok();
    let other = image(scene.dir.path(), "other", DISK_BYTES / 2);
    finish(scene.restore_command(&other).spawn().unwrap()).fails(3, "not the one that was saved");
    let mut two = scene.restore_command(&scene.disk);
    two.arg("--disk").arg(&other);
    finish(two.spawn().unwrap()).fails(3, "no disk was saved");
    let whole = std::fs::read(scene.state()).unwrap();
    for at in (0..whole.len()).step_by(97) {
        let mut bad = whole.clone();
        bad[at] ^= 0x40;
        std::fs::write(scene.state(), bad).unwrap();
        finish(scene.restore_command(&scene.disk).spawn().unwrap()).fails(1, "state");
    }
    std::fs::write(scene.state(), whole).unwrap();
    scene.restore();
    scene.guest_is_well();
}

#[test]
fn a_state_that_its_server_went_on_from_is_of_the_past() {
    let mut scene = Scene::new();
    let saved = scene.save(&["--continue", "--json"]).ok().json();
    assert_eq!(saved["went_on"], true);
    scene.kill_server();
    let mut restore = scene.restore_command(&scene.disk);
    restore.args(["--wait", "2"]);
    finish(restore.spawn().unwrap()).fails(4, "guest");
    let _ = scene.guest.kill();
    let _ = scene.guest.wait();
}

#[test]
fn a_file_that_cannot_be_written_leaves_the_old_one_and_the_server() {
    let scene = Scene::new();
    std::fs::write(scene.state(), "the old state").unwrap();
    // The file may have 1 KiB at most: an error where the signal is ignored, and otherwise the end of the
    // process at that byte.
    for (trap, killed) in [("trap '' XFSZ;", false), ("", true)] {
        let save = scene.save_command(&[]);
        let mut limited = Command::new("sh");
        limited.arg("-c").arg(format!("ulimit -c 0; ulimit -f 1; {trap} exec \"$0\" \"$@\""));
        limited.arg(save.get_program()).args(save.get_args());
        limited.stdin(std::process::Stdio::null());
        limited.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let ran = finish(limited.spawn().unwrap());
        if killed {
            assert_eq!(ran.status.code(), None, "{ran:?}");
        } else {
            ran.fails(5, "cannot write");
        }
        assert_eq!(std::fs::read(scene.state()).unwrap(), b"the old state");
    }
    for (to, code, part) in [
        ("/nowhere/at/all/state", 5, "/nowhere"),
        ("/proc/state", 5, "/proc/state"),
        ("/dev/null", 2, "is not a file"),
    ] {
        let socket = text(&scene.server.socket);
        kmcl(["save", "--socket", socket, "--to", to]).fails(code, part);
    }
    scene.guest_is_well();
}

#[test]
fn a_saver_that_is_killed_at_any_moment_leaves_the_server_as_it_was() {
    let scene = Scene::new();
    for moment in 0..20 {
        let mut saver = scene.save_command(&["--buffer", "1"]).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(moment * 500));
        // Not once the server was told to end, which is after the file has its name.
        support::signal(&saver, Signal::STOP);
        let told = scene.state().exists();
        support::signal(&saver, Signal::KILL);
        saver.wait().unwrap();
        if told {
            break;
        }
        let left = std::fs::read_dir(scene.dir.path()).unwrap();
        for entry in left.map(|entry| entry.unwrap().path()) {
            let name = entry.file_name().unwrap().to_str().unwrap().to_owned();
            if name.ends_with(".partial") {
                std::fs::remove_file(entry).unwrap();
            }
        }
    }
    if !scene.state().exists() {
        scene.guest_is_well();
    }
}

#[test]
fn only_its_owner_asks_a_server_and_nonsense_does_no_harm() {
    let scene = Scene::new();
    let mut control = scene.server.socket.clone().into_os_string();
    control.push(".control");
    let control = PathBuf::from(control);
    let mode = std::fs::metadata(&control).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "{mode:o}");
    for nonsense in [
        &b""[..],
        b"\n",
        b"save!\n",
        b"{\"protocol\": 2, \"go_on\": true, \"buffer_bytes\": 1, \"settle_ms\": 0}\n",
        &[b'x'; 1 << 16],
    ] {
        let mut stream = UnixStream::connect(&control).unwrap();
        // The server may have closed already.
        let _ = stream.write_all(nonsense);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"");
    }
    // Somebody who asks and goes away.
    for bytes in [0, 1, 5, 100, 4000] {
        let mut stream = UnixStream::connect(&control).unwrap();
        let request =
            b"{\"protocol\": 1, \"go_on\": false, \"buffer_bytes\": 1, \"settle_ms\": 9999}\n";
        stream.write_all(request).unwrap();
        stream.read_exact(&mut vec![0; bytes]).unwrap();
    }
    let nobody = scene.dir.path().join("nobody");
    kmcl(["save", "--socket", text(&nobody), "--to", text(&scene.state())]).fails(4, "nobody");
    assert!(!scene.state().exists());
    scene.guest_is_well();
}

#[test]
fn a_saved_state_is_explained() {
    let scene = Scene::new();
    scene.save(&["--continue"]).ok();
    let state = scene.state();
    let name = text(&state);
    let shown = kmcl(["inspect", name]).ok().text();
    for part in ["storage.disk", "channel.channel", "transport", "bus", "kmcl 0.1"] {
        assert!(shown.contains(part), "{part:?} in {shown}");
    }
    let long = shown.lines().skip(2).find(|line| line.chars().count() > 80);
    assert_eq!(long, None, "{shown}");
    let line = kmcl(["inspect", "--verify", name]).ok().text();
    assert!(line.contains("is whole") && line.lines().count() == 1, "{line}");
    let json = kmcl(["inspect", "--json", name]).ok().json();
    assert_eq!(json["whole"], true);
    let kinds: Vec<_> =
        json["streams"].as_array().unwrap().iter().map(|s| s["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["contents", "transport", "bus", "device", "channel", "channel", "contents"]);
    let mut bad = std::fs::read(&state).unwrap();
    let at = bad.len() / 2;
    bad[at] ^= 1;
    std::fs::write(&state, bad).unwrap();
    for more in [&[][..], &["--verify"], &["--json"]] {
        let ran = kmcl(["inspect", name].iter().chain(more)).fails(1, "damaged at byte");
        assert_eq!(ran.stdout.is_empty(), more == ["--verify"], "{ran:?}");
    }
    scene.guest_is_well();
}
