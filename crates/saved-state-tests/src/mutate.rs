//! Changes of a saved state that somebody makes who knows the format.
//!
//! A change of a byte is noticed by a checksum, and a fuzzer that makes no other changes learns nothing of
//! what lies behind it. So a state is taken apart into streams, chunks and fields, changed there, and put
//! together again with lengths, sequence numbers, totals and checksums that are right.

use saved_state::contents::{CONTENTS, STREAM_SUM, StreamSumRecord};
use saved_state::end::{END, EndRecord};
use saved_state::testing::{Handmade, chunk, chunk_ranges, rechain, stream_ranges};
use saved_state::{RecordKind, StreamKind};

/// Numbers from a seed.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The same seed gives the same numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any 64 bits: SplitMix64.
    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ bits >> 31
    }

    /// A number below `end`; 0 if there is none.
    pub fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.roll() % (end.max(1) as u64)).unwrap()
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

// ---- Streams, chunks, fields ----------------------------------------------------------------------------

/// A stream, taken apart.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stream {
    /// Its first chunk.
    pub header: Vec<u8>,
    /// The others.
    pub chunks: Vec<Part>,
}

/// A chunk, without what follows from where it stands.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Part {
    /// Of the record.
    pub kind: u16,
    /// Of the record.
    pub version: u16,
    /// Whether it must not be skipped.
    pub mandatory: bool,
    /// Whether it says that it is the last.
    pub last: bool,
    /// The record.
    pub message: Vec<u8>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Takes a file, or a stream, apart: by the lengths of its chunks, up to what is none.
#[must_use]
pub fn take_apart(file: &[u8]) -> Vec<Stream> {
    let streams = stream_ranges(file);
    let streams = streams.into_iter().map(|range| &file[range]);
    streams
        .map(|stream| {
            let ranges = chunk_ranges(stream);
            let chunks = ranges.iter().skip(1).map(|range| {
                let chunk = &stream[range.clone()];
                Part {
                    kind: u16_at(chunk, 12),
                    version: u16_at(chunk, 14),
                    mandatory: chunk[16] & 2 != 0,
                    last: chunk[16] & 1 != 0,
                    message: chunk[20..chunk.len() - 8].to_vec(),
                }
            });
            Stream { header: stream[ranges[0].clone()].to_vec(), chunks: chunks.collect() }
        })
        .collect()
}

