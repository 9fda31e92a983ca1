//! The examples in C: each runs, and says that it has done what it is for.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

mod common;

use std::process::Command;

use common::{build, run, sources};

#[test]
fn every_example_runs() {
    let folder = tempfile::tempdir().unwrap();
    let expected = [
        ("echo", "1000 packets echoed, 0 wrong"),
        ("save_loop", "8 acknowledged after the restore"),
    ];
    let found = sources("examples/c");
    // The storage VSP has a test of its own: it needs a guest.
    assert_eq!(found.len(), expected.len() + 1, "an example without a row here");
    for (name, says) in expected {
        let source = found.iter().find(|path| path.ends_with(format!("{name}.c"))).unwrap();
        let program = folder.path().join(name);
        // Sanitized: an example is what others copy.
        build(source, &program, &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
        let said = String::from_utf8(run(&mut Command::new(&program)).stdout).unwrap();
        assert!(said.contains(says), "{name}: {said}");
    }
}
