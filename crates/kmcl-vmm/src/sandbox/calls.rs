//! Seccomp: which system calls there are, and why.
//!
//! Three filters, of whose answers the kernel takes the strictest: [`ALLOWED`] and [`ALLOWED_WITH`] are let
//! through and all else fails with EPERM; `clone3` fails with ENOSYS; [`FATAL`] ends the process. Calls for
//! another architecture of the same processor end it too.

use seccompiler::{BpfMap, BpfProgram, TargetArch};
use serde_json::{Value, json};

use super::Error;

/// What a call gives that is not in the lists.
const EPERM: u32 = 1;
/// What a call gives that C libraries take for absent.
const ENOSYS: u32 = 38;

/// Calls that are let through whatever their arguments.
const ALLOWED: &[&[&str]] = &[
    // Files that are open: the disks, the console, a VM that is saved or restored.
    &[
        "read",
        "readv",
        "pread64",
        "preadv",
        "preadv2",
        "write",
        "writev",
        "pwrite64",
        "pwritev",
        "pwritev2",
        "lseek",
        "copy_file_range",
        "sendfile",
        "splice",
        "fsync",
        "fdatasync",
        "sync_file_range",
        "ftruncate",
        "fallocate",
        "fadvise64",
        "flock",
        "fstat",
        "fstatfs",
        "fchmod",
        "getdents64",
        "close",
        "close_range",
        "dup",
        "dup2",
        "dup3",
        "pipe2",
    ],
    // Files to open, make and remove: a hot-added disk, a VM that is saved. Landlock says which.
    &[
        "open",
        "openat",
        "stat",
        "lstat",
        "newfstatat",
        "statx",
        "statfs",
        "access",
        "faccessat",
        "faccessat2",
        "readlink",
        "readlinkat",
        "getcwd",
        "mkdir",
        "mkdirat",
        "rmdir",
        "unlink",
        "unlinkat",
        "rename",
        "renameat",
        "renameat2",
    ],
    // Disks.
    &["io_uring_setup", "io_uring_enter", "io_uring_register"],
    // Waiting, and waking who waits.
    &[
        "futex",
        "poll",
        "ppoll",
        "epoll_create1",
        "epoll_ctl",
        "epoll_wait",
        "epoll_pwait",
        "epoll_pwait2",
        "eventfd2",
        "timerfd_create",
        "timerfd_settime",
        "timerfd_gettime",
        "nanosleep",
        "clock_nanosleep",
        "clock_gettime",
        "clock_getres",
        "gettimeofday",
        "restart_syscall",
        "sched_yield",
    ],
    // Memory. What makes some of it executable is below.
    &[
        "brk",
        "munmap",
        "mremap",
        "madvise",
        "msync",
        "mincore",
        "membarrier",
        "memfd_create",
        "userfaultfd",
    ],
    // Threads of this process, and what their C library asks when they begin and end. `clone3` is answered
    // before it gets here.
    &[
        "clone3",
        "set_robust_list",
        "get_robust_list",
        "rseq",
        "set_tid_address",
        "sched_getaffinity",
        "getcpu",
        "gettid",
        "getpid",
        "getppid",
        "exit",
        "exit_group",
    ],
    // Signals: processors are kicked with one.
    &[
        "rt_sigaction",
        "rt_sigprocmask",
        "rt_sigreturn",
        "rt_sigpending",
        "rt_sigtimedwait",
        "sigaltstack",
    ],
    // Unix sockets: control, and the guest's. Which families there are is below.
    &[
        "bind",
        "listen",
        "accept",
        "accept4",
        "connect",
        "shutdown",
        "getsockname",
        "getpeername",
        "getsockopt",
        "setsockopt",
        "sendto",
        "recvfrom",
        "sendmsg",
        "recvmsg",
    ],
    // What tells nothing but about this process and system.
    &["getuid", "geteuid", "getgid", "getegid", "getrusage", "getrandom", "uname", "sysinfo"],
];

/// What an argument must be.
#[derive(Clone, Copy, Debug)]
enum Must {
    /// This, in its lower 32 bits.
    Be(u32),
    /// This, in all of it.
    BeWhole(u64),
    /// This, in those of its lower 32 bits that are in the first number.
    Have(u32, u32),
}

