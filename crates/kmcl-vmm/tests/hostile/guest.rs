//! A guest that means harm, assembled: for as many actions as it is given it writes nonsense to every
//! synthetic MSR, posts and signals at random between steps of a proper conversation, moves its SynIC and
//! hypercall pages to absurd addresses, overwrites its rings while they are open, and resets in the end.
//!
//! It is one piece of 64-bit code at [`LOAD_ADDRESS`], entered as a Linux kernel is: memory mapped to
//! itself, interrupts off. Whatever fault it meets, it goes on with its next action.
//!
//! ```text
//! 1 MiB: this code   1.5 MiB: stack, IDT   2 MiB: pages that the proper conversation uses   4 MiB …: arena
//! ```

use iced_x86::code_asm::*;

/// Where the code is loaded.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;

const STACK: u64 = 0x18_0000;
/// Descriptors of its own: page 0, where the loader has put some, is there to be overwritten.
const GDT: u64 = 0x19_0000;
const IDT: u64 = 0x1a_0000;
/// What LGDT and LIDT read.
const POINTERS: u64 = 0x1b_0000;
/// Pages for hypercalls, messages, event flags, and the input of calls, one after the other.
const PAGES: u64 = 0x20_0000;
const CALL_PAGE: u64 = PAGES;
const MESSAGE_PAGE: u64 = PAGES + 0x1000;
const EVENT_PAGE: u64 = PAGES + 0x2000;
const INPUT: u64 = PAGES + 0x3000;
/// Both rings of the channels that it opens.
const RINGS: u64 = PAGES + 0x1_0000;
const RING_PAGES: u64 = 16;
/// What it overwrites at random: the rest of 64 MiB.
const ARENA: u32 = 0x40_0000;
const ARENA_MASK: u32 = 0x3ff_fff8;

/// Null, null, 64-bit code, data, task.
const DESCRIPTORS: [u64; 5] =
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];
const CODE_SELECTOR: u16 = 0x10;
const SERIAL: u32 = 0x3f8;
/// Ports that the hypercall page writes where KVM does not emulate Hyper-V.
const CALL_PORT: u32 = 0xec;
const SIGNAL_PORT: u32 = 0xe8;

const GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERCALL: u32 = 0x4000_0001;
const RESET: u32 = 0x4000_0003;
const SCONTROL: u32 = 0x4000_0080;
const SIEFP: u32 = 0x4000_0082;
const SIMP: u32 = 0x4000_0083;
const EOM: u32 = 0x4000_0084;
const SINT2: u32 = 0x4000_0092;
const VECTOR: u32 = 0x50;

/// A message's type, of which no other byte is set.
const OPEN_CHANNEL: i32 = 5;

/// Registers that are there or nearly: half of all writes go to these.
const MSRS: [u32; 32] = [
    0x4000_0000,
    0x4000_0001,
    0x4000_0002,
    0x4000_0020,
    0x4000_0021,
    0x4000_0022,
    0x4000_0023,
    0x4000_0040,
    0x4000_0070,
    0x4000_0071,
    0x4000_0072,
    0x4000_0073,
    0x4000_0080,
    0x4000_0081,
    0x4000_0082,
    0x4000_0083,
    0x4000_0084,
    0x4000_0090,
    0x4000_0091,
    0x4000_0092,
    0x4000_0093,
    0x4000_009f,
    0x4000_00b0,
    0x4000_00b1,
    0x4000_0100,
    0x4000_0104,
    0x4000_0105,
    0x4000_0106,
    0x4000_0107,
    0x4000_0108,
    0x4000_0118,
    0x4000_01ff,
];

/// What the guest does, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan<'a> {
    /// Decides everything; 0 takes the processor's clock.
    pub(crate) seed: u64,
    /// How much it does before it resets.
    pub(crate) actions: u32,
    /// The steps of a proper conversation: inputs of HvPostMessage, 256 bytes each, at least one.
    pub(crate) messages: &'a [[u8; 256]],
    /// The connection that the first channel is signalled by; those of others follow.
    pub(crate) first_connection: u32,
}

