//! Interrupts: how devices raise them, and the way from there to the guest's local APICs.
//!
//! Owns: the user-space IOAPIC and the VM's descriptor as a way for messages. Never: knows who
//! raises one. Threads: any. Locks: one mutex around the IOAPIC, a leaf; messages are sent after
//! it is released, except that routes are set under it (their order must be that of the writes).

use super::bus::{BusDevice, Effect};
use super::ioapic::{Ioapic, Messages};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1, kvm_msi,
};
use kvm_ioctls::VmFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A message-signalled interrupt: what a device writes where (PCI 3.0, 6.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Msi {
    /// Address, normally 0xfee00000 + destination.
    pub addr: u64,
    /// Data: vector, delivery mode.
    pub data: u32,
}

/// The interrupt controllers: the IOAPIC's pins and the way for messages.
pub trait Interrupts: Send + Sync {
    /// Sets pin `gsi` of the IOAPIC high or low.
    fn set_line(&self, gsi: u32, high: bool);
    /// Sends a message. A message that the guest made up wrongly is dropped.
    fn send_msi(&self, msi: Msi);
}

/// One pin of the IOAPIC, for a device on a line.
#[derive(Clone)]
pub struct Line {
    controllers: Arc<dyn Interrupts>,
    gsi: u32,
}

impl Line {
    /// Pin `gsi`.
    pub fn new(controllers: Arc<dyn Interrupts>, gsi: u32) -> Line {
        Line { controllers, gsi }
    }

    /// Sets the level.
    pub fn set(&self, high: bool) {
        self.controllers.set_line(self.gsi, high);
    }
}

/// The interrupt controllers of a machine; on the memory bus, the IOAPIC's page.
pub struct Controllers {
    /// None without KVM: then there is no processor that a message could reach.
    vm: Option<Arc<VmFd>>,
    ioapic: Mutex<Ioapic>,
}

impl Controllers {
    /// Controllers that send their messages by `vm`.
    pub fn new(vm: Option<Arc<VmFd>>) -> Controllers {
        Controllers { vm, ioapic: Mutex::default() }
    }

    /// KVM reports the end of the level-triggered interrupt `vector`.
    pub fn eoi(&self, vector: u8) {
        let messages = self.ioapic().eoi(vector);
        self.send(messages);
    }

    /// Power-on state.
    pub fn reset(&self) {
        let mut ioapic = self.ioapic();
        ioapic.reset();
        self.update_routes(&mut ioapic);
    }

    fn ioapic(&self) -> MutexGuard<'_, Ioapic> {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, messages: Messages) {
        messages.into_iter().for_each(|m| self.send_msi(m));
    }

    /// KVM looks into the routes of the IOAPIC's pins only to know whose end of interrupt to report.
    /// Nobody has level-triggered pins but guests that ask for them: the call, which may take
    /// milliseconds (an SRCU grace period), is not made before.
    fn update_routes(&self, ioapic: &mut Ioapic) {
        let (true, Some(vm)) = (ioapic.take_routes_changed(), &self.vm) else { return };
        let entries: Vec<_> = ioapic.level_routes().into_iter().map(|(gsi, msi)| route(gsi, msi)).collect();
        let result = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| format!("{e:?}"))
            .and_then(|routes| vm.set_gsi_routing(&routes).map_err(|e| e.to_string()));
        if let Err(e) = result {
            log::warn!("cannot route level-triggered interrupts: {e}");
        }
    }
}

fn route(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: msi.addr as u32,
                address_hi: (msi.addr >> 32) as u32,
                data: msi.data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
            },
        },
        ..Default::default()
    }
}

impl Interrupts for Controllers {
    fn set_line(&self, gsi: u32, high: bool) {
        let message = self.ioapic().set(gsi, high);
        if let Some(m) = message {
            self.send_msi(m);
        }
    }

    fn send_msi(&self, msi: Msi) {
        if let Some(vm) = &self.vm {
            let msi = kvm_msi {
                address_lo: msi.addr as u32,
                address_hi: (msi.addr >> 32) as u32,
                data: msi.data,
                ..Default::default()
            };
            // It fails for messages that no APIC takes: the guest's own affair.
            let _ = vm.signal_msi(msi);
        }
    }
}

impl BusDevice for Controllers {
    fn read(&self, off: u64, data: &mut [u8]) {
        // The registers are 32 bits wide, on 16-byte boundaries; narrower reads see their low end.
        let value = self.ioapic().read(off).to_le_bytes();
        let n = data.len().min(4);
        data[..n].copy_from_slice(&value[..n]);
    }

    fn write(&self, off: u64, data: &[u8]) -> Effect {
        let mut value = [0; 4];
        let n = data.len().min(4);
        value[..n].copy_from_slice(&data[..n]);
        let mut ioapic = self.ioapic();
        let messages = ioapic.write(off, u32::from_le_bytes(value));
        self.update_routes(&mut ioapic);
        drop(ioapic);
        self.send(messages);
        Effect::None
    }
}
