use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_regs};
use saved_state::machine::ProcessorRecord;
use vmbus_host::Config;

use super::*;
use crate::{PartitionConfig, msr};

const RAM_BYTES: u64 = 1 << 20;

/// A VM with its interrupt controllers and vCPUs; `None`, and a line that says so, where this machine does
/// not let one be made.
fn machine(count: u32) -> Option<(Kvm, Arc<VmFd>, Vec<VcpuFd>)> {
    let made = || {
        let kvm = Kvm::new()?;
        let vm = Arc::new(kvm.create_vm()?);
        vm.create_irq_chip()?;
        let vcpus =
            (0..count).map(|index| vm.create_vcpu(index.into())).collect::<Result<_, _>>()?;
        Ok::<_, kvm_ioctls::Error>((kvm, vm, vcpus))
    };
    made().inspect_err(|error| println!("skipped: this machine's KVM: {error}")).ok()
}

fn memory() -> GuestMemory {
    GuestMemory::memfd(RAM_BYTES).unwrap()
}

/// A partition that has been used: registers and clocks differ from what they are in a new one.
fn used(kvm: &Kvm, vm: Arc<VmFd>, vcpus: &[VcpuFd]) -> Option<Partition> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let cpuid = Partition::cpuid(&supported).unwrap();
    let config = PartitionConfig {
        vps: u32::try_from(vcpus.len()).unwrap(),
        mode: Some(Mode::User),
        tsc_khz: vcpus[0].get_tsc_khz().unwrap(),
        bus: Config::default(),
        routes: Vec::new(),
    };
    let partition = Partition::new(vm, memory(), config)
        .inspect_err(|error| println!("skipped: this machine's KVM: {error}"))
        .ok()?;
    for (index, vcpu) in (0..).zip(vcpus) {
        vcpu.set_cpuid2(&cpuid).unwrap();
        let vp = partition.add_vp(index, vcpu).unwrap();
        let registers =
            kvm_regs { rax: 0x1234 + u64::from(index), rflags: 2, ..Default::default() };
        vcpu.set_regs(&registers).unwrap();
        let mp_state = if index == 0 { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
        vcpu.set_mp_state(kvm_mp_state { mp_state }).unwrap();
        let mut apic = vcpu.get_lapic().unwrap();
        apic.regs[0xf1] = 1; // it takes interrupts
        vcpu.set_lapic(&apic).unwrap();
        let mut area = vcpu.get_xsave().unwrap();
        area.region[40] = 0xfeed_beef; // a register of the FPU
        area.region[128] |= 1; // which is in use
        let bytes: Vec<_> = area.region.iter().flat_map(|word| word.to_le_bytes()).collect();
        kvm::set_xsave(vcpu, kvm::xsave_bytes(&partition.port().vm), &bytes).unwrap();
        assert!(msrs::set(vcpu, 0xc000_0102, 0xffff_8000_0000_1000 + u64::from(index)).unwrap());
        for (msr, value) in [
            (msr::GUEST_OS_ID, 0x8100),
            (msr::HYPERCALL, 0x3001),
            (msr::SIMP, 0x1001),
            (msr::SIEFP, 0x2001),
            (msr::SINT0 + 2, 0xf3),
            (msr::SCONTROL, 1),
            (msr::CRASH_P0 + 1, 9),
        ] {
            assert!(vp.write_msr(msr, value).is_some(), "{msr:#x}");
        }
    }
    Some(partition)
}

/// The bus of a guest that has never used it.
fn bus_of(partition: &Partition) -> Vec<u8> {
    use kmcl::SaveOptions;
    use saved_state::Save;
    let mut bytes = Vec::new();
    let held = partition.bus().hold();
    held.save(&SaveOptions::default()).unwrap().write_to(&mut bytes).unwrap();
    bytes
}

fn numbers(kvm: &Kvm) -> MsrNumbers {
    MsrNumbers::new(kvm).unwrap()
}

fn save(partition: &Partition, kvm: &Kvm, vcpus: &[&VcpuFd]) -> PartitionState {
    let clocks = partition.clocks(vcpus[0]).unwrap();
    partition.save(&numbers(kvm), clocks, vcpus).unwrap()
}

fn tsc(vcpu: &VcpuFd) -> u64 {
    msrs::get(vcpu, TSC).unwrap().unwrap()
}

