//! Steps that run programs as a user would.

use std::time::Duration;

use cargo_metadata::TargetKind;

use crate::guest;
use crate::readme;
use crate::run::{Failure, none_of, run, run_and_keep, run_within, say};
use crate::workspace::Workspace;

/// An example shows one thing; one that takes longer than this hangs.
const EXAMPLE_LIMIT: Duration = Duration::from_secs(60);

pub(super) fn examples(workspace: &Workspace) -> Result<(), Failure> {
    // Built first, so that the limit below measures the example and not the compiler.
    run(&mut workspace.cargo(["build", "--workspace", "--examples"]))?;
    for (package, target) in workspace.targets(&TargetKind::Example) {
        say(&format!("--> {}: example {}", package.name, target.name));
        run_within(
            &mut workspace.cargo([
                "run",
                "--quiet",
                "--package",
                &package.name,
                "--example",
                &target.name,
            ]),
            EXAMPLE_LIMIT,
        )?;
    }
    Ok(())
}

/// A selection of what `cargo xtask guest` can do that has every scenario once.
pub(super) fn guest(workspace: &Workspace) -> Result<(), Failure> {
    guest::run(workspace, &guest::Arguments::default()).map_err(|failure| match failure {
        Failure::Missing { what, remedy } => {
            Failure::Missing { what, remedy: format!("{remedy}; --no-guest does without") }
        }
        other => other,
    })
}

/// Runs the README's first command, word for word, and compares what it prints with what the README
/// shows, figures aside.
pub(super) fn demo(workspace: &Workspace) -> Result<(), Failure> {
    let document = workspace.read("README.md")?;
    let Some(command) = readme::commands(&document).into_iter().next() else {
        return Err(Failure::Missing {
            what: "the README's first command",
            remedy: "put it into a ```sh block".to_owned(),
        });
    };
    let printed = run_and_keep(&mut readme::as_process(workspace, &command))?;
    none_of(
        "the README does not show what its first command prints",
        readme::differences(&readme::shown_output(&document), &printed),
    )
}
