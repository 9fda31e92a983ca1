//! What is in a saved state, for people with 80 columns.

use serde_json::Value as Json;
use vsc_storage::wire::SCSI_INTERFACE;

use super::walk::{Fields, Header, Packet, State, Stream};
use crate::output::Table;
use crate::size::Size;

/// Columns of a terminal.
const WIDTH: usize = 80;

/// Packets of a stream, and records of one kind in it, that are shown unless all are asked for.
const FEW: usize = 8;

/// The whole text. `rules` are drawn around tables on a terminal.
pub(super) fn of(state: &State, name: &str, all: bool, rules: bool) -> String {
    let mut parts = vec![summary(state, name), streams(state).render(rules)];
    parts.extend(records(state, all));
    parts.extend(packets(state, all, rules));
    parts.push(sizes(state).render(rules));
    if !state.damage.is_empty() {
        parts.push(damage(state));
    }
    parts.join("\n")
}

fn summary(state: &State, name: &str) -> String {
    let header = state.streams.iter().find_map(|stream| stream.header.as_ref());
    let format = header.map_or_else(
        || "no header that can be read".to_owned(),
        |header| format!("format version {}, by {}", header.format_version, header.producer),
    );
    let streams = state.streams.len();
    let noun = if streams == 1 { "stream" } else { "streams" };
    wrap(&format!("{name}: {} in {streams} {noun}, {format}", Size(state.bytes)), 4)
}

/// `text` in lines that fit, all but the first indented by `indent`.
fn wrap(text: &str, indent: usize) -> String {
    let (mut lines, mut length) = (String::new(), 0);
    for word in text.split(' ') {
        let letters = word.chars().count();
        if length > indent && length + 1 + letters > WIDTH {
            lines.push('\n');
            lines.push_str(&" ".repeat(indent));
            length = indent;
        } else if length > 0 {
            lines.push(' ');
            length += 1;
        }
        lines.push_str(word);
        length += letters;
    }
    lines.push('\n');
    lines
}

/// `text`, if it has at most `most` letters; else its beginning and a sign that there is more.
fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most.saturating_sub(1)).chain(['…']).collect()
}

/// What a stream is about, in a few words.
fn subject(stream: &Stream) -> String {
    if let Some(name) = &stream.name {
        return name.clone();
    }
    match &stream.header {
        Some(header) if header.interface_type == SCSI_INTERFACE.to_string() => "SCSI".to_owned(),
        Some(Header { interface_type, .. })
            if interface_type.chars().any(|c| !"0-".contains(c)) =>
        {
            interface_type.clone()
        }
        _ => String::new(),
    }
}

fn kind(stream: &Stream) -> &str {
    stream.header.as_ref().map_or("unreadable", |header| &header.kind)
}

fn streams(state: &State) -> Table {
    let heading = ["stream", "kind", "of", "condition", "items", "chunks", "size"];
    let mut table = Table::with_heading(&heading).right(&[0, 4, 5, 6]);
    for (number, stream) in state.streams.iter().enumerate() {
        let header = stream.header.as_ref();
        let damaged = state.damage.iter().any(|damage| damage.stream == number);
        let condition = match header {
            _ if damaged => "damaged",
            Some(header) if header.frozen => "frozen",
            _ => "",
        };
        table.row(vec![
            number.to_string(),
            cut(kind(stream), 12),
            cut(&subject(stream), 24),
            condition.to_owned(),
            header.map_or_else(String::new, |header| header.items.to_string()),
            stream.chunks.to_string(),
            Size(stream.bytes).to_string(),
        ]);
    }
    table
}

/// The records that are no packets and not part of the list of streams, field by field.
fn records(state: &State, all: bool) -> Option<String> {
    let mut text = String::new();
    for (number, stream) in state.streams.iter().enumerate() {
        if kind(stream) == "contents" {
            continue;
        }
        for tally in &stream.sizes {
            let of_kind = || stream.records.iter().filter(|record| record.record == tally.record);
            let (there, most) = (of_kind().count(), if all { usize::MAX } else { FEW });
            for record in of_kind().take(most) {
                text.push_str(&wrap(&format!("{number} {}", line_of(record)), 4));
            }
            if there > most {
                text.push_str(&format!("{number} {}: and {} more\n", tally.record, there - most));
            }
        }
    }
    (!text.is_empty()).then_some(text)
}

