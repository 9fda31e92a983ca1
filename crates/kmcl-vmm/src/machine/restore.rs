//! A machine that was saved: out of its stream, and to where it runs again.

use std::io::Read;
use std::sync::Arc;

use hyperv_kvm::restore::{MsrNumbers, Restored};
use hyperv_kvm::restore::{RestoreConfig as PartitionConfig, RestoredChannels, RestoredMemory};
use hyperv_kvm::{Mode, PartitionState};
use saved_state::input::{ChunkInput, InputError};
use saved_state::machine::{
    KINDS, MachineRecord, PARTITION, PROCESSOR, PartitionRecord, SERIAL_REGISTERS,
};
use saved_state::{ReadError, StreamKind, StreamReader};
use vm_superio::serial::SerialState;
use vmbus_host::HostBus;
use vmbus_memory::{GuestMemory, MappingBudget};
use vmm_sys_util::eventfd::EventFd;

use super::{Hardware, MAX_PROCESSORS, Machine};
use crate::error::Error;
use crate::memory::Ram;
use crate::serial::{Console, ConsoleOutput};

/// What a saved machine goes on with here.
pub struct RestoreConfig {
    /// Its memory: what it had when it was saved.
    pub ram: Ram,
    /// Who provides Hyper-V's interfaces; `None`: whoever did, or else whoever can.
    pub mode: Option<Mode>,
    /// Where the guest's console goes.
    pub console: ConsoleOutput,
}

/// A machine that is being restored, and waits for its devices.
pub struct RestoringMachine {
    channels: RestoredChannels,
    ram: Ram,
    numbers: MsrNumbers,
    line: EventFd,
    serial: SerialState,
    console: ConsoleOutput,
}

/// Why a stream is not a saved machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineStateError {
    /// The bytes cannot be read, are no stream, another one, or damaged.
    #[error(transparent)]
    Input(#[from] InputError),
    /// Records out of order, or too many of them.
    #[error("{found} where {expected} is expected")]
    Order {
        /// What is there.
        found: &'static str,
        /// What should be.
        expected: &'static str,
    },
    /// A number of processors that no machine has.
    #[error("{count} processors, 1 to {MAX_PROCESSORS} can be")]
    Processors {
        /// How many were announced.
        count: u32,
    },
    /// The serial port has other registers.
    #[error("the serial port has {found} registers, not {SERIAL_REGISTERS}")]
    Serial {
        /// How many there are.
        found: usize,
    },
}

impl From<ReadError> for MachineStateError {
    fn from(error: ReadError) -> Self {
        Self::Input(error.into())
    }
}

impl Machine {
    /// Makes a machine that goes on where another one was saved: `machine` is what
    /// [`Running::save`](super::Running::save) gave, `bus` the stream of its bus.
    ///
    /// It has its memory, and everything that is not a device's. Devices make their offers on
    /// [`RestoringMachine::bus`], then [`RestoringMachine::finish`].
    ///
    /// # Errors
    /// [`Error::State`], and [`Error::HyperV`] for a state that makes no sense; [`Error::Differences`]
    /// where this host is not what the guest has been told of: a line for each. Nothing has run then.
    pub fn restoring(
        config: RestoreConfig,
        machine: impl Read,
        bus: &[u8],
    ) -> Result<RestoringMachine, Error> {
        let RestoreConfig { ram, mode, console } = config;
        let (serial, state) = read(machine)?;
        let count = u32::try_from(state.processors.len()).unwrap_or(u32::MAX); // at most 16
        let Hardware { kvm, vm, vcpus, numbers } = Hardware::new(count, &ram)?;
        let line = Console::line(&vm)?;
        let config = PartitionConfig { mode, routes: Vec::new() };
        let clock =
            RestoredMemory::new(ram.shared.clone()).clock(&kvm, vm, vcpus, state, config)?;
        let channels = clock.synic()?.processors()?.channels(MappingBudget::default(), bus)?;
        Ok(RestoringMachine { channels, ram, numbers, line, serial, console })
    }
}

impl RestoringMachine {
    /// The bus, on which devices make again the offers that were saved.
    #[must_use]
    pub fn bus(&self) -> &HostBus {
        self.channels.bus()
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.ram.shared
    }

    /// Who provides Hyper-V's interfaces now.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.channels.mode()
    }

    /// Ends the restore: channels go on, and the machine can be started.
    ///
    /// # Errors
    /// [`Error::HyperV`]: devices are not those that were saved, in words that name them.
    pub fn finish(self) -> Result<Machine, Error> {
        let Self { channels, ram, numbers, line, serial, console } = self;
        let Restored { partition, processors } = channels.finish()?;
        // Last: the port interrupts the guest for what it has not told it yet.
        let console = Arc::new(Console::restored(&serial, line, console)?);
        Ok(Machine { partition, console, ram, numbers, vcpus: processors })
    }
}

