//! The serial port: what the guest prints, and what is typed to it.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::layout::SERIAL_GSI;

/// Where the guest's console goes.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// Raises the port's interrupt.
pub(crate) struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

/// See the module.
pub(crate) struct Console {
    serial: Mutex<Serial<Interrupt, NoEvents, ConsoleOutput>>,
}

impl Console {
    /// What raises the port's interrupt in a VM.
    pub(crate) fn line(vm: &VmFd) -> Result<EventFd, Error> {
        let line = EventFd::new(EFD_NONBLOCK).map_err(Error::Event)?;
        vm.register_irqfd(&line, SERIAL_GSI).map_err(Error::kvm("KVM_IRQFD"))?;
        Ok(line)
    }

    /// The port as it is after a reset. `line` is what raises its interrupt.
    pub(crate) fn new(line: EventFd, output: ConsoleOutput) -> Self {
        Self { serial: Mutex::new(Serial::new(Interrupt(line), output)) }
    }

    /// The port as it was saved. It interrupts the guest again for what it has to tell it.
    pub(crate) fn restored(
        state: &SerialState,
        line: EventFd,
        output: ConsoleOutput,
    ) -> Result<Self, Error> {
        let serial = Serial::from_state(state, Interrupt(line), NoEvents, output);
        let serial = serial.map_err(|error| Error::Serial(error.to_string()))?;
        Ok(Self { serial: Mutex::new(serial) })
    }

    /// Its registers, and what was typed and not read.
    pub(crate) fn state(&self) -> SerialState {
        self.lock().state()
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Interrupt, NoEvents, ConsoleOutput>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn read(&self, register: u8) -> u8 {
        self.lock().read(register)
    }

    pub(crate) fn write(&self, register: u8, value: u8) {
        if let Err(error) = self.lock().write(register, value) {
            tracing::debug!(?error, "serial port");
        }
    }

    /// Takes bytes that were typed; returns how many fitted.
    pub(crate) fn type_in(&self, bytes: &[u8]) -> usize {
        self.lock().enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}
