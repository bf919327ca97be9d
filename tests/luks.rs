//! Encrypted qcow2 images and secrets: against qemu-img and qemu-io, both ways, against a model, and
//! against hostile headers.
//!
//! `SEED=n` repeats a random run, `SOAK=seconds` makes it long.

#[path = "support/qcow2.rs"]
mod support;

use minivmm::block::driver::{Flags, Snapshot};
use minivmm::block::node::{Edge, Node, NodeOptions};
use minivmm::control::vm::{Settings, Vm};
use minivmm::qcow2::create::{CreateOptions, Preallocation};
use minivmm::qcow2::crypt::{CreateEncrypt, Hash, IvGen, Mode, Unlock};
use minivmm::qcow2::header::Crypt;
use minivmm::qcow2::open::{self, Options};
use minivmm::qmp::fds::Conn;
use minivmm::qmp::schema::{self, Cx};
use minivmm::sys::iov::{Iov, IovMut};
use serde_json::{Value, json};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::*;

const PASSWORD: &str = "correct horse";
const SECRET: &str = "secret,id=s,data=correct horse";

fn luks() -> CreateEncrypt {
    CreateEncrypt { iter_time: 0, ..CreateEncrypt::new(Crypt::Luks, PASSWORD.into()) }
}

fn aes() -> CreateEncrypt {
    CreateEncrypt::new(Crypt::Aes, PASSWORD.into())
}

fn unlock(e: &CreateEncrypt) -> Option<Unlock> {
    Some(Unlock { method: e.method, password: Some(e.password.clone()), secret: None })
}

/// Every kind of encryption that there is.
fn kinds() -> Vec<CreateEncrypt> {
    let mut all = vec![aes(), luks()];
    for (key_bits, mode, iv) in [
        (128, Mode::Xts, IvGen::Plain64),
        (192, Mode::Xts, IvGen::Plain64),
        (128, Mode::Cbc, IvGen::Plain),
        (256, Mode::Cbc, IvGen::Plain64),
        (128, Mode::Cbc, IvGen::Essiv),
        (256, Mode::Cbc, IvGen::Essiv),
        (256, Mode::Xts, IvGen::Essiv),
        (256, Mode::Xts, IvGen::Plain),
    ] {
        all.push(CreateEncrypt { key_bits, mode, iv, ..luks() });
    }
    for hash in [Hash::Sha1, Hash::Sha224, Hash::Sha384, Hash::Sha512] {
        all.push(CreateEncrypt { hash, ..luks() });
    }
    all.push(CreateEncrypt { iv_hash: Some(Hash::Sha1), ..luks() });
    all
}

/// The same as `qemu-img create -o` takes it.
fn words(e: &CreateEncrypt) -> String {
    if e.method == Crypt::Aes {
        return "encrypt.format=aes,encrypt.key-secret=s".into();
    }
    let hash = e.iv_hash.map_or(String::new(), |h| format!(",encrypt.ivgen-hash-alg={}", h.word()));
    format!(
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=0,encrypt.cipher-alg=aes-{},\
         encrypt.cipher-mode={},encrypt.ivgen-alg={},encrypt.hash-alg={}{hash}",
        e.key_bits,
        e.mode.word(),
        e.iv.word(),
        e.hash.word()
    )
}

/// The image as QEMU's tools take it with `--image-opts`.
fn with_key(path: &std::path::Path) -> String {
    let path = path.to_str().unwrap();
    format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}")
}

fn qemu_reads(dir: &Dir, path: &std::path::Path) -> Vec<u8> {
    let raw = dir.path("read.raw");
    let to = raw.to_str().unwrap();
    qemu("qemu-img", &["convert", "--object", SECRET, "--image-opts", &with_key(path), "-O", "raw", to]);
    std::fs::read(raw).unwrap()
}

fn qemu_checks(path: &std::path::Path) {
    let (code, text) = tool("qemu-img", &["check", "--object", SECRET, "--image-opts", &with_key(path)]);
    assert!(code == 0 || code == 3, "qemu-img check: {code}: {text}");
}

/// The image through a node, which sees to alignment.
fn node_of(disk: &Arc<Disk>, e: &CreateEncrypt, below: Option<Arc<Node>>) -> io::Result<Arc<Node>> {
    let options = Options { encrypt: unlock(e), ..Options::default() };
    let image = open_image(disk, below, options)?;
    let options = NodeOptions { unmap: true, ..NodeOptions::default() };
    Ok(Node::new("image", Box::new(image), options))
}

fn whole(node: &Node) -> Vec<u8> {
    let mut bytes = vec![0xaa; node.len() as usize];
    node.read(0, &mut IovMut::from_slice(&mut bytes)).unwrap();
    bytes
}

