//! What is fuzzed: one function for each decoder, given any bytes.
//!
//! Each checks what has to hold whatever the bytes: an error and no panic, nothing left behind by a
//! restore that failed, and the same state again from one that did not.

use std::cell::RefCell;
use std::io::Read as _;

use kmcl::{ChannelState, Guid, Save as _};
use kmcl_vmm::memory::{Form, MemoryIndex};
use saved_state::bus::{
    BUS_CHANNEL, BUS_CONNECTION, BUS_GPADL, BUS_HOST, BUS_HVSOCK, BUS_MESSAGE, BUS_RAM,
    BusChannelRecord, BusConnectionRecord, BusGpadlRecord, BusHostRecord, BusHvsockRecord,
    BusMessageRecord, BusRamRecord,
};
use saved_state::channel::{
    CHANNEL, ChannelRecord, INCOMING_PACKET, IncomingPacketRecord, OUTGOING_PACKET,
    OutgoingPacketRecord,
};
use saved_state::contents::{
    CONTENTS, ContentsRecord, STREAM_ENTRY, STREAM_SUM, StreamEntryRecord, StreamSumRecord,
};
use saved_state::end::{END, EndRecord};
use saved_state::file::{FileReader, check};
use saved_state::input::ChunkInput;
use saved_state::inspect::{ALL_KINDS, PacketRow, Sizes, What, inspect, inspect_file};
use saved_state::integration::{
    HEARTBEAT, HeartbeatRecord, INTEGRATION_SERVICE, IntegrationServiceRecord, SHUTDOWN_REQUEST,
    ShutdownRequestRecord,
};
use saved_state::machine::{
    MACHINE, MachineRecord, PARTITION, PROCESSOR, PartitionRecord, ProcessorRecord, SYNIC,
    SynicRecord,
};
use saved_state::memory::{
    MEMORY_FILE, MEMORY_PARTS, MEMORY_REGION, MemoryFileRecord, MemoryPartsRecord,
    MemoryRegionRecord,
};
use saved_state::sockets::{SOCKET_CONNECTION, SOCKETS, SocketConnectionRecord, SocketsRecord};
use saved_state::storage::{
    DISK_IDENTITY, DiskIdentityRecord, STORAGE, STORAGE_REQUEST, StorageRecord,
    StorageRequestRecord,
};
use saved_state::text::Producer;
use saved_state::transport::{TRANSPORT, TRANSPORT_REGION, TransportRecord, TransportRegionRecord};
use saved_state::{
    Decode, Encode, FormatVersion, HeaderFlags, Step, StreamHeader, StreamInfo, StreamKind,
    StreamReader, StreamWriter, bare,
};
use vmbus_host::{Host, HostRestore};

use crate::channel::{self, Server, Setup};
use crate::guest::{Rings, Standing};
use crate::{integration, mutate, storage};

/// A target of the fuzzer.
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// What is done with the bytes.
    pub run: fn(&[u8]),
    /// How they are changed.
    pub mutate: fn(&mut [u8], usize, u32, mutate::Raw<'_>) -> usize,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "file", run: file, mutate: mutate::mutate },
    Target { name: "stream", run: stream, mutate: mutate::mutate },
    Target { name: "record", run: record, mutate: mutate::mutate_message },
    Target { name: "channel", run: channel, mutate: mutate::mutate },
    Target { name: "bus", run: bus, mutate: mutate::mutate },
    Target { name: "storage", run: storage, mutate: mutate::mutate },
    Target { name: "transport", run: transport, mutate: mutate::mutate },
    Target { name: "integration", run: integration::state, mutate: mutate::mutate },
    Target { name: "integration_guest", run: integration::guest, mutate: mutate::mutate },
    Target { name: "machine", run: machine, mutate: mutate::mutate },
    Target { name: "memory_index", run: memory_index, mutate: mutate::mutate },
    Target { name: "round_trip", run: round_trip, mutate: mutate::mutate },
];

