//! The workspace as `cargo metadata` describes it.

use std::path::{Path, PathBuf};
use std::process::Command;

use cargo_metadata::{Metadata, MetadataCommand, Package, Target, TargetKind};

use crate::run::Failure;

/// The workspace this program belongs to.
pub(crate) struct Workspace {
    metadata: Metadata,
}

impl Workspace {
    pub(crate) fn load() -> Result<Self, Failure> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
        let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().exec()?;
        Ok(Self { metadata })
    }

    pub(crate) fn root(&self) -> &Path {
        self.metadata.workspace_root.as_std_path()
    }

    pub(crate) fn target_directory(&self) -> &Path {
        self.metadata.target_directory.as_std_path()
    }

    /// A cargo command that runs in the root of the workspace.
    pub(crate) fn cargo<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let mut command = Command::new("cargo");
        command.args(arguments).current_dir(self.root());
        command
    }

    pub(crate) fn packages(&self) -> &[Package] {
        &self.metadata.packages
    }

    /// Every target of `kind` with the package it belongs to, ordered by package and name.
    pub(crate) fn targets(&self, kind: &TargetKind) -> Vec<(&Package, &Target)> {
        let mut found: Vec<_> = self
            .packages()
            .iter()
            .flat_map(|package| package.targets.iter().map(move |target| (package, target)))
            .filter(|(_, target)| target.kind.contains(kind))
            .collect();
        found.sort_by(|(p, t), (q, u)| (&p.name, &t.name).cmp(&(&q.name, &u.name)));
        found
    }

    /// The text of a file, by its path from the root.
    pub(crate) fn read(&self, path: &str) -> Result<String, Failure> {
        let path = self.path(path);
        std::fs::read_to_string(&path).map_err(|source| Failure::File { path, source })
    }

    /// A path from the root.
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }
}