fn put(node: &Node, off: u64, data: &[u8]) {
    let before = data.to_vec();
    node.write(off, &Iov::from_slice(data), Flags::NONE).unwrap();
    assert_eq!(before, data, "the guest's memory keeps what it had");
}

/// True if what was written at `off` is on the disk as it is. Sectors lie there whole, wherever that is.
fn in_plain_text(disk: &Disk, off: u64, data: &[u8]) -> bool {
    let bytes = disk.bytes.lock().unwrap();
    let skip = (off % 512) as usize;
    let len = data.len().min(512 - skip);
    len >= 8 && bytes.chunks_exact(512).any(|sector| sector[skip..skip + len] == data[..len])
}

/// What the tests write: no two pieces of it alike.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| rng.draw() as u8).collect()
}

#[test]
fn images_of_qemu_img_are_read_and_written() {
    if !have_qemu() {
        return;
    }
    let dir = Dir::new("luks-theirs");
    // A few: to make one takes qemu-img more than two seconds, whatever iter-time is.
    let some = [
        aes(),
        luks(),
        CreateEncrypt { mode: Mode::Cbc, iv: IvGen::Essiv, hash: Hash::Sha1, ..luks() },
        CreateEncrypt { key_bits: 192, iv: IvGen::Plain, hash: Hash::Sha512, ..luks() },
    ];
    for (n, e) in some.into_iter().enumerate() {
        let path = dir.path("a.qcow2");
        let file = path.to_str().unwrap();
        let cluster = ["cluster_size=65536", "cluster_size=4096,compat=0.10", "extended_l2=on"][n % 3];
        let options = format!("{},{cluster}", words(&e));
        qemu("qemu-img", &["create", "-q", "--object", SECRET, "-f", "qcow2", "-o", &options, file, "3M"]);
        qemu(
            "qemu-io",
            &["--object", SECRET, "--image-opts", &with_key(&path), "-c", "write -P 65 100k 300k"],
        );
        let mut model = vec![0; 3 << 20];
        model[100 << 10..400 << 10].fill(65);
        let disk = Disk::new(std::fs::read(&path).unwrap());
        let image = node_of(&disk, &e, None).unwrap_or_else(|error| panic!("{options}: {error}"));
        assert!(whole(&image) == model, "{options}");
        // In place, over an edge, and where nothing was.
        for (off, len) in [(101 << 10, 512), (390 << 10, 70_000), (2_000_001, 100)] {
            let data = noise(off, len);
            put(&image, off, &data);
            model[off as usize..off as usize + len].copy_from_slice(&data);
            assert!(!in_plain_text(&disk, off, &data), "{options}: nothing goes to the disk in plain text");
        }
        assert!(whole(&image) == model, "{options}");
        image.flush().unwrap();
        image.driver.close().unwrap();
        let path = dir.save("b.qcow2", &disk);
        qemu_checks(&path);
        assert!(qemu_reads(&dir, &path) == model, "{options}");
    }
}

#[test]
fn images_of_ours_are_read_and_written_by_qemu() {
    if !have_qemu() {
        return;
    }
    let dir = Dir::new("luks-ours");
    for (n, e) in kinds().into_iter().enumerate() {
        let o = CreateOptions {
            size: 3 << 20,
            cluster_size: [65536, 512, 4096][n % 3],
            version: if n % 4 == 2 { 2 } else { 3 },
            encrypt: Some(e.clone()),
            ..CreateOptions::default()
        };
        let disk = fresh(&o);
        let mut model = vec![0; 3 << 20];
        let image = node_of(&disk, &e, None).unwrap();
        let data = noise(7, 200_000);
        put(&image, 54_321, &data);
        model[54_321..254_321].copy_from_slice(&data);
        image.flush().unwrap();
        image.driver.close().unwrap();
        let ours = image.driver.info().specific.unwrap().1["encrypt"].clone();
        drop(image);
        let path = dir.save("a.qcow2", &disk);
        qemu_checks(&path);
        let text = qemu("qemu-img", &["info", "--output", "json", path.to_str().unwrap()]);
        let info: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(info["format-specific"]["data"]["encrypt"], ours, "{e:?}");
        assert!(qemu_reads(&dir, &path) == model, "{e:?}");
        let opts = with_key(&path);
        qemu("qemu-io", &["--object", SECRET, "--image-opts", &opts, "-c", "write -P 66 60k 5k"]);
        model[60 << 10..65 << 10].fill(66);
        let disk = Disk::new(std::fs::read(&path).unwrap());
        assert!(whole(&node_of(&disk, &e, None).unwrap()) == model, "{e:?}");
    }
}

