//! One file per command: settings in, an operation called, its result told.

mod agent;
mod backup;
mod clone;
mod copy;
mod demo;
mod drill;
mod init;
mod key;
mod list;
mod prune;
mod restore;
mod run;
mod status;
mod verify;
mod wal;

use std::future::Future;

use clap::CommandFactory;

use crate::error::{Error, IoContext, Result};

use super::args::{Args, Command, Wal};
use super::setup::Setup;

/// Runs the command; its exit code.
pub fn dispatch(args: Args) -> Result<i32> {
    let setup = Setup::new(args.global)?;
    match args.command {
        Command::Init(args) => wide(init::run(&setup, args)),
        Command::Run(args) => run::run(&setup, args),
        Command::Agent(args) => agent::run(&setup, args),
        Command::Backup(args) => backup::run(&setup, args),
        Command::Restore(args) => restore::run(&setup, args),
        Command::Wal(Wal::Push(args)) => narrow(wal::push(&setup, args)),
        Command::Wal(Wal::Fetch(args)) => narrow(wal::fetch(&setup, args)),
        Command::Wal(Wal::Helper(args)) => narrow(wal::helper(&setup, args)),
        Command::List => wide(list::run(&setup)),
        Command::Verify(args) => wide(verify::run(&setup, args)),
        Command::Status(args) => wide(status::run(&setup, args)),
        Command::Prune(args) => wide(prune::run(&setup, args)),
        Command::Drill(args) => drill::run(&setup, args),
        Command::Copy(args) => wide(copy::run(&setup, args)),
        Command::Clone(args) => clone::run(&setup, args),
        Command::Key(args) => wide(key::run(&setup, args)),
        Command::Pin(args) => wide(prune::pin(&setup, args)),
        Command::Unpin(args) => wide(prune::unpin(&setup, args)),
        Command::Demo(args) => demo::run(&setup, args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "perennial", &mut std::io::stdout());
            Ok(0)
        }
        Command::Man { directory } => {
            clap_mangen::generate_to(Args::command(), &directory).on("write man pages to", &directory)?;
            Ok(0)
        }
    }
}

/// On a runtime with a thread for each processor.
pub(super) fn wide<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Error::local("could not start threads", e))?;
    let outcome = runtime.block_on(work);
    // A thread that hangs in a file system that does not answer is not waited for: nobody wants its answer any more.
    runtime.shutdown_background();
    outcome
}

/// On this thread alone (and blocking ones as needed): for commands that PostgreSQL calls for every segment.
fn narrow<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|e| Error::local("could not start threads", e))?.block_on(work)
}