/// Calls that are let through only when one argument is as it must be: call, which argument, what.
const ALLOWED_WITH: &[(&str, u8, &[Must])] = &[
    // KVM, page faults of lazily restored memory, and a few by name; never TIOCSTI, by which whoever
    // holds a terminal could type to a shell.
    (
        "ioctl",
        1,
        &[
            Must::Have(0xff00, 0xae00), // KVMIO
            Must::Have(0xff00, 0xaa00), // UFFDIO
            Must::Be(0x5421),           // FIONBIO
            Must::Be(0x5451),           // FIOCLEX
            Must::Be(0x5401),           // TCGETS
            Must::Be(0x5402),           // TCSETS
            Must::Be(0x5403),           // TCSETSW
            Must::Be(0x5404),           // TCSETSF
            Must::Be(0x802c_542a),      // TCGETS2
            Must::Be(0x402c_542b),      // TCSETS2
            Must::Be(0x402c_542c),      // TCSETSW2
            Must::Be(0x402c_542d),      // TCSETSF2
            Must::Be(0x5413),           // TIOCGWINSZ
        ],
    ),
    // No code that was not there at the start: PROT_EXEC is refused.
    ("mmap", 2, &[Must::Have(4, 0)]),
    ("mprotect", 2, &[Must::Have(4, 0)]),
    // Threads, not processes: CLONE_THREAD.
    ("clone", 0, &[Must::Have(0x1_0000, 0x1_0000)]),
    // Unix sockets alone: AF_UNIX.
    ("socket", 0, &[Must::Be(1)]),
    ("socketpair", 0, &[Must::Be(1)]),
    (
        "prctl",
        0,
        &[
            Must::Be(15),          // PR_SET_NAME
            Must::Be(38),          // PR_SET_NO_NEW_PRIVS
            Must::Be(0x5356_4d41), // PR_SET_VMA
            Must::Be(0x4155_5856), // PR_GET_AUXV
        ],
    ),
    // Not who gets its signals, nor leases.
    (
        "fcntl",
        1,
        &[
            Must::Be(0),    // F_DUPFD
            Must::Be(1),    // F_GETFD
            Must::Be(2),    // F_SETFD
            Must::Be(3),    // F_GETFL
            Must::Be(4),    // F_SETFL
            Must::Be(5),    // F_GETLK
            Must::Be(6),    // F_SETLK
            Must::Be(7),    // F_SETLKW
            Must::Be(36),   // F_OFD_GETLK
            Must::Be(37),   // F_OFD_SETLK
            Must::Be(38),   // F_OFD_SETLKW
            Must::Be(1030), // F_DUPFD_CLOEXEC
            Must::Be(1033), // F_ADD_SEALS
            Must::Be(1034), // F_GET_SEALS
        ],
    ),
    // Limits are read, for the size of a stack: no new ones.
    ("prlimit64", 2, &[Must::BeWhole(0)]),
];

/// Calls that end the process: whoever makes one of them here is not this program.
const FATAL: &[&[&str]] = &[
    // Another program.
    &["execve", "execveat", "kexec_load", "kexec_file_load"],
    // Another process.
    &["ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp"],
    // The kernel.
    &[
        "bpf",
        "perf_event_open",
        "init_module",
        "finit_module",
        "delete_module",
        "iopl",
        "ioperm",
        "modify_ldt",
        "reboot",
        "add_key",
        "request_key",
        "keyctl",
    ],
    // Another view of the system.
    &[
        "unshare",
        "setns",
        "chroot",
        "pivot_root",
        "mount",
        "umount2",
        "move_mount",
        "open_tree",
        "fsopen",
        "fsmount",
        "open_by_handle_at",
    ],
    // Another user.
    &[
        "setuid",
        "setgid",
        "setreuid",
        "setregid",
        "setresuid",
        "setresgid",
        "setgroups",
        "setfsuid",
        "setfsgid",
        "capset",
        "personality",
    ],
];

