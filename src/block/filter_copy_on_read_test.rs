use super::*;
use crate::block::driver::Limits;
use crate::block::graph::Graph;
use crate::block::handle::HandleSpec;
use crate::block::node::NodeOptions;
use crate::block::testing::{Mem, Rng};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// An image of 512-byte blocks with a backing file.
struct Cow {
    data: Mutex<(Vec<u8>, Vec<bool>)>,
    backing: Arc<Edge>,
    written: AtomicU64,
}

const BLOCK: usize = 512;

impl Cow {
    fn new(len: usize, backing: Option<Arc<Node>>) -> Cow {
        let data = Mutex::new((vec![0; len], vec![false; len / BLOCK]));
        Cow { data, backing: Edge::new("backing", backing), written: AtomicU64::new(0) }
    }
}

impl Driver for Arc<Cow> {
    fn name(&self) -> &'static str {
        "cow"
    }
    fn len(&self) -> u64 {
        self.data.lock().unwrap().0.len() as u64
    }
    fn limits(&self) -> Limits {
        Limits { request_alignment: 512, ..Limits::default() }
    }
    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.backing.clone()]
    }
    fn wants(&self, _: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        crate::block::perm::for_backing(above)
    }
    fn read(&self, off: u64, to: &mut IovMut) -> io::Result<()> {
        for at in (0..to.len()).step_by(BLOCK) {
            let here = off as usize + at;
            let own = {
                let data = self.data.lock().unwrap();
                data.1[here / BLOCK].then(|| data.0[here..here + BLOCK].to_vec())
            };
            match (own, self.backing.node()) {
                (Some(block), _) => to.copy_from(at, &block),
                (None, Some(below)) => below.read(here as u64, &mut to.slice(at, BLOCK))?,
                (None, None) => to.fill(at, BLOCK, 0),
            }
            std::thread::yield_now();
        }
        Ok(())
    }
    fn write(&self, off: u64, from: &Iov, _: Flags) -> io::Result<()> {
        self.written.fetch_add(from.len() as u64, Ordering::SeqCst);
        let bytes = from.to_vec();
        for (n, block) in bytes.chunks(BLOCK).enumerate() {
            let here = off as usize + n * BLOCK;
            let mut data = self.data.lock().unwrap();
            data.0[here..here + BLOCK].copy_from_slice(block);
            data.1[here / BLOCK] = true;
        }
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn status(&self, off: u64, len: u64) -> io::Result<crate::block::driver::Extent> {
        let data = self.data.lock().unwrap();
        let first = off as usize / BLOCK;
        let own = data.1[first];
        let alike = data.1[first..].iter().take_while(|a| **a == own).count();
        let len = len.min(((first + alike) * BLOCK) as u64 - off);
        let kind = if own { ExtentKind::Data } else { ExtentKind::Unallocated };
        Ok(crate::block::driver::Extent { kind, len, host_offset: None })
    }
}

fn read(node: &Node, off: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    node.read(off, &mut IovMut::from_slice(&mut data)).unwrap();
    data
}

fn filled(len: usize, byte: u8) -> Arc<Node> {
    let mem = Mem::new(len);
    mem.state.data.lock().unwrap().fill(byte);
    Node::new("base", Box::new(mem), NodeOptions::default())
}

fn cor(node: &Arc<Node>, bottom: Option<&Arc<Node>>) -> Arc<Node> {
    let bottom = bottom.map(Arc::downgrade);
    let driver = CopyOnRead::new(Edge::new("file", Some(node.clone())), bottom).unwrap();
    Node::new("cor", Box::new(driver), NodeOptions::default())
}

#[test]
fn what_was_read_once_is_in_the_image() {
    let len = 1 << 20;
    let base = filled(len, 7);
    let cow = Arc::new(Cow::new(len, Some(base)));
    let image = Node::new("image", Box::new(cow.clone()), NodeOptions::default());
    let filter = cor(&image, None);
    image.write(4096, &Iov::from_slice(&[1; 512]), Flags::NONE).unwrap();
    let before = cow.written.load(Ordering::SeqCst);
    assert_eq!(read(&filter, 3000, 3000), {
        let mut want = vec![7; 3000];
        want[4096 - 3000..4608 - 3000].fill(1);
        want
    });
    // Whole granules of 4096, but not what was there.
    assert_eq!(cow.written.load(Ordering::SeqCst) - before, 8192 - 512);
    assert!(cow.data.lock().unwrap().1[..16].iter().all(|a| *a));
    assert_eq!(cow.data.lock().unwrap().1[16..].iter().filter(|a| **a).count(), 0);
    read(&filter, 0, 8192);
    assert_eq!(cow.written.load(Ordering::SeqCst) - before, 8192 - 512, "a second time");
    // The end is not at the end of a granule.
    read(&filter, len as u64 - 1, 1);
    assert!(cow.data.lock().unwrap().1[len / BLOCK - 1]);
}

