//! Sizes as people write them: `4096`, `64K`, `1GiB`. Units are powers of 1024.

use std::fmt;

const UNITS: [(char, u64); 4] = [('k', 1 << 10), ('m', 1 << 20), ('g', 1 << 30), ('t', 1 << 40)];

/// A number of bytes given on the command line.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Size(pub(crate) u64);

/// Why a size was refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum SizeError {
    #[error("expected a size such as 4096, 64K, 16M or 1G")]
    Form,
    #[error("the size does not fit 64 bits")]
    TooLarge,
}

impl std::str::FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let text = text.trim().to_ascii_lowercase();
        let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(digits_end);
        if digits.is_empty() {
            return Err(SizeError::Form);
        }
        let number: u64 = digits.parse().map_err(|_| SizeError::TooLarge)?;
        let factor = match unit.trim() {
            "" | "b" => 1,
            unit => UNITS
                .iter()
                .find(|(letter, _)| {
                    unit.strip_prefix(*letter).is_some_and(|rest| matches!(rest, "" | "b" | "ib"))
                })
                .map(|(_, factor)| *factor)
                .ok_or(SizeError::Form)?,
        };
        number.checked_mul(factor).map(Self).ok_or(SizeError::TooLarge)
    }
}

/// Bytes for people: `512 B`, `64.0 MiB`.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().rev().find(|(_, factor)| self.0 >= *factor) {
            None => write!(f, "{} B", self.0),
            #[expect(clippy::cast_precision_loss, reason = "one digit after the point is shown")]
            Some((letter, factor)) => {
                let unit = letter.to_ascii_uppercase();
                write!(f, "{:.1} {unit}iB", self.0 as f64 / *factor as f64)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, expected) in [
            ("0", Ok(Size(0))),
            ("512", Ok(Size(512))),
            ("512b", Ok(Size(512))),
            ("4k", Ok(Size(4096))),
            ("64K", Ok(Size(65536))),
            ("1M", Ok(Size(1 << 20))),
            ("1MB", Ok(Size(1 << 20))),
            ("1 MiB", Ok(Size(1 << 20))),
            ("2g", Ok(Size(2 << 30))),
            ("3TiB", Ok(Size(3 << 40))),
            ("", Err(SizeError::Form)),
            ("M", Err(SizeError::Form)),
            ("-1", Err(SizeError::Form)),
            ("1.5G", Err(SizeError::Form)),
            ("1X", Err(SizeError::Form)),
            ("1Mx", Err(SizeError::Form)),
            ("0x10", Err(SizeError::Form)),
            ("18446744073709551615", Ok(Size(u64::MAX))),
            ("18446744073709551616", Err(SizeError::TooLarge)),
            ("16777216T", Err(SizeError::TooLarge)),
        ] {
            assert_eq!(text.parse::<Size>(), expected, "{text:?}");
        }
    }

    #[test]
    fn sizes_are_shown_with_the_largest_unit_that_fits() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64.0 MiB"),
            (5 << 40, "5.0 TiB"),
        ] {
            assert_eq!(Size(bytes).to_string(), expected);
        }
    }

    proptest! {
        /// No text makes the parser panic, and a plain number is itself.
        #[test]
        fn any_text_parses_or_is_refused(text in ".{0,12}", number: u64) {
            let _ = text.parse::<Size>();
            prop_assert_eq!(number.to_string().parse::<Size>(), Ok(Size(number)));
        }
    }
}
