//! Steps that run test suites.

use cargo_metadata::TargetKind;

use crate::run::{Failure, run};
use crate::workspace::Workspace;

pub(super) fn tests(workspace: &Workspace) -> Result<(), Failure> {
    run(&mut workspace.cargo(["nextest", "run", "--workspace"]))
}

pub(super) fn doctests(workspace: &Workspace) -> Result<(), Failure> {
    run(&mut workspace.cargo(["test", "--workspace", "--doc"]))
}

/// Runs every test target called `loom`. The models replace the atomics of the code under test, so
/// they are built in a target folder of their own and leave the ordinary build alone.
pub(super) fn loom(workspace: &Workspace) -> Result<(), Failure> {
    let models: Vec<_> = workspace
        .targets(&TargetKind::Test)
        .into_iter()
        .filter(|(_, target)| target.name == "loom")
        .collect();
    if models.is_empty() {
        return Err(Failure::Missing {
            what: "every loom model",
            remedy: "the index protocols must have one in tests/loom.rs".to_owned(),
        });
    }
    for (package, target) in models {
        run(workspace
            .cargo(["test", "--release", "--package", &package.name, "--test", &target.name])
            .env("RUSTFLAGS", "--cfg loom")
            .env("CARGO_TARGET_DIR", workspace.target_directory().join("loom")))?;
    }
    Ok(())
}
