use super::*;
use std::sync::Mutex;

struct Reg(Mutex<Vec<(u64, Vec<u8>)>>);

impl BusDevice for Reg {
    fn read(&self, off: u64, data: &mut [u8]) {
        data[0] = off as u8;
    }
    fn write(&self, off: u64, data: &[u8]) -> Effect {
        self.0.lock().unwrap().push((off, data.to_vec()));
        Effect::None
    }
}

#[test]
fn accesses_reach_the_device_below_them_and_nothing_else() {
    let (bus, reg) = (Bus::default(), Arc::new(Reg(Mutex::new(Vec::new()))));
    assert!(bus.add(0x100, 0x10, reg.clone()));
    for (base, len) in [(0x10f, 1), (0xf1, 0x10), (0, 0x1000), (0x104, 2), (u64::MAX, 2), (0x200, 0)] {
        assert!(!bus.add(base, len, reg.clone()), "{base:#x}+{len}");
    }
    assert!(bus.add(0x110, 1, reg.clone()) && bus.add(0xff, 1, reg.clone()));
    let mut b = [0u8; 2];
    bus.read(0x10e, &mut b);
    assert_eq!(b, [0x0e, 0]);
    for nothing in [0x10f, 0xfe, 0x111, u64::MAX] {
        bus.read(nothing, &mut b);
        assert_eq!(b, [0xff, 0xff], "{nothing:#x}");
    }
    let _ = bus.write(0x10f, &[1, 2]);
    let _ = bus.write(0x104, &[1, 2]);
    assert_eq!(*reg.0.lock().unwrap(), [(4, vec![1, 2])]);
    assert!(bus.remove(0x100) && !bus.remove(0x100));
    bus.read(0x104, &mut b);
    assert_eq!(b, [0xff, 0xff]);
}
