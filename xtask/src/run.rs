//! Running other programs: what they print passes through, how they end is judged.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often a program with a time limit is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Why a command of this program did not succeed: one line that says what to do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The program was not found, or could not be started.
    #[error("cannot start `{command}`: {source}")]
    Start { command: String, source: std::io::Error },
    /// The program ran and was not content.
    #[error("`{command}` failed: {status}")]
    Status { command: String, status: ExitStatus },
    /// The program did not end in time, and was killed.
    #[error("`{command}` still ran after {limit_s} s and was killed")]
    TimeLimit { command: String, limit_s: u64 },
    /// The program has said nothing for too long, and was killed.
    #[error("`{command}` said nothing for {silence_s} s and was killed")]
    Silence { command: String, silence_s: u64 },
    /// Something that is needed is not there, and cannot be installed from here.
    #[error("{what} is missing: {remedy}")]
    Missing { what: &'static str, remedy: String },
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// `cargo metadata` did not answer.
    #[error("cannot read the workspace: {0}")]
    Metadata(#[from] cargo_metadata::Error),
    /// A check found something wrong; one line each.
    #[error("{about}:\n{}", lines(findings))]
    Findings { about: String, findings: Vec<String> },
    /// A step of `cargo xtask test` failed.
    #[error("step {step} failed: {source}\nafter mending it: cargo xtask test --only {step}")]
    Step { step: &'static str, source: Box<Failure> },
}

fn lines(findings: &[String]) -> String {
    findings.iter().map(|finding| format!("  {finding}")).collect::<Vec<_>>().join("\n")
}

/// Fails with `findings` unless there are none.
pub(crate) fn none_of(about: &str, findings: Vec<String>) -> Result<(), Failure> {
    if findings.is_empty() {
        Ok(())
    } else {
        Err(Failure::Findings { about: about.to_owned(), findings })
    }
}

/// Runs `command` to its end; its output goes where ours goes.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let status = command.status().map_err(|source| start_failure(command, source))?;
    judge(command, status)
}

/// As [`run`], and kills the program when it has not ended after `limit`.
pub(crate) fn run_within(command: &mut Command, limit: Duration) -> Result<(), Failure> {
    let mut child = command.spawn().map_err(|source| start_failure(command, source))?;
    match wait_within(&mut child, limit).map_err(|source| start_failure(command, source))? {
        Some(status) => judge(command, status),
        None => Err(Failure::TimeLimit { command: shown(command), limit_s: limit.as_secs() }),
    }
}

/// As [`run`], and kills the program when `look`, called often, has not seen anything new for `silence`.
pub(crate) fn run_watched(
    command: &mut Command,
    silence: Duration,
    look: &mut dyn FnMut() -> bool,
) -> Result<(), Failure> {
    const LOOK_EVERY: Duration = Duration::from_millis(200);
    let mut child = command.spawn().map_err(|source| start_failure(command, source))?;
    let mut heard = Instant::now();
    loop {
        let ended = child.try_wait().map_err(|source| start_failure(command, source))?;
        // Behind the question whether it has ended: what was said last is seen too.
        let said = look();
        if let Some(status) = ended {
            return judge(command, status);
        }
        if said {
            heard = Instant::now();
        } else if heard.elapsed() >= silence {
            child
                .kill()
                .and_then(|()| child.wait())
                .map_err(|source| start_failure(command, source))?;
            let silence_s = silence.as_secs();
            return Err(Failure::Silence { command: shown(command), silence_s });
        }
        sleep(LOOK_EVERY);
    }
}

/// Runs `command`, lets its standard output through line by line, and returns those lines.
pub(crate) fn run_and_keep(command: &mut Command) -> Result<Vec<String>, Failure> {
    command.stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|source| start_failure(command, source))?;
    let mut kept = Vec::new();
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).lines() {
            let line = line.map_err(|source| start_failure(command, source))?;
            println!("{line}");
            kept.push(line);
        }
    }
    let status = child.wait().map_err(|source| start_failure(command, source))?;
    judge(command, status).map(|()| kept)
}

/// What `command` prints, if it succeeds.
pub(crate) fn output_of(command: &mut Command) -> Result<Vec<u8>, Failure> {
    let output = command.output().map_err(|source| start_failure(command, source))?;
    judge(command, output.status).map(|()| output.stdout)
}

/// Whether `command` can be started and succeeds; what it prints is thrown away.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The command as a person would type it.
pub(crate) fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Prints a line of our own, in its place among the lines of the programs we run.
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // A closed pipe is the reader's choice; the outcome is in the exit code.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn start_failure(command: &Command, source: std::io::Error) -> Failure {
    Failure::Start { command: shown(command), source }
}

fn judge(command: &Command, status: ExitStatus) -> Result<(), Failure> {
    if status.success() { Ok(()) } else { Err(Failure::Status { command: shown(command), status }) }
}

/// The exit status, or `None` if the child had to be killed.
fn wait_within(child: &mut Child, limit: Duration) -> std::io::Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= limit {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn only_exit_status_0_within_the_limit_is_success() {
        let long = Duration::from_secs(600);
        assert!(run_within(&mut shell("exit 0"), long).is_ok());
        assert!(matches!(
            run_within(&mut shell("exit 3"), long),
            Err(Failure::Status { status, .. }) if status.code() == Some(3)
        ));
        assert!(matches!(run_within(&mut shell("kill -9 $$"), long), Err(Failure::Status { .. })));
        // `exec`, so that the process that is killed is the one that waits.
        assert!(matches!(
            run_within(&mut shell("exec sleep 600"), Duration::ZERO),
            Err(Failure::TimeLimit { limit_s: 0, .. })
        ));
    }

    #[test]
    fn a_program_is_watched_while_it_says_something() {
        let mut looks = 0;
        let ended = run_watched(&mut shell("exec sleep 600"), Duration::ZERO, &mut || {
            looks += 1;
            looks < 3
        });
        assert!(matches!(ended, Err(Failure::Silence { .. })));
        assert_eq!(looks, 3);
        let mut looked = false;
        let long = Duration::from_secs(600);
        let ended = run_watched(&mut shell("exit 3"), long, &mut || {
            looked = true;
            false
        });
        assert!(looked && matches!(ended, Err(Failure::Status { .. })));
    }

    #[test]
    fn kept_lines_are_those_of_standard_output() {
        let kept = run_and_keep(&mut shell("echo one; echo two >&2; printf three")).unwrap();
        assert_eq!(kept, ["one", "three"]);
        assert!(run_and_keep(&mut shell("echo one; exit 1")).is_err());
        assert_eq!(output_of(&mut shell("echo one")).unwrap(), b"one\n");
        assert!(output_of(&mut shell("echo one; exit 1")).is_err());
    }
}
