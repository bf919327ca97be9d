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

/// A guest program, assembled with the test binary and never run on the host. It is position
/// independent, in 64-bit mode, with the first 4 GiB mapped.
macro_rules! program {
    ($name:ident, $start:literal, $end:literal, $($line:literal,)*) => {
        std::arch::global_asm!(
            ".pushsection .rodata",
            concat!(".global ", $start), concat!($start, ":"),
            $($line,)*
            // Whoever comes here switches off.
            "mov dx, 0x600", "mov al, 0x34", "out dx, al", "77: hlt", "jmp 77b",
            concat!(".global ", $end), concat!($end, ":"),
            ".popsection",
        );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = $start]
                static START: u8;
                #[link_name = $end]
                static END: u8;
            }
            let (start, end) = (&raw const START, &raw const END);
            // SAFETY: both labels are in one section, the bytes between them are never written.
            unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
        }
    };
}

pub(crate) use program;

program!(
    io_program,
    "guest_io_start",
    "guest_io_end",
    "mov dx, 0x500",
    "mov eax, 0x44332211",
    "out dx, al",
    "out dx, ax",
    "out dx, eax",
    "mov rdi, 0x300000",
    "xor eax, eax",
    "in al, dx",
    "stosd",
    "in ax, dx",
    "stosd",
    "in eax, dx",
    "stosd",
    "mov ecx, 3",
    "rep insw",
    "mov rbx, 0xd0000000",
    "mov byte ptr [rbx], 0x11",
    "mov word ptr [rbx + 2], 0x3322",
    "mov dword ptr [rbx + 4], 0x77665544",
    "mov rax, 0x0807060504030201",
    "mov [rbx + 8], rax",
    "mov rdi, 0x300020",
    "movzx eax, byte ptr [rbx]",
    "stosq",
    "movzx eax, word ptr [rbx]",
    "stosq",
    "mov eax, [rbx]",
    "stosq",
    "mov rax, [rbx]",
    "stosq",
    // Across the end of the page, where the device ends too: each byte on its own.
    "mov rax, [rbx + 0xffd]",
    "stosq",
    // Nothing there: a port, memory, and a hole in RAM.
    "mov dx, 0x1234",
    "in eax, dx",
    "stosq",
    "out dx, eax",
    "mov rax, [rbx + 0x100000]",
    "stosq",
    "mov [rbx + 0x100000], rax",
);

