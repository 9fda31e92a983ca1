//! What reads of 4 KiB cost: exits, signals and interrupts for each, beside those of QEMU's virtio-blk.
//!
//! Time passes as it likes where all is emulated; counts do not. Only a guest's timer interrupts depend on
//! time: they are in what KVM counts, not in what is said to be the device's.

use std::collections::BTreeMap;

use super::judge::line_of;
use super::stories::Run;

/// At depth 32, the most signals that a guest may send, and the most interrupts of the device, per read.
const MOST_AT_32: f64 = 0.25;
/// What QEMU's is called.
const PEER: &str = "virtio-blk";

/// What one guest's reads have cost, at one depth.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    kernel: &'static str,
    /// Our two ways, or [`PEER`].
    way: String,
    depth: u32,
    /// Per read.
    exits: f64,
    /// Those that KVM has injected, timers included.
    interrupts: f64,
    /// Those of the device, counted by the guest.
    device_interrupts: f64,
    /// Counted by the guest. virtio-blk's are not told apart from other exits.
    signals: f64,
}

/// The rows that the results of `runs` have.
pub(super) fn rows(results: &str, runs: &[Run]) -> Vec<Row> {
    let mut reads = None;
    let mut marks: BTreeMap<(usize, String, u32), [BTreeMap<String, f64>; 3]> = BTreeMap::new();
    for (kind, run, rest) in results.lines().filter_map(line_of) {
        match kind {
            "READS" => reads = difference(rest),
            "COUNT" => {
                let mut words = rest.splitn(4, ' ');
                let (Some(way), Some(Ok(depth)), Some(Ok(at)), Some(values)) = (
                    words.next(),
                    words.next().map(str::parse),
                    words.next().map(str::parse::<usize>),
                    words.next(),
                ) else {
                    continue;
                };
                let marks = marks.entry((run, way.to_owned(), depth)).or_default();
                if let Some(mark) = marks.get_mut(at) {
                    mark.extend(pairs(values));
                }
            }
            _ => {}
        }
    }
    let Some(reads) = reads else { return Vec::new() };
    let row = |((run, way, depth), [begin, few, many]): (_, [BTreeMap<String, f64>; 3])| {
        let run: usize = run;
        let each = |key: &str| {
            let of = |mark: &BTreeMap<String, f64>| mark.get(key).copied();
            // What many have cost, without what few have: beginning and ending is in both.
            Some(((of(&many)? - of(&few)?) - (of(&few)? - of(&begin)?)) / reads)
        };
        Some(Row {
            kernel: runs.get(run)?.kernel,
            way,
            depth,
            exits: each("exits")?,
            interrupts: each("irq_injections")?,
            device_interrupts: each("interrupts")?,
            signals: each("signals")?,
        })
    };
    marks.into_iter().filter_map(row).collect()
}

/// How many more reads there are in the second number than in the first.
fn difference(rest: &str) -> Option<f64> {
    let (few, many) = rest.split_once(' ')?;
    Some(many.trim().parse::<f64>().ok()? - few.parse::<f64>().ok()?)
}

fn pairs(values: &str) -> impl Iterator<Item = (String, f64)> {
    let pairs = values.split_whitespace().filter_map(|word| word.split_once('='));
    pairs.filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
}

/// The table of these rows, and what in it is not as it has to be.
pub(super) fn table(rows: &[Row]) -> (Vec<String>, Vec<String>) {
    let mut lines = Vec::new();
    let mut failed = Vec::new();
    if rows.is_empty() {
        return (lines, failed);
    }
    lines.push(format!(
        "{:28}{:>10}{:>12}{:>12}{:>10}",
        "per read of 4 KiB", "exits", "interrupts", "of device", "signals"
    ));
    for row in rows {
        let Row { kernel, way, depth, exits, interrupts, device_interrupts, signals } = row;
        let name = format!("{kernel}, {way}, depth {depth}");
        let wrong = wrong(row, rows);
        let verdict = if way == PEER {
            "beside"
        } else if wrong.is_empty() {
            "ok"
        } else {
            "FAILED"
        };
        lines.push(format!(
            "{name:28}{exits:10.3}{interrupts:12.3}{device_interrupts:12.3}{signals:10.3}  {verdict}"
        ));
        failed.extend(wrong.iter().map(|wrong| format!("{name}: {wrong}")));
    }
    (lines, failed)
}