#[test]
fn what_does_not_fit_is_told_as_qemu_does() {
    let opened = |disk: &Arc<Disk>, method, password: Option<&str>| {
        let encrypt =
            Some(Unlock { method, password: password.map(|p| p.as_bytes().to_vec()), secret: None });
        let options = Options { encrypt, read_only: true, ..Options::default() };
        open_image(disk, None, options).err().map_or("opened".into(), |e| e.to_string())
    };
    let plain = fresh(&CreateOptions { size: 1 << 20, ..CreateOptions::default() });
    let image = |e| fresh(&CreateOptions { size: 1 << 20, encrypt: Some(e), ..CreateOptions::default() });
    let (luks, aes) = (image(luks()), image(aes()));
    for (disk, method, password, want) in [
        (&luks, Crypt::Luks, Some(PASSWORD), "opened"),
        (&luks, Crypt::Luks, Some("wrong"), "Invalid password, cannot unlock any keyslot"),
        (&luks, Crypt::Luks, Some(""), "Invalid password, cannot unlock any keyslot"),
        (&luks, Crypt::Luks, None, "Parameter 'encrypt.key-secret' is required for cipher"),
        (&aes, Crypt::Aes, None, "Parameter 'encrypt.key-secret' is required for cipher"),
        // Nothing tells the legacy method whether a password is right.
        (&aes, Crypt::Aes, Some("wrong"), "opened"),
        (
            &luks,
            Crypt::Aes,
            Some(PASSWORD),
            "Header reported 'luks' encryption format but options specify 'aes'",
        ),
        (
            &aes,
            Crypt::Luks,
            Some(PASSWORD),
            "Header reported 'aes' encryption format but options specify 'luks'",
        ),
        (&plain, Crypt::Luks, None, "No encryption in image header, but options specified format 'luks'"),
    ] {
        assert_eq!(opened(disk, method, password), want);
    }
    let without = open_image(&luks, None, Options { read_only: true, ..Options::default() });
    assert_eq!(without.err().unwrap().to_string(), "Parameter 'encrypt.key-secret' is required for cipher");
    for (e, want) in [
        (
            CreateEncrypt { mode: Mode::Cbc, iv: IvGen::Essiv, iv_hash: Some(Hash::Sha1), ..self::luks() },
            "No AES cipher with key size 20 available",
        ),
        (
            CreateEncrypt { key_bits: 192, mode: Mode::Cbc, ..self::luks() },
            "Algorithm 'aes-192' is not supported with cipher mode 'cbc'",
        ),
        (CreateEncrypt { iter_time: 1 << 40, ..self::luks() }, "iter-time must be at most 20000 ms"),
    ] {
        let o = CreateOptions { size: 1 << 20, encrypt: Some(e), ..CreateOptions::default() };
        let made = minivmm::qcow2::create::create(&node(&Disk::new(Vec::new())), None, &o);
        assert_eq!(made.unwrap_err().to_string(), want);
    }
}

