//! Interrupts, several processors and resets, by small guests on the real /dev/kvm.

use super::guest_test::{Guest, have_kvm, program, wait_until};
use crate::event::Event;
use std::time::Duration;

program!(
    irq_program,
    "guest_irq_start",
    "guest_irq_end",
    "mov rsp, 0x3f0000",
    // IDT at 0x310000: vectors 0x40 and 0x41.
    "lea rax, [rip + 5f]",
    "mov rdi, 0x310400",
    "call 4f",
    "lea rax, [rip + 6f]",
    "mov rdi, 0x310410",
    "call 4f",
    "sub rsp, 16",
    "mov word ptr [rsp], 0xfff",
    "mov rax, 0x310000",
    "mov [rsp + 2], rax",
    "lidt [rsp]",
    // Local APIC on, task priority 0.
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x80], 0",
    // IOAPIC: pin 5 edge to 0x40, pin 6 level to 0x41.
    "mov rsi, 0xfec00000",
    "mov dword ptr [rsi], 0x1a",
    "mov dword ptr [rsi + 0x10], 0x40",
    "mov dword ptr [rsi], 0x1c",
    "mov dword ptr [rsi + 0x10], 0x8041",
    "mov dx, 0x500",
    "mov al, 'r'",
    "out dx, al",
    "3: sti",
    "hlt",
    "cli",
    "jmp 3b",
    // Writes the gate for the handler in rax.
    "4: mov [rdi], ax",
    "mov dword ptr [rdi + 2], 0x8e000010",
    "shr rax, 16",
    "mov [rdi + 6], ax",
    "shr rax, 16",
    "mov [rdi + 8], eax",
    "ret",
    "5: push rax",
    "push rdx",
    "mov dx, 0x500",
    "mov al, 'e'",
    "out dx, al",
    "jmp 7f",
    "6: push rax",
    "push rdx",
    "mov dx, 0x500",
    "mov al, 'l'",
    "out dx, al",
    "7: mov dword ptr [rbx + 0xb0], 0",
    "pop rdx",
    "pop rax",
    "iretq",
);

#[test]
fn pins_interrupt_the_guest_by_edge_and_by_level() {
    if !have_kvm() {
        return;
    }
    let mut g = Guest::new(irq_program(), 1, 16 << 20);
    g.m.start().unwrap();
    wait_until("the guest is ready", || g.text() == "r");
    let (edge, level) =
        (super::irq::Line::new(g.m.interrupts.clone(), 5), super::irq::Line::new(g.m.interrupts.clone(), 6));
    for n in 1..=100 {
        edge.set(true);
        edge.set(false);
        wait_until("an edge", || g.text().len() == 1 + n);
    }
    assert_eq!(g.text()[1..], "e".repeat(100));
    // A level that stays comes again after each end of interrupt, for which KVM must report it.
    level.set(true);
    wait_until("the level again and again", || g.text().len() > 110);
    level.set(false);
    std::thread::sleep(Duration::from_millis(20));
    let text = g.text();
    assert!(text[101..].bytes().all(|b| b == b'l'), "{text}");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(g.text().len(), text.len(), "a low line is silent");
    level.set(true);
    wait_until("the level once more", || g.text().len() > text.len());
    level.set(false);
    // A message of a device's own.
    let before = g.text().matches('e').count();
    g.m.interrupts.send_msi(super::irq::Msi { addr: 0xfee0_0000, data: 0x40 });
    wait_until("a message", || g.text().matches('e').count() == before + 1);
    // And one that no processor could have asked for.
    g.m.interrupts.send_msi(super::irq::Msi { addr: u64::MAX, data: u32::MAX });
    // It waits in HLT with interrupts on, and can be paused there.
    wait_until("a halt", || g.m.cpu_states()[0].1);
    g.m.stop();
}