#[test]
fn accesses_of_every_width_reach_the_devices() {
    if !have_kvm() {
        return;
    }
    let mut g = Guest::new(io_program(), 1, 16 << 20);
    g.m.start().unwrap();
    assert_eq!(g.event(), Event::Shutdown);
    g.m.pause();
    let written = g.port.written.lock().unwrap().clone();
    assert_eq!(written, [&[0x11][..], &[0x11, 0x22], &[0x11, 0x22, 0x33, 0x44]]);
    let written = g.mmio.written.lock().unwrap().clone();
    assert_eq!(written, [&[0x11][..], &[0x22, 0x33], &[0x44, 0x55, 0x66, 0x77], &[1, 2, 3, 4, 5, 6, 7, 8]]);
    let mut got = [0; 0x58];
    assert!(g.m.mem.read(0x30_0000, &mut got));
    let dword = |at: usize| u32::from_le_bytes(got[at..at + 4].try_into().unwrap());
    let qword = |at: usize| u64::from_le_bytes(got[at..at + 8].try_into().unwrap());
    assert_eq!([0, 4, 8].map(dword), [0, 1, 2]);
    assert_eq!(got[12..18], [3, 0, 4, 0, 5, 0], "rep insw");
    assert_eq!([0x20, 0x28, 0x30, 0x38].map(qword), [0, 1, 2, 3]);
    // The three bytes on the page are a device's, as single bytes; the rest is nobody's.
    assert_eq!(got[0x40..0x48], [4, 5, 6, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(qword(0x48), 0xffff_ffff);
    assert_eq!(qword(0x50), u64::MAX);
}

program!(
    loop_program,
    "guest_loop_start",
    "guest_loop_end",
    // The port counts its reads: a read that is lost or repeated by a pause shows. r8 is the next.
    "mov rdi, 0x300000",
    "xor r8d, r8d",
    "mov dx, 0x500",
    "2: in eax, dx",
    "cmp eax, r8d",
    "jne 3f",
    "inc r8d",
    "mov [rdi], r8",
    "jmp 2b",
    "3: mov dx, 0x504",
    "out dx, eax",
    "hlt",
);

#[test]
fn no_kick_and_no_access_is_lost_in_thousands_of_pauses() {
    if !have_kvm() {
        return;
    }
    let mut g = Guest::new(loop_program(), 2, 16 << 20);
    let count = |g: &Guest| {
        let mut b = [0; 8];
        assert!(g.m.mem.read(0x30_0000, &mut b));
        u64::from_le_bytes(b)
    };
    g.m.start_paused().unwrap();
    assert_eq!(count(&g), 0, "nothing runs before resume");
    // Load: two threads that never sleep, on as many processors as there may be.
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let load: Vec<_> = (0..2)
        .map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                while !stop.load(SeqCst) {
                    std::hint::spin_loop()
                }
            })
        })
        .collect();
    let input = loop_program().iter().position(|b| *b == 0xed).unwrap() as u64;
    let (start, mut rounds, mut moved, mut last, mut finished) = (Instant::now(), 0, 0, 0, 0);
    while rounds < 3000 && start.elapsed() < Duration::from_secs(20) {
        g.m.resume();
        // From none at all to some hundred microseconds: every place in the loop gets hit.
        let (from, spin) = (Instant::now(), Duration::from_micros(rounds % 7 * 60));
        while from.elapsed() < spin {
            std::hint::spin_loop();
        }
        // A pause that comes before the threads have woken stops nothing: some rounds see to it that
        // the guest runs, on a busy machine too.
        while rounds % 4 == 0 && count(&g) == last && from.elapsed() < Duration::from_millis(20) {
            std::thread::yield_now();
        }
        g.m.pause();
        let now = count(&g);
        // Each read is finished before the pause: stored, or in the register, the instruction over.
        let (reads, pc) = (g.port.reads.load(SeqCst), g.m.cpu_states()[0].0 - 0x20_0000);
        let done = reads == now + 1 && pc > input && pc < input + 20;
        assert!(reads == now || done, "{reads} reads, {now} stored, at {pc:#x} ({input:#x} reads)");
        finished += u32::from(done);
        moved += u64::from(now != last);
        last = now;
        rounds += 1;
    }
    stop.store(true, SeqCst);
    load.into_iter().for_each(|t| t.join().unwrap());
    assert!(g.port.written.lock().unwrap().is_empty(), "a read was lost or done twice: {:?}", g.port.written);
    eprintln!("{rounds} rounds in {:?}, the guest moved in {moved}", start.elapsed());
    assert!(rounds >= 500 && moved > rounds / 10);
    assert!(finished > 10, "{finished}: no pause ever met an access");
    // While it runs, its state can be had; the second processor waits for its start.
    g.m.resume();
    let states = g.m.cpu_states();
    assert!((0x20_0000..0x20_1000).contains(&states[0].0) && !states[0].1 && states[1].1, "{states:x?}");
    let before = count(&g);
    wait_until("it runs on after being asked", || count(&g) > before);
    let ids: Vec<_> = g.m.cpus().iter().map(|c| c.thread_id).collect();
    assert!(ids[0] != 0 && ids[1] != 0 && ids[0] != ids[1]);
    g.m.stop();
}

program!(spin_program, "guest_spin_start", "guest_spin_end", "2: jmp 2b",);

