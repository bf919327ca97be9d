//! Stored bitmaps together with what else a qcow2 image may have: internal snapshots, an external data file (also one
//! that is a raw image by itself), encryption; and all of them under a disk that grows and shrinks. Both ways with
//! qemu-img.

#[path = "support/qcow2.rs"]
mod support;

use minivmm::block::driver::{Flags, Snapshot};
use minivmm::block::node::{Edge, Node, NodeOptions};
#[cfg(feature = "luks")]
use minivmm::qcow2::crypt::Unlock;
#[cfg(feature = "luks")]
use minivmm::qcow2::header::Crypt;
use minivmm::qcow2::open::{self, Options};
use minivmm::sys::iov::{Iov, IovMut};
use std::path::PathBuf;
use std::sync::Arc;
use support::*;

#[cfg(feature = "luks")]
const PASSWORD: &str = "correct horse";
const SECRET: &str = "secret,id=s,data=correct horse";
const GRANULE: u64 = 4096;

/// What an image has beside bitmaps.
struct Kind {
    /// As `qemu-img create -o` takes it; `DATA` stands for the data file.
    options: &'static str,
    data: Data,
    secret: Secret,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Data {
    Inside,
    Outside,
    Raw,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Secret {
    None,
    #[cfg(feature = "luks")]
    Luks,
    #[cfg(feature = "luks")]
    Aes,
}

fn kinds() -> Vec<Kind> {
    let kind = |options, data, secret| Kind { options, data, secret };
    vec![
        kind("cluster_size=65536", Data::Inside, Secret::None),
        kind("cluster_size=512,refcount_bits=64", Data::Inside, Secret::None),
        kind("extended_l2=on,compression_type=zstd", Data::Inside, Secret::None),
        kind("data_file=DATA,data_file_raw=off", Data::Outside, Secret::None),
        kind("data_file=DATA,data_file_raw=off,cluster_size=512", Data::Outside, Secret::None),
        kind("data_file=DATA,data_file_raw=on", Data::Raw, Secret::None),
        kind("data_file=DATA,data_file_raw=on,extended_l2=on,cluster_size=16k", Data::Raw, Secret::None),
        #[cfg(feature = "luks")]
        kind("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", Data::Inside, Secret::Luks),
        #[cfg(feature = "luks")]
        kind(
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,data_file=DATA,cluster_size=4k",
            Data::Outside,
            Secret::Luks,
        ),
        #[cfg(feature = "luks")]
        kind("encrypt.format=aes,encrypt.key-secret=s,cluster_size=4k", Data::Inside, Secret::Aes),
    ]
}

/// An image and its files, in memory and for QEMU.
struct Image<'a> {
    kind: &'a Kind,
    dir: Dir,
    disk: Arc<Disk>,
    outside: Option<Arc<Disk>>,
}

impl Image<'_> {
    fn path(&self) -> PathBuf {
        self.dir.path("image.qcow2")
    }

    fn data_path(&self) -> PathBuf {
        self.dir.path("data")
    }

    /// Takes what QEMU left.
    fn load(&mut self) {
        let load = |path: PathBuf| Disk::new(std::fs::read(path).unwrap());
        self.disk = load(self.path());
        self.outside = (self.kind.data != Data::Inside).then(|| load(self.data_path()));
    }

    /// Gives QEMU what we left.
    fn save(&self) {
        self.dir.save("image.qcow2", &self.disk);
        if let Some(outside) = &self.outside {
            self.dir.save("data", outside);
        }
    }

    fn open(&self, options: Options) -> Arc<Node> {
        let encrypt = match self.kind.secret {
            Secret::None => None,
            #[cfg(feature = "luks")]
            Secret::Luks => {
                Some(Unlock { method: Crypt::Luks, password: Some(PASSWORD.into()), secret: None })
            }
            #[cfg(feature = "luks")]
            Secret::Aes => Some(Unlock { method: Crypt::Aes, password: Some(PASSWORD.into()), secret: None }),
        };
        let read_only = options.read_only;
        let options = Options { encrypt, ..options };
        let data = self.outside.as_ref().map(|d| edge("data-file", node(d)));
        let image = open::open(edge("file", node(&self.disk)), Edge::new("backing", None), data, options)
            .unwrap_or_else(|e| panic!("{}: {e}", self.kind.options));
        let options = NodeOptions { unmap: true, read_only, ..NodeOptions::default() };
        Node::new("image", Box::new(image), options)
    }

