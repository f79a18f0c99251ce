//! Parses, calls, exits with the code.

#[allow(clippy::exit, clippy::disallowed_methods, reason = "the one place where the process ends")]
fn main() {
    std::process::exit(perennial::cli::main());
}
