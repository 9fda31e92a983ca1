//! What is counted while a machine runs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use hyperv_kvm::statistics::Statistics;
use kvm_ioctls::VcpuFd;

/// What has been counted since a machine's start.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct MachineCounters {
    /// Exits of all processors that this program has handled, by reason.
    pub user_exits: BTreeMap<&'static str, u64>,
    /// Interrupts that were raised in the guest for messages and events.
    pub interrupts: u64,
    /// What KVM has counted of each processor, by KVM's names: `exits`, `io_exits`, `halt_exits`,
    /// `irq_injections` and so on. Empty where KVM does not tell: before Linux 5.14.
    pub processors: Vec<BTreeMap<String, u64>>,
}

/// Why a processor left KVM for this program.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum UserExit {
    PortRead,
    PortWrite,
    HypercallPort,
    MmioRead,
    MmioWrite,
    MsrRead,
    MsrWrite,
    Hyperv,
    SystemEvent,
    Shutdown,
    Signal,
    Other,
}

/// Their names, in the same order.
const NAMES: [&str; 12] = [
    "port_read",
    "port_write",
    "hypercall_port",
    "mmio_read",
    "mmio_write",
    "msr_read",
    "msr_write",
    "hyperv",
    "system_event",
    "shutdown",
    "signal",
    "other",
];

/// Exits by their reasons.
#[derive(Debug, Default)]
pub(super) struct UserExits([AtomicU64; NAMES.len()]);

impl UserExits {
    pub(super) fn count(&self, exit: UserExit) {
        if let Some(counter) = self.0.get(exit as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn values(&self) -> BTreeMap<&'static str, u64> {
        let values = self.0.iter().map(|counter| counter.load(Ordering::Relaxed));
        NAMES.into_iter().zip(values).collect()
    }
}

/// KVM's counters of a processor, found while it does not run yet.
pub(super) struct KvmCounters(Option<Statistics>);

impl KvmCounters {
    pub(super) fn of(vcpu: &VcpuFd) -> Self {
        let statistics = Statistics::of(vcpu);
        Self(statistics.inspect_err(|error| tracing::debug!(%error, "KVM does not count")).ok())
    }

    pub(super) fn values(&self) -> BTreeMap<String, u64> {
        let values = self.0.as_ref().and_then(|statistics| statistics.read().ok());
        let values = values.into_iter().flatten();
        values.map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_its_name() {
        let exits = UserExits::default();
        let all = [
            (UserExit::PortRead, "port_read"),
            (UserExit::HypercallPort, "hypercall_port"),
            (UserExit::MsrWrite, "msr_write"),
            (UserExit::Signal, "signal"),
            (UserExit::Other, "other"),
        ];
        for (exit, name) in all {
            exits.count(exit);
            assert_eq!(exits.values().get(name), Some(&1), "{exit:?}");
        }
        assert_eq!(exits.values().values().sum::<u64>(), all.len() as u64);
    }
}
