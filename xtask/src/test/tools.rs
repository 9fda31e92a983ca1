//! What the other steps need: found, or installed where that is ours to do.

use std::path::Path;
use std::process::Command;

use crate::run::{Failure, run, say, succeeds};
use crate::workspace::Workspace;

/// Programs, and the Debian packages that bring them.
const SYSTEM_TOOLS: &[(&str, &str)] = &[
    // The demo and its tests make a real ext4 file system and check it afterwards.
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    // The C interface is compiled, installed and used as its users would, and watched while it runs.
    ("cc", "gcc"),
    ("c++", "g++"),
    ("cmake", "cmake"),
    ("meson", "meson"),
    ("ninja", "ninja-build"),
    ("pkg-config", "pkg-config"),
    ("readelf", "binutils"),
    ("valgrind", "valgrind"),
];

/// Where programs for the administrator live; not in everybody's `PATH`.
const ADMIN_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

pub(super) fn install(workspace: &Workspace) -> Result<(), Failure> {
    install_packages(SYSTEM_TOOLS)?;
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if !succeeds(&mut workspace.cargo([probe, "--version"])) {
            say(&format!("installing the Rust component {component}"));
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    if !succeeds(&mut workspace.cargo(["nextest", "--version"])) {
        say("installing cargo-nextest from source, once; this takes some minutes");
        run(&mut workspace.cargo(["install", "cargo-nextest", "--locked"]))?;
    }
    Ok(())
}

/// Installs the packages of those programs that are not there.
pub(crate) fn install_packages(programs: &[(&str, &'static str)]) -> Result<(), Failure> {
    let missing = programs.iter().filter(|(program, _)| !is_installed(program));
    let mut packages: Vec<_> = missing.map(|(_, package)| *package).collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    if !succeeds(Command::new("apt-get").arg("--version")) || !is_root() {
        return Err(Failure::Missing {
            what: "a system tool",
            remedy: format!("install {}, as root", packages.join(" ")),
        });
    }
    say(&format!("installing {} with apt-get", packages.join(" ")));
    run(Command::new("apt-get").arg("update"))?;
    run(Command::new("apt-get")
        .args(["install", "--yes", "--no-install-recommends"])
        .args(&packages)
        .env("DEBIAN_FRONTEND", "noninteractive"))
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(ADMIN_FOLDERS.iter().map(|folder| Path::new(folder).to_path_buf()))
        .any(|folder| folder.join(program).is_file())
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}
