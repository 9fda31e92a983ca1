//! `cargo xtask conformance`: both interfaces against the same list, and a table of the rows that passed for
//! each function.
//!
//! The list is `tests/conformance/rows.tsv`. For C, a program of that folder prints
//! `ROW <function> <rule> ok|FAIL` for each row; the programs run with the library as it is debugged, and as it
//! is released. For Rust, the list names the test of `kmcl` that holds it to the same, or says why only C
//! can break the row.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Failure, none_of, run, run_and_keep, say};
use crate::workspace::Workspace;

const SOURCES: &str = "tests/conformance";
const LIST: &str = "tests/conformance/rows.tsv";
const INCLUDE: &str = "crates/kmcl-capi/include";
const PROFILES: [&str; 2] = ["debug", "release"];

/// A row of the list.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Row {
    area: String,
    function: String,
    rule: String,
    /// `file::test`, or `c:` and why.
    rust: String,
}

/// Rows of one function.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Count {
    rows: u32,
    /// By profile.
    c_passed: [u32; PROFILES.len()],
    rust_passed: u32,
    /// Rows that Rust cannot break.
    only_c: u32,
}

pub(crate) fn run_all(workspace: &Workspace) -> Result<(), Failure> {
    let mut findings = Vec::new();
    let rows = rows(&workspace.read(LIST)?, &mut findings);
    let mut c_passed = Vec::new();
    for profile in PROFILES {
        c_passed.push(run_c(workspace, profile, &rows, &mut findings)?);
    }
    let rust_passed = run_rust(workspace, &rows, &mut findings);
    let counts = count(&rows, &c_passed, &rust_passed);
    for line in table(&counts) {
        say(&line);
    }
    findings.extend(without_rows(&counts, &workspace.read("xtask/tests/ddi-names.txt")?));
    none_of("conformance", findings)
}

fn rows(list: &str, findings: &mut Vec<String>) -> Vec<Row> {
    let lines = list.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let parse = |line: &str| match line.split('\t').collect::<Vec<_>>().as_slice() {
        [area, function, rule, rust] => {
            let [area, function, rule, rust] =
                [area, function, rule, rust].map(|it| (*it).to_owned());
            Some(Row { area, function, rule, rust })
        }
        _ => None,
    };
    let mut rows = Vec::new();
    for line in lines {
        match parse(line) {
            Some(row) => rows.push(row),
            None => findings.push(format!("{LIST}: not a row: {line}")),
        }
    }
    rows
}

/// Runs the C programs with the library of one profile. Which functions and rules of which area passed.
fn run_c(
    workspace: &Workspace,
    profile: &str,
    rows: &[Row],
    findings: &mut Vec<String>,
) -> Result<BTreeSet<[String; 3]>, Failure> {
    let mut build = workspace.cargo(["build", "--package", "kmcl-capi"]);
    if profile == "release" {
        build.arg("--release");
    }
    run(&mut build)?;
    let folder = workspace.target_directory().join("conformance").join(profile);
    let file = |path: &Path, source| Failure::File { path: path.to_path_buf(), source };
    std::fs::create_dir_all(&folder).map_err(|source| file(&folder, source))?;
    let areas: BTreeSet<&str> = rows.iter().map(|row| row.area.as_str()).collect();
    let sources = workspace.root().join(SOURCES);
    let mut programs: Vec<PathBuf> = std::fs::read_dir(&sources)
        .map_err(|source| file(&sources, source))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .collect();
    programs.sort();
    let mut passed = BTreeSet::new();
    for source in programs {
        let area = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let program = folder.join(&area);
        run(Command::new("cc")
            .args(["-std=c11", "-D_GNU_SOURCE", "-g", "-pthread", "-Wall", "-Wextra", "-Wpedantic"])
            .args(["-Werror", "-I"])
            .arg(workspace.root().join(INCLUDE))
            .arg(&source)
            .arg("-o")
            .arg(&program)
            .arg(workspace.target_directory().join(profile).join("libkmcl_capi.a"))
            .args(["-lm", "-ldl"]))?;
        say(&format!("==> {area}.c, {profile}"));
        match run_and_keep(&mut Command::new(&program)) {
            Ok(said) => passed.extend(passed_in_c(&area, &said, findings)),
            // Its rows were shown; the others go on.
            Err(failure) => findings.push(failure.to_string()),
        }
        if !areas.contains(area.as_str()) {
            findings.push(format!("{LIST} has no row of {area}.c"));
        }
    }
    findings.extend(differences(rows, &passed, profile));
    Ok(passed)
}

/// The rows that a program has printed as passed. A row that it prints several times passes each time, or
/// not at all.
fn passed_in_c(area: &str, said: &[String], findings: &mut Vec<String>) -> BTreeSet<[String; 3]> {
    let mut passed = BTreeSet::new();
    for line in said {
        let words: Vec<_> = line.split_whitespace().collect();
        if let ["ROW", function, rule, outcome] = words.as_slice() {
            if *outcome == "ok" {
                passed.insert([area, *function, *rule].map(str::to_owned));
            } else {
                findings.push(format!("{area}.c: {function} {rule} failed"));
            }
        }
    }
    passed
}

/// Rows of the list that no program has printed, and the reverse.
fn differences(rows: &[Row], passed: &BTreeSet<[String; 3]>, profile: &str) -> Vec<String> {
    let key = |row: &Row| [row.area.clone(), row.function.clone(), row.rule.clone()];
    let listed: BTreeSet<_> = rows.iter().map(key).collect();
    let show = |[area, function, rule]: &[String; 3]| format!("{area}.c: {function} {rule}");
    let missing = listed.difference(passed);
    let missing = missing.map(|row| format!("{} did not pass ({profile})", show(row)));
    let unlisted = passed.difference(&listed);
    missing.chain(unlisted.map(|row| format!("{} is not in {LIST}", show(row)))).collect()
}