#[test]
fn below_the_bottom_nothing_is_copied() {
    let len = 1 << 20;
    let base = filled(len, 7);
    let mid = Arc::new(Cow::new(len, Some(base)));
    let mid_node = Node::new("mid", Box::new(mid.clone()), NodeOptions::default());
    let cow = Arc::new(Cow::new(len, Some(mid_node.clone())));
    let image = Node::new("image", Box::new(cow.clone()), NodeOptions::default());
    mid_node.write(8192, &Iov::from_slice(&[2; 512]), Flags::NONE).unwrap();
    assert_eq!(read(&cor(&image, Some(&image)), 8192, 512), vec![2; 512]);
    assert_eq!(cow.written.load(Ordering::SeqCst), 0, "nothing is below the bottom");
    let filter = cor(&image, Some(&mid_node));
    assert_eq!(read(&filter, 0, 4096), vec![7; 4096]);
    assert_eq!(cow.written.load(Ordering::SeqCst), 0, "only the base has it");
    assert_eq!(read(&filter, 8192, 1024), [[2; 512], [7; 512]].concat());
    assert_eq!(cow.written.load(Ordering::SeqCst), 512);
}

#[test]
fn a_copy_never_undoes_a_write() {
    let seed = u64::from(std::process::id());
    eprintln!("seed {seed}");
    let len = 256 << 10;
    let base = filled(len, 0x77);
    let mut graph = Graph::new();
    let cow = Arc::new(Cow::new(len, Some(base)));
    let image = Node::new("image", Box::new(cow), NodeOptions::default());
    let filter = cor(&image, None);
    for n in [&image, &filter] {
        graph.add(n.clone()).unwrap();
        graph.own(n);
    }
    let disk = graph.attach(Some(filter), HandleSpec::default()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let reader = |salt: u64| {
        let (disk, stop) = (disk.clone(), stop.clone());
        std::thread::spawn(move || {
            let mut rng = Rng(seed + salt);
            let mut buffer = vec![0; 16384];
            while !stop.load(Ordering::Relaxed) {
                let n = 1 + rng.below(16384) as usize;
                let off = rng.below((len - n) as u64);
                disk.read(off, &mut IovMut::from_slice(&mut buffer[..n])).unwrap();
            }
        })
    };
    let readers = [reader(1), reader(2)];
    let mut rng = Rng(seed + 3);
    let mut model = vec![0x77u8; len];
    for round in 0..1500u32 {
        let n = 1 + rng.below(3000) as usize;
        let off = rng.below((len - n) as u64) as usize;
        let byte = round as u8;
        disk.write(off as u64, &Iov::from_slice(&vec![byte; n]), Flags::NONE).unwrap();
        model[off..off + n].fill(byte);
        let mut back = vec![0; n];
        disk.read(off as u64, &mut IovMut::from_slice(&mut back)).unwrap();
        assert!(back.iter().all(|&b| b == byte), "round {round}: {off}+{n}");
    }
    stop.store(true, Ordering::Relaxed);
    readers.into_iter().for_each(|t| t.join().unwrap());
    let mut all = vec![0; len];
    disk.read(0, &mut IovMut::from_slice(&mut all)).unwrap();
    assert!(all == model);
}

#[test]
fn the_image_has_to_be_writable() {
    let mut graph = Graph::new();
    let options = NodeOptions { read_only: true, ..NodeOptions::default() };
    let image = Node::new("image", Box::new(Mem::new(4096)), options);
    graph.add(image.clone()).unwrap();
    graph.own(&image);
    let e = graph.add(cor(&image, None)).unwrap_err();
    assert_eq!(e.to_string(), "Block node is read-only");
}
