//! `cargo xtask bench`: runs the benchmarks and prints one table.
//!
//! A benchmark measures itself beside its peer in one run and prints lines of its own form among
//! whatever else it says:
//!
//! ```text
//! RATIO <name> ours=<ns> peer=<ns> ratio=<ours per peer> limit=<most it may be, inf: only reported>
//! FIGURE <name> <value> <unit> [limit=<most it may be>]
//! ```

use std::path::Path;
use std::str::FromStr;

use cargo_metadata::TargetKind;
use serde_json::json;

use crate::run::{Failure, none_of, run_and_keep, say};
use crate::workspace::Workspace;

/// A duration of ours and of the peer, both in nanoseconds, and their quotient.
#[derive(Clone, Debug, PartialEq)]
struct Ratio {
    name: String,
    ours_ns: f64,
    peer_ns: f64,
    ratio: f64,
    limit: Option<f64>,
}

/// A figure without a peer.
#[derive(Clone, Debug, PartialEq)]
struct Figure {
    name: String,
    value: f64,
    unit: String,
    limit: Option<f64>,
}

/// One line that a benchmark printed for us.
#[derive(Clone, Debug, PartialEq)]
enum Line {
    Ratio(Ratio),
    Figure(Figure),
}

/// Runs the benchmarks of `packages`, or of all, prints the table, and writes it to `save`.
pub(crate) fn run(
    workspace: &Workspace,
    packages: &[String],
    save: Option<&Path>,
) -> Result<(), Failure> {
    let mut lines = Vec::new();
    let mut malformed = Vec::new();
    for (package, target) in workspace.targets(&TargetKind::Bench) {
        if !packages.is_empty() && !packages.iter().any(|name| name == package.name.as_str()) {
            continue;
        }
        say(&format!("==> {}: bench {}", package.name, target.name));
        let printed = run_and_keep(&mut workspace.cargo([
            "bench",
            "--package",
            &package.name,
            "--bench",
            &target.name,
        ]))?;
        for text in printed {
            match parse(&text) {
                Some(Ok(line)) => lines.push(line),
                Some(Err(reason)) => malformed.push(format!("{text:?}: {reason}")),
                None => {}
            }
        }
    }
    say("");
    for row in table(&lines) {
        say(&row);
    }
    if let Some(path) = save {
        let text = format!("{:#}\n", as_json(&lines));
        std::fs::write(path, text)
            .map_err(|source| Failure::File { path: path.to_owned(), source })?;
    }
    none_of("lines of benchmarks that are not of their form", malformed)
}

/// Whether `value` is within `limit`; `None` where there is none.
fn is_reached(value: f64, limit: Option<f64>) -> Option<bool> {
    limit.map(|limit| value <= limit)
}

/// What `text` reports; `None` where it is not meant for us.
fn parse(text: &str) -> Option<Result<Line, String>> {
    let words: Vec<_> = text.split_whitespace().collect();
    match words.as_slice() {
        ["RATIO", rest @ ..] => Some(parse_ratio(rest).map(Line::Ratio)),
        ["FIGURE", rest @ ..] => Some(parse_figure(rest).map(Line::Figure)),
        _ => None,
    }
}

fn parse_ratio(words: &[&str]) -> Result<Ratio, String> {
    let &[name, ours, peer, ratio, limit] = words else {
        return Err(format!("expected 5 words after RATIO, found {}", words.len()));
    };
    Ok(Ratio {
        name: name.to_owned(),
        ours_ns: field("ours", ours)?,
        peer_ns: field("peer", peer)?,
        ratio: field("ratio", ratio)?,
        limit: if limit == "limit=inf" { None } else { Some(field("limit", limit)?) },
    })
}

fn parse_figure(words: &[&str]) -> Result<Figure, String> {
    let (&[name, value, unit], limit) = (match words {
        [first @ .., limit] if limit.starts_with("limit=") => (first, Some(field("limit", limit)?)),
        all => (all, None),
    }) else {
        return Err(format!("expected 3 words after FIGURE, found {}", words.len()));
    };
    let value = number(value)?;
    Ok(Figure { name: name.to_owned(), value, unit: unit.to_owned(), limit })
}

/// The number in `name=number`.
fn field(name: &str, word: &str) -> Result<f64, String> {
    word.strip_prefix(name)
        .and_then(|rest| rest.strip_prefix('='))
        .ok_or_else(|| format!("expected {name}=, found {word}"))
        .and_then(number)
}

fn number(word: &str) -> Result<f64, String> {
    f64::from_str(word)
        .ok()
        .filter(|value| value.is_finite())
        .ok_or_else(|| format!("{word} is not a finite number"))
}

