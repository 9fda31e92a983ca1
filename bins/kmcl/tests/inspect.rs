//! `kmcl inspect` on files that are whole, damaged, and something else.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod support;

use support::{kmcl, text};

#[test]
fn what_is_no_saved_state_is_said_to_be_none() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    for more in [&[][..], &["--verify"], &["--json"]] {
        for (path, code, part) in [
            (file("text", b"this is a text, not a state"), 1, "not a saved state"),
            (file("empty", b""), 1, "the end is missing"),
            (file("short", b"\x89KMCL"), 1, "cut"),
            (dir.path().join("missing"), 5, "missing"),
            (dir.path().to_path_buf(), 5, "directory"),
        ] {
            let ran = kmcl(["inspect", text(&path)].iter().chain(more));
            assert_eq!(ran.stdout, b"", "{path:?}");
            ran.fails(code, part);
        }
    }
}
