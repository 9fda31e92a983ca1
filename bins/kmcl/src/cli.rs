//! The command line, from which `--help`, the completions and the man pages all come.

pub(crate) mod vm;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::exit::Exit;
use crate::size::Size;

/// VMBus from the command line: run virtual machines on it; serve disk images as a Hyper-V host does, and
/// read, write, verify and measure them as a guest does.
#[derive(Debug, Parser)]
#[command(name = "kmcl", version, after_help = Exit::table(), propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command understands.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Global {
    /// Write results (standard output) and failures (standard error) as one line of JSON each
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Log what happens on standard error; twice for more
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Demo(Demo),
    Serve(Serve),
    Save(Save),
    Restore(Restore),
    /// Work with a disk that a server serves
    #[command(subcommand, after_help = Exit::table())]
    Disk(Disk),
    Inspect(Inspect),
    #[command(subcommand, after_help = Exit::table())]
    Vm(vm::Vm),
    Completions(Completions),
    Man(Man),
}

/// Serve a disk from one process, use it from another, kill and restore the server, prove every byte
///
/// Reads the whole disk through VMBus and compares it with the image; overwrites it with a pattern
/// that names its place, sequentially and at random, and checks it through VMBus and in the file;
/// tests UNMAP. Then a guest writes and reads at random places of a second disk, with as many requests in
/// flight as --depth says, while its server is frozen, saved to a file, killed with SIGKILL and restored
/// in a new process, several times; every block must hold what was written last. In the end the original
/// content is written back to the first disk, and e2fsck judges it. Works on a copy, never on the image
/// given.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Demo {
    /// The image to work on a copy of; without it an ext4 image is made
    #[arg(long, value_name = "FILE")]
    pub(crate) disk: Option<PathBuf>,
    /// Size of the ext4 image that is made without --disk
    #[arg(long, value_name = "SIZE", default_value = "64M", conflicts_with = "disk")]
    pub(crate) size: Size,
    /// Requests in flight at once; where whole disks are transferred, at most 16
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..=MAX_DEPTH))]
    pub(crate) depth: u16,
    /// How many times the server is moved into a new process
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub(crate) moves: u16,
    /// Longest time between two moves in milliseconds; the moments are random
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    pub(crate) move_every: u64,
    /// Bytes of the buffers that the server is saved into, 1 to 1M (default: random for each move)
    #[arg(long, value_name = "SIZE", value_parser = save_buffer)]
    pub(crate) save_buffer: Option<Size>,
    /// Which random requests, moments and sizes (default: others each time)
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// How much of a large disk is overwritten, in pieces spread over all of it
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub(crate) write_limit: Size,
    /// Directory for the copy, with room for it (default: the directory for temporary files)
    #[arg(long, value_name = "DIR")]
    pub(crate) work_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) back_end: BackEndArgs,
}

/// Largest buffer that a server is saved into.
pub(crate) const MAX_SAVE_BUFFER: u64 = 1 << 20;

fn save_buffer(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error: crate::size::SizeError| error.to_string())?;
    if (1..=MAX_SAVE_BUFFER).contains(&size.0) {
        return Ok(size);
    }
    Err(format!("a buffer has 1 byte to {}", Size(MAX_SAVE_BUFFER)))
}

/// Largest queue depth that can be asked for.
pub(crate) const MAX_DEPTH: i64 = 256;

/// How a server reads and writes image files.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct BackEndArgs {
    /// Threads that drive channels (default: one per two processors)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) workers: Option<u16>,
    /// How image files are read and written
    #[arg(long, value_enum, default_value_t = BackEnd::Auto)]
    pub(crate) backend: BackEnd,
}

/// How image files are read and written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum BackEnd {
    /// io_uring where the kernel has it, else threads
    Auto,
    /// io_uring, or not at all
    #[value(name = "io_uring")]
    IoUring,
    /// A pool of threads
    Threads,
}

impl BackEnd {
    /// The value as the command line has it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// Serve disk images to guests, one guest process after another
///
/// Prints one line when guests may connect; ends on SIGINT or SIGTERM with everything flushed, or when
/// kmcl save has moved it into a file.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Serve {
    #[command(flatten)]
    pub(crate) served: Served,
}