/// The table: ratios first, then the figures that have no peer.
fn table(lines: &[Line]) -> Vec<String> {
    let width = lines.iter().map(|line| line.name().len()).max().unwrap_or(0).max("name".len());
    let mut rows = vec![format!(
        "{:<width$}  {:>12}  {:>12}  {:>7}  {:>10}  reached",
        "name", "ours ns", "peer ns", "ratio", "must reach"
    )];
    for line in lines {
        if let Line::Ratio(ratio) = line {
            rows.push(format!(
                "{:<width$}  {:>12.1}  {:>12.1}  {:>7.2}  {:>10}  {}",
                ratio.name,
                ratio.ours_ns,
                ratio.peer_ns,
                ratio.ratio,
                ratio.limit.map_or("-".to_owned(), |limit| format!("{limit:.2}")),
                verdict(ratio.ratio, ratio.limit)
            ));
        }
    }
    rows.push(String::new());
    for line in lines {
        if let Line::Figure(figure) = line {
            let value = format!("{:<width$}  {} {}", figure.name, figure.value, figure.unit);
            rows.push(match figure.limit {
                Some(limit) => {
                    let verdict = verdict(figure.value, figure.limit);
                    format!("{value}, at most {limit}: reached {verdict}")
                }
                None => value,
            });
        }
    }
    rows
}

/// The last column of the table.
fn verdict(value: f64, limit: Option<f64>) -> &'static str {
    match is_reached(value, limit) {
        Some(true) => "yes",
        Some(false) => "NO",
        None => "-",
    }
}

impl Line {
    fn name(&self) -> &str {
        match self {
            Self::Ratio(ratio) => &ratio.name,
            Self::Figure(figure) => &figure.name,
        }
    }
}

fn as_json(lines: &[Line]) -> serde_json::Value {
    lines
        .iter()
        .map(|line| match line {
            Line::Ratio(ratio) => json!({
                "name": ratio.name,
                "ours_ns": ratio.ours_ns,
                "peer_ns": ratio.peer_ns,
                "ratio": ratio.ratio,
                "limit": ratio.limit,
                "reached": is_reached(ratio.ratio, ratio.limit),
            }),
            Line::Figure(figure) => json!({
                "name": figure.name,
                "value": figure.value,
                "unit": figure.unit,
                "limit": figure.limit,
                "reached": is_reached(figure.value, figure.limit),
            }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_benchmarks_parse_or_say_why_not() {
        let ratio = |limit| Ratio {
            name: "ring/64B".to_owned(),
            ours_ns: 30.0,
            peer_ns: 20.0,
            ratio: 1.5,
            limit,
        };
        let figure = |limit| Figure {
            name: "channel/memory".to_owned(),
            value: 12.0,
            unit: "KiB".to_owned(),
            limit,
        };
        for (text, expected) in [
            (
                "RATIO ring/64B ours=30 peer=20.0 ratio=1.5 limit=1.5",
                Some(Ok(Line::Ratio(ratio(Some(1.5))))),
            ),
            (
                "RATIO ring/64B ours=30 peer=20 ratio=1.5 limit=inf",
                Some(Ok(Line::Ratio(ratio(None)))),
            ),
            ("FIGURE channel/memory 12 KiB", Some(Ok(Line::Figure(figure(None))))),
            ("FIGURE channel/memory 12 KiB limit=512", Some(Ok(Line::Figure(figure(Some(512.0)))))),
            ("Running benches/ring.rs", None),
            ("", None),
            ("RATIO ring/64B", Some(Err("expected 5 words after RATIO, found 1".to_owned()))),
            (
                "RATIO ring/64B peer=20 ours=30 ratio=1.5 limit=1.5",
                Some(Err("expected ours=, found peer=20".to_owned())),
            ),
            (
                "RATIO ring/64B ours=NaN peer=20 ratio=1.5 limit=1.5",
                Some(Err("NaN is not a finite number".to_owned())),
            ),
            ("FIGURE x 12", Some(Err("expected 3 words after FIGURE, found 2".to_owned()))),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
        for (value, limit, expected) in
            [(1.5, Some(1.5), Some(true)), (1.51, Some(1.5), Some(false)), (9.0, None, None)]
        {
            assert_eq!(is_reached(value, limit), expected, "{value} of {limit:?}");
        }
    }

    #[test]
    fn the_table_says_what_was_not_reached() {
        let lines: Vec<_> = [
            "FIGURE memory 600 KiB limit=512",
            "RATIO fast ours=1 peer=2 ratio=0.5 limit=1",
            "RATIO slow ours=4 peer=2 ratio=2 limit=1",
            "RATIO free ours=4 peer=2 ratio=2 limit=inf",
        ]
        .iter()
        .map(|text| parse(text).unwrap().unwrap())
        .collect();
        let rows = table(&lines);
        assert!(rows.iter().any(|row| row.starts_with("fast") && row.ends_with("  yes")));
        assert!(rows.iter().any(|row| row.starts_with("slow") && row.ends_with("  NO")));
        assert!(rows.iter().any(|row| row.starts_with("free") && row.ends_with("  -")));
        assert!(rows.iter().any(|row| row.starts_with("memory") && row.ends_with("reached NO")));
        assert_eq!(as_json(&lines)[1]["reached"], true);
    }
}