/// Pages of the rings, as a GPADL lists them.
pub(crate) fn ring_pages() -> impl Iterator<Item = u64> {
    (0..RING_PAGES).map(|page| (RINGS >> 12) + page)
}

/// The guest's code.
///
/// # Errors
/// None, unless the assembler disagrees with what is written here.
pub(crate) fn assemble(plan: &Plan<'_>) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut labels = Labels {
        again: a.create_label(),
        random: a.create_label(),
        value: a.create_label(),
        call: a.create_label(),
        post: a.create_label(),
        msrs: a.create_label(),
        messages: a.create_label(),
        fault: a.create_label(),
        table: a.create_label(),
    };
    let l = &mut labels;
    set_up(&mut a, l, plan)?;
    actions(&mut a, l, plan)?;
    subroutines(&mut a, l)?;
    data(&mut a, l, plan)?;
    a.assemble(LOAD_ADDRESS)
}

struct Labels {
    again: CodeLabel,
    random: CodeLabel,
    value: CodeLabel,
    call: CodeLabel,
    post: CodeLabel,
    msrs: CodeLabel,
    messages: CodeLabel,
    fault: CodeLabel,
    /// The numbers of [`MSRS`].
    table: CodeLabel,
}

// rbx: the random numbers' state; r12: actions left; r13: the next message of the conversation.

fn set_up(a: &mut CodeAssembler, l: &mut Labels, plan: &Plan<'_>) -> Result<(), IcedError> {
    a.cli()?;
    a.mov(rsp, STACK)?;
    // Every vector has the same gate.
    a.lea(rax, ptr(l.fault))?;
    a.mov(rdx, rax)?;
    a.and(edx, 0xffff_u32)?;
    a.mov(rcx, 0x8e00_u64 << 32 | u64::from(CODE_SELECTOR) << 16)?;
    a.or(rdx, rcx)?;
    a.mov(rcx, rax)?;
    a.shr(rcx, 16)?;
    a.shl(rcx, 48)?;
    a.or(rdx, rcx)?;
    a.mov(rdi, IDT)?;
    a.mov(ecx, 256_u32)?;
    let mut gate = a.create_label();
    a.set_label(&mut gate)?;
    a.mov(qword_ptr(rdi), rdx)?;
    a.mov(qword_ptr(rdi + 8), 0)?;
    a.add(rdi, 16)?;
    a.dec(ecx)?;
    a.jne(gate)?;
    a.mov(rdi, GDT)?;
    for descriptor in DESCRIPTORS {
        a.mov(rax, descriptor)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.add(rdi, 8)?;
    }
    a.mov(rdi, POINTERS)?;
    a.mov(word_ptr(rdi), 5 * 8 - 1)?;
    a.mov(rax, GDT)?;
    a.mov(qword_ptr(rdi + 2), rax)?;
    a.lgdt(ptr(rdi))?;
    a.mov(word_ptr(rdi), 256 * 16 - 1)?;
    a.mov(rax, IDT)?;
    a.mov(qword_ptr(rdi + 2), rax)?;
    a.lidt(ptr(rdi))?;
    if plan.seed == 0 {
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(rbx, rax)?;
        a.or(rbx, 1)?;
    } else {
        a.mov(rbx, plan.seed)?;
    }
    a.mov(r12d, plan.actions)?;
    a.xor(r13d, r13d)?;
    print(a, b'H')?;
    // Without the host's code, calling the page does nothing.
    a.mov(rdi, CALL_PAGE)?;
    a.mov(ecx, 0x1000_u32)?;
    a.mov(eax, 0xc3_u32)?;
    a.rep().stosb()?;
    Ok(())
}

fn print(a: &mut CodeAssembler, byte: u8) -> Result<(), IcedError> {
    a.mov(edx, SERIAL)?;
    a.mov(eax, u32::from(byte))?;
    a.out(dx, al)
}

