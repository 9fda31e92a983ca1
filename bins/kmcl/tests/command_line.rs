//! The command line itself: help, refusals, completions, man pages.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at the first surprise"
)]

mod support;

use support::kmcl;

#[test]
fn help_documents_the_exit_codes_everywhere() {
    let commands: [&[&str]; 12] = [
        &[],
        &["demo"],
        &["serve"],
        &["save"],
        &["restore"],
        &["inspect"],
        &["disk"],
        &["disk", "info"],
        &["disk", "read"],
        &["disk", "bench"],
        &["completions"],
        &["man"],
    ];
    for command in commands {
        let help = kmcl(command.iter().chain(&["--help"])).ok().text();
        assert!(help.contains("Exit codes:"), "{command:?}");
        for line in ["0  done", "1  data differs", "2  ", "3  ", "4  ", "5  "] {
            assert!(help.contains(line), "{line:?} in the help of {command:?}");
        }
    }
}

#[test]
fn a_line_that_cannot_be_obeyed_is_refused_in_one_line() {
    let rows: [(&[&str], &str); 17] = [
        (&["demo", "--size", "12Q"], "expected a size"),
        (&["demo", "--size", "1M"], "at least 8.0 MiB"),
        (&["demo", "--size", "16777217T"], "64 bits"),
        (&["demo", "--depth", "0"], "--depth"),
        (&["demo", "--depth", "257"], "--depth"),
        (&["demo", "--disk", "x", "--size", "64M"], "cannot be used with"),
        (&["serve", "--disk", "x"], "--socket"),
        (&["serve", "--disk", "x,rw", "--socket", "s"], "unknown option \"rw\""),
        (&["serve", "--disk", "x", "--socket", "s", "--backend", "magic"], "magic"),
        (&["demo", "--save-buffer", "0"], "1 byte to 1.0 MiB"),
        (&["demo", "--save-buffer", "2M"], "1 byte to 1.0 MiB"),
        (&["save", "--socket", "s"], "--to"),
        (&["restore", "state", "--socket", "s"], "--disk"),
        (&["inspect", "x", "--all", "--verify"], "cannot be used with"),
        (&["disk", "read"], "--socket"),
        (&["nonsense"], "nonsense"),
        (&["completions", "csh"], "csh"),
    ];
    for (arguments, part) in rows {
        kmcl(arguments).fails(2, part);
    }
}

#[test]
fn programs_get_failures_as_json() {
    let ran = kmcl(["--json", "serve", "--disk", "/nowhere/at/all", "--socket", "/tmp/never"]);
    let ran = ran.fails(3, "/nowhere/at/all");
    let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(error["error"]["exit_code"], 3);
    assert_eq!(error["error"]["kind"], "disk");
    assert!(error["error"]["message"].as_str().unwrap().contains("/nowhere/at/all"));
    let ran = kmcl(["nonsense", "--json"]).fails(2, "nonsense");
    let error: serde_json::Value = serde_json::from_str(&ran.stderr).unwrap();
    assert_eq!(error["error"]["kind"], "usage");
}

#[test]
fn completions_and_man_pages_know_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = kmcl(["completions", shell]).ok().text();
        for word in [
            "demo",
            "serve",
            "save",
            "restore",
            "inspect",
            "verify",
            "bench",
            "socket",
            "write-limit",
        ] {
            assert!(script.contains(word), "{word} in the script for {shell}");
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let man = dir.path().join("new");
    let pages = kmcl(["man", "--json", support::text(&man)]).ok().json();
    assert_eq!(pages["pages"].as_array().unwrap().len(), std::fs::read_dir(&man).unwrap().count());
    for page in [
        "kmcl.1",
        "kmcl-demo.1",
        "kmcl-serve.1",
        "kmcl-save.1",
        "kmcl-restore.1",
        "kmcl-disk.1",
        "kmcl-disk-verify.1",
    ] {
        let text = std::fs::read_to_string(man.join(page)).unwrap();
        assert!(text.contains(".SH \"EXIT STATUS\""), "{page}");
        assert!(text.contains(".SH OPTIONS"), "{page}");
    }
    kmcl(["man", "/dev/null/x"]).fails(5, "/dev/null/x");
}
