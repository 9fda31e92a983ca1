//! What a save and a restore allocate, counted.
#![expect(unsafe_code, reason = "an allocator that counts has to be an allocator")]
#![expect(
    clippy::unwrap_used,
    reason = "a test stops at the first surprise, in its helpers as well"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kmcl::bus::Offer;
use saved_state::bus::{
    AfterEnd, BusChannelRecord, BusConnectionRecord, BusHostRecord, BusHvsockRecord,
    BusMessageRecord, BusRamRecord, ConnectionStep, KINDS, OfferStep, OpenStep,
};
use saved_state::record::Encode;
use saved_state::text::Producer;
use saved_state::{FormatVersion, HeaderFlags, Save, Step, StreamInfo, StreamKind, StreamWriter};
use vmbus_host::limits::{RESTORED_BYTES, RESTORED_BYTES_PER_BYTE};
use vmbus_host::{Config, GuestShape, Host, OfferParams, RamMap, SaveOptions};
use vmbus_wire::guid::Guid;
use vmbus_wire::message::gpadl::GpadlMessages;
use vmbus_wire::message::{GuestMessage, InitiateContact};
use vmbus_wire::ranges::GpaRanges;
use vmbus_wire::version::Version;

struct Counting;

std::thread_local! {
    /// Of this thread alone: the test harness has others.
    static IN_USE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator, unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.set(IN_USE.get().wrapping_add(layout.size()));
        PEAK.set(PEAK.get().max(IN_USE.get()));
        // SAFETY: the caller keeps the promises that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        IN_USE.set(IN_USE.get().wrapping_sub(layout.size()));
        // SAFETY: `ptr` came from `System`, as `alloc` shows, with the same layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Most bytes in use at a time while `work` runs, beyond those that were before.
fn peak<T>(work: impl FnOnce() -> T) -> (usize, T) {
    // From 1 TiB on: what is freed that was there before does not wrap around.
    const BASE: usize = 1 << 40;
    IN_USE.set(BASE);
    PEAK.set(BASE);
    let result = work();
    (PEAK.get() - BASE, result)
}

/// Restores, whatever comes of it, and holds the memory that takes against the bytes.
#[track_caller]
fn restores_within_the_bound(bytes: &[u8]) -> bool {
    let (peak, restored) = peak(|| Host::restore(bytes).is_ok());
    let most = RESTORED_BYTES_PER_BYTE * bytes.len() + RESTORED_BYTES;
    assert!(peak <= most, "{peak} bytes for {}, at most {most}", bytes.len());
    restored
}

/// A host whose guest has described `pages` pages to each of `channels` channels.
fn host(channels: u32, pages: u64) -> Host {
    let ram = RamMap::new([(0, 64 << 20)]);
    let mut host = Host::new(Config::default(), GuestShape { vp_count: 1, ram });
    let mut effects = Vec::new();
    for number in 0..channels {
        let offer = Offer::new(Guid::from_u128(1), Guid::from_fields(number, 0, 0, [0; 8]));
        host.offer(OfferParams::try_from(&offer).unwrap()).unwrap();
    }
    let contact = InitiateContact::with_interrupt_page(Version::V4_1, 0, 0);
    let mut say = |host: &mut Host, message: &[u8]| {
        host.guest_message(1, message, &mut effects).unwrap();
        while let Some(serial) = host.next_message(&[]).map(|next| next.serial) {
            host.message_taken(serial);
        }
    };
    say(&mut host, &GuestMessage::InitiateContact(contact).to_buffer());
    say(&mut host, &GuestMessage::RequestOffers.to_buffer());
    for channel in 1..=channels {
        if pages != 0 {
            let words: Vec<u64> = [pages * 4096].into_iter().chain(0..pages).collect();
            let ranges = GpaRanges::parse(&words, 1).unwrap();
            for message in GpadlMessages::new(channel, channel, ranges).unwrap() {
                say(&mut host, &message);
            }
        }
    }
    host
}

#[test]
fn a_save_takes_no_memory_but_its_buffer() {
    for (channels, pages) in [(1, 8), (500, 600)] {
        let host = host(channels, pages);
        let mut buffer = vec![0; 8 << 10];
        let (bytes, chunks) = peak(|| {
            let mut save = host.save(&SaveOptions::default()).unwrap();
            let mut steps = 1;
            while !save.step(&mut buffer).unwrap().done {
                steps += 1;
            }
            steps
        });
        assert_eq!(bytes, 0, "{channels} channels, {chunks} steps");
    }
}

#[test]
fn a_restore_takes_no_more_than_the_multiple_of_its_bytes() {
    for (channels, pages) in [(0, 0), (1, 1), (1, 4000), (2000, 0), (2000, 1), (500, 100)] {
        let mut bytes = Vec::new();
        host(channels, pages).save(&SaveOptions::default()).unwrap().write_to(&mut bytes).unwrap();
        assert!(restores_within_the_bound(&bytes), "{channels} channels of {pages} pages");
    }
}

/// A stream of these records.
fn stream(host: BusHostRecord, lists: impl FnOnce(&mut dyn FnMut(&dyn Record))) -> Vec<u8> {
    let info = StreamInfo {
        stream: StreamKind::BUS,
        flags: HeaderFlags::default(),
        interface_type: Guid::ZERO,
        interface_instance: Guid::ZERO,
        producer: Producer::EMPTY,
        chunks: 0,
        bytes: 0,
        items: 0,
    };
    let mut writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS).unwrap();
    let (mut bytes, mut room) = (Vec::new(), [0; 4096]);
    let mut put = |step, room: &[u8]| {
        if let Step::Written { bytes: count } = step {
            bytes.extend(room.get(..count).unwrap_or_default());
        }
    };
    put(writer.header(&mut room).unwrap(), &room);
    put(writer.record(&host, &mut room).unwrap(), &room);
    lists(&mut |record| put(record.write(&mut writer, &mut room), &room));
    put(writer.end(&mut room).unwrap(), &room);
    bytes
}

