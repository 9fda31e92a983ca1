//! What a guest is made of: programs and kernels from Debian's packages, and the VMM.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::stories::KERNELS;
use crate::run::{Failure, output_of, run, say};
use crate::test;
use crate::workspace::Workspace;

/// Programs that are run here or put into a guest, and their packages.
const PROGRAMS: [(&str, &str); 8] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("xz", "xz-utils"),
    ("fio", "fio"),
    ("mkfs.ext4", "e2fsprogs"),
    ("socat", "socat"),
];

/// A kernel package, unpacked.
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    /// The folder with its modules.
    pub(super) modules: PathBuf,
}

/// See the module.
pub(super) struct Parts {
    /// Where all of it is kept, below the target folder.
    pub(super) folder: PathBuf,
    /// The kernel that runs KVM.
    pub(super) outer: Kernel,
    /// The kernels that are guests, those of [`KERNELS`].
    pub(super) guests: [Kernel; KERNELS.len()],
    /// The program that runs guests, linked statically.
    pub(super) kmcl: PathBuf,
    /// What makes a hostile guest, the same.
    pub(super) hostile: PathBuf,
}

impl Parts {
    pub(super) fn get(workspace: &Workspace, programs: Option<&Path>) -> Result<Self, Failure> {
        test::install_packages(&PROGRAMS)?;
        let folder = workspace.target_directory().join("guest");
        std::fs::create_dir_all(&folder)
            .map_err(|source| Failure::File { path: folder.clone(), source })?;
        let old = newest("linux-image-amd64", "linux-image-6.1.")?;
        let new = newest("linux-image-6.12-cloud-amd64", "linux-image-6.12.")?;
        Ok(Self {
            outer: kernel(&folder, &old)?,
            guests: [kernel(&folder, &new)?, kernel(&folder, &old)?],
            kmcl: match programs {
                Some(programs) => programs.join("kmcl"),
                None => build(workspace, &["-p", "kmcl-cli"], "kmcl")?,
            },
            hostile: match programs {
                Some(programs) => programs.join("hostile"),
                None => {
                    let example = ["-p", "kmcl-vmm", "--example", "hostile"];
                    build(workspace, &example, "examples/hostile")?
                }
            },
            folder,
        })
    }
}

/// The package that a meta-package stands for.
fn newest(meta: &str, prefix: &str) -> Result<String, Failure> {
    let text = output_of(Command::new("apt-cache").args(["depends", meta]))?;
    let text = String::from_utf8_lossy(&text);
    let packages = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let found = packages.map(str::trim).find(|package| package.starts_with(prefix));
    found.map(str::to_owned).ok_or_else(|| Failure::Missing {
        what: "a Debian kernel",
        remedy: format!("no package of `{meta}` begins with {prefix}: try apt-get update"),
    })
}

/// Downloads a kernel package and unpacks it, once. Nothing is installed.
fn kernel(folder: &Path, package: &str) -> Result<Kernel, Failure> {
    let unpacked = folder.join(package);
    if !unpacked.is_dir() {
        say(&format!("downloading {package}"));
        run(Command::new("apt-get").args(["download", "-q", package]).current_dir(folder))?;
        let archive = find(folder, |name| {
            name.starts_with(&format!("{package}_")) && name.ends_with(".deb")
        })?;
        let part = folder.join(format!("{package}.part"));
        run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&part))?;
        let version = find(&part.join("lib/modules"), |_| true)?;
        let version = version.file_name().unwrap_or_default().to_owned();
        run(Command::new("depmod").arg("-b").arg(&part).arg(version))?;
        rename(&part, &unpacked)?;
        let _kept_for_nothing = std::fs::remove_file(archive);
    }
    Ok(Kernel {
        image: find(&unpacked.join("boot"), |name| name.starts_with("vmlinuz"))?,
        modules: find(&unpacked.join("lib/modules"), |_| true)?,
    })
}

fn rename(from: &Path, to: &Path) -> Result<(), Failure> {
    std::fs::rename(from, to).map_err(|source| Failure::File { path: to.to_owned(), source })
}

/// The one entry of a folder whose name is right.
pub(super) fn find(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf, Failure> {
    let failed = |source| Failure::File { path: folder.to_owned(), source };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted) {
            return Ok(path);
        }
    }
    Err(failed(std::io::ErrorKind::NotFound.into()))
}

/// Builds a program of ours, linked statically: the emulated machine has no libraries for it.
fn build(workspace: &Workspace, what: &[&str], program: &str) -> Result<PathBuf, Failure> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let mut cargo = workspace.cargo(["build", "--release", "--target", TARGET]);
    run(cargo.args(what).env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    Ok(workspace.target_directory().join(TARGET).join("release").join(program))
}
