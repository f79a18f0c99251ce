//! The command line: arguments and settings in, text and an exit code out. The only layer that reads the environment,
//! prints, or names an exit code.

mod args;
mod commands;
mod config;
mod environment;
pub mod exit;
mod identity;
mod memory;
mod output;
mod secret;
mod setup;

use clap::{CommandFactory, Parser};

pub use args::Args;

/// Runs the command line and returns the exit code.
pub fn main() -> i32 {
    // What we write holds table content, in a repository on a disk too: for its owner alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    // A mistake of ours must not look like an answer either.
    let code = std::panic::catch_unwind(run).unwrap_or(exit::code(crate::error::Kind::Internal));
    // Told from the words themselves: a command line that cannot be read is not the end of WAL.
    match code {
        exit::DONE | exit::END_OF_WAL => code,
        failure if environment::is_restore_command() => exit::for_recovery(failure),
        failure => failure,
    }
}

fn run() -> i32 {
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
    commands::dispatch(args).unwrap_or_else(|error| {
        output::error(&error);
        exit::code(error.kind())
    })
}

/// The definition of the command line, for man pages, completions and the reference.
pub fn definition() -> clap::Command {
    Args::command()
}
