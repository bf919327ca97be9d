//! The `minivmm` program: argv → logger → configuration → VM → loop → exit status.
//!
//! Owns: the exit status, and that every line on standard error begins with the program's name.
//! Threads: main, which becomes control. Locks: none.

use minivmm::args::{Action, Args, HELP};
use minivmm::config::Config;
use minivmm::qmp::introspect;
use minivmm::{startup, sys};
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(status),
        Err(text) => {
            for line in text.lines() {
                // Where standard error is gone there is no one to tell.
                let _ = writeln!(std::io::stderr(), "minivmm: {line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<u8, String> {
    let args = Args::parse(std::env::args_os().skip(1), std::env::var_os("MINIVMM_LOG"))?;
    sys::log::init(args.log);
    match &args.action {
        Action::Help => print(HELP),
        Action::Version => print(&format!("minivmm {}\n", env!("CARGO_PKG_VERSION"))),
        Action::HelpQmp(command) => {
            let text = introspect::help(command.as_deref()).map_err(|e| e.desc)?;
            print(&text)
        }
        Action::Check(file) => startup::check(&Config::read(file, &args.sets)?).map(|()| 0),
        Action::Run(file) => startup::run(&Config::read(file, &args.sets)?),
    }
}

/// To standard output. A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> Result<u8, String> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(format!("standard output: {e}")),
        _ => Ok(0),
    }
}
