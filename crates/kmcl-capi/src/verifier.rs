//! What is done about a call that breaks a rule no status reports.
#![allow(unsafe_code, reason = "exports a function")]

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

static ENABLED: AtomicBool = AtomicBool::new(cfg!(debug_assertions));

/// `KmclSetVerifier`: whether such a call ends the process. Returns what was set before.
#[unsafe(no_mangle)]
pub extern "C" fn KmclSetVerifier(enabled: u8) -> u8 {
    u8::from(ENABLED.swap(enabled != 0, Ordering::Relaxed))
}

/// Whether such a call ends the process.
pub(crate) fn is_enabled() -> bool {
    ENABLED.load(Ordering::Relaxed)
}

/// Reports that `function` was called against a rule about `argument`. Does not return while the verifier
/// is on.
#[cold]
#[inline(never)]
pub(crate) fn violation(function: &str, argument: &str, rule: &str) {
    if is_enabled() {
        // Whoever reads this reads nothing afterwards: a closed stream changes nothing.
        let _ = writeln!(std::io::stderr(), "kmcl: {function}: {argument} {rule}");
        std::process::abort();
    }
    tracing::error!(function, argument, rule, "call against the rules");
}
