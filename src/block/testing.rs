//! For tests: a driver on plain memory that checks what it is asked, and a small random source.

use super::driver::{Driver, Extent, ExtentKind, Flags, Limits};
use super::node::errno;
use crate::sys::iov::{Iov, IovMut};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// xorshift64*: small, seeded, good enough to choose test cases.
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }
}

/// A moment of a request at a [`Mem`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    /// Before anything is read.
    Read,
    /// After it was read, before the reader hears of it.
    HasRead,
    /// Before anything changes, by data or zeroes.
    Write,
    /// After it has changed, before the writer hears of it.
    HasWritten,
    /// Before a flush.
    Flush,
    /// Before it is said what is there.
    Status,
}

/// What a test does at such moments, on the requesting thread: the moment, offset, length.
pub type Hook = Arc<dyn Fn(At, u64, u64) + Send + Sync>;

/// The outside of a [`Mem`]: its bytes, and what it counts.
#[derive(Default)]
pub struct MemState {
    /// What the test does in between.
    pub hook: Mutex<Option<Hook>>,
    /// The disk.
    pub data: Mutex<Vec<u8>>,
    /// Flushes seen.
    pub flushes: AtomicUsize,
    /// Zero requests seen.
    pub zeroes: AtomicUsize,
    /// Discards seen.
    pub discards: AtomicUsize,
    /// Blocks of zeroes count as not allocated.
    pub sparse: AtomicBool,
    /// When not 0: every request fails with this errno (after doing half of a write).
    pub fail: AtomicI32,
}

/// A disk in memory.
pub struct Mem {
    /// What the test keeps a hand on.
    pub state: Arc<MemState>,
    /// The limits it insists on.
    pub limits: Limits,
    /// Grows with writes.
    pub grows: bool,
    /// Answers ENOTSUP to zero requests.
    pub no_zero: bool,
}

impl Mem {
    /// `len` zero bytes without special needs.
    pub fn new(len: usize) -> Mem {
        let state = Arc::new(MemState::default());
        *state.data.lock().unwrap() = vec![0; len];
        Mem { state, limits: Limits::default(), grows: false, no_zero: false }
    }

    fn at(&self, at: At, off: u64, len: u64) {
        let hook = self.state.hook.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook(at, off, len);
        }
    }

    fn check(&self, off: u64, len: u64) -> io::Result<()> {
        let align = u64::from(self.limits.request_alignment);
        assert!(len > 0, "empty request");
        assert_eq!((off | len) % align, 0, "misaligned request {off}+{len}");
        match self.state.fail.load(Ordering::SeqCst) {
            0 => Ok(()),
            code => Err(errno(code)),
        }
    }
}

