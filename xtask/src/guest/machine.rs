//! Where the laboratory is: on this machine, if its KVM can do what is needed, or else in one that QEMU
//! emulates.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::images::Lab;
use super::judge::judge;
use super::stories::Run;
use crate::run::{Failure, run_watched, say};

/// How long the laboratory may say nothing. Each of its steps has a shorter limit, in the emulated
/// machine's time.
const SILENCE: Duration = Duration::from_secs(900);

/// Huge pages of the emulated machine: enough for two guests' memory.
///
/// QEMU 7.2 delivers an interrupt twice whose delivery has met a nested page fault: the guest is then found in the
/// first instruction of a handler, with interrupts off and another one on its way, and soon without a stack. It is
/// seen with the timer of KVM's own local APIC, too. Memory of huge pages has some hundred such faults in a
/// guest's life, instead of tens of thousands.
const HUGE_PAGES: u32 = 300;

/// Where the laboratory is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Machine {
    /// This machine.
    This,
    /// An emulated one, whose processors can virtualise.
    Emulated,
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::This => "on this machine",
            Self::Emulated => "in an emulated machine",
        })
    }
}

/// The machine that can do it: this one only if a guest really boots on it. A KVM device is no sign of
/// that, nor are its capabilities.
pub(super) fn find(lab: &Lab, folder: &Path) -> Result<Machine, Failure> {
    let session = Session { lab, out: &folder.join("out-probe") };
    let probe = [Run::probe()];
    lab.write_runs(&probe)?;
    let _judged_by_the_results = session.run(Machine::This, &mut |_| ());
    let why = match judge(&session.read_results(), &probe).pop() {
        Some(outcome) if outcome.passed => return Ok(Machine::This),
        Some(outcome) => outcome.detail,
        None => "nothing was said".to_owned(),
    };
    say(&format!("no guest boots here ({why}): they will in an emulated machine"));
    Ok(Machine::Emulated)
}

/// A run of the laboratory.
pub(super) struct Session<'a> {
    pub(super) lab: &'a Lab,
    /// Where results and logs go.
    pub(super) out: &'a Path,
}

impl Session<'_> {
    /// Where the scripts write what came of each scenario.
    fn results(&self) -> PathBuf {
        self.out.join("results")
    }

    /// What they have written.
    pub(super) fn read_results(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.results()).unwrap_or_default()).into_owned()
    }

    /// Whether the machine's own kernel has crashed. Consoles of guests are elsewhere.
    pub(super) fn has_crashed(&self) -> bool {
        let log = fs::read(self.out.join("machine.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).contains("Kernel panic")
    }

    /// Runs what the list of runs has; `each` is called with every new line of the results. How the
    /// machine ends says nothing: the results do.
    pub(super) fn run(&self, machine: Machine, each: &mut dyn FnMut(&str)) -> Result<(), Failure> {
        let _not_there = fs::remove_dir_all(self.out);
        let failed = |path: &Path, source| Failure::File { path: path.to_owned(), source };
        fs::create_dir_all(self.out).map_err(|source| failed(self.out, source))?;
        let log = self.out.join("machine.log");
        let output = File::create(&log).map_err(|source| failed(&log, source))?;
        let errors = output.try_clone().map_err(|source| failed(&log, source))?;
        let mut command = match machine {
            Machine::This => self.here(),
            Machine::Emulated => self.emulated(),
        };
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let results = self.results();
        let mut seen = 0;
        run_watched(&mut command, SILENCE, &mut || {
            let text = fs::read(&results).unwrap_or_default();
            let new = String::from_utf8_lossy(text.get(seen..).unwrap_or_default()).into_owned();
            let Some((whole, _)) = new.rsplit_once('\n') else { return false };
            seen += whole.len() + 1;
            whole.lines().for_each(&mut *each);
            true
        })
    }

    fn here(&self) -> Command {
        let mut shell = Command::new("busybox");
        shell.arg("sh").arg(self.lab.folder.join("scripts/lab.sh"));
        shell.env("LAB", &self.lab.folder).env("OUT", self.out).env("WORK", self.out.join("work"));
        shell
    }

    fn emulated(&self) -> Command {
        let share = |folder: &Path, tag: &str, options: &str| {
            let folder = folder.display();
            format!("local,path={folder},mount_tag={tag},security_model=none,{options}")
        };
        let append = format!(
            "console=ttyS0 panic=-1 loglevel=4 mitigations=off transparent_hugepage=never hugepages={HUGE_PAGES}"
        );
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-accel",
            "tcg,thread=multi",
            "-M",
            "q35",
            "-cpu",
            "max,+svm,la57=off,fsgsbase=off,pku=off,umip=off",
        ])
        .args(["-smp", "2", "-m", "4096", "-nodefaults", "-nographic", "-serial", "stdio"])
        .arg("-kernel")
        .arg(&self.lab.outer_kernel)
        .arg("-initrd")
        .arg(&self.lab.outer)
        .args(["-append", &append, "-no-reboot"])
        .arg("-virtfs")
        .arg(share(&self.lab.folder, "lab", "readonly=on"))
        .arg("-virtfs")
        .arg(share(self.out, "out", "readonly=off"));
        qemu
    }
}
