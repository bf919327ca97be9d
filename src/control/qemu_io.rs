//! `qemu-io DRIVE "CMD"`: I/O on a disk as its guest would do it, for tests without a guest.
//!
//! Commands, options and texts are those of QEMU 10's qemu-io; the text goes to standard output.
//! `read`, `write`, `discard` and `flush` are not counted in the disk's statistics, `aio_read`,
//! `aio_write` and `aio_flush` are: so it is in QEMU. `break` and what belongs to it speak to the
//! `blkdebug` node that is nearest below the disk.
//!
//! A request can wait for long (a throttled disk), and standard output can be full. So each command
//! runs on a thread of its own, and the control thread waits for it only for [`PATIENCE`].
//!
//! Owns: the count of requests under way. Never: changes the graph. Threads: control, and those
//! that it starts. Locks: the count's, a leaf.

use super::qemu_io_text::{Args, Stop, cvtstr, dump, pattern, report, size};
use crate::block::debug::Moments;
use crate::block::driver::Flags;
use crate::block::filename;
use crate::block::handle::{Handle, Request};
use crate::block::node::Node;
use crate::block::stats::Kind;
use crate::error::strerror;
use crate::sys::iov::{Iov, IovMut};
use crate::sys::thread::{self, IO_STACK};
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the control thread waits for a command. After that it goes on by itself.
const PATIENCE: Duration = Duration::from_secs(10);

/// The most commands that are under way at once: each has a thread.
const MOST: usize = 64;

/// Requests of one command, in bytes (QEMU's BDRV_REQUEST_MAX_BYTES).
const MAX_BYTES: u64 = 2147483136;

/// The commands that are under way.
#[derive(Clone, Default)]
pub struct QemuIo(Arc<UnderWay>);

#[derive(Default)]
struct UnderWay {
    /// All commands, and those of them that are `aio_` requests.
    count: Mutex<(usize, usize)>,
    fewer: Condvar,
}

impl UnderWay {
    fn lock(&self) -> MutexGuard<'_, (usize, usize)> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts a command as long as it lives.
struct Turn {
    under_way: Arc<UnderWay>,
    aio: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut count = self.under_way.lock();
        count.0 -= 1;
        count.1 -= usize::from(self.aio);
        self.under_way.fewer.notify_all();
    }
}

impl QemuIo {
    /// Runs `line` on `handle`. `wait`: also if it is an `aio_` command. Answers what the human
    /// is to be told at once, mostly nothing.
    pub fn run(&self, handle: &Arc<Handle>, line: &str, wait: bool) -> String {
        let words: Vec<String> = line.split(' ').filter(|w| !w.is_empty()).map(String::from).collect();
        let Some(name) = words.first() else { return String::new() };
        let aio = matches!(name.as_str(), "aio_read" | "aio_write");
        let turn = {
            let mut count = self.0.lock();
            if count.0 >= MOST {
                return format!("Error: {MOST} qemu-io commands are under way already\r\n");
            }
            count.0 += 1;
            count.1 += usize::from(aio);
            Turn { under_way: self.0.clone(), aio }
        };
        let (handle, done) = (handle.clone(), mpsc::channel());
        let spawned = thread::spawn("qemu-io", IO_STACK, move || {
            let mut out = String::new();
            command(&handle, &words, &turn.under_way, &mut out);
            // A reader who went away, or a full disk: there is nobody to tell.
            let mut stdout = io::stdout().lock();
            let _ = stdout.write_all(out.as_bytes()).and_then(|()| stdout.flush());
            drop(turn);
            // The control thread may have stopped waiting.
            let _ = done.0.send(());
        });
        if let Err(e) = spawned {
            return format!("Error: no thread for qemu-io: {}\r\n", strerror(&e));
        }
        if aio && !wait {
            return String::new();
        }
        match done.1.recv_timeout(PATIENCE) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => String::new(),
            Err(RecvTimeoutError::Timeout) => {
                "Error: the qemu-io command is not done yet; it goes on\r\n".to_string()
            }
        }
    }
}

