//! Folders that become a RAM disk or a disk image, and are built again only when what they are made of
//! has changed.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::parts::Kernel;
use crate::run::{Failure, output_of, run};

/// What a tree is made of, before it is built: whoever adds something says it here, and what was built of
/// the same before stays.
#[derive(Debug, Default)]
pub(super) struct Recipe {
    entries: Vec<(PathBuf, Content)>,
}

#[derive(Debug)]
enum Content {
    /// A script of ours.
    Text(String),
    File(PathBuf),
    /// A compressed file, to be unpacked.
    Xz(PathBuf),
    Folder,
}

impl Recipe {
    pub(super) fn new(folders: &[&str]) -> Self {
        let entries = folders.iter().map(|folder| (PathBuf::from(folder), Content::Folder));
        Self { entries: entries.collect() }
    }

    pub(super) fn text(&mut self, to: &str, text: &str) {
        self.entries.push((to.into(), Content::Text(text.to_owned())));
    }

    pub(super) fn file(&mut self, from: &Path, to: &str) {
        self.entries.push((to.into(), Content::File(from.to_owned())));
    }

    pub(super) fn busybox(&mut self) {
        self.file(&which("busybox"), "bin/busybox");
    }

    /// A program, with the libraries that its loader names, each in its place.
    pub(super) fn program(&mut self, name: &str) -> Result<(), Failure> {
        let path = which(name);
        self.file(&path, &format!("bin/{name}"));
        let listing = output_of(Command::new("ldd").arg(&path))?;
        let listing = String::from_utf8_lossy(&listing);
        for library in listing.split_whitespace().filter(|word| word.starts_with('/')) {
            self.file(Path::new(library), library.trim_start_matches('/'));
        }
        Ok(())
    }

    /// Modules with those they depend on, numbered in the order in which they are inserted.
    pub(super) fn modules(
        &mut self,
        kernel: &Kernel,
        wanted: &[&str],
        to: &str,
    ) -> Result<(), Failure> {
        let path = kernel.modules.join("modules.dep");
        let text = fs::read_to_string(&path).map_err(|source| Failure::File { path, source })?;
        for (number, module) in in_order(&text, wanted).iter().enumerate() {
            let from = kernel.modules.join(module);
            let to = PathBuf::from(format!("{to}/{number:02}-{}.ko", module_name(module)));
            let content =
                if module.ends_with(".xz") { Content::Xz(from) } else { Content::File(from) };
            self.entries.push((to, content));
        }
        Ok(())
    }

    /// Builds the tree below `root`, unless what is there was built of the same. Returns whether it did.
    pub(super) fn build(&self, root: &Path) -> Result<bool, Failure> {
        let key_path = root.with_extension("made-of");
        let key = self.key()?;
        if fs::read_to_string(&key_path).is_ok_and(|before| before == key) {
            return Ok(false);
        }
        let _not_there = fs::remove_file(&key_path);
        let _not_there = fs::remove_dir_all(root);
        for (to, content) in &self.entries {
            let path = root.join(to);
            write(&path, content).map_err(|failure| match failure {
                Failure::File { path: _, source } => Failure::File { path, source },
                other => other,
            })?;
        }
        fs::write(&key_path, key).map_err(|source| Failure::File { path: key_path, source })?;
        Ok(true)
    }

    /// As [`Recipe::build`], and packs the tree as a RAM disk: `root` with `.cpio` behind it. Not
    /// compressed: unpacking is faster than inflating where all is emulated.
    pub(super) fn ram_disk(&self, root: &Path) -> Result<PathBuf, Failure> {
        let image = root.with_extension("cpio");
        if self.build(root)? || !image.exists() {
            let script = "find . | cpio --create --format=newc --quiet > \"$1\"";
            run(Command::new("sh").args(["-c", script, "sh"]).arg(&image).current_dir(root))?;
        }
        Ok(image)
    }

