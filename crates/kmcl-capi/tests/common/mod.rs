//! Compiling C and C++ against the headers, and running it with the library of this build.

#![allow(dead_code, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

pub(crate) fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include")
}

/// Where Cargo has put the static and the shared library of this very build: beside the tests.
pub(crate) fn libraries() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folder = test.parent().unwrap();
    assert!(folder.join("libkmcl_capi.a").is_file(), "no library in {}", folder.display());
    folder.to_path_buf()
}

/// What every C file of ours is compiled with.
pub(crate) const C: &[&str] =
    &["-std=c11", "-D_GNU_SOURCE", "-g", "-pthread", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];
/// The same for C++.
pub(crate) const CPP: &[&str] =
    &["-x", "c++", "-std=c++17", "-g", "-pthread", "-Wall", "-Wextra", "-Wpedantic", "-Werror"];

/// Runs `command`, which has to succeed.
pub(crate) fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

pub(crate) fn is_there(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// Compiles one C program and links it with the static library.
pub(crate) fn build(source: &Path, to: &Path, extra: &[&str]) {
    run(Command::new("cc")
        .args(C)
        .args(extra)
        .arg("-I")
        .arg(include())
        .arg(source)
        .arg("-o")
        .arg(to)
        .arg(libraries().join("libkmcl_capi.a"))
        .args(["-lm", "-ldl"]));
}

/// Every C file of a folder.
pub(crate) fn sources(folder: &str) -> Vec<PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(root().join(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "{folder} has no programs");
    found
}
