//! The initial RAM disks: the guest's with its drivers and tools, and the outer machine's with all guests
//! in it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::parts::{Kernel, Parts};
use super::scenarios::Run;
use crate::run::{Failure, output_of, run};

/// Modules that a guest needs, those they depend on beside.
const GUEST_MODULES: [&str; 7] =
    ["hv_vmbus", "sd_mod", "hv_storvsc", "hv_utils", "crc32c_generic", "crc32c-intel", "ext4"];
/// Modules of the outer machine.
const OUTER_MODULES: [&str; 2] = ["kvm", "kvm-amd"];
/// Programs that a guest works with.
const GUEST_PROGRAMS: [&str; 3] = ["fio", "mkfs.ext4", "e2fsck"];

/// Builds everything for `runs` and returns the outer machine's RAM disk.
pub(super) fn build(parts: &Parts, runs: &[Run]) -> Result<PathBuf, Failure> {
    let outer = Tree::new(parts.folder.join("outer"))?;
    outer.busybox()?;
    outer.file("init", include_str!("outer.sh"), 0o755)?;
    outer.modules(&parts.outer, &OUTER_MODULES)?;
    outer.copy(&parts.vmm, "opt/boot")?;
    let mut list = String::new();
    for (index, each) in runs.iter().enumerate() {
        let Run { kernel, mode, processors, scenario } = each;
        let number = parts.guests.iter().position(|guest| guest.name == *kernel).unwrap_or(0);
        list.push_str(&format!("{index} {number} {mode} {processors} {scenario}\n"));
    }
    outer.file("runs", &list, 0o644)?;
    for (number, guest) in parts.guests.iter().enumerate() {
        let inner = Tree::new(parts.folder.join(format!("inner-{number}")))?;
        inner.busybox()?;
        inner.file("init", include_str!("inner.sh"), 0o755)?;
        inner.modules(guest, &GUEST_MODULES)?;
        for program in GUEST_PROGRAMS {
            inner.program(program)?;
        }
        inner.pack(&outer.root.join(format!("opt/initrd-{number}")))?;
        outer.copy(&guest.image, &format!("opt/vmlinuz-{number}"))?;
    }
    let image = parts.folder.join("outer.cpio");
    outer.pack(&image)?;
    Ok(image)
}

/// A root folder that becomes a RAM disk.
struct Tree {
    root: PathBuf,
}

impl Tree {
    fn new(root: PathBuf) -> Result<Self, Failure> {
        let _not_there = fs::remove_dir_all(&root);
        let tree = Self { root };
        for folder in ["bin", "dev", "lib/modules", "mnt", "opt", "proc", "sys", "tmp", "dev/shm"] {
            let path = tree.root.join(folder);
            fs::create_dir_all(&path).map_err(|source| Failure::File { path, source })?;
        }
        Ok(tree)
    }

    fn file(&self, name: &str, text: &str, mode: u32) -> Result<(), Failure> {
        let path = self.root.join(name);
        fs::write(&path, text)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .map_err(|source| Failure::File { path, source })
    }

    fn copy(&self, from: &Path, to: &str) -> Result<(), Failure> {
        let path = self.root.join(to);
        path.parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| fs::copy(from, &path).map(drop))
            .map_err(|source| Failure::File { path: from.to_owned(), source })
    }

    fn busybox(&self) -> Result<(), Failure> {
        self.copy(&which("busybox"), "bin/busybox")
    }

    /// Copies a program with the libraries that its loader names.
    fn program(&self, name: &str) -> Result<(), Failure> {
        let path = which(name);
        self.copy(&path, &format!("bin/{name}"))?;
        let listing = output_of(Command::new("ldd").arg(&path))?;
        let listing = String::from_utf8_lossy(&listing);
        for library in listing.split_whitespace().filter(|word| word.starts_with('/')) {
            self.copy(Path::new(library), library.trim_start_matches('/'))?;
        }
        Ok(())
    }

    /// Copies modules with those they depend on, numbered in the order in which they are inserted.
    fn modules(&self, kernel: &Kernel, wanted: &[&str]) -> Result<(), Failure> {
        let path = kernel.modules.join("modules.dep");
        let text = fs::read_to_string(&path).map_err(|source| Failure::File { path, source })?;
        for (number, module) in in_order(&text, wanted).iter().enumerate() {
            let from = kernel.modules.join(module);
            let to = format!("lib/modules/{number:02}-{}.ko", module_name(module));
            if module.ends_with(".xz") {
                let path = self.root.join(&to);
                let bytes = output_of(Command::new("xz").arg("-dc").arg(&from))?;
                fs::write(&path, bytes).map_err(|source| Failure::File { path, source })?;
            } else {
                self.copy(&from, &to)?;
            }
        }
        Ok(())
    }

    fn pack(&self, to: &Path) -> Result<(), Failure> {
        let script = "find . | cpio --create --format=newc --quiet > \"$1\"";
        run(Command::new("sh").args(["-c", script, "sh"]).arg(to).current_dir(&self.root))
    }
}

fn which(program: &str) -> PathBuf {
    let places = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"];
    let found = places.iter().map(|place| Path::new(place).join(program));
    found.into_iter().find(|path| path.is_file()).unwrap_or_else(|| PathBuf::from(program))
}

/// `kernel/fs/ext4/ext4.ko.xz` is `ext4`.
fn module_name(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split(".ko").next().unwrap_or(name)
}

/// The modules named, and those they depend on, each behind what it needs. `modules.dep` has a line for
/// each: its path, a colon, and what it needs, nearest first. What is built in is not there.
fn in_order<'a>(dependencies: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let lines = dependencies.lines().filter_map(|line| line.split_once(':'));
    let table: HashMap<&str, (&str, &str)> =
        lines.map(|(path, needs)| (module_name(path), (path, needs))).collect();
    let mut order = Vec::new();
    let mut seen = HashSet::new();
    for name in wanted {
        let Some((path, needs)) = table.get(name) else { continue };
        for module in needs.split_whitespace().rev().chain([*path]) {
            if seen.insert(module) {
                order.push(module);
            }
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_behind_what_they_need() {
        let dep =
            "kernel/a.ko.xz: kernel/x/b.ko kernel/c.ko\nkernel/c.ko:\nkernel/x/b.ko: kernel/c.ko\n";
        assert_eq!(in_order(dep, &["a"]), ["kernel/c.ko", "kernel/x/b.ko", "kernel/a.ko.xz"]);
        assert_eq!(in_order(dep, &["b", "a", "built_in"]).len(), 3);
    }
}