/// Restricts all threads of this process.
pub(super) fn restrict() -> Result<(), Error> {
    let [fatal, absent, allowed] = compile(std::process::id())?;
    // The last one would forbid to install others.
    for filter in [fatal, absent, allowed] {
        seccompiler::apply_filter_all_threads(&filter).map_err(seccomp)?;
    }
    Ok(())
}

/// The three filters: what is fatal, what is absent, what is allowed.
fn compile(pid: u32) -> Result<[BpfProgram; 3], Error> {
    let fatal: Vec<Value> = names(FATAL).map(|name| json!({"syscall": name})).collect();
    let mut allowed: Vec<Value> = names(ALLOWED).map(|name| json!({"syscall": name})).collect();
    for &(name, argument, musts) in ALLOWED_WITH {
        allowed.extend(musts.iter().map(|&must| rule(name, argument, must)));
    }
    // Signals for this process alone.
    allowed.push(rule("tgkill", 0, Must::Be(pid)));
    let filters = json!({
        "fatal": {
            "mismatch_action": "allow",
            "match_action": "kill_process",
            "filter": fatal,
        },
        // Its flags are in memory, where no filter can look: so C libraries fall back to `clone`.
        "absent": {
            "mismatch_action": "allow",
            "match_action": {"errno": ENOSYS},
            "filter": [{"syscall": "clone3"}],
        },
        "allowed": {
            "mismatch_action": {"errno": EPERM},
            "match_action": "allow",
            "filter": allowed,
        },
    });
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(seccomp)?;
    let mut compiled: BpfMap =
        seccompiler::compile_from_json(filters.to_string().as_bytes(), arch).map_err(seccomp)?;
    let mut take = |name| compiled.remove(name).unwrap_or_default();
    Ok([take("fatal"), take("absent"), take("allowed")])
}

