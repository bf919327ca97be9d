//! Raw mode on a terminal, undone on every way out of the process.
//!
//! Owns: the terminal's settings as they were, in a static that signal handlers can reach. The ways
//! out: [`RawMode`] is dropped; exit(3) by anyone; a signal that ends the process (it restores, then
//! takes its usual course). After SIGSTOP and SIGCONT the terminal is raw again. Only SIGKILL cannot
//! be helped. Threads: one enters; any may exit or take a signal. Locks: none (atomics).

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// Signals that end a process, and could leave a terminal raw.
const FATAL: [libc::c_int; 9] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
];

/// Filled once, before `TTY` is set; only read after that.
struct Saved {
    cooked: UnsafeCell<MaybeUninit<libc::termios>>,
    raw: UnsafeCell<MaybeUninit<libc::termios>>,
    actions: UnsafeCell<[MaybeUninit<libc::sigaction>; FATAL.len()]>,
}

// SAFETY: written by the one thread that wins `TAKEN`, before the release store to `TTY` (settings)
// or before the handler is installed that reads its entry (actions); never written again.
unsafe impl Sync for Saved {}

static SAVED: Saved = Saved {
    cooked: UnsafeCell::new(MaybeUninit::uninit()),
    raw: UnsafeCell::new(MaybeUninit::uninit()),
    actions: UnsafeCell::new([MaybeUninit::uninit(); FATAL.len()]),
};
/// Raw mode is taken at most once in a process's life: it has one controlling terminal.
static TAKEN: AtomicBool = AtomicBool::new(false);
/// The terminal to restore, or -1.
static TTY: AtomicI32 = AtomicI32::new(-1);

/// The terminal is raw until this is dropped.
#[derive(Debug)]
pub struct RawMode(());

/// Is `fd` a terminal?
pub fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    std::io::IsTerminal::is_terminal(&fd)
}

impl RawMode {
    /// Makes terminal `fd` raw: every key is a byte, none a signal; what is printed is still
    /// treated as the user has set it. At most once in a process.
    pub fn enter(fd: BorrowedFd<'_>) -> io::Result<RawMode> {
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "the terminal is in use already"));
        }
        let own = fd.try_clone_to_owned()?;
        // SAFETY: tcgetattr fills the whole struct when it returns 0.
        let cooked = unsafe {
            let mut t = MaybeUninit::<libc::termios>::zeroed();
            if libc::tcgetattr(own.as_raw_fd(), t.as_mut_ptr()) != 0 {
                return Err(io::Error::last_os_error());
            }
            t.assume_init()
        };
        let mut raw = cooked;
        raw.c_iflag &= !(libc::IGNBRK
            | libc::BRKINT
            | libc::PARMRK
            | libc::ISTRIP
            | libc::INLCR
            | libc::IGNCR
            | libc::ICRNL
            | libc::IXON);
        raw.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
        raw.c_cflag = (raw.c_cflag & !(libc::CSIZE | libc::PARENB)) | libc::CS8;
        raw.c_cc[libc::VMIN] = 1;
        raw.c_cc[libc::VTIME] = 0;
        // SAFETY: TAKEN makes this the only writer, and TTY is still -1, so there is no reader.
        unsafe {
            (*SAVED.cooked.get()).write(cooked);
            (*SAVED.raw.get()).write(raw);
        }
        install();
        // From here on the terminal is restored, so set first and change then.
        let fd = own.into_raw_fd();
        TTY.store(fd, Ordering::Release);
        if in_foreground(fd) {
            set(fd, &raw)?;
        }
        Ok(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was. Async-signal-safe; harmless when there is nothing to do.
extern "C" fn restore() {
    let fd = TTY.swap(-1, Ordering::AcqRel);
    if fd >= 0 {
        // SAFETY: TTY was set, so `cooked` is filled and will not change.
        let cooked = unsafe { (*SAVED.cooked.get()).assume_init_ref() };
        let _ = set(fd, cooked);
        // SAFETY: the descriptor is ours and was swapped out of TTY by us alone.
        unsafe { libc::close(fd) };
    }
}

/// tcsetattr that does not stop a process in the background.
fn set(fd: libc::c_int, to: &libc::termios) -> io::Result<()> {
    // SAFETY: plain system calls on local, initialised data; all async-signal-safe.
    unsafe {
        let (mut block, mut old) = (MaybeUninit::<libc::sigset_t>::zeroed(), MaybeUninit::zeroed());
        libc::sigemptyset(block.as_mut_ptr());
        libc::sigaddset(block.as_mut_ptr(), libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, block.as_ptr(), old.as_mut_ptr());
        let result = libc::tcsetattr(fd, libc::TCSANOW, to);
        let error = io::Error::last_os_error();
        libc::pthread_sigmask(libc::SIG_SETMASK, old.as_ptr(), std::ptr::null_mut());
        if result == 0 { Ok(()) } else { Err(error) }
    }
}

fn in_foreground(fd: libc::c_int) -> bool {
    // SAFETY: no memory is involved. A terminal that is not our controlling one counts as ours.
    unsafe {
        let group = libc::tcgetpgrp(fd);
        group < 0 || group == libc::getpgrp()
    }
}

fn install() {
    // SAFETY: `restore` is an extern "C" fn without arguments, alive for ever.
    unsafe { libc::atexit(restore) };
    for (n, &signal) in FATAL.iter().enumerate() {
        // SAFETY: sigaction fills `old`; the entry is written before the handler that reads it is
        // installed, and the handler fits SA_SIGINFO.
        unsafe {
            let mut old = MaybeUninit::<libc::sigaction>::zeroed();
            if libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) != 0 {
                continue;
            }
            let old = old.assume_init();
            if old.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            (*SAVED.actions.get())[n].write(old);
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = on_fatal as *const () as usize;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(signal, &new, std::ptr::null_mut());
        }
    }
    // SAFETY: as above.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = on_continue as *const () as usize;
        new.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGCONT, &new, std::ptr::null_mut());
    }
}

extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    let Some(n) = FATAL.iter().position(|&s| s == signal) else { return };
    let fault = matches!(signal, libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGFPE);
    // SAFETY: the entry was written before this handler was installed for `signal`; `info` is the
    // kernel's. All calls are async-signal-safe.
    unsafe {
        let sent = (*info).si_code <= 0;
        let mut next: libc::sigaction = (*SAVED.actions.get())[n].assume_init();
        if fault && sent {
            // Rust's own handler expects the fault to come again, and would go on.
            next.sa_sigaction = libc::SIG_DFL;
        }
        libc::sigaction(signal, &next, std::ptr::null_mut());
        // A fault comes again by itself when we return; what was sent must be sent again.
        if sent || !fault {
            libc::raise(signal);
        }
    }
}

extern "C" fn on_continue(_: libc::c_int) {
    // SAFETY: errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    let fd = TTY.load(Ordering::Acquire);
    if fd >= 0 && in_foreground(fd) {
        // SAFETY: TTY is set, so `raw` is filled and will not change.
        let raw = unsafe { (*SAVED.raw.get()).assume_init_ref() };
        let _ = set(fd, raw);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}
