//! What came of each scenario, from the lines that the scripts have written.

use super::stories::Run;

/// One line of the table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Outcome {
    pub(super) guest: String,
    pub(super) scenario: String,
    pub(super) passed: bool,
    /// What was seen.
    pub(super) detail: String,
}

/// A line of the results: what it is, of which run, and the rest.
pub(super) fn line_of(line: &str) -> Option<(&str, usize, &str)> {
    let mut words = line.splitn(3, ' ');
    let (kind, run) = (words.next()?, words.next()?.parse().ok()?);
    Some((kind, run, words.next().unwrap_or_default().trim()))
}

/// A line `RESULT`: the scenario, whether it passed, and what was seen.
pub(super) fn result_of(rest: &str) -> Option<(&str, bool, &str)> {
    let mut words = rest.splitn(3, ' ');
    let (scenario, verdict) = (words.next()?, words.next()?);
    Some((scenario, verdict == "ok", words.next().unwrap_or_default().trim()))
}

/// How many of the runs have come to their end, from the first one on.
pub(super) fn ended(results: &str, runs: &[Run]) -> usize {
    let is_over = |number| {
        let mut lines = results.lines().filter_map(line_of);
        lines.any(|(kind, of, _)| kind == "END" && of == number)
    };
    (0..runs.len()).take_while(|number| is_over(*number)).count()
}

/// What the results say of each run, scenario by scenario. One without a result has failed.
pub(super) fn judge(results: &str, runs: &[Run]) -> Vec<Outcome> {
    let mut outcomes = Vec::new();
    for (number, run) in runs.iter().enumerate() {
        let lines = results.lines().filter_map(line_of).filter(|(_, of, _)| *of == number);
        let lines: Vec<_> = lines.map(|(kind, _, rest)| (kind, rest)).collect();
        let guest = run.guest();
        let step = lines.iter().rev().find(|(kind, _)| *kind == "STEP");
        let stopped = match (lines.is_empty(), step) {
            (true, _) => "not begun".to_owned(),
            (false, Some((_, step))) => format!("no result; last: {step}"),
            (false, None) => "no result".to_owned(),
        };
        let told: Vec<_> = lines
            .iter()
            .filter(|(kind, _)| *kind == "RESULT")
            .filter_map(|(_, rest)| result_of(rest))
            .collect();
        let mut add = |scenario: &str, passed, detail: &str| {
            outcomes.push(Outcome {
                guest: guest.clone(),
                scenario: scenario.to_owned(),
                passed,
                detail: detail.to_owned(),
            });
        };
        for scenario in run.story.scenarios {
            match told.iter().find(|(name, ..)| name == scenario) {
                Some((_, passed, detail)) => add(scenario, *passed, detail),
                None => add(scenario, false, &stopped),
            }
        }
        // What failed between two scenarios.
        for (name, passed, detail) in &told {
            if !run.story.scenarios.contains(name) {
                add(name, *passed, detail);
            }
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::super::stories::Wanted;
    use super::*;

    /// A story of three scenarios.
    fn run() -> Run {
        let only = vec!["resets".to_owned()];
        let runs = Wanted { only, ..Wanted::default() }.runs();
        assert_eq!(runs[0].story.scenarios, ["reboot", "host-reboot", "crash"]);
        runs[0]
    }

    #[test]
    fn a_scenario_without_a_result_has_failed_and_says_where_it_stopped() {
        let whole = "RUN 0\nSTEP 0 reboot\nRESULT 0 reboot ok seen\nRESULT 0 host-reboot ok\nSTEP 0 crash\nRESULT 0 crash ok P0=1\nEND 0\n";
        for (results, expected) in [
            (whole.to_owned(), [(true, "seen"), (true, ""), (true, "P0=1")]),
            (
                whole.replace("RESULT 0 crash ok P0=1\n", ""),
                [(true, "seen"), (true, ""), (false, "no result; last: crash")],
            ),
            (
                whole.replace("reboot ok seen", "reboot failed no disk"),
                [(false, "no disk"), (true, ""), (true, "P0=1")],
            ),
            (String::new(), [(false, "not begun"); 3]),
            // Cut off, of another run, and nonsense.
            ("RUN 0\nRESULT 0 reb".to_owned(), [(false, "no result"); 3]),
            (whole.replace(" 0 ", " 1 "), [(false, "no result"); 3]),
            ("\u{0}\nRESULT\nRESULT x y z\n".to_owned(), [(false, "not begun"); 3]),
        ] {
            let outcomes = judge(&results, &[run()]);
            let seen: Vec<_> =
                outcomes.iter().map(|one| (one.passed, one.detail.as_str())).collect();
            assert_eq!(seen, expected, "{results:?}");
        }
        let twice = format!("{whole}RUN 1\nRESULT 1 reboot ok\n");
        for (results, over) in [("", 0), (whole, 1), (&twice, 1), ("END 1\n", 0)] {
            assert_eq!(ended(results, &[run(), run()]), over, "{results:?}");
        }
        let outcomes = judge(&format!("{whole}RESULT 0 story failed late\n"), &[run()]);
        assert_eq!(outcomes.len(), 4, "what fails between scenarios is not lost");
        assert!(!outcomes[3].passed);
    }
}