/// Random operations against a model, then qemu-img's opinion.
fn round(seed: u64, dir: &Dir, qemu: bool) {
    let mut rng = Rng::new(seed);
    let kinds = kinds();
    let e = kinds[rng.below(kinds.len() as u64) as usize].clone();
    let version = if rng.one_in(4) { 2 } else { 3 };
    let extended_l2 = version == 3 && rng.one_in(3);
    let bits = if extended_l2 { 14 + rng.below(3) } else { 9 + rng.below(9) };
    let o = CreateOptions {
        size: (1 + rng.below(96)) * 512 * (1 + rng.below(20)),
        version,
        cluster_size: 1 << bits,
        extended_l2,
        encrypt: Some(e.clone()),
        preallocation: if rng.one_in(4) { Preallocation::Metadata } else { Preallocation::Off },
        ..CreateOptions::default()
    };
    let say = format!("SEED={seed} {o:?}");
    let prefilled = o.preallocation != Preallocation::Off;
    let below =
        (!prefilled && rng.one_in(2)).then(|| noise(seed, (rng.below(o.size / 512 + 8) * 512) as usize));
    let under = below.as_ref().map(|bytes| {
        let options = NodeOptions { read_only: true, ..NodeOptions::default() };
        Node::new("backing", Box::new(OnDisk(Disk::new(bytes.clone()))), options)
    });
    let disk = fresh(&o);
    let mut model = below.clone().unwrap_or_default();
    model.resize(o.size as usize, 0);
    let open = || node_of(&disk, &e, under.clone()).unwrap_or_else(|error| panic!("{error}: {say}"));
    let mut image = open();
    let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
    for step in 0..60 {
        let size = model.len() as u64;
        let unit = if rng.one_in(2) { 512 } else { 1 };
        let off = rng.below(size) / unit * unit;
        let len = (1 + rng.below(size.min(3 * o.cluster_size.max(4096)))).min(size - off);
        let part = off as usize..(off + len) as usize;
        match rng.below(16) {
            0..7 => {
                let data = noise(rng.draw(), len as usize);
                let flags = if rng.one_in(8) { Flags::COMPRESSED } else { Flags::NONE };
                image.write(off, &Iov::from_slice(&data), flags).unwrap();
                model[part].copy_from_slice(&data);
                // What is compressed is not encrypted, and so never compressed.
                assert!(!in_plain_text(&disk, off, &data), "plain text on the disk: {say}");
            }
            7 => {
                image.zero(off, len, Flags::MAY_UNMAP).unwrap();
                model[part].fill(0);
            }
            8 => {
                image.zero(off, len, Flags::NONE).unwrap();
                model[part].fill(0);
            }
            9 => {
                image.discard(off, len).unwrap();
                // A hint: what is read is the old contents, or zeroes.
                let now = whole(&image);
                for (at, (new, old)) in now.iter().zip(&model).enumerate() {
                    let hit = part.contains(&at) && *new == 0;
                    let shown = version == 2 && part.contains(&at);
                    assert!(new == old || hit || shown, "discard at {at}: {say}");
                }
                model = now;
            }
            10 if snapshots.len() < 3 => {
                let name = format!("snap{step}");
                let snapshot = Snapshot { name: name.clone(), ..Snapshot::default() };
                image.driver.internal().unwrap().create_snapshot(snapshot).unwrap();
                snapshots.push((name, model.clone()));
            }
            11 if !snapshots.is_empty() => {
                let (name, old) = &snapshots[rng.below(snapshots.len() as u64) as usize];
                image.driver.internal().unwrap().apply_snapshot(None, Some(name)).unwrap();
                model.clone_from(old);
            }
            12 if !snapshots.is_empty() => {
                let (name, _) = snapshots.remove(rng.below(snapshots.len() as u64) as usize);
                image.driver.internal().unwrap().delete_snapshot(None, Some(&name)).unwrap();
            }
            13 if snapshots.is_empty() => {
                let new = (1 + rng.below(2 * size / 512)) * 512;
                image.driver.resize(new).unwrap_or_else(|error| panic!("{error}: {say}"));
                model.resize(new as usize, 0);
            }
            14 => {
                image.flush().unwrap();
                image.driver.close().unwrap();
                drop(image);
                image = open();
            }
            _ => {
                let mut bytes = vec![0xaa; len as usize];
                image.read(off, &mut IovMut::from_slice(&mut bytes)).unwrap();
                assert!(bytes == model[part], "read: {say}");
            }
        }
    }
    let now = whole(&image);
    if let Some(at) = now.iter().zip(&model).position(|(a, b)| a != b) {
        panic!("byte {at} differs: {say}");
    }
    image.flush().unwrap();
    image.driver.close().unwrap();
    if qemu {
        let path = dir.save("a.qcow2", &disk);
        qemu_checks(&path);
        if below.is_none() {
            assert!(qemu_reads(dir, &path) == model, "what qemu-img reads: {say}");
        }
    }
}

#[test]
fn random_operations_match_a_model() {
    let qemu = have_qemu();
    let dir = Dir::new("luks-model");
    let (seed, end) = seed_and_time(Duration::from_secs(8));
    for n in 0.. {
        round(seed + n, &dir, qemu && n % 4 == 0);
        if Instant::now() > end {
            eprintln!("{} rounds", n + 1);
            break;
        }
    }
}

#[test]
fn preallocated_disks_read_as_zeroes() {
    for (e, version, how) in [
        (luks(), 3, Preallocation::Metadata),
        (luks(), 3, Preallocation::Full),
        (luks(), 2, Preallocation::Metadata),
        (aes(), 2, Preallocation::Falloc),
        (aes(), 3, Preallocation::Falloc),
    ] {
        let o = CreateOptions {
            size: 1 << 20,
            version,
            preallocation: how,
            encrypt: Some(e.clone()),
            ..CreateOptions::default()
        };
        let disk = fresh(&o);
        let image = node_of(&disk, &e, None).unwrap();
        assert!(whole(&image).iter().all(|b| *b == 0), "{o:?}");
        let len = disk.copy().len();
        put(&image, 70_000, &[1; 1000]);
        assert_eq!(whole(&image).iter().filter(|b| **b == 1).count(), 1000);
        image.flush().unwrap();
        assert_eq!(disk.copy().len(), len, "the space was there: {o:?}");
    }
}

