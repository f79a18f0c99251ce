//! Who we are: not root where PostgreSQL would refuse, and an init process where the kernel expects one.

use std::ffi::CString;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, Uid, User};

use crate::disk;
use crate::error::{Error, IoContext, Kind, Result};

use super::args::{Args, Command};

/// Started as root, becomes the owner of the data directory (user `postgres` for a new one) for good. PostgreSQL
/// refuses to run as root, and its files must belong to whoever runs it.
pub fn drop_root(data_dir: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let user = give_away(data_dir)?;
    let failed = |e: nix::errno::Errno| Error::local(format!("could not become user {}", user.name), e);
    let name = CString::new(user.name.clone()).map_err(|_| Error::internal("a user's name with a zero byte"))?;
    nix::unistd::initgroups(&name, user.gid).map_err(failed)?;
    nix::unistd::setgid(user.gid).map_err(failed)?;
    nix::unistd::setuid(user.uid).map_err(failed)?;
    check_callback(&user)
}

/// As root, makes the directory if need be and gives it, while it is empty, to the user who will own it.
pub fn give_away(data_dir: &Path) -> Result<User> {
    let user = owner_of(data_dir)?;
    if std::fs::symlink_metadata(data_dir).is_err() {
        disk::create_dir(data_dir, 0o700)?;
    }
    let metadata = std::fs::metadata(data_dir).on("stat", data_dir)?;
    if metadata.uid() == 0 && crate::postgres::is_vacant(data_dir)? {
        std::os::unix::fs::chown(data_dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
            .on("give away", data_dir)?;
    }
    Ok(user)
}

fn owner_of(data_dir: &Path) -> Result<User> {
    let owner = std::fs::metadata(data_dir).ok().map(|metadata| metadata.uid()).filter(|uid| *uid != 0);
    let user = match owner {
        Some(uid) => User::from_uid(Uid::from_raw(uid)),
        None => User::from_name("postgres"),
    };
    user.ok().flatten().ok_or_else(|| {
        Error::new(Kind::Refused, "PostgreSQL does not run as root, and there is no user to run it as").hint(format!(
            "make a user (adduser --system postgres) or give the directory to one (chown USER '{}')",
            data_dir.display()
        ))
    })
}

/// PostgreSQL calls this program for every segment, as its own user.
fn check_callback(user: &User) -> Result<()> {
    let program = std::env::current_exe().on("find", "this program")?;
    nix::unistd::access(&program, nix::unistd::AccessFlags::X_OK).map_err(|_| {
        Error::refused(format!("user {} cannot execute {}", user.name, program.display()))
            .hint("install it where everybody can: install -m 755 perennial /usr/local/bin/")
    })
}

/// As process 1 of a container, `run` is done by a child, and this process only passes signals on and reaps what its
/// servers leave behind. `None` when we are not process 1.
pub fn act_as_init(args: &Args) -> Option<i32> {
    if std::process::id() != 1 || !matches!(args.command, Command::Run(_)) {
        return None;
    }
    Some(init().unwrap_or_else(|error| {
        super::output::error(&error);
        super::exit::code(error.kind())
    }))
}

fn init() -> Result<i32> {
    let failed = |e: nix::errno::Errno| Error::local("could not act as init", e);
    let mut passed_on = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGCHLD] {
        passed_on.add(signal);
    }
    let before = passed_on.thread_swap_mask(nix::sys::signal::SigmaskHow::SIG_BLOCK).map_err(failed)?;
    let child = start_child(before)?;
    loop {
        match passed_on.wait().map_err(failed)? {
            Signal::SIGCHLD => {
                if let Some(code) = reap(child) {
                    return Ok(code);
                }
            }
            signal => {
                let _ = nix::sys::signal::kill(child, signal);
            }
        }
    }
}

fn start_child(mask: SigSet) -> Result<Pid> {
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe().on("find", "this program")?;
    let mut command = std::process::Command::new(program);
    command.args(std::env::args_os().skip(1));
    // SAFETY: between fork and exec only two system calls are made; neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(move || {
            mask.thread_set_mask()?;
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
            Ok(())
        });
    }
    let child = command.spawn().map_err(|e| Error::local("could not start the supervisor", e))?;
    Ok(Pid::from_raw(child.id() as i32))
}

/// Reaps every child that has ended; the supervisor's exit code once it is among them.
fn reap(supervisor: Pid) -> Option<i32> {
    let mut ended = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == supervisor => ended = Some(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == supervisor => ended = Some(128 + signal as i32),
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => (),
            _ => return ended,
        }
    }
}