    /// The image as QEMU's tools take it.
    fn opts(&self) -> Vec<String> {
        let key = if self.kind.secret == Secret::None { "" } else { "encrypt.key-secret=s," };
        let opts = format!("driver=qcow2,{key}file.filename={}", self.path().display());
        ["--object", SECRET, "--image-opts", &opts].map(String::from).to_vec()
    }

    fn qemu_img(&self, before: &[&str], after: &[&str]) -> String {
        let opts = self.opts();
        let mut args = before.to_vec();
        args.extend(opts.iter().map(String::as_str));
        args.extend(after);
        qemu("qemu-img", &args)
    }

    /// No error and no leak.
    fn check(&self) {
        self.save();
        let said = self.qemu_img(&["check"], &[]);
        assert!(said.contains("No errors were found"), "{}: {said}", self.kind.options);
    }

    /// What QEMU reads: the disk, or one of its snapshots.
    fn qemu_reads(&self, snapshot: Option<&str>) -> Vec<u8> {
        let to = self.dir.path("read.raw");
        let name = format!("snapshot.name={}", snapshot.unwrap_or_default());
        let mut before = vec!["convert", "-O", "raw"];
        if snapshot.is_some() {
            before.extend(["-l", &name]);
        }
        self.qemu_img(&before, &[to.to_str().unwrap()]);
        std::fs::read(to).unwrap()
    }

    /// QEMU reads as much of a snapshot as the disk has now.
    fn holds_snapshot(&self, name: &str, old: &[u8], say: &str) {
        let got = self.qemu_reads(Some(name));
        let len = got.len().min(old.len());
        assert!(len > 1 << 20 && got[..len] == old[..len], "{say}: QEMU reads another snapshot");
    }

    fn qemu_bitmaps(&self) -> Vec<(String, Vec<String>)> {
        let path = self.path();
        let text = qemu("qemu-img", &["info", "--output=json", path.to_str().unwrap()]);
        let info: serde_json::Value = serde_json::from_str(&text).unwrap();
        let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
        let words = |v: &serde_json::Value| {
            v.as_array().unwrap().iter().map(|f| f.as_str().unwrap().into()).collect()
        };
        list.iter().map(|b| (b["name"].as_str().unwrap().to_string(), words(&b["flags"]))).collect()
    }
}

/// A disk's contents and the granules that were written since the bitmap was made.
struct Model {
    bytes: Vec<u8>,
    dirty: Vec<bool>,
}

impl Model {
    fn new(size: usize) -> Model {
        Model { bytes: vec![0; size], dirty: vec![false; size.div_ceil(GRANULE as usize)] }
    }

    fn change(&mut self, off: u64, data: &[u8]) {
        self.bytes[off as usize..off as usize + data.len()].copy_from_slice(data);
        self.dirty[(off / GRANULE) as usize..(off + data.len() as u64).div_ceil(GRANULE) as usize].fill(true);
    }

    fn resize(&mut self, size: usize) {
        self.bytes.resize(size, 0);
        self.dirty.resize(size.div_ceil(GRANULE as usize), false);
    }

    fn runs(&self) -> Vec<(u64, u64)> {
        let mut out: Vec<(u64, u64)> = Vec::new();
        let size = self.bytes.len() as u64;
        for (i, _) in (0..).zip(&self.dirty).filter(|(_, d)| **d) {
            let (start, end) = (i * GRANULE, ((i + 1) * GRANULE).min(size));
            match out.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ => out.push((start, end)),
            }
        }
        out
    }

    fn hold(&self, node: &Node, say: &str) {
        assert_eq!(node.len(), self.bytes.len() as u64, "{say}");
        let mut now = vec![0xaa; self.bytes.len()];
        node.read(0, &mut IovMut::from_slice(&mut now)).unwrap();
        if let Some(at) = (0..now.len()).find(|i| now[*i] != self.bytes[*i]) {
            panic!("{say}: at {at:#x} is {:#x}, not {:#x}", now[at], self.bytes[at]);
        }
    }
}

