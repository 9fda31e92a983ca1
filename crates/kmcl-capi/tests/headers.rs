//! The headers say what the library does: types, constants, tables, symbols.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may stop at its first surprise")]

mod common;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::mem::offset_of;
use std::process::Command;

use kmcl::NtStatus;
use kmcl_capi::tables::{ClientInterface, ClientMethods, ServerInterface, ServerMethods};
use kmcl_capi::types::{
    CGuid, FreezeCallbacks, Interface, Mdl, StateChangeCallbacks, UnicodeString,
};

use common::{C, CPP, include, libraries, run};

/// Every compiler that is there takes every header alone, without a warning.
#[test]
fn headers_compile_as_c11_and_cpp17_without_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    for header in ["kmcl_wdm.h", "vmbuskernelmodeclientlibapi.h", "kmcl.h"] {
        let source = folder.path().join("alone.c");
        std::fs::write(&source, format!("#include \"{header}\"\n#include \"{header}\"\nint x;\n"))
            .unwrap();
        for (compiler, flags) in [("gcc", C), ("g++", CPP), ("clang", C), ("clang++", CPP)] {
            if common::is_there(compiler) {
                let mut command = Command::new(compiler);
                command.args(flags).args(["-c", "-o", "/dev/null", "-I"]).arg(include());
                run(command.arg(&source));
            }
        }
    }
}

/// One line of the generated part for each status.
fn statuses() -> String {
    let mut text = String::new();
    for status in NtStatus::NAMED {
        let name = status.name().unwrap();
        writeln!(text, "#define {name} ((NTSTATUS)0x{:08X}u)", status.0).unwrap();
    }
    text
}

/// With `KMCL_REGENERATE` set it is written instead.
#[test]
fn the_generated_part_is_what_would_be_generated() {
    const BEGIN: &str = "/* BEGIN GENERATED STATUSES */\n";
    const END: &str = "/* END GENERATED STATUSES */";
    let path = include().join("kmcl_wdm.h");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once(END).unwrap();
    let expected = statuses();
    if std::env::var_os("KMCL_REGENERATE").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{expected}{END}{after}")).unwrap();
    } else {
        assert_eq!(found, expected, "run this test with KMCL_REGENERATE=1");
    }
}

/// Sizes, offsets and constants by name: what C prints, and what Rust has.
fn facts() -> Vec<(String, u64)> {
    let mut facts = Vec::new();
    let mut add = |name: &str, value: usize| facts.push((name.to_owned(), value as u64));
    macro_rules! structure {
        ($c:literal, $rust:ty { $($c_field:literal = $field:tt,)* }) => {
            add(concat!("sizeof(", $c, ")"), size_of::<$rust>());
            $(add(
                concat!("offsetof(", $c, ", ", $c_field, ")"),
                offset_of!($rust, $field),
            );)*
        };
    }
    structure!("GUID", CGuid { "Data1" = data1, "Data2" = data2, "Data3" = data3, "Data4" = data4, });
    structure!("UNICODE_STRING", UnicodeString {
        "Length" = length, "MaximumLength" = maximum_length, "Buffer" = buffer,
    });
    structure!("MDL", Mdl {
        "Next" = next, "Size" = size, "MdlFlags" = flags, "Process" = process,
        "MappedSystemVa" = mapped_system_va, "StartVa" = start_va, "ByteCount" = byte_count,
        "ByteOffset" = byte_offset,
    });
    structure!("INTERFACE", Interface {
        "Size" = size, "Version" = version, "Context" = context,
        "InterfaceReference" = reference, "InterfaceDereference" = dereference,
    });
    structure!("VMB_CHANNEL_STATE_CHANGE_CALLBACKS", StateChangeCallbacks {
        "Version" = version, "Size" = size, "EvtChannelOpened" = opened,
        "EvtChannelClosed" = closed, "EvtChannelSuspend" = suspend,
        "EvtChannelStarted" = started, "EvtChannelPostStarted" = post_started,
    });
    structure!("KMCL_FREEZE_CALLBACKS", FreezeCallbacks {
        "Size" = size, "EvtFreeze" = freeze, "EvtThaw" = thaw, "EvtResumePacket" = resume_packet,
    });
    structure!("KMCL_CLIENT_INTERFACE_V1", ClientInterface {});
    structure!("KMCL_SERVER_INTERFACE_V1", ServerInterface {});
    structure!("KMCL_SERVER_ONLY_METHODS", ServerMethods {});
    // Tables have pointers only: a member's place is its number.
    let client = offset_of!(ClientInterface, client);
    let server = offset_of!(ServerInterface, server);
    for (table, first, members) in [
        ("KMCL_CLIENT_INTERFACE_V1", client, ClientMethods::MEMBERS),
        ("KMCL_SERVER_INTERFACE_V1", client, ClientMethods::MEMBERS),
        ("KMCL_SERVER_INTERFACE_V1", server, ServerMethods::MEMBERS),
        ("KMCL_SERVER_ONLY_METHODS", 0, ServerMethods::MEMBERS),
    ] {
        for (number, member) in members.iter().enumerate() {
            let member = member.rsplit("::").next().unwrap().trim();
            add(&format!("offsetof({table}, {member})"), first + 8 * number);
        }
    }
    let mut flag = |name: &str, bits: u32| facts.push((name.to_owned(), u64::from(bits)));
    use kmcl::{ChannelFlags, ExternalDataFlags, GpadlFlags, SendFlags, ServerFlags};
    flag("VMBUS_CHANNEL_INIT_FLAG_IS_PIPE", ChannelFlags::IS_PIPE.bits());
    flag("VMBUS_CHANNEL_INIT_FLAGS", ChannelFlags::all().bits());
    let server = "VMBUS_SERVER_CHANNEL_INIT_FLAG";
    for (name, bit) in ServerFlags::all().iter_names() {
        flag(&format!("{server}_{name}"), bit.bits());
    }
    flag(&format!("{server}S"), ServerFlags::all().bits());
    for (name, bit) in SendFlags::all().iter_names() {
        flag(&format!("VMBUS_CHANNEL_FORMAT_FLAG_{name}"), bit.bits());
    }
    flag("VMBUS_CHANNEL_FORMAT_FLAGS", SendFlags::all().bits());
    flag("VMBUS_CHANNEL_GPADL_FLAG_READ_ONLY", GpadlFlags::READ_ONLY.bits());
    flag("VMBUS_CHANNEL_GPADL_READ_ONLY", GpadlFlags::READ_ONLY.bits());
    flag("VMBUS_CHANNEL_GPADL_FLAGS", GpadlFlags::all().bits());
    let external = "VMBUS_CHANNEL_PACKET_EXTERNAL_DATA_FLAG";
    flag(&format!("{external}_READ_ONLY"), ExternalDataFlags::READ_ONLY.bits());
    flag(&format!("{external}S"), ExternalDataFlags::all().bits());
    flag("VMBUS_SERVER_CHANNEL_INIT_MAXIMUM_OFFER_DATA", 120);
    flag("KMCL_CLIENT_INTERFACE_VERSION_V1", kmcl_capi::tables::VERSION_V1.into());
    flag("KMCL_SERVER_INTERFACE_VERSION_V1", kmcl_capi::tables::VERSION_V1.into());
    flag("KMCL_VERSION", kmcl_capi::system::KmclVersion());
    for state in kmcl::ChannelState::ALL {
        flag(&format!("KmclChannel{state:?}"), state as u32);
    }
    for status in NtStatus::NAMED {
        facts.push((format!("(uint32_t){}", status.name().unwrap()), u64::from(status.0)));
    }
    facts
}