/// What is wrong with a row of ours.
fn wrong(row: &Row, rows: &[Row]) -> Vec<String> {
    let mut wrong = Vec::new();
    if row.way == PEER {
        return wrong;
    }
    if row.depth == 32 {
        for (what, value) in
            [("signals", row.signals), ("interrupts of the device", row.device_interrupts)]
        {
            if value > MOST_AT_32 {
                wrong.push(format!("{value:.3} {what} per read, more than {MOST_AT_32}"));
            }
        }
    }
    let beside =
        |other: &&Row| other.way == PEER && other.kernel == row.kernel && other.depth == row.depth;
    let Some(peer) = rows.iter().find(beside) else { return wrong };
    for (what, ours, theirs) in
        [("exits", row.exits, peer.exits), ("interrupts", row.interrupts, peer.interrupts)]
    {
        if ours >= theirs {
            wrong.push(format!("{ours:.3} {what} per read, {PEER} has {theirs:.3}"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::super::stories::Wanted;
    use super::*;

    /// Counts as the scripts write them: `fixed` for each stretch, and `each` for every read.
    fn counted(run: usize, way: &str, depth: u32, each: f64) -> String {
        let mut text = format!("READS {run} 1000 9000\n");
        let mut count = 500.0;
        for (at, reads) in [(0, 0.0), (1, 1000.0), (2, 9000.0)] {
            count += 77.0 + reads * each;
            text.push_str(&format!(
                "COUNT {run} {way} {depth} {at} exits={count} irq_injections={count} interrupts={count} signals={count}\n"
            ));
        }
        text
    }

    fn runs() -> Vec<Run> {
        let only = vec!["counts".to_owned(), "virtio".to_owned()];
        Wanted { only, ..Wanted::default() }.runs()
    }

    #[test]
    fn what_beginning_and_ending_costs_is_not_counted() {
        let rows = rows(&counted(0, "kernel", 32, 0.125), &runs());
        assert_eq!(rows.len(), 1);
        let Row { kernel, way, depth, exits, interrupts, device_interrupts, signals } = &rows[0];
        assert_eq!((*kernel, way.as_str(), *depth), ("6.12", "kernel", 32));
        for value in [exits, interrupts, device_interrupts, signals] {
            assert!((value - 0.125).abs() < 1e-9, "{value}");
        }
    }

    #[test]
    fn limits_hold_at_depth_32_and_beside_the_peer() {
        for (depth, ours, peer, wrong) in [
            (32, 0.2, Some(0.3), 0),
            (32, 0.3, Some(0.4), 2),
            (32, 0.3, None, 2),
            (32, 0.2, Some(0.2), 2),
            (1, 3.0, Some(4.0), 0),
            (1, 3.0, Some(2.0), 2),
            (1, 3.0, None, 0),
        ] {
            let mut text = counted(0, "user", depth, ours);
            if let Some(peer) = peer {
                text.push_str(&counted(1, PEER, depth, peer));
            }
            let (lines, failed) = table(&rows(&text, &runs()));
            assert_eq!(failed.len(), wrong, "{ours} beside {peer:?} at depth {depth}: {failed:?}");
            assert_eq!(lines.len(), 2 + usize::from(peer.is_some()));
        }
        let (lines, failed) = table(&rows("COUNT 0 kernel 1 0 exits=1\nCOUNT 0 kernel", &runs()));
        assert!(lines.is_empty() && failed.is_empty(), "too little to say anything");
    }
}
