//! NTSTATUS values, where VMBus or KMCL name them.

use core::fmt;

/// An NTSTATUS: what a control message or a KMCL call reports.
///
/// Bits 31:30 are the severity (0 success, 1 informational, 2 warning, 3 error), bits 15:0 the code.
/// Any value may come from a peer; the constants are those with a documented meaning here.
///
/// Source: Windows driver reference, "Using NTSTATUS values".
#[repr(transparent)]
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NtStatus(pub u32);

impl NtStatus {
    /// Whether the status is a success or informational (`NT_SUCCESS`): the top bit is clear.
    /// [`NtStatus::PENDING`] passes; [`NtStatus::BUFFER_OVERFLOW`], a warning, does not.
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 >> 31 == 0
    }

    /// `INVALID_PARAMETER_n`, for the argument in position `n`; [`NtStatus::INVALID_PARAMETER`] for
    /// a position outside 1..=12.
    #[must_use]
    pub const fn invalid_parameter(n: u8) -> Self {
        match n {
            1..=12 => Self(Self::INVALID_PARAMETER_1.0 + n as u32 - 1),
            _ => Self::INVALID_PARAMETER,
        }
    }
}

/// Makes the constants and their names from one list, so that neither can lack the other.
macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        impl NtStatus {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// Every value that has a name here.
            pub const NAMED: &[Self] = &[$(Self::$name),*];

            /// The name Windows gives the value, or `None` for one this crate has no use for.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    /// The operation succeeded.
    SUCCESS = 0x0000_0000, "STATUS_SUCCESS";
    /// The operation goes on; its result comes later. Passes [`NtStatus::is_success`].
    PENDING = 0x0000_0103, "STATUS_PENDING";
    /// A warning: data was produced, and there is more than fitted.
    BUFFER_OVERFLOW = 0x8000_0005, "STATUS_BUFFER_OVERFLOW";
    /// A warning: the device is at work on something that has to end first.
    DEVICE_BUSY = 0x8000_0011, "STATUS_DEVICE_BUSY";
    /// The operation failed, no reason given.
    UNSUCCESSFUL = 0xc000_0001, "STATUS_UNSUCCESSFUL";
    /// The call does not exist here.
    NOT_IMPLEMENTED = 0xc000_0002, "STATUS_NOT_IMPLEMENTED";
    /// The handle names nothing, or nothing of this kind.
    INVALID_HANDLE = 0xc000_0008, "STATUS_INVALID_HANDLE";
    /// An argument is invalid.
    INVALID_PARAMETER = 0xc000_000d, "STATUS_INVALID_PARAMETER";
    /// The device has no such request.
    INVALID_DEVICE_REQUEST = 0xc000_0010, "STATUS_INVALID_DEVICE_REQUEST";
    /// This step is done, another call is needed. An error by its severity.
    MORE_PROCESSING_REQUIRED = 0xc000_0016, "STATUS_MORE_PROCESSING_REQUIRED";
    /// The resource is mapped or committed already.
    ALREADY_COMMITTED = 0xc000_0021, "STATUS_ALREADY_COMMITTED";
    /// The caller may not do this.
    ACCESS_DENIED = 0xc000_0022, "STATUS_ACCESS_DENIED";
    /// Nothing was produced, the buffer is too small for anything.
    BUFFER_TOO_SMALL = 0xc000_0023, "STATUS_BUFFER_TOO_SMALL";
    /// Something of this name exists already.
    OBJECT_NAME_COLLISION = 0xc000_0035, "STATUS_OBJECT_NAME_COLLISION";
    /// Versions do not fit together.
    REVISION_MISMATCH = 0xc000_0059, "STATUS_REVISION_MISMATCH";
    /// A bound is reached, or memory is short.
    INSUFFICIENT_RESOURCES = 0xc000_009a, "STATUS_INSUFFICIENT_RESOURCES";
    /// The device is not ready.
    DEVICE_NOT_READY = 0xc000_00a3, "STATUS_DEVICE_NOT_READY";
    /// Time ran out.
    IO_TIMEOUT = 0xc000_00b5, "STATUS_IO_TIMEOUT";
    /// Documented, but not offered here.
    NOT_SUPPORTED = 0xc000_00bb, "STATUS_NOT_SUPPORTED";
    /// Argument 1 is invalid; in KMCL also: the handle is bad or in the wrong state.
    INVALID_PARAMETER_1 = 0xc000_00ef, "STATUS_INVALID_PARAMETER_1";
    /// Argument 2 is invalid.
    INVALID_PARAMETER_2 = 0xc000_00f0, "STATUS_INVALID_PARAMETER_2";
    /// Argument 3 is invalid.
    INVALID_PARAMETER_3 = 0xc000_00f1, "STATUS_INVALID_PARAMETER_3";
    /// Argument 4 is invalid.
    INVALID_PARAMETER_4 = 0xc000_00f2, "STATUS_INVALID_PARAMETER_4";
    /// Argument 5 is invalid.
    INVALID_PARAMETER_5 = 0xc000_00f3, "STATUS_INVALID_PARAMETER_5";
    /// Argument 6 is invalid.
    INVALID_PARAMETER_6 = 0xc000_00f4, "STATUS_INVALID_PARAMETER_6";
    /// Argument 7 is invalid.
    INVALID_PARAMETER_7 = 0xc000_00f5, "STATUS_INVALID_PARAMETER_7";
    /// Argument 8 is invalid.
    INVALID_PARAMETER_8 = 0xc000_00f6, "STATUS_INVALID_PARAMETER_8";
    /// Argument 9 is invalid.
    INVALID_PARAMETER_9 = 0xc000_00f7, "STATUS_INVALID_PARAMETER_9";
    /// Argument 10 is invalid.
    INVALID_PARAMETER_10 = 0xc000_00f8, "STATUS_INVALID_PARAMETER_10";
    /// Argument 11 is invalid.
    INVALID_PARAMETER_11 = 0xc000_00f9, "STATUS_INVALID_PARAMETER_11";
    /// Argument 12 is invalid.
    INVALID_PARAMETER_12 = 0xc000_00fa, "STATUS_INVALID_PARAMETER_12";
    /// The operation was cancelled.
    CANCELLED = 0xc000_0120, "STATUS_CANCELLED";
    /// The device is not in a state for this.
    INVALID_DEVICE_STATE = 0xc000_0184, "STATUS_INVALID_DEVICE_STATE";
    /// The device met an error in the transfer itself.
    IO_DEVICE_ERROR = 0xc000_0185, "STATUS_IO_DEVICE_ERROR";
    /// The size of a buffer is not one the call accepts.
    INVALID_BUFFER_SIZE = 0xc000_0206, "STATUS_INVALID_BUFFER_SIZE";
    /// There is no such thing.
    NOT_FOUND = 0xc000_0225, "STATUS_NOT_FOUND";
    /// Nobody accepts the connection; the usual answer to an hvsock connect request.
    CONNECTION_REFUSED = 0xc000_0236, "STATUS_CONNECTION_REFUSED";
    /// The device or channel is gone.
    DEVICE_REMOVED = 0xc000_02b6, "STATUS_DEVICE_REMOVED";
}

