//! Steps that read the sources and documents and run nothing of ours.

use crate::readme;
use crate::run::{Failure, none_of, run};
use crate::workspace::Workspace;

pub(super) fn format(workspace: &Workspace) -> Result<(), Failure> {
    run(&mut workspace.cargo(["fmt", "--all", "--check"]))
}

pub(super) fn clippy(workspace: &Workspace) -> Result<(), Failure> {
    run(&mut workspace.cargo([
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]))
}

/// In the workspace's own build every default feature is on: only a build of its own shows that a
/// crate does without.
pub(super) fn alone(workspace: &Workspace) -> Result<(), Failure> {
    for package in workspace.packages().iter().filter(|package| !package.features.is_empty()) {
        run(&mut workspace.cargo(["check", "--package", &package.name, "--no-default-features"]))?;
    }
    Ok(())
}

/// The program is called as the library is, and has no API: libraries only.
pub(super) fn docs(workspace: &Workspace) -> Result<(), Failure> {
    run(workspace
        .cargo(["doc", "--workspace", "--lib", "--no-deps"])
        .env("RUSTDOCFLAGS", "--deny warnings"))
}

pub(super) fn documents(workspace: &Workspace) -> Result<(), Failure> {
    none_of("commands in the documents that are not so", readme::wrong_commands(workspace)?)?;
    none_of("links in the documents that lead nowhere", readme::broken_links(workspace)?)
}
