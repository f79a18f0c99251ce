//! House rules as a test: layers, places for facts, no dead paths in prose, files of a size that can be read.
//! Each failure prints what to do.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a rule that is broken fails the test"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &str, ending: &str) -> Vec<(String, String)> {
    fn walk(directory: &Path, ending: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).expect("listed") {
            let path = entry.expect("listed").path();
            if path.is_dir() {
                walk(&path, ending, found);
            } else if path.to_str().is_some_and(|path| path.ends_with(ending)) {
                found.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&root().join(directory), ending, &mut paths);
    paths.sort();
    let relative = |path: &Path| path.strip_prefix(root()).expect("below").to_str().expect("text").to_owned();
    paths.iter().map(|path| (relative(path), std::fs::read_to_string(path).expect("text"))).collect()
}

/// The code of a file without its tests and comments.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// What each module may import from; docs/ARCHITECTURE.md shows the same. Siblings of one layer do not know each other.
fn allowed() -> BTreeMap<&'static str, Vec<&'static str>> {
    let ground = ["model", "clock", "events", "error"];
    let below = |more: &[&'static str]| ground.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>();
    let operations = [
        "disk",
        "wal",
        "storage",
        "repository",
        "postgres",
        "archive",
        "backup",
        "restore",
        "drill",
        "copy",
        "retention",
        "status",
    ];
    BTreeMap::from([
        ("model", vec![]),
        ("error", vec!["model"]),
        ("clock", vec!["model"]),
        ("events", vec!["model"]),
        ("disk", below(&[])),
        ("wal", vec!["model", "error"]),
        ("storage", below(&[])),
        ("repository", below(&["disk", "wal", "storage"])),
        ("postgres", below(&["disk", "wal"])),
        ("archive", below(&["disk", "wal", "storage", "repository", "postgres"])),
        ("backup", below(&["disk", "wal", "storage", "repository", "postgres"])),
        ("restore", below(&["disk", "wal", "storage", "repository", "postgres"])),
        ("copy", below(&["storage", "repository"])),
        ("drill", below(&["disk", "wal", "storage", "repository", "postgres", "restore"])),
        ("retention", below(&["disk", "wal", "storage", "repository"])),
        ("status", below(&["disk"])),
        ("run", below(&operations)),
        ("cli", below(&[&operations[..], &["run"]].concat())),
    ])
}

#[test]
fn modules_import_only_from_below() {
    let allowed = allowed();
    for (path, text) in files("src", ".rs") {
        let module = path.trim_start_matches("src/").split(['/', '.']).next().expect("a module").to_owned();
        if module == "lib" || module == "main" {
            continue;
        }
        let may = allowed
            .get(module.as_str())
            .unwrap_or_else(|| panic!("{path}: add '{module}' to its layer in tests/tidy.rs and docs/ARCHITECTURE.md"));
        for part in code(&text).split("crate::").skip(1) {
            let name: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let known = allowed.contains_key(name.as_str());
            assert!(
                !known || name == module || may.contains(&name.as_str()),
                "{path} imports crate::{name}: {module} may import {may:?}. Move the code up, or the fact down"
            );
        }
    }
}

#[test]
fn majors_are_named_only_in_the_version_table() {
    for (path, text) in files("src", ".rs") {
        if path == "src/postgres/version.rs" {
            continue;
        }
        for (number, line) in code(&text).lines().enumerate() {
            let compares = ["major == 1", "major >= 1", "major < 1", "major > 1", "major <= 1"];
            assert!(
                !compares.iter().any(|c| line.contains(c)),
                "{path}:{}: put this difference into postgres/version.rs: {line}",
                number + 1
            );
        }
    }
}

#[test]
fn keys_are_spelled_only_in_the_layout() {
    for (path, text) in files("src", ".rs") {
        if path == "src/repository/layout.rs" || path == "src/cli/commands/demo.rs" {
            continue;
        }
        for word in ["\"generations/", "\"packs/", "\"backups/", "/manifest\"", "generation.json\"", "\"perennial.json"]
        {
            let spelled = code(&text).contains(word);
            let message = path.ends_with("boot.rs") && word == "\"generations/";
            assert!(!spelled || message, "{path} spells a key ({word}): build it in repository/layout.rs");
        }
    }
}

#[test]
fn nothing_is_left_for_later_in_the_code() {
    for (path, text) in files("src", ".rs").into_iter().chain(files("tests", ".rs")) {
        if path == "tests/tidy.rs" {
            continue;
        }
        for word in ["TODO", "FIXME", "XXX", "unimplemented!", "todo!("] {
            assert!(!text.contains(word), "{path} has a {word}: do it, or open an issue");
        }
    }
}

#[test]
fn files_can_be_read_in_one_sitting() {
    for (path, text) in files("src", ".rs") {
        let lines = code(&text).lines().count();
        assert!(lines <= 600, "{path} has {lines} lines of code: split it by what it does");
    }
}

#[test]
fn every_module_says_what_it_is() {
    for (path, text) in files("src", ".rs") {
        assert!(text.starts_with("//!"), "{path}: begin with //! and say what it is, why, and what it never does");
    }
}

#[test]
fn paths_in_prose_exist() {
    let mut prose = files("docs", ".md");
    for name in ["README.md", "CHANGELOG.md"] {
        prose.push((name.to_owned(), std::fs::read_to_string(root().join(name)).expect("there")));
    }
    for (file, text) in prose {
        for word in text.split(['`', '(', ')', ' ', '\n', ',', ';']) {
            let word = word.trim_end_matches(['.', ':']);
            let ours = ["src/", "docs/", "tests/", "scripts/", "benches/"].iter().any(|start| word.starts_with(start));
            let plain = word.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c));
            if ours && plain && !word.contains("NNNN") {
                assert!(root().join(word).exists(), "{file} names {word}, which does not exist");
            }
        }
    }
}

#[test]
fn the_exit_codes_page_is_the_table() {
    let page = std::fs::read_to_string(root().join("docs/reference/exit-codes.md")).expect("there");
    for (kind, code, meaning) in perennial::cli::exit::TABLE {
        let row = format!("| {code} | {} | {meaning} |", format!("{kind:?}").to_lowercase());
        assert!(page.contains(&row), "docs/reference/exit-codes.md lacks the row\n{row}");
    }
}

#[test]
fn the_command_reference_is_what_the_program_says() {
    fn describe(command: &mut clap::Command, path: &str, page: &mut String) {
        let name = format!("{path} {}", command.get_name()).trim().to_owned();
        let help = command.clone().bin_name(&name).render_long_help().to_string();
        let help: Vec<&str> = help.lines().map(str::trim_end).collect();
        page.push_str(&format!("## {name}\n\n```text\n{}\n```\n\n", help.join("\n").trim()));
        let visible: Vec<clap::Command> = command.get_subcommands().filter(|c| !c.is_hide_set()).cloned().collect();
        visible.into_iter().for_each(|mut child| describe(&mut child, &name, page));
    }
    let mut page =
        "# Command reference\n\nWhat `--help` says, command by command; made by `tests/tidy.rs`.\n\n".to_owned();
    describe(&mut perennial::cli::definition().term_width(100), "", &mut page);
    let path = root().join("docs/reference/commands.md");
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    if kept.trim() != page.trim() {
        std::fs::write(&path, &page).expect("written");
        panic!("docs/reference/commands.md was out of date and has been rewritten: look at the change and commit it");
    }
}