program!(
    smp_program,
    "guest_smp_start",
    "guest_smp_end",
    // The other processors' real-mode code goes to 0x10000.
    "lea rsi, [rip + 4f]",
    "mov rdi, 0x10000",
    "mov ecx, 128",
    "cld",
    "rep movsb",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    // INIT, then SIPI, to each by its APIC id.
    "mov ecx, 1",
    "2: mov eax, ecx",
    "shl eax, 24",
    "mov [rbx + 0x310], eax",
    "mov dword ptr [rbx + 0x300], 0x4500",
    "mov [rbx + 0x310], eax",
    "mov dword ptr [rbx + 0x300], 0x4610",
    "inc ecx",
    "cmp ecx, 4",
    "jb 2b",
    // Wait for them: each adds 1 at 0x11000.
    "mov rdi, 0x11000",
    "mov ecx, [rip + 6f]",
    "2: pause",
    "cmp [rdi], ecx",
    "jb 2b",
    "mov dx, 0x500",
    "mov al, 'b'",
    "out dx, al",
    // To x2APIC mode, as the others did: a reset must lead back.
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    // Once more by the ACPI reset register; the second time, by a triple fault; then off.
    "mov rdi, 0x300000",
    "inc dword ptr [rdi]",
    "mov r11, 0x11000",
    "mov dword ptr [r11], 0",
    "cmp dword ptr [rdi], 2",
    "je 3f",
    "ja 9f",
    "mov dx, 0x602",
    "mov al, 1",
    "out dx, al",
    "mov dx, 0x500",
    "mov al, 'X'",
    "out dx, al",
    "3: sub rsp, 16",
    "mov qword ptr [rsp], 0",
    "mov qword ptr [rsp + 8], 0",
    "lidt [rsp]",
    "ud2",
    "mov dx, 0x500",
    "mov al, 'Y'",
    "out dx, al",
    ".code16",
    "4: cli",
    "xor ax, ax",
    "mov ax, 0x1100",
    "mov ds, ax",
    "mov dx, 0x500",
    "mov al, 'a'",
    "out dx, al",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "lock inc dword ptr [0]",
    "5: hlt",
    "jmp 5b",
    ".code64",
    ".balign 4",
    "6: .long 3",
    "9:",
);

#[test]
fn processors_start_by_init_and_sipi_and_again_after_every_reset() {
    if !have_kvm() {
        return;
    }
    let mut g = Guest::new(smp_program(), 4, 16 << 20);
    g.m.start().unwrap();
    for round in 0..2 {
        assert_eq!(g.event(), Event::Reset, "round {round}");
        g.m.pause();
        assert_eq!(g.text(), "aaab", "round {round}");
        g.port.written.lock().unwrap().clear();
        g.m.reset().unwrap();
        assert!(g.m.cpu_states()[1..].iter().all(|s| s.1), "they wait for INIT and SIPI");
        g.m.resume();
    }
    assert_eq!(g.event(), Event::Shutdown);
    assert_eq!(g.text(), "aaab");
    // Off is off: nothing runs on by itself.
    g.m.resume();
    std::thread::sleep(Duration::from_millis(10));
    g.m.stop();
    assert_eq!(g.text(), "aaab");
}

program!(
    bios_program,
    "guest_bios_start",
    "guest_bios_end",
    // The other processor starts in real mode at 0xff000, and jumps from there to f000:fff0.
    "mov rdi, 0xff000",
    "mov eax, 0x00fff0ea",
    "mov [rdi], eax",
    "mov byte ptr [rdi + 4], 0xf0",
    "mov rbx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov dword ptr [rbx + 0x300], 0xc4500",
    "mov dword ptr [rbx + 0x300], 0xc46ff",
    "2: hlt",
    "jmp 2b",
);

/// Stock Linux reboots a hardware-reduced machine by a jump to the BIOS.
#[test]
fn a_jump_to_the_bios_resets_the_machine() {
    if !have_kvm() {
        return;
    }
    let mut g = Guest::new(bios_program(), 2, 16 << 20);
    g.m.start().unwrap();
    assert_eq!(g.event(), Event::Reset);
    g.m.stop();
}

program!(
    nowhere_program,
    "guest_nowhere_start",
    "guest_nowhere_end",
    "mov dx, 0x520",
    "in al, dx",
    "mov rax, 0xd8000000",
    "jmp rax",
);

struct Broken;

impl super::bus::BusDevice for Broken {
    fn read(&self, _: u64, _: &mut [u8]) {
        panic!("on purpose");
    }
    fn write(&self, _: u64, _: &[u8]) -> super::bus::Effect {
        super::bus::Effect::None
    }
}

#[test]
fn a_processor_that_cannot_go_on_says_why_and_runs_again_after_a_reset() {
    if !have_kvm() {
        return;
    }
    let mut g = Guest::new(nowhere_program(), 1, 16 << 20);
    assert!(g.m.pio.add(0x520, 1, std::sync::Arc::new(Broken)));
    g.m.start().unwrap();
    let failed = |e| match e {
        Event::VcpuFailed { cpu: 0, why } => why,
        e => panic!("{e:?}"),
    };
    assert_eq!(failed(g.event()), "a device's register code panicked");
    // Running on changes nothing; it needs a reset.
    g.m.resume();
    g.m.pause();
    assert!(g.m.pio.remove(0x520));
    g.m.reset().unwrap();
    g.m.resume();
    // There is no memory where it jumps to.
    let why = failed(g.event());
    assert!(why.contains("KVM cannot emulate") || why.starts_with("KVM reports"), "{why}");
    g.m.stop();
}
