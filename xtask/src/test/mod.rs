//! `cargo xtask test`: the table of steps, and the one loop that runs it.

mod programs;
mod style;
mod suites;
mod tools;

pub(crate) use tools::install_packages;

use std::time::Instant;

use crate::run::{Failure, say};
use crate::workspace::Workspace;

/// One check. Steps run in the order of [`STEPS`]: what is quick to fail comes first.
struct Step {
    name: &'static str,
    about: &'static str,
    run: fn(&Workspace) -> Result<(), Failure>,
}

const STEPS: &[Step] = &[
    Step {
        name: "tools",
        about: "what the other steps need is there, or gets installed",
        run: tools::install,
    },
    Step { name: "format", about: "the sources are as rustfmt writes them", run: style::format },
    Step {
        name: "documents",
        about: "the commands and links in the documents are real",
        run: style::documents,
    },
    Step { name: "clippy", about: "no lint fires in any target", run: style::clippy },
    Step {
        name: "alone",
        about: "each crate with features builds without the default ones",
        run: style::alone,
    },
    Step {
        name: "docs",
        about: "the API documentation builds without a warning",
        run: style::docs,
    },
    Step { name: "tests", about: "all unit and integration tests", run: suites::tests },
    Step {
        name: "doctests",
        about: "the examples inside the documentation",
        run: suites::doctests,
    },
    Step { name: "loom", about: "every interleaving of the index protocols", run: suites::loom },
    Step {
        name: "examples",
        about: "every example runs and exits with 0",
        run: programs::examples,
    },
    Step {
        name: "demo",
        about: "the README's first command runs and prints what the README shows",
        run: programs::demo,
    },
    Step { name: GUEST, about: "real guests go through every scenario once", run: programs::guest },
];

/// The step that `--no-guest` leaves out: it needs most of what a machine may lack.
const GUEST: &str = "guest";

/// The names of all steps, in order.
pub(crate) fn names() -> Vec<&'static str> {
    STEPS.iter().map(|step| step.name).collect()
}

/// Prints every step with what it checks.
pub(crate) fn list() {
    for step in STEPS {
        say(&format!("{:<10}{}", step.name, step.about));
    }
}

/// Runs the steps named in `only`, or all, up to the first that fails; without real guests unless
/// `guests`.
pub(crate) fn run(workspace: &Workspace, only: &[String], guests: bool) -> Result<(), Failure> {
    let chosen: Vec<_> = STEPS
        .iter()
        .filter(|step| only.is_empty() || only.iter().any(|name| name == step.name))
        .filter(|step| guests || step.name != GUEST)
        .collect();
    let start = Instant::now();
    for (done, step) in chosen.iter().enumerate() {
        say(&format!("==> [{}/{}] {}: {}", done + 1, chosen.len(), step.name, step.about));
        let step_start = Instant::now();
        (step.run)(workspace)
            .map_err(|source| Failure::Step { step: step.name, source: Box::new(source) })?;
        say(&format!("<== {}: passed in {:.1} s", step.name, step_start.elapsed().as_secs_f64()));
    }
    say(&format!("all {} steps passed in {:.0} s", chosen.len(), start.elapsed().as_secs_f64()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_names_are_unique() {
        let mut names = names();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), STEPS.len());
    }
}
