//! The `minivmm` program: argv → logger → configuration → VM → loop → exit status.
//!
//! Owns: the exit status, and that every line on standard error begins with the program's name.
//! Threads: main, which becomes control. Locks: none.
// Rust's runtime reads /proc/self/maps and gives each thread a signal stack, to put a message on a
// stack overflow: 0.1 ms of the 2 that a tiny VM takes to start, and 12 KiB a thread. (Elsewhere
// than on glibc it is also what finds the arguments.)
#![cfg_attr(target_env = "gnu", no_main)]

use minivmm::args::{Action, Args, HELP};
use minivmm::config::Config;
use minivmm::qmp::introspect;
use minivmm::{startup, sys};
use std::io::Write;

/// What the C library calls.
#[cfg(target_env = "gnu")]
#[unsafe(no_mangle)]
extern "C" fn main(_: i32, _: *const *const u8) -> i32 {
    status().into()
}

#[cfg(not(target_env = "gnu"))]
fn main() -> std::process::ExitCode {
    status().into()
}

/// The exit status. A panic has been reported by then, and everything on the way is dropped.
fn status() -> u8 {
    match std::panic::catch_unwind(run) {
        Ok(Ok(status)) => status,
        Ok(Err(text)) => {
            for line in text.lines() {
                // Control characters (a name in the configuration or an image may have them) must
                // not reach the terminal.
                let line = line.replace(|c: char| c.is_control(), "?");
                // Where standard error is gone there is no one to tell.
                let _ = writeln!(std::io::stderr(), "minivmm: {line}");
            }
            1
        }
        Err(_) => 101,
    }
}

fn run() -> Result<u8, String> {
    sys::process::begin().map_err(|e| e.to_string())?;
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
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(format!("standard output: {e}")),
        _ => Ok(0),
    }
}
