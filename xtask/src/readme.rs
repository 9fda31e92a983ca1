//! The documents' commands and links, held to what the programs and files really are.
//!
//! A command is a line of a fenced block marked `sh`; what the README's first command prints is the
//! first block marked `text`.

use std::process::Command;

use cargo_metadata::TargetKind;
use clap::Parser;

use crate::Arguments;
use crate::run::Failure;
use crate::test;
use crate::workspace::Workspace;

/// The README opens with these two, in this order.
const FIRST_COMMANDS: [&str; 2] = ["cargo run --release -p kmcl-cli -- demo", "cargo xtask test"];

/// Documents that are checked, by path from the root; all of them stand there.
const DOCUMENTS: [&str; 3] = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"];

/// The commands of a document, in order.
pub(crate) fn commands(document: &str) -> Vec<String> {
    blocks(document, "sh")
        .into_iter()
        .flatten()
        .filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#'))
        .map(|line| line.trim().to_owned())
        .collect()
}

/// The lines of the first `text` block of a document.
pub(crate) fn shown_output(document: &str) -> Vec<String> {
    blocks(document, "text").into_iter().next().unwrap_or_default()
}

/// Every command of the documents that does not exist as it stands there, with the reason.
pub(crate) fn wrong_commands(workspace: &Workspace) -> Result<Vec<String>, Failure> {
    let programs: Vec<_> = workspace
        .targets(&TargetKind::Bin)
        .into_iter()
        .map(|(package, _)| package.name.as_str())
        .collect();
    let mut wrong = Vec::new();
    for path in DOCUMENTS {
        for command in commands(&workspace.read(path)?) {
            if let Err(reason) = check(&command, &programs) {
                wrong.push(format!("{path}: `{command}`: {reason}"));
            }
        }
    }
    let first = commands(&workspace.read("README.md")?);
    if !first.iter().take(2).eq(FIRST_COMMANDS.iter()) {
        wrong.push(format!("README.md: the first commands are not {FIRST_COMMANDS:?}"));
    }
    let last_line = format!("all {} steps passed", test::names().len());
    if !workspace.read("README.md")?.contains(&last_line) {
        wrong.push(format!("README.md: does not say how the check ends: {last_line}"));
    }
    let is_check = |line: &str| line.starts_with("exec cargo xtask test");
    if !workspace.read(".ci/run")?.lines().any(is_check) {
        wrong.push(".ci/run: does not call `cargo xtask test`".to_owned());
    }
    Ok(wrong)
}

/// Every link of the documents to a file that does not exist.
pub(crate) fn broken_links(workspace: &Workspace) -> Result<Vec<String>, Failure> {
    let mut broken = Vec::new();
    for path in DOCUMENTS {
        for link in links(&workspace.read(path)?) {
            if !workspace.root().join(&link).exists() {
                broken.push(format!("{path}: {link} does not exist"));
            }
        }
    }
    Ok(broken)
}

/// The targets of a document's links to files beside it, without the place inside the file.
fn links(document: &str) -> Vec<String> {
    document
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter_map(|target| target.split('#').next())
        .filter(|target| !target.is_empty() && !target.contains("://"))
        .map(str::to_owned)
        .collect()
}

/// `command` as a process; it has no quoting, as the documents use none.
pub(crate) fn as_process(workspace: &Workspace, command: &str) -> Command {
    let mut words = command.split_whitespace();
    let mut process = Command::new(words.next().unwrap_or_default());
    process.args(words).current_dir(workspace.root());
    process
}

/// Where `printed` differs from `shown` in more than figures, line by line.
pub(crate) fn differences(shown: &[String], printed: &[String]) -> Vec<String> {
    let lines = shown.len().max(printed.len());
    (0..lines)
        .filter_map(|line| {
            let (shown, printed) = (shown.get(line), printed.get(line));
            let same = shown.map(|text| without_figures(text))
                == printed.map(|text| without_figures(text));
            let or_nothing = |text: Option<&String>| text.map_or("nothing", |text| text).to_owned();
            (!same).then(|| {
                format!(
                    "line {}: shown {:?}, printed {:?}",
                    line + 1,
                    or_nothing(shown),
                    or_nothing(printed)
                )
            })
        })
        .collect()
}

