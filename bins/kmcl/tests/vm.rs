//! `kmcl vm`, as far as no guest runs: what it refuses, and in which words. Guests are `cargo xtask guest`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at the first surprise"
)]

mod support;

use std::path::Path;

use support::{image, kmcl, text};

/// What is asked for is impossible, whatever this machine can do: nothing is started, and a line says why.
#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), "disk", 1 << 20);
    let disk = text(&disk);
    let kernel = image(dir.path(), "kernel", 4096);
    let kernel = text(&kernel);
    let long = "x".repeat(5000);
    let nowhere = "/nowhere/at-all";
    // Without KVM the last word is its own; what comes before it needs none.
    let is_there = Path::new("/dev/kvm").exists();
    let file_is_none =
        if is_there { (2, "neither a bzImage nor an ELF kernel") } else { (5, "/dev/kvm") };
    let rows: &[(&[&str], (i32, &str))] = &[
        (&["--kernel", nowhere], (2, nowhere)),
        (&["--kernel", kernel], file_is_none),
        (&["--kernel", kernel, "--initrd", nowhere], (2, nowhere)),
        (&["--kernel", kernel, "--disk", nowhere], (2, nowhere)),
        (&["--kernel", kernel, "--disk", "x,colour=red"], (2, "unknown option")),
        (&["--kernel", kernel, "--disk", "x,lun=300"], (2, "lun=300")),
        (&["--kernel", kernel, "--cpus", "0"], (2, "0 processors: give 1 to 16")),
        (&["--kernel", kernel, "--cpus", "17"], (2, "17 processors: give 1 to 16")),
        (&["--kernel", kernel, "--memory", "63M"], (2, "multiple of 2 MiB")),
        (&["--kernel", kernel, "--memory", "2048G"], (2, "at most 1024 GiB")),
        (&["--kernel", kernel, "--memory", "lots"], (2, "lots")),
        (&["--kernel", kernel, "--controllers", "9"], (2, "9")),
        (&["--kernel", kernel, "--control", "/nowhere/c"], (2, "/nowhere")),
        (&["--kernel", kernel, "--vsock", "/nowhere/v"], (2, "/nowhere")),
        (&["--kernel", kernel, "--allow", nowhere], (2, nowhere)),
        (&["--kernel", kernel, "--console", "/nowhere/log"], (5, "/nowhere/log")),
        (&["--kernel", kernel, "--disk", disk, "--disk", disk], (3, "in use")),
        (&["--disk", disk], (2, "--kernel")),
    ];
    for (arguments, (code, part)) in rows {
        let all = ["vm", "run"].iter().chain(arguments.iter());
        kmcl(all).fails(*code, part);
    }
    if is_there {
        let all = ["vm", "run", "--kernel", kernel, "--cmdline", &long];
        kmcl(all).fails(2, "5000 bytes, at most 4095 fit");
    }
}

#[test]
fn what_is_no_saved_vm_is_not_restored() {
    let dir = tempfile::tempdir().unwrap();
    let here = text(dir.path());
    let config = dir.path().join("config.json");
    kmcl(["vm", "restore", "--from", "/nowhere"]).fails(5, "/nowhere/config.json");
    kmcl(["vm", "restore", "--from", here]).fails(5, "config.json");
    for (text, part) in [
        ("not JSON", "config.json cannot be restored"),
        (r#"{"format":99,"producer":"kmcl 99"}"#, "format 99, made by kmcl 99"),
        (r#"{"format":1,"producer":"x","config":{}}"#, "missing field"),
    ] {
        std::fs::write(&config, text).unwrap();
        kmcl(["vm", "restore", "--from", here]).fails(1, part);
    }
    let disk = image(dir.path(), "disk", 1 << 20);
    let whole = format!(
        r#"{{"format":1,"producer":"x","config":{{"kernel":{:?},"memory_bytes":67108864,"processors":1}}}}"#,
        text(&disk)
    );
    std::fs::write(&config, whole).unwrap();
    kmcl(["vm", "restore", "--from", here]).fails(5, "state");
    image(dir.path(), "state", 4096);
    kmcl(["vm", "restore", "--from", here]).fails(1, "state cannot be restored");
}

#[test]
fn where_no_vm_is_controlled_nothing_is() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing");
    let missing = text(&missing);
    for command in ["info", "counters", "pause", "resume", "shutdown", "reboot"] {
        kmcl(["vm", command, "--control", missing]).fails(4, "--control of a VM that runs");
    }
    kmcl(["vm", "save", "--control", missing, "--to", "x"]).fails(4, "missing");
    kmcl(["vm", "add-disk", "--control", missing, "--disk", "x"]).fails(4, "missing");
    kmcl(["vm", "remove-disk", "--control", missing, "--id", "x"]).fails(4, "missing");
    kmcl(["vm", "ctl", "--control", missing, "vm.info"]).fails(4, "missing");
    kmcl(["vm", "save", "--control", missing]).fails(2, "--to");
}
