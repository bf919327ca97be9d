//! Tests that run small hand-assembled guests on the real /dev/kvm.

use super::bus::{BusDevice, Effect};
use super::cpu::Topology;
use super::{BootConfig, Machine, MachineConfig};
use crate::event::{Event, Events};
use crate::sys::inbox::Inbox;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// False, with a message, when there is no usable /dev/kvm; under CI that is a failure.
pub fn have_kvm() -> bool {
    match super::kvm::open() {
        Ok(_) => true,
        Err(e) if std::env::var_os("CI").is_some_and(|v| v == "true") => panic!("{e}"),
        Err(e) => {
            eprintln!("skipped: {e}");
            false
        }
    }
}

/// An ELF file with one segment of `code` at 2 MiB, entered there; `memsz` may exceed the code.
pub fn elf(code: &[u8], memsz: u64) -> Vec<u8> {
    const AT: u64 = 0x20_0000;
    let mut f = b"\x7fELF\x02\x01\x01".to_vec();
    f.resize(16, 0);
    f.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    f.extend(AT.to_le_bytes());
    f.extend(64u64.to_le_bytes());
    f.extend([0; 12]);
    f.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    f.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for word in [0x1000, AT, AT, code.len() as u64, memsz.max(code.len() as u64), 0x1000] {
        f.extend(word.to_le_bytes());
    }
    f.resize(0x1000, 0);
    f.extend(code);
    f
}

/// A port that collects what is written, and reads as a counter.
#[derive(Default)]
pub struct Port {
    pub written: Mutex<Vec<Vec<u8>>>,
    pub reads: AtomicU64,
}

impl BusDevice for Port {
    fn read(&self, _: u64, data: &mut [u8]) {
        let n = self.reads.fetch_add(1, SeqCst).to_le_bytes();
        let len = data.len();
        data.copy_from_slice(&n[..len]);
    }
    fn write(&self, _: u64, data: &[u8]) -> Effect {
        self.written.lock().unwrap().push(data.to_vec());
        Effect::None
    }
}

pub struct Guest {
    pub m: Machine,
    pub events: Events,
    pub port: Arc<Port>,
    pub mmio: Arc<Port>,
}

pub const PORT: u16 = 0x500;
pub const MMIO: u64 = 0xd000_0000;

impl Guest {
    pub fn new(code: &[u8], cpus: u32, memory: u64) -> Guest {
        static N: AtomicU64 = AtomicU64::new(0);
        let name = format!("minivmm-test-{}-{}.elf", std::process::id(), N.fetch_add(1, SeqCst));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, elf(code, 0x10000)).unwrap();
        let events: Events = Arc::new(Inbox::new().unwrap());
        let topology = Topology::new(cpus, None, None, None).unwrap();
        let config = MachineConfig { memory, topology, ..MachineConfig::default() };
        let mut m = Machine::new(&config, events.clone()).unwrap();
        let (port, mmio) = (Arc::new(Port::default()), Arc::new(Port::default()));
        assert!(m.pio.add(u64::from(PORT), 8, port.clone()));
        assert!(m.mmio.add(MMIO, 0x1000, mmio.clone()));
        let loaded = m.load(&BootConfig { kernel: path.clone(), ..BootConfig::default() });
        std::fs::remove_file(&path).unwrap();
        loaded.unwrap();
        Guest { m, events, port, mmio }
    }

    /// The next event, or a failure after ten seconds.
    pub fn event(&self) -> Event {
        let mut fd = libc::pollfd { fd: self.events.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        assert_eq!(unsafe { libc::poll(&mut fd, 1, 10_000) }, 1, "no event; {:x?}", self.port.written);
        let mut got = self.events.take();
        assert_eq!(got.len(), 1, "{got:?}");
        got.pop_front().unwrap()
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.port.written.lock().unwrap().concat()).unwrap()
    }
}

/// mov dx, 0x600; mov al, 0x34; out dx, al: S5; then hlt for ever.
pub const S5: [u8; 10] = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];

pub fn wait_until(what: &str, mut f: impl FnMut() -> bool) {
    let start = Instant::now();
    while !f() {
        assert!(start.elapsed() < Duration::from_secs(10), "timed out: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn a_guest_prints_and_switches_itself_off() {
    if !have_kvm() {
        return;
    }
    // lea rsi,[rip+text]; mov ecx,3; mov dx,0x500; cld; rep outsb
    let mut code = vec![0x48, 0x8d, 0x35];
    let text = b"Hi\n";
    let head: Vec<u8> = [&[0xb9, 3, 0, 0, 0, 0x66, 0xba, 0, 5, 0xfc, 0xf3, 0x6e][..], &S5].concat();
    code.extend((head.len() as u32).to_le_bytes());
    code.extend(&head);
    code.extend(text);
    let mut g = Guest::new(&code, 1, 16 << 20);
    g.m.start().unwrap();
    assert_eq!(g.event(), Event::Shutdown);
    assert_eq!(g.text(), "Hi\n");
    assert_eq!(g.port.written.lock().unwrap().len(), 3, "each element is an access of its own");
    g.m.stop();
}
