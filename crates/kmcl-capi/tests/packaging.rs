//! What `cargo xtask install` puts into a prefix is enough for CMake, for Meson, and for a plain compiler.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{is_there, libraries, root, run};

/// Installs this build of the library.
fn install(prefix: &Path) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(cargo)
        .args(["run", "--quiet", "--package", "xtask", "--", "install", "--prefix"])
        .arg(prefix)
        .arg("--libraries")
        .arg(libraries())
        .current_dir(root()));
}

/// A command that finds the library where it was installed.
fn with(program: impl AsRef<std::ffi::OsStr>, prefix: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"))
        .env("LD_LIBRARY_PATH", prefix.join("lib"));
    command
}

fn runs(program: PathBuf, prefix: &Path) {
    let said = String::from_utf8(run(&mut with(program, prefix)).stdout).unwrap();
    assert!(said.contains("1000 packets echoed"), "{said}");
}

#[test]
fn an_installed_library_is_found_by_pkg_config_cmake_and_meson() {
    let folder = tempfile::tempdir().unwrap();
    let prefix = folder.path().join("prefix");
    install(&prefix);
    let lib = prefix.join("lib");
    assert_eq!(std::fs::read_link(lib.join("libkmcl.so")).unwrap(), Path::new("libkmcl.so.0.1"));
    let dynamic = run(Command::new("readelf").arg("-d").arg(lib.join("libkmcl.so"))).stdout;
    let dynamic = String::from_utf8(dynamic).unwrap();
    assert!(dynamic.contains("soname: [libkmcl.so.0.1]"), "{dynamic}");

    let examples = root().join("examples/c");
    if is_there("pkg-config") {
        let flags = run(with("pkg-config", &prefix).args(["--cflags", "--libs", "kmcl"])).stdout;
        let flags = String::from_utf8(flags).unwrap();
        let program = folder.path().join("plain");
        run(Command::new("cc")
            .args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"])
            .arg(examples.join("echo.c"))
            .args(flags.split_whitespace())
            .arg("-o")
            .arg(&program));
        runs(program, &prefix);
    }
    if is_there("cmake") && is_there("pkg-config") {
        let build = folder.path().join("cmake");
        run(with("cmake", &prefix).arg("-S").arg(&examples).arg("-B").arg(&build));
        run(with("cmake", &prefix).arg("--build").arg(&build));
        runs(build.join("echo"), &prefix);
    }
    if is_there("meson") && is_there("pkg-config") {
        let build = folder.path().join("meson");
        run(with("meson", &prefix).arg("setup").arg(&build).arg(&examples));
        run(with("meson", &prefix).args(["compile", "-C"]).arg(&build));
        runs(build.join("echo"), &prefix);
    }
}