/// A record on one line: what is not 0, not `false` and not empty.
fn line_of(record: &Fields) -> String {
    let says_something = |value: &Json| match value {
        Json::Bool(value) => *value,
        Json::Number(number) => number.as_u64() != Some(0),
        Json::String(text) => !matches!(text.as_str(), "" | "0 bytes"),
        _ => true,
    };
    let shown =
        record.fields.iter().filter(|(_, value)| says_something(value)).map(|(name, value)| {
            match value {
                Json::Bool(_) => name.clone(),
                Json::String(text) => format!("{name} {text}"),
                value => format!("{name} {value}"),
            }
        });
    let shown: Vec<String> = shown.collect();
    if shown.is_empty() {
        record.record.clone()
    } else {
        format!("{}: {}", record.record, shown.join(", "))
    }
}

/// How many packets are in flight in which condition, then the packets themselves.
fn packets(state: &State, all: bool, rules: bool) -> Vec<String> {
    let with_packets =
        || state.streams.iter().enumerate().filter(|(_, stream)| !stream.packets.is_empty());
    if with_packets().next().is_none() {
        return Vec::new();
    }
    let mut counts = Table::with_heading(&[
        "stream",
        "in flight",
        "never started",
        "cancelled",
        "finished",
        "outgoing",
        "queued",
    ])
    .right(&[0, 1, 2, 3, 4, 5, 6]);
    for (number, stream) in with_packets() {
        let count = |condition: &str| {
            stream.packets.iter().filter(|packet| packet.condition == condition).count().to_string()
        };
        counts.row(vec![
            number.to_string(),
            stream.packets.len().to_string(),
            count("never started"),
            count("cancelled"),
            count("finished"),
            count("in ring"),
            count("queued"),
        ]);
    }
    let mut table = Table::with_heading(&[
        "stream",
        "packet",
        "transaction",
        "condition",
        "payload",
        "state",
        "request",
    ])
    .right(&[0, 1, 2, 4, 5]);
    let mut hidden = 0;
    for (number, stream) in with_packets() {
        let most = if all { usize::MAX } else { FEW };
        for packet in stream.packets.iter().take(most) {
            table.row(row_of(number, packet));
        }
        hidden += stream.packets.len().saturating_sub(most);
    }
    let mut table = table.render(rules);
    if hidden > 0 {
        table.push_str(&format!("and {hidden} more packets: --all shows them\n"));
    }
    vec![counts.render(rules), table]
}

fn row_of(stream: usize, packet: &Packet) -> Vec<String> {
    // An id is a pointer as often as a count.
    let transaction = match packet.transaction_id {
        None => "-".to_owned(),
        Some(id) if id < 1_000_000 => id.to_string(),
        Some(id) => format!("{id:#x}"),
    };
    vec![
        stream.to_string(),
        packet.order.to_string(),
        transaction,
        packet.condition.to_owned(),
        (packet.message_bytes + packet.completion_bytes).to_string(),
        packet.own_state_bytes.to_string(),
        cut(packet.request.as_deref().unwrap_or("-"), 24),
    ]
}

fn sizes(state: &State) -> Table {
    let heading = ["record", "version", "count", "bytes", "mean", "largest"];
    let mut table = Table::with_heading(&heading).right(&[1, 2, 3, 4, 5]);
    let mut kinds: Vec<(&str, u16, u64, u64, u64, bool)> = Vec::new();
    for tally in state.streams.iter().flat_map(|stream| &stream.sizes) {
        let (count, bytes, largest) = (tally.count, tally.bytes, tally.largest_bytes);
        match kinds.iter_mut().find(|kind| kind.0 == tally.record && kind.1 == tally.version) {
            Some(kind) => {
                *kind =
                    (kind.0, kind.1, kind.2 + count, kind.3 + bytes, kind.4.max(largest), kind.5);
            }
            None => kinds.push((&tally.record, tally.version, count, bytes, largest, tally.known)),
        }
    }
    for (record, version, count, bytes, largest, known) in kinds {
        table.row(vec![
            format!("{record}{}", if known { "" } else { " (unknown)" }),
            version.to_string(),
            count.to_string(),
            bytes.to_string(),
            bytes.checked_div(count).unwrap_or(0).to_string(),
            largest.to_string(),
        ]);
    }
    table
}

fn damage(state: &State) -> String {
    let mut text = String::new();
    for damage in &state.damage {
        let extent =
            if damage.bytes == 0 { String::new() } else { format!(", {} bytes", damage.bytes) };
        let line = format!(
            "DAMAGED at byte {}{extent}, stream {}: {}",
            damage.offset, damage.stream, damage.what
        );
        text.push_str(&wrap(&line, 4));
    }
    text
}
