//! What a guest tells of its crash, for people.

use hyperv_kvm::CrashReport;
use vmbus_memory::GuestMemory;

use crate::control::{Crash, Hex};

/// Longest text that is read from a guest that has crashed: Linux has a page for it.
const MAX_MESSAGE_BYTES: usize = 4096;

/// The report, with the text that it points to: as far as that is in memory, and on one line.
pub(super) fn told(report: &CrashReport, memory: Option<&GuestMemory>) -> Crash {
    let parameters = report.parameters.map(Hex);
    let [.., address, length] = report.parameters;
    let text = || {
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(MAX_MESSAGE_BYTES);
        let mut bytes = vec![0; length];
        memory?.read(address, &mut bytes).ok().map(|()| one_line(&bytes))
    };
    let text = if report.has_message { text() } else { None };
    Crash { parameters, message: text.filter(|text| !text.is_empty()) }
}

/// Text of a guest's, without anything that a terminal would obey.
fn one_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines = text.split(|character: char| character.is_control());
    lines.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_a_guest_points_to_is_a_line_of_text_or_none() {
        let memory = GuestMemory::memfd(0x4000).unwrap();
        memory.write(0x1000, b"<4>[ 1.0] Oops\n\x1b[2Jcleared\0\0").unwrap();
        for (address, length, has_message, expected) in [
            (0x1000, 18, true, Some("<4>[ 1.0] Oops | [2")),
            (0x1000, 64, true, Some("<4>[ 1.0] Oops | [2Jcleared")),
            (0x1000, 64, false, None),
            (0x1000, 0, true, None),
            (0x2000, 64, true, None),
            (0x3ff0, 64, true, None),
            (u64::MAX, u64::MAX, true, None),
            (0x100, u64::MAX, true, Some("<4>[ 1.0] Oops | [2Jcleared")),
        ] {
            let report = CrashReport { parameters: [1, 2, 3, address, length], has_message };
            let crash = told(&report, Some(&memory));
            assert_eq!(crash.message.as_deref(), expected, "{address:#x} {length}");
            assert_eq!(crash.parameters[0], Hex(1));
        }
        let report = CrashReport { parameters: [0, 0, 0, 0x1000, 18], has_message: true };
        assert_eq!(told(&report, None).message, None, "its memory is gone");
    }
}
