//! Runs the conformance programs: as they are, under sanitizers, and under valgrind.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use common::{build, is_there, run, sources};

/// Builds and runs one program with `flags`, started through `launcher`.
fn run_one(source: &Path, flags: &[&str], launcher: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("program");
    build(source, &program, flags);
    let mut command = match launcher.split_first() {
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(&program).env("KMCL_SLOW", "1");
            command
        }
        None => Command::new(&program),
    };
    let output = run(&mut command);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(!said.contains("FAIL"), "{}: {said}", source.display());
    let printed: BTreeSet<_> = said
        .lines()
        .filter_map(|line| line.strip_prefix("ROW ")?.strip_suffix(" ok")?.split_once(' '))
        .collect();
    assert_eq!(printed, listed(source.file_stem().unwrap().to_str().unwrap()));
}

/// The rows that the list has for an area: function and rule.
fn listed(area: &str) -> BTreeSet<(&str, &str)> {
    let columns = |line: &'static str| {
        let mut columns = line.split('\t');
        let is_of_area = columns.next() == Some(area);
        Some((columns.next()?, columns.next()?)).filter(|_| is_of_area)
    };
    include_str!("../../../tests/conformance/rows.tsv").lines().filter_map(columns).collect()
}

#[test]
fn every_program_passes() {
    for source in sources("tests/conformance") {
        run_one(&source, &[], &[]);
    }
}

#[test]
fn no_sanitizer_finds_anything() {
    for source in sources("tests/conformance") {
        run_one(&source, &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], &[]);
    }
}

/// One test for each program: valgrind takes its time, one thread at a time, every access looked at.
macro_rules! under_valgrind {
    ($($name:ident)*) => {
        mod valgrind_finds_nothing_in {
            $(#[test]
            fn $name() {
                super::valgrind(stringify!($name));
            })*
        }

        #[test]
        fn every_program_has_a_test_under_valgrind() {
            let listed = [$(stringify!($name)),*];
            let found = sources("tests/conformance");
            let found: Vec<_> = found.iter().map(|path| path.file_stem().unwrap()).collect();
            assert_eq!(found, listed);
        }
    };
}

under_valgrind! {
    freezing gpadls life_cycle packets rules save_restore sends setters synchronous tables threads unix_bus
}

fn valgrind(name: &str) {
    if !is_there("valgrind") {
        eprintln!("no valgrind here: nothing was checked");
        return;
    }
    let source = common::root().join("tests/conformance").join(name).with_extension("c");
    let launcher =
        ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=no", "--fair-sched=yes"];
    run_one(&source, &[], &launcher);
}
