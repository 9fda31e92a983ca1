//! The list that both interfaces are held to: each row names the test here that is about it, or why only C
//! can break it. `cargo xtask conformance` runs them; the programs in C are in `tests/conformance`.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const LIST: &str = include_str!("../../../tests/conformance/rows.tsv");

/// Why only C can break a row, as the list's head explains.
const ONLY_C: [&str; 9] =
    ["argument", "bus", "handle", "level", "mdl", "memory", "pointer", "table", "verifier"];

/// The names of the tests in a file beside this one.
fn tests_of(file: &str) -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(file).with_extension("rs");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut lines = text.lines().map(str::trim_start); // some are in `proptest!`
    let mut names = BTreeSet::new();
    while lines.any(|line| line == "#[test]") {
        let function = lines.find_map(|line| line.strip_prefix("fn ")).unwrap();
        names.insert(function.split('(').next().unwrap().to_owned());
    }
    names
}

#[test]
fn every_row_names_a_test_or_why_there_is_none() {
    let mut files = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut with_test = 0;
    for line in LIST.lines().filter(|line| !line.starts_with('#')) {
        let [area, function, rule, rust] =
            <[_; 4]>::try_from(line.split('\t').collect::<Vec<_>>()).unwrap();
        assert!(seen.insert([area, function, rule]), "twice: {line}");
        match (rust.split_once("::"), rust.strip_prefix("c:")) {
            (Some((file, test)), None) => {
                let tests = files.entry(file).or_insert_with(|| tests_of(file));
                assert!(tests.contains(test), "no such test: {line}");
                with_test += 1;
            }
            (None, Some(why)) => assert!(ONLY_C.contains(&why), "no such reason: {line}"),
            _ => panic!("neither: {line}"),
        }
    }
    assert!(with_test >= 200, "only {with_test} rows have a test");
}
