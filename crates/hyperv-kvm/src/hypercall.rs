//! Hypercalls: the two that a VMBus guest makes, and the page through which it makes them.
//!
//! Source: hyperv-host sections 3 and 7.

use vmbus_host::HostBus;
use vmbus_memory::GuestMemory;
use vmbus_wire::synic::{PostMessageInput, VMBUS_MESSAGE_TYPE};

/// What a hypercall ends with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HypercallStatus(pub u16);

impl HypercallStatus {
    /// Done.
    pub const SUCCESS: Self = Self(0);
    /// There is no such hypercall.
    pub const INVALID_CODE: Self = Self(2);
    /// Its control word makes no sense.
    pub const INVALID_INPUT: Self = Self(3);
    /// Its input is not aligned, or crosses a page.
    pub const INVALID_ALIGNMENT: Self = Self(4);
    /// One of its parameters is out of range.
    pub const INVALID_PARAMETER: Self = Self(5);
    /// Not from user mode.
    pub const ACCESS_DENIED: Self = Self(6);
}

/// Codes.
const POST_MESSAGE: u16 = 0x5c;
const SIGNAL_EVENT: u16 = 0x5d;

/// A hypercall's control word.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Control(u64);

impl Control {
    fn code(self) -> u16 {
        u16::try_from(self.0 & 0xffff).unwrap_or(u16::MAX)
    }

    fn is_fast(self) -> bool {
        self.0 & 1 << 16 != 0
    }

    /// Variable headers and repetitions: neither call has any.
    fn is_simple(self) -> bool {
        self.0 >> 17 == 0
    }
}

/// Carries a hypercall out. `input` is a guest physical address, or the value itself for a fast one.
#[must_use]
pub fn call(bus: &HostBus, memory: &GuestMemory, control: u64, input: u64) -> HypercallStatus {
    let control = Control(control);
    match control.code() {
        POST_MESSAGE | SIGNAL_EVENT if !control.is_simple() => HypercallStatus::INVALID_INPUT,
        POST_MESSAGE if control.is_fast() => HypercallStatus::INVALID_INPUT,
        POST_MESSAGE => post_message(bus, memory, input),
        SIGNAL_EVENT if control.is_fast() => signal_event(bus, input),
        SIGNAL_EVENT => {
            let Ok(()) = within_page(input, 8) else { return HypercallStatus::INVALID_ALIGNMENT };
            memory
                .read_obj::<u64>(input)
                .map_or(HypercallStatus::INVALID_PARAMETER, |input| signal_event(bus, input))
        }
        _ => HypercallStatus::INVALID_CODE,
    }
}

/// Input is aligned to 8 bytes and lies in one page.
fn within_page(gpa: u64, len: u64) -> Result<(), ()> {
    if gpa.is_multiple_of(8) && (gpa & 0xfff) + len <= 0x1000 { Ok(()) } else { Err(()) }
}

fn post_message(bus: &HostBus, memory: &GuestMemory, gpa: u64) -> HypercallStatus {
    if within_page(gpa, size_of::<PostMessageInput>() as u64).is_err() {
        return HypercallStatus::INVALID_ALIGNMENT;
    }
    // One copy: from here on the guest cannot change it.
    let Ok(input) = memory.read_obj::<PostMessageInput>(gpa) else {
        return HypercallStatus::INVALID_PARAMETER;
    };
    let message = match input.message() {
        Ok(message) if input.message_type.get() == VMBUS_MESSAGE_TYPE => message,
        _ => return HypercallStatus::INVALID_PARAMETER,
    };
    match bus.post_message(input.connection_id.get(), message) {
        Ok(()) => HypercallStatus::SUCCESS,
        Err(error) => HypercallStatus(error.hypercall_status()),
    }
}

/// `input`: connection in the lower half, flag number in the 16 bits above it.
fn signal_event(bus: &HostBus, input: u64) -> HypercallStatus {
    let connection = u32::try_from(input & 0xffff_ffff).unwrap_or(u32::MAX);
    let flag = u16::try_from(input >> 32 & 0xffff).unwrap_or(u16::MAX);
    match bus.guest_signal(connection, flag) {
        Ok(()) => HypercallStatus::SUCCESS,
        Err(error) => HypercallStatus(error.hypercall_status()),
    }
}

