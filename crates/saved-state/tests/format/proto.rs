//! `docs/saved-state.proto`, the tables of fields and the structs say the same.

use std::collections::BTreeMap;
use std::fmt::Debug;

use prost::Message;
use saved_state::channel::{ChannelRecord, IncomingPacketRecord, OutgoingPacketRecord};
use saved_state::contents::{ContentsRecord, StreamEntryRecord, StreamSumRecord};
use saved_state::end::EndRecord;
use saved_state::inspect::ALL_KINDS;
use saved_state::integration::{HeartbeatRecord, IntegrationServiceRecord, ShutdownRequestRecord};
use saved_state::limits::{MAX_NAME_BYTES, MAX_PACKET_BYTES};
use saved_state::machine::{MachineRecord, PartitionRecord, ProcessorRecord, SynicRecord};
use saved_state::memory::{MemoryFileRecord, MemoryPartsRecord, MemoryRegionRecord};
use saved_state::sockets::{SocketConnectionRecord, SocketsRecord};
use saved_state::storage::{DiskIdentityRecord, StorageRecord, StorageRequestRecord};
use saved_state::transport::{TransportRecord, TransportRegionRecord};
use saved_state::{Encode, Field, KindInfo, Record, Shape};

use crate::records::{Incoming, Outgoing};

const PROTO: &str = include_str!("../../../../docs/saved-state.proto");

/// A message: `(number, type, name)` of each field.
type Fields = Vec<(u32, String, String)>;

#[derive(Debug, Default)]
struct Proto {
    /// By name, with what the comment before it says of the kind.
    messages: BTreeMap<String, (String, Fields)>,
    /// By name: the values, in order.
    enums: BTreeMap<String, Vec<String>>,
}

/// Reads as much of the language as the file needs: flat messages and enumerations, one field a line.
fn parse(text: &str) -> Proto {
    enum Inside {
        Nothing,
        Message(String),
        Enum(String),
    }
    let mut proto = Proto::default();
    let mut inside = Inside::Nothing;
    let mut comment = String::new();
    for line in text.lines() {
        let (code, remark) = line.split_once("//").unwrap_or((line, ""));
        let code = code.trim();
        if code.is_empty() {
            comment = if remark.is_empty() { String::new() } else { comment + remark + "\n" };
            continue;
        }
        let words: Vec<_> = code.split_whitespace().collect();
        match (&inside, &words[..]) {
            (Inside::Nothing, ["syntax" | "package", ..]) => {}
            (Inside::Nothing, ["message", name, "{"]) => {
                let entry = (std::mem::take(&mut comment), Vec::new());
                assert!(proto.messages.insert((*name).to_owned(), entry).is_none(), "{line}");
                inside = Inside::Message((*name).to_owned());
            }
            (Inside::Nothing, ["enum", name, "{"]) => {
                assert!(proto.enums.insert((*name).to_owned(), Vec::new()).is_none(), "{line}");
                inside = Inside::Enum((*name).to_owned());
            }
            (Inside::Message(_) | Inside::Enum(_), ["}"]) => inside = Inside::Nothing,
            (Inside::Message(message), [kind, name, "=", number]) => {
                let number = number.strip_suffix(';').unwrap().parse().unwrap();
                let fields = &mut proto.messages.get_mut(message).unwrap().1;
                fields.push((number, (*kind).to_owned(), (*name).to_owned()));
            }
            (Inside::Enum(name), [value, "=", number]) => {
                let values = proto.enums.get_mut(name).unwrap();
                let number: usize = number.strip_suffix(';').unwrap().parse().unwrap();
                assert_eq!(number, values.len(), "{line}: values are counted from 0");
                values.push((*value).to_owned());
            }
            _ => panic!("not understood: {line}"),
        }
        comment.clear();
    }
    proto
}

/// The name of a kind's message: `"channel.outgoing_packet"` is told by the comment before it.
fn message_of<'a>(proto: &'a Proto, kind: &KindInfo) -> (&'a str, &'a Fields) {
    let mark = format!("Kind {}, {}:", kind.kind, kind.name);
    let mut found = proto.messages.iter().filter(|(_, (comment, _))| comment.contains(&mark));
    let (name, (_, fields)) = found.next().unwrap_or_else(|| panic!("no message for {mark}"));
    assert!(found.next().is_none(), "{mark} twice");
    (name, fields)
}

