use super::*;

#[derive(Default)]
struct Sent(Mutex<Vec<Msi>>);

impl Interrupts for Sent {
    fn set_line(&self, _: u32, _: bool) {}
    fn send_msi(&self, msi: Msi) {
        self.0.lock().unwrap().push(msi);
    }
}

impl Sent {
    fn take(&self) -> Vec<u32> {
        std::mem::take(&mut *self.0.lock().unwrap()).into_iter().map(|m| m.data).collect()
    }
}

const PLACE: Place = Place { bar: 0, table: 0x800, pba: 0x400 };

/// Vector n sends 100 + n, all open.
fn msix(vectors: u16) -> (Arc<Sent>, Msix) {
    let sent = Arc::new(Sent::default());
    let msix = Msix::new(sent.clone(), vectors, PLACE);
    for n in 0..u64::from(vectors) {
        msix.write(0x800 + 16 * n, &0xfee0_0000u64.to_le_bytes());
        msix.write(0x808 + 16 * n, &(100 + n).to_le_bytes());
    }
    msix.set_control(0x8000);
    (sent, msix)
}

fn pending(msix: &Msix) -> u64 {
    let mut b = [0; 8];
    assert!(msix.read(0x400, &mut b));
    u64::from_le_bytes(b)
}

#[test]
fn it_is_silent_until_it_is_on_and_unmasked() {
    let sent = Arc::new(Sent::default());
    let msix = Msix::new(sent.clone(), 3, PLACE);
    msix.fire(1);
    assert_eq!(pending(&msix), 0, "off, nothing is even pending");
    msix.set_control(0x8000);
    msix.fire(1);
    assert_eq!((sent.take(), pending(&msix)), (vec![], 2), "each vector begins masked");
    msix.write(0x818, &7u32.to_le_bytes());
    msix.write(0x81c, &0u32.to_le_bytes());
    assert_eq!((sent.take(), pending(&msix)), (vec![7], 0), "what was pending comes when unmasked");
    msix.fire(3);
    msix.fire(NO_SUCH);
    assert!(sent.take().is_empty());
}

const NO_SUCH: u16 = 0xffff;

#[test]
fn masks_hold_messages_back_and_send_each_once() {
    let (sent, msix) = msix(4);
    msix.fire(2);
    assert_eq!(sent.take(), [102]);
    msix.set_control(0xc000);
    (0..3).for_each(|_| msix.fire(2));
    msix.fire(0);
    assert_eq!((sent.take(), pending(&msix)), (vec![], 0b101));
    msix.write(0x80c, &1u32.to_le_bytes());
    msix.set_control(0x8000);
    assert_eq!((sent.take(), pending(&msix)), (vec![102], 1), "vector 0 is masked by itself");
    msix.forget(0);
    msix.write(0x80c, &0u32.to_le_bytes());
    assert!(sent.take().is_empty());
    msix.reset();
    msix.fire(1);
    assert_eq!((sent.take(), msix.is_enabled()), (vec![], false));
}

#[test]
fn the_capability_says_where_everything_is() {
    let (_, msix) = msix(5);
    let cap = msix.capability();
    assert_eq!((cap.id, cap.body), (0x11, vec![4, 0, 0, 8, 0, 0, 0, 4, 0, 0]));
    assert_eq!(cap.mask, [0, 0xc0]);
}

#[test]
fn only_whole_aligned_words_are_written() {
    let (_, msix) = msix(2);
    let entry = |n: u64| {
        let mut b = [0; 16];
        assert!(msix.read(0x800 + 16 * n, &mut b));
        b
    };
    let before = (entry(0), entry(1));
    for (off, len) in [(0x800, 1), (0x800, 2), (0x801, 4), (0x804, 8), (0x80a, 4)] {
        msix.write(off, &[0xff; 8][..len]);
    }
    msix.write(0x400, &[0xff; 8]);
    msix.write(0x820, &[0xff; 8]);
    msix.write(0x7fc, &[0xff; 4]);
    msix.write(u64::MAX - 7, &[0xff; 8]);
    assert_eq!(((entry(0), entry(1)), pending(&msix)), (before, 0));
    msix.write(0x800, &[0xff; 8]);
    msix.write(0x80c, &[0xff; 4]);
    assert_eq!(entry(0)[..8], [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(entry(0)[12..], [1, 0, 0, 0]);
    let mut b = [0; 8];
    assert!(!msix.read(0x820, &mut b) && !msix.read(0x7ff, &mut b) && !msix.read(0x408, &mut b));
    assert!(msix.read(0x803, &mut b[..1]), "a byte can be read");
}

#[test]
fn a_masked_vector_is_silent_when_the_write_has_returned() {
    let (sent, msix) = msix(1);
    let msix = Arc::new(msix);
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (m, s) = (msix.clone(), stop.clone());
    let firing = std::thread::spawn(move || {
        while !s.load(Ordering::SeqCst) {
            m.fire(0);
        }
    });
    for _ in 0..2000 {
        msix.write(0x80c, &1u32.to_le_bytes());
        let before = sent.0.lock().unwrap().len();
        std::thread::yield_now();
        assert_eq!(sent.0.lock().unwrap().len(), before, "a message after the mask");
        msix.write(0x80c, &0u32.to_le_bytes());
    }
    stop.store(true, Ordering::SeqCst);
    firing.join().unwrap();
}
