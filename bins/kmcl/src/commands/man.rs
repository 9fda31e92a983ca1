//! `kmcl man`: a man page per command, made from the definitions of the command line.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use serde::Serialize;

use crate::cli::{Cli, Man};
use crate::exit::{Exit, Failure, Result};
use crate::output::{Output, Report, Table};

/// The pages that were written.
#[derive(Serialize)]
struct Pages {
    pages: Vec<PathBuf>,
}

impl Report for Pages {
    fn table(&self) -> Table {
        let mut table = Table::pairs();
        for page in &self.pages {
            table.row(vec![page.display().to_string()]);
        }
        table
    }
}

pub(crate) fn run(arguments: &Man, output: &Output) -> Result<()> {
    let dir = &arguments.dir;
    let cannot = |error| {
        Failure::system(
            format_args!("cannot write man pages into {}: {error}", dir.display()),
            "name a directory that can be written",
        )
    };
    std::fs::create_dir_all(dir).map_err(cannot)?;
    // Built first, so that every page knows its whole name and the global options.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let mut pages = Vec::new();
    write_pages(&command, "kmcl", dir, &mut pages).map_err(cannot)?;
    output.report(&Pages { pages })
}

/// The exit codes, in the section where man pages have them.
fn render_exit_status(text: &mut Vec<u8>) -> std::io::Result<()> {
    writeln!(text, ".SH \"EXIT STATUS\"")?;
    for exit in Exit::ALL {
        writeln!(text, ".TP\n\\fB{}\\fR\n{}", exit as u8, exit.meaning())?;
    }
    Ok(())
}

fn write_pages(
    command: &clap::Command,
    name: &str,
    dir: &Path,
    pages: &mut Vec<PathBuf>,
) -> std::io::Result<()> {
    let mut text = Vec::new();
    let man = clap_mangen::Man::new(command.clone()).title(name.to_uppercase());
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut text)?;
    }
    render_exit_status(&mut text)?;
    man.render_version_section(&mut text)?;
    let path = dir.join(format!("{name}.1"));
    std::fs::write(&path, text)?;
    pages.push(path);
    for subcommand in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        write_pages(subcommand, &format!("{name}-{}", subcommand.get_name()), dir, pages)?;
    }
    Ok(())
}
