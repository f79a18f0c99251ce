//! The command line: arguments and settings in, text and an exit code out. The only layer that reads the environment,
//! prints, or names an exit code.

mod args;
mod commands;
mod config;
mod environment;
pub mod exit;
mod identity;
mod output;
mod setup;

use clap::{CommandFactory, Parser};

pub use args::Args;

use args::Command;

/// Runs the command line and returns the exit code.
pub fn main() -> i32 {
    // What we write holds table content, in a repository on a disk too: for its owner alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(refused) => {
            // clap prints help and version to stdout with code 0, mistakes to stderr with code 2.
            let _ = refused.print();
            return refused.exit_code();
        }
    };
    if let Some(code) = identity::act_as_init(&args) {
        return code;
    }
    let fetching = matches!(args.command, Command::Wal(args::Wal::Fetch(_)));
    match commands::dispatch(args) {
        Ok(code) => code,
        Err(error) => {
            output::error(&error);
            let code = exit::code(error.kind());
            if fetching { exit::for_recovery(code) } else { code }
        }
    }
}

/// The definition of the command line, for man pages, completions and the reference.
pub fn definition() -> clap::Command {
    Args::command()
}