/// Whether a field of the table is that of the file.
fn agrees(proto: &Proto, field: &Field, (number, kind, name): &(u32, String, String)) -> bool {
    let kind_agrees = match field.shape {
        Shape::Bool => kind == "bool",
        Shape::Uint32 => kind == "uint32",
        Shape::Uint64 => kind == "uint64",
        Shape::Fixed64 => kind == "fixed64",
        Shape::Bytes { .. } | Shape::Guid => kind == "bytes",
        Shape::Text { .. } => kind == "string",
        Shape::Enum(names) => {
            let prefix: String = kind
                .chars()
                .enumerate()
                .flat_map(|(at, letter)| {
                    let gap = (at != 0 && letter.is_uppercase()).then_some('_');
                    gap.into_iter().chain([letter.to_ascii_uppercase()])
                })
                .collect();
            let expected: Vec<_> =
                names.iter().map(|name| format!("{prefix}_{}", name.to_uppercase())).collect();
            proto.enums.get(kind) == Some(&expected)
        }
    };
    kind_agrees && *number == field.number && name == field.name
}

#[test]
fn the_file_and_the_tables_agree() {
    let proto = parse(PROTO);
    assert_eq!(proto.messages.len(), ALL_KINDS.len());
    for kind in ALL_KINDS {
        let (name, fields) = message_of(&proto, kind);
        assert_eq!(fields.len(), kind.fields.len(), "{name}");
        for (field, of_file) in kind.fields.iter().zip(fields) {
            assert!(agrees(&proto, field, of_file), "{name}: {field:?} is {of_file:?} in the file");
        }
    }
}

/// A message with every field of a table in use.
fn full(fields: &[Field]) -> Vec<u8> {
    let mut message = Vec::new();
    let mut put = |value: u64| {
        let bytes = &mut message;
        let mut rest = value;
        while rest >= 0x80 {
            bytes.push(rest as u8 | 0x80);
            rest >>= 7;
        }
        bytes.push(rest as u8);
    };
    for field in fields {
        let key = u64::from(field.number) << 3;
        match field.shape {
            Shape::Bool | Shape::Enum(_) => [key, 1].map(&mut put),
            // A kind of stream has 16 bits, whatever the message could hold.
            Shape::Uint32 if field.name == "stream" => [key, u64::from(u16::MAX)].map(&mut put),
            Shape::Uint32 => [key, u64::from(u32::MAX)].map(&mut put),
            Shape::Uint64 => [key, u64::MAX].map(&mut put),
            Shape::Fixed64 => {
                put(key | 1);
                (1..=8).for_each(&mut put);
                continue;
            }
            Shape::Bytes { .. } | Shape::Text { .. } => {
                put(key | 2);
                [1, u64::from(b'x')].map(&mut put)
            }
            Shape::Guid => {
                put(key | 2);
                (0..=16).rev().for_each(&mut put);
                continue;
            }
        };
    }
    message
}

/// Whether the fields of a kind's struct and its table come from one list in the sources.
fn is_made_from_its_table(kind: &KindInfo) -> bool {
    kind.name.starts_with("bus.")
}

/// A struct has exactly the fields of its table: it takes a message with all of them in, and gives it
/// back byte for byte; a number or type that it did not share would be missing.
fn struct_agrees<M: Message + Default + Debug>(kind: &KindInfo) {
    let message = full(kind.fields);
    assert_eq!((kind.check)(&message).map_err(|why| why.problem).err(), contradiction(kind));
    let decoded = M::decode(&message[..]).unwrap();
    assert_eq!(decoded.encode_to_vec(), message, "{}", kind.name);
    assert_eq!(M::default().encoded_len(), 0);
    let shown = format!("{decoded:?}");
    let names: Vec<_> = shown.match_indices(": ").collect();
    assert_eq!(names.len(), kind.fields.len(), "{shown}");
    for field in kind.fields {
        assert!(shown.contains(&format!("{}: ", field.name)), "{} in {shown}", field.name);
    }
}

/// Packets cannot have everything at once.
fn contradiction(kind: &KindInfo) -> Option<saved_state::FieldProblem> {
    let other = match kind.name {
        "channel.outgoing_packet" => "place",
        "channel.incoming_packet" => "fence",
        _ => return None,
    };
    Some(saved_state::FieldProblem::Contradiction { other })
}

