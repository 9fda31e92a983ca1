//! `kmcl vm run`: boots a guest and sees it to its end.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use kmcl_vmm::config::VmConfig;
use kmcl_vmm::control::Control;
use kmcl_vmm::sandbox::{Error as SandboxError, Landlock, Paths, Sandbox};
use kmcl_vmm::{ConsoleOutput, Notice, Observer, Vm, VmEnd, VmError, VmHost};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use super::console::{self, RawTerminal};
use crate::cli::vm::{Host, Run};
use crate::exit::{Exit, Failure, Result};
use crate::interrupt::Interrupt;
use crate::output::Output;

pub(super) fn run(arguments: &Run, output: &Output) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    let host = host(&arguments.host, *output)?;
    let config = config(arguments);
    enclose(&config, &arguments.host, Vec::new())?;
    let vm = Vm::start(config, host).map_err(failure)?;
    see_through(vm, &arguments.host, interrupt)
}

/// What the command line asks for.
fn config(arguments: &Run) -> VmConfig {
    let named = arguments.disks.iter().map(|disk| disk.controller.saturating_add(1)).max();
    let cpus = u16::try_from(arguments.cpus).unwrap_or(1);
    let host = &arguments.host;
    VmConfig {
        kernel: arguments.kernel.clone(),
        initrd: arguments.initrd.clone(),
        command_line: arguments.cmdline.clone(),
        memory_bytes: arguments.memory.0,
        huge_pages: arguments.huge_pages,
        processors: arguments.cpus,
        synic: host.synic.map(Into::into),
        disks: arguments.disks.clone(),
        controllers: arguments.controllers.or(named).unwrap_or(1),
        sub_channels: arguments.sub_channels.unwrap_or(cpus.saturating_sub(1)),
        sockets: host.vsock.clone(),
        on_reset: host.on_reset.map(Into::into).unwrap_or_default(),
    }
}

/// What the VM has of this process.
pub(super) fn host(arguments: &Host, output: Output) -> Result<VmHost> {
    let console: ConsoleOutput = match &arguments.console {
        Some(path) => Box::new(File::create(path).map_err(|error| {
            Failure::system(format_args!("cannot make {}: {error}", path.display()), "")
        })?),
        None => Box::new(std::io::stdout()),
    };
    let observer: Observer = Arc::new(move |notice| tell(notice, output));
    Ok(VmHost { console, workers: arguments.workers, observer })
}

/// Lets this process have as many open files as it may: each of a guest's sockets takes three.
fn raise_file_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // Where it is refused, sockets are, once there are too many.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

/// Has this process give up what the VM has no need of. `read` is what it reads beside what is in `config`.
///
/// # Errors
/// A [`Failure`] that names the file that is missing, or says what the system refuses.
pub(super) fn enclose(config: &VmConfig, arguments: &Host, read: Vec<PathBuf>) -> Result<()> {
    raise_file_limit();
    let mut paths = Paths::of(config);
    paths.read.extend(read);
    paths.write.extend(arguments.allow.iter().cloned());
    paths.sockets.extend(arguments.control.clone());
    let landlock = if arguments.no_landlock { Landlock::Off } else { Landlock::WherePossible };
    let sandbox = Sandbox { seccomp: !arguments.no_seccomp, landlock };
    match sandbox.apply(&paths) {
        Ok(report) => {
            tracing::info!(?report, "sandbox");
            Ok(())
        }
        Err(error @ SandboxError::Path { .. }) => Err(Failure::usage(error, "check the path")),
        Err(error) => Err(Failure::system(error, "--no-seccomp and --no-landlock do without")),
    }
}

/// A line for each thing that happens.
fn tell(notice: &Notice, output: Output) {
    #[derive(Serialize)]
    struct Line<'a> {
        event: &'a str,
        detail: &'a str,
    }
    let (event, detail) = match notice {
        Notice::Running(mode) => ("running", format!("Hyper-V's interfaces by {mode}")),
        Notice::Restarted => ("restarted", "the guest has reset the VM".to_owned()),
        Notice::Crashed(crash) => {
            let numbers: Vec<_> = crash.parameters.iter().map(ToString::to_string).collect();
            let text = crash.message.as_deref().unwrap_or("no text");
            ("crashed", format!("the guest says {}: {text}", numbers.join(" ")))
        }
        Notice::Untold(count) => ("untold", format!("{count} notices, which came too fast")),
        Notice::MemoryLost(why) => {
            // The guest waits for a page that will never come, and whoever touches it with it.
            output.fail(&Failure::system(format_args!("the saved memory is lost: {why}"), ""));
            std::process::exit(Exit::System as i32);
        }
        _ => return,
    };
    output.notice(&Line { event, detail: &detail }, &format!("kmcl: {event}: {detail}"));
}

/// Drives the VM until it ends or this process is told to.
pub(super) fn see_through(vm: Vm, arguments: &Host, interrupt: Interrupt) -> Result<()> {
    let handle = vm.handle();
    let control = match &arguments.control {
        Some(path) => Some(
            Control::serve(path, Arc::new(handle.clone()))
                .map_err(|error| Failure::system(error, "choose another --control"))?,
        ),
        None => None,
    };
    let terminal = RawTerminal::enter()?;
    // These two end with the process.
    let typist = handle.clone();
    let failed = |error| Failure::system(format_args!("cannot start a thread: {error}"), "");
    let thread = thread::Builder::new().name("kmcl-console".into());
    thread.spawn(move || console::type_in(&typist)).map_err(failed)?;
    let thread = thread::Builder::new().name("kmcl-signals".into());
    let waiting = thread.spawn(move || {
        wait_for(&interrupt);
        handle.stop();
    });
    waiting.map_err(failed)?;
    let end = vm.run();
    drop(terminal);
    drop(control); // whoever has asked for the end has an answer, and hears of it
    match end {
        VmEnd::PowerOff | VmEnd::Saved | VmEnd::Stopped => Ok(()),
        VmEnd::Reset => Err(Failure::new(Exit::Guest, "the guest has reset the VM", "")),
        VmEnd::TripleFault { vp } => Err(Failure::new(
            Exit::Guest,
            format_args!("processor {vp} has met a fault while it could handle none"),
            "see the guest's console for what led to it",
        )),
        VmEnd::Failed(error) => Err(failure(error)),
        other => Err(Failure::system(format_args!("the VM has ended: {other:?}"), "")),
    }
}

/// Waits until this process is told to end.
fn wait_for(interrupt: &Interrupt) {
    loop {
        match poll(&mut [PollFd::new(interrupt, PollFlags::IN)], None) {
            Err(Errno::INTR) => {}
            _ => return,
        }
    }
}

/// What kind of failure an error of a VM is.
pub(super) fn failure(error: VmError) -> Failure {
    use kmcl_vmm::Error as Machine;
    if let VmError::Differences(lines) = &error {
        return Failure::differences("the saved VM cannot go on here, and was not started", lines);
    }
    let exit = match &error {
        VmError::Disk(_) | VmError::Controller { .. } | VmError::Unsettled { .. } => Exit::Disk,
        VmError::Machine(
            Machine::MemorySize { .. }
            | Machine::Processors { .. }
            | Machine::Kernel { .. }
            | Machine::InitrdSize { .. }
            | Machine::CommandLine(_),
        )
        | VmError::Taken { .. } => Exit::Usage,
        VmError::Unrestorable { .. } => Exit::Mismatch,
        VmError::Guest(_) | VmError::Silent { .. } => Exit::Peer,
        _ => Exit::System,
    };
    Failure::new(exit, error, "")
}
