//! The 16-byte identifiers of interfaces, instances and services.

use core::fmt;
use core::str::FromStr;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A GUID in the byte order in which Windows stores it, and VMBus sends it: the first three groups
/// of the written form are little-endian numbers, the last two are bytes in reading order.
///
/// The written form is `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`, hexadecimal, in lower case.
/// Values are ordered by their stored bytes, which is not the order of the written form.
#[repr(transparent)]
#[derive(
    Clone,
    Copy,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    FromBytes,
    Immutable,
    IntoBytes,
    KnownLayout,
    Unaligned,
)]
pub struct Guid([u8; 16]);

const _: () = assert!(size_of::<Guid>() == 16);

impl Guid {
    /// All bytes zero: "no GUID".
    pub const ZERO: Self = Self([0; 16]);

    /// From the 16 bytes as stored.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes as stored.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// From the four fields of a C `GUID`.
    #[must_use]
    pub const fn from_fields(data1: u32, data2: u16, data3: u16, data4: [u8; 8]) -> Self {
        let [a, b, c, d] = data1.to_le_bytes();
        let [e, f] = data2.to_le_bytes();
        let [g, h] = data3.to_le_bytes();
        let [i, j, k, l, m, n, o, p] = data4;
        Self([a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p])
    }

    /// From the number that the written form spells:
    /// `from_u128(0x32412632_86cb_44a2_9b5c_50d1417354f5)`.
    #[must_use]
    pub const fn from_u128(spelled: u128) -> Self {
        let [a, b, c, d, e, f, g, h, data4 @ ..] = spelled.to_be_bytes();
        Self::from_fields(
            u32::from_be_bytes([a, b, c, d]),
            u16::from_be_bytes([e, f]),
            u16::from_be_bytes([g, h]),
            data4,
        )
    }

    /// The number that the written form spells; the inverse of [`Guid::from_u128`].
    #[must_use]
    pub const fn to_u128(self) -> u128 {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = self.0;
        u128::from_be_bytes([d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p])
    }

    /// The first field of a C `GUID`.
    #[must_use]
    pub const fn data1(self) -> u32 {
        let [a, b, c, d, ..] = self.0;
        u32::from_le_bytes([a, b, c, d])
    }

    /// Reads the written form, in either case.
    ///
    /// # Errors
    /// [`GuidError`] for any other text; braces and spaces are not part of the form.
    pub const fn parse(text: &str) -> Result<Self, GuidError> {
        let mut rest = text.as_bytes();
        let mut position = 0;
        let mut spelled: u128 = 0;
        while position < WRITTEN_LENGTH {
            let [byte, after @ ..] = rest else {
                return Err(GuidError { position });
            };
            if matches!(position, 8 | 13 | 18 | 23) {
                if *byte != b'-' {
                    return Err(GuidError { position });
                }
            } else {
                let digit = match *byte {
                    b'0'..=b'9' => *byte - b'0',
                    b'a'..=b'f' => *byte - b'a' + 10,
                    b'A'..=b'F' => *byte - b'A' + 10,
                    _ => return Err(GuidError { position }),
                };
                spelled = (spelled << 4) | digit as u128;
            }
            rest = after;
            position += 1;
        }
        if rest.is_empty() { Ok(Self::from_u128(spelled)) } else { Err(GuidError { position }) }
    }
}

/// Characters of the written form.
const WRITTEN_LENGTH: usize = 36;

/// A text is not the written form of a GUID.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "not a GUID of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx: unexpected at byte {position}"
)]
pub struct GuidError {
    /// First byte of the text that does not fit the form; its length when the text is too short.
    pub position: usize,
}

impl FromStr for Guid {
    type Err = GuidError;

    fn from_str(text: &str) -> Result<Self, GuidError> {
        Self::parse(text)
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spelled = self.to_u128();
        let group = |shift: u32, digits: u32| (spelled >> shift) & ((1 << (4 * digits)) - 1);
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            group(96, 8),
            group(80, 4),
            group(64, 4),
            group(48, 4),
            group(0, 12),
        )
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use std::format;
    use std::string::ToString;

    use proptest::prelude::*;

    use super::*;

    /// The interface GUID of the IDE accelerator, as the wire carries it.
    const IDE: [u8; 16] = [
        0x32, 0x26, 0x41, 0x32, 0xcb, 0x86, 0xa2, 0x44, 0x9b, 0x5c, 0x50, 0xd1, 0x41, 0x73, 0x54,
        0xf5,
    ];

    #[test]
    fn every_constructor_gives_the_windows_byte_order() {
        let expected = Guid::from_bytes(IDE);
        let data4 = [0x9b, 0x5c, 0x50, 0xd1, 0x41, 0x73, 0x54, 0xf5];
        for (row, got) in [
            ("fields", Guid::from_fields(0x3241_2632, 0x86cb, 0x44a2, data4)),
            ("u128", Guid::from_u128(0x3241_2632_86cb_44a2_9b5c_50d1_4173_54f5)),
            ("lower", Guid::parse("32412632-86cb-44a2-9b5c-50d1417354f5").unwrap()),
            ("upper", "32412632-86CB-44A2-9B5C-50D1417354F5".parse().unwrap()),
            ("bytes", Guid::read_from_bytes(&IDE).unwrap()),
        ] {
            assert_eq!(got, expected, "{row}");
        }
        assert_eq!(expected.data1(), 0x3241_2632);
        assert_eq!(expected.to_bytes(), IDE);
        assert_eq!(format!("{expected}"), "32412632-86cb-44a2-9b5c-50d1417354f5");
        assert_eq!(format!("{expected:?}"), format!("{expected}"));
    }

    #[test]
    fn other_texts_are_refused_at_the_byte_that_breaks_the_form() {
        for (text, position) in [
            ("", 0),
            ("{32412632-86cb-44a2-9b5c-50d1417354f5}", 0),
            ("32412632086cb-44a2-9b5c-50d1417354f5", 8),
            ("32412632-86cb-44a2-9b5c-50d1417354f", 35),
            ("32412632-86cb-44a2-9b5c-50d1417354f5 ", 36),
            ("32412632-86cb-44a2-9b5c-50d14173\u{e9}54f5", 32),
            ("3241263--86cb-44a2-9b5c-50d1417354f5", 7),
        ] {
            assert_eq!(Guid::parse(text), Err(GuidError { position }), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn the_written_form_reads_back(bytes: [u8; 16]) {
            let guid = Guid::from_bytes(bytes);
            prop_assert_eq!(Guid::parse(&guid.to_string()), Ok(guid));
            prop_assert_eq!(Guid::from_u128(guid.to_u128()), guid);
        }

        #[test]
        fn any_text_is_a_guid_or_an_error(text: std::string::String) {
            if let Ok(guid) = Guid::parse(&text) {
                prop_assert_eq!(guid.to_string(), text.to_ascii_lowercase());
            }
        }
    }
}
