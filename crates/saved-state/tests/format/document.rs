//! `docs/saved-state.md` has the numbers and names that the crate has.

use saved_state::inspect::ALL_KINDS;
use saved_state::limits::{
    CONTENTS_BYTES_PER_BYTE, DECODED_BYTES_PER_BYTE, INPUT_BYTES_PER_BYTE, MAX_CHUNK_BYTES,
    MAX_CHUNKS, MAX_CONTEXT_BYTES, MAX_HEADER_BYTES, MAX_KINDS, MAX_NAME_BYTES,
    MAX_OWN_STATE_BYTES, MAX_PACKET_BYTES, MAX_PRODUCER_BYTES, MAX_STREAM_NAME_BYTES, MAX_STREAMS,
};
use saved_state::{FormatVersion, RecordKind};

const DOCUMENT: &str = include_str!("../../../../docs/saved-state.md");

/// With commas, as the document writes large numbers.
fn written(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().collect();
    String::from_utf8(groups.join(&b',')).unwrap()
}

#[test]
fn limits_are_those_of_the_crate() {
    let has = |text: String| assert!(DOCUMENT.contains(&text), "not in the document: {text}");
    has(format!(
        "length | bytes of the chunk, all of it: 28 to {}",
        written(MAX_CHUNK_BYTES as usize)
    ));
    has(format!("| header | {MAX_HEADER_BYTES} bytes, {MAX_KINDS} kinds |"));
    has(format!("| chunk | {} MiB |", MAX_CHUNK_BYTES >> 20));
    has(format!("| chunks in a stream | {} |", written(MAX_CHUNKS as usize)));
    has(format!("| {} bytes each (16 bits", written(MAX_PACKET_BYTES)));
    has(format!("| client context of a packet | {} bytes |", written(MAX_CONTEXT_BYTES)));
    has(format!("| streams in a file | {MAX_STREAMS}, without"));
    has(format!("| name of a stream in a file | {MAX_STREAM_NAME_BYTES} bytes |"));
    has(format!("its list: {CONTENTS_BYTES_PER_BYTE} bytes per byte of the first stream"));
    has(format!("one chunk: {INPUT_BYTES_PER_BYTE} bytes per byte of it that came"));
    has(format!("saves with a packet | {} MiB |", MAX_OWN_STATE_BYTES >> 20));
    has(format!("{DECODED_BYTES_PER_BYTE} bytes per byte of the chunk"));
    has(format!("| 80 | {MAX_PRODUCER_BYTES} | producer |"));
    has(format!("| 8 | {MAX_NAME_BYTES} | name |"));
    has(format!("| {} up | | | devices of others |", RecordKind::FIRST_FOREIGN));
    assert_eq!(written(1_048_576), "1,048,576");
}

#[test]
fn every_kind_is_in_the_table_of_records() {
    for kind in ALL_KINDS {
        let mandatory = if kind.mandatory { "yes" } else { "no" };
        let row = format!("| {} | `{}` | {mandatory} |", kind.kind, kind.name);
        assert!(DOCUMENT.contains(&row), "not in the document: {row}");
    }
}

#[test]
fn every_version_is_in_the_table_of_versions() {
    let readers: Vec<_> = FormatVersion::ALL.iter().map(ToString::to_string).collect();
    assert!(DOCUMENT.contains(&format!("| written as \\ reader | {} |", readers.join(" | "))));
    for version in FormatVersion::ALL {
        assert!(DOCUMENT.contains(&format!("\n| {version} | reads |")), "{version}");
    }
}