#[test]
fn sizes_offsets_and_constants_are_the_same_in_c_and_rust() {
    let facts = facts();
    let mut source = "#include <stdio.h>\n#include \"kmcl.h\"\nint main(void)\n{\n".to_owned();
    for (name, _) in &facts {
        writeln!(source, "    printf(\"%llu\\n\", (unsigned long long)({name}));").unwrap();
    }
    source.push_str("    return 0;\n}\n");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("facts.c");
    std::fs::write(&path, source).unwrap();
    for (compiler, flags) in [("cc", C), ("c++", CPP)] {
        let program = folder.path().join("facts");
        let mut command = Command::new(compiler);
        command.args(flags).arg("-I").arg(include()).arg(&path).arg("-o").arg(&program);
        run(&mut command);
        let said = String::from_utf8(run(&mut Command::new(&program)).stdout).unwrap();
        let in_c: Vec<u64> = said.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(in_c.len(), facts.len());
        for ((name, in_rust), in_c) in facts.iter().zip(in_c) {
            assert_eq!(*in_rust, in_c, "{compiler}: {name}");
        }
    }
}

/// The tables have the documented functions, in the documented order, and nothing else.
#[test]
fn the_tables_have_41_and_14_functions() {
    assert_eq!((ClientMethods::MEMBERS.len(), ServerMethods::MEMBERS.len()), (41, 14));
}

#[test]
fn only_the_interfaces_symbols_are_exported() {
    let mut command = Command::new("nm");
    command.args(["-D", "--defined-only"]).arg(libraries().join("libkmcl_capi.so"));
    let listing = String::from_utf8(run(&mut command).stdout).unwrap();
    let exported: BTreeSet<&str> =
        listing.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    let strange: Vec<_> = exported
        .iter()
        .filter(|name| !["Vmb", "Kmcl", "KMCL_"].iter().any(|prefix| name.starts_with(prefix)))
        .collect();
    assert!(strange.is_empty(), "{strange:?}");

    // And all of those that the headers declare.
    let mut missing = Vec::new();
    for header in ["kmcl_wdm.h", "vmbuskernelmodeclientlibapi.h", "kmcl.h"] {
        let text = std::fs::read_to_string(include().join(header)).unwrap();
        for line in text.lines().filter(|line| !line.starts_with([' ', '#', '/', '*'])) {
            // `FN_X X;` and `TYPE Kmcl…(` are the two forms of a declaration.
            let words: Vec<&str> = line.split([' ', '*']).collect();
            let declared = words.iter().find_map(|word| {
                let name =
                    word.split_once('(').map_or_else(|| word.strip_suffix(';'), |it| Some(it.0))?;
                let ours = name.starts_with("Vmb") || name.starts_with("Kmcl");
                (ours && name.chars().all(char::is_alphanumeric)).then_some(name)
            });
            let is_statement = !line.starts_with("typedef") && !line.starts_with('}');
            missing.extend(
                declared.filter(|name| is_statement && !exported.contains(name)).map(str::to_owned),
            );
        }
    }
    assert!(missing.is_empty(), "declared and not exported: {missing:?}");
    assert!(exported.len() >= 56 + 30, "{}", exported.len());
}
