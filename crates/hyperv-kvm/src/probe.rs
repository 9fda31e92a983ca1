//! What this machine's KVM can do, and which of the two ways to take.
//!
//! Source: hyperv-host section 5.

use std::fmt;

use kvm_bindings::{
    KVM_CAP_HYPERV_EVENTFD, KVM_CAP_HYPERV_SYNIC2, KVM_CAP_HYPERV_VP_INDEX,
    KVM_CAP_X86_USER_SPACE_MSR,
};
use kvm_ioctls::VmFd;

use crate::error::Error;

/// `KVM_CAP_X86_MSR_FILTER`.
const KVM_CAP_X86_MSR_FILTER: u32 = 189;

/// Who provides Hyper-V's interfaces. A guest sees no difference but in speed.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Mode {
    /// KVM: MSRs, the hypercall page and the delivery of interrupts stay in the kernel, and a guest's
    /// signal reaches its channel without leaving it.
    Kernel,
    /// This crate: MSRs are exits, the hypercall page is ours, interrupts are MSIs. For a KVM that was
    /// built without Hyper-V.
    User,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "kernel",
            Self::User => "user",
        })
    }
}

/// What each way needs: capability, number, and what would help where it is missing.
const NEEDS: [(Mode, &str, u32, &str); 5] = [
    (
        Mode::Kernel,
        "KVM_CAP_HYPERV_SYNIC2",
        KVM_CAP_HYPERV_SYNIC2,
        "use the mode `user`, or a kernel with CONFIG_KVM_HYPERV",
    ),
    (
        Mode::Kernel,
        "KVM_CAP_HYPERV_VP_INDEX",
        KVM_CAP_HYPERV_VP_INDEX,
        "use the mode `user`, or a newer kernel",
    ),
    (
        Mode::Kernel,
        "KVM_CAP_HYPERV_EVENTFD",
        KVM_CAP_HYPERV_EVENTFD,
        "use the mode `user`, or a newer kernel",
    ),
    (
        Mode::User,
        "KVM_CAP_X86_USER_SPACE_MSR",
        KVM_CAP_X86_USER_SPACE_MSR,
        "use the mode `kernel`, or Linux 5.10 or newer",
    ),
    (
        Mode::User,
        "KVM_CAP_X86_MSR_FILTER",
        KVM_CAP_X86_MSR_FILTER,
        "use the mode `kernel`, or Linux 5.10 or newer",
    ),
];

impl Mode {
    /// The way that was asked for, if this KVM can do it; where none was, the one that it offers.
    pub(crate) fn of(asked: Option<Self>, vm: &VmFd) -> Result<Self, Error> {
        match asked {
            Some(mode) => mode.check(vm).map(|()| mode),
            None => Self::choose(vm),
        }
    }

    /// The way that this KVM offers: in the kernel where it can.
    ///
    /// # Errors
    /// [`Error::Missing`]: neither is possible.
    pub fn choose(vm: &VmFd) -> Result<Self, Error> {
        Self::Kernel.check(vm).map(|()| Self::Kernel).or_else(|_| {
            Self::User.check(vm)?;
            Ok(Self::User)
        })
    }

    /// Whether this KVM can do it.
    ///
    /// # Errors
    /// [`Error::Missing`]: what it lacks.
    pub fn check(self, vm: &VmFd) -> Result<(), Error> {
        for (_, capability, number, advice) in NEEDS.iter().filter(|(mode, ..)| *mode == self) {
            if vm.check_extension_raw(u64::from(*number)) <= 0 {
                let (number, advice) = (*number, *advice);
                return Err(Error::Missing { capability, number, advice });
            }
        }
        Ok(())
    }
}