/// Whether this machine's KVM gives guests a TSC that is not the machine's own. Some that do without the
/// processor's help do not.
fn has_own_tsc() -> bool {
    let Some((_, _vm, vcpus)) = machine(1) else { return false };
    let changed = kvm::set_tsc_offset(&vcpus[0], 77).and_then(|()| kvm::tsc_offset(&vcpus[0]));
    let has = changed.is_ok_and(|offset| offset == 77);
    if !has {
        println!("skipped, as far as it is about the TSC: this machine's KVM cannot set it");
    }
    has
}

#[test]
fn a_restored_guest_is_the_one_that_was_saved() {
    let Some((kvm, vm, vcpus)) = machine(2) else { return };
    let Some(partition) = used(&kvm, vm, &vcpus) else { return };
    let all: Vec<_> = vcpus.iter().collect();
    let saved = save(&partition, &kvm, &all);
    let bus = bus_of(&partition);
    // A clock that does not stand where a new one would.
    let mut later = saved.clone();
    if has_own_tsc() {
        later.partition.tsc = later.partition.tsc.wrapping_add(1 << 40);
    }
    later.partition.clock_ns += 1_000_000_000_000;
    later.partition.reference_time += 10_000_000_000;

    let (kvm, vm, vcpus) = machine(2).unwrap();
    let restored = RestoredMemory::new(memory())
        .clock(&kvm, vm, vcpus, later.clone(), RestoreConfig::default())
        .and_then(RestoredClock::synic)
        .and_then(RestoredSynic::processors)
        .and_then(|step| step.channels(MappingBudget::default(), &bus))
        .unwrap();
    assert_eq!(restored.mode(), Mode::User);
    let Restored { partition, processors } = restored.finish().unwrap();
    let all: Vec<_> = processors.iter().map(|(_, vcpu)| vcpu).collect();
    let mut again = save(&partition, &kvm, &all);

    // Time goes on from where it stood, and nowhere else.
    let minute = |hz: u64| hz * 60;
    let (then, now) = (&later.partition, &mut again.partition);
    let passed = now.tsc.wrapping_sub(then.tsc);
    assert!(passed < minute(u64::from(then.tsc_khz) * 1000), "TSC: {:#x} {:#x}", then.tsc, now.tsc);
    let passed = now.clock_ns.checked_sub(then.clock_ns).unwrap();
    assert!(passed < minute(1_000_000_000), "clock: {passed} ns");
    let passed = now.reference_time.checked_sub(then.reference_time).unwrap();
    assert!(passed < minute(10_000_000), "reference time: {passed}");
    (now.tsc, now.clock_ns, now.reference_time) = (then.tsc, then.clock_ns, then.reference_time);
    assert_eq!(again.partition, later.partition);
    assert_eq!(again.synics, later.synics);
    for (mut then, now) in later.processors.into_iter().zip(again.processors) {
        // The interrupt that makes up for a lost one is requested: vector 0xf3.
        let requests = 0x200 + 0xf3 / 32 * 16;
        let word = u32::from_le_bytes(*then.local_apic[requests..].first_chunk().unwrap());
        let word = (word | 1 << (0xf3 % 32)).to_le_bytes();
        then.local_apic[requests..requests + 4].copy_from_slice(&word);
        let lists = [&then, &now].map(|record| {
            let (entries, _) = record.msrs.as_chunks::<12>();
            entries.iter().map(|entry| entry.to_vec()).collect::<Vec<_>>()
        });
        let differ: Vec<_> = lists[0].iter().filter(|msr| !lists[1].contains(msr)).collect();
        assert!(differ.is_empty(), "processor {}: MSRs {differ:x?}", then.index);
        assert_eq!(now, then);
    }
}