#[test]
fn an_external_data_file_holds_nothing_in_plain_text() {
    let (disk, data) = (Disk::new(Vec::new()), Disk::new(Vec::new()));
    let o = CreateOptions {
        size: 1 << 20,
        data_file: Some("d".into()),
        encrypt: Some(luks()),
        ..CreateOptions::default()
    };
    minivmm::qcow2::create::create(&node(&disk), Some(&node(&data)), &o).unwrap();
    let options = Options { encrypt: unlock(&luks()), ..Options::default() };
    let edges = (edge("file", node(&disk)), Edge::new("backing", None), edge("data-file", node(&data)));
    let image = open::open(edges.0, edges.1, Some(edges.2), options).unwrap();
    let image = Node::new("image", Box::new(image), NodeOptions::default());
    let bytes = noise(3, 100_000);
    put(&image, 12_345, &bytes);
    let mut model = vec![0; 1 << 20];
    model[12_345..112_345].copy_from_slice(&bytes);
    assert!(whole(&image) == model);
    assert!(!in_plain_text(&data, 12_345, &bytes));
    let raw = CreateOptions { data_file_raw: true, ..o };
    let made = minivmm::qcow2::create::create(&node(&disk), Some(&node(&data)), &raw);
    assert!(made.unwrap_err().to_string().contains("exclude each other"));
}

#[test]
fn nothing_is_compressed_in_an_encrypted_image() {
    // QEMU cannot either; compressed data would lie there in plain text.
    let disk = fresh(&CreateOptions { size: 1 << 20, encrypt: Some(luks()), ..CreateOptions::default() });
    let image = node_of(&disk, &luks(), None).unwrap();
    put(&image, 0, &[1; 512]);
    image.flush().unwrap();
    image.write(65536, &Iov::from_slice(&[7; 3 << 16]), Flags::COMPRESSED).unwrap();
    image.flush().unwrap();
    let bytes = disk.copy();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2 = (word(word(40) as usize) & 0x00ff_ffff_ffff_fe00) as usize;
    for n in 0..4 {
        assert_eq!(word(l2 + 8 * n) >> 62, 2, "cluster {n}: COPIED, not COMPRESSED");
    }
    assert!(whole(&image)[65536..4 << 16].iter().all(|b| *b == 7));
}

/// Where the LUKS header is.
fn header_at(bytes: &[u8]) -> usize {
    bytes.windows(8).position(|w| w == b"LUKS\xba\xbe\0\x01").unwrap()
}

#[test]
fn hostile_headers_are_refused_soon_and_in_little_memory() {
    let good =
        fresh(&CreateOptions { size: 1 << 20, encrypt: Some(luks()), ..CreateOptions::default() }).copy();
    let at = header_at(&good);
    let opened = |bytes: Vec<u8>| {
        let options = Options { encrypt: unlock(&luks()), read_only: true, ..Options::default() };
        open_image(&Disk::new(bytes), None, options).err().map_or(String::new(), |e| e.to_string())
    };
    let changed = |off: usize, with: &[u8]| {
        let mut bytes = good.clone();
        bytes[at + off..at + off + with.len()].copy_from_slice(with);
        opened(bytes)
    };
    assert_eq!(opened(good.clone()), "");
    let many = u32::MAX.to_be_bytes();
    let begin = Instant::now();
    let slow = "The LUKS header asks for too much: deriving its keys would take more than 60 s (";
    for (off, with, want) in [
        (0, &b"X"[..], "Volume is not in LUKS format"),
        (7, &[2], "LUKS version 2 is not supported"),
        (8, b"des\0", "Cipher 'des' is not supported"),
        (8, &[b'a'; 32], "LUKS header cipher name is not NUL terminated"),
        (8, &[0xff, 0], "LUKS header cipher name is not a text"),
        (40, b"xts\0", "Unexpected cipher mode string format 'xts'"),
        (40, b"ctr-", "Cipher mode 'ctr' is not supported"),
        (40, b"xts-tcw\0", "IV generator 'tcw' is not supported"),
        (40, b"cbc-essiv\0", "Missing IV generator hash specification"),
        (72, b"md5\0", "Hash algorithm 'md5' is not supported"),
        (108, &many, "Algorithm 'aes' with key size 4294967295 bytes is not supported"),
        (108, &33u32.to_be_bytes(), "Algorithm 'aes' with key size 33 bytes is not supported"),
        (164, &[0; 4], "LUKS key iteration count is zero"),
        (164, &many, slow),
        (208, &[1], "Keyslot 0 state (active/disable) is corrupted"),
        (212, &[0; 4], "Keyslot 0 iteration count is zero"),
        (212, &many, slow),
        (248, &[0; 4], "Keyslot 0 is overlapping with the LUKS header"),
        (248, &many, "Keyslot 0 is overlapping with the encrypted payload"),
        (248, &512u32.to_be_bytes(), "Keyslots 0 and 1 are overlapping in the header"),
        (252, &many, "Keyslot 0 is corrupted (stripes count 4294967295 != 4000)"),
        (256, &[0, 0xac, 0x71, 0xf3], "Keyslot 1 iteration count is zero"),
    ] {
        let got = changed(off, with);
        assert!(got == want || (want == slow && got.starts_with(slow)), "{off}: {got}");
    }
    // Behind the payload's beginning, which is not given, there is no key material.
    let mut bytes = good.clone();
    bytes[at + 104..at + 108].fill(0);
    bytes[at + 248..at + 252].copy_from_slice(&many);
    assert_eq!(opened(bytes), "Request for data outside of extension header");
    // The extension that says where the header is.
    let mut ext = 0x0537_be77u32.to_be_bytes().to_vec();
    ext.extend_from_slice(&16u32.to_be_bytes());
    let ext = good.windows(8).position(|w| w == ext).unwrap();
    for (offset, len, want) in [
        (1u64 << 40, 2u64 << 20, "LUKS header lies beyond the end of the file"),
        (at as u64, 1 << 60, "is too large"),
        (at as u64, 100, "Request for data outside of extension header"),
        (1 << 62, 2 << 20, "LUKS header lies beyond the end of the file"),
        ((1 << 63) - 65536, 2 << 20, "is too large"),
        (7, 2 << 20, "Encryption header offset '7' is not a multiple of cluster size '65536'"),
    ] {
        let mut bytes = good.clone();
        bytes[ext + 8..ext + 16].copy_from_slice(&offset.to_be_bytes());
        bytes[ext + 16..ext + 24].copy_from_slice(&len.to_be_bytes());
        let got = opened(bytes);
        assert!(got.ends_with(want), "{offset} {len}: {got}");
    }
    let mut bytes = good.clone();
    bytes[ext..ext + 4].copy_from_slice(b"none");
    assert_eq!(opened(bytes), "Missing CRYPTO header for crypt method 2");
    // And any byte at all.
    let (seed, _) = seed_and_time(Duration::ZERO);
    let mut rng = Rng::new(seed);
    for n in 0..60 {
        let mut bytes = good.clone();
        for _ in 0..1 + rng.below(3) {
            let off = rng.below(592) as usize;
            // A count of iterations would be honoured up to the limit, which takes long.
            if !(164..168).contains(&off) && (off < 208 || !(4..8).contains(&((off - 208) % 48))) {
                bytes[at + off] = rng.draw() as u8;
            }
        }
        let begin = Instant::now();
        let said = opened(bytes);
        assert!(begin.elapsed() < Duration::from_secs(10), "SEED={seed} {n}: {said}");
    }
    eprintln!("{:?}", begin.elapsed());
}