/// Runs one command; its text goes to `out`.
fn command(handle: &Handle, words: &[String], under_way: &UnderWay, out: &mut String) {
    let mut args = Args::new(words);
    let done = match args.name() {
        "read" | "r" => read(handle, &mut args, false, out),
        "aio_read" => read(handle, &mut args, true, out),
        "write" | "w" => write(handle, &mut args, false, out),
        "aio_write" => write(handle, &mut args, true, out),
        "discard" | "d" => discard(handle, &mut args, out),
        "flush" | "f" => args.take("", 0..=0).and_then(|_| Ok(handle.submit(Request::Flush, false)?)),
        "aio_flush" => args.take("", 0..=0).and_then(|_| {
            let mut count = under_way.lock();
            while count.1 > 0 {
                count = under_way.fewer.wait(count).unwrap_or_else(PoisonError::into_inner);
            }
            drop(count);
            Ok(handle.flush()?)
        }),
        "length" | "l" => args.take("", 0..=0).map(|_| {
            let _ = writeln!(out, "{}", cvtstr(handle.len() as f64));
        }),
        "sleep" => args.take("", 1..=1).and_then(|given| {
            let bad = || Stop::Says(format!("{} is not a sensible argument", given.plain[0]));
            let ms = given.plain[0].parse().map_err(|_| bad())?;
            std::thread::sleep(Duration::from_millis(ms));
            Ok(())
        }),
        "break" | "remove_break" | "resume" | "wait_break" => breakpoint(handle, &mut args),
        other => Err(Stop::Says(format!("command \"{other}\" not found"))),
    };
    match done {
        Ok(()) => {}
        Err(Stop::Says(text)) => {
            let _ = writeln!(out, "{text}");
        }
        Err(Stop::Failed(e)) => {
            let what = match args.name() {
                "aio_read" => "readv",
                "r" => "read",
                "w" => "write",
                "d" => "discard",
                name => name,
            };
            let _ = writeln!(out, "{what} failed: {}", strerror(&e));
        }
    }
}

/// The node whose breakpoints a user of `node` means: it or the first that its data come from.
fn tested(node: Arc<Node>) -> Option<Arc<Node>> {
    std::iter::successors(Some(node), |n| filename::primary(n)).find(|n| n.is_tested())
}

fn breakpoint(handle: &Handle, args: &mut Args) -> Result<(), Stop> {
    let name = args.name();
    let count = if name == "break" { 2 } else { 1 };
    let given = args.exactly(count)?;
    // The node is used with no ticket in hand: who waits here holds up nobody.
    let node = handle.node().and_then(tested);
    let (first, tag) = (&given[0], &given[count - 1]);
    let ask = |f: &dyn Fn(&dyn Moments) -> io::Result<()>| match node.as_deref().map(|n| n.driver.moments()) {
        Some(Some(moments)) => f(moments),
        _ => Err(io::Error::from_raw_os_error(libc::ENOTSUP)),
    };
    let (done, failed) = match name {
        "break" => (ask(&|m| m.set_break(first, tag)), "Could not set breakpoint".to_string()),
        "remove_break" => (ask(&|m| m.remove_break(tag)), format!("Could not remove breakpoint {tag}")),
        "resume" => (ask(&|m| m.resume(tag)), "Could not resume request".to_string()),
        // Without a blkdebug QEMU waits for ever.
        _ => {
            let wait = |m: &dyn Moments| {
                m.wait_break(tag);
                Ok(())
            };
            (ask(&wait), "Could not wait for a breakpoint".to_string())
        }
    };
    done.map_err(|e| Stop::Says(format!("{failed}: {}", strerror(&e))))
}

/// A buffer of `len` bytes, all `fill`.
fn buffer(len: u64, fill: u8) -> Result<Vec<u8>, Stop> {
    let bytes = usize::try_from(len).unwrap_or(usize::MAX);
    let mut data = Vec::new();
    if data.try_reserve_exact(bytes).is_err() {
        return Err(Stop::Says(format!("no memory for {len} bytes")));
    }
    data.resize(bytes, fill);
    Ok(data)
}

