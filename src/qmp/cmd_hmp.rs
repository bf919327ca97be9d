//! `human-monitor-command`: the few commands of QEMU's human monitor that test suites use over QMP.
//!
//! Owns: the human line's form. Never: what a command does. Threads: control. Locks: none.

use super::schema::Cx;
use crate::block::driver::Perm;
use crate::block::handle::{Handle, HandleSpec};
use crate::control::state::RunState;
use crate::error::Result;
use crate::{bail, commands};
use std::sync::Arc;

commands! {
    /// The human monitor.
    pub static HMP;

    /// Runs a command of QEMU's human monitor, and answers its text, in lines that end with CR LF.
    /// There are `info status` and `qemu-io [-d] DRIVE "CMD"`: I/O as the guest of DRIVE (a drive, a
    /// node, or with `-d` a device) would do it, whose text goes to standard output. CMD: `read`,
    /// `aio_read` `[-q] [-v] [-P BYTE] OFFSET LENGTH`, `write`, `aio_write` `[-q] [-f] [-z [-u] [-n]]
    /// [-P BYTE] OFFSET LENGTH`, `discard [-q] OFFSET LENGTH`, `flush`, `aio_flush`, `length`, `sleep
    /// MILLISECONDS`; with the driver `blkdebug` below `break EVENT TAG`, `remove_break TAG`, `wait_break
    /// TAG`, `resume TAG`: they hold a request where EVENT happens. Commands that wait for requests to
    /// end let it go on.
    "human-monitor-command" => human_monitor_command {
        /// The command.
        "command-line" line: String,
        /// The processor that it is about, instead of the current one.
        "cpu-index" cpu_index: Option<i64>,
    } -> String;
}

fn human_monitor_command(cx: &mut Cx, line: String, cpu_index: Option<i64>) -> Result<String> {
    let cpus = cx.vm.settings.topology.cpus();
    if cpu_index.is_some_and(|n| !usize::try_from(n).is_ok_and(|n| n < cpus)) {
        bail!("Parameter 'cpu-index' expects a CPU number");
    }
    let mut words = Words(line.trim_start());
    let name = words.bare();
    Ok(match name {
        "" => String::new(),
        "info" => match words.bare() {
            "status" if words.0.trim().is_empty() => status(cx),
            other => format!("unknown command: 'info {other}'\r\n"),
        },
        "qemu-io" => qemu_io(cx, &mut words).unwrap_or_else(|text| text),
        other => format!("unknown command: '{other}'\r\n"),
    })
}

fn status(cx: &Cx) -> String {
    match cx.vm.run_state {
        state if state.is_running() => "VM status: running\r\n".to_string(),
        RunState::Paused => "VM status: paused\r\n".to_string(),
        state => format!("VM status: paused ({})\r\n", state.as_str()),
    }
}

/// What is left of a line.
struct Words<'a>(&'a str);

impl<'a> Words<'a> {
    /// The next word, as it is; "" at the end.
    fn bare(&mut self) -> &'a str {
        let text = self.0.trim_start();
        let end = text.find(char::is_whitespace).unwrap_or(text.len());
        self.0 = &text[end..];
        &text[..end]
    }

    /// The next word, which may stand in quotes. None: there is none, or a quote is not closed.
    fn quoted(&mut self) -> Option<String> {
        let Some(text) = self.0.trim_start().strip_prefix('"') else {
            return Some(self.bare().to_string()).filter(|w| !w.is_empty());
        };
        let mut word = String::new();
        let mut chars = text.char_indices();
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.0 = &text[at + 1..];
                    return Some(word);
                }
                '\\' => match chars.next()?.1 {
                    'n' => word.push('\n'),
                    'r' => word.push('\r'),
                    c @ ('\\' | '\'' | '"') => word.push(c),
                    _ => return None,
                },
                c => word.push(c),
            }
        }
        None
    }
}

/// The error is the human's text too.
fn qemu_io(cx: &mut Cx, words: &mut Words) -> std::result::Result<String, String> {
    let missing = "qemu-io: string expected\r\nTry \"help qemu-io\" for more information\r\n".to_string();
    let mut of_device = false;
    if words.0.trim_start().starts_with("-d ") {
        words.bare();
        of_device = true;
    }
    let name = words.quoted().ok_or(missing.clone())?;
    let line = words.quoted().ok_or(missing)?;
    if !words.0.trim().is_empty() {
        return Err("qemu-io: extraneous characters at the end of line\r\n".to_string());
    }
    if of_device {
        let lost = format!("Error: Device '{name}' not found\r\n");
        let handle = cx.vm.drives.of_device(&name).map(|d| d.handle.clone()).ok_or(lost)?;
        return Ok(cx.vm.qemu_io.run(&handle, &line, false));
    }
    if let Some(handle) = cx.vm.drives.find(&name).map(|d| d.handle.clone()) {
        return Ok(cx.vm.qemu_io.run(&handle, &line, false));
    }
    let handle = borrow(cx, &name, &line).map_err(|e| format!("Error: {e}\r\n"))?;
    let text = cx.vm.qemu_io.run(&handle, &line, true);
    // Waits for the request behind the gate; one that still waits before it gets ENOMEDIUM.
    cx.vm.graph.detach(&handle);
    Ok(text)
}

/// A user of the node `name` that does what `line` needs.
fn borrow(cx: &mut Cx, name: &str, line: &str) -> Result<Arc<Handle>> {
    let Some(node) = cx.vm.graph.find(name).cloned() else {
        bail!("Cannot find device='' nor node-name='{name}'");
    };
    let changes = ["write", "w", "aio_write", "discard", "d"];
    let writes = line.split(' ').find(|w| !w.is_empty()).is_some_and(|w| changes.contains(&w));
    let uses = if writes { Perm::WRITE } else { Perm::NONE };
    cx.vm.graph.attach(Some(node), HandleSpec { uses, shares: Perm::ALL, ..HandleSpec::default() })
}

#[cfg(test)]
#[path = "cmd_hmp_test.rs"]
mod tests;