/// Random changes, some of them of a length of their own.
fn work(node: &Node, model: &mut Model, rng: &mut Rng, count: u64) {
    for _ in 0..count {
        let size = model.bytes.len() as u64;
        let off = rng.below(size - 1);
        let len = 1 + rng.below((size - off).min(30_000));
        match rng.below(8) {
            0 => {
                node.zero(off, len, Flags::MAY_UNMAP).unwrap();
                model.change(off, &vec![0; len as usize]);
            }
            // Of one that is not aligned only a part is done, and noted.
            1 if off + len >= 2 * GRANULE => {
                let off = off / GRANULE * GRANULE;
                let len = (len + GRANULE).min(size - off) / GRANULE * GRANULE;
                if len == 0 {
                    continue;
                }
                node.discard(off, len).unwrap();
                let mut now = vec![0xaa; len as usize];
                node.read(off, &mut IovMut::from_slice(&mut now)).unwrap();
                let old = &model.bytes[off as usize..(off + len) as usize];
                assert!(
                    now.iter().zip(old).all(|(now, old)| now == old || *now == 0),
                    "a discard of {len} at {off:#x}"
                );
                model.change(off, &now);
            }
            what => {
                let data = vec![1 + rng.below(255) as u8; len as usize];
                let flags = if what == 2 { Flags::COMPRESSED } else { Flags::NONE };
                node.write(off, &Iov::from_slice(&data), flags).unwrap();
                model.change(off, &data);
            }
        }
    }
}