/// Its TSC begins near to where that of a new vCPU is: KVM must not take it for the same.
#[test]
fn the_tsc_of_a_guest_that_has_just_started_goes_on_too() {
    if !has_own_tsc() {
        return;
    }
    let Some((kvm, vm, vcpus)) = machine(2) else { return };
    let Some(partition) = used(&kvm, vm, &vcpus) else { return };
    let all: Vec<_> = vcpus.iter().collect();
    let mut saved = save(&partition, &kvm, &all);
    let khz = u64::from(saved.partition.tsc_khz);
    let (kvm, vm, vcpus) = machine(2).unwrap();
    saved.partition.tsc = tsc(&vcpus[0]) + khz * 700; // 700 ms from there
    saved.processors[1].tsc_ahead = 1_000_000;
    let expected = saved.partition.tsc;
    let offset = kvm::tsc_offset(&vcpus[0]).unwrap();
    let step = RestoredMemory::new(memory())
        .clock(&kvm, vm, vcpus, saved, RestoreConfig::default())
        .unwrap();
    let offsets: Vec<_> = step.vcpus.iter().map(|vcpu| kvm::tsc_offset(vcpu).unwrap()).collect();
    assert_eq!(offsets[1].wrapping_sub(offsets[0]), 1_000_000);
    assert!(offsets[0].wrapping_sub(offset) <= khz * 700, "it was set to a moment that has passed");
    assert!(tsc(&step.vcpus[0]) >= expected);
}

