//! `perennial wal push` and `perennial wal fetch`, as PostgreSQL calls them: in the data directory, once per file.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crate::archive::push::{Pusher, name_of};
use crate::archive::{FetchOptions, Fetched, Source, ensure_writer, helper};
use crate::cli::args::{self, HistoryArgs};
use crate::cli::setup::Setup;
use crate::cli::{environment, exit};
use crate::disk;
use crate::error::{Error, IoContext, Result};
use crate::postgres::PostmasterFile;
use crate::postgres::data_dir::OWN_DIR;
use crate::repository::vault::{Known, Vault};
use crate::repository::{Repository, Writer, origin};
use crate::storage::{Policy, Store};
use crate::wal::{WalFileName, scan_part};

/// In our directory of the data directory.
const KEY_NOTE: &str = "key.age";

/// Recovery stops for good when a fetch fails: it is tried for longer than anything else.
const FETCH_PATIENCE: Duration = Duration::from_secs(300);

/// Between two tries to reach the helper of a standby.
const AGAIN: Duration = Duration::from_secs(1);

pub async fn push(setup: &Setup, args: args::WalPush) -> Result<i32> {
    end_with_parent()?;
    let data_dir = data_dir_of(&args.path)?;
    let vault = setup.vault(&setup.location(None)?, Policy::default())?;
    if let Some(known) = known(&data_dir, vault.url("").trim_end_matches('/'))? {
        vault.suppose(known);
    }
    let store: Arc<dyn Store> = Arc::new(vault.clone());
    let timeline = match name_of(&args.path)? {
        WalFileName::Segment(name) => Some(name.timeline),
        WalFileName::History(timeline) => Some(timeline),
        _ => None,
    };
    let host = environment::host_name();
    let writer = ensure_writer(store.clone(), &data_dir, timeline, &host, &setup.clock, &setup.events).await?;
    let repository = writer.repository(store, &setup.clock);
    let pusher = Pusher { repository, writer, data_dir: data_dir.clone(), events: setup.events.clone() };
    pusher.push(&args.path).await?;
    note_key(&vault, &data_dir)?;
    Ok(0)
}

/// What the directory knows of its repository, so that a push need not ask whether it is encrypted, nor for its key.
fn known(data_dir: &Path, address: &str) -> Result<Option<Known>> {
    let own_dir = data_dir.join(OWN_DIR);
    let noted = Writer::load(&own_dir)?;
    // The note of another repository says nothing of this one.
    let Some(writer) = noted.filter(|writer| writer.address == address) else { return Ok(None) };
    Ok(Some(Known { encryption: writer.descriptor.encryption, wrapped: disk::read_if_there(&own_dir.join(KEY_NOTE))? }))
}

/// The key as it is wrapped in the repository: of no use without an identity.
fn note_key(vault: &Vault, data_dir: &Path) -> Result<()> {
    let Some(wrapped) = vault.wrapped() else { return Ok(()) };
    let path = data_dir.join(OWN_DIR).join(KEY_NOTE);
    if disk::read_if_there(&path)?.as_ref() != Some(&*wrapped) {
        disk::durable_write(&path, &wrapped, 0o600)?;
    }
    Ok(())
}

pub async fn fetch(setup: &Setup, args: args::WalFetch) -> Result<i32> {
    end_with_parent()?;
    let name: WalFileName = args.name.parse()?;
    let options = history(args.history);
    let in_data_dir = Path::new("PG_VERSION").is_file();
    let location = setup.location(None)?;
    let fetched = match recovering_server(&args, in_data_dir)? {
        Some(postmaster) => {
            let key = helper::history_key(&location.to_string(), options);
            ask_helper(setup, &args, &key, name, postmaster).await?
        }
        None => None,
    };
    let fetched = match fetched {
        Some(fetched) => fetched,
        None => {
            let repository = Repository::open(setup.store(&location, patient())?, &setup.clock).await?;
            if in_data_dir {
                note_origin(&repository, options)?;
            }
            Source::open(repository, options).await?.fetch(name, &args.path).await?
        }
    };
    match fetched {
        Fetched::Done => {
            if args.no_new_tablespaces {
                refuse_new_tablespaces(name, &args.path)?;
            }
            Ok(exit::DONE)
        }
        // A standby asks on and on.
        Fetched::EndOfWal(_) if options.follow => Ok(exit::END_OF_WAL),
        Fetched::EndOfWal(why) => {
            setup.events.info(format!("end of WAL: {why}"));
            Ok(exit::END_OF_WAL)
        }
    }
}