/// The port that the page's code writes for a hypercall, one byte: an exit of that vCPU.
pub const CALL_PORT: u16 = 0xec;
/// The port to which it writes the connection of a signal, four bytes: an eventfd where the connection
/// is listened to, else an exit.
pub const SIGNAL_PORT: u16 = 0xe8;

/// The code of the hypercall page where KVM does not write its own: 64-bit guests only.
///
/// KVM answers VMCALL by itself, so the call is a write to a port, which leaves every register as it
/// is. A signal, by far the most frequent call, has a port of its own whose value is the connection:
/// KVM matches it with an eventfd, and the vCPU does not leave the kernel. Its status is in r8, which a
/// hypercall may change: 0, unless the write was an exit that put something else there.
#[rustfmt::skip]
pub const PAGE_CODE: [u8; 36] = [
    0xf3, 0x0f, 0x1e, 0xfa,             // endbr64
    0x81, 0xf9, 0x5d, 0x00, 0x01, 0x00, // cmp  ecx, 0x1005d: a fast signal
    0x75, 0x15,                         // jne  call
    0x48, 0x89, 0xd0,                   // mov  rax, rdx
    0x48, 0xc1, 0xe8, 0x20,             // shr  rax, 32: of flag 0
    0x75, 0x0c,                         // jne  call
    0x89, 0xd0,                         // mov  eax, edx
    0x45, 0x31, 0xc0,                   // xor  r8d, r8d
    0xe7, 0xe8,                         // out  0xe8, eax
    0x4c, 0x89, 0xc0,                   // mov  rax, r8
    0xc3,                               // ret
    0x90,                               // nop
    0xe6, 0xec,                         // call: out 0xec, al
    0xc3,                               // ret
];

