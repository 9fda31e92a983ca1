//! Holds the workspace to its architecture: who may depend on whom, where unsafe code may live, and
//! that every crate is under the workspace's lints and versions. ARCHITECTURE.md says why.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

const ALL_LIBRARIES: &[&str] = &[
    "hyperv-kvm",
    "kmcl",
    "kmcl-vmm",
    "kmcl-worker",
    "saved-state",
    "vmbus-guest",
    "vmbus-host",
    "vmbus-memory",
    "vmbus-ring",
    "vmbus-unix",
    "vmbus-wire",
    "vsc-storage",
    "vsp-integration",
    "vsp-socket",
    "vsp-storage",
    "vstor-wire",
];

/// Each crate of the house, and the crates of the house it may build on. Bottom first.
const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("vmbus-wire", &[]),
    ("vmbus-memory", &["vmbus-wire"]),
    ("vmbus-ring", &["vmbus-wire", "vmbus-memory"]),
    ("saved-state", &["vmbus-wire"]),
    ("kmcl", &["vmbus-wire", "vmbus-memory", "vmbus-ring", "saved-state"]),
    ("kmcl-worker", &["kmcl"]),
    ("vmbus-host", &["vmbus-wire", "vmbus-memory", "vmbus-ring", "saved-state", "kmcl"]),
    ("vmbus-guest", &["vmbus-wire", "vmbus-memory", "vmbus-ring", "kmcl"]),
    (
        "vmbus-unix",
        &["vmbus-wire", "vmbus-memory", "saved-state", "kmcl", "vmbus-host", "vmbus-guest"],
    ),
    (
        "kmcl-capi",
        &[
            "vmbus-wire",
            "vmbus-memory",
            "vmbus-host",
            "vmbus-guest",
            "vmbus-unix",
            "saved-state",
            "kmcl",
            "kmcl-worker",
        ],
    ),
    ("hyperv-kvm", &["vmbus-wire", "vmbus-memory", "saved-state", "kmcl", "vmbus-host"]),
    ("vstor-wire", &["vmbus-wire"]),
    ("vsp-storage", &["vmbus-wire", "vmbus-memory", "saved-state", "kmcl", "vstor-wire"]),
    ("vsp-integration", &["vmbus-wire", "vmbus-memory", "saved-state", "kmcl"]),
    ("vsp-socket", &["vmbus-wire", "vmbus-memory", "saved-state", "kmcl", "vmbus-host"]),
    (
        "kmcl-vmm",
        &[
            "vmbus-wire",
            "vmbus-memory",
            "vmbus-host",
            "saved-state",
            "hyperv-kvm",
            "kmcl",
            "kmcl-worker",
            "vsp-integration",
            "vsp-socket",
            "vsp-storage",
        ],
    ),
    ("vsc-storage", &["vmbus-wire", "vmbus-memory", "kmcl", "vstor-wire"]),
    ("kmcl-sim", ALL_LIBRARIES),
    ("saved-state-tests", ALL_LIBRARIES),
    ("kmcl-cli", ALL_LIBRARIES),
    ("kmcl-examples", ALL_LIBRARIES),
    ("kmcl-benches", ALL_LIBRARIES),
    ("xtask", &[]),
];

/// Crates that nobody here may name, in any section: runtimes, formats that cannot evolve, raw
/// system interfaces, and a GUID type with the wrong byte order.
const NOBODY_NAMES: &[&str] = &[
    "async-std",
    "bincode",
    "bitcode",
    "libc",
    "nix",
    "postcard",
    "rkyv",
    "smol",
    "tokio",
    "uuid",
];

/// The one exception: formats that cannot evolve are measured beside ours, by a member that is not
/// published and that nobody builds on.
const MAY_NAME: &[(&str, &[&str])] = &[("kmcl-benches", &["bitcode", "postcard"])];

/// Crates that must not come in below a crate of ours, however indirectly; a name ending in `*` is
/// a prefix.
const NEVER_BELOW: &[(&str, &[&str])] = &[
    ("kmcl", &["kvm*", "polling", "mio", "socket2", "vhost*", "clap", "indicatif"]),
    ("vmbus-host", &["kvm*", "polling", "mio", "socket2", "vhost*", "io-uring"]),
    ("vmbus-guest", &["kvm*", "polling", "mio", "socket2", "vhost*", "io-uring"]),
    ("vsp-storage", &["kvm*", "vhost*"]),
];

