//! The demonstration's server: another process of this very program.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

use crate::cli::BackEndArgs;
use crate::control::Refusal;
use crate::exit::{Failure, Result};

/// How long the server may take to be ready, and to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running `kmcl serve` or `kmcl restore`. Killed when dropped; it also ends by itself when this process does,
/// because its standard input is a pipe from here.
pub(super) struct Server {
    child: Child,
}

/// The line of JSON with which a server says that it is ready.
#[derive(Deserialize)]
pub(super) struct Ready {
    pub(super) backend: String,
}

/// The line of JSON with which a command fails.
#[derive(Deserialize)]
struct Failed {
    error: Refusal,
}

impl Server {
    /// Starts a server of the images `disks`, and waits until guests may connect to `socket`.
    ///
    /// # Errors
    /// The server's own [`Failure`], if it ends instead.
    pub(super) fn start(
        back_end: BackEndArgs,
        disks: &[&Path],
        socket: &Path,
    ) -> Result<(Self, Ready)> {
        Self::spawn(["serve".as_ref()], back_end, disks, socket)
    }

    /// Starts a server that goes on where one that was saved to the file at `state` stopped, and waits
    /// until the guest is back.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub(super) fn restore(
        state: &Path,
        back_end: BackEndArgs,
        disks: &[&Path],
        socket: &Path,
    ) -> Result<(Self, Ready)> {
        Self::spawn(["restore".as_ref(), state.as_os_str()], back_end, disks, socket)
    }

    fn spawn<const N: usize>(
        begin: [&OsStr; N],
        back_end: BackEndArgs,
        disks: &[&Path],
        socket: &Path,
    ) -> Result<(Self, Ready)> {
        let cannot = |error: std::io::Error| {
            Failure::system(
                format_args!("cannot start the server: {error}"),
                "check the program file",
            )
        };
        let program = std::env::current_exe().map_err(cannot)?;
        let mut command = Command::new(program);
        command.args(begin).args(["--json", "--until-eof"]);
        for disk in disks {
            command.arg("--disk").arg(disk);
        }
        command.arg("--socket").arg(socket);
        command.args(["--backend", back_end.backend.name()]);
        if let Some(workers) = back_end.workers {
            command.args(["--workers", &workers.to_string()]);
        }
        // An interrupt from the terminal is this process's to handle: the server ends after it.
        command.process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut server = Self { child: command.spawn().map_err(cannot)? };
        let ready = server.wait_ready()?;
        Ok((server, ready))
    }

    /// Ends the server with SIGKILL: it can do nothing about it, and tidies nothing up.
    pub(super) fn kill(mut self) {
        // Fails only for one that has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The server's process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    fn wait_ready(&mut self) -> Result<Ready> {
        let (send, receive) = mpsc::channel();
        if let Some(stdout) = self.child.stdout.take() {
            std::thread::spawn(move || {
                let mut line = String::new();
                let _ = BufReader::new(stdout).read_line(&mut line);
                // The receiver may have lost its patience.
                let _ = send.send(line);
            });
        }
        let line = receive.recv_timeout(PATIENCE).map_err(|_| {
            Failure::peer(
                format_args!("the server is not ready after {PATIENCE:?}"),
                "see what keeps it with kmcl serve -v",
            )
        })?;
        serde_json::from_str(&line).map_err(|_| self.reason())
    }

    /// Why the server has ended: what it wrote to standard error.
    fn reason(&mut self) -> Failure {
        let _ = self.child.kill();
        let mut said = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut said);
        }
        match said.lines().find_map(|line| serde_json::from_str::<Failed>(line).ok()) {
            Some(Failed { error }) => error.into(),
            None => Failure::peer(
                format_args!("the server ended before it was ready: {}", said.trim()),
                "run kmcl serve by itself to see why",
            ),
        }
    }

    /// Ends the server as a service manager does, and checks that it ended well.
    ///
    /// # Errors
    /// A [`Failure`] of kind peer if it did not.
    pub(super) fn stop(mut self) -> Result<()> {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM); // gone already: `wait` says how
        }
        let status = self.child.wait().map_err(|error| {
            Failure::system(format_args!("cannot wait for the server: {error}"), "try again")
        })?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::peer(
            format_args!("the server did not end well: {status}"),
            "run kmcl serve by itself to see why",
        ))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
