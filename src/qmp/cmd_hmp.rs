//! `human-monitor-command`: the few commands of QEMU's human monitor that test suites use over QMP.
//!
//! Owns: the human line's form. Never: what a command does. Threads: control. Locks: none.

use super::schema::Cx;
use crate::block::driver::Perm;
use crate::block::handle::{Handle, HandleSpec};
use crate::block::node::Node;
use crate::control::formats::Formats;
use crate::control::state::RunState;
use crate::error::{Error, Result};
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
    /// end let it go on. `reopen [-r|-w] [-c MODE]` makes the node read-only or writable, or changes its
    /// cache mode.
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
    let wrong = |what: &str| format!("qemu-io: {what}\r\nTry \"help qemu-io\" for more information\r\n");
    let mut of_device = false;
    if words.0.trim_start().starts_with("-d ") {
        words.bare();
        of_device = true;
    }
    let name = words.quoted().ok_or_else(|| wrong("block device name expected"))?;
    let line = words.quoted().ok_or_else(|| wrong("string expected"))?;
    let reopens = line.split(' ').find(|w| !w.is_empty()) == Some("reopen");
    if !words.0.trim().is_empty() {
        return Err(wrong("extraneous characters at the end of line"));
    }
    if of_device {
        let lost = format!("Error: Device '{name}' not found\r\n");
        let handle = cx.vm.drives.of_device(&name).map(|d| d.handle.clone()).ok_or(lost)?;
        if reopens {
            return reopen(cx, &handle, &line);
        }
        return Ok(cx.vm.qemu_io.run(&handle, &line, false));
    }
    if let Some(handle) = cx.vm.drives.find(&name).map(|d| d.handle.clone()) {
        if reopens {
            return reopen(cx, &handle, &line);
        }
        return Ok(cx.vm.qemu_io.run(&handle, &line, false));
    }
    let Some(node) = cx.vm.graph.find(&name).cloned() else {
        return Err(format!("Error: Cannot find device='' nor node-name='{name}'\r\n"));
    };
    let handle = borrow(cx, node, &line).map_err(|e| format!("{e}\r\n"))?;
    let text = match reopens {
        true => reopen(cx, &handle, &line),
        false => Ok(cx.vm.qemu_io.run(&handle, &line, true)),
    };
    // Waits for the request behind the gate; one that still waits before it gets ENOMEDIUM.
    cx.vm.graph.detach(&handle);
    text
}

/// `reopen [-r | -w] [-c MODE]`: the disk's node turns read-only or writable, or uses the host's
/// cache as `-drive cache=` says. The disk itself then writes no more, or does again. The control
/// thread does it itself.
fn reopen(cx: &mut Cx, handle: &Arc<Handle>, line: &str) -> std::result::Result<String, String> {
    let mut words = line.split(' ').filter(|w| !w.is_empty()).skip(1);
    let (mut read_only, mut cache) = (None, None);
    while let Some(word) = words.next() {
        match word {
            "-r" | "-w" if read_only.is_some() => {
                return Err("Only one -r/-w option may be given\r\n".to_string());
            }
            "-r" | "-w" => read_only = Some(word == "-r"),
            "-c" => {
                let mode = words.next().ok_or("reopen: option requires an argument -- 'c'\r\n")?;
                let known = match mode {
                    "none" | "off" => (true, false, true),
                    "directsync" => (true, false, false),
                    "writeback" => (false, false, true),
                    "unsafe" => (false, true, true),
                    "writethrough" => (false, false, false),
                    _ => return Err(format!("Invalid cache option: {mode}\r\n")),
                };
                cache = Some(known);
            }
            _ => return Err(format!("reopen: invalid option or argument '{word}'\r\n")),
        }
    }
    if let Some((.., write_cache)) = cache
        && write_cache != handle.write_cache()
        && !handle.qom_path().is_empty()
    {
        return Err("Cannot change cache.writeback: Device attached\r\n".to_string());
    }
    let Some(node) = handle.node() else { return Ok(String::new()) };
    let (uses, shares) = (handle.uses(), handle.shares());
    let writing = Perm::WRITE | Perm::WRITE_UNCHANGED;
    let vm = &mut *cx.vm;
    let text = |e: Error| format!("{e}\r\n");
    if read_only == Some(true) {
        vm.graph.set_perm(handle, uses & !writing, shares).map_err(text)?;
    }
    let done = vm.graph.reopen_with(&Formats::new(&mut vm.fds, &vm.objects), &node, |common| {
        if let Some(read_only) = read_only {
            common.read_only = Some(read_only);
            common.auto_read_only = Some(false);
        }
        if let Some((direct, no_flush, _)) = cache {
            (common.direct, common.no_flush) = (Some(direct), Some(no_flush));
        }
    });
    match (&done, read_only) {
        // A drive that was writable before can be written again.
        (Ok(()), Some(false)) if !handle.name().is_empty() => {
            vm.graph.set_perm(handle, uses | Perm::WRITE, shares).map_err(text)?;
        }
        (Err(_), Some(true)) => vm.graph.set_perm(handle, uses, shares).map_err(text)?,
        _ => {}
    }
    done.map_err(text)?;
    if let Some((.., write_cache)) = cache {
        handle.set_write_cache(write_cache);
    }
    Ok(String::new())
}

/// A user of `node` that does what `line` needs.
fn borrow(cx: &mut Cx, node: Arc<Node>, line: &str) -> Result<Arc<Handle>> {
    let changes = ["write", "w", "aio_write", "discard", "d"];
    let writes = line.split(' ').find(|w| !w.is_empty()).is_some_and(|w| changes.contains(&w));
    let uses = if writes { Perm::WRITE } else { Perm::NONE };
    cx.vm.graph.attach(Some(node), HandleSpec { uses, shares: Perm::ALL, ..HandleSpec::default() })
}

#[cfg(test)]
#[path = "cmd_hmp_test.rs"]
mod tests;