/// Where the TSC cannot be set, a guest must not see it go back.
#[test]
fn a_tsc_never_goes_back() {
    let Some((kvm, vm, vcpus)) = machine(1) else { return };
    let Some(partition) = used(&kvm, vm, &vcpus) else { return };
    let mut saved = save(&partition, &kvm, &[&vcpus[0]]);
    saved.partition.tsc += 1 << 50;
    let expected = saved.partition.tsc;
    let (kvm, vm, vcpus) = machine(1).unwrap();
    match RestoredMemory::new(memory()).clock(&kvm, vm, vcpus, saved, RestoreConfig::default()) {
        Ok(step) => assert!(tsc(&step.vcpus[0]) >= expected),
        Err(Error::Differences(lines)) => assert_eq!(lines, [TSC_IS_BEHIND]),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_processor_without_what_the_guest_was_told_of_is_refused() {
    let Some((kvm, vm, vcpus)) = machine(1) else { return };
    let Some(partition) = used(&kvm, vm, &vcpus) else { return };
    let mut saved = save(&partition, &kvm, &[&vcpus[0]]);
    saved.partition.tsc_khz = 1_000_000;
    for leaf in saved.processors[0].cpuid.chunks_mut(28) {
        if leaf[0] == 7 && leaf[1..8] == [0; 7] {
            leaf[20..24].fill(0xff); // ECX
        }
    }
    let (kvm, vm, vcpus) = machine(1).unwrap();
    let scales = vm.check_extension_raw(KVM_CAP_TSC_CONTROL.into()) > 0;
    let refused =
        RestoredMemory::new(memory()).clock(&kvm, vm, vcpus, saved, RestoreConfig::default());
    let Err(Error::Differences(lines)) = refused else { panic!("not refused") };
    assert!(lines.iter().any(|line| line.starts_with("no processor feature")), "{lines:?}");
    assert_eq!(lines.iter().any(|line| line.contains("TSC of")), !scales, "{lines:?}");
}

/// Each row damages one thing of a good state.
#[test]
fn damage_is_told_by_what_it_is() {
    let Some((kvm, vm, vcpus)) = machine(2) else { return };
    let Some(partition) = used(&kvm, vm, &vcpus) else { return };
    let all: Vec<_> = vcpus.iter().collect();
    let good = save(&partition, &kvm, &all);
    assert!(State::try_from(good.clone()).is_ok());
    type Change = fn(&mut PartitionState);
    let rows: [(&str, Change); 17] = [
        ("0 processors, 1 expected", |state| state.processors.clear()),
        ("2 expected", |state| drop(state.synics.pop())),
        ("processor 1 in the place of 0", |state| state.processors[0].index = 1),
        ("SynIC 0 in the place of 1", |state| state.synics[1].index = 0),
        ("mode 0", |state| state.partition.mode = 0),
        ("crash registers has 39 bytes", |state| state.partition.crash = vec![0; 39]),
        ("PIC has 0 bytes", |state| state.partition.pic_slave.clear()),
        ("I/O APIC has 1 bytes", |state| state.partition.io_apic.truncate(1)),
        ("CPUID of 27 bytes", |state| state.processors[0].cpuid.truncate(27)),
        ("257 leaves", |state| state.processors[0].cpuid = vec![0; 257 * 28]),
        ("MSRs of 11 bytes", |state| state.processors[0].msrs.truncate(11)),
        ("MSR 0x10 in the list", |state| {
            state.processors[0].msrs[..4].copy_from_slice(&[0x10, 0, 0, 0])
        }),
        ("local APIC has 2048 bytes", |state| state.processors[1].local_apic.resize(2048, 0)),
        ("processor 1: events has 0", |state| state.processors[1].events.clear()),
        ("special registers has", |state| state.processors[1].special_registers.push(0)),
        ("interrupt sources has 0", |state| state.synics[0].sints.clear()),
        ("timers has 8", |state| state.synics[0].stimers = vec![0; 8]),
    ];
    for (expected, change) in rows {
        let mut state = good.clone();
        change(&mut state);
        match State::try_from(state) {
            Err(error) => assert!(error.to_string().contains(expected), "{expected}: {error}"),
            Ok(_) => panic!("{expected}: taken"),
        }
    }
}

/// Values that no processor takes end in an error, whichever call refuses them, and never in a panic.
#[test]
fn values_that_kvm_does_not_take_are_errors() {
    let Some((kvm, vm, vcpus)) = machine(1) else { return };
    let Some(partition) = used(&kvm, vm, &vcpus) else { return };
    let good = save(&partition, &kvm, &[&vcpus[0]]);
    type Change = fn(&mut ProcessorRecord);
    let rows: [(&str, Change); 4] = [
        ("an MSR that nobody has", |record| {
            record.msrs.extend([0xfe, 0xff, 0xff, 0x7f, 1, 0, 0, 0, 0, 0, 0, 0]);
        }),
        ("a state of a processor that there is not", |record| record.mp_state = 99),
        ("components of XSAVE that there are not", |record| {
            record.xsave.resize(4096, 0);
            record.xsave[512..520].fill(0xff);
        }),
        ("a CR0 that cannot be", |record| record.special_registers.fill(0xff)),
    ];
    for (what, change) in rows {
        let mut state = good.clone();
        change(&mut state.processors[0]);
        let (kvm, vm, vcpus) = machine(1).unwrap();
        let refused = RestoredMemory::new(memory())
            .clock(&kvm, vm, vcpus, state, RestoreConfig::default())
            .and_then(RestoredClock::synic)
            .and_then(RestoredSynic::processors);
        let Err(error) = refused else { panic!("{what}: taken") };
        println!("{what}: {error}");
    }
}

/// A guest of KVM's own emulation finds a return where it may be about to execute one.
#[test]
fn the_hypercall_page_of_the_other_mode_can_be_returned_from() {
    let Some((kvm, vm, vcpus)) = machine(1) else { return };
    let Some(partition) = used(&kvm, vm, &vcpus) else { return };
    let mut saved = save(&partition, &kvm, &[&vcpus[0]]);
    saved.partition.mode = saved_state::machine::SynicMode::Kernel.into();
    let config = RestoreConfig { mode: Some(Mode::User), ..Default::default() };
    let (kvm, vm, vcpus) = machine(1).unwrap();
    let ram = memory();
    let step =
        RestoredMemory::new(ram.clone()).clock(&kvm, vm, vcpus, saved.clone(), config.clone());
    let _step = step.and_then(RestoredClock::synic).unwrap();
    let mut code = [0; PAGE_CODE_AFTER_KVM.len()];
    ram.read(0x3000, &mut code).unwrap();
    assert_eq!(code, PAGE_CODE_AFTER_KVM);
    assert_eq!(code[3], 0xc3);
    assert_eq!(code[1] as usize + 2, 4, "the jump ends where the rest begins");

    // What the other mode has and this one has not.
    saved.synics[0].sints[16..24].copy_from_slice(&(0xf3_u64 | 1 << 17).to_le_bytes());
    saved.synics[0].stimers = [1, 0, 0, 0, 0, 0, 0, 0].map(u64::to_le_bytes).concat();
    let (kvm, vm, vcpus) = machine(1).unwrap();
    let refused = RestoredMemory::new(memory()).clock(&kvm, vm, vcpus, saved, config);
    let Err(Error::Differences(lines)) = refused else { panic!("not refused") };
    assert_eq!(lines.len(), 2, "{lines:?}");
}

#[test]
fn kvm_counts() {
    let Some((_kvm, vm, vcpus)) = machine(1) else { return };
    match crate::statistics::Statistics::of(&vcpus[0]) {
        Ok(statistics) => {
            let values = statistics.read().unwrap();
            assert!(values.contains_key("exits"), "{values:?}");
        }
        Err(error) => println!("skipped: this machine's KVM has no statistics: {error}"),
    }
    let _of_the_vm = vm.as_raw_fd();
}
