//! What happens in a world, apart from when.

use vmbus_wire::version::Version;

use crate::rng::Rng;

/// How much there is to do in a world, and how it is set up.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub struct Plan {
    /// The only version that the guest asks for; without one, all from the newest down.
    pub guest_version: Option<Version>,
    /// The newest version that the host speaks.
    pub host_version: Version,
    /// Requests to the disk.
    pub storage_requests: u32,
    /// Most of them under way at once.
    pub storage_depth: u16,
    /// Subchannels of the storage controller.
    pub sub_channels: u16,
    /// Pages of each of its rings.
    pub storage_ring_pages: u32,
    /// Packets that the second device's driver sends.
    pub work: u64,
    /// Most of them under way at once.
    pub work_depth: u64,
    /// Packets that the second device sends.
    pub events: u64,
    /// Things done on the channel that carries nothing.
    pub churn: u32,
    /// How often that channel's offer is withdrawn or made again.
    pub withdrawals: u32,
    /// Requests for socket connections.
    pub sockets: u32,
    /// At its end the guest leaves the bus without closing its channels first.
    pub hurried: bool,
    /// Some requests of the disk take very long, all run at once, and none lets itself be cancelled.
    pub slow_disk: bool,
    /// The trace is kept.
    pub traced: bool,
}

impl Plan {
    /// A plan for `seed`: a little of everything, some hundreds of steps.
    #[must_use]
    pub fn small(seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x706c_616e);
        let guest_version = match rng.below(4) {
            0 => Some(Version::ALL[rng.index(Version::ALL.len())]),
            _ => None,
        };
        let host_version = match rng.below(3) {
            0 if guest_version.is_none() => {
                [Version::V4_0, Version::V5_0, Version::V5_3][rng.index(3)]
            }
            _ => Version::LATEST,
        };
        Self {
            guest_version,
            host_version,
            storage_requests: 24,
            storage_depth: [1, 4, 16][rng.index(3)],
            sub_channels: [0, 0, 1, 2][rng.index(4)],
            storage_ring_pages: [2, 4, 20][rng.index(3)],
            work: 30,
            work_depth: [1, 6, 20][rng.index(3)],
            events: 24,
            churn: 12,
            withdrawals: 2,
            sockets: 3,
            hurried: rng.once_in(2),
            slow_disk: false,
            traced: false,
        }
    }

    /// A plan for `seed` that is about the control plane: everything else is short.
    #[must_use]
    pub fn negotiation(seed: u64) -> Self {
        Self {
            storage_requests: 2,
            work: 2,
            events: 2,
            churn: 40,
            withdrawals: 6,
            sockets: 10,
            ..Self::small(seed)
        }
    }

    /// The same, with its trace kept.
    #[must_use]
    pub fn traced(self) -> Self {
        Self { traced: true, ..self }
    }
}