#[test]
fn the_luks_header_is_never_overwritten() {
    // An L2 entry that points into the LUKS header, as a hostile or broken image may have it.
    let disk = fresh(&CreateOptions { size: 1 << 20, encrypt: Some(luks()), ..CreateOptions::default() });
    let image = node_of(&disk, &luks(), None).unwrap();
    put(&image, 0, &[1; 512]);
    image.flush().unwrap();
    image.driver.close().unwrap();
    drop(image);
    let mut bytes = disk.copy();
    let at = header_at(&bytes) as u64;
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let l2 = (u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00) as usize;
    bytes[l2..l2 + 8].copy_from_slice(&(at | 1 << 63).to_be_bytes());
    let disk = Disk::new(bytes);
    let before = disk.copy()[at as usize..at as usize + 65536].to_vec();
    let image = node_of(&disk, &luks(), None).unwrap();
    let written = image.write(0, &Iov::from_slice(&[7; 512]), Flags::NONE);
    assert!(written.is_err(), "a write into the LUKS header");
    assert!(disk.copy()[at as usize..at as usize + 65536] == before[..]);
}

struct Qmp(Vm, Conn);

impl Qmp {
    fn run(&mut self, name: &str, args: Value) -> Result<Value, String> {
        let args = args.as_object().unwrap().clone();
        schema::execute(&mut Cx { vm: &mut self.0, conn: &mut self.1 }, name, args).map_err(|e| e.desc)
    }
}