fn write_msr(a: &mut CodeAssembler, msr: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, msr)?;
    a.mov(eax, (value & 0xffff_ffff) as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

fn actions(a: &mut CodeAssembler, l: &mut Labels, plan: &Plan<'_>) -> Result<(), IcedError> {
    let mut become_proper = a.create_label();
    let mut act = a.create_label();
    let mut die = a.create_label();
    // The first thing, and one of the actions.
    a.set_label(&mut become_proper)?;
    for (msr, value) in [
        (GUEST_OS_ID, 0x8100_0000_0006_0c00),
        (HYPERCALL, CALL_PAGE | 1),
        (SIMP, MESSAGE_PAGE | 1),
        (SIEFP, EVENT_PAGE | 1),
        (SINT2, VECTOR.into()),
        (SCONTROL, 1),
    ] {
        write_msr(a, msr, value)?;
    }

    a.set_label(&mut l.again)?;
    a.mov(rsp, STACK)?;
    a.dec(r12d)?;
    a.je(die)?;
    // It is alive.
    a.test(r12d, 0xfff)?;
    a.jne(act)?;
    print(a, b'.')?;
    a.set_label(&mut act)?;
    a.call(l.random)?;
    a.and(eax, 15)?;
    let mut ways = [(); 9].map(|()| a.create_label());
    // Of sixteen, the first ways have so many each; the last has the rest.
    let mut below = 0_i32;
    for (way, weight) in ways.iter().zip([3, 1, 4, 1, 2, 1, 2, 1]) {
        below += weight;
        a.cmp(eax, below)?;
        a.jb(*way)?;
    }
    let [w_msr, r_msr, converse, garbage, signal, port, take, stomp, rings] = &mut ways;
    a.jmp(*rings)?;

    // A register, and anything.
    a.set_label(w_msr)?;
    a.call(l.msrs)?;
    a.mov(rbp, rcx)?;
    a.call(l.value)?;
    a.mov(rcx, rbp)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 32)?;
    a.wrmsr()?;
    a.jmp(l.again)?;

    a.set_label(r_msr)?;
    a.call(l.msrs)?;
    a.rdmsr()?;
    a.call(l.random)?;
    a.and(eax, 3)?;
    a.je(become_proper)?;
    a.jmp(l.again)?;

    // The next message of the conversation; one of four with a byte of it changed.
    a.set_label(converse)?;
    let mut within = a.create_label();
    a.inc(r13d)?;
    a.cmp(r13d, i32::try_from(plan.messages.len()).unwrap_or(i32::MAX))?;
    a.jb(within)?;
    a.xor(r13d, r13d)?;
    a.set_label(&mut within)?;
    a.lea(rsi, ptr(l.messages))?;
    a.mov(rax, r13)?;
    a.shl(rax, 8)?;
    a.add(rsi, rax)?;
    a.mov(rdi, INPUT)?;
    a.mov(ecx, 256_u32)?;
    a.rep().movsb()?;
    // Rings are empty, usually, when they are opened.
    let mut as_they_are = a.create_label();
    a.cmp(byte_ptr(INPUT + 16), OPEN_CHANNEL)?;
    a.jne(as_they_are)?;
    a.xor(eax, eax)?;
    for ring in [RINGS, RINGS + RING_PAGES / 2 * 0x1000] {
        a.mov(rdi, ring)?;
        a.mov(ecx, 0x80_u32)?;
        a.rep().stosb()?;
    }
    a.set_label(&mut as_they_are)?;
    a.call(l.random)?;
    a.test(eax, 3)?;
    a.jne(l.post)?;
    a.mov(rdi, INPUT)?;
    a.shr(rax, 8)?;
    a.mov(ecx, eax)?;
    a.and(ecx, 0xff_u32)?;
    a.add(rdi, rcx)?;
    a.shr(rax, 8)?;
    a.mov(byte_ptr(rdi), al)?;
    a.jmp(l.post)?;

    // Words that are nearly a message; or a call with anything at all.
    a.set_label(garbage)?;
    a.mov(rdi, INPUT)?;
    for (offset, mask) in [(0, 7), (8, 1), (12, 0xff), (16, 0x1f), (24, 0xf), (28, 0xff)] {
        a.call(l.random)?;
        a.and(eax, mask)?;
        a.mov(dword_ptr(rdi + offset), eax)?;
    }
    a.call(l.random)?;
    a.test(eax, 1)?;
    a.je(l.post)?;
    a.call(l.value)?;
    a.mov(rbp, rax)?;
    a.call(l.value)?;
    a.mov(rdx, rax)?;
    a.mov(rcx, rbp)?;
    a.jmp(l.call)?;

    a.set_label(signal)?;
    a.call(l.random)?;
    a.mov(edx, eax)?;
    a.and(edx, 7)?;
    a.add(edx, i32::try_from(plan.first_connection).unwrap_or(0))?;
    a.mov(ecx, 0x1_005d_u32)?;
    a.jmp(l.call)?;

    // The hypercall's ports, and any other.
    a.set_label(port)?;
    let mut any_port = a.create_label();
    a.call(l.random)?;
    a.mov(rbp, rax)?;
    a.mov(ecx, 0x5c_u32)?;
    a.call(l.value)?;
    a.mov(rdx, rax)?;
    a.mov(rsi, rdx)?;
    a.test(rbp, 1)?;
    a.je(any_port)?;
    a.out(CALL_PORT, al)?;
    a.out(SIGNAL_PORT, eax)?;
    a.jmp(l.again)?;
    a.set_label(&mut any_port)?;
    a.mov(rdx, rbp)?;
    a.shr(edx, 8)?;
    a.in_(eax, dx)?;
    a.mov(eax, esi)?;
    a.out(dx, al)?;
    a.jmp(l.again)?;

    // Takes a message; what the host has said matters to nobody.
    a.set_label(take)?;
    a.mov(rdi, MESSAGE_PAGE + 0x200)?;
    a.mov(dword_ptr(rdi), 0)?;
    write_msr(a, EOM, 0)?;
    a.jmp(l.again)?;

    // Anything, anywhere.
    a.set_label(stomp)?;
    a.call(l.random)?;
    a.mov(rdi, rax)?;
    a.and(edi, i32::try_from(ARENA_MASK).unwrap_or(0))?;
    a.or(edi, i32::try_from(ARENA).unwrap_or(0))?;
    a.call(l.random)?;
    a.mov(qword_ptr(rdi), rax)?;
    a.jmp(l.again)?;

    // Indices, masks and packets of its rings: now and then what a packet looks like.
    a.set_label(rings)?;
    a.call(l.random)?;
    a.mov(rdi, rax)?;
    a.and(edi, i32::try_from((RING_PAGES - 1) << 12 | 0xf8).unwrap_or(0))?;
    a.mov(rsi, RINGS)?;
    a.add(rdi, rsi)?;
    a.call(l.random)?;
    a.mov(rcx, 0x0001_000a_0002_0006_u64)?;
    a.test(eax, 1 << 16)?;
    a.cmovne(rax, rcx)?;
    a.mov(rcx, 0x7ff8_u64)?;
    a.test(eax, 1 << 17)?;
    let mut whole = a.create_label();
    a.je(whole)?;
    a.and(rax, rcx)?;
    a.set_label(&mut whole)?;
    a.mov(qword_ptr(rdi), rax)?;
    a.jmp(l.again)?;

    // In the middle of whatever there was.
    a.set_label(&mut die)?;
    print(a, b'R')?;
    write_msr(a, RESET, 1)?;
    a.hlt()?;
    a.jmp(die)
}