/// Runs the tests that the list names, file by file. Those that passed, as `file::test`.
fn run_rust(workspace: &Workspace, rows: &[Row], findings: &mut Vec<String>) -> BTreeSet<String> {
    let mut tests = BTreeMap::<&str, BTreeSet<&str>>::new();
    for (file, test) in rows.iter().filter_map(|row| row.rust.split_once("::")) {
        tests.entry(file).or_default().insert(test);
    }
    let mut passed = BTreeSet::new();
    for (file, names) in tests {
        say(&format!("==> kmcl, {file}.rs"));
        let mut command = workspace.cargo(["test", "--quiet", "--package", "kmcl", "--test", file]);
        command.args(["--", "--exact", "--format=pretty"]).args(&names);
        match run_and_keep(&mut command) {
            Ok(said) => passed.extend(passed_in_rust(file, &said)),
            Err(failure) => findings.push(failure.to_string()),
        }
        for name in names {
            if !passed.contains(&format!("{file}::{name}")) {
                findings.push(format!("kmcl: {file}::{name} did not pass"));
            }
        }
    }
    passed
}

fn passed_in_rust(file: &str, said: &[String]) -> Vec<String> {
    let name = |line: &String| {
        let test = line.strip_prefix("test ")?.strip_suffix(" ... ok")?;
        Some(format!("{file}::{test}"))
    };
    said.iter().filter_map(name).collect()
}

fn count(
    rows: &[Row],
    c_passed: &[BTreeSet<[String; 3]>],
    rust_passed: &BTreeSet<String>,
) -> BTreeMap<String, Count> {
    let mut counts = BTreeMap::<String, Count>::new();
    for row in rows {
        let count = counts.entry(row.function.clone()).or_default();
        count.rows += 1;
        let key = [row.area.clone(), row.function.clone(), row.rule.clone()];
        for (sum, passed) in count.c_passed.iter_mut().zip(c_passed) {
            *sum += u32::from(passed.contains(&key));
        }
        count.rust_passed += u32::from(rust_passed.contains(&row.rust));
        count.only_c += u32::from(row.rust.starts_with("c:"));
    }
    counts
}

fn table(counts: &BTreeMap<String, Count>) -> Vec<String> {
    let width = counts.keys().map(String::len).max().unwrap_or(0);
    let line = |name: &str, [rows, debug, release, rust, only_c]: [&str; 5]| {
        format!("{name:<width$}  {rows:>4}  {debug:>5}  {release:>9}  {rust:>4}  {only_c:>6}")
    };
    let show = |name: &str, count: &Count| {
        let [debug, release] = count.c_passed;
        let numbers = [count.rows, debug, release, count.rust_passed, count.only_c];
        let numbers = numbers.map(|number| number.to_string());
        line(name, numbers.each_ref().map(String::as_str))
    };
    let mut lines =
        vec![String::new(), line("function", ["rows", "C", "C release", "Rust", "only C"])];
    let mut all = Count::default();
    for (function, count) in counts {
        lines.push(show(function, count));
        all.rows += count.rows;
        for (sum, passed) in all.c_passed.iter_mut().zip(count.c_passed) {
            *sum += passed;
        }
        all.rust_passed += count.rust_passed;
        all.only_c += count.only_c;
    }
    lines.push(show("all", &all));
    lines
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

    fn said(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| (*line).to_owned()).collect()
    }

    #[test]
    fn rows_are_counted_by_function_and_what_is_missing_is_named() {
        let list = "# comment\n\
                    sends\tVmbPacketSend\tD-33\tsending::each\n\
                    sends\tVmbPacketSend\tD-41\tsending::each\n\
                    sends\tVmbPacketFree\tnull\tc:handle\n\
                    three\tcolumns\tonly\n";
        let mut findings = Vec::new();
        let rows = rows(list, &mut findings);
        assert_eq!((rows.len(), findings.len()), (3, 1));
        findings.clear();
        let lines = said(&[
            "ROW VmbPacketSend D-33 ok",
            "ROW VmbPacketSend D-41 FAIL",
            "  line 7: what failed",
            "ROW VmbPacketFree twice ok",
            "passed",
        ]);
        let passed = passed_in_c("sends", &lines, &mut findings);
        assert_eq!(findings, ["sends.c: VmbPacketSend D-41 failed"]);
        assert_eq!(
            differences(&rows, &passed, "debug"),
            [
                "sends.c: VmbPacketFree null did not pass (debug)",
                "sends.c: VmbPacketSend D-41 did not pass (debug)",
                "sends.c: VmbPacketFree twice is not in tests/conformance/rows.tsv",
            ]
        );
        let rust = passed_in_rust("sending", &said(&["test each ... ok", "test other ... FAILED"]));
        assert_eq!(rust, ["sending::each"]);
        let counts = count(&rows, &[passed, BTreeSet::new()], &rust.into_iter().collect());
        let send = Count { rows: 2, c_passed: [1, 0], rust_passed: 2, only_c: 0 };
        assert_eq!(counts["VmbPacketSend"], send);
        let free = Count { rows: 1, only_c: 1, ..Count::default() };
        assert_eq!(counts["VmbPacketFree"], free);
        let last = table(&counts).pop().unwrap();
        let numbers: Vec<_> = last.split_whitespace().collect();
        assert_eq!(numbers, ["all", "3", "1", "0", "2", "1"]);
        let ddi = "# names\nfunction VmbPacketSend\nfunction VmbPacketRestore\nstruct KMCL\n";
        assert_eq!(without_rows(&counts, ddi), ["no row is about VmbPacketRestore"]);
    }
}
