//! What a guest asks for when it connects.

use vmbus_wire::guid::Guid;
use vmbus_wire::synic::{SINT_COUNT, VMBUS_SINT};
use vmbus_wire::version::{FeatureFlags, Version};

use crate::mmio::MmioWindow;

/// Highest virtual trust level.
pub const MAX_VTL: u8 = 2;

/// What a guest asks for when it connects. Plain data; [`Guest::new`](crate::Guest::new) checks it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GuestConfig {
    /// Versions to ask for, newest first. The host takes the first that it knows.
    pub versions: Vec<Version>,
    /// Features to ask for with version 6.0 and later. The host may grant fewer.
    pub features: FeatureFlags,
    /// Who this guest is, told to the host with [`FeatureFlags::CLIENT_ID`].
    pub client_id: Guid,
    /// Index of the virtual processor that gets the host's messages (3.0 and later).
    pub message_vp: u32,
    /// Synthetic interrupt source for messages (5.0 and later).
    pub message_sint: u8,
    /// Virtual trust level for messages (5.1 and later).
    pub message_vtl: u8,
    /// Guest physical address of the shared interrupt page. Versions below 2.4 need it; up to 4.1
    /// it is passed on if given.
    pub interrupt_page: Option<u64>,
    /// Guest physical addresses of the monitor pages: parent to child, child to parent.
    pub monitor_pages: Option<(u64, u64)>,
    /// Where offers that want MMIO space get it from.
    pub mmio: Option<MmioWindow>,
}

impl GuestConfig {
    /// The features this crate implements: the default of [`GuestConfig::features`].
    pub const FEATURES: FeatureFlags = FeatureFlags::GUEST_SPECIFIED_SIGNAL_PARAMETERS
        .union(FeatureFlags::MODIFY_CONNECTION)
        .union(FeatureFlags::CLIENT_ID)
        .union(FeatureFlags::PAUSE_RESUME);

    /// Every version that needs no interrupt page (6.0 down to 2.4), all features, messages to SINT
    /// 2 of VP 0, no monitor pages, no MMIO space.
    #[must_use]
    pub fn new(client_id: Guid) -> Self {
        let mut versions = Version::ALL.to_vec();
        versions.retain(|version| version.has_event_flags_page());
        versions.reverse();
        Self {
            versions,
            features: Self::FEATURES,
            client_id,
            message_vp: 0,
            message_sint: VMBUS_SINT,
            message_vtl: 0,
            interrupt_page: None,
            monitor_pages: None,
            mmio: None,
        }
    }

    /// Asks for exactly `version`.
    #[must_use]
    pub fn only(mut self, version: Version) -> Self {
        self.versions = vec![version];
        self
    }

    /// Asks for `version` and the older ones that the list has.
    #[must_use]
    pub fn at_most(mut self, version: Version) -> Self {
        self.versions.retain(|candidate| *candidate <= version);
        self
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    /// [`ConfigError`], with the first thing found.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.versions.is_empty() {
            return Err(ConfigError::NoVersion);
        }
        for pair in self.versions.windows(2) {
            if let &[first, second] = pair
                && second >= first
            {
                return Err(ConfigError::VersionOrder { first, second });
            }
        }
        let needs_page = self.versions.iter().find(|version| !version.has_event_flags_page());
        if let (Some(&version), None) = (needs_page, self.interrupt_page) {
            return Err(ConfigError::NoInterruptPage { version });
        }
        let unknown = self.features.difference(Self::FEATURES);
        if !unknown.is_empty() {
            return Err(ConfigError::Features { unknown: unknown.bits() });
        }
        if self.message_sint >= SINT_COUNT {
            return Err(ConfigError::Sint { sint: self.message_sint });
        }
        if self.message_vtl > MAX_VTL {
            return Err(ConfigError::Vtl { vtl: self.message_vtl });
        }
        Ok(())
    }
}

/// Why a [`GuestConfig`] makes no sense.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Nothing to ask for.
    #[error("the list of versions is empty")]
    NoVersion,
    /// The list does not fall.
    #[error("version {second} is listed after {first}; each must be older than the one before it")]
    VersionOrder {
        /// The earlier entry.
        first: Version,
        /// The later entry, which is not older.
        second: Version,
    },
    /// A legacy version, and nowhere for its interrupt bits.
    #[error("version {version} needs an interrupt page, and none is given")]
    NoInterruptPage {
        /// The version that needs it.
        version: Version,
    },
    /// Features that this crate does not implement.
    #[error("features {unknown:#x} are not implemented")]
    Features {
        /// The bits.
        unknown: u32,
    },
    /// No such interrupt source.
    #[error("SINT {sint} is not below {SINT_COUNT}")]
    Sint {
        /// The source asked for.
        sint: u8,
    },
    /// No such trust level.
    #[error("VTL {vtl} is above {MAX_VTL}")]
    Vtl {
        /// The level asked for.
        vtl: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_asks_for_every_modern_version_newest_first() {
        let config = GuestConfig::new(Guid::ZERO);
        assert_eq!(config.check(), Ok(()));
        assert_eq!(config.versions.first(), Some(&Version::V6_0));
        assert_eq!(config.versions.last(), Some(&Version::V2_4));
        assert_eq!(config.clone().at_most(Version::V4_0).versions.len(), 3);
        assert_eq!(config.only(Version::V5_0).versions, [Version::V5_0]);
    }

    #[test]
    fn each_field_is_checked() {
        type Damage = fn(&mut GuestConfig);
        let table: [(&str, Damage, ConfigError); 6] = [
            ("no version", |c| c.versions.clear(), ConfigError::NoVersion),
            (
                "same version twice",
                |c| c.versions = vec![Version::V5_0, Version::V5_0],
                ConfigError::VersionOrder { first: Version::V5_0, second: Version::V5_0 },
            ),
            (
                "legacy version without a page",
                |c| c.versions = vec![Version::V2_4, Version::V1_1],
                ConfigError::NoInterruptPage { version: Version::V1_1 },
            ),
            (
                "feature not implemented",
                |c| c.features = FeatureFlags::GPA_PINNING,
                ConfigError::Features { unknown: 0x80 },
            ),
            ("SINT", |c| c.message_sint = 16, ConfigError::Sint { sint: 16 }),
            ("VTL", |c| c.message_vtl = 3, ConfigError::Vtl { vtl: 3 }),
        ];
        for (what, damage, expected) in table {
            let mut config = GuestConfig::new(Guid::ZERO);
            damage(&mut config);
            assert_eq!(config.check(), Err(expected), "{what}");
        }
    }
}