impl fmt::Display for NtStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} (0x{:08X})", self.0),
            None => write!(f, "0x{:08X}", self.0),
        }
    }
}

impl fmt::Debug for NtStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for NtStatus {}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::format;

    use super::*;

    #[test]
    fn only_the_two_upper_severities_fail() {
        for (status, success) in [
            (NtStatus::SUCCESS, true),
            (NtStatus::PENDING, true),
            (NtStatus(0x4000_0000), true),
            (NtStatus(0x7fff_ffff), true),
            (NtStatus::BUFFER_OVERFLOW, false),
            (NtStatus::MORE_PROCESSING_REQUIRED, false),
            (NtStatus::CANCELLED, false),
        ] {
            assert_eq!(status.is_success(), success, "{status}");
        }
    }

    #[test]
    fn names_and_values_are_unique_and_shown_together() {
        let values: BTreeSet<u32> = NtStatus::NAMED.iter().map(|status| status.0).collect();
        let names: BTreeSet<&str> = NtStatus::NAMED.iter().filter_map(|s| s.name()).collect();
        assert_eq!(values.len(), NtStatus::NAMED.len());
        assert_eq!(names.len(), NtStatus::NAMED.len());
        assert_eq!(format!("{}", NtStatus::CANCELLED), "STATUS_CANCELLED (0xC0000120)");
        assert_eq!(format!("{:?}", NtStatus(0xc000_0fff)), "0xC0000FFF");
    }

    #[test]
    fn a_position_gives_its_own_parameter_status() {
        for (position, expected) in [
            (0, 0xc000_000d),
            (1, 0xc000_00ef),
            (2, 0xc000_00f0),
            (12, 0xc000_00fa),
            (13, 0xc000_000d),
        ] {
            let got = NtStatus::invalid_parameter(position);
            assert_eq!(got.0, expected, "position {position}");
            assert!(got.name().is_some(), "position {position}");
        }
    }
}