fn subroutines(a: &mut CodeAssembler, l: &mut Labels) -> Result<(), IcedError> {
    // Any fault: what was tried is given up.
    a.set_label(&mut l.fault)?;
    a.jmp(l.again)?;

    // Marsaglia's xorshift: rax.
    a.set_label(&mut l.random)?;
    for (left, by) in [(true, 13), (false, 7), (true, 17)] {
        a.mov(rax, rbx)?;
        if left {
            a.shl(rax, by)?;
        } else {
            a.shr(rax, by)?;
        }
        a.xor(rbx, rax)?;
    }
    a.mov(rax, rbx)?;
    a.ret()?;

    // A value that might be an address with its enable bit, or not: rax. Uses rcx, rdx.
    a.set_label(&mut l.value)?;
    let mut kinds = [(); 7].map(|()| a.create_label());
    a.call(l.random)?;
    a.mov(rdx, rax)?;
    a.shr(rdx, 61)?;
    for (number, kind) in (0_i32..).zip(&kinds) {
        a.cmp(edx, number)?;
        a.je(*kind)?;
    }
    // Any 64 bits.
    a.ret()?;
    let [ram, disabled, small, beyond, ones, apic, own] = &mut kinds;
    a.set_label(ram)?;
    a.and(eax, 0x3ff_f000)?;
    a.or(eax, i32::try_from(ARENA | 1).unwrap_or(0))?;
    a.ret()?;
    a.set_label(disabled)?;
    a.and(eax, 0x3ff_f000)?;
    a.ret()?;
    a.set_label(small)?;
    a.and(eax, 0xff)?;
    a.ret()?;
    a.set_label(beyond)?;
    a.mov(rcx, 0x000f_ffff_ffff_f000_u64)?;
    a.and(rax, rcx)?;
    a.mov(rcx, 1_u64 << 40 | 1)?;
    a.or(rax, rcx)?;
    a.ret()?;
    a.set_label(ones)?;
    a.mov(rax, u64::MAX)?;
    a.ret()?;
    a.set_label(apic)?;
    a.mov(rax, 0xfee0_0001_u64)?;
    a.ret()?;
    // Its message page or its event page: not the page that it calls.
    a.set_label(own)?;
    a.and(eax, 0x1000)?;
    a.mov(rcx, MESSAGE_PAGE | 1)?;
    a.add(rax, rcx)?;
    a.ret()?;

    // The number of a synthetic register: ecx.
    a.set_label(&mut l.msrs)?;
    let mut any = a.create_label();
    a.call(l.random)?;
    a.mov(ecx, eax)?;
    a.and(ecx, 0x1ff)?;
    a.or(ecx, i32::try_from(GUEST_OS_ID).unwrap_or(0))?;
    a.test(eax, 1 << 16)?;
    a.jne(any)?;
    a.and(eax, i32::try_from(MSRS.len() - 1).unwrap_or(0))?;
    a.shl(eax, 2)?;
    a.lea(rcx, ptr(l.table))?;
    a.add(rcx, rax)?;
    a.mov(ecx, dword_ptr(rcx))?;
    a.set_label(&mut any)?;
    a.ret()?;

    // Posts what is in `INPUT`.
    a.set_label(&mut l.post)?;
    a.mov(ecx, 0x5c_u32)?;
    a.mov(rdx, INPUT)?;
    // A call with rcx and rdx, through the page.
    a.set_label(&mut l.call)?;
    a.xor(r8d, r8d)?;
    a.mov(rax, CALL_PAGE)?;
    a.call(rax)?;
    a.jmp(l.again)
}

fn data(a: &mut CodeAssembler, l: &mut Labels, plan: &Plan<'_>) -> Result<(), IcedError> {
    a.set_label(&mut l.table)?;
    a.dd(&MSRS)?;
    a.set_label(&mut l.messages)?;
    for message in plan.messages {
        a.db(message)?;
    }
    Ok(())
}

/// A kernel file whose only content is `code`.
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const PROGRAM_HEADER: u64 = 56;
    let start = HEADER + PROGRAM_HEADER;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let long = |file: &mut Vec<u8>, value: u64| file.extend(value.to_le_bytes());
    half(&mut file, 2); // an executable
    half(&mut file, 62); // for x86-64
    word(&mut file, 1);
    long(&mut file, LOAD_ADDRESS); // entry
    long(&mut file, HEADER); // program headers
    long(&mut file, 0);
    word(&mut file, 0);
    for value in [64, 56, 1, 64, 0, 0] {
        half(&mut file, value);
    }
    word(&mut file, 1); // to be loaded
    word(&mut file, 7);
    let len = code.len() as u64;
    for value in [start, LOAD_ADDRESS, LOAD_ADDRESS, len, len, 0x1000] {
        long(&mut file, value);
    }
    file.extend_from_slice(code);
    file
}
