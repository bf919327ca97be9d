//! What the qcow2 tests share: a disk in memory, a random source, qemu-img, opening images.

#![allow(dead_code)]

use minivmm::block::bitmap::Bitmap;
use minivmm::block::driver::{Driver, Flags};
use minivmm::block::node::{Edge, Node, NodeOptions};
use minivmm::qcow2::open::Options;
use minivmm::qcow2::{Qcow2, create, open};
use minivmm::sys::iov::{Iov, IovMut};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// xorshift64*.
pub struct Rng(pub u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// The largest disk, unless [`Disk::most`] says otherwise.
const MOST: u64 = 1 << 30;

/// What was done to a disk, in order.
#[derive(Clone, Debug)]
pub enum Op {
    Write(u64, Vec<u8>),
    Resize(u64),
    Sync,
}

/// A file in memory; keeps a log of changes if asked to.
#[derive(Default)]
pub struct Disk {
    pub bytes: Mutex<Vec<u8>>,
    pub log: Mutex<Option<Vec<Op>>>,
    pub syncs: AtomicU64,
    pub writes: AtomicU64,
    /// The n-th change from now fails with EIO, and all after it (0: none does).
    pub fail_after: AtomicU64,
    /// Only that one fails.
    pub fail_once: AtomicBool,
    /// Requests take a random time, so that threads meet everywhere (microseconds at most).
    pub jitter: AtomicU64,
    /// While true, writes that begin with [`HELD`] wait (and say so in `held`) before anything of
    /// them is on the disk, and those that begin with [`PANIC`] panic.
    pub hold: AtomicBool,
    pub held: AtomicBool,
    /// While true, discards wait (and say so in `held`) before anything of them is done.
    pub hold_discard: AtomicBool,
    /// How many bytes it can hold; 0: [`MOST`].
    pub most: AtomicU64,
}

/// The first byte of a write that [`Disk::hold`] holds up.
pub const HELD: u8 = 0x77;
/// The first byte of a write that panics.
pub const PANIC: u8 = 0x78;

impl Disk {
    pub fn new(bytes: Vec<u8>) -> Arc<Disk> {
        Arc::new(Disk { bytes: Mutex::new(bytes), ..Disk::default() })
    }

    /// What it holds now.
    pub fn copy(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn fits(&self, len: u64) -> io::Result<()> {
        let most = match self.most.load(Ordering::Relaxed) {
            0 => MOST,
            n => n,
        };
        if len > most { Err(io::Error::from_raw_os_error(libc::EFBIG)) } else { Ok(()) }
    }

    /// Waits until a request is held up.
    pub fn wait_held(&self) {
        let until = Instant::now() + Duration::from_secs(30);
        while !self.held.load(Ordering::SeqCst) {
            assert!(Instant::now() < until, "nothing is held up");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn linger(&self) {
        let most = self.jitter.load(Ordering::Relaxed);
        if most > 0 {
            let n = self.writes.fetch_add(1, Ordering::Relaxed);
            let mixed = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            // Now and then one that much happens during.
            let long = if mixed.is_multiple_of(61) { 60 } else { 1 };
            std::thread::sleep(Duration::from_micros(mixed % most * long));
        }
    }

    fn note(&self, op: impl FnOnce() -> Op) -> io::Result<()> {
        match self.fail_after.load(Ordering::SeqCst) {
            0 => {}
            1 => {
                if self.fail_once.swap(false, Ordering::SeqCst) {
                    self.fail_after.store(0, Ordering::SeqCst);
                }
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            _ => {
                self.fail_after.fetch_sub(1, Ordering::SeqCst);
            }
        }
        if let Some(log) = &mut *self.log.lock().unwrap() {
            log.push(op());
        }
        Ok(())
    }
}

/// The disk as a driver. A handle: the test keeps another.
pub struct OnDisk(pub Arc<Disk>);

impl Driver for OnDisk {
    fn name(&self) -> &'static str {
        "mem"
    }
    fn len(&self) -> u64 {
        self.0.bytes.lock().unwrap().len() as u64
    }
    fn grows(&self) -> bool {
        true
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        self.0.linger();
        let bytes = self.0.bytes.lock().unwrap();
        let n = to.len().min(bytes.len() - off as usize);
        to.copy_from(0, &bytes[off as usize..off as usize + n]);
        to.fill(n, to.len() - n, 0);
        Ok(())
    }
    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        let data = from.to_vec();
        while data.first() == Some(&HELD) && self.0.hold.load(Ordering::SeqCst) {
            self.0.held.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(!self.0.hold.load(Ordering::SeqCst) || data.first() != Some(&PANIC), "as the test wants it");
        self.0.linger();
        self.0.writes.fetch_add(1, Ordering::Relaxed);
        // The lock on the bytes orders the log, too.
        let mut bytes = self.0.bytes.lock().unwrap();
        self.0.fits(off + data.len() as u64)?;
        self.0.note(|| Op::Write(off, data.clone()))?;
        let end = off as usize + data.len();
        if end > bytes.len() {
            bytes.resize(end, 0);
        }
        bytes[off as usize..end].copy_from_slice(&data);
        Ok(())
    }
    fn zero(&self, off: u64, len: u64, _: Flags) -> io::Result<()> {
        let zeroes = vec![0; len as usize];
        self.write(off, &Iov::from_slice(&zeroes), Flags::NONE)
    }
    fn discard(&self, off: u64, len: u64) -> io::Result<()> {
        while self.0.hold_discard.load(Ordering::SeqCst) {
            self.0.held.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(1));
        }
        // Whoever reads what was discarded is to notice.
        let junk = vec![0xdd; len as usize];
        self.write(off, &Iov::from_slice(&junk), Flags::NONE)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.linger();
        let _bytes = self.0.bytes.lock().unwrap();
        self.0.syncs.fetch_add(1, Ordering::Relaxed);
        self.0.note(|| Op::Sync)
    }
    fn resize(&self, len: u64) -> io::Result<()> {
        let mut bytes = self.0.bytes.lock().unwrap();
        self.0.fits(len)?;
        self.0.note(|| Op::Resize(len))?;
        bytes.resize(len as usize, 0);
        Ok(())
    }
}

pub fn node(disk: &Arc<Disk>) -> Arc<Node> {
    let options = NodeOptions { unmap: true, ..NodeOptions::default() };
    Node::new("file", Box::new(OnDisk(disk.clone())), options)
}

pub fn edge(role: &str, node: Arc<Node>) -> Arc<Edge> {
    Edge::new(role, Some(node))
}

/// A new image with these options.
pub fn fresh(options: &create::CreateOptions) -> Arc<Disk> {
    let disk = Disk::new(Vec::new());
    create::create(&node(&disk), None, options).expect("create");
    disk
}

/// The same with an external data file, if the options name one.
pub fn fresh_pair(options: &create::CreateOptions) -> (Arc<Disk>, Option<Arc<Disk>>) {
    let disk = Disk::new(Vec::new());
    let outside = options.data_file.as_ref().map(|_| Disk::new(Vec::new()));
    create::create(&node(&disk), outside.as_ref().map(node).as_ref(), options).expect("create");
    (disk, outside)
}

/// A sector that names its writer and itself; writer 0 writes zeroes.
pub fn contents(id: u32, sector: u64) -> [u8; 512] {
    let mut out = [0; 512];
    if id != 0 {
        for piece in out.chunks_exact_mut(8) {
            piece[..4].copy_from_slice(&id.to_be_bytes());
            piece[4..].copy_from_slice(&(sector as u32).to_be_bytes());
        }
    }
    out
}

/// Contents that nobody wrote there.
pub const STRANGE: u32 = 0xffff_ffff;

/// Whose contents these are; [`STRANGE`] if they are not that sector's.
pub fn id_of(bytes: &[u8], sector: u64) -> u32 {
    let id = u32::from_be_bytes(bytes[..4].try_into().unwrap());
    let whose = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
    // Each piece of 8 bytes is like the one before it.
    let uniform = bytes[..504] == bytes[8..];
    let fits = if id == 0 { whose == 0 } else { u64::from(whose) == sector };
    if uniform && fits { id } else { STRANGE }
}

/// True when `test` panics, quietly.
pub fn fails(test: impl FnOnce() + std::panic::UnwindSafe) -> bool {
    std::panic::catch_unwind(test).is_err()
}

/// Opens the image on `disk`; with a backing node if one is given.
pub fn open_image(disk: &Arc<Disk>, backing: Option<Arc<Node>>, options: Options) -> io::Result<Qcow2> {
    open::open(edge("file", node(disk)), Edge::new("backing", backing), None, options)
}

/// The same with an external data file, if there is one.
pub fn open_pair(
    disk: &Arc<Disk>,
    outside: &Option<Arc<Disk>>,
    backing: Option<Arc<Node>>,
    options: Options,
) -> io::Result<Qcow2> {
    let outside = outside.as_ref().map(|d| edge("data-file", node(d)));
    open::open(edge("file", node(disk)), Edge::new("backing", backing), outside, options)
}

pub fn read(image: &dyn Driver, off: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buf = vec![0xaa; len];
    image.read(off, &mut IovMut::from_slice(&mut buf))?;
    Ok(buf)
}

pub fn write(image: &dyn Driver, off: u64, data: &[u8]) -> io::Result<()> {
    image.write(off, &Iov::from_slice(data), Flags::NONE)
}

/// A directory of this test's own, removed at the end.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new(name: &str) -> Dir {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("minivmm-{name}-{}-{n}", std::process::id()));
        std::fs::create_dir_all(&path).expect("temporary directory");
        Dir(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn save(&self, name: &str, disk: &Disk) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, &*disk.bytes.lock().unwrap()).expect("write image");
        path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// True when qemu-img is here; else says so (and fails under CI=true).
pub fn have_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok_and(|o| o.status.success());
    if !found {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "qemu-img is missing: apt-get install qemu-utils"
        );
        eprintln!("skipped: qemu-img is missing (apt-get install qemu-utils)");
    }
    found
}

/// Runs a QEMU tool; answers its exit code and all it said.
pub fn tool(program: &str, args: &[&str]) -> (i32, String) {
    let out = Command::new(program).args(args).output().expect(program);
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text)
}

