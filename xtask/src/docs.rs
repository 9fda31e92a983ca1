//! `cargo xtask docs`: everything that is generated for readers. None of it is committed.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::run::{Failure, run, say, shown};
use crate::workspace::Workspace;

/// Shells with a completion script, and the script's file.
const COMPLETIONS: [(&str, &str); 3] =
    [("bash", "kmcl.bash"), ("fish", "kmcl.fish"), ("zsh", "_kmcl")];

pub(crate) fn build(workspace: &Workspace) -> Result<(), Failure> {
    run(&mut workspace.cargo(["doc", "--workspace", "--lib", "--no-deps"]))?;
    run(&mut workspace.cargo(["build", "--package", "kmcl-cli"]))?;
    let program = workspace.target_directory().join("debug/kmcl");
    let folder = workspace.target_directory().join("kmcl-docs");
    std::fs::create_dir_all(&folder)
        .map_err(|source| Failure::File { path: folder.clone(), source })?;
    run(Command::new(&program).arg("man").arg(&folder))?;
    for (shell, file) in COMPLETIONS {
        keep_output(Command::new(&program).args(["completions", shell]), &folder.join(file))?;
    }
    say(&format!("API: {}", workspace.target_directory().join("doc/kmcl/index.html").display()));
    say(&format!("man pages and completions: {}", folder.display()));
    Ok(())
}

/// Runs `command` and puts what it prints into the file at `path`.
fn keep_output(command: &mut Command, path: &Path) -> Result<(), Failure> {
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| Failure::Start { command: shown(command), source })?;
    if !output.status.success() {
        return Err(Failure::Status { command: shown(command), status: output.status });
    }
    std::fs::write(path, output.stdout)
        .map_err(|source| Failure::File { path: path.to_owned(), source })
}
