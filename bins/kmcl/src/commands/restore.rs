//! `kmcl restore`: a server goes on where a saved one stopped.

use std::time::Duration;

use crate::cli::Restore;
use crate::exit::Result;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::server::Server;

pub(crate) fn run(arguments: &Restore, output: &Output) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    let limit = Duration::from_secs(arguments.wait);
    let server = Server::restore(&arguments.served, &arguments.file, limit, &interrupt)?;
    server.announce(output, "restored")?;
    server.run(&interrupt)
}