impl Driver for Mem {
    fn name(&self) -> &'static str {
        "mem"
    }
    fn len(&self) -> u64 {
        self.state.data.lock().unwrap().len() as u64
    }
    fn grows(&self) -> bool {
        self.grows
    }
    fn limits(&self) -> Limits {
        self.limits
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.at(At::Read, off, to.len() as u64);
        self.check(off, to.len() as u64)?;
        let limits = self.limits;
        assert!(to.as_source().fits(limits.memory_alignment as usize, limits.request_alignment as usize));
        let data = self.state.data.lock().unwrap();
        let start = off as usize;
        let n = to.len().min(data.len() - start);
        to.copy_from(0, &data[start..start + n]);
        to.fill(n, to.len() - n, 0);
        drop(data);
        self.at(At::HasRead, off, to.len() as u64);
        Ok(())
    }
    fn write(&self, off: u64, from: &Iov, _flags: Flags) -> io::Result<()> {
        let limits = self.limits;
        self.at(At::Write, off, from.len() as u64);
        assert!(from.fits(limits.memory_alignment as usize, limits.request_alignment as usize));
        let failed = self.check(off, from.len() as u64);
        let bytes = from.to_vec();
        let n = if failed.is_err() { bytes.len() / 2 } else { bytes.len() };
        let mut data = self.state.data.lock().unwrap();
        let end = off as usize + n;
        if end > data.len() {
            assert!(self.grows || end - data.len() < self.limits.request_alignment as usize);
            data.resize(end, 0);
        }
        data[off as usize..end].copy_from_slice(&bytes[..n]);
        drop(data);
        self.at(At::HasWritten, off, from.len() as u64);
        failed
    }
    fn zero(&self, off: u64, len: u64, _flags: Flags) -> io::Result<()> {
        self.at(At::Write, off, len);
        self.check(off, len)?;
        if self.no_zero {
            return Err(errno(libc::ENOTSUP));
        }
        self.state.zeroes.fetch_add(1, Ordering::SeqCst);
        let mut data = self.state.data.lock().unwrap();
        let end = (off + len) as usize;
        if end > data.len() {
            data.resize(end, 0);
        }
        data[off as usize..end].fill(0);
        drop(data);
        self.at(At::HasWritten, off, len);
        Ok(())
    }
    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        self.check(off, len)?;
        self.state.discards.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.at(At::Flush, 0, 0);
        self.state.flushes.fetch_add(1, Ordering::SeqCst);
        match self.state.fail.load(Ordering::SeqCst) {
            0 => Ok(()),
            code => Err(errno(code)),
        }
    }
    fn status(&self, off: u64, len: u64) -> io::Result<Extent> {
        self.at(At::Status, off, len);
        self.check(off, len)?;
        if !self.state.sparse.load(Ordering::SeqCst) {
            return Ok(Extent { kind: ExtentKind::Data, len, host_offset: Some(off) });
        }
        let data = self.state.data.lock().unwrap();
        let kind_at = |at: u64| {
            let end = ((at | 4095) + 1).min(off + len);
            let zero = data[at as usize..end as usize].iter().all(|b| *b == 0);
            (if zero { ExtentKind::Unallocated } else { ExtentKind::Data }, end)
        };
        let (kind, mut end) = kind_at(off);
        while end < off + len && kind_at(end).0 == kind {
            end = kind_at(end).1;
        }
        Ok(Extent { kind, len: end - off, host_offset: None })
    }
    fn resize(&self, len: u64) -> io::Result<()> {
        self.state.data.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }
}

/// A directory of its own for each test, gone at the end.
pub struct Scratch(pub std::path::PathBuf);

impl Scratch {
    /// `name` is the test's; the process's number makes it unique.
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("minivmm-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    /// The path of `name` in it.
    pub fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_string()
    }

    /// A file of `len` zero bytes; returns its path.
    pub fn file(&self, name: &str, len: u64) -> String {
        let path = self.path(name);
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        path
    }

    /// Removes what begins like that and this process does not have open: long runs make many files.
    pub fn sweep(&self, prefix: &str) {
        let open: Vec<_> = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|f| std::fs::read_link(f.ok()?.path()).ok())
            .collect();
        for file in std::fs::read_dir(&self.0).unwrap().map(|f| f.unwrap().path()) {
            let name = file.file_name().unwrap().to_str().unwrap();
            if name.starts_with(prefix) && !open.contains(&file) {
                std::fs::remove_file(&file).unwrap();
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The path of one of QEMU's tools, or `None` after saying so; under CI=true it must be there.
pub fn qemu(tool: &str) -> Option<String> {
    let found = std::process::Command::new(tool)
        .arg("--version")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status();
    if found.is_ok() {
        return Some(tool.to_string());
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{tool} is missing");
    eprintln!("skipped: {tool} is missing (apt-get install qemu-utils)");
    None
}

/// No formats, no fd sets; file names are files.
pub struct NoEnv;

impl super::open::Env for NoEnv {
    fn layer(&self, format: &str, file: super::open::Child) -> Option<super::open::Plan> {
        let driver = Box::new(super::raw::RawPlan { file, offset: None, size: None });
        (format == "raw").then(|| super::open::Plan { common: Default::default(), driver })
    }
    fn parse(&self, _: serde_json::Value) -> crate::error::Result<super::open::Plan> {
        crate::bail!("no JSON here")
    }
    fn protocol(&self, driver: &str, filename: &str) -> Option<super::open::Plan> {
        let driver = Box::new(super::file_open::FilePlan::new(
            if driver == "file" { "file" } else { "host_device" },
            filename,
        ));
        Some(super::open::Plan { common: Default::default(), driver })
    }
    fn secret(&self, id: &str) -> crate::error::Result<Vec<u8>> {
        crate::bail!("No secret with id '{id}'")
    }
    fn fdset(&self, path: &str, _: i32) -> crate::error::Result<super::open::PassedFd> {
        crate::bail!("Failed to find fdset {path}")
    }
}