/// A guest that never leaves by itself: a kick that comes between the look at the request and
/// KVM_RUN must still end it. Nothing else would.
#[test]
fn a_kick_just_before_the_guest_runs_is_not_lost() {
    if !have_kvm() {
        return;
    }
    let mut g = Guest::new(spin_program(), 1, 16 << 20);
    let (done, wait) = std::sync::mpsc::channel();
    super::vcpu::gap::NANOSECONDS.store(20_000, SeqCst);
    let rounds = std::thread::spawn(move || {
        g.m.start().unwrap();
        let (mut x, start) = (0x1234_5678_9abc_def1u64, Instant::now());
        let mut n = 0;
        while n < 3000 && start.elapsed() < Duration::from_secs(15) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            let (from, spin) = (Instant::now(), Duration::from_nanos(x % 150_000));
            g.m.resume();
            while from.elapsed() < spin {
                std::hint::spin_loop();
            }
            g.m.pause();
            n += 1;
        }
        g.m.stop();
        done.send(n).unwrap();
    });
    let n = wait.recv_timeout(Duration::from_secs(30)).expect("a kick was lost: the guest did not stop");
    super::vcpu::gap::NANOSECONDS.store(0, SeqCst);
    rounds.join().unwrap();
    assert!(n >= 500, "{n} rounds");
}

program!(
    high_program,
    "guest_high_start",
    "guest_high_end",
    // Map 4 GiB … at itself by one large page, and the last 2 MiB of 5 GiB of RAM.
    "mov rdi, 0x310000",
    "mov rax, 0x100000083",
    "mov [rdi], rax",
    "mov rax, 0x13fe00083",
    "mov [rdi + 0xff8], rax",
    "mov rdi, 0xa020",
    "mov qword ptr [rdi], 0x310003",
    "mov dx, 0x500",
    "mov rbx, 0x100000000",
    "mov eax, [rbx]",
    "out dx, eax",
    "mov rbx, 0x13fffffff",
    "mov al, [rbx]",
    "out dx, al",
    "mov byte ptr [rbx], 0x99",
);

#[test]
fn memory_above_4_gib_is_the_guest_s() {
    if !have_kvm() {
        return;
    }
    let mut g = Guest::new(high_program(), 1, 4 << 30);
    assert!(g.m.mem.write(0x1_0000_0000, b"high") && g.m.mem.write(0x1_3fff_ffff, b"!"));
    g.m.start().unwrap();
    assert_eq!(g.event(), Event::Shutdown);
    assert_eq!(g.text(), "high!");
    let mut b = [0];
    assert!(g.m.mem.read(0x1_3fff_ffff, &mut b) && b == [0x99]);
}

#[test]
fn without_a_kernel_the_processors_idle() {
    if !have_kvm() {
        return;
    }
    let events: Events = Arc::new(Inbox::new().unwrap());
    let topology = Topology::new(2, None, None, None).unwrap();
    let config = MachineConfig { memory: 16 << 20, topology, ..MachineConfig::default() };
    let mut m = Machine::new(&config, events.clone()).unwrap();
    m.start().unwrap();
    std::thread::sleep(Duration::from_millis(5));
    assert!(m.cpu_states().iter().all(|s| s.1));
    m.pause();
    m.reset().unwrap();
    m.resume();
    std::thread::sleep(Duration::from_millis(5));
    assert!(m.cpu_states().iter().all(|s| s.1));
    m.stop();
    assert!(events.take().is_empty(), "an idle processor does nothing");
}

#[test]
fn without_kvm_there_is_a_machine_that_never_runs() {
    let events: Events = Arc::new(Inbox::new().unwrap());
    let config = MachineConfig { memory: 16 << 20, accel: super::Accel::None, ..MachineConfig::default() };
    let mut m = Machine::new(&config, events).unwrap();
    m.start().unwrap();
    m.pause();
    m.reset().unwrap();
    m.resume();
    m.power_button();
    m.interrupts.send_msi(super::irq::Msi { addr: 0xfee0_0000, data: 0x40 });
    assert_eq!((m.cpu_states(), m.cpus()[0].thread_id), (vec![(0, true)], 0));
    m.stop();
}

#[test]
fn odd_memory_sizes_are_refused() {
    let events: Events = Arc::new(Inbox::new().unwrap());
    for memory in [0, 4096, (16 << 20) - 4096, (16 << 20) + 1, u64::MAX, 1 << 50] {
        let config = MachineConfig { memory, accel: super::Accel::None, ..MachineConfig::default() };
        let e = Machine::new(&config, events.clone()).err().unwrap();
        assert!(e.desc.starts_with(&format!("memory of {memory} bytes")), "{e}");
    }
}
