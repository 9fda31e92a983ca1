//! `cargo xtask fuzz`: builds the fuzz targets and runs them, one after the other.
//!
//! The targets are in a workspace of their own, `fuzz/`, because they are built with a sanitizer and with
//! coverage. Both are options that a stable compiler has and does not offer; it is told to offer them for
//! this build alone.

use std::process::Command;

use crate::run::{Failure, run, say, succeeds};
use crate::workspace::Workspace;

/// Most memory that a target may use, in MiB: inputs are small, and so is what becomes of them.
const MEMORY_MIB: u32 = 2048;
/// Longest input, in bytes: what is kept in the corpora, and as much again.
const INPUT_BYTES: u32 = 32 << 10;
/// One input that takes longer hangs.
const INPUT_LIMIT_S: u32 = 25;

/// Runs `target`, or all, for `seconds` each. What is new goes to `fuzz/found/TARGET`; with `keep` what
/// of it reaches code that the corpus does not goes to `fuzz/corpus/TARGET` afterwards.
pub(crate) fn fuzz(
    workspace: &Workspace,
    target: Option<&str>,
    seconds: u32,
    keep: bool,
) -> Result<(), Failure> {
    let names = targets(workspace)?;
    if let Some(target) = target
        && !names.iter().any(|name| name == target)
    {
        let remedy = format!("there are {}", names.join(", "));
        return Err(Failure::Missing { what: "a fuzz target of that name", remedy });
    }
    install(workspace)?;
    for name in names.iter().filter(|name| target.is_none_or(|target| target == *name)) {
        say(&format!("==> {name}, for {seconds} s"));
        let found = workspace.path(&format!("fuzz/found/{name}"));
        std::fs::create_dir_all(&found)
            .map_err(|source| Failure::File { path: found.clone(), source })?;
        let folders = [format!("fuzz/found/{name}"), format!("fuzz/corpus/{name}")];
        let mut command = cargo_fuzz(workspace, name);
        command.args(&folders).arg("--").args([
            format!("-max_total_time={seconds}"),
            format!("-rss_limit_mb={MEMORY_MIB}"),
            format!("-max_len={INPUT_BYTES}"),
            format!("-timeout={INPUT_LIMIT_S}"),
            "-print_final_stats=1".to_owned(),
        ]);
        run(&mut command)?;
        if keep {
            let mut command = cargo_fuzz(workspace, name);
            run(command.args(folders.iter().rev()).args(["--", "-merge=1"]))?;
        }
    }
    Ok(())
}

fn cargo_fuzz(workspace: &Workspace, name: &str) -> Command {
    let mut command = workspace.cargo(["fuzz", "run", "--fuzz-dir", "fuzz", name]);
    command.env("RUSTC_BOOTSTRAP", "1");
    command.env("CARGO_TARGET_DIR", workspace.target_directory().join("fuzz"));
    command
}

/// The names of the targets, which are those of their files.
fn targets(workspace: &Workspace) -> Result<Vec<String>, Failure> {
    let path = workspace.path("fuzz/targets");
    let entries =
        std::fs::read_dir(&path).map_err(|source| Failure::File { path: path.clone(), source })?;
    let mut names: Vec<_> = entries
        .flatten()
        .filter_map(|entry| entry.path().file_stem()?.to_str().map(str::to_owned))
        .collect();
    names.sort();
    Ok(names)
}

fn install(workspace: &Workspace) -> Result<(), Failure> {
    if succeeds(&mut workspace.cargo(["fuzz", "--version"])) {
        return Ok(());
    }
    say("installing cargo-fuzz from source, once; this takes a minute");
    run(&mut workspace.cargo(["install", "cargo-fuzz", "--locked"]))
}