/// What is in a stream, each record in its place; the rest is for its owners to check.
fn read(machine: impl Read) -> Result<(SerialState, PartitionState), MachineStateError> {
    let mut input = ChunkInput::new(machine);
    let mut reader = StreamReader::new(StreamKind::MACHINE, KINDS);
    let mut machine = None;
    let mut partition: Option<PartitionRecord> = None;
    let mut state = PartitionState::default();
    while let Some(mut bytes) = input.next()? {
        let Some(chunk) = reader.read(&mut bytes)? else { continue };
        let (processors, synics) = (state.processors.len(), state.synics.len());
        let order = |expected| MachineStateError::Order { found: chunk.info().name, expected };
        let Some(MachineRecord { processors: count, .. }) = machine else {
            let record: MachineRecord = match chunk.decode() {
                Err(ReadError::OtherRecord { expected, .. }) => return Err(order(expected)),
                other => other?,
            };
            if !(1..=MAX_PROCESSORS).contains(&record.processors) {
                return Err(MachineStateError::Processors { count: record.processors });
            }
            machine = Some(record);
            continue;
        };
        let count = usize::try_from(count).unwrap_or(usize::MAX); // at most 16
        match chunk.kind() {
            PARTITION if partition.is_none() => partition = Some(chunk.decode()?),
            _ if partition.is_none() => return Err(order("machine.partition")),
            PROCESSOR if processors < count => state.processors.push(chunk.decode()?),
            _ if processors < count => return Err(order("machine.processor")),
            _ if synics < count => state.synics.push(match chunk.decode() {
                Err(ReadError::OtherRecord { expected, .. }) => return Err(order(expected)),
                other => other?,
            }),
            _ => return Err(order("the end")),
        }
    }
    reader.finish()?;
    let missing = |expected| MachineStateError::Order { found: "the end", expected };
    let machine = machine.ok_or(missing("machine.machine"))?;
    state.partition = partition.ok_or(missing("machine.partition"))?;
    let count = usize::try_from(machine.processors).unwrap_or(usize::MAX);
    if state.processors.len() < count || state.synics.len() < count {
        return Err(missing("machine.synic"));
    }
    Ok((serial_state(machine)?, state))
}

fn serial_state(machine: MachineRecord) -> Result<SerialState, MachineStateError> {
    let MachineRecord { processors: _, serial, serial_input: in_buffer } = machine;
    let found = serial.len();
    let serial: [u8; SERIAL_REGISTERS] =
        serial.try_into().map_err(|_| MachineStateError::Serial { found })?;
    let [
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
    ] = serial;
    Ok(SerialState {
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
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::save::tests::{state, stream};

    #[test]
    fn what_was_written_is_read() {
        for processors in [1, 2, 16] {
            let (machine, written) = state(processors);
            let bytes = stream(machine, written.clone());
            let (serial, found) = read(&bytes[..]).unwrap();
            assert_eq!(found, written);
            assert_eq!(serial.in_buffer, b"typed");
            assert_eq!(serial.line_status, SerialState::default().line_status);
        }
    }

    /// Streams that are whole and in which something is missing, too much or out of order.
    #[test]
    fn records_are_in_their_places() {
        type Change = fn(&mut MachineRecord, &mut PartitionState);
        let rows: [(&str, Change); 7] = [
            ("machine.synic where machine.processor", |_, state| state.processors.truncate(1)),
            ("the end where machine.synic", |_, state| state.synics.truncate(1)),
            ("machine.processor where machine.synic", |machine, _| machine.processors = 1),
            ("machine.synic where machine.processor", |machine, _| machine.processors = 3),
            ("machine.synic where the end", |_, state| state.synics.push(state.synics[0].clone())),
            ("17 processors", |machine, _| machine.processors = 17),
            ("the serial port has 8 registers", |machine, _| machine.serial.truncate(8)),
        ];
        for (expected, change) in rows {
            let (mut machine, mut written) = state(2);
            change(&mut machine, &mut written);
            let bytes = stream(machine, written);
            let error = read(&bytes[..]).unwrap_err().to_string();
            assert!(error.contains(expected), "{expected}: {error}");
        }
    }

    /// A bit that flips anywhere is an error, never a panic and never a machine.
    #[test]
    fn damage_is_refused() {
        let (machine, written) = state(1);
        let good = stream(machine, written);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            assert!(read(&bytes[..]).is_err(), "byte {at}");
            assert!(read(&good[..at]).is_err(), "cut at {at}");
        }
    }
}