/// The code of the hypercall page of a guest that was saved where KVM had written its own: a call of
/// three bytes at the start, a return behind it. Somebody may be about to execute either.
///
/// Such a guest has seen that the page does not begin with `endbr64`, and has made do without.
#[rustfmt::skip]
pub(crate) const PAGE_CODE_AFTER_KVM: [u8; 36] = {
    let mut code = PAGE_CODE;
    let (start, _) = code.split_at_mut(4);
    start.copy_from_slice(&[
        0xeb, 0x02, // jmp over the next two
        0x90,       // nop: nobody comes here
        0xc3,       // ret: where KVM's is
    ]);
    code
};

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use kmcl::bus::{Doorbell, Signal};
    use vmbus_host::{Config, GuestPort, Posted, SlotId};

    use super::*;

    /// A guest of one VP, to whom nothing gets through.
    struct Nobody(GuestMemory);

    impl GuestPort for Nobody {
        fn memory(&self) -> Option<GuestMemory> {
            Some(self.0.clone())
        }
        fn vp_count(&self) -> u32 {
            1
        }
        fn post_message(&self, _: SlotId, _: &[u8]) -> Posted {
            Posted::Busy
        }
        fn event_flag(&self, _: u32, _: u8, _: u16) -> io::Result<Arc<dyn Signal>> {
            Err(io::ErrorKind::Unsupported.into())
        }
        fn listen(&self, _: u32, _: Arc<dyn Doorbell>) -> io::Result<()> {
            Ok(())
        }
        fn unlisten(&self, _: u32) {}
    }

    /// The input of HvPostMessage: connection, message type, length, message.
    fn message(connection: u32, message_type: u32, len: u32, message: &[u8]) -> Vec<u8> {
        let words = [connection, 0, message_type, len];
        let mut input: Vec<_> = words.into_iter().flat_map(u32::to_le_bytes).collect();
        input.extend(message);
        input.resize(size_of::<PostMessageInput>(), 0);
        input
    }

    /// Connection of the guest's messages, and a first message: INITIATE_CONTACT for version 5.3.
    const MESSAGES: u32 = 1;
    fn contact() -> Vec<u8> {
        let words = [14_u32, 0, 5 << 16 | 3, 0, 0, 0, 0, 0, 0, 0];
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// Control word, input, what is in memory at 0x1000, status.
    #[test]
    fn calls_are_refused_by_what_is_wrong_with_them() {
        const FAST: u64 = 1 << 16;
        const POST: u64 = 0x5c;
        const SIGNAL: u64 = 0x5d;
        const AT: u64 = 0x1000;
        let good = message(MESSAGES, 1, 40, &contact());
        let nothing: &[u8] = &[];
        let no_flag = HypercallStatus::INVALID_PARAMETER;
        let unknown_connection = HypercallStatus(18);
        for (what, control, input, memory, expected) in [
            ("a message", POST, AT, &*good, HypercallStatus::SUCCESS),
            ("no such call", 0x5e, AT, &good, HypercallStatus::INVALID_CODE),
            ("call 0", 0, 0, nothing, HypercallStatus::INVALID_CODE),
            ("bits above the call", POST | 1 << 63, AT, &good, HypercallStatus::INVALID_INPUT),
            ("a variable header", POST | 1 << 17, AT, &good, HypercallStatus::INVALID_INPUT),
            ("repetitions", POST | 1 << 32, AT, &good, HypercallStatus::INVALID_INPUT),
            ("a start of them", SIGNAL | 1 << 48, AT, nothing, HypercallStatus::INVALID_INPUT),
            ("a fast message", POST | FAST, AT, &good, HypercallStatus::INVALID_INPUT),
            ("not aligned", POST, AT + 4, &good, HypercallStatus::INVALID_ALIGNMENT),
            ("across pages", POST, AT + 0xf08, &good, HypercallStatus::INVALID_ALIGNMENT),
            ("not memory", POST, 0x10_0000, nothing, HypercallStatus::INVALID_PARAMETER),
            ("the end of addresses", POST, !0xfff, nothing, HypercallStatus::INVALID_PARAMETER),
            (
                "another type",
                POST,
                AT,
                &message(MESSAGES, 2, 40, &contact()),
                HypercallStatus::INVALID_PARAMETER,
            ),
            (
                "longer than can be",
                POST,
                AT,
                &message(MESSAGES, 1, 241, &contact()),
                HypercallStatus::INVALID_PARAMETER,
            ),
            ("another connection", POST, AT, &message(99, 1, 40, &contact()), unknown_connection),
            ("a signal to nobody", SIGNAL | FAST, 77, nothing, unknown_connection),
            ("another flag", SIGNAL | FAST, 77 | 5 << 32, nothing, no_flag),
            ("a signal from memory", SIGNAL, AT, &[77, 0, 0, 0, 5, 0, 0, 0], no_flag),
            ("not aligned", SIGNAL, AT + 1, nothing, HypercallStatus::INVALID_ALIGNMENT),
            ("not memory", SIGNAL, 0x10_0000, nothing, HypercallStatus::INVALID_PARAMETER),
        ] {
            let ram = GuestMemory::memfd(0x4000).unwrap();
            ram.write(AT, memory).unwrap();
            let bus = HostBus::new(Arc::new(Nobody(ram.clone())), Config::default());
            assert_eq!(call(&bus, &ram, control, input), expected, "{what}");
        }
    }

    /// The jumps of the page end at its slow way, which writes the ports that are listened to.
    #[test]
    fn the_pages_jumps_meet_their_target() {
        let slow = PAGE_CODE.len() - 3;
        assert_eq!(PAGE_CODE[slow], 0xe6);
        assert_eq!(u16::from(PAGE_CODE[slow + 1]), CALL_PORT);
        for (at, opcode) in PAGE_CODE.iter().enumerate().filter(|(_, byte)| **byte == 0x75) {
            assert_eq!(*opcode, 0x75);
            assert_eq!(at + 2 + usize::from(PAGE_CODE[at + 1]), slow, "jump at {at}");
        }
        let signal = PAGE_CODE.windows(2).position(|two| two == [0xe7, 0xe8]).unwrap();
        assert_eq!(u16::from(PAGE_CODE[signal + 1]), SIGNAL_PORT);
    }
}
