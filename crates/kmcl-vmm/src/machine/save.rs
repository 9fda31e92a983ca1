//! A machine that stands, as a stream: what this program has of it, its partition, its processors.

use kvm_ioctls::VcpuFd;
use saved_state::header::HeaderFlags;
use saved_state::machine::{KINDS, MachineRecord};
use saved_state::text::Producer;
use saved_state::writer::Step;
use saved_state::{
    FormatVersion, Save, SaveStep, StreamInfo, StreamKind, StreamWriter, WriteError,
};

use hyperv_kvm::PartitionState;
use vm_superio::serial::SerialState;

use super::Running;
use crate::error::Error;

/// The program that writes a machine's state.
const PRODUCER: &str = concat!("kmcl-vmm ", env!("CARGO_PKG_VERSION"));

/// The state of a machine on its way into the caller's buffers, as it was when the save was made. A few KiB
/// for each processor.
#[derive(Debug)]
pub struct MachineSave {
    writer: StreamWriter,
    machine: MachineRecord,
    state: PartitionState,
}

impl MachineSave {
    fn new(machine: MachineRecord, state: PartitionState) -> Result<Self, WriteError> {
        let records = state.processors.len() + state.synics.len(); // at most 32
        let info = StreamInfo {
            stream: StreamKind::MACHINE,
            flags: HeaderFlags::default(),
            interface_type: kmcl::Guid::ZERO,
            interface_instance: kmcl::Guid::ZERO,
            producer: Producer::new(PRODUCER).unwrap_or(Producer::EMPTY),
            // Header, machine, partition; processors and their SynICs; end.
            chunks: u32::try_from(records.saturating_add(4)).unwrap_or(0),
            bytes: 0,
            items: machine.processors,
        };
        let writer = StreamWriter::new(FormatVersion::NEWEST, info, KINDS)?;
        Ok(Self { writer, machine, state })
    }

    /// The next chunk.
    fn chunk(&mut self, room: &mut [u8]) -> Result<Step, WriteError> {
        let PartitionState { partition, processors, synics } = &self.state;
        let writer = &mut self.writer;
        let chunks = usize::try_from(writer.chunks()).unwrap_or(usize::MAX);
        let Some(place) = chunks.checked_sub(3) else {
            return match chunks {
                0 => writer.header(room),
                1 => writer.record(&self.machine, room),
                _ => writer.record(partition, room),
            };
        };
        if let Some(processor) = processors.get(place) {
            return writer.record(processor, room);
        }
        match synics.get(place.saturating_sub(processors.len())) {
            Some(synic) => writer.record(synic, room),
            None => writer.end(room),
        }
    }
}

impl Save for MachineSave {
    type Error = WriteError;

    fn step(&mut self, buffer: &mut [u8]) -> Result<SaveStep, WriteError> {
        let mut written = 0;
        let mut needed = 0;
        while !self.writer.is_ended() {
            match self.chunk(buffer.get_mut(written..).unwrap_or_default())? {
                Step::Written { bytes } => written += bytes,
                Step::Needs { bytes } => {
                    needed = bytes;
                    break;
                }
            }
        }
        Ok(SaveStep { written, needed, done: self.writer.is_ended() })
    }
}

impl Running {
    /// Saves the machine: processors, Hyper-V's interfaces, serial port; not its memory, its bus and its
    /// devices. It stands, and goes on standing.
    ///
    /// This comes when everything else stands that can interrupt the guest. The guest's clocks are saved as
    /// they were when it was paused.
    ///
    /// # Errors
    /// [`Error::NotPaused`]; [`Error::HyperV`] where KVM refuses.
    pub fn save(&self) -> Result<MachineSave, Error> {
        // While they are held here nobody can let them run.
        let held = self.processors.iter().map(|processor| match processor.try_lock() {
            Ok(held) => Ok(held),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => Err(Error::NotPaused),
        });
        let held = held.collect::<Result<Vec<_>, _>>()?;
        if !self.shared.gate.is_standing() {
            return Err(Error::NotPaused);
        }
        let vcpus: Vec<&VcpuFd> = held.iter().map(|processor| &processor.vcpu).collect();
        let clocks = self.clocks().ok_or(Error::NotPaused)?;
        let state = self.partition.save(&self.numbers, clocks, &vcpus)?;
        let processors = u32::try_from(held.len()).unwrap_or(u32::MAX); // at most 16
        let machine = record_of(processors, &self.shared.console.state());
        MachineSave::new(machine, state).map_err(Error::Write)
    }
}

fn record_of(processors: u32, serial: &SerialState) -> MachineRecord {
    let SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer,
    } = serial;
    let serial = [
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
    ];
    let serial = serial.map(|register| *register).to_vec();
    MachineRecord { processors, serial, serial_input: in_buffer.clone() }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use saved_state::machine::{PartitionRecord, ProcessorRecord, SynicMode, SynicRecord};

    /// A state as long as a real one, with numbers that nobody would take.
    pub(in super::super) fn state(processors: u32) -> (MachineRecord, PartitionState) {
        let some = |byte: u8| vec![byte; 8];
        let serial = SerialState { in_buffer: b"typed".to_vec(), ..SerialState::default() };
        let state = PartitionState {
            partition: PartitionRecord {
                mode: SynicMode::User.into(),
                tsc_khz: 1,
                pic_master: some(1),
                pic_slave: some(2),
                io_apic: some(3),
                ..Default::default()
            },
            processors: (0..processors)
                .map(|index| ProcessorRecord {
                    index,
                    cpuid: some(4),
                    registers: some(5),
                    special_registers: some(6),
                    debug_registers: some(7),
                    xcrs: some(8),
                    local_apic: some(9),
                    events: some(10),
                    ..Default::default()
                })
                .collect(),
            synics: (0..processors)
                .map(|index| SynicRecord { index, sints: some(11), ..Default::default() })
                .collect(),
        };
        (record_of(processors, &serial), state)
    }

    pub(in super::super) fn stream(machine: MachineRecord, state: PartitionState) -> Vec<u8> {
        let mut bytes = Vec::new();
        MachineSave::new(machine, state).unwrap().write_to(&mut bytes).unwrap();
        bytes
    }

    /// The stream says beforehand how many chunks it has, and does not depend on the buffers.
    #[test]
    fn the_stream_is_the_same_in_any_pieces() {
        for processors in [1, 2, 16] {
            let (machine, state) = state(processors);
            let whole = stream(machine.clone(), state.clone());
            let mut save = MachineSave::new(machine, state).unwrap();
            let mut pieces = Vec::new();
            let mut buffer = vec![0; 1];
            loop {
                let step = save.step(&mut buffer).unwrap();
                pieces.extend_from_slice(&buffer[..step.written]);
                if step.done {
                    break;
                }
                buffer.resize(step.needed, 0);
            }
            assert_eq!(pieces, whole);
        }
    }
}
