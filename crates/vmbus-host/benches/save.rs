//! What saving and restoring a bus costs: 128 open channels, each with its rings in a GPADL of 512 pages
//! that are nowhere in a row, through buffers of 64 KiB.
//!
//! The limits are those of a machine that copies 4 KiB in 60 ns; here they are scaled by what a copy
//! takes in the same run. Beside it, what no save of these bytes can do without: one copy, one checksum.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kmcl::bus::Offer;
use saved_state::Save;
use vmbus_host::{
    Config, Effect, GuestShape, Host, HostRestore, MESSAGE_CONNECTION, OfferParams, RamMap,
    SaveOptions,
};
use vmbus_wire::guid::Guid;
use vmbus_wire::message::gpadl::GpadlMessages;
use vmbus_wire::message::{GuestMessage, InitiateContact, OpenChannel};
use vmbus_wire::ranges::GpaRanges;
use vmbus_wire::status::NtStatus;
use vmbus_wire::version::Version;

const CHANNELS: u32 = 128;
const PAGES: u64 = 512;
const BUFFER: usize = 64 << 10;
const ROUNDS: usize = 2000;

/// Of the machine for which the limits are meant: a copy of 4 KiB, in ns.
const REFERENCE_COPY_NS: f64 = 60.0;
const SAVE_LIMIT_NS: f64 = 100_000.0;
const RESTORE_LIMIT_NS: f64 = 250_000.0;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A host whose guest has opened every channel.
fn host() -> Outcome<Host> {
    let pages = PAGES * u64::from(CHANNELS);
    let ram = RamMap::new([(0, (2 * pages) << 12)]);
    let mut host = Host::new(Config::default(), GuestShape { vp_count: 4, ram });
    let mut effects: Vec<Effect> = Vec::new();
    let mut offers = Vec::new();
    for number in 0..CHANNELS {
        let instance = Guid::from_fields(number, 0, 0, [0; 8]);
        let offer = Offer::new(Guid::from_u128(1), instance);
        offers.push(host.offer(OfferParams::try_from(&offer)?)?);
    }
    let contact = InitiateContact::with_interrupt_page(Version::V4_1, 0, 0);
    let mut post = |host: &mut Host, message: &[u8]| {
        host.guest_message(MESSAGE_CONNECTION, message, &mut effects)?;
        while let Some(serial) = host.next_message(&[]).map(|next| next.serial) {
            host.message_taken(serial);
        }
        Outcome::Ok(())
    };
    post(&mut host, &GuestMessage::InitiateContact(contact).to_buffer())?;
    post(&mut host, &GuestMessage::RequestOffers.to_buffer())?;
    for channel_id in 1..=CHANNELS {
        // No two neighbours are neighbours in memory; 5 shares no factor with the number of pages.
        let first = u64::from(channel_id - 1) * PAGES;
        let pfns = (first..first + PAGES).map(|page| page * 5 % pages * 2);
        let words: Vec<u64> = [PAGES * 4096].into_iter().chain(pfns).collect();
        let ranges = GpaRanges::parse(&words, 1)?;
        for message in GpadlMessages::new(channel_id, channel_id, ranges)? {
            post(&mut host, &message)?;
        }
        let open = OpenChannel {
            channel_id: channel_id.into(),
            open_id: 7.into(),
            ring_gpadl_id: channel_id.into(),
            target_vp: 1.into(),
            downstream_page_offset: 256.into(),
            user_data: [3; 120],
        };
        post(&mut host, &GuestMessage::OpenChannel(open).to_buffer())?;
    }
    for offer in offers {
        host.open_result(offer, NtStatus::SUCCESS, &mut effects);
    }
    while let Some(serial) = host.next_message(&[]).map(|next| next.serial) {
        host.message_taken(serial);
    }
    let usage = host.usage();
    assert_eq!((usage.gpadl_pages, usage.held), (pages, CHANNELS as usize));
    assert!(host.violations().is_empty());
    Ok(host)
}

/// Saves into buffers, all of which exist before.
fn save(host: &Host, buffers: &mut [(Vec<u8>, usize)]) -> Outcome<Duration> {
    let begun = Instant::now();
    let mut save = host.save(&SaveOptions::default())?;
    for (buffer, filled) in buffers {
        let step = save.step(buffer)?;
        *filled = step.written;
        if step.done {
            return Ok(begun.elapsed());
        }
    }
    Err("too few buffers".into())
}

fn restore(buffers: &[(Vec<u8>, usize)]) -> Outcome<(Duration, Host)> {
    let begun = Instant::now();
    let mut restore = HostRestore::new();
    for (buffer, filled) in buffers {
        restore.feed(buffer.get(..*filled).unwrap_or_default())?;
    }
    let host = restore.finish()?;
    Ok((begun.elapsed(), host))
}

/// One copy of 4 KiB that is in the cache, in ns.
fn copy_ns() -> f64 {
    const COPIES: u32 = 1000;
    let (from, mut to) = ([1_u8; 4096], [0_u8; 4096]);
    let begun = Instant::now();
    for _ in 0..COPIES {
        black_box(&mut to).copy_from_slice(black_box(&from));
    }
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(COPIES)
}

fn copy_and_sum(stream: &[u8], room: &mut [u8]) -> Duration {
    let begun = Instant::now();
    black_box(&mut *room).copy_from_slice(black_box(stream));
    black_box(crc32c::crc32c(black_box(room)));
    begun.elapsed()
}

/// The lower quartile: what is not disturbed by others on the machine.
fn quartile(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times.get(times.len() / 4).copied().unwrap_or_default()
}

fn main() -> Outcome<()> {
    let rounds = if std::env::args().any(|arg| arg == "--short") { 200 } else { ROUNDS };
    let host = host()?;
    let mut buffers = vec![(vec![0; BUFFER], 0); 16];
    save(&host, &mut buffers)?;
    let stream = buffers.iter().flat_map(|(bytes, filled)| bytes.iter().take(*filled));
    let stream: Vec<u8> = stream.copied().collect();
    let mut room = vec![0; stream.len()];
    let (mut saves, mut restores, mut copies, mut least) = (vec![], vec![], vec![], vec![]);
    for _ in 0..rounds {
        copies.push(copy_ns());
        saves.push(save(&host, &mut buffers)?.as_secs_f64() * 1e9);
        least.push(copy_and_sum(&stream, &mut room).as_secs_f64() * 1e9);
        let (took, restored) = restore(&buffers)?;
        restores.push(took.as_secs_f64() * 1e9);
        assert_eq!(restored.usage(), host.usage());
    }
    let copy = quartile(copies);
    let scale = copy / REFERENCE_COPY_NS;
    println!("FIGURE bus/memcpy/4KiB {copy:.0} ns");
    println!("FIGURE bus/saved-state/128ch+512pages {} bytes", stream.len());
    println!("FIGURE bus/memcpy+crc32c/128ch+512pages {:.1} us", quartile(least) / 1e3);
    for (what, times, limit) in
        [("save", saves, SAVE_LIMIT_NS), ("restore", restores, RESTORE_LIMIT_NS)]
    {
        let (ours, name) = (quartile(times), format!("bus/{what}/128ch+512pages"));
        let (peer, ratio) = (limit * scale, ours / (limit * scale));
        let (scaled, limit) = (ours / scale / 1e3, limit / 1e3);
        println!("FIGURE {name}/as-if-memcpy-took-60ns {scaled:.1} us limit={limit:.0}");
        println!("RATIO {name} ours={ours:.0} peer={peer:.0} ratio={ratio:.2} limit=1.0");
    }
    Ok(())
}