/// The two arguments of most commands: offset and length.
fn range(plain: &[String]) -> Result<(u64, u64), Stop> {
    let (off, len) = (size(&plain[0])?, size(&plain[1])?);
    if len > MAX_BYTES {
        return Err(Stop::Says(format!("length cannot exceed {MAX_BYTES}, given {}", plain[1])));
    }
    Ok((off, len))
}

fn read(handle: &Handle, args: &mut Args, aio: bool, out: &mut String) -> Result<(), Stop> {
    let given = args.take(if aio { "qviP:" } else { "qvP:s:l:" }, 2..=2)?;
    let fill = given.value('P').map(pattern).transpose()?;
    let from = given.value('s').map(size).transpose()?.unwrap_or(0);
    let count = given.value('l').map(size).transpose()?;
    if given.has('i') {
        handle.invalid(Kind::Read);
        return Ok(());
    }
    let (off, len) = range(&given.plain)?;
    if fill.is_none() && (given.has('s') || given.has('l')) {
        return Err(Stop::Says("-s and -l need -P".to_string()));
    }
    let count = count.unwrap_or(len.saturating_sub(from));
    if from.checked_add(count).is_none_or(|end| end > len) {
        return Err(Stop::Says("pattern verification range exceeds end of read data".to_string()));
    }
    let mut data = buffer(len, 0xab)?;
    let start = Instant::now();
    handle.submit(Request::Read(off, &mut IovMut::from_slice(&mut data)), aio)?;
    let time = start.elapsed();
    // Both are within the buffer: checked above.
    let (first, last) = (from as usize, (from + count) as usize);
    if let Some(fill) = fill
        && data[first..last].iter().any(|&b| b != fill)
    {
        let _ = writeln!(out, "Pattern verification failed at offset {}, {count} bytes", off + from);
    }
    if given.has('q') {
        return Ok(());
    }
    if given.has('v') {
        dump(out, off, &data);
    }
    report(out, "read", off, len, time);
    Ok(())
}

fn write(handle: &Handle, args: &mut Args, aio: bool, out: &mut String) -> Result<(), Stop> {
    let given = args.take(if aio { "qifuzP:" } else { "qfnuzP:" }, 2..=2)?;
    let fill = given.value('P').map(pattern).transpose()?;
    let zero = given.has('z');
    for needs in ['n', 'u'] {
        if given.has(needs) && !zero {
            return Err(Stop::Says(format!("-{needs} requires -z to be specified")));
        }
    }
    if zero && fill.is_some() {
        let text = match aio {
            true => "-z and -P cannot be specified at the same time",
            false => "Only one of -z, -P, and -s can be specified at the same time",
        };
        return Err(Stop::Says(text.to_string()));
    }
    if given.has('i') {
        handle.invalid(Kind::Write);
        return Ok(());
    }
    let (off, len) = range(&given.plain)?;
    let mut flags = Flags::NONE;
    for (letter, flag) in [('f', Flags::FUA), ('u', Flags::MAY_UNMAP), ('n', Flags::NO_FALLBACK)] {
        if given.has(letter) {
            flags = flags | flag;
        }
    }
    let data = buffer(if zero { 0 } else { len }, fill.unwrap_or(0xcd))?;
    let start = Instant::now();
    match zero {
        true => handle.submit(Request::Zero(off, len, flags), aio)?,
        false => handle.submit(Request::Write(off, &Iov::from_slice(&data), flags), aio)?,
    }
    if !given.has('q') {
        report(out, "wrote", off, len, start.elapsed());
    }
    Ok(())
}

fn discard(handle: &Handle, args: &mut Args, out: &mut String) -> Result<(), Stop> {
    let given = args.take("q", 2..=2)?;
    let (off, len) = (size(&given.plain[0])?, size(&given.plain[1])?);
    let start = Instant::now();
    handle.submit(Request::Discard(off, len), false)?;
    if !given.has('q') {
        report(out, "discard", off, len, start.elapsed());
    }
    Ok(())
}

#[cfg(test)]
#[path = "qemu_io_test.rs"]
mod tests;
