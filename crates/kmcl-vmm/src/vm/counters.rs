//! What has been counted, in the groups in which it is told.

use std::collections::BTreeMap;

use super::Live;
use crate::control::Counters;
use crate::devices::Disks;

/// | group | what |
/// |---|---|
/// | `exits` | exits of the processors that this program has handled, by reason |
/// | `interrupts` | interrupts raised in the guest for messages and events of the VMBus |
/// | `vp0` … | what KVM has counted of a processor, by KVM's names |
/// | `bus` | channels, GPADLs and pages that the guest has |
/// | `scsi0` … | disks of a controller, and requests in flight |
pub(super) fn of(live: &Live, disks: &Disks) -> Counters {
    let machine = live.running.counters();
    let mut groups = BTreeMap::new();
    let named = |names: BTreeMap<&str, u64>| {
        names.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    };
    groups.insert("exits".to_owned(), named(machine.user_exits));
    let interrupts = BTreeMap::from([("raised".to_owned(), machine.interrupts)]);
    groups.insert("interrupts".to_owned(), interrupts);
    for (index, names) in machine.processors.into_iter().enumerate() {
        groups.insert(format!("vp{index}"), names);
    }
    let bus = live.running.partition().bus();
    let usage = bus.usage();
    let numbers = [
        ("channels_open", bus.active_channels() as u64),
        ("gpadls", usage.gpadls as u64),
        ("gpadl_pages", usage.gpadl_pages),
    ];
    groups.insert("bus".to_owned(), named(BTreeMap::from(numbers)));
    for (number, (waiting, working)) in (0..).zip(live.devices.in_flight()) {
        let here = disks.iter().filter(|disk| disk.place.controller == number).count();
        let numbers = [
            ("disks", here as u64),
            ("requests_waiting", waiting as u64),
            ("requests_working", working as u64),
        ];
        groups.insert(format!("scsi{number}"), named(BTreeMap::from(numbers)));
    }
    Counters(groups)
}
