//! Runs the program as a person does, and looks at what it says and how it ends.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Longer than anything here takes; a run that takes longer hangs.
const FOR_EVER: Duration = Duration::from_secs(120);

/// A run that has ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Expects success.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.status.code(), Some(0), "{self:?}");
        assert_eq!(self.stderr, "", "{self:?}");
        self
    }

    /// Expects a failure: this exit code, and exactly one line on standard error that says `part`.
    #[track_caller]
    pub(crate) fn fails(self, code: i32, part: &str) -> Self {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
        assert!(
            self.stderr.starts_with("kmcl: ") || self.stderr.starts_with("{\"error\""),
            "{self:?}"
        );
        assert!(self.stderr.contains(part), "{part:?} in {self:?}");
        self
    }
}

/// The program with `arguments`, not started.
pub(crate) fn command<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kmcl"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the program with `arguments` to its end.
pub(crate) fn kmcl<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ran {
    finish(command(arguments).spawn().unwrap())
}

/// Runs the program with `arguments` and `input` as its standard input.
pub(crate) fn kmcl_with_input<S: AsRef<OsStr>>(
    arguments: impl IntoIterator<Item = S>,
    input: &[u8],
) -> Ran {
    let mut child = command(arguments).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input));
        finish(child)
    })
}

/// Waits for the end of a run, and kills one that does not end.
pub(crate) fn finish(mut child: Child) -> Ran {
    let mut streams = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let reader = std::thread::spawn(move || {
        let mut stdout = Vec::new();
        streams.0.read_to_end(&mut stdout).unwrap();
        stdout
    });
    let errors = std::thread::spawn(move || {
        let mut stderr = String::new();
        streams.1.read_to_string(&mut stderr).unwrap();
        stderr
    });
    let status = wait(&mut child, FOR_EVER);
    Ran { status, stdout: reader.join().unwrap(), stderr: errors.join().unwrap() }
}

/// Waits for the end of `child`, at most `limit`.
#[track_caller]
pub(crate) fn wait(child: &mut Child, limit: Duration) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if started.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            panic!("not at its end after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// `kmcl serve` in a process of its own, ready for guests.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Server {
    /// Serves `disks`, each in the form that `--disk` takes.
    pub(crate) fn start<S: AsRef<OsStr>>(disks: impl IntoIterator<Item = S>) -> Self {
        Self::start_with(disks, [""; 0])
    }

    pub(crate) fn start_with<S: AsRef<OsStr>, T: AsRef<OsStr>>(
        disks: impl IntoIterator<Item = S>,
        more: impl IntoIterator<Item = T>,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let mut command = command(["serve", "--socket"]);
        command.arg(&socket).args(more);
        for disk in disks {
            command.arg("--disk").arg(disk);
        }
        Self::spawn(command, socket, dir)
    }

    /// Runs `command`, a server at `socket`, until it says that it is ready.
    pub(crate) fn spawn(mut command: Command, socket: PathBuf, dir: tempfile::TempDir) -> Self {
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            panic!("the server is not ready: {:?}", finish(child));
        }
        Self { child, socket, _dir: dir }
    }

    /// Runs `kmcl disk` with `arguments` against this server.
    pub(crate) fn disk<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Ran {
        finish(self.disk_command(arguments).spawn().unwrap())
    }

    /// `kmcl disk` with `arguments` against this server, not started.
    pub(crate) fn disk_command<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
    ) -> Command {
        let mut command = command(["disk"]);
        command.args(arguments).arg("--socket").arg(&self.socket);
        command
    }

    /// Ends the server as a service manager does.
    pub(crate) fn stop(mut self) -> Ran {
        signal(&self.child, Signal::TERM);
        let status = wait(&mut self.child, FOR_EVER);
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        Ran { status, stdout: Vec::new(), stderr }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `bytes` bytes of which no two 8 are the same.
pub(crate) fn content(bytes: u64, seed: u64) -> Vec<u8> {
    let words = (0..bytes.div_ceil(8)).map(|index| {
        (index.wrapping_add(seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()
    });
    let mut content: Vec<u8> = words.flatten().collect();
    content.truncate(usize::try_from(bytes).unwrap());
    content
}

/// An image of `bytes` bytes of [`content`] in `dir`.
pub(crate) fn image(dir: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content(bytes, 1)).unwrap();
    path
}

/// Part of a file.
pub(crate) fn part(path: &Path, offset: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    File::open(path).unwrap().read_exact_at(&mut data, offset).unwrap();
    data
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