    /// As [`Recipe::build`], and makes a disk of the tree: `root` with `.img` behind it.
    pub(super) fn disk(&self, root: &Path) -> Result<PathBuf, Failure> {
        let image = root.with_extension("img");
        if self.build(root)? || !image.exists() {
            let _not_there = fs::remove_file(&image);
            // Twice what is in it, most of that a hole: the file system's own needs are not looked into.
            let megabytes = 16 + 2 * (bytes_below(root)? >> 20);
            run(Command::new(which("mkfs.ext4"))
                .args(["-q", "-O", "^has_journal", "-d"])
                .arg(root)
                .arg(&image)
                .arg(format!("{megabytes}M")))?;
        }
        Ok(image)
    }

    /// All that the tree is made of, files by length and time of change.
    fn key(&self) -> Result<String, Failure> {
        let mut key = String::new();
        for (to, content) in &self.entries {
            key.push_str(&format!("{} ", to.display()));
            match content {
                Content::Text(text) => key.push_str(text),
                Content::Folder => {}
                Content::File(path) | Content::Xz(path) => {
                    let failed = |source| Failure::File { path: path.clone(), source };
                    let facts = fs::metadata(path).map_err(failed)?;
                    let (length, time) = (facts.len(), facts.mtime());
                    key.push_str(&format!("{} {length} {time}", path.display()));
                }
            }
            key.push('\n');
        }
        Ok(key)
    }
}

fn write(path: &Path, content: &Content) -> Result<(), Failure> {
    let failed = |source| Failure::File { path: path.to_owned(), source };
    if let Content::Folder = content {
        return fs::create_dir_all(path).map_err(failed);
    }
    path.parent().map_or(Ok(()), fs::create_dir_all).map_err(failed)?;
    match content {
        Content::Text(text) => fs::write(path, text)
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
            .map_err(failed),
        Content::Xz(from) => {
            let bytes = output_of(Command::new("xz").arg("-dc").arg(from))?;
            fs::write(path, bytes).map_err(failed)
        }
        Content::File(from) => fs::copy(from, path).map(drop).map_err(failed),
        Content::Folder => Ok(()),
    }
}

fn bytes_below(folder: &Path) -> Result<u64, Failure> {
    let failed = |source| Failure::File { path: folder.to_owned(), source };
    let mut sum = 0;
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let facts = entry.metadata().map_err(failed)?;
        sum += if facts.is_dir() { bytes_below(&entry.path())? } else { facts.len() };
    }
    Ok(sum)
}

/// Where a program is, those for the administrator included.
pub(super) fn which(program: &str) -> PathBuf {
    let places = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"];
    let mut found = places.iter().map(|place| Path::new(place).join(program));
    found.find(|path| path.is_file()).unwrap_or_else(|| PathBuf::from(program))
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

    #[test]
    fn a_tree_is_built_again_when_something_in_it_has_changed() {
        let folder = std::env::temp_dir().join(format!("xtask-tree-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (root, source) = (folder.join("tree"), folder.join("source"));
        let recipe = |text: &str| {
            let mut recipe = Recipe::new(&["empty"]);
            recipe.text("script", text);
            recipe.file(&source, "a/file");
            recipe
        };
        fs::write(&source, "one").unwrap();
        assert!(recipe("x").build(&root).unwrap(), "nothing was there");
        assert_eq!(fs::read(root.join("a/file")).unwrap(), b"one");
        assert!(root.join("empty").is_dir());
        assert!(!recipe("x").build(&root).unwrap(), "nothing has changed");
        assert!(recipe("y").build(&root).unwrap(), "another text");
        fs::write(&source, "three").unwrap();
        assert!(recipe("y").build(&root).unwrap(), "another file");
        assert_eq!(fs::read(root.join("a/file")).unwrap(), b"three");
        fs::remove_file(&source).unwrap();
        assert!(recipe("y").build(&root).is_err(), "the file is gone");
        fs::remove_dir_all(&folder).unwrap();
    }
}
