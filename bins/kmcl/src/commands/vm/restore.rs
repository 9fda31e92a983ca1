//! `kmcl vm restore`: a saved VM goes on.

use kmcl_vmm::{RestoreOptions, Vm};

use super::run::{enclose, failure, host, see_through};
use crate::cli::vm::Restore;
use crate::exit::Result;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::progress::Length;

pub(super) fn run(arguments: &Restore, output: &Output) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    let ours = host(&arguments.host, *output)?;
    let options = RestoreOptions {
        from: arguments.from.clone(),
        disks: arguments.disks.clone(),
        sockets: arguments.host.vsock.clone(),
        synic: arguments.host.synic.map(Into::into),
        on_reset: arguments.host.on_reset.map(Into::into),
        lazy: arguments.lazy,
    };
    let mut config = options.config().map_err(failure)?;
    // What is not there is told later, all of it together; and a kernel is needed only at a reset.
    config.disks.retain(|disk| disk.path.exists());
    config.initrd = config.initrd.filter(|path| path.exists());
    if !config.kernel.exists() {
        config.kernel.clone_from(&arguments.from);
    }
    enclose(&config, &arguments.host, vec![arguments.from.clone()])?;
    let mut bar = None;
    let mut shown = 0;
    let vm = Vm::restore(&options, ours, &mut |progress| {
        let bar = bar.get_or_insert_with(|| {
            output.progress("reading memory", Length::Bytes(progress.total_bytes))
        });
        bar.advance(progress.done_bytes.saturating_sub(shown));
        shown = progress.done_bytes;
    });
    drop(bar);
    see_through(vm.map_err(failure)?, &arguments.host, interrupt)
}
