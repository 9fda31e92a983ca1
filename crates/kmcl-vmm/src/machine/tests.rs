//! Machines with a few instructions for a kernel, on this machine's KVM; where that does not run them, a
//! test says so and passes.

use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

use kmcl::SaveOptions;
use saved_state::Save;

use super::*;

const MIB: u64 = 1 << 20;

/// Counts in memory, on a page that it has for itself, and prints a letter each time round.
const COUNTS: &[u8] = &[
    0xbb, 0x00, 0x00, 0x20, 0x00, // mov ebx, 0x200000
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x48, 0xff, 0x03, // next: inc qword [rbx]
    0xb0, 0x2e, // mov al, '.'
    0xee, // out dx, al
    0xeb, 0xf8, // jmp next
];
const COUNTER: u64 = 0x20_0000;

/// Prints a letter, and halts with interrupts off.
const HALTS: &[u8] = &[
    0xfa, // cli
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x2e, // mov al, '.'
    0xee, // out dx, al
    0xf4, // again: hlt
    0xeb, 0xfd, // jmp again
];

/// Reads a port that nobody has again and again, and prints a letter when what it gets is not all ones.
const READS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x2e, // mov al, '.'
    0xee, // out dx, al
    0x31, 0xc0, // next: xor eax, eax
    0xe5, 0x80, // in eax, 0x80
    0x83, 0xf8, 0xff, // cmp eax, -1
    0x74, 0xf7, // je next
    0xb0, 0x21, // mov al, '!'
    0xee, // out dx, al
    0xf4, // hlt
];

/// A kernel of these instructions: an ELF file with one segment at 1 MiB.
fn kernel(code: &[u8]) -> tempfile::NamedTempFile {
    const AT: u64 = MIB;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let word = |elf: &mut Vec<u8>, value: u32| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    [2, 62].into_iter().for_each(|value| half(&mut elf, value)); // executable, x86-64
    word(&mut elf, 1);
    [AT, 64, 0].into_iter().for_each(|value| long(&mut elf, value)); // entry, program headers, no sections
    word(&mut elf, 0);
    [64, 56, 1, 0, 0, 0].into_iter().for_each(|value| half(&mut elf, value));
    [1, 5].into_iter().for_each(|value| word(&mut elf, value)); // to be loaded, read, executed
    let bytes = code.len() as u64;
    [120, AT, AT, bytes, bytes, 16].into_iter().for_each(|value| long(&mut elf, value));
    elf.extend(code);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&elf).unwrap();
    file
}

/// Letters of the guest as they come.
struct Letters(Sender<u8>);

impl Write for Letters {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for byte in bytes {
            let _nobody_looks = self.0.send(*byte);
        }
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn letters() -> (Receiver<u8>, ConsoleOutput) {
    let (sender, receiver) = channel();
    (receiver, Box::new(Letters(sender)))
}

/// A machine whose guest has printed its first letter; `None`, and a line that says so, where KVM does not
/// bring it there.
fn started(code: &[u8], processors: u32) -> Option<(Running, Events, Receiver<u8>)> {
    let (printed, console) = letters();
    let file = kernel(code);
    let boot = BootConfig {
        kernel: PathBuf::from(file.path()),
        initrd: None,
        command_line: String::new(),
    };
    let config = MachineConfig {
        boot,
        memory_bytes: 64 * MIB,
        huge_pages: false,
        processors,
        mode: None,
        bus: vmbus_host::Config::default(),
        console,
    };
    let machine = Machine::new(config);
    let machine = machine.inspect_err(|error| println!("skipped: {error}")).ok()?;
    let (running, mut events) = machine.start().unwrap();
    match printed.recv() {
        Ok(_) => Some((running, events, printed)),
        Err(_) => {
            drop(running);
            println!("skipped: this machine's KVM does not run a guest: {:?}", events.end());
            None
        }
    }
}

fn count(running: &Running) -> u64 {
    running.memory().read_obj(COUNTER).unwrap()
}

#[test]
fn a_paused_machine_stands_and_goes_on() {
    let Some((running, _events, printed)) = started(COUNTS, 1) else { return };
    assert!(matches!(running.save(), Err(Error::NotPaused)));
    for _round in 0..50 {
        running.pause().unwrap();
        assert!(running.is_paused());
        running.pause().unwrap();
        let before = count(&running);
        while printed.try_recv().is_ok() {}
        let save = running.save().unwrap().write_to(&mut std::io::sink()).unwrap();
        assert!(save > 1000);
        assert_eq!(count(&running), before);
        assert!(printed.try_recv().is_err(), "it prints while it stands");
        running.resume();
        running.resume();
        printed.recv().unwrap();
        assert!(!running.is_paused());
    }
    assert!(count(&running) > 0);
    assert!(running.counters().user_exits["port_write"] >= 50);
}

/// Out of a halt that nothing ends, and processors that were never started.
#[test]
fn a_machine_that_waits_for_ever_is_paused_too() {
    let Some((running, _events, _printed)) = started(HALTS, 3) else { return };
    for _round in 0..20 {
        running.pause().unwrap();
        running.resume();
    }
    running.pause().unwrap();
    drop(running);
}

/// What was read from a port is in its register before the machine stands.
#[test]
fn an_exit_is_complete_before_the_machine_stands() {
    let Some((running, _events, printed)) = started(READS, 1) else { return };
    for round in 0..200 {
        running.pause().unwrap();
        let held = running.processors[0].lock().unwrap();
        let registers = held.vcpu.get_regs().unwrap();
        drop(held);
        let at = registers.rip - MIB;
        // Behind the read the register has what was read; anywhere else it may have anything.
        if at == 11 {
            assert_eq!(registers.rax & 0xffff_ffff, 0xffff_ffff, "round {round}");
        }
        running.resume();
    }
    assert!(printed.try_recv().is_err(), "what was read was lost");
}

#[test]
fn a_machine_that_has_ended_is_not_paused() {
    const POWER_OFF: &[u8] = &[
        0x66, 0xba, 0xf8, 0x03, 0xb0, 0x2e, 0xee, // prints a letter
        0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
        0xb0, 0x34, // mov al, 0x34: sleep type 5, enable
        0xee, // out dx, al
        0xf4, // hlt
    ];
    let Some((running, mut events, _printed)) = started(POWER_OFF, 2) else { return };
    assert!(matches!(events.end(), End::PowerOff));
    assert!(matches!(running.pause(), Err(Error::Ended)));
    assert!(!running.is_paused());
    assert!(matches!(running.save(), Err(Error::NotPaused)));
}

/// The guest goes on in another machine with the same memory, and counts on from where it was.
#[test]
fn a_saved_machine_goes_on_as_another_one() {
    let Some((mut running, mut _events, mut _printed)) = started(COUNTS, 2) else { return };
    for _round in 0..5 {
        running.pause().unwrap();
        let (mut machine, mut bus) = (Vec::new(), Vec::new());
        running.save().unwrap().write_to(&mut machine).unwrap();
        let held = running.partition().bus().hold();
        held.save(&SaveOptions::default()).unwrap().write_to(&mut bus).unwrap();
        held.move_away();
        let (ram, before) = (running.ram().clone(), count(&running));
        drop(running);
        let (letters, console) = letters();
        let config = RestoreConfig { ram, mode: None, console };
        let restoring = Machine::restoring(config, &machine[..], &bus).unwrap();
        let restored = restoring.finish().unwrap();
        (running, _events) = restored.start().unwrap();
        _printed = letters;
        while count(&running) < before + 100 {
            _printed.recv().unwrap();
        }
    }
}
