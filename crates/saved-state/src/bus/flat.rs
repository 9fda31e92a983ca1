//! Flat records, each said once: from one list of fields come the struct, the table of fields, what
//! writes it and what reads it.

use vmbus_wire::guid::Guid;

use crate::error::{FieldError, FieldProblem};
use crate::protobuf::Message;
use crate::schema::{Field, Value};

/// What a field of a flat record can be.
pub(super) trait Flat<'a>: Copy + PartialEq {
    /// What it is where the field is absent.
    const ABSENT: Self;

    fn put(self, number: u32, to: &mut impl Message);

    /// From what the table of fields has let through.
    fn take(value: Value<'a>) -> Option<Self>;

    /// Whether a reader will take it for that field.
    #[inline]
    fn check(self, field: &'static Field) -> Result<(), FieldError> {
        if field.required && self == Self::ABSENT {
            return Err(missing(field));
        }
        Ok(())
    }
}

#[cold]
pub(super) fn missing(field: &Field) -> FieldError {
    FieldError { number: field.number, name: field.name, problem: FieldProblem::Missing }
}

impl Flat<'_> for bool {
    const ABSENT: Self = false;

    #[inline]
    fn put(self, number: u32, to: &mut impl Message) {
        to.varint(number, u64::from(self));
    }

    #[inline]
    fn take(value: Value<'_>) -> Option<Self> {
        if let Value::Bool(found) = value { Some(found) } else { None }
    }
}

impl Flat<'_> for u32 {
    const ABSENT: Self = 0;

    #[inline]
    fn put(self, number: u32, to: &mut impl Message) {
        to.varint(number, u64::from(self));
    }

    #[inline]
    fn take(value: Value<'_>) -> Option<Self> {
        if let Value::Uint32(found) = value { Some(found) } else { None }
    }
}

impl Flat<'_> for u64 {
    const ABSENT: Self = 0;

    #[inline]
    fn put(self, number: u32, to: &mut impl Message) {
        to.varint(number, self);
    }

    #[inline]
    fn take(value: Value<'_>) -> Option<Self> {
        if let Value::Uint64(found) = value { Some(found) } else { None }
    }
}

impl Flat<'_> for Guid {
    const ABSENT: Self = Self::ZERO;

    #[inline]
    fn put(self, number: u32, to: &mut impl Message) {
        if self != Self::ABSENT {
            to.bytes(number, &self.to_bytes());
        }
    }

    #[inline]
    fn take(value: Value<'_>) -> Option<Self> {
        if let Value::Guid(found) = value { Some(found) } else { None }
    }
}

impl<'a> Flat<'a> for &'a [u8] {
    const ABSENT: Self = &[];

    #[inline]
    fn put(self, number: u32, to: &mut impl Message) {
        to.bytes(number, self);
    }

    #[inline]
    fn take(value: Value<'a>) -> Option<Self> {
        if let Value::Bytes(found) = value { Some(found) } else { None }
    }

    #[inline]
    fn check(self, field: &'static Field) -> Result<(), FieldError> {
        if field.required && self.is_empty() {
            return Err(missing(field));
        }
        field.holds(self)
    }
}

/// An enumeration: its values, and their names in a table of fields. The first is the default.
macro_rules! flat_enum {
    (
        $(#[$doc:meta])*
        pub enum $name:ident: $names:ident {
            $(#[$first_doc:meta])* $first:ident = 0, $first_text:literal;
            $($(#[$value_doc:meta])* $value:ident = $number:literal, $text:literal;)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
        #[repr(u32)]
        pub enum $name {
            #[default]
            $(#[$first_doc])*
            $first = 0,
            $($(#[$value_doc])* $value = $number,)*
        }

        const $names: &[&str] = &[$first_text, $($text),*];

        impl crate::bus::flat::Flat<'_> for $name {
            const ABSENT: Self = Self::$first;

            #[inline]
            fn put(self, number: u32, to: &mut impl crate::protobuf::Message) {
                to.varint(number, u64::from(self as u32));
            }

            #[inline]
            fn take(value: crate::schema::Value<'_>) -> Option<Self> {
                match value {
                    crate::schema::Value::Enum { number: 0, .. } => Some(Self::$first),
                    $(crate::schema::Value::Enum { number: $number, .. } => Some(Self::$value),)*
                    _ => None,
                }
            }
        }
    };
}

/// A record, mandatory and in the first format: number, name, type, shape and whether it is required, of
/// each field in ascending order.
macro_rules! flat_record {
    (
        $(#[$doc:meta])*
        pub struct $record:ident $(<$life:lifetime>)?: $kind:ident, $name:literal {
            $(
                $(#[$field_doc:meta])*
                $number:literal $field:ident: $type:ty, $shape:expr $(, $required:ident)?;
            )*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        pub struct $record $(<$life>)? {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        const _: () = {
            use crate::bus::flat::Flat;
            use crate::error::FieldError;
            use crate::kind::SINCE_V1;
            use crate::protobuf::{Counter, Message, Sink};
            use crate::record::{Decode, Encode, EncodeError};
            use crate::schema::{self, Field, Fields, Found};

            const FIELDS: &[Field] =
                &[$(Field::new($number, stringify!($field), $shape)$(.$required())?),*];

            impl $(<$life>)? $record $(<$life>)? {
                #[inline]
                fn put(&self, to: &mut impl Message) {
                    $(self.$field.put($number, to);)*
                }

                #[inline]
                fn check(&self) -> Result<(), FieldError> {
                    let mut fields = FIELDS.iter();
                    $(if let Some(field) = fields.next() {
                        self.$field.check(field)?;
                    })*
                    Ok(())
                }
            }

            impl $(<$life>)? Default for $record $(<$life>)? {
                fn default() -> Self {
                    Self { $($field: Flat::ABSENT,)* }
                }
            }

            impl $(<$life>)? Record for $record $(<$life>)? {
                const KIND: &'static KindInfo = &KindInfo {
                    kind: $kind,
                    name: $name,
                    mandatory: true,
                    versions: SINCE_V1,
                    fields: FIELDS,
                    check: |payload| schema::check(payload, FIELDS),
                };
            }

            impl $(<$life>)? Encode for $record $(<$life>)? {
                #[inline]
                fn encoded_len(&self) -> usize {
                    let mut counter = Counter::default();
                    self.put(&mut counter);
                    counter.bytes
                }

                #[inline]
                fn encode(&self, out: &mut [u8]) -> Result<(), EncodeError> {
                    self.check().map_err(EncodeError::Field)?;
                    let mut sink = Sink::new(out);
                    self.put(&mut sink);
                    if sink.is_full() { Ok(()) } else { Err(EncodeError::Length) }
                }
            }

            impl<'a> Decode<'a> for flat_record!(@with_a $record $(<$life>)?) {
                fn decode(payload: &'a [u8]) -> Result<Self, FieldError> {
                    let mut record = Self::default();
                    for found in Fields::new(payload, FIELDS) {
                        let Found { number, value, .. } = found?;
                        match number {
                            $($number => {
                                if let Some(found) = Flat::take(value) {
                                    record.$field = found;
                                }
                            })*
                            _ => {} // from a later version
                        }
                    }
                    Ok(record)
                }
            }
        };
    };
    (@with_a $record:ident) => { $record };
    (@with_a $record:ident <$life:lifetime>) => { $record<'a> };
}

pub(super) use {flat_enum, flat_record};