/// A whole file: read, checked, and walked through.
pub fn file(data: &[u8]) {
    let checked = check(data, ALL_KINDS);
    let mut at = 0;
    let mut damage = None;
    let mut sizes = Sizes::default();
    for found in inspect_file(data, ALL_KINDS) {
        assert_eq!(found.piece.offset, at);
        at += found.piece.length;
        if let What::Record(record) = &found.piece.what {
            let shown: usize =
                record.fields.clone().flatten().map(|it| it.value.to_string().len()).sum();
            assert!(shown < 1 << 23);
            if let Some(own) = PacketRow::of(record).and_then(|row| row.own_record()) {
                assert!(own.fields.flatten().count() < 1 << 20);
            }
        }
        sizes.add(&found.piece);
        damage = damage.or(found.piece.damage.map(|it| it.to_string()));
        damage = damage.or(found.misplaced.map(|it| it.to_string()));
    }
    assert_eq!(at, data.len() as u64);
    assert_eq!(sizes.rows().iter().map(|row| row.bytes).sum::<u64>(), at);
    if checked.is_ok() {
        assert_eq!(damage, None, "a file that is whole");
    }
    let Ok(mut reader) = FileReader::new(data) else { return };
    while let Ok(Some(mut stream)) = reader.next_stream() {
        let offset = usize::try_from(stream.offset()).unwrap();
        let mut bytes = Vec::new();
        let _cut_or_whole = stream.read_to_end(&mut bytes);
        assert!(data[offset..].starts_with(&bytes));
    }
    let finished = reader.finish();
    assert!(finished.is_ok() || checked.is_err(), "{finished:?}");
}

/// One stream of any kind: read, and walked through.
pub fn stream(data: &[u8]) {
    let header = StreamHeader::read(data);
    let mut whole = false;
    if let Ok(header) = &header {
        let mut reader = StreamReader::new(header.info.stream, ALL_KINDS);
        let mut input = data;
        let read = loop {
            match reader.read(&mut input) {
                Ok(Some(chunk)) => {
                    if chunk.check().is_err() {
                        break false;
                    }
                }
                Ok(None) => break reader.finish().is_ok(),
                Err(error) => {
                    assert!(!error.to_string().is_empty());
                    break false;
                }
            }
        };
        whole = read;
    }
    let mut at = 0;
    let mut damaged = false;
    for piece in inspect(data, ALL_KINDS) {
        assert_eq!(piece.offset, at);
        at += piece.length;
        damaged |= piece.damage.is_some();
    }
    assert_eq!(at, data.len() as u64);
    assert!(!whole || !damaged, "a stream that is whole");
    let mut chunks = ChunkInput::new(data);
    let mut at = 0;
    while let Ok(Some(chunk)) = chunks.next() {
        assert_eq!(*chunk, data[at..at + chunk.len()]);
        at += chunk.len();
    }
    assert!(!whole || chunks.is_complete());
}

/// A message of the kind that the first byte says: what is decoded can be written, and is the same then.
pub fn record(data: &[u8]) {
    let Some((&number, message)) = data.split_first() else { return };
    let info = ALL_KINDS[usize::from(number) % ALL_KINDS.len()];
    let checked = (info.check)(message).is_ok();
    // What is decoded is what is checked; and it is the same once it was written again.
    macro_rules! again {
        ($($kind:ident: $record:ty),* $(,)?) => {
            match info.kind {
                $($kind => match <$record as Decode<'_>>::decode(message) {
                    Ok(record) => {
                        assert!(checked, "decoded, and not checked: {record:?}");
                        let mut bytes = vec![0; Encode::encoded_len(&record)];
                        Encode::encode(&record, &mut bytes).unwrap();
                        assert_eq!(<$record as Decode<'_>>::decode(&bytes), Ok(record));
                    }
                    Err(why) => assert!(!checked, "checked, and not decoded: {why}"),
                },)*
                kind => panic!("no record for kind {kind}"),
            }
        };
    }
    again! {
        END: EndRecord,
        CONTENTS: ContentsRecord,
        STREAM_ENTRY: StreamEntryRecord,
        STREAM_SUM: StreamSumRecord,
        CHANNEL: ChannelRecord,
        OUTGOING_PACKET: OutgoingPacketRecord<'_>,
        INCOMING_PACKET: IncomingPacketRecord<'_>,
        BUS_HOST: BusHostRecord,
        BUS_RAM: BusRamRecord,
        BUS_CONNECTION: BusConnectionRecord,
        BUS_CHANNEL: BusChannelRecord<'_>,
        BUS_GPADL: BusGpadlRecord<&[u8]>,
        BUS_HVSOCK: BusHvsockRecord,
        BUS_MESSAGE: BusMessageRecord<'_>,
        STORAGE: StorageRecord,
        DISK_IDENTITY: DiskIdentityRecord,
        STORAGE_REQUEST: StorageRequestRecord,
        TRANSPORT: TransportRecord,
        TRANSPORT_REGION: TransportRegionRecord,
        MACHINE: MachineRecord,
        PARTITION: PartitionRecord,
        PROCESSOR: ProcessorRecord,
        SYNIC: SynicRecord,
        MEMORY_FILE: MemoryFileRecord,
        MEMORY_REGION: MemoryRegionRecord,
        MEMORY_PARTS: MemoryPartsRecord,
        INTEGRATION_SERVICE: IntegrationServiceRecord,
        HEARTBEAT: HeartbeatRecord,
        SHUTDOWN_REQUEST: ShutdownRequestRecord,
        SOCKETS: SocketsRecord,
        SOCKET_CONNECTION: SocketConnectionRecord,
    }
    let _refused_or_not = bare::decode::<StorageRequestRecord>(message);
}