/// Puts streams together. `totals`: those that the format has are put right too.
#[must_use]
pub fn put_together(streams: &[Stream], totals: bool) -> Vec<u8> {
    let mut file = Vec::new();
    let mut sums = Vec::new();
    let listed = streams.len().saturating_sub(2);
    for (stream, at) in streams.iter().zip(0..) {
        let mut bytes = stream.header.clone();
        if totals && let Some(beforehand) = bytes.get_mut(28..40) {
            beforehand.fill(0); // chunks and bytes: not known
        }
        let is_contents = u16_at(&bytes, 16) == StreamKind::CONTENTS.0;
        let is_last = is_contents && at + 1 == streams.len();
        let mut parts = stream.chunks.clone();
        if totals && is_last && at != 0 {
            parts.retain(|part| part.kind == END.0);
            let of_one = |sum: &StreamSumRecord| Part {
                kind: STREAM_SUM.0,
                version: 1,
                mandatory: true,
                last: false,
                message: prost::Message::encode_to_vec(sum),
            };
            parts.splice(0..0, sums.iter().map(of_one));
        }
        for (part, sequence) in parts.iter().zip(1..) {
            let mut message = part.message.clone();
            if totals && part.kind == END.0 {
                let end = EndRecord { chunks: sequence, bytes: bytes.len() as u64 };
                message = prost::Message::encode_to_vec(&end);
            } else if totals && part.kind == CONTENTS.0 && at == 0 {
                message = set_varint(&message, 1, listed as u64);
            }
            let kind = RecordKind(part.kind);
            let &Part { version, mandatory, last, .. } = part;
            bytes.extend(chunk(Handmade { sequence, kind, version, mandatory, last }, &message));
        }
        rechain(&mut bytes);
        let checksum = bytes.last_chunk().copied().unwrap_or_default();
        let checksum = u32::from_le_bytes(checksum);
        sums.push(StreamSumRecord { bytes: bytes.len() as u64, checksum });
        file.extend(bytes);
    }
    file
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct Field {
    number: u64,
    value: Wire,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Wire {
    Varint(u64),
    Eight([u8; 8]),
    Bytes(Vec<u8>),
    Four([u8; 4]),
}

fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for place in 0..10 {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f).checked_shl(7 * place).unwrap_or(0);
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put_varint(mut value: u64, to: &mut Vec<u8>) {
    while value >= 0x80 {
        to.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    to.push(value.to_le_bytes()[0]);
}

/// The fields of a message; `None` where it is none.
fn fields(message: &[u8]) -> Option<Vec<Field>> {
    let mut rest = message;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let key = take_varint(&mut rest)?;
        let value = match key & 7 {
            0 => Wire::Varint(take_varint(&mut rest)?),
            1 => Wire::Eight(*rest.split_off(..8)?.first_chunk()?),
            2 => {
                let len = usize::try_from(take_varint(&mut rest)?).ok()?;
                Wire::Bytes(rest.split_off(..len)?.to_vec())
            }
            5 => Wire::Four(*rest.split_off(..4)?.first_chunk()?),
            _ => return None,
        };
        found.push(Field { number: key >> 3, value });
    }
    Some(found)
}

fn message(fields: &[Field]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for Field { number, value } in fields {
        let key = number << 3;
        match value {
            Wire::Varint(value) => {
                put_varint(key, &mut bytes);
                put_varint(*value, &mut bytes);
            }
            Wire::Eight(eight) => {
                put_varint(key | 1, &mut bytes);
                bytes.extend(eight);
            }
            Wire::Bytes(content) => {
                put_varint(key | 2, &mut bytes);
                put_varint(content.len() as u64, &mut bytes);
                bytes.extend(content);
            }
            Wire::Four(four) => {
                put_varint(key | 5, &mut bytes);
                bytes.extend(four);
            }
        }
    }
    bytes
}

fn set_varint(bytes: &[u8], number: u64, value: u64) -> Vec<u8> {
    let Some(mut all) = fields(bytes) else { return bytes.to_vec() };
    let value = Wire::Varint(value);
    match all.iter_mut().find(|field| field.number == number) {
        Some(field) => field.value = value,
        None => all.insert(0, Field { number, value }),
    }
    message(&all)
}

// ---- Changes --------------------------------------------------------------------------------------------

/// Changes bytes at the start of a buffer, of which so many are in use and so many may be; returns how
/// many are in use then. Whatever the fuzzer does to bytes of which nothing is known.
pub type Raw<'a> = &'a mut dyn FnMut(&mut [u8], usize, usize) -> usize;

/// Bytes that one change adds at most.
const GROWTH_BYTES: usize = 256;

fn change_raw(bytes: &mut Vec<u8>, most: usize, raw: Raw<'_>) {
    let used = bytes.len();
    let room = most.max(used).min(used + GROWTH_BYTES);
    bytes.resize(room, 0);
    let used = raw(bytes, used, room);
    bytes.truncate(used);
}

/// A number that something may hinge on, or one near `old`.
fn telling_number(old: u64, dice: &mut Dice) -> u64 {
    const NUMBERS: [u64; 20] = [
        0,
        1,
        2,
        3,
        4,
        7,
        8,
        64,
        255,
        256,
        4096,
        0x7ff8,
        0x8000,
        0xffff,
        0x1_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        u64::MAX,
    ];
    match dice.below(8) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old ^ (1 << dice.below(64)),
        3 => old.wrapping_add(8),
        4 => dice.roll() >> dice.below(64),
        _ => NUMBERS[dice.below(NUMBERS.len())],
    }
}

fn change_message(bytes: &mut Vec<u8>, dice: &mut Dice, raw: Raw<'_>) {
    let most = bytes.len() + GROWTH_BYTES;
    let Some(mut all) = fields(bytes).filter(|_| !dice.once_in(8)) else {
        return change_raw(bytes, most, raw);
    };
    let at = dice.below(all.len());
    match dice.below(12) {
        _ if all.is_empty() => {
            let number = 1 + dice.below(24) as u64;
            all.push(Field { number, value: Wire::Varint(telling_number(0, dice)) });
        }
        0 => drop(all.remove(at)),
        1 => {
            let again = all[at].clone();
            let to = dice.below(all.len());
            all.insert(to, again);
        }
        2 => {
            let number = if dice.once_in(4) { dice.roll() >> 35 } else { dice.below(24) as u64 };
            all[at].number = number.max(1);
        }
        3 => {
            let number = 1 + dice.below(24) as u64;
            let value = match dice.below(4) {
                0 => Wire::Varint(telling_number(1, dice)),
                1 => Wire::Eight(dice.roll().to_le_bytes()),
                2 => Wire::Four([0xff; 4]),
                _ => Wire::Bytes(vec![0x5a; dice.below(64)]),
            };
            all.insert(at, Field { number, value });
        }
        _ => change_field(&mut all[at], bytes, dice, raw),
    }
    *bytes = message(&all);
}

fn change_field(field: &mut Field, whole: &[u8], dice: &mut Dice, raw: Raw<'_>) {
    match &mut field.value {
        Wire::Varint(value) => *value = telling_number(*value, dice),
        Wire::Eight(eight) => {
            *eight = telling_number(u64::from_le_bytes(*eight), dice).to_le_bytes();
        }
        Wire::Four(four) => *four = [dice.roll().to_le_bytes()[0]; 4],
        Wire::Bytes(content) => match dice.below(6) {
            0 => content.truncate(dice.below(content.len())),
            1 => content.resize(content.len() + dice.below(GROWTH_BYTES), 0),
            2 => *content = whole.to_vec(), // a record inside of a record
            3 => {
                let at = dice.below(content.len() / 8) * 8;
                let word = telling_number(0, dice).to_le_bytes();
                content.iter_mut().skip(at).zip(word).for_each(|(byte, new)| *byte = new);
            }
            _ => change_raw(content, content.len() + GROWTH_BYTES, raw),
        },
    }
}

fn change_chunks(stream: &mut Stream, dice: &mut Dice, raw: Raw<'_>) {
    let chunks = &mut stream.chunks;
    if chunks.is_empty() {
        return;
    }
    let (at, other) = (dice.below(chunks.len()), dice.below(chunks.len()));
    match dice.below(16) {
        0 => drop(chunks.remove(at)),
        1 => {
            let again = chunks[at].clone();
            chunks.insert(other, again);
        }
        2 => chunks.swap(at, other),
        3 => {
            chunks[at].kind = match dice.below(3) {
                0 => chunks[other].kind,
                1 => u16::try_from(dice.below(200)).unwrap(),
                _ => u16_at(&dice.roll().to_le_bytes(), 0),
            }
        }
        4 => chunks[at].version = u16::try_from(dice.below(4)).unwrap(),
        5 => chunks[at].mandatory ^= true,
        6 => chunks[at].last ^= true,
        7 => chunks[at].message = chunks[other].message.clone(),
        _ => change_message(&mut chunks[at].message, dice, raw),
    }
}

/// Places of the header that mean something, and bytes there.
const HEADER_FIELDS: [(usize, usize); 10] =
    [(12, 2), (14, 2), (16, 2), (18, 2), (20, 2), (22, 2), (24, 4), (28, 4), (32, 8), (40, 4)];

fn change_header(header: &mut [u8], dice: &mut Dice) {
    let rows = header.len().saturating_sub(132) / 32;
    let (at, bytes) = match dice.below(4) {
        0 => (48 + dice.below(80), 1),
        1 if rows != 0 => (128 + 32 * dice.below(rows) + dice.below(8) / 2 * 2, 2),
        _ => HEADER_FIELDS[dice.below(HEADER_FIELDS.len())],
    };
    let Some(room) = header.get_mut(at..at + bytes) else { return };
    let number = telling_number(u64::from(room[0]), dice).to_le_bytes();
    room.copy_from_slice(&number[..bytes]);
}

/// Changes the `used` bytes at the start of `data`, of which all may be used, and returns how many are
/// then.
pub fn mutate(data: &mut [u8], used: usize, seed: u32, raw: Raw<'_>) -> usize {
    let most = data.len();
    let mut dice = Dice::new(u64::from(seed));
    let mut streams = take_apart(&data[..used]);
    if streams.is_empty() || dice.once_in(16) {
        return raw(data, used, most);
    }
    for _ in 0..=dice.below(3) {
        let (at, other) = (dice.below(streams.len()), dice.below(streams.len()));
        match dice.below(24) {
            0 if streams.len() > 1 => drop(streams.remove(at)),
            1 if streams.len() > 1 => streams.swap(at, other),
            2 if streams.len() > 1 => {
                let again = streams[at].clone();
                streams.insert(other, again);
            }
            3 | 4 => change_header(&mut streams[at].header, &mut dice),
            _ => change_chunks(&mut streams[at], &mut dice, raw),
        }
    }
    let totals = !dice.once_in(8);
    let changed = put_together(&streams, totals);
    match data.get_mut(..changed.len()) {
        Some(room) => {
            room.copy_from_slice(&changed);
            changed.len()
        }
        None => raw(data, used, most),
    }
}

/// As [`mutate`], for a message alone behind one byte that says of which kind it is.
pub fn mutate_message(data: &mut [u8], used: usize, seed: u32, raw: Raw<'_>) -> usize {
    let most = data.len();
    let mut dice = Dice::new(u64::from(seed));
    let Some((_, message)) = data[..used].split_first().filter(|_| !dice.once_in(16)) else {
        return raw(data, used, most);
    };
    let mut changed = message.to_vec();
    change_message(&mut changed, &mut dice, raw);
    match data.get_mut(1..=changed.len()) {
        Some(room) => {
            room.copy_from_slice(&changed);
            changed.len() + 1
        }
        None => raw(data, used, most),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::made;

    #[test]
    fn what_is_taken_apart_is_put_together_again() {
        for (name, state) in made() {
            let streams = take_apart(&state);
            assert_eq!(put_together(&streams, false), state, "{name}");
            for part in streams.iter().flat_map(|stream| &stream.chunks) {
                assert_eq!(message(&fields(&part.message).unwrap()), part.message);
            }
        }
    }

    /// A flip of one bit, as a fuzzer that knows nothing does it.
    fn flip(bytes: &mut [u8], used: usize, _: usize) -> usize {
        if let Some(byte) = bytes[..used].last_mut() {
            *byte ^= 1;
        }
        used
    }

    /// Most of what comes out has the right framing: that is what the mutator is for.
    #[test]
    fn most_changes_get_past_the_framing() {
        let (_, state) = made().find(|(name, _)| *name == "both-ways").unwrap();
        let mut past = 0;
        for seed in 0..1000 {
            let mut data = state.clone();
            data.resize(state.len() + 4096, 0);
            let used = mutate(&mut data, state.len(), seed, &mut flip);
            let refused = crate::channel::parts(&data[..used]);
            let framing = matches!(refused, Err(saved_state::ReadError::Damaged { .. }));
            past += u32::from(!framing);
        }
        assert!(past > 500, "{past} of 1000");
    }
}