/// Parts of `rustix` that the library and the control planes have no business with: `kmcl` and its
/// buses know no sockets, no file systems, no processes.
const NO_SYSTEM_CALLS: &[(&str, &[&str])] = &[
    ("kmcl", &["net", "fs", "process", "thread", "time"]),
    ("vmbus-host", &["net", "fs", "process", "thread", "time", "event"]),
    ("vmbus-guest", &["net", "fs", "process", "thread", "time", "event"]),
];

/// Crates of bytes only: they run without an operating system.
const NO_STD: &[&str] = &["vmbus-wire", "vstor-wire"];

/// Crates that forbid unsafe code for good, beyond the workspace's denial.
const FORBID_UNSAFE: &[&str] = &[
    "kmcl",
    "kmcl-worker",
    "saved-state",
    "saved-state-tests",
    "vmbus-guest",
    "vmbus-host",
    "vmbus-ring",
    "vmbus-unix",
    "vmbus-wire",
    "vsc-storage",
    "vstor-wire",
];

/// The only places whose sources may opt into unsafe code, module by module: a crate, and a folder
/// in it.
const MAY_BE_UNSAFE: &[(&str, &str)] = &[
    ("hyperv-kvm", "src/kvm.rs"),
    ("kmcl-capi", "src"),
    ("kmcl-vmm", "src/memory"),
    ("kmcl-vmm", "src/memory.rs"),
    ("vmbus-memory", "src"),
    ("vsp-storage", "src/block"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn metadata() -> Metadata {
    MetadataCommand::new().manifest_path(root().join("Cargo.toml")).exec().unwrap()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Fails with every finding, one a line.
fn assert_none(findings: &[String]) {
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

/// One direct dependency: from, to, and whether it is part of what is shipped.
type Edge<'a> = (&'a str, &'a str, bool);

fn direct_dependencies(metadata: &Metadata) -> Vec<Edge<'_>> {
    metadata
        .workspace_packages()
        .into_iter()
        .flat_map(|package| {
            package.dependencies.iter().map(|dependency| {
                let shipped = dependency.kind != DependencyKind::Development;
                (package.name.as_str(), dependency.name.as_str(), shipped)
            })
        })
        .collect()
}

/// Edges between crates of the house that the table does not have, and crates without a row.
fn against_the_direction(members: &[&str], edges: &[Edge<'_>]) -> Vec<String> {
    let table: BTreeMap<_, _> = MAY_DEPEND_ON.iter().copied().collect();
    let unknown = members
        .iter()
        .filter(|name| !table.contains_key(**name))
        .map(|name| format!("{name} has no row in MAY_DEPEND_ON"));
    let gone = table
        .keys()
        .filter(|name| !members.contains(name))
        .map(|name| format!("{name} has a row in MAY_DEPEND_ON and does not exist"));
    let upward = edges
        .iter()
        .filter(|(from, to, shipped)| {
            *shipped
                && members.contains(to)
                && table.get(from).is_some_and(|allowed| !allowed.contains(to))
        })
        .map(|(from, to, _)| format!("{from} depends on {to}: against the direction"));
    unknown.chain(gone).chain(upward).collect()
}

fn names_forbidden(edges: &[Edge<'_>]) -> Vec<String> {
    edges
        .iter()
        .filter(|(from, to, _)| {
            NOBODY_NAMES.contains(to)
                && !MAY_NAME.iter().any(|(name, named)| name == from && named.contains(to))
        })
        .map(|(from, to, _)| format!("{from} names {to}"))
        .collect()
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    }
}

/// Everything shipped below `start`, by name, with the crate that brings it in.
fn below<'a>(
    graph: &BTreeMap<&'a str, BTreeSet<&'a str>>,
    start: &'a str,
) -> BTreeMap<&'a str, &'a str> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![start];
    while let Some(name) = waiting.pop() {
        for &next in graph.get(name).into_iter().flatten() {
            if !found.contains_key(next) {
                found.insert(next, name);
                waiting.push(next);
            }
        }
    }
    found
}

fn shipped_graph(metadata: &Metadata) -> BTreeMap<&str, BTreeSet<&str>> {
    let name = |id| metadata[id].name.as_str();
    let resolve = metadata.resolve.as_ref().unwrap();
    let mut graph = BTreeMap::<_, BTreeSet<_>>::new();
    for node in &resolve.nodes {
        let shipped = node.deps.iter().filter(|dependency| {
            dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development)
        });
        graph.entry(name(&node.id)).or_default().extend(shipped.map(|found| name(&found.pkg)));
    }
    graph
}

fn comes_in_below(graph: &BTreeMap<&str, BTreeSet<&str>>) -> Vec<String> {
    NEVER_BELOW
        .iter()
        .flat_map(|(start, patterns)| {
            below(graph, start)
                .into_iter()
                .filter(|(name, _)| patterns.iter().any(|pattern| matches(pattern, name)))
                .map(|(name, by)| format!("{name} comes in below {start}, through {by}"))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Lines of a manifest that fix a version of their own, or a missing `[lints] workspace = true`.
fn manifest_findings(manifest: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let mut section = "";
    let mut lints_are_the_workspaces = false;
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']);
            if section.contains("dependencies.") {
                findings.push(format!("{line}: write it as one line of its section"));
            }
        } else if section == "lints" && line == "workspace = true" {
            lints_are_the_workspaces = true;
        } else if section.ends_with("dependencies")
            && line.split_once('=').is_some_and(|(key, _)| !key.contains(['#', '"', '[', '{']))
            && !line.contains("workspace = true")
        {
            findings.push(format!("{line}: the version belongs into the workspace's manifest"));
        }
    }
    if !lints_are_the_workspaces {
        findings.push("no `[lints] workspace = true`".to_owned());
    }
    findings
}

/// Whether the crate root has the inner attribute, for every configuration.
fn has_attribute(source: &str, attribute: &str) -> bool {
    source.lines().any(|line| line == format!("#![{attribute}]"))
}

/// Rust sources below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![folder.to_path_buf()];
    while let Some(folder) = waiting.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                waiting.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found
}

/// Whether a source opts into unsafe code.
fn opts_into_unsafe(source: &str) -> bool {
    source.lines().map(str::trim_start).any(|line| {
        !line.starts_with("//")
            && (line.contains("allow(unsafe_code") || line.contains("expect(unsafe_code"))
    })
}

/// The folder of each member by name.
fn folders(metadata: &Metadata) -> BTreeMap<String, PathBuf> {
    metadata
        .workspace_packages()
        .into_iter()
        .map(|package| {
            let folder = package.manifest_path.parent().unwrap();
            (package.name.to_string(), folder.as_std_path().to_path_buf())
        })
        .collect()
}

#[test]
fn dependencies_point_down_only() {
    let metadata = metadata();
    let members: Vec<_> =
        metadata.workspace_packages().into_iter().map(|package| package.name.as_str()).collect();
    assert_none(&against_the_direction(&members, &direct_dependencies(&metadata)));
}

#[test]
fn an_upward_dependency_or_a_crate_without_a_row_is_found() {
    let members: Vec<_> = MAY_DEPEND_ON.iter().map(|(name, _)| *name).collect();
    let found = against_the_direction(
        &members,
        &[
            ("kmcl", "vmbus-ring", true),
            ("vmbus-ring", "kmcl", true),
            ("vmbus-ring", "kmcl", false),
            ("vmbus-host", "serde", true),
        ],
    );
    assert_eq!(found, ["vmbus-ring depends on kmcl: against the direction"]);

    let with_stranger: Vec<_> = members.iter().copied().chain(["kmcl-extra"]).collect();
    let found = against_the_direction(&with_stranger, &[]);
    assert_eq!(found, ["kmcl-extra has no row in MAY_DEPEND_ON"]);
}

#[test]
fn the_table_of_directions_has_no_cycle() {
    for (position, (name, allowed)) in MAY_DEPEND_ON.iter().enumerate() {
        for lower in *allowed {
            let place = MAY_DEPEND_ON.iter().position(|(row, _)| row == lower);
            assert!(place.is_some_and(|place| place < position), "{name} on {lower}");
        }
    }
}

#[test]
fn nobody_names_a_forbidden_crate() {
    assert_none(&names_forbidden(&direct_dependencies(&metadata())));
    assert_eq!(names_forbidden(&[("kmcl", "tokio", false)]), ["kmcl names tokio"]);
    assert_eq!(names_forbidden(&[("kmcl", "postcard", false)]), ["kmcl names postcard"]);
    assert_eq!(names_forbidden(&[("kmcl-benches", "tokio", false)]), ["kmcl-benches names tokio"]);
}

#[test]
fn no_system_comes_in_below_the_library() {
    assert_none(&comes_in_below(&shipped_graph(&metadata())));
}

#[test]
fn a_system_that_comes_in_indirectly_is_found() {
    let graph = [("kmcl", "vmbus-ring"), ("vmbus-ring", "helper"), ("helper", "kvm-ioctls")]
        .into_iter()
        .map(|(from, to)| (from, BTreeSet::from([to])))
        .collect();
    assert_eq!(comes_in_below(&graph), ["kvm-ioctls comes in below kmcl, through helper"]);
}

#[test]
fn the_library_asks_for_no_system_calls_beyond_its_doorbells() {
    let metadata = metadata();
    for (name, refused) in NO_SYSTEM_CALLS {
        let package = metadata
            .workspace_packages()
            .into_iter()
            .find(|package| package.name.as_str() == *name)
            .unwrap();
        let asked: Vec<_> = package
            .dependencies
            .iter()
            .filter(|found| found.name == "rustix" && found.kind != DependencyKind::Development)
            .flat_map(|found| &found.features)
            .filter(|feature| refused.contains(&feature.as_str()))
            .collect();
        assert!(asked.is_empty(), "{name} asks rustix for {asked:?}");
    }
}

#[test]
fn every_manifest_takes_lints_and_versions_from_the_workspace() {
    for (name, folder) in folders(&metadata()) {
        let findings: Vec<_> = manifest_findings(&read(&folder.join("Cargo.toml")))
            .into_iter()
            .map(|finding| format!("{name}: {finding}"))
            .collect();
        assert_none(&findings);
    }
}

#[test]
fn a_manifest_with_its_own_versions_or_lints_is_found() {
    for (manifest, count) in [
        ("[lints]\nworkspace = true\n[dependencies]\nkmcl.workspace = true\n", 0),
        (
            "[lints]\nworkspace = true\n[dependencies]\n# a remark = here\n\
             rustix = { workspace = true, features = [\n    \"event\",\n] }\n",
            0,
        ),
        ("[lints]\nworkspace = true\n[dependencies]\nserde = \"1\"\n", 1),
        ("[lints]\nworkspace = true\n[dev-dependencies]\nserde = { version = \"1\" }\n", 1),
        ("[lints]\nworkspace = true\n[target.'cfg(unix)'.dependencies]\nserde = \"1\"\n", 1),
        ("[lints]\nworkspace = true\n[dependencies.serde]\nversion = \"1\"\n", 1),
        ("[dependencies]\nkmcl.workspace = true\n", 1),
        ("[lints.rust]\nunsafe_code = \"allow\"\n", 1),
    ] {
        let findings = manifest_findings(manifest);
        assert_eq!(findings.len(), count, "{manifest}\n{findings:?}");
    }
}

#[test]
fn crates_of_bytes_need_no_standard_library_and_no_unsafe() {
    let folders = folders(&metadata());
    let lib = |name: &str| read(&folders[name].join("src/lib.rs"));
    let mut findings = Vec::new();
    for name in NO_STD {
        // Its own unit tests may use the standard library.
        let source = lib(name);
        if !has_attribute(&source, "no_std")
            && !has_attribute(&source, "cfg_attr(not(test), no_std)")
        {
            findings.push(format!("{name} is not no_std"));
        }
    }
    for name in FORBID_UNSAFE {
        if !has_attribute(&lib(name), "forbid(unsafe_code)") {
            findings.push(format!("{name} does not forbid unsafe code"));
        }
    }
    assert_none(&findings);
}

#[test]
fn unsafe_code_lives_where_it_may() {
    let mut findings = Vec::new();
    for (name, folder) in folders(&metadata()) {
        for path in sources(&folder.join("src")) {
            let allowed = MAY_BE_UNSAFE
                .iter()
                .any(|(owner, part)| *owner == name && path.starts_with(folder.join(part)));
            if !allowed && opts_into_unsafe(&read(&path)) {
                findings.push(format!("{name} opts into unsafe code: {}", path.display()));
            }
        }
    }
    assert_none(&findings);
    assert!(opts_into_unsafe("    #[allow(unsafe_code, reason = \"maps memory\")]"));
    assert!(!opts_into_unsafe("// #[allow(unsafe_code)]\n#![forbid(unsafe_code)]"));
}

#[test]
fn nothing_is_left_to_do_in_the_text() {
    let root = root();
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(&root)
        .output()
        .unwrap();
    assert!(listing.status.success(), "git cannot list the files");
    // Put together here, so that this file does not contain them.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME")];
    let mut findings = Vec::new();
    for name in String::from_utf8(listing.stdout).unwrap().split_terminator('\0') {
        // A file may be listed and just removed; what is not text is not ours to read.
        let Ok(text) = std::fs::read_to_string(root.join(name)) else { continue };
        for (number, line) in text.lines().enumerate() {
            if marks.iter().any(|mark| line.contains(mark)) {
                findings.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert_none(&findings);
}
