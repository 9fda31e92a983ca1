//! What the program that runs a VM may still do once it has begun, should its guest ever take it over: two
//! walls of the kernel's, put up once and never taken down.
//!
//! - **seccomp** says which system calls there are. A call that the program needs is let through, some of
//!   them only with certain arguments; any other fails with EPERM, which the program would report like any
//!   failure. A few that no VMM makes, and that only somebody who has taken it over would try (another
//!   program, another process's memory, another name space), end the process with SIGSYS at once. The
//!   kernel does not log what fails with EPERM; it does log, to its audit log, what ends a process.
//! - **landlock** says which files may be opened: those in [`Paths`], the devices of KVM and userfaultfd, and
//!   what a panic reads to say where it was. What is open stays usable. No TCP port can be bound or connected
//!   to, no process outside be sent a signal, where the kernel's landlock knows of such.
//!
//! | not prevented | why |
//! |---|---|
//! | what is done through io_uring, which seccomp does not see: a UDP socket, say | disks need it; landlock holds for it too |
//! | writing to files that are open, disks among them | that is what they are for |
//! | reading memory of the process, guest memory among it | one VM, one process |
//!
//! ```text
//! Sandbox::apply(paths of the configuration)   while the process has one thread
//!      └─ then KVM, files, threads; and the same again when the guest is reset
//! ```
//!
//! | module | what it has |
//! |---|---|
//! | `calls` | seccomp: which calls, and why |
//! | `files` | landlock: which rights a path gives |

mod calls;
mod files;

use std::io;
use std::path::PathBuf;

use crate::config::VmConfig;

/// Which walls are put up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Sandbox {
    /// Whether system calls are restricted.
    pub seccomp: bool,
    /// Whether files are.
    pub landlock: Landlock,
}

/// Both; files where the kernel can.
impl Default for Sandbox {
    fn default() -> Self {
        Self { seccomp: true, landlock: Landlock::WherePossible }
    }
}

/// Whether files are restricted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Landlock {
    /// They are not.
    Off,
    /// They are, if the kernel has landlock.
    WherePossible,
    /// They are; a kernel without landlock is an error.
    Required,
}

/// Which files may be opened later. What does not exist is an error, but for sockets. Rights belong to the
/// file or directory that a path leads to now: what takes its place later has none.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Paths {
    /// Files, and directories with all that is in them, to read.
    pub read: Vec<PathBuf>,
    /// Files to read and write; directories, in which files and directories may be made and removed too.
    pub write: Vec<PathBuf>,
    /// Sockets to listen at, and to remove, which need not exist. Rights are for the directories that they are
    /// in, and hold for all below: other sockets there may be made and connected to, files removed. So a
    /// VM's sockets are best alone in theirs.
    pub sockets: Vec<PathBuf>,
}

impl Paths {
    /// What a VM of this configuration opens: at its start, and again when its guest is reset.
    #[must_use]
    pub fn of(config: &VmConfig) -> Self {
        let (read_only, writable): (Vec<_>, Vec<_>) =
            config.disks.iter().partition(|disk| disk.read_only);
        let paths = |disks: Vec<&crate::config::DiskConfig>| {
            disks.into_iter().map(|disk| disk.path.clone()).collect::<Vec<_>>()
        };
        let mut read = vec![config.kernel.clone()];
        read.extend(config.initrd.clone());
        read.extend(paths(read_only));
        Self { read, write: paths(writable), sockets: config.sockets.iter().cloned().collect() }
    }
}

/// What was put up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Report {
    /// Whether system calls are restricted.
    pub seccomp: bool,
    /// Whether files are.
    pub files: Files,
}

/// Whether files are restricted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Files {
    /// Nobody has asked for it.
    Unrestricted,
    /// The kernel has no landlock, or it was turned off at boot.
    Unsupported,
    /// They are, as far as this version of landlock's interface goes: from 1; network from 4, devices from 5,
    /// signals from 6.
    Restricted {
        /// The version.
        abi: u32,
    },
}

/// Why a wall is not up. The other one may be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A path that leads nowhere.
    #[error("{path}: {source}")]
    Path {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Threads that are there already would stay outside.
    #[error(
        "files cannot be restricted for {count} threads: only for one, and those that it makes"
    )]
    Threads {
        /// How many there are.
        count: usize,
    },
    /// The kernel has no landlock, and it is required.
    #[error("this kernel has no landlock (CONFIG_SECURITY_LANDLOCK, and landlock in lsm=)")]
    NoLandlock,
    /// Landlock refuses.
    #[error("landlock: {0}")]
    Landlock(String),
    /// Seccomp refuses.
    #[error("seccomp: {0}")]
    Seccomp(String),
}

impl Sandbox {
    /// Puts up the walls, for good: for this thread and those that it makes, and by seccomp for all others
    /// too.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Threads`] where files are to be restricted, there are other threads, and the kernel
    /// is older than 7.0.
    pub fn apply(&self, paths: &Paths) -> Result<Report, Error> {
        let files = match self.landlock {
            Landlock::Off => Files::Unrestricted,
            Landlock::WherePossible | Landlock::Required => files::restrict(paths)?,
        };
        if self.landlock == Landlock::Required && files == Files::Unsupported {
            return Err(Error::NoLandlock);
        }
        if self.seccomp {
            calls::restrict()?;
        }
        Ok(Report { seccomp: self.seccomp, files })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_names_what_it_opens() {
        let config = r#"{
            "kernel": "/k", "initrd": "/i", "memory_bytes": 0, "processors": 1, "sockets": "/s/vm",
            "disks": [{"path": "/a"}, {"path": "/b", "read_only": true}]
        }"#;
        let paths = Paths::of(&serde_json::from_str(config).unwrap());
        let expected = Paths {
            read: vec!["/k".into(), "/i".into(), "/b".into()],
            write: vec!["/a".into()],
            sockets: vec!["/s/vm".into()],
        };
        assert_eq!(paths, expected);
    }
}
