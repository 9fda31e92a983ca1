//! What guests do, and how their log is judged.

use super::name;

/// One boot of a guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Run {
    /// The kernel, as the table calls it.
    pub(super) kernel: &'static str,
    /// Who provides Hyper-V's interfaces.
    pub(super) mode: &'static str,
    pub(super) processors: u32,
    /// What the guest's script does.
    pub(super) scenario: &'static str,
}

/// What each script's lines are about, and how the machine has to end.
const SCRIPTS: [(&str, &[&str], &str); 3] = [
    ("work", &["boot", "ext4", "fio", "reload"], "END PowerOff"),
    ("reboot", &["boot"], "END Reset"),
    ("crash", &["boot"], "END Reset"),
];

/// One line of the table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Outcome {
    pub(super) guest: String,
    pub(super) scenario: String,
    pub(super) passed: bool,
    /// What was seen.
    pub(super) detail: String,
}

/// A selection that has everything once, or all there is.
pub(super) fn runs(all: bool) -> Vec<Run> {
    let run = |kernel, mode, processors, scenario| Run { kernel, mode, processors, scenario };
    if !all {
        return vec![
            run("6.12 cloud", "kernel", 1, "work"),
            run("6.1", "user", 2, "work"),
            run("6.12 cloud", "user", 1, "reboot"),
            run("6.1", "kernel", 2, "crash"),
        ];
    }
    let mut runs = Vec::new();
    for kernel in ["6.12 cloud", "6.1"] {
        for mode in ["kernel", "user"] {
            for processors in [1, 2] {
                for (script, ..) in SCRIPTS {
                    runs.push(run(kernel, mode, processors, script));
                }
            }
        }
    }
    runs
}

/// What the log says of each run, scenario by scenario.
pub(super) fn judge(log: &str, runs: &[Run]) -> Vec<Outcome> {
    runs.iter().enumerate().flat_map(|(number, run)| judge_run(log, number, run)).collect()
}

fn judge_run(log: &str, number: usize, run: &Run) -> Vec<Outcome> {
    let lines = lines_of(log, number);
    let line_of = |scenario: &&str| {
        let begin = format!("RESULT {scenario} ");
        let line = lines.iter().find_map(|line| line.split_once(begin.as_str()));
        let (passed, detail) = match line {
            Some((_, line)) => match line.strip_prefix("ok") {
                Some(seen) => (true, seen.trim()),
                None => (false, line),
            },
            None => (false, "said nothing"),
        };
        outcome(run, scenario, passed, detail)
    };
    let script = SCRIPTS.iter().find(|(script, ..)| *script == run.scenario);
    let Some((script, scenarios, end)) = script else { return Vec::new() };
    let mut outcomes: Vec<_> = scenarios.iter().map(line_of).collect();
    let ended = lines.iter().find(|line| line.starts_with("END "));
    let seen = ended.map_or("did not end", |line| *line);
    outcomes.push(match *script {
        "crash" => {
            let told = lines.iter().any(|line| line.starts_with("Crash(CrashReport"));
            outcome(run, "crash", told && seen == *end, if told { seen } else { "not reported" })
        }
        "reboot" => outcome(run, "reboot", seen == *end, seen),
        _ => outcome(run, "power off", seen == *end, seen),
    });
    outcomes
}

fn outcome(run: &Run, scenario: &str, passed: bool, detail: &str) -> Outcome {
    let (guest, scenario) = (name(run), scenario.to_owned());
    Outcome { guest, scenario, passed, detail: detail.to_owned() }
}

/// The lines of a run. Before a marker there may be what firmware or a kernel has left on the line.
fn lines_of(log: &str, number: usize) -> Vec<&str> {
    let (begin, end) = (format!("RUN-BEGIN {number}"), format!("RUN-END {number} "));
    log.lines()
        .map(str::trim)
        .skip_while(|line| !line.ends_with(&begin))
        .skip(1)
        .take_while(|line| !line.contains(&end))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: Run = Run { kernel: "6.1", mode: "user", processors: 1, scenario: "crash" };

    fn passed(log: &str) -> Vec<bool> {
        judge(log, &[RUN]).iter().map(|outcome| outcome.passed).collect()
    }

    #[test]
    fn a_run_has_to_say_everything_and_end_as_it_should() {
        let whole = "\x1b[2JRUN-BEGIN 0\r\nRESULT boot ok Vmbus\r\nCrash(CrashReport { .. })\r\nEND Reset\r\nRUN-END 0 0\r\n";
        assert_eq!(passed(whole), [true, true]);
        for (line, expected) in [
            ("RESULT boot ok Vmbus\r\n", [false, true]),
            ("Crash(CrashReport { .. })\r\n", [true, false]),
            ("END Reset\r\n", [true, false]),
            ("RUN-BEGIN 0\r\n", [false, false]),
        ] {
            assert_eq!(passed(&whole.replace(line, "")), expected, "without {line:?}");
        }
        assert_eq!(passed(&whole.replace("ok Vmbus", "failed no disk")), [false, true]);
        let late = format!("RUN-BEGIN 0\nRUN-END 0 1\n{}", whole.replace("RUN-BEGIN 0", ""));
        assert_eq!(passed(&late), [false, false], "lines of nobody");
    }

    #[test]
    fn the_selection_has_every_kernel_way_and_script() {
        let (some, all) = (runs(false), runs(true));
        assert!(some.iter().all(|run| all.contains(run)));
        for run in &all {
            for same in [
                some.iter().any(|one| one.kernel == run.kernel),
                some.iter().any(|one| one.mode == run.mode),
                some.iter().any(|one| one.processors == run.processors),
                some.iter().any(|one| one.scenario == run.scenario),
            ] {
                assert!(same, "nothing like {run:?}");
            }
        }
    }
}
