//! A look at the rings themselves, from outside: every packet that either side writes, whoever reads
//! it. Transactions are counted here as the peer would see them, so that a completion which the library
//! quietly ignores is seen.

use std::collections::{BTreeMap, BTreeSet};

use vmbus_host::{HostBus, OpenState};
use vmbus_memory::GuestMemory;
use vmbus_wire::packet::{DESCRIPTOR_SIZE, PacketDescriptor, PacketHeader, PacketKind};
use vmbus_wire::ring::ControlPage;
use zerocopy::FromBytes;

use crate::log::Log;

/// Channels that are open: by channel id, and the GPADL of the rings.
type Key = (u32, u32);

/// See the module.
pub(crate) struct Wiretap {
    memory: GuestMemory,
    taps: BTreeMap<Key, Tap>,
    counts: WireCounts,
}

/// Packets that were seen in rings.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WireCounts {
    /// Packets that want a completion.
    pub transactions: u64,
    /// Completions.
    pub completions: u64,
    /// Other packets.
    pub others: u64,
}

/// The two rings of a channel.
struct Tap {
    to_host: Ring,
    to_guest: Ring,
}

/// One ring.
struct Ring {
    /// Page frames, the control page first.
    pfns: Vec<u64>,
    /// Where the next packet begins.
    at: u32,
    /// Transactions of its writer's that wait for their completion.
    waiting: BTreeSet<u64>,
}

impl Wiretap {
    pub(crate) fn new(memory: GuestMemory) -> Self {
        Self { memory, taps: BTreeMap::new(), counts: WireCounts::default() }
    }

    /// What was seen so far.
    pub(crate) fn counts(&self) -> WireCounts {
        self.counts
    }

    /// Looks at what was written since the last look. `host` says which channels are open.
    pub(crate) fn look(&mut self, host: &HostBus, log: &Log) {
        let Self { memory, taps, counts } = self;
        host.inspect(|host| {
            let open: BTreeMap<Key, _> = host
                .channels()
                .filter_map(|(offer, channel)| match &channel.open {
                    OpenState::Open(open) => {
                        Some(((channel.channel_id, open.ring_gpadl), (offer, open)))
                    }
                    _ => None,
                })
                .collect();
            taps.retain(|key, _| open.contains_key(key));
            for (key, (offer, open)) in open {
                taps.entry(key).or_insert_with(|| {
                    let pages = host.gpadl(offer, open.ring_gpadl).expect("rings lie in a GPADL");
                    let pfns: Vec<u64> =
                        pages.ranges.iter().flat_map(|range| range.pfns.iter().copied()).collect();
                    let (to_host, to_guest) = pfns.split_at(open.downstream_page_offset as usize);
                    Tap { to_host: Ring::new(to_host), to_guest: Ring::new(to_guest) }
                });
            }
        });
        for ((channel_id, _), Tap { to_host, to_guest }) in taps {
            // Within one step one side writes: which ring comes first makes no difference.
            for from in ["guest", "host"] {
                let (ring, other) = match from {
                    "guest" => (&mut *to_host, &mut *to_guest),
                    _ => (&mut *to_guest, &mut *to_host),
                };
                while let Some(header) = ring.next(memory) {
                    let id = header.transaction_id;
                    let fault = match header.kind {
                        PacketKind::Completion => {
                            counts.completions += 1;
                            (!other.waiting.remove(&id)).then_some("completes what does not wait")
                        }
                        _ if header.wants_completion => {
                            counts.transactions += 1;
                            (!ring.waiting.insert(id)).then_some("uses an id that waits")
                        }
                        _ => {
                            counts.others += 1;
                            None
                        }
                    };
                    if let Some(fault) = fault {
                        log.violation(format_args!(
                            "on channel {channel_id} the {from} {fault}: transaction {id:#x}"
                        ));
                    }
                }
            }
        }
    }
}

impl Ring {
    fn new(pfns: &[u64]) -> Self {
        Self { pfns: pfns.to_vec(), at: 0, waiting: BTreeSet::new() }
    }

    /// Bytes of the data area.
    fn len(&self) -> u32 {
        u32::try_from(self.pfns.len() - 1).unwrap_or(0) * 4096
    }

    /// The next packet that was written.
    fn next(&mut self, memory: &GuestMemory) -> Option<PacketHeader> {
        let control = self.pfns[0] * 4096;
        let written: u32 = memory.read_obj(control + u64::from(ControlPage::IN)).expect("RAM");
        let available = (written + self.len() - self.at) % self.len();
        if available == 0 {
            return None;
        }
        let mut bytes = [0; DESCRIPTOR_SIZE as usize];
        for (at, unit) in (self.at..).step_by(8).zip(bytes.chunks_exact_mut(8)) {
            // Packets begin at multiples of 8, so that no unit of 8 bytes is cut.
            let at = at % self.len();
            let pfn = self.pfns[1 + at as usize / 4096];
            memory.read(pfn * 4096 + u64::from(at % 4096), unit).expect("RAM");
        }
        let descriptor = PacketDescriptor::read_from_bytes(&bytes).expect("as long as one");
        let header = descriptor.check(available).expect("both sides write whole packets");
        self.at = (self.at + header.ring_bytes()) % self.len();
        Some(header)
    }
}