/// Asks the helper of a recovering server; a standby, which may wait for long, until there is an answer. `None` when none
/// can be had.
async fn ask_helper(
    setup: &Setup,
    args: &args::WalFetch,
    history: &str,
    name: WalFileName,
    postmaster: i32,
) -> Result<Option<Fetched>> {
    loop {
        let start = || start_helper(setup, &args.history, postmaster);
        let told = |why: &str| setup.events.warning(format!("the standby waits for the repository: {why}"));
        let fetched = helper::ask(&setup.clock, history, (name, &args.path), start, told).await?;
        if fetched.is_some() {
            return Ok(fetched);
        }
        // The helper ends with the server, whose directory may be another's by now.
        let running = PostmasterFile::read(Path::new("."))?.filter(|running| running.is_alive(Path::new(".")));
        if running.is_none_or(|running| running.pid != postmaster) {
            return Err(Error::postgres(format!("the server that asked for {name} has ended")));
        }
        if !args.history.follow {
            return Ok(None);
        }
        setup.clock.sleep(AGAIN).await;
    }
}

/// PostgreSQL would make the new tablespace's link to where it is on the living machine, and replay into it.
fn refuse_new_tablespaces(name: WalFileName, path: &Path) -> Result<()> {
    let WalFileName::Segment(segment) = name else { return Ok(()) };
    let content = std::fs::read(path).on("read", path)?;
    if !scan_part(segment, &content)?.makes_tablespace {
        return Ok(());
    }
    std::fs::remove_file(path).on("remove", path)?;
    Err(Error::refused(format!("a tablespace is made in {name}, and replaying that would write outside the sandbox"))
        .hint("take a base backup, which has the tablespace (perennial backup -D DIR); drills from then on map it into the sandbox"))
}

/// The process that fetches ahead; ends with the postmaster.
pub async fn helper(setup: &Setup, args: args::WalHelper) -> Result<i32> {
    let location = setup.location(None)?;
    let options = history(args.history);
    // A standby tries again by itself, and says why it waits.
    let policy = if options.follow { Policy::default() } else { patient() };
    let repository = Repository::open(setup.store(&location, policy)?, &setup.clock).await?;
    note_origin(&repository, options)?;
    helper::serve(repository, options, args.postmaster, helper::history_key(&location.to_string(), options))
        .await
        .map(|()| 0)
}

/// A directory that is recovered to a generation remembers which: should it become the database, that is its parent.
fn note_origin(repository: &Repository, options: FetchOptions) -> Result<()> {
    match options.generation {
        Some(generation) => origin::note(Path::new(OWN_DIR), repository.descriptor().repository_id, generation),
        None => Ok(()),
    }
}

fn patient() -> Policy {
    Policy { patience: FETCH_PATIENCE, ..Policy::default() }
}

fn history(args: HistoryArgs) -> FetchOptions {
    let HistoryArgs { generation, oldest, timeline, through, follow } = args;
    FetchOptions { generation, oldest, timeline, through, follow }
}

/// The postmaster whose recovery asks, if one does: pg_rewind and people ask too, and want nothing fetched ahead.
fn recovering_server(args: &args::WalFetch, in_data_dir: bool) -> Result<Option<i32>> {
    if args.no_prefetch || !in_data_dir {
        return Ok(None);
    }
    let running = PostmasterFile::read(Path::new("."))?;
    Ok(running.filter(|running| running.is_alive(Path::new("."))).map(|running| running.pid))
}

fn start_helper(setup: &Setup, history: &HistoryArgs, postmaster: i32) -> Result<()> {
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe().on("find", "this program")?;
    let mut command = Command::new(&program);
    command.args([
        "wal",
        "helper",
        &format!("--postmaster={postmaster}"),
        &format!("--repo={}", setup.location(None)?),
    ]);
    command.args(setup.global.config.iter().map(|config| format!("--config={}", config.display())));
    command.args(setup.global.identity.iter().map(|identity| format!("--identity={}", identity.display())));
    command.args(history.generation.iter().map(|generation| format!("--generation={generation}")));
    command.args(history.oldest.iter().map(|oldest| format!("--oldest={oldest}")));
    command.args(history.timeline.iter().map(|timeline| format!("--timeline={timeline}")));
    command.args(history.through.iter().map(|through| format!("--through={through}")));
    command.args(history.follow.then_some("--follow"));
    // Its own process group and no descriptor of ours: PostgreSQL must neither wait for it nor signal it.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    command.spawn().on("start", &program).map(drop)
}

/// `%p` is relative to the data directory, which is the working directory of the archiver.
fn data_dir_of(path: &Path) -> Result<PathBuf> {
    let wal_dir = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let here = std::env::current_dir().on("find", "the working directory")?;
    let candidates = [here.clone(), here.join(wal_dir).join("..")];
    candidates.into_iter().find(|dir| dir.join("PG_VERSION").is_file()).ok_or_else(|| {
        Error::usage(format!("{} does not lie in a data directory", path.display()))
            .hint("call it as archive_command does: in the data directory, with the path of a file in pg_wal")
    })
}

/// When the archiver or the startup process ends, so do we: nobody reads our exit code any more.
fn end_with_parent() -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))
        .map_err(|e| Error::local("could not bind to the parent process", e))
}
