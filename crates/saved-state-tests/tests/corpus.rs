//! The corpora of the fuzzers, run as tests: what was found once stays found.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at its first surprise"
)]

use std::fs;
use std::path::{Path, PathBuf};

use kmcl::{Save, SaveStep};
use saved_state::FormatVersion;
use saved_state::file::FileWriter;
use saved_state::inspect::{ALL_KINDS, What, inspect};
use saved_state::testing::{chunk_ranges, stream_ranges};
use saved_state::text::Producer;
use saved_state_tests::golden::made;
use saved_state_tests::mutate::Dice;
use saved_state_tests::targets::{TARGETS, Target};

/// Most bytes of one entry: a corpus is read by people, and copied by every clone.
const ENTRY_BYTES: usize = 16 << 10;

fn corpus(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target.name)
}

fn entries(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = corpus(target);
    let mut paths: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn every_entry_of_every_corpus_ends_in_an_answer() {
    for target in TARGETS {
        let entries = entries(target);
        assert!(!entries.is_empty(), "no corpus for {}", target.name);
        for (path, bytes) in entries {
            assert!(bytes.len() <= ENTRY_BYTES, "{}", path.display());
            eprintln!("{}", path.display());
            (target.run)(&bytes);
        }
    }
}

/// What a fuzzer does first, without one: real states, changed by somebody who knows the format.
#[test]
fn every_target_stands_a_thousand_changes_of_real_states() {
    for target in TARGETS {
        let seeds: Vec<_> = entries(target).into_iter().map(|(_, bytes)| bytes).collect();
        let mut dice = Dice::new(2026);
        for turn in 0..1000 {
            let mut data = seeds[dice.below(seeds.len())].clone();
            let mut used = data.len();
            data.resize(used + 2048, 0);
            for _ in 0..=dice.below(2) {
                let seed = u32::try_from(dice.roll() >> 32).unwrap();
                let mut change = Dice::new(u64::from(seed));
                let mut raw = |bytes: &mut [u8], used: usize, most: usize| {
                    let len = used.min(bytes.len()).min(most);
                    if len != 0 {
                        bytes[change.below(len)] = change.roll().to_le_bytes()[0];
                    }
                    len
                };
                used = (target.mutate)(&mut data, used, seed, &mut raw);
            }
            eprintln!("{}, turn {turn}", target.name);
            (target.run)(&data[..used]);
        }
    }
}

/// A state that is there already, as something to be saved.
struct Ready(Vec<u8>, usize);

impl Save for Ready {
    type Error = std::fmt::Error;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, Self::Error> {
        let rest = &self.0[self.1..];
        let needed = match self.1 {
            0 => chunk_ranges(rest)[0].len(),
            _ => rest.len(),
        };
        if buffer.len() < needed {
            return Ok(SaveStep { written: 0, needed, done: false });
        }
        buffer[..needed].copy_from_slice(&rest[..needed]);
        self.1 += needed;
        let left = self.0.len() - self.1;
        Ok(SaveStep { written: needed, needed: left, done: left == 0 })
    }
}

fn file_of(states: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut writer = FileWriter::new(FormatVersion::NEWEST, Producer::new("corpus").unwrap());
    for ((name, state), index) in states.iter().zip(0..) {
        writer.add(name, index, Ready(state.clone(), 0));
    }
    let mut file = Vec::new();
    writer.write_to(&mut file).unwrap();
    file
}

/// Whether a state of that name is a file, of several streams.
fn is_file(name: &str) -> bool {
    ["services", "sockets", "storage"].iter().any(|it| name.starts_with(it))
}

/// Whether it is one stream of something else than a channel.
fn is_other_stream(name: &str) -> bool {
    ["bus", "machine", "memory"].iter().any(|it| name.starts_with(it))
}

/// Begins the corpora: every state that is small enough, files of several, and each message.
#[test]
#[ignore = "writes files: for a new target, or new records"]
fn begin_the_corpora() {
    let states: Vec<_> = made().collect();
    let small: Vec<_> =
        states.iter().filter(|(_, state)| state.len() <= ENTRY_BYTES).cloned().collect();
    for target in TARGETS {
        let folder = corpus(target);
        fs::create_dir_all(&folder).unwrap();
        let put = |name: &str, bytes: &[u8]| {
            if bytes.len() <= ENTRY_BYTES {
                fs::write(folder.join(name), bytes).unwrap();
            }
        };
        match target.name {
            "file" => {
                let alone: Vec<_> =
                    small.iter().filter(|(name, _)| !is_file(name)).cloned().collect();
                for (at, few) in alone.chunks(3).enumerate() {
                    put(&format!("file-{at}"), &file_of(few));
                }
                for (name, state) in small.iter().filter(|(name, _)| is_file(name)) {
                    put(name, state);
                }
                put("file-empty", &file_of(&[]));
                put(small[0].0, &small[0].1);
            }
            "record" => {
                for (name, state) in &small {
                    let first = stream_ranges(state).pop().unwrap();
                    let stream = &state[first];
                    for (number, piece) in inspect(stream, ALL_KINDS).enumerate().take(8) {
                        let What::Record(record) = piece.what else { continue };
                        let kind = ALL_KINDS.iter().position(|info| info.kind == record.kind);
                        let mut bytes = vec![u8::try_from(kind.unwrap()).unwrap()];
                        bytes.extend(record.payload);
                        put(&format!("{name}-{number}"), &bytes);
                    }
                }
                for kind in 0..ALL_KINDS.len() {
                    put(&format!("kind-{kind}"), &[u8::try_from(kind).unwrap(), 8, 1]);
                }
            }
            "bus" => {
                let of_it = small.iter().filter(|(name, _)| name.starts_with("bus"));
                of_it.for_each(|(name, state)| put(name, state));
            }
            "storage" => {
                for (name, state) in small.iter().filter(|(name, _)| name.starts_with("storage")) {
                    put(name, &state[stream_ranges(state)[1].clone()]);
                }
            }
            "integration" => {
                use saved_state::integration::{NegotiationStep, SavedShutdown};
                use saved_state_tests::integration::a_state;
                put("closed", &a_state(NegotiationStep::Closed, None));
                put("offered", &a_state(NegotiationStep::Offered, None));
                put("agreed", &a_state(NegotiationStep::Agreed, None));
                let asked = a_state(NegotiationStep::Agreed, Some(SavedShutdown::PowerOff));
                put("shutdown-asked", &asked);
                for (name, state) in small.iter().filter(|(name, _)| name.starts_with("services")) {
                    put(name, &state[stream_ranges(state)[1].clone()]);
                }
            }
            "integration_guest" => put("script", &saved_state_tests::integration::a_script()),
            "machine" | "memory_index" => {
                let prefix = target.name.trim_end_matches("_index");
                let of_it = small.iter().filter(|(name, _)| name.starts_with(prefix));
                of_it.for_each(|(name, state)| put(name, state));
            }
            "transport" => put("transport-nobody", &saved_state_tests::targets::transport_state()),
            "channel" | "round_trip" => {
                let of_it =
                    small.iter().filter(|(name, _)| !is_file(name) && !is_other_stream(name));
                of_it.for_each(|(name, state)| put(name, state));
                for (name, state) in small.iter().filter(|(name, _)| name.starts_with("storage")) {
                    put(name, &state[stream_ranges(state)[2].clone()]);
                }
            }
            _ => small.iter().for_each(|(name, state)| put(name, state)),
        }
    }
}