#[test]
fn the_way_through_qmp() {
    let dir = Dir::new("luks-qmp");
    let image = |name: &str, e: CreateEncrypt| {
        let o = CreateOptions { size: 1 << 20, encrypt: Some(e), ..CreateOptions::default() };
        dir.save(name, &fresh(&o)).to_str().unwrap().to_string()
    };
    let (luks, aes) = (image("l.qcow2", luks()), image("a.qcow2", aes()));
    let mut q = Qmp(Vm::new(Settings::default()).unwrap(), Conn::new());
    let add = |q: &mut Qmp, file: &str, encrypt: Option<Value>| {
        let mut args =
            json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": file}});
        if let Some(encrypt) = encrypt {
            args["encrypt"] = encrypt;
        }
        q.run("blockdev-add", args)
    };
    for (id, data, format) in [
        ("s", PASSWORD, "raw"),
        ("wrong", "no", "raw"),
        ("binary", "/w==", "base64"),
        ("nul", "YQBi", "base64"),
    ] {
        q.run("object-add", json!({"qom-type": "secret", "id": id, "data": data, "format": format})).unwrap();
    }
    let key = |format: &str, id: &str| Some(json!({"format": format, "key-secret": id}));
    for (encrypt, want) in [
        (None, "Parameter 'encrypt.key-secret' is required for cipher"),
        (Some(json!({"format": "luks"})), "Parameter 'encrypt.key-secret' is required for cipher"),
        (Some(json!({"key-secret": "s"})), "Parameter 'encrypt.format' is missing"),
        (key("qcow", "s"), "Parameter 'format' does not accept value 'qcow'"),
        (key("luks", "nope"), "No secret with id 'nope'"),
        (key("luks", "wrong"), "Invalid password, cannot unlock any keyslot"),
        (key("luks", "binary"), "Data from secret binary is not valid UTF-8"),
        (key("luks", "nul"), "Data from secret nul is not valid UTF-8"),
        (key("aes", "nope"), "Header reported 'luks' encryption format but options specify 'aes'"),
    ] {
        assert_eq!(add(&mut q, &luks, encrypt).unwrap_err(), want);
    }
    for (file, format) in [(&luks, "luks"), (&aes, "aes")] {
        add(&mut q, file, key(format, "s")).unwrap();
        let nodes = q.run("query-named-block-nodes", json!({})).unwrap();
        let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "n").unwrap();
        let image = &node["image"];
        assert_eq!((&node["encrypted"], &image["encrypted"]), (&json!(true), &json!(true)));
        let name: Value =
            serde_json::from_str(image["filename"].as_str().unwrap().strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(name["encrypt"], json!({"format": format, "key-secret": "s"}));
        let encrypt = &image["format-specific"]["data"]["encrypt"];
        assert_eq!(encrypt["format"], format);
        assert_eq!(
            encrypt.get("slots").map(|s| s.as_array().unwrap().len()),
            (format == "luks").then_some(8)
        );
        q.run("block_passwd", json!({"node-name": "n", "password": PASSWORD})).unwrap();
        let wrong = q.run("block_passwd", json!({"node-name": "n", "password": "no"}));
        assert_eq!(wrong.unwrap_err(), "Password incorrect");
        // The image has its key; nobody needs the secret any more.
        q.run("object-del", json!({"id": "s"})).unwrap();
        q.run("blockdev-del", json!({"node-name": "n"})).unwrap();
        q.run("object-add", json!({"qom-type": "secret", "id": "s", "data": PASSWORD})).unwrap();
    }
}

#[test]
fn blockdev_create_makes_encrypted_images() {
    let dir = Dir::new("luks-create");
    let mut q = Qmp(Vm::new(Settings::default()).unwrap(), Conn::new());
    q.run("object-add", json!({"qom-type": "secret", "id": "s", "data": PASSWORD})).unwrap();
    let make = |q: &mut Qmp, name: &str, encrypt: Value| {
        let path = dir.path(name);
        std::fs::write(&path, "").unwrap();
        let file = json!({"driver": "file", "filename": path});
        let options = json!({"driver": "qcow2", "size": 1 << 20, "file": file, "encrypt": encrypt});
        q.run("blockdev-create", json!({"job-id": "j", "options": options}))?;
        let end = Instant::now() + Duration::from_secs(60);
        let job = loop {
            q.0.take_events();
            let jobs = q.run("query-jobs", json!({})).unwrap();
            if jobs[0]["status"] == "concluded" {
                break jobs[0].clone();
            }
            assert!(Instant::now() < end, "{jobs}");
            std::thread::sleep(Duration::from_millis(5));
        };
        q.run("job-dismiss", json!({"id": "j"})).unwrap();
        match job.get("error") {
            Some(error) => Err(error.as_str().unwrap().to_string()),
            None => Ok(file),
        }
    };
    for (encrypt, format) in [
        (
            json!({"format": "luks", "key-secret": "s", "iter-time": 5, "cipher-alg": "aes-128", "cipher-mode": "cbc",
                "ivgen-alg": "essiv", "hash-alg": "sha512"}),
            "luks",
        ),
        (json!({"format": "qcow", "key-secret": "s"}), "aes"),
    ] {
        let file = make(&mut q, format, encrypt).unwrap();
        let key = json!({"format": format, "key-secret": "s"});
        q.run("blockdev-add", json!({"driver": "qcow2", "node-name": "n", "file": file, "encrypt": key}))
            .unwrap();
        let shown = q.run("query-named-block-nodes", json!({"flat": true})).unwrap();
        let node = shown.as_array().unwrap().iter().find(|n| n["node-name"] == "n").unwrap();
        let info = &node["image"]["format-specific"]["data"]["encrypt"];
        assert_eq!(info["format"], format);
        if format == "luks" {
            assert_eq!(
                (
                    &info["cipher-alg"],
                    &info["cipher-mode"],
                    &info["ivgen-alg"],
                    &info["ivgen-hash-alg"],
                    &info["hash-alg"]
                ),
                (&json!("aes-128"), &json!("cbc"), &json!("essiv"), &json!("sha256"), &json!("sha512"))
            );
        }
        q.run("blockdev-del", json!({"node-name": "n"})).unwrap();
    }
    for (encrypt, want) in [
        (json!({"format": "luks"}), "Parameter 'encrypt.key-secret' is required for cipher"),
        (json!({"format": "luks", "key-secret": "nope"}), "No secret with id 'nope'"),
        (
            json!({"format": "luks", "key-secret": "s", "cipher-alg": "des"}),
            "Parameter 'cipher-alg' does not accept value 'des'",
        ),
        (
            json!({"format": "luks", "key-secret": "s", "iter-time": -1}),
            "Parameter 'iter-time' expects a non-negative value",
        ),
        (
            json!({"format": "luks", "key-secret": "s", "cipher-alg": "aes-192", "cipher-mode": "cbc"}),
            "Algorithm 'aes-192' is not supported with cipher mode 'cbc'",
        ),
    ] {
        let got = make(&mut q, "bad", encrypt).unwrap_err();
        assert!(got.ends_with(want), "{got}");
    }
}

