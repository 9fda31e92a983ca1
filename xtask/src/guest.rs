//! `guest`: real guests on our VMBus, on any machine.
//!
//! Debian's kernels, unmodified and with their own drivers, go through stories: they boot, work on disks,
//! are saved and restored in the middle of it, reset, crash. A machine whose KVM cannot do it runs them
//! too: QEMU emulates a PC whose processors can virtualise, an outer kernel on it loads KVM, and in that
//! the VMM runs the guests. Slow, and exact.
//!
//! `parts` is what all this is made of, `images` and `tree` the folder that it becomes; `machine` runs it;
//! `stories` says what there is to run, `judge` what came of it, `counts` what it has cost.

mod counts;
mod images;
mod judge;
mod machine;
mod parts;
mod stories;
mod tree;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Instant;

use crate::run::{Failure, none_of, say};
use crate::workspace::Workspace;

use machine::{Machine, Session};
use parts::Parts;
use stories::{Run, Wanted};

/// What `cargo xtask guest` is asked for.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Arguments {
    /// Every kernel, way and number of processors, not a selection
    #[arg(long)]
    all: bool,
    /// Only what this story or scenario is part of (may be given several times)
    #[arg(long, value_name = "NAME", value_parser = clap::builder::PossibleValuesParser::new(stories::names()))]
    only: Vec<String>,
    /// Only guests with this kernel
    #[arg(long, value_parser = stories::KERNELS)]
    kernel: Option<String>,
    /// Only guests whose Hyper-V interfaces are provided by KVM, or by the VMM
    #[arg(long, value_parser = stories::SYNICS)]
    synic: Option<String>,
    /// Only guests with so many processors
    #[arg(long)]
    cpus: Option<u32>,
    /// In an emulated machine, also where this one could do it
    #[arg(long)]
    emulated: bool,
    /// Take the programs of this folder, `kmcl` and `hostile`, linked statically, and build none
    #[arg(long, value_name = "FOLDER")]
    programs: Option<PathBuf>,
}

/// How often stories are begun anew because the emulated machine, its own kernel, has crashed under them. That
/// says nothing of any guest, and happens with QEMU 7.2: docs/vm.md.
const MAX_CRASHES: u32 = 4;

/// Runs the stories and prints a table of what came of each scenario.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<(), Failure> {
    let Arguments { all, only, kernel, synic, cpus, emulated, programs } = arguments.clone();
    let runs = Wanted { all, only, kernel, synic, cpus }.runs();
    if runs.is_empty() {
        return Err(Failure::Missing {
            what: "every story",
            remedy: "nothing is left of what --only, --kernel, --synic and --cpus ask for"
                .to_owned(),
        });
    }
    let parts = Parts::get(workspace, programs.as_deref())?;
    let lab = images::build(&parts)?;
    let machine = if emulated { Machine::Emulated } else { machine::find(&lab, &parts.folder)? };
    let mut failed = Vec::new();
    let mut counted = Vec::new();
    let mut waiting = VecDeque::from(batches(&runs, all));
    let mut crashes = 0;
    for number in 0.. {
        let Some(mut batch) = waiting.pop_front() else { break };
        let out = parts.folder.join(format!("out-{number}"));
        let session = Session { lab: &lab, out: &out };
        lab.write_runs(&batch)?;
        say(&format!("{} stories {machine}; logs: {}", batch.len(), out.display()));
        let start = Instant::now();
        let ended = session.run(machine, &mut |line| show(line, &batch, start));
        let results = session.read_results();
        if machine == Machine::Emulated && crashes < MAX_CRASHES && session.has_crashed() {
            let rest = batch.split_off(judge::ended(&results, &batch));
            if !rest.is_empty() {
                crashes += 1;
                say(&format!(
                    "the emulated machine has crashed: {} stories begin anew",
                    rest.len()
                ));
                waiting.push_front(rest);
            }
        }
        let outcomes = judge::judge(&results, &batch);
        print_table(&outcomes);
        counted.extend(counts::rows(&results, &batch));
        let bad = outcomes.iter().filter(|outcome| !outcome.passed);
        failed.extend(bad.map(|bad| format!("{}: {}: {}", bad.guest, bad.scenario, bad.detail)));
        // How an emulated machine ends says nothing by itself.
        if let (Err(failure), true) = (ended, failed.is_empty()) {
            return Err(failure);
        }
    }
    let (table, wrong) = counts::table(&counted);
    table.iter().for_each(|line| say(line));
    failed.extend(wrong);
    none_of(&format!("not as it should be (logs: {})", parts.folder.display()), failed)
}

/// The runs of one machine each. A selection has one; in the whole matrix each kind of guest has its own,
/// so that what brings a machine down does not take all with it.
fn batches(runs: &[Run], all: bool) -> Vec<Vec<Run>> {
    let same = |a: &Run, b: &Run| !all || a.kind() == b.kind();
    runs.chunk_by(same).map(<[Run]>::to_vec).collect()
}

/// A result, as soon as it is there.
fn show(line: &str, runs: &[Run], start: Instant) {
    let Some(("RESULT", run, rest)) = judge::line_of(line) else { return };
    let (Some(run), Some((scenario, passed, detail))) = (runs.get(run), judge::result_of(rest))
    else {
        return;
    };
    let verdict = if passed { "ok" } else { "FAILED" };
    let seconds = start.elapsed().as_secs();
    say(&format!("{seconds:4} s  {}: {scenario}: {verdict} {detail}", run.guest()));
}

fn print_table(outcomes: &[judge::Outcome]) {
    let widest = |of: fn(&judge::Outcome) -> &str| {
        outcomes.iter().map(|outcome| of(outcome).len()).max().unwrap_or(0)
    };
    let (guests, scenarios) = (widest(|o| &o.guest), widest(|o| &o.scenario));
    for outcome in outcomes {
        let verdict = if outcome.passed { "ok" } else { "FAILED" };
        let judge::Outcome { guest, scenario, detail, .. } = outcome;
        say(&format!("{guest:guests$}  {scenario:scenarios$}  {verdict:6}  {detail}"));
    }
}
