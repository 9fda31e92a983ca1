//! `kmcl vm`: the command line of virtual machines.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use kmcl_vmm::config::{Cache, DiskConfig, OnReset, SynicMode};

use crate::exit::Exit;
use crate::size::Size;

/// Run virtual machines whose disks, services and sockets are on a VMBus
#[derive(Debug, Subcommand)]
pub(crate) enum Vm {
    Run(Run),
    Restore(Restore),
    Save(Save),
    /// Ask the guest to power off, by its integration services
    Shutdown(Shutdown),
    /// Ask the guest to restart, by its integration services
    Reboot(Shutdown),
    /// Stop the processors of a VM
    Pause(Controlled),
    /// Let a paused VM go on
    Resume(Controlled),
    /// Tell how a VM is
    Info(Controlled),
    /// Tell what was counted since the VM's start
    Counters(Controlled),
    AddDisk(AddDisk),
    RemoveDisk(RemoveDisk),
    Ctl(Ctl),
}

/// Boot a kernel as a guest
///
/// The guest finds its disks behind VMBus storage controllers, its integration services and its sockets,
/// with the drivers that its kernel has. Its console is standard input and output. Ends when the guest
/// powers off, or when kmcl vm save has saved it.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Run {
    /// The kernel: a bzImage or an ELF file
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    pub(crate) cmdline: String,
    /// Memory of the guest, a multiple of 2M
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub(crate) memory: Size,
    /// Make the memory of huge pages of 2 MiB, which the system must have set aside
    #[arg(long)]
    pub(crate) huge_pages: bool,
    /// Processors of the guest
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) cpus: u32,
    /// A disk: an image, then options (ro, cache=buffered|direct, id=NAME, controller=N, lun=N) after commas;
    /// may be repeated
    #[arg(long = "disk", value_name = "FILE[,OPTION]...", value_parser = disk)]
    pub(crate) disks: Vec<DiskConfig>,
    /// Storage controllers (default: as many as the disks name)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(kmcl_vmm::config::MAX_CONTROLLERS)))]
    pub(crate) controllers: Option<u8>,
    /// Channels that a guest may open for each controller beside the first, so that several of its
    /// processors work at a time (default: one fewer than its processors)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=64))]
    pub(crate) sub_channels: Option<u16>,
    #[command(flatten)]
    pub(crate) host: Host,
}

/// What a VM has of its host, booted or restored.
#[derive(Args, Debug)]
pub(crate) struct Host {
    /// Who provides Hyper-V's interfaces (default: kernel where KVM can)
    #[arg(long, value_enum, value_name = "WHO")]
    pub(crate) synic: Option<Synic>,
    /// The Unix socket at which the VM is controlled: kmcl vm save, info, and so on
    #[arg(long, value_name = "PATH")]
    pub(crate) control: Option<PathBuf>,
    /// The Unix socket behind which the guest's sockets are: connect to it and say CONNECT and a port; what
    /// the guest connects to is at this path with _ and the port behind it
    #[arg(long, value_name = "PATH")]
    pub(crate) vsock: Option<PathBuf>,
    /// What a reset of the guest does (default: restart, or what the saved VM had)
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(crate) on_reset: Option<Reset>,
    /// Where the guest's console goes instead of standard output: a file that is made
    #[arg(long, value_name = "FILE")]
    pub(crate) console: Option<PathBuf>,
    /// Threads that drive devices (default: one per two processors)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) workers: Option<u16>,
    /// A directory that the running VM may use beside those of its disks and sockets: for images that
    /// are added and states that are saved; may be repeated
    #[arg(long = "allow", value_name = "DIR")]
    pub(crate) allow: Vec<PathBuf>,
    /// Let this process make every system call
    #[arg(long)]
    pub(crate) no_seccomp: bool,
    /// Let this process use every file that its user may
    #[arg(long)]
    pub(crate) no_landlock: bool,
}

/// Who provides Hyper-V's interfaces.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Synic {
    /// KVM
    Kernel,
    /// This program
    User,
}

impl From<Synic> for SynicMode {
    fn from(synic: Synic) -> Self {
        match synic {
            Synic::Kernel => Self::Kernel,
            Synic::User => Self::User,
        }
    }
}

/// What a reset of the guest does.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Reset {
    /// The VM begins anew
    Restart,
    /// The VM ends
    Exit,
}

impl From<Reset> for OnReset {
    fn from(reset: Reset) -> Self {
        match reset {
            Reset::Restart => Self::Restart,
            Reset::Exit => Self::Exit,
        }
    }
}