// ---- Channels -------------------------------------------------------------------------------------------

/// A channel that waits for a state. One that has refused a state is as it was, and takes the next one.
struct Waiting {
    server: Server,
    rings: Option<Rings>,
    setup: (Setup, Standing),
}

/// Channels that wait at a time, each set up otherwise: making one takes longer than giving it a state.
const WAITING_CHANNELS: usize = 8;

std::thread_local! {
    static WAITING: RefCell<Vec<Waiting>> = const { RefCell::new(Vec::new()) };
}

/// The channel that waits with that setup.
fn take_waiting(setup: &(Setup, Standing)) -> Option<Waiting> {
    WAITING.with_borrow_mut(|waiting| {
        let at = waiting.iter().position(|waiting| waiting.setup == *setup);
        at.map(|at| waiting.remove(at))
    })
}

/// Has a channel wait again; of too many, the one that has waited longest ends.
fn put_waiting(one: Waiting) {
    let over = WAITING.with_borrow_mut(|waiting| {
        waiting.push(one);
        (waiting.len() > WAITING_CHANNELS).then(|| waiting.remove(0))
    });
    drop(over);
}

/// Setups that a channel may ask for: as large as a fuzzer can afford.
fn setup_of(data: &[u8]) -> Option<(Setup, Standing)> {
    let mut input = data;
    let header = StreamHeader::read(data).ok()?;
    let mut reader = StreamReader::new(header.info.stream, saved_state::channel::KINDS);
    let record = reader.read(&mut input).ok()??.decode().ok();
    let record: ChannelRecord = record?;
    let own = Setup::of(&record);
    let usual = Setup { pipe: record.pipe, ..Setup::default() };
    let pages = 2..=33;
    let setup = Setup {
        packets: if own.packets <= 512 { own.packets.max(1) } else { usual.packets },
        pages: if pages.contains(&own.pages.0) && pages.contains(&own.pages.1) {
            own.pages
        } else {
            usual.pages
        },
        external: if record.pipe { (0, 0) } else { usual.external },
        ..usual
    };
    let index = |index: u32, pages: u32| if index < (pages - 1) * 4096 { index / 8 * 8 } else { 0 };
    let standing = Standing {
        read_index: index(record.read_index, setup.pages.0),
        write_index: index(record.write_index, setup.pages.1),
        resumed: true,
    };
    Some((setup, standing))
}

/// Restores `data` into a channel that is open, or was not opened; `act` is done with one that took it.
fn restore_into_a_channel(data: &[u8], act: impl FnOnce(&Server, Rings, &[u8])) {
    let setup = setup_of(data).unwrap_or_default();
    let Waiting { server, rings, setup } = take_waiting(&setup).unwrap_or_else(|| {
        let server = Server::new(setup.0);
        let rings = Some(server.open(setup.1));
        Waiting { server, rings, setup }
    });
    let before = server.channel.state();
    assert_eq!(before, ChannelState::Paused);
    let mut rest = data;
    match server.channel.restore_from(&mut rest) {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            server.assert_untouched(before);
            drop(server.take_ended()); // packets restored by a part of it were cancelled
            put_waiting(Waiting { server, rings, setup });
        }
        Ok(()) => {
            act(&server, rings.unwrap(), &data[..data.len() - rest.len()]);
            server.assert_ends();
        }
    }
}

/// A channel's state: what a channel takes goes on, and ends without anything left.
pub fn channel(data: &[u8]) {
    restore_into_a_channel(data, |server, mut rings, _| {
        server.channel.start();
        server.run();
        for taken in rings.take() {
            if taken.wants_completion {
                rings.complete(taken.transaction_id, b"done");
            }
        }
        server.run();
        drop(server.take_resumed());
    });
}

/// What a channel takes, it saves again as the same.
pub fn round_trip(data: &[u8]) {
    restore_into_a_channel(data, |server, _rings, state| {
        let saved = server.save();
        let (before, after) = (channel::parts(state).unwrap(), channel::parts(&saved).unwrap());
        channel::assert_same(&before, &after);
    });
}

