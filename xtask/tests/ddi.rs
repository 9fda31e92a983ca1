//! Holds docs/ddi.md to the sources: every documented name of the driver interface has one row, and
//! every Rust item and test that a row names exists.
//!
//! The sources are scanned, not compiled: rustfmt's layout is what makes that possible.

#![expect(clippy::unwrap_used, reason = "a test may stop at its first surprise")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The names of the driver interface, `kind name` a line.
const NAMES: &str = include_str!("ddi-names.txt");

/// One row of the table in docs/ddi.md. Items and tests are paths such as `kmcl::Channel::enable`.
#[derive(Debug, Eq, PartialEq)]
struct Row {
    ddi: String,
    items: Vec<String>,
    tests: Vec<String>,
}

/// The rows of every table whose first column is headed `DDI`.
fn rows(document: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut in_table = false;
    for line in document.lines() {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        match cells.as_slice() {
            _ if !line.starts_with('|') => in_table = false,
            ["DDI", ..] => in_table = true,
            [first, ..] if first.starts_with("---") => {}
            [ddi, items, tests] if in_table => rows.push(Row {
                ddi: ddi.trim_matches('`').to_owned(),
                items: cell(items),
                tests: cell(tests),
            }),
            _ => {}
        }
    }
    rows
}

/// What stands between backquotes in a cell.
fn cell(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Something a source defines, by its full path: crate, modules, type, name.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Item {
    path: Vec<String>,
    is_public: bool,
    is_test: bool,
}

/// A block that is open while a source is read, and the name that it adds to paths.
struct Block {
    indent: usize,
    name: String,
    /// A trait, or an implementation of one: what it defines is as public as the trait.
    is_trait: bool,
}

/// Every item of a source whose module path is `module`.
fn scan(module: &[String], source: &str) -> Vec<Item> {
    let mut items = Vec::new();
    let mut blocks: Vec<Block> = Vec::new();
    let mut test_attribute = false;
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        if text.starts_with('}') {
            blocks.retain(|block| block.indent < indent);
        } else if text == "#[test]" {
            test_attribute = true;
        } else if text.starts_with("impl") {
            let mut header = text.to_owned();
            while !header.ends_with('{') && !header.ends_with('}') {
                let Some(next) = lines.next() else { break };
                header.push(' ');
                header.push_str(next.trim());
            }
            if header.ends_with('{') {
                let is_trait = header.contains(" for ");
                blocks.push(Block { indent, name: implementer(&header), is_trait });
            }
        } else if let Some((kind, name)) = definition(text) {
            let of_trait = blocks.last().is_some_and(|block| block.is_trait);
            let enclosing = blocks.iter().map(|block| block.name.clone());
            items.push(Item {
                path: module.iter().cloned().chain(enclosing).chain([name.clone()]).collect(),
                is_public: text.starts_with("pub ") || of_trait,
                is_test: kind == "fn" && std::mem::take(&mut test_attribute),
            });
            if kind != "fn" && text.ends_with('{') {
                blocks.push(Block { indent, name, is_trait: kind == "trait" });
            }
        }
    }
    items
}

/// The kind and name that a line defines.
fn definition(text: &str) -> Option<(&str, String)> {
    let mut words = text.split_whitespace().skip_while(|word| {
        matches!(*word, "unsafe" | "async") || word.starts_with("pub") || word.starts_with('"')
    });
    let mut kind = words.next()?;
    let mut rest = words.next()?;
    if kind == "const" && rest == "fn" {
        (kind, rest) = (rest, words.next()?);
    }
    matches!(
        kind,
        "fn" | "struct" | "enum" | "trait" | "union" | "type" | "mod" | "const" | "static"
    )
    .then(|| (kind, identifier(rest)))
    .filter(|(_, name)| !name.is_empty())
}

/// The name of the type an `impl … {` header is for.
fn implementer(header: &str) -> String {
    let mut depth = 0_u32;
    let mut plain = String::new();
    let mut previous = ' ';
    for sign in header.trim_start_matches("impl").chars() {
        match sign {
            '<' => depth += 1,
            // Not the end of `->` in a bound.
            '>' if previous != '-' => depth = depth.saturating_sub(1),
            _ if depth == 0 => plain.push(sign),
            _ => {}
        }
        previous = sign;
    }
    let subject = plain.split(" where ").next().unwrap_or_default();
    let subject = subject.rsplit(" for ").next().unwrap_or_default().trim();
    identifier(subject.rsplit("::").next().unwrap_or_default().trim_start_matches(['&', ' ']))
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|sign| sign.is_alphanumeric() || *sign == '_').collect()
}