/// Runs a QEMU tool that must succeed.
pub fn qemu(program: &str, args: &[&str]) -> String {
    let (code, text) = tool(program, args);
    assert_eq!(code, 0, "{program} {args:?}: {text}");
    text
}

/// `qemu-img check`: no error; leaks only if allowed.
pub fn qemu_check(path: &Path, leaks: bool) {
    let (code, text) = tool("qemu-img", &["check", "-f", "qcow2", path.to_str().unwrap()]);
    assert!(code == 0 || (leaks && code == 3), "qemu-img check of {path:?}: {code}: {text}");
}

/// What qemu-img reads from the image.
pub fn qemu_read(dir: &Dir, path: &Path) -> Vec<u8> {
    let raw = dir.path("qemu-read.raw");
    qemu("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()]);
    std::fs::read(raw).expect("converted image")
}

/// The dirty parts of a bitmap.
pub fn runs(b: &Bitmap) -> Vec<(u64, u64)> {
    let (mut out, mut at) = (Vec::new(), 0);
    while let Some(run) = b.next_dirty(at, u64::MAX, u64::MAX) {
        at = run.end;
        out.push((run.start, run.end));
    }
    out
}

/// The seed of this run, and how long it may take: `SEED` and `SOAK` (seconds) in the environment.
pub fn seed_and_time(short: Duration) -> (u64, Instant) {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let seed = number("SEED").unwrap_or(clock.as_nanos() as u64 & 0xffff_ffff);
    let time = number("SOAK").map_or(short, Duration::from_secs);
    eprintln!("SEED={seed}");
    (seed, Instant::now() + time)
}