/// Whether a command names a package, program and arguments that exist.
fn check(command: &str, programs: &[&str]) -> Result<(), String> {
    let words: Vec<_> = command.split_whitespace().collect();
    match words.as_slice() {
        ["cargo", "xtask", arguments @ ..] => {
            Arguments::try_parse_from(std::iter::once(&"cargo xtask").chain(arguments))
                .map(|_| ())
                .map_err(|error| error.kind().to_string())
        }
        ["cargo", "run", arguments @ ..] => {
            let package = arguments
                .iter()
                .skip_while(|word| !matches!(**word, "-p" | "--package"))
                .nth(1)
                .ok_or("names no package")?;
            if programs.contains(package) {
                Ok(())
            } else {
                Err(format!("no package {package} with a program"))
            }
        }
        _ => Ok(()),
    }
}

/// The bodies of all fenced blocks whose opening line is marked `language`.
fn blocks(document: &str, language: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut open: Option<(bool, Vec<String>)> = None;
    for line in document.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(mark)) => open = Some((mark == language, Vec::new())),
            (None, None) => {}
            (Some(_), Some(_)) => {
                if let Some((true, body)) = open.take() {
                    found.push(body);
                }
            }
            (Some((_, body)), None) => body.push(line.to_owned()),
        }
    }
    found
}

/// `line` with each number, each unit, the name of the back end, and each run of spaces replaced by
/// one sign: what may differ from one machine and run to the next.
fn without_figures(line: &str) -> String {
    line.split_whitespace()
        .map(|word| {
            let is_figure = |sign: char| sign.is_ascii_digit() || matches!(sign, '.' | ',');
            let unit = word.trim_start_matches(is_figure);
            if unit.len() == word.len() { word.to_owned() } else { format!("#{unit}") }
        })
        .map(|word| match word.as_str() {
            "KiB" | "MiB" | "GiB" => "B".to_owned(),
            "KiB/s" | "MiB/s" | "GiB/s" => "B/s".to_owned(),
            "us" | "ms" | "s" => "s".to_owned(),
            // A kernel or container may refuse io_uring.
            "io_uring;" | "threads;" => "back-end;".to_owned(),
            _ => word,
        })
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENT: &str = "# Title\n```sh\n# first\ncargo xtask test\n\n  cargo xtask bench\n```\n\
                            ```text\nread 64 MiB at 3.1 GiB/s\n```\n```rust\nlet x = 1;\n```\n";

    #[test]
    fn commands_are_the_lines_of_shell_blocks() {
        assert_eq!(commands(DOCUMENT), ["cargo xtask test", "cargo xtask bench"]);
        assert_eq!(shown_output(DOCUMENT), ["read 64 MiB at 3.1 GiB/s"]);
    }

    #[test]
    fn links_are_those_to_files() {
        let document = "[a](docs/a.md) and [b](docs/b.md#part), [c](#here), [d](https://x.org/)";
        assert_eq!(links(document), ["docs/a.md", "docs/b.md"]);
    }

    #[test]
    fn a_command_that_does_not_exist_is_found() {
        for (command, fine) in [
            ("cargo xtask test", true),
            ("cargo xtask test --list", true),
            ("cargo xtask test --only tests --only demo", true),
            ("cargo xtask test --only nothing", false),
            ("cargo xtask bench --save figures.json", true),
            ("cargo xtask everything", false),
            ("cargo run --release -p kmcl-cli -- demo", true),
            ("cargo run -p kmcl -- demo", false),
            ("cargo run", false),
            ("git clone somewhere", true),
        ] {
            assert_eq!(check(command, &["kmcl-cli"]).is_ok(), fine, "{command}");
        }
    }

    #[test]
    fn output_may_differ_from_the_document_in_figures_only() {
        for (shown, printed, same) in [
            ("read 64 MiB at 3.1 GiB/s", "read 512 KiB at 912 MiB/s", true),
            ("read 64 MiB", "wrote 64 MiB", false),
            ("lost 0", "lost 0 ", true),
            ("in 1.25s", "in 12s", true),
            ("in 12s", "in s", false),
            (
                "server is process 7, back end io_uring;",
                "server is process 12, back end threads;",
                true,
            ),
        ] {
            let differences = differences(&[shown.to_owned()], &[printed.to_owned()]);
            assert_eq!(differences.is_empty(), same, "{shown} / {printed}: {differences:?}");
        }
        assert_eq!(
            differences(&["a".to_owned()], &[]),
            ["line 1: shown \"a\", printed \"nothing\""]
        );
    }
}