/// Whether `path` names `item`: the same crate and name, the same type or module directly before the
/// name, and every other part of `path` on the way. A re-export may leave modules out.
fn names(path: &str, item: &Item) -> bool {
    let parts: Vec<_> = path.split("::").collect();
    let ([first, middle @ .., last], [item_first, item_middle @ .., item_last]) =
        (parts.as_slice(), item.path.as_slice())
    else {
        return false;
    };
    let mut way = item_middle.iter();
    first == item_first
        && last == item_last
        && middle.last().is_none_or(|part| item_middle.last().is_some_and(|own| own == part))
        && middle.iter().all(|part| way.any(|own| own == part))
}

/// Everything wrong with `rows`, one line each.
fn findings(rows: &[Row], items: &[Item]) -> Vec<String> {
    let wanted: BTreeSet<_> = NAMES
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for row in rows {
        let name = row.ddi.as_str();
        if !wanted.contains(name) {
            found.push(format!("{name}: no such name in the driver interface"));
        }
        if !seen.insert(name) {
            found.push(format!("{name}: has a second row"));
        }
        found.extend(missing(name, "item", &row.items, |path| {
            items.iter().any(|item| item.is_public && names(path, item))
        }));
        found.extend(missing(name, "test", &row.tests, |path| {
            items.iter().any(|item| item.is_test && names(path, item))
        }));
    }
    found.extend(wanted.difference(&seen).map(|name| format!("{name}: has no row")));
    found
}

/// Complaints about the paths of one cell: none at all, or one that `exists` does not know.
fn missing(name: &str, what: &str, paths: &[String], exists: impl Fn(&str) -> bool) -> Vec<String> {
    if paths.is_empty() {
        return vec![format!("{name}: names no {what}")];
    }
    paths
        .iter()
        .filter(|path| !exists(path))
        .map(|path| format!("{name}: {what} {path} does not exist"))
        .collect()
}