/// A record of any kind.
trait Record {
    fn write(&self, writer: &mut StreamWriter, room: &mut [u8]) -> Step;
}

impl<R: Encode> Record for R {
    fn write(&self, writer: &mut StreamWriter, room: &mut [u8]) -> Step {
        writer.record(self, room).unwrap()
    }
}

fn with_channels(channels: u32) -> BusHostRecord {
    BusHostRecord {
        newest_version: Version::LATEST.to_wire(),
        vp_count: 1,
        connection: ConnectionStep::Connected,
        offers_made: channels.into(),
        last_channel_id: channels,
        channels,
        ..BusHostRecord::default()
    }
}

/// The shortest records there are, as many as are let through.
#[test]
fn short_records_take_no_more_than_the_multiple_either() {
    let host = BusHostRecord {
        newest_version: Version::LATEST.to_wire(),
        vp_count: 1,
        connection: ConnectionStep::Disconnecting,
        after_end: AfterEnd::Nothing,
        last_message: 1 << 40,
        last_serial: 1 << 40,
        ..BusHostRecord::default()
    };
    // Just behind a doubling, where most room is free.
    for count in [1, 100, 1025, 2049, 4000] {
        let messages = stream(BusHostRecord { messages: count, ..host }, |put| {
            for serial in 1..=u64::from(count) {
                put(&BusMessageRecord { serial, message: &[1], ..BusMessageRecord::default() });
            }
        });
        restores_within_the_bound(&messages);
        let runs = stream(BusHostRecord { ram_runs: count, ..host }, |put| {
            for at in 0..u64::from(count) {
                put(&BusRamRecord { first_pfn: 2 * at, end_pfn: 2 * at + 1 });
            }
        });
        restores_within_the_bound(&runs);
        let requests = stream(BusHostRecord { hvsock_requests: count.min(128), ..host }, |put| {
            for id in 1..=u64::from(count.min(128)) {
                put(&BusHvsockRecord { id, ..BusHvsockRecord::default() });
            }
        });
        restores_within_the_bound(&requests);
        let channels = stream(with_channels(count.min(2047)), |put| {
            put(&BusConnectionRecord { version: Version::V4_1.to_wire(), ..Default::default() });
            for channel_id in 1..=count.min(2047) {
                put(&BusChannelRecord {
                    offer: channel_id.into(),
                    channel_id,
                    offer_step: OfferStep::Rescinded,
                    open_step: OpenStep::Closed,
                    ..BusChannelRecord::default()
                });
            }
        });
        assert!(restores_within_the_bound(&channels));
    }
}

#[test]
fn counts_that_are_claimed_take_nothing() {
    let host = BusHostRecord {
        newest_version: Version::LATEST.to_wire(),
        connection: ConnectionStep::Disconnected,
        ram_runs: 4096,
        channels: 2047,
        gpadls: 8188,
        hvsock_requests: 128,
        messages: 10_000,
        ..BusHostRecord::default()
    };
    assert!(!restores_within_the_bound(&stream(host, |_| ())));
}