/// What is served, where and how.
#[derive(Args, Debug)]
pub(crate) struct Served {
    /// An image to serve: a file, then options (ro, cache=direct|buffered, sector=512|4096) after
    /// commas; may be repeated
    ///
    /// The first one is LUN 0, the next one LUN 1, and so on. `ro` refuses writes. `cache=direct`, the
    /// default, passes the page cache of this machine by where the file allows it; `cache=buffered`
    /// uses it. `sector` is the disk's logical block size, 512 by default.
    #[arg(long = "disk", value_name = "FILE[,OPTION]...", required = true)]
    pub(crate) disks: Vec<DiskSpec>,
    /// Where to listen: a Unix socket that is made, and removed at the end; and another one beside it,
    /// with .control behind its name, for kmcl save
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// End when standard input ends, as the server of a demonstration does
    #[arg(long, hide = true)]
    pub(crate) until_eof: bool,
    #[command(flatten)]
    pub(crate) back_end: BackEndArgs,
}

/// Save a running server to a file: it ends, and kmcl restore goes on where it stopped
///
/// Requests in flight are saved with it. Whatever fails, the server goes on as before, and a file that was
/// there is as it was: the new one appears whole or not at all.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Save {
    /// The socket at which the server serves guests
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// The file to make or to replace; only this user may read it
    #[arg(long, value_name = "FILE")]
    pub(crate) to: PathBuf,
    /// Let the server go on: for a look with kmcl inspect. A guest never goes on with such a state, which
    /// is of the past already
    #[arg(long = "continue")]
    pub(crate) go_on: bool,
    /// Seconds that requests may take to settle which run and cannot be cancelled
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub(crate) settle: u64,
    /// Bytes of the buffers that the state is saved into, up to 1M; makes no difference to the result
    #[arg(long, value_name = "SIZE", default_value = "64K", hide = true, value_parser = save_buffer)]
    pub(crate) buffer: Size,
}

/// Go on with a saved server: with its disks, its guest, and the requests that were in flight
///
/// Waits for the guest, whose connection must be looking for a server, and prints one line when it is
/// back. Everything is checked first; whatever fails, the saved state is as good as it was.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Restore {
    /// The file that kmcl save has written
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) served: Served,
    /// Seconds to wait for the guest
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) wait: u64,
}

/// An image and how to serve it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct DiskSpec {
    pub(crate) path: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) cache: Cache,
    /// Bytes of a logical block.
    pub(crate) sector: u32,
}

/// Whether the page cache of this machine is used for an image.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Cache {
    /// Passed by where the file allows it.
    Direct,
    /// Used.
    Buffered,
}

/// Why the value of `serve --disk` was refused.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum DiskSpecError {
    #[error("the name of the file is missing")]
    NoPath,
    #[error("unknown option \"{0}\"; there are ro, cache=direct|buffered and sector=512|4096")]
    Option(String),
}

impl std::str::FromStr for DiskSpec {
    type Err = DiskSpecError;

    fn from_str(text: &str) -> Result<Self, DiskSpecError> {
        let mut parts = text.split(',');
        let path = PathBuf::from(parts.next().unwrap_or_default());
        if path.as_os_str().is_empty() {
            return Err(DiskSpecError::NoPath);
        }
        let mut spec = Self { path, read_only: false, cache: Cache::Direct, sector: 512 };
        for option in parts {
            match option {
                "ro" => spec.read_only = true,
                "cache=direct" => spec.cache = Cache::Direct,
                "cache=buffered" => spec.cache = Cache::Buffered,
                "sector=512" => spec.sector = 512,
                "sector=4096" => spec.sector = 4096,
                _ => return Err(DiskSpecError::Option(option.to_owned())),
            }
        }
        Ok(spec)
    }
}

/// Explain a saved state: what it is of, what was in flight, what of it is damaged
///
/// Shows everything that is undamaged, also before and after what is not, and fails if anything is.
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Inspect {
    /// The file that holds the saved state
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Check every checksum and every field, and say so in one line
    #[arg(long)]
    pub(crate) verify: bool,
    /// Show every packet and every record, not only the first few
    #[arg(long, conflicts_with = "verify")]
    pub(crate) all: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Disk {
    Info(Info),
    Read(Read),
    Write(Write),
    Verify(Verify),
    Bench(Bench),
}

/// How a disk is reached.
#[derive(Args, Clone, Debug)]
pub(crate) struct Target {
    /// The socket at which the server listens
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// Seconds after which a silent server is given up
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) timeout: u64,
    /// Seconds to look for a server that goes on, should this one be moved by kmcl save and kmcl restore
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=3600))]
    pub(crate) reconnect: u64,
}