// ---- Buses ----------------------------------------------------------------------------------------------

/// A bus's state: what a host takes, it saves again, and what that gives is the same host.
pub fn bus(data: &[u8]) {
    let whole = Host::restore(data);
    // Chunk by chunk it is the same.
    let mut restore = HostRestore::new();
    let mut input = ChunkInput::new(data);
    let mut fed = Ok(());
    while let (Ok(()), Ok(Some(chunk))) = (&fed, input.next()) {
        fed = restore.feed(chunk);
    }
    match (whole, fed.and_then(|()| restore.finish())) {
        (Ok(host), Ok(again)) => {
            assert_eq!(host, again);
            crate::bus::assert_goes_on(data);
        }
        (Err(error), _) => assert!(!error.to_string().is_empty()),
        (Ok(_), Err(error)) => panic!("whole, and not chunk by chunk: {error}"),
    }
}

// ---- Devices and transports -------------------------------------------------------------------------------

/// A controller's state apart from its channels: a controller with those disks and channels, or an error.
pub fn storage(data: &[u8]) {
    match storage::restoring(data) {
        Ok(restoring) => {
            assert!((1..=65).contains(&restoring.channels()));
            assert!(restoring.enable().is_err() || restoring.disks().is_empty());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A transport's state.
pub fn transport(data: &[u8]) {
    let checked = vmbus_unix::check_saved_transport(data);
    if let Err(error) = checked {
        assert!(!error.to_string().is_empty());
    }
}

// ---- Machines and their memory ------------------------------------------------------------------------------

/// Where the records of a machine's state end, if it is whole.
fn records_of_a_machine(data: &[u8]) -> Option<usize> {
    let mut reader = StreamReader::new(StreamKind::MACHINE, saved_state::machine::KINDS);
    let mut input = ChunkInput::new(data);
    let (mut at, mut end) = (0, 0);
    while let Some(mut bytes) = input.next().ok()? {
        at += bytes.len();
        if let Some(chunk) = reader.read(&mut bytes).ok()? {
            chunk.check().ok()?;
            end = at;
        }
    }
    reader.finish().ok().map(|()| end)
}

/// A machine's state: the records, each in its place. A fuzzer is not to reach the KVM of its host: a state
/// that is whole is cut before its end, where all records have been taken.
pub fn machine(data: &[u8]) {
    let data = match records_of_a_machine(data) {
        Some(end) => &data[..end],
        None => data,
    };
    let error = crate::machine::restored(data);
    assert!(matches!(error, kmcl_vmm::Error::State(_)), "{error}");
    assert!(!error.to_string().is_empty());
}

/// An index of memory: what is taken is written again as the same.
pub fn memory_index(data: &[u8]) {
    match MemoryIndex::read(data) {
        Ok(index) => {
            let mut again = Vec::new();
            let producer = Producer::new("fuzz").unwrap();
            index.save(FormatVersion::NEWEST, producer).unwrap().write_to(&mut again).unwrap();
            assert_eq!(MemoryIndex::read(&again[..]).unwrap(), index);
            assert_eq!(index.memory_bytes() % kmcl_vmm::memory::PART_BYTES, 0);
            assert!(index.form() == Form::Zstd || index.file_bytes() == index.memory_bytes());
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The state of a transport with a guest, to begin a corpus with. A real one takes two processes.
#[must_use]
pub fn transport_state() -> Vec<u8> {
    let info = StreamInfo {
        stream: StreamKind::TRANSPORT,
        flags: HeaderFlags::default(),
        interface_type: Guid::ZERO,
        interface_instance: Guid::ZERO,
        producer: Producer::new("corpus").unwrap(),
        chunks: 0,
        bytes: 0,
        items: 1,
    };
    let kinds = saved_state::transport::KINDS;
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, kinds).unwrap();
    let connection = TransportRecord {
        guest: true,
        connection_id: vec![7; 16],
        epoch: 1,
        posts: 5,
        messages: 6,
        doorbells: vec![1],
        regions: 1,
        ..TransportRecord::default()
    };
    let region =
        TransportRegionRecord { len: 1 << 24, inode: 9, ..TransportRegionRecord::default() };
    let mut state = vec![0; 4096];
    let mut filled = 0;
    while !writer.is_ended() {
        let room = &mut state[filled..];
        let step = match writer.chunks() {
            0 => writer.header(room),
            1 => writer.record(&connection, room),
            2 => writer.record(&region, room),
            _ => writer.end(room),
        };
        let Step::Written { bytes } = step.unwrap() else { panic!("no room") };
        filled += bytes;
    }
    state.truncate(filled);
    state
}
