//! `guest`: real guests on our VMBus, on any machine.
//!
//! Debian's kernels, unmodified and with their own drivers, boot on the VMM and work on a disk. A machine
//! without hardware virtualisation runs them too: QEMU emulates a PC whose processor has some, an outer
//! kernel on it loads KVM, and in that the VMM runs the guest. Slow, and exact.

mod images;
mod parts;
mod scenarios;

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::run::{Failure, none_of, run_within, say};
use crate::workspace::Workspace;

use parts::Parts;
use scenarios::Run;

/// How long all runs of one outer boot may take. Emulated time is slow and uneven.
const LIMIT: Duration = Duration::from_secs(1500);

/// Runs the scenarios and prints a table of what came of each.
pub(crate) fn run(workspace: &Workspace, all: bool) -> Result<(), Failure> {
    let parts = Parts::get(workspace)?;
    let runs = scenarios::runs(all);
    let image = images::build(&parts, &runs)?;
    let log = parts.folder.join("guest.log");
    say(&format!("running {} guests; their consoles go to {}", runs.len(), log.display()));
    let output =
        File::create(&log).map_err(|source| Failure::File { path: log.clone(), source })?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max,+svm,la57=off"])
        .args(["-smp", "2", "-m", "3072", "-nodefaults", "-nographic", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&parts.outer.image)
        .arg("-initrd")
        .arg(&image)
        .args(["-append", "console=ttyS0 panic=-1 loglevel=4 mitigations=off"])
        .arg("-no-reboot")
        .stdin(Stdio::null())
        .stdout(output);
    // How QEMU ends says nothing: the log does.
    let ended = run_within(&mut qemu, LIMIT);
    let text = std::fs::read(&log).map_err(|source| Failure::File { path: log.clone(), source })?;
    let results = scenarios::judge(&String::from_utf8_lossy(&text), &runs);
    print_table(&results);
    let failed = results.iter().filter(|result| !result.passed);
    let failed: Vec<_> =
        failed.map(|result| format!("{} {}", result.guest, result.scenario)).collect();
    none_of(&format!("guests have failed (log: {})", log.display()), failed)?;
    ended
}

fn print_table(results: &[scenarios::Outcome]) {
    let width = results.iter().map(|result| result.guest.len()).max().unwrap_or(0);
    for result in results {
        let outcome = if result.passed { "ok" } else { "FAILED" };
        say(&format!(
            "{:width$}  {:10}  {outcome}  {}",
            result.guest, result.scenario, result.detail
        ));
    }
}

/// What a guest is called in the table.
fn name(run: &Run) -> String {
    format!("{} {} {} vCPU", run.kernel, run.mode, run.processors)
}