#[test]
fn the_structs_and_the_tables_agree() {
    struct_agrees::<EndRecord>(EndRecord::KIND);
    struct_agrees::<ContentsRecord>(ContentsRecord::KIND);
    struct_agrees::<StreamEntryRecord>(StreamEntryRecord::KIND);
    struct_agrees::<StreamSumRecord>(StreamSumRecord::KIND);
    struct_agrees::<ChannelRecord>(ChannelRecord::KIND);
    struct_agrees::<StorageRecord>(StorageRecord::KIND);
    struct_agrees::<DiskIdentityRecord>(DiskIdentityRecord::KIND);
    struct_agrees::<StorageRequestRecord>(StorageRequestRecord::KIND);
    // Packets have no derived struct but these tests', which `round_trip` holds against the encoder.
    struct_agrees::<Outgoing>(<OutgoingPacketRecord<'_> as Record>::KIND);
    struct_agrees::<Incoming>(<IncomingPacketRecord<'_> as Record>::KIND);
    struct_agrees::<TransportRecord>(TransportRecord::KIND);
    struct_agrees::<TransportRegionRecord>(TransportRegionRecord::KIND);
    struct_agrees::<MachineRecord>(MachineRecord::KIND);
    struct_agrees::<PartitionRecord>(PartitionRecord::KIND);
    struct_agrees::<ProcessorRecord>(ProcessorRecord::KIND);
    struct_agrees::<SynicRecord>(SynicRecord::KIND);
    struct_agrees::<MemoryFileRecord>(MemoryFileRecord::KIND);
    struct_agrees::<MemoryRegionRecord>(MemoryRegionRecord::KIND);
    struct_agrees::<MemoryPartsRecord>(MemoryPartsRecord::KIND);
    struct_agrees::<IntegrationServiceRecord>(IntegrationServiceRecord::KIND);
    struct_agrees::<HeartbeatRecord>(HeartbeatRecord::KIND);
    struct_agrees::<ShutdownRequestRecord>(ShutdownRequestRecord::KIND);
    struct_agrees::<SocketsRecord>(SocketsRecord::KIND);
    struct_agrees::<SocketConnectionRecord>(SocketConnectionRecord::KIND);
    let others = ALL_KINDS.iter().filter(|kind| !is_made_from_its_table(kind)).count();
    assert_eq!(others, 24, "a kind without a struct to compare");
}

#[test]
fn enumerations_of_structs_have_the_names_of_the_tables() {
    use saved_state::channel::Side;
    use saved_state::storage::InitStep;
    fn names<E: TryFrom<i32> + Debug>() -> Vec<String> {
        let values = (0..).map_while(|value| E::try_from(value).ok());
        values.map(|value| format!("{value:?}").to_lowercase()).collect()
    }
    for (kind, expected) in
        [(ChannelRecord::KIND, names::<Side>()), (StorageRecord::KIND, names::<InitStep>())]
    {
        let Shape::Enum(table) = kind.fields[0].shape else { panic!("{}", kind.name) };
        assert_eq!(table, expected);
    }
}

#[test]
fn tables_keep_their_own_rules() {
    let mut kinds: Vec<_> = ALL_KINDS.iter().map(|kind| kind.kind).collect();
    kinds.dedup();
    assert_eq!(kinds.len(), ALL_KINDS.len(), "a number twice, or out of order");
    for kind in ALL_KINDS {
        let fits = kind.name.len() <= MAX_NAME_BYTES && kind.name.contains('.');
        assert!(fits && kind.name.is_ascii(), "{}", kind.name);
        assert!(kind.versions.is_sorted_by_key(|entry| (entry.format, entry.record)));
        assert!(kind.fields.len() < 64, "{} has too many fields to count in a word", kind.name);
        assert!(kind.fields.is_sorted_by_key(|field| field.number), "{}", kind.name);
        for field in kind.fields {
            assert!((1..=kind.newest()).contains(&field.since), "{} {}", kind.name, field.name);
            if let Shape::Bytes { most } | Shape::Text { most } = field.shape {
                assert!(most <= 2 * MAX_PACKET_BYTES + 16, "{} {}", kind.name, field.name);
            }
        }
    }
    fn is_encode<R: Encode>() {}
    is_encode::<ChannelRecord>();
}