fn names(groups: &'static [&'static [&'static str]]) -> impl Iterator<Item = &'static str> {
    groups.iter().copied().flatten().copied()
}

fn rule(name: &str, argument: u8, must: Must) -> Value {
    let condition = match must {
        Must::Be(value) => json!({"index": argument, "type": "dword", "op": "eq", "val": value}),
        Must::BeWhole(value) => {
            json!({"index": argument, "type": "qword", "op": "eq", "val": value})
        }
        Must::Have(mask, value) => {
            json!({"index": argument, "type": "dword", "op": {"masked_eq": mask}, "val": value})
        }
    };
    json!({"syscall": name, "args": [condition]})
}

fn seccomp(error: impl std::fmt::Display) -> Error {
    Error::Seccomp(error.to_string())
}

#[cfg(test)]
mod tests {
    use seccompiler::sock_filter;

    use super::*;

    const PID: u32 = 4711;

    const KILL_PROCESS: u32 = 0x8000_0000;
    const ERRNO: u32 = 0x0005_0000;
    const ALLOW: u32 = 0x7fff_0000;

    /// The words that a filter looks at: number, architecture, instruction pointer, arguments.
    fn data(arch: u32, number: u32, arguments: [u64; 3]) -> Vec<u32> {
        let mut words = vec![number, arch, 0, 0];
        for argument in arguments.into_iter().chain([0; 3]) {
            words.extend([u32::try_from(argument & 0xffff_ffff).unwrap(), (argument >> 32) as u32]);
        }
        words
    }

    /// What the kernel would make of a filter: the few instructions that ours are made of.
    fn run(filter: &[sock_filter], data: &[u32]) -> u32 {
        let (mut at, mut value) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = filter[at].clone();
            let jump = |taken| usize::from(if taken { jt } else { jf });
            at += 1;
            match code {
                0x20 => value = data[k as usize / 4],
                0x54 => value &= k,
                0x05 => at += k as usize,
                0x15 => at += jump(value == k),
                0x25 => at += jump(value > k),
                0x35 => at += jump(value >= k),
                0x06 => return k,
                other => panic!("an instruction {other:#x}"),
            }
        }
    }

    /// The strictest answer of all three: as a signed number, the smallest.
    fn answer(arch: u32, number: u32, arguments: [u64; 3]) -> u32 {
        let data = data(arch, number, arguments);
        let filters = compile(PID).unwrap();
        let strictness = |answer: &u32| (answer & 0xffff_0000).cast_signed();
        filters.iter().map(|filter| run(filter, &data)).min_by_key(strictness).unwrap()
    }

    #[test]
    fn calls_are_let_through_refused_or_fatal() {
        const X86_64: u32 = 0xc000_003e;
        const I386: u32 = 0x4000_0003;
        let (eperm, enosys) = (ERRNO | EPERM, ERRNO | ENOSYS);
        let pid = u64::from(PID);
        for (what, arch, number, arguments, expected) in [
            ("read", X86_64, 0, [0, 0, 0], ALLOW),
            ("KVM_RUN", X86_64, 16, [3, 0xae80, 0], ALLOW),
            ("KVM_GET_MSRS", X86_64, 16, [3, 0xc008_ae88, 0], ALLOW),
            ("UFFDIO_COPY", X86_64, 16, [3, 0xc028_aa03, 0], ALLOW),
            ("userfaultfd", X86_64, 323, [1, 0, 0], ALLOW),
            ("TIOCSTI", X86_64, 16, [0, 0x5412, 0], eperm),
            ("TIOCLINUX", X86_64, 16, [0, 0x541c, 0], eperm),
            ("mmap, to read", X86_64, 9, [0, 4096, 1], ALLOW),
            ("mmap, to read and execute", X86_64, 9, [0, 4096, 5], eperm),
            ("mprotect, to write", X86_64, 10, [0, 4096, 3], ALLOW),
            ("mprotect, to execute", X86_64, 10, [0, 4096, 4], eperm),
            ("pkey_mprotect", X86_64, 329, [0, 4096, 1], eperm),
            ("clone of a thread", X86_64, 56, [0x3d_0f00, 0, 0], ALLOW),
            ("clone of a process", X86_64, 56, [0x0120_0011, 0, 0], eperm),
            ("clone3", X86_64, 435, [0, 0, 0], enosys),
            ("fork", X86_64, 57, [0, 0, 0], eperm),
            ("socket, AF_UNIX", X86_64, 41, [1, 1, 0], ALLOW),
            ("socket, AF_INET", X86_64, 41, [2, 1, 0], eperm),
            ("socket, AF_NETLINK", X86_64, 41, [16, 1, 0], eperm),
            ("prctl, PR_SET_NAME", X86_64, 157, [15, 0, 0], ALLOW),
            ("prctl, PR_SET_DUMPABLE", X86_64, 157, [4, 1, 0], eperm),
            ("fcntl, F_SETFL", X86_64, 72, [0, 4, 0], ALLOW),
            ("fcntl, F_SETOWN", X86_64, 72, [0, 8, 0], eperm),
            ("prlimit64, to read", X86_64, 302, [0, 3, 0], ALLOW),
            ("prlimit64, to write", X86_64, 302, [0, 3, 0x7fff_0000_0000], eperm),
            ("tgkill, here", X86_64, 234, [pid, 1, 9], ALLOW),
            ("tgkill, elsewhere", X86_64, 234, [1, 1, 9], eperm),
            ("kill", X86_64, 62, [pid, 9, 0], eperm),
            ("execve", X86_64, 59, [0, 0, 0], KILL_PROCESS),
            ("ptrace", X86_64, 101, [0, 0, 0], KILL_PROCESS),
            ("setuid", X86_64, 105, [0, 0, 0], KILL_PROCESS),
            ("seccomp", X86_64, 317, [0, 0, 0], eperm),
            ("symlink", X86_64, 88, [0, 0, 0], eperm),
            ("read, by the x32 number", X86_64, 0x4000_0000, [0, 0, 0], eperm),
            ("read, of i386", I386, 3, [0, 0, 0], KILL_PROCESS),
            ("a number that nobody has", X86_64, 9999, [0, 0, 0], eperm),
        ] {
            let got = answer(arch, number, arguments);
            assert_eq!(got, expected, "{what}: {got:#x}, not {expected:#x}");
        }
    }

    /// What is named twice is let through whatever its arguments, or both let through and fatal.
    #[test]
    fn each_call_is_named_once() {
        let conditional = ALLOWED_WITH.iter().map(|(name, ..)| *name).chain(["tgkill"]);
        let mut all: Vec<_> = names(ALLOWED).chain(names(FATAL)).chain(conditional).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
