//! Where a panic ends.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kmcl::{Error, NtStatus};

use crate::verifier;

/// Runs `body`; a panic in it becomes `on_panic`, or the end of the process while the verifier is on.
/// What the panicking code had locked is whole at every step, by the library's own rule.
#[inline]
pub(crate) fn guarded<R>(function: &'static str, on_panic: R, body: impl FnOnce() -> R) -> R {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result,
        Err(_panic) => {
            verifier::violation(function, "the library", "must not panic: this is a bug in it");
            on_panic
        }
    }
}

/// As [`guarded`], for functions that return a status.
#[inline]
pub(crate) fn status(function: &'static str, body: impl FnOnce() -> NtStatus) -> i32 {
    to_c(guarded(function, NtStatus::UNSUCCESSFUL, body))
}

/// A status as C has it.
pub(crate) fn to_c(status: NtStatus) -> i32 {
    status.0.cast_signed()
}

/// What C returned.
pub(crate) fn from_c(status: i32) -> NtStatus {
    NtStatus(status.cast_unsigned())
}

/// The status of a call that gives nothing else.
pub(crate) fn outcome(result: Result<(), Error>) -> NtStatus {
    result.map_or_else(|error| error.status(), |()| NtStatus::SUCCESS)
}
