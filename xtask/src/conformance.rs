//! `cargo xtask conformance`: the C programs of `tests/conformance`, and a table of the rows that passed
//! for each documented function.
//!
//! A program prints `ROW <function> <rule> ok|FAIL` for each rule it has looked at.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use crate::run::{Failure, none_of, run, run_and_keep, say};
use crate::workspace::Workspace;

const SOURCES: &str = "tests/conformance";
const INCLUDE: &str = "crates/kmcl-capi/include";

/// Rows of one function.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Count {
    passed: u32,
    failed: u32,
}

pub(crate) fn run_all(workspace: &Workspace) -> Result<(), Failure> {
    run(&mut workspace.cargo(["build", "--package", "kmcl-capi"]))?;
    let folder = workspace.target_directory().join("conformance");
    let file = |path: &PathBuf, source| Failure::File { path: path.clone(), source };
    std::fs::create_dir_all(&folder).map_err(|source| file(&folder, source))?;
    let mut lines = Vec::new();
    let sources = workspace.root().join(SOURCES);
    let mut programs: Vec<PathBuf> = std::fs::read_dir(&sources)
        .map_err(|source| file(&sources, source))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .collect();
    programs.sort();
    let mut ended_early = Vec::new();
    for source in programs {
        let program = folder.join(source.file_stem().unwrap_or_default());
        run(Command::new("cc")
            .args(["-std=c11", "-D_GNU_SOURCE", "-g", "-pthread", "-Wall", "-Wextra", "-Wpedantic"])
            .args(["-Werror", "-I"])
            .arg(workspace.root().join(INCLUDE))
            .arg(&source)
            .arg("-o")
            .arg(&program)
            .arg(workspace.target_directory().join("debug/libkmcl_capi.a"))
            .args(["-lm", "-ldl"]))?;
        say(&format!("==> {}", source.file_name().unwrap_or_default().display()));
        match run_and_keep(&mut Command::new(&program)) {
            Ok(said) => lines.extend(said),
            // Its rows were shown; the others go on.
            Err(failure) => ended_early.push(failure.to_string()),
        }
    }
    let counts = count(&lines);
    for line in table(&counts) {
        say(&line);
    }
    let ddi = workspace.read("xtask/tests/ddi-names.txt")?;
    let mut findings = without_rows(&counts, &ddi);
    findings.extend(ended_early);
    none_of("conformance", findings)
}

fn count(lines: &[String]) -> BTreeMap<String, Count> {
    let mut counts = BTreeMap::<String, Count>::new();
    for line in lines {
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["ROW", function, _rule, outcome] = words.as_slice() {
            let count = counts.entry((*function).to_owned()).or_default();
            if *outcome == "ok" {
                count.passed += 1;
            } else {
                count.failed += 1;
            }
        }
    }
    counts
}

fn table(counts: &BTreeMap<String, Count>) -> Vec<String> {
    let width = counts.keys().map(String::len).max().unwrap_or(0);
    let mut rows = vec![String::new(), format!("{:<width$}  passed  failed", "function")];
    rows.extend(counts.iter().map(|(function, Count { passed, failed })| {
        format!("{function:<width$}  {passed:>6}  {failed:>6}")
    }));
    let passed: u32 = counts.values().map(|count| count.passed).sum();
    let failed: u32 = counts.values().map(|count| count.failed).sum();
    rows.push(format!("{:<width$}  {passed:>6}  {failed:>6}", "all"));
    rows
}

/// Documented functions and callbacks that no row is about.
fn without_rows(counts: &BTreeMap<String, Count>, ddi: &str) -> Vec<String> {
    ddi.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(kind, name)| {
            matches!(*kind, "function" | "callback") && !name.starts_with("VMB_")
        })
        .map(|(_, name)| name)
        .filter(|name| !counts.contains_key(*name))
        .map(|name| format!("no row is about {name}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_by_function_and_missing_ones_are_named() {
        let said: Vec<String> = [
            "ROW VmbPacketSend D-33 ok",
            "ROW VmbPacketSend D-41 FAIL",
            "  line 7: what failed",
            "ROW VmbPacketFree twice ok",
            "passed",
        ]
        .map(str::to_owned)
        .into();
        let counts = count(&said);
        assert_eq!(counts["VmbPacketSend"], Count { passed: 1, failed: 1 });
        assert_eq!(table(&counts).last().unwrap(), "all                 2       1");
        let ddi = "# names\nfunction VmbPacketSend\nfunction VmbPacketRestore\nstruct KMCL\n";
        assert_eq!(without_rows(&counts, ddi), ["no row is about VmbPacketRestore"]);
    }
}