#[test]
fn an_overlay_of_qemu_leads_to_its_encrypted_backing_file() {
    if !have_qemu() {
        return;
    }
    let dir = Dir::new("luks-chain");
    let disk = fresh(&CreateOptions { size: 1 << 20, encrypt: Some(luks()), ..CreateOptions::default() });
    let image = node_of(&disk, &luks(), None).unwrap();
    put(&image, 4096, &[9; 4096]);
    image.flush().unwrap();
    image.driver.close().unwrap();
    drop(image);
    dir.save("base.qcow2", &disk);
    let base = format!(
        "json:{{\"driver\": \"qcow2\", \"encrypt.key-secret\": \"s\", \"file.filename\": \"{}\"}}",
        dir.path("base.qcow2").display()
    );
    let over = dir.path("over.qcow2");
    let over = over.to_str().unwrap();
    qemu("qemu-img", &["create", "-q", "--object", SECRET, "-f", "qcow2", "-b", &base, "-F", "qcow2", over]);
    let mut q = Qmp(Vm::new(Settings::default()).unwrap(), Conn::new());
    let add = json!({"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": over}});
    let without = q.run("blockdev-add", add.clone()).unwrap_err();
    assert_eq!(without, "Could not open backing file: No secret with id 's'");
    q.run("object-add", json!({"qom-type": "secret", "id": "s", "data": PASSWORD})).unwrap();
    q.run("blockdev-add", add).unwrap();
    let node = q.0.graph.find("top").unwrap().clone();
    let bytes = whole(&node);
    assert!(bytes[..4096] == [0; 4096] && bytes[4096..8192] == [9; 4096]);
}

#[test]
fn secrets_may_be_encrypted_with_another() {
    let mut q = Qmp(Vm::new(Settings::default()).unwrap(), Conn::new());
    let mut add = |args: Value| q.run("object-add", args).map(drop).err().unwrap_or_default();
    // openssl enc -aes-256-cbc -K 000102…1f -iv 000102…0f
    let (key, iv) = ("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "AAECAwQFBgcICQoLDA0ODw==");
    let data = "xKaptc1RnFmFYOEou3hfhw==";
    assert_eq!(add(json!({"qom-type": "secret", "id": "k", "data": key, "format": "base64"})), "");
    assert_eq!(add(json!({"qom-type": "secret", "id": "short", "data": "abc"})), "");
    assert_eq!(add(json!({"qom-type": "iothread", "id": "io"})), "");
    let good =
        json!({"qom-type": "secret", "id": "s", "data": data, "format": "base64", "keyid": "k", "iv": iv});
    for (name, value, want) in [
        ("keyid", json!("nope"), "No secret with id 'nope'"),
        ("keyid", json!("io"), "Object with id 'io' is not a secret"),
        ("keyid", json!("short"), "Key should be 32 bytes in length"),
        ("iv", Value::Null, "IV is required to decrypt secret"),
        ("iv", json!("AAAA"), "IV should be 16 bytes in length not 3"),
        ("data", json!("YWJjZA=="), "Length 4 must be a multiple of block size 16"),
        ("data", json!("YWJjZGVmZ2hpamtsbW5vcA=="), "Incorrect number of padding bytes"),
    ] {
        let mut args = good.clone();
        args[name] = value;
        if args[name].is_null() {
            args.as_object_mut().unwrap().remove(name);
        }
        let got = add(args);
        assert!(got.starts_with(want), "{got}");
    }
    assert_eq!(add(good), "");
    assert_eq!(q.0.objects.secret("s").unwrap().bytes(), b"hello secret");
}
