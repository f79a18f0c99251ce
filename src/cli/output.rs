//! Everything that is printed: results to stdout, events, progress and errors to stderr.

use std::io::IsTerminal;
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};

use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::events::{Event, Events, Level};

use super::args::Global;

/// A line of a result.
pub fn line(text: impl std::fmt::Display) {
    use std::io::Write;
    // A reader that has gone (`| head`) is not an error.
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

pub fn json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::internal("a result as JSON").source(e))?;
    line(text);
    Ok(())
}

pub fn error(error: &Error) {
    let hint = error.hint_text().map(|hint| format!("  hint: {hint}\n")).unwrap_or_default();
    to_stderr(&format!("perennial: {error}\n{hint}"));
}

/// In one write: the server writes to the same place, and its lines must not end up inside ours.
fn to_stderr(text: &str) {
    use std::io::Write;
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Writes events as they come: a progress bar on a terminal, plain lines otherwise.
pub fn events(global: &Global) -> Events {
    let least = match (global.verbose, global.quiet) {
        (true, _) => Level::Detail,
        (_, true) => Level::Warning,
        _ => Level::Info,
    };
    let clock = Clock::system();
    let terminal = std::io::stderr().is_terminal() && !global.quiet;
    let bar = Mutex::new(Bar { shown: None, told_share: 0 });
    Events::new(move |event| {
        let mut bar = bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match event {
            Event::BackupProgress { done, total } | Event::RestoreProgress { done, total } if terminal => {
                bar.show(*done, *total)
            }
            Event::BackupProgress { done, total } | Event::RestoreProgress { done, total } => {
                let news = bar.is_news(*done, *total);
                (news && least <= Level::Info).then(|| print(&clock, Level::Info, event));
            }
            // As the server wrote it, whatever was asked of our own lines.
            Event::ServerSays { line } => bar.aside(|| to_stderr(&format!("{line}\n"))),
            _ if event.level() >= least => bar.aside(|| print(&clock, event.level(), event)),
            _ => (),
        }
    })
}

fn print(clock: &Clock, level: Level, event: &Event) {
    let label = match level {
        Level::Detail => "detail",
        Level::Info => "info",
        Level::Warning => "WARNING",
        Level::Alarm => "ALARM",
    };
    to_stderr(&format!("{} perennial {label}: {event}\n", clock.now().short()));
}

struct Bar {
    shown: Option<ProgressBar>,
    /// Tenths already told in plain lines.
    told_share: u64,
}

impl Bar {
    fn show(&mut self, done: u64, total: u64) {
        let bar = self.shown.get_or_insert_with(|| {
            let template = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(total).with_style(style)
        });
        bar.set_position(done);
        if done >= total {
            bar.finish_and_clear();
            self.shown = None;
        }
    }

    /// In plain lines, each tenth is told once.
    fn is_news(&mut self, done: u64, total: u64) -> bool {
        let share = (done * 10).checked_div(total).unwrap_or(10);
        let news = share > self.told_share;
        self.told_share = if share >= 10 { 0 } else { share };
        news
    }

    fn aside(&self, print: impl FnOnce()) {
        match &self.shown {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

/// Columns under headings, as wide as they need to be.
pub fn table(headings: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([headings[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let print = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        line(padded.join("  ").trim_end());
    };
    print(&mut headings.iter().copied());
    rows.iter().for_each(|row| print(&mut row.iter().map(String::as_str)));
}