/// Which disk, and how many requests at once.
#[derive(Args, Clone, Debug)]
pub(crate) struct DiskTarget {
    #[command(flatten)]
    pub(crate) target: Target,
    /// The disk's logical unit number: the first --disk of the server is 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) lun: u8,
    /// Requests in flight at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=MAX_DEPTH))]
    pub(crate) depth: u16,
}

/// List the server's disks and what they can do
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Info {
    #[command(flatten)]
    pub(crate) target: Target,
}

/// Read from a disk into a file or to standard output
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Read {
    #[command(flatten)]
    pub(crate) disk: DiskTarget,
    /// First byte to read
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(crate) offset: Size,
    /// How much to read (default: up to the end of the disk)
    #[arg(long, value_name = "SIZE")]
    pub(crate) length: Option<Size>,
    /// The file to make, or - for standard output
    #[arg(long, short, value_name = "FILE", default_value = "-")]
    pub(crate) output: PathBuf,
}

/// Write a file or standard input to a disk, and flush it
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Write {
    #[command(flatten)]
    pub(crate) disk: DiskTarget,
    /// First byte to write; a multiple of the disk's block size
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(crate) offset: Size,
    /// How much to write (default: all of the input)
    #[arg(long, value_name = "SIZE")]
    pub(crate) length: Option<Size>,
    /// The file to write, or - for standard input
    #[arg(long, short, value_name = "FILE", default_value = "-")]
    pub(crate) input: PathBuf,
}

/// Compare a disk with a file, byte for byte
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Verify {
    #[command(flatten)]
    pub(crate) disk: DiskTarget,
    /// The file that the disk must equal
    #[arg(long, value_name = "FILE")]
    pub(crate) against: PathBuf,
    /// First byte of the disk to compare; the file is read from its beginning
    #[arg(long, value_name = "SIZE", default_value = "0")]
    pub(crate) offset: Size,
    /// How much to compare (default: all of the file)
    #[arg(long, value_name = "SIZE")]
    pub(crate) length: Option<Size>,
}

/// Measure how fast a disk is
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Bench {
    #[command(flatten)]
    pub(crate) disk: DiskTarget,
    /// What to measure
    #[arg(value_enum, default_value_t = Workload::Randread)]
    pub(crate) workload: Workload,
    /// Bytes of each request
    #[arg(long, value_name = "SIZE", default_value = "4K")]
    pub(crate) block_size: Size,
    /// Stop after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub(crate) seconds: u64,
    /// Stop after so many bytes
    #[arg(long, value_name = "SIZE")]
    pub(crate) bytes: Option<Size>,
    /// Allow the write workloads, which destroy what is on the disk
    #[arg(long)]
    pub(crate) overwrite: bool,
}

/// What `disk bench` measures.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Workload {
    /// Sequential reads
    Read,
    /// Sequential writes
    Write,
    /// Reads at random places
    Randread,
    /// Writes at random places
    Randwrite,
}

/// Print a completion script for a shell
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// Write the man pages into a directory
#[derive(Args, Debug)]
#[command(after_help = Exit::table())]
pub(crate) struct Man {
    /// The directory; it is made if it does not exist
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_hold_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_documents_its_exit_codes() {
        fn walk(command: &clap::Command) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Exit codes:"), "{}", command.get_name());
            command.get_subcommands().for_each(walk);
        }
        walk(&Cli::command());
    }

    #[test]
    fn disks_are_given_with_options() {
        let spec = |path: &str, read_only, cache, sector| DiskSpec {
            path: path.into(),
            read_only,
            cache,
            sector,
        };
        for (text, expected) in [
            ("a.img", Ok(spec("a.img", false, Cache::Direct, 512))),
            ("a.img,ro", Ok(spec("a.img", true, Cache::Direct, 512))),
            ("/x/b,cache=direct,sector=4096", Ok(spec("/x/b", false, Cache::Direct, 4096))),
            ("b,cache=buffered,ro", Ok(spec("b", true, Cache::Buffered, 512))),
            ("", Err(DiskSpecError::NoPath)),
            (",ro", Err(DiskSpecError::NoPath)),
            ("a,rw", Err(DiskSpecError::Option("rw".into()))),
            ("a,cache=none", Err(DiskSpecError::Option("cache=none".into()))),
            ("a,", Err(DiskSpecError::Option(String::new()))),
        ] {
            assert_eq!(text.parse::<DiskSpec>(), expected, "{text:?}");
        }
    }
}
