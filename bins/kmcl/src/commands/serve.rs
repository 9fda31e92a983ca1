//! `kmcl serve`: disk images as a VSP, for one guest process after another.

use crate::cli::Serve;
use crate::exit::Result;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::server::Server;

pub(crate) fn run(arguments: &Serve, output: &Output) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    let server = Server::start(&arguments.served)?;
    server.announce(output, "ready")?;
    server.run(&interrupt)
}
