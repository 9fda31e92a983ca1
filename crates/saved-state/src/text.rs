//! Short text at a fixed place, as the plain parts of a stream have it.

use std::fmt;

/// Up to `N` printable ASCII characters, then zeros. Safe to show on a terminal, whoever wrote it.
#[derive(Clone, Copy, Eq, Hash, PartialEq)]
pub struct FixedText<const N: usize>([u8; N]);

/// Name of a kind of record.
pub type KindName = FixedText<{ crate::limits::MAX_NAME_BYTES }>;

/// Name and version of the program that saved: `"kmcl 0.1.0"`.
pub type Producer = FixedText<{ crate::limits::MAX_PRODUCER_BYTES }>;

/// Not a text that a fixed field can hold.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{length} bytes of text, not all printable ASCII, or more than {most}")]
pub struct TextError {
    /// Bytes of the text.
    pub length: usize,
    /// Bytes of the field.
    pub most: usize,
}

impl<const N: usize> FixedText<N> {
    /// No text.
    pub const EMPTY: Self = Self([0; N]);

    /// # Errors
    /// [`TextError`] for more than `N` bytes, or any that is no printable ASCII character.
    pub fn new(text: &str) -> Result<Self, TextError> {
        let refused = TextError { length: text.len(), most: N };
        let mut bytes = [0; N];
        let room = bytes.get_mut(..text.len()).ok_or(refused)?;
        room.copy_from_slice(text.as_bytes());
        Self::from_bytes(bytes).filter(|fixed| fixed.as_str() == text).ok_or(refused)
    }

    /// The text in a field, or `None` where it holds anything but printable characters and then
    /// zeros.
    pub(crate) fn from_bytes(bytes: [u8; N]) -> Option<Self> {
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(N);
        let (text, padding) = bytes.split_at(end);
        let printable = text.iter().all(|byte| matches!(byte, b' '..=b'~'));
        (printable && padding.iter().all(|&byte| byte == 0)).then_some(Self(bytes))
    }

    pub(crate) fn to_bytes(self) -> [u8; N] {
        self.0
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(N);
        // Checked when it was made: ASCII.
        self.0.get(..end).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or_default()
    }
}

impl<const N: usize> Default for FixedText<N> {
    fn default() -> Self {
        Self::EMPTY
    }
}

impl<const N: usize> fmt::Display for FixedText<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl<const N: usize> fmt::Debug for FixedText<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_fits_or_is_refused() {
        for (text, fits) in [
            ("", true),
            ("abcd", true),
            ("a~ !", true),
            ("abcde", false),
            ("a\0", false),
            ("a\n", false),
            ("\u{e4}", false),
        ] {
            let made = FixedText::<4>::new(text);
            assert_eq!(made.is_ok(), fits, "{text:?}");
            if let Ok(made) = made {
                assert_eq!(made.as_str(), text);
                assert_eq!(FixedText::from_bytes(made.to_bytes()), Some(made));
            }
        }
        assert_eq!(FixedText::from_bytes(*b"a\0b\0"), None, "text after the padding");
        assert_eq!(FixedText::from_bytes(*b"\x1b[2J"), None, "a terminal's control sequence");
    }
}