fn round(kind: &Kind, seed: u64) {
    let say = format!("{} SEED={seed}", kind.options);
    let mut rng = Rng::new(seed);
    let size = (3 << 20) + 512;
    let mut image = Image { kind, dir: Dir::new("together"), disk: Disk::new(Vec::new()), outside: None };
    // QEMU makes the image, with a bitmap and something in it.
    let data = image.data_path();
    let options = kind.options.replace("DATA", data.to_str().unwrap());
    let path = image.path();
    let (name, bytes) = (path.to_str().unwrap(), size.to_string());
    qemu("qemu-img", &["create", "-q", "--object", SECRET, "-f", "qcow2", "-o", &options, name, &bytes]);
    image.qemu_img(&["bitmap", "--add", "-g", "4096"], &["all"]);
    let mut model = Model::new(size);
    {
        let opts = image.opts();
        let mut args: Vec<&str> = opts.iter().map(String::as_str).collect();
        args.extend(["-c", "write -P 9 100k 70k"]);
        qemu("qemu-io", &args);
        model.change(100 << 10, &[9; 70 << 10]);
    }
    image.load();
    let node = image.open(Options::default());
    let all = node.find_bitmap("all").expect("all");
    assert_eq!(runs(&all), model.runs(), "{say}: what QEMU marked");
    work(&node, &mut model, &mut rng, 30);
    // Snapshots, where there can be some. The bitmap goes on.
    let snapshots = kind.data == Data::Inside;
    let mut old = Vec::new();
    if snapshots {
        let internal = node.driver.internal().unwrap();
        for name in ["gone", "kept"] {
            internal.create_snapshot(Snapshot { name: name.into(), ..Snapshot::default() }).unwrap();
            old = model.bytes.clone();
            work(&node, &mut model, &mut rng, 20);
        }
        let error = internal.apply_snapshot(None, Some("kept")).unwrap_err();
        assert_eq!(error.to_string(), "Device has active dirty bitmaps", "{say}");
        internal.delete_snapshot(None, Some("gone")).unwrap();
    }
    // Growth far enough for another L1 table with small clusters; and writing where it ends.
    node.resize(5 << 20).unwrap();
    model.resize(5 << 20);
    work(&node, &mut model, &mut rng, 30);
    assert_eq!(runs(&all), model.runs(), "{say}");
    let ours = node.add_bitmap(Some("ours"), 65536).unwrap();
    ours.set_persistent(true);
    ours.mark(1 << 20, 1);
    model.hold(&node, &say);
    // A crash: bitmaps are of no use, everything else is there.
    node.flush().unwrap();
    let crashed = Image {
        kind,
        dir: Dir::new("together"),
        disk: Disk::new(image.disk.copy()),
        outside: image.outside.as_ref().map(|d| Disk::new(d.copy())),
    };
    let after = crashed.open(Options { read_only: true, ..Options::default() });
    assert!(after.find_bitmap("all").unwrap().inconsistent(), "{say}");
    model.hold(&after, &format!("{say}: after a crash"));
    // The names in it lead to the other image's data.
    if kind.data == Data::Inside {
        crashed.save();
        let opts = crashed.opts();
        let mut args = vec!["check"];
        args.extend(opts.iter().map(String::as_str));
        // What was freed last is leaked.
        let (code, said) = tool("qemu-img", &args);
        assert!(code == 0 || code == 3, "{say}: {said}");
        assert_eq!(crashed.qemu_bitmaps(), [("all".to_string(), vec!["in-use".to_string(), "auto".into()])]);
    }
    // Stored, and used by QEMU.
    node.driver.close().unwrap();
    drop(node);
    image.check();
    assert!(image.qemu_reads(None) == model.bytes, "{say}: QEMU reads something else");
    if snapshots {
        image.holds_snapshot("kept", &old, &say);
    }
    if kind.data == Data::Raw {
        assert!(
            image.outside.as_ref().unwrap().copy() == model.bytes,
            "{say}: the data file is no raw image"
        );
    }
    let flags = image.qemu_bitmaps();
    let auto = |name: &str| (name.to_string(), vec!["auto".to_string()]);
    assert_eq!(flags, [auto("all"), auto("ours")], "{say}");
    image.qemu_img(&["bitmap", "--add", "-g", "4096", "--merge", "all", "--disable"], &["copy"]);
    image.qemu_img(&["bitmap", "--remove"], &["ours"]);
    {
        let opts = image.opts();
        let mut args: Vec<&str> = opts.iter().map(String::as_str).collect();
        args.extend(["-c", "write -P 8 4m 5k"]);
        qemu("qemu-io", &args);
    }
    image.load();
    let node = image.open(Options::default());
    assert_eq!(runs(&node.find_bitmap("copy").unwrap()), model.runs(), "{say}: what QEMU merged");
    model.change(4 << 20, &[8; 5 << 10]);
    let all = node.find_bitmap("all").unwrap();
    assert_eq!(runs(&all), model.runs(), "{say}: what QEMU marked then");
    assert!(node.find_bitmap("ours").is_none());
    model.hold(&node, &say);
    // Shorter, and longer again: nothing that was cut off comes back.
    for to in [(1 << 20) + 1024, 4 << 20] {
        node.resize(to).unwrap();
        model.resize(to as usize);
        assert_eq!(runs(&all), model.runs(), "{say}: {to}");
        model.hold(&node, &format!("{say}: {to}"));
        work(&node, &mut model, &mut rng, 10);
    }
    node.driver.close().unwrap();
    drop(node);
    image.check();
    assert!(image.qemu_reads(None) == model.bytes, "{say}: QEMU reads something else at the end");
    if snapshots {
        image.holds_snapshot("kept", &old, &format!("{say}: at the end"));
        image.qemu_img(&["snapshot", "-d", "kept"], &[]);
    }
    image.qemu_img(&["bitmap", "--add", "--merge", "all", "--disable"], &["last"]);
    image.qemu_img(&["bitmap", "--remove"], &["copy"]);
    image.load();
    let node = image.open(Options { read_only: true, ..Options::default() });
    assert_eq!(runs(&node.find_bitmap("all").unwrap()), model.runs(), "{say}: at the end");
    model.hold(&node, &say);
    drop(node);
    image.check();
}

#[test]
fn bitmaps_snapshots_data_files_and_keys_on_one_image() {
    if !have_qemu() {
        return;
    }
    let (seed, _) = seed_and_time(std::time::Duration::ZERO);
    let kinds = kinds();
    std::thread::scope(|s| {
        for half in 0..2 {
            let kinds = &kinds;
            s.spawn(move || kinds.iter().skip(half).step_by(2).for_each(|kind| round(kind, seed)));
        }
    });
}