/// The items of every crate: its sources, and its integration tests as `crate::tests::file::name`.
fn all_items(crates: &Path) -> Vec<Item> {
    let mut items = Vec::new();
    for folder in std::fs::read_dir(crates).unwrap().map(|entry| entry.unwrap().path()) {
        let name = folder.file_name().unwrap().to_str().unwrap().replace('-', "_");
        for (part, prefix) in [("src", None), ("tests", Some("tests"))] {
            let base = folder.join(part);
            for file in rust_files(&base) {
                let relative = file.strip_prefix(&base).unwrap().with_extension("");
                let inside = relative.iter().map(|part| part.to_str().unwrap());
                let module: Vec<_> = std::iter::once(name.as_str())
                    .chain(prefix)
                    .chain(inside.filter(|part| !matches!(*part, "lib" | "main" | "mod")))
                    .map(str::to_owned)
                    .collect();
                items.extend(scan(&module, &std::fs::read_to_string(&file).unwrap()));
            }
        }
    }
    items
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![folder.to_path_buf()];
    while let Some(folder) = waiting.pop() {
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
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

#[test]
fn every_name_of_the_driver_interface_has_an_item_and_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let document = std::fs::read_to_string(root.join("docs/ddi.md")).unwrap();
    let found = findings(&rows(&document), &all_items(&root.join("crates")));
    assert!(found.is_empty(), "docs/ddi.md:\n{}", found.join("\n"));
}

const SOURCE: &str = "
pub struct Channel {
    state: State,
}

impl<T: Fn(u32) -> u32> Channel
where
    T: Send,
{
    pub fn enable(&self) -> Result<(), Error> {
        fn helper() {}
    }

    fn hidden(&self) {}
}

pub trait StateChange: Send {
    fn opened(&self) {
    }
}

impl StateChange for crate::device::Echo<'_> {}

impl fmt::Display for Side {
    fn fmt(&self) {}
}

pub const fn packet_ring_bytes() -> u32 {}

#[cfg(test)]
mod tests {
    // fn commented_out() {}
    #[test]
    #[should_panic]
    fn enable_offers() {}

    fn not_a_test() {}
}
";

fn sample_items() -> Vec<Item> {
    scan(&["kmcl".to_owned(), "channel".to_owned()], SOURCE)
}

#[test]
fn the_scan_finds_items_where_they_are() {
    let items: Vec<_> = sample_items()
        .iter()
        .map(|item| (item.path.join("::"), item.is_public, item.is_test))
        .collect();
    let expected = [
        ("kmcl::channel::Channel", true, false),
        ("kmcl::channel::Channel::enable", true, false),
        ("kmcl::channel::Channel::helper", false, false),
        ("kmcl::channel::Channel::hidden", false, false),
        ("kmcl::channel::StateChange", true, false),
        ("kmcl::channel::StateChange::opened", true, false),
        ("kmcl::channel::Side::fmt", true, false),
        ("kmcl::channel::packet_ring_bytes", true, false),
        ("kmcl::channel::tests", false, false),
        ("kmcl::channel::tests::enable_offers", false, true),
        ("kmcl::channel::tests::not_a_test", false, false),
    ];
    assert_eq!(items, expected.map(|(path, public, test)| (path.to_owned(), public, test)));
}

#[test]
fn a_path_names_an_item_with_or_without_its_modules() {
    let enable = &sample_items()[1];
    for (path, expected) in [
        ("kmcl::Channel::enable", true),
        ("kmcl::channel::Channel::enable", true),
        ("kmcl::enable", true),
        ("kmcl::channel::enable", false),
        ("kmcl::Packet::enable", false),
        ("kmcl::packet::Channel::enable", false),
        ("vmbus_host::Channel::enable", false),
        ("kmcl::Channel::disable", false),
        ("enable", false),
    ] {
        assert_eq!(names(path, enable), expected, "{path}");
    }
}

#[test]
fn a_row_that_is_missing_or_untrue_is_found() {
    let all: Vec<_> = NAMES.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    let table = |change: &dyn Fn(&str) -> String| {
        let rows: String = NAMES
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.split_whitespace().nth(1))
            .map(change)
            .collect();
        findings(&rows_of_table(&rows), &sample_items())
    };
    let fine = |name: &str| {
        format!("| {name} | `kmcl::Channel::enable` | `kmcl::channel::tests::enable_offers` |\n")
    };
    let with = |name: &'static str, row: &'static str| {
        move |other: &str| if other == name { row.to_owned() } else { fine(other) }
    };
    assert!(all.len() > 70);
    assert_eq!(table(&fine), [""; 0]);
    for (row, complaint) in [
        ("", "VmbChannelEnable: has no row"),
        (
            "| VmbChannelEnable | `kmcl::Channel::hidden` | `kmcl::channel::tests::enable_offers` |\n",
            "VmbChannelEnable: item kmcl::Channel::hidden does not exist",
        ),
        (
            "| VmbChannelEnable | `kmcl::Channel::enable` | `kmcl::channel::tests::not_a_test` |\n",
            "VmbChannelEnable: test kmcl::channel::tests::not_a_test does not exist",
        ),
        ("| VmbChannelEnable | `kmcl::Channel::enable` | |\n", "VmbChannelEnable: names no test"),
        (
            "| VmbChannelEnable | planned | `kmcl::channel::tests::enable_offers` |\n",
            "VmbChannelEnable: names no item",
        ),
    ] {
        assert_eq!(table(&with("VmbChannelEnable", row)), [complaint], "{row}");
    }
    let doubled = findings(
        &rows_of_table(&[fine("VmbChannelEnable"), fine("VmbChannelEnable"), fine("Vmb")].concat()),
        &sample_items(),
    );
    assert_eq!(
        doubled[..2],
        ["VmbChannelEnable: has a second row", "Vmb: no such name in the driver interface"]
    );
}

/// The rows of a document whose only table has this body.
fn rows_of_table(body: &str) -> Vec<Row> {
    rows(&format!("# Title\n\n| DDI | Rust item | test |\n| --- | --- | --- |\n{body}"))
}