/// Go on with a saved VM, in the middle of what it did
///
/// It has the memory, processors and disks that it had. Everything is checked first; whatever fails, the
/// saved VM is as good as it was, and may be restored again and again.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Restore {
    /// The directory that kmcl vm save has made
    #[arg(long, value_name = "DIR")]
    pub(crate) from: PathBuf,
    /// Where the image of a disk is now, if not where it was; may be repeated
    #[arg(long = "disk", value_name = "NAME=FILE", value_parser = moved_disk)]
    pub(crate) disks: Vec<(String, PathBuf)>,
    /// Have the guest go on before its memory is read: the rest comes when it is touched, or meanwhile
    #[arg(long)]
    pub(crate) lazy: bool,
    #[command(flatten)]
    pub(crate) host: Host,
}

/// How a running VM is reached.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Controlled {
    /// The Unix socket given to kmcl vm run as --control
    #[arg(long, value_name = "PATH")]
    pub(crate) control: PathBuf,
}

/// Save a running VM into a directory: it ends, and kmcl vm restore goes on where it stopped
///
/// Whatever fails, the VM goes on as before; the directory appears whole or not at all.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Save {
    #[command(flatten)]
    pub(crate) vm: Controlled,
    /// The directory to make; only this user may read it
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// Compress memory: smaller, but it cannot be restored lazily
    #[arg(long)]
    pub(crate) zstd: bool,
    /// Let the VM go on
    #[arg(long)]
    pub(crate) keep_running: bool,
}

/// How a guest is asked.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Shutdown {
    #[command(flatten)]
    pub(crate) vm: Controlled,
    /// Have the guest not wait for its programs
    #[arg(long)]
    pub(crate) force: bool,
}

/// Give a running guest a disk
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct AddDisk {
    #[command(flatten)]
    pub(crate) vm: Controlled,
    /// The disk, as for kmcl vm run
    #[arg(long, value_name = "FILE[,OPTION]...", value_parser = disk)]
    pub(crate) disk: DiskConfig,
}

/// Take a disk away from a running guest
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct RemoveDisk {
    #[command(flatten)]
    pub(crate) vm: Controlled,
    /// Its name
    #[arg(long, value_name = "NAME")]
    pub(crate) id: String,
}

/// Make any request of the control interface, and print the answer
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Ctl {
    #[command(flatten)]
    pub(crate) vm: Controlled,
    /// The request, such as vm.info: docs/api.yaml has them all
    #[arg(value_name = "REQUEST")]
    pub(crate) request: String,
    /// Its body: JSON
    #[arg(value_name = "JSON")]
    pub(crate) body: Option<String>,
}

/// A disk as the command line has it.
fn disk(text: &str) -> Result<DiskConfig, String> {
    let mut parts = text.split(',');
    let path = PathBuf::from(parts.next().unwrap_or_default());
    if path.as_os_str().is_empty() {
        return Err("the name of the file is missing".to_owned());
    }
    let mut disk = DiskConfig {
        id: None,
        path,
        read_only: false,
        cache: Cache::default(),
        controller: 0,
        lun: None,
    };
    for option in parts {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let number = || value.parse::<u8>().map_err(|error| format!("{option}: {error}"));
        match (name, value) {
            ("ro", "") => disk.read_only = true,
            ("cache", "buffered") => disk.cache = Cache::Buffered,
            ("cache", "direct") => disk.cache = Cache::Direct,
            ("id", id) if !id.is_empty() => disk.id = Some(id.to_owned()),
            ("controller", _) => disk.controller = number()?,
            ("lun", _) => disk.lun = Some(number()?),
            _ => {
                return Err(format!(
                    "unknown option \"{option}\"; there are ro, cache=buffered|direct, id=NAME, \
                     controller=N and lun=N"
                ));
            }
        }
    }
    Ok(disk)
}

/// Where a disk has moved.
fn moved_disk(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((id, path)) if !id.is_empty() && !path.is_empty() => {
            Ok((id.to_owned(), PathBuf::from(path)))
        }
        _ => Err("give the disk's name, =, and its image".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_given_with_options() {
        let found = disk("/x/a.img,ro,cache=direct,id=root,controller=1,lun=7").unwrap();
        let expected = DiskConfig {
            id: Some("root".into()),
            path: "/x/a.img".into(),
            read_only: true,
            cache: Cache::Direct,
            controller: 1,
            lun: Some(7),
        };
        assert_eq!(found, expected);
        for (text, expected) in [
            ("", "missing"),
            (",ro", "missing"),
            ("a,rw", "unknown option \"rw\""),
            ("a,", "unknown option \"\""),
            ("a,ro=1", "unknown option"),
            ("a,cache=none", "unknown option"),
            ("a,id=", "unknown option"),
            ("a,lun=256", "lun=256: "),
            ("a,controller=x", "controller=x: "),
        ] {
            let error = disk(text).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn moved_disks_have_a_name_and_a_file() {
        assert_eq!(moved_disk("a=/b=c").unwrap(), ("a".to_owned(), PathBuf::from("/b=c")));
        for text in ["", "a", "=b", "a="] {
            assert!(moved_disk(text).is_err(), "{text:?}");
        }
    }
}
