use super::*;
use crate::block::graph::Graph;
use crate::block::handle::HandleSpec;
use crate::block::open::{self, Common, Plan};
use crate::block::testing::{NoEnv, Scratch, qemu};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

fn plan(path: &str, common: Common) -> Plan {
    Plan { common, driver: Box::new(crate::block::file_open::FilePlan::new("file", path)) }
}

fn named(name: &str) -> Common {
    Common { node_name: Some(name.into()), ..Common::default() }
}

/// A process that holds an image until it is dropped.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Holder {
    /// qemu-io on `path`; returns when it has it open.
    fn new(tool: &str, args: &[&str], path: &str) -> Holder {
        let mut child = Command::new(tool)
            .args(args)
            .args(["-f", "qcow2", path])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        use std::io::Write;
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.as_mut().unwrap());
        out.read_line(&mut line).unwrap();
        Holder(child)
    }
}

/// A qcow2 image, of whose bytes we know nothing: QEMU locks the file of a raw image loosely.
fn image(img: &str, dir: &Scratch) -> String {
    let path = dir.path("a.qcow2");
    let made = Command::new(img).args(["create", "-q", "-f", "qcow2", &path, "1M"]).status();
    assert!(made.unwrap().success());
    path
}

fn info(tool: &str, args: &[&str], path: &str) -> (bool, String) {
    let mut child = Command::new(tool)
        .arg("info")
        .args(args)
        .arg(path)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    child.stderr.as_mut().unwrap().read_to_string(&mut text).unwrap();
    (child.wait().unwrap().success(), text)
}

#[test]
fn qemu_img_is_refused_while_we_write_and_only_then() {
    let Some(img) = qemu("qemu-img") else { return };
    let dir = Scratch::new("lock-ours");
    let path = image(&img, &dir);
    let mut graph = Graph::new();
    let node = open::open(&mut graph, &NoEnv, plan(&path, named("a"))).unwrap();
    graph.own(&node);
    assert!(info(&img, &["-f", "qcow2"], &path).0, "nobody uses it yet");
    let disk = graph.attach(Some(node.clone()), HandleSpec::default()).unwrap();
    let (ok, text) = info(&img, &["-f", "qcow2"], &path);
    assert!(!ok);
    assert!(text.contains("Failed to get shared \"write\" lock"), "{text}");
    assert!(text.contains("Is another process using the image"), "{text}");
    assert!(info(&img, &["-U", "-f", "qcow2"], &path).0, "-U looks all the same");
    graph.detach(&disk);
    assert!(info(&img, &["-f", "qcow2"], &path).0, "the lock is gone with the user");
    // A reader that bears no writer.
    let reads = HandleSpec { uses: Perm::CONSISTENT_READ, ..HandleSpec::default() };
    let _reader = graph.attach(Some(node), reads).unwrap();
    assert!(info(&img, &["-f", "qcow2"], &path).0);
    let out = Command::new(&img).args(["resize", "-q", "-f", "qcow2", &path, "2M"]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("Failed to get \"write\" lock"), "{text}");
}

#[test]
fn we_are_refused_while_qemu_writes() {
    let (Some(io), Some(img)) = (qemu("qemu-io"), qemu("qemu-img")) else { return };
    let dir = Scratch::new("lock-theirs");
    let path = image(&img, &dir);
    let mut graph = Graph::new();
    let node = open::open(&mut graph, &NoEnv, plan(&path, named("a"))).unwrap();
    graph.own(&node);
    let holder = Holder::new(&io, &[], &path);
    let e = graph.attach(Some(node.clone()), HandleSpec::default()).err().unwrap();
    assert_eq!(e.desc, "Failed to get \"write\" lock");
    let reads =
        HandleSpec { uses: Perm::CONSISTENT_READ, shares: Perm::CONSISTENT_READ, ..HandleSpec::default() };
    let e = graph.attach(Some(node.clone()), reads.clone()).err().unwrap();
    assert_eq!(e.desc, "Failed to get shared \"write\" lock");
    // What was refused left no lock behind: another writer comes in.
    drop(holder);
    let writer = Command::new(&io).args(["-f", "qcow2", "-c", "write 0 512", &path]).output().unwrap();
    assert!(writer.status.success(), "{writer:?}");
    let disk = graph.attach(Some(node.clone()), HandleSpec::default()).unwrap();
    graph.detach(&disk);
    // A reader beside us bears no writer of ours.
    let holder = Holder::new(&io, &["-r"], &path);
    let e = graph.attach(Some(node.clone()), HandleSpec::default()).err().unwrap();
    assert_eq!(e.desc, "Failed to get \"write\" lock");
    graph.attach(Some(node), reads).unwrap();
    drop(holder);
}

#[test]
fn two_of_our_own_nodes_are_as_two_processes() {
    let dir = Scratch::new("lock-both");
    let path = dir.file("a.raw", 1 << 20);
    let mut graph = Graph::new();
    let a = open::open(&mut graph, &NoEnv, plan(&path, named("a"))).unwrap();
    graph.own(&a);
    let disk = graph.attach(Some(a), HandleSpec::default()).unwrap();
    let b = open::open(&mut graph, &NoEnv, plan(&path, named("b"))).unwrap();
    graph.own(&b);
    let e = graph.attach(Some(b.clone()), HandleSpec::default()).err().unwrap();
    assert_eq!(e.desc, "Failed to get \"write\" lock");
    graph.detach(&disk);
    let disk = graph.attach(Some(b), HandleSpec::default()).unwrap();
    graph.detach(&disk);
    // Those who bear each other may write both.
    let shared = HandleSpec { shares: Perm::ALL, ..HandleSpec::default() };
    let (a, b) = (graph.find("a").cloned(), graph.find("b").cloned());
    graph.attach(a, shared.clone()).unwrap();
    graph.attach(b, shared).unwrap();
}

#[test]
fn force_share_and_locking_off_take_no_locks() {
    let Some(img) = qemu("qemu-img") else { return };
    let dir = Scratch::new("lock-off");
    let path = image(&img, &dir);
    let mut graph = Graph::new();
    let mut off = crate::block::file_open::FilePlan::new("file", &path);
    off.options.locking = Some(OnOffAuto::Off);
    let off = Plan { common: named("off"), driver: Box::new(off) };
    let node = open::open(&mut graph, &NoEnv, off).unwrap();
    graph.attach(Some(node), HandleSpec::default()).unwrap();
    assert!(info(&img, &["-f", "qcow2"], &path).0);
    let path = dir.file("b.raw", 1 << 20);
    let writer = open::open(&mut graph, &NoEnv, plan(&path, named("w"))).unwrap();
    graph.attach(Some(writer), HandleSpec::default()).unwrap();
    // A format with force-share on top of the same file: its file child inherits it.
    let common = Common { force_share: Some(true), read_only: Some(true), ..named("look") };
    let file = crate::block::open::Child::New(Box::new(plan(&path, Common::default())));
    let driver = Box::new(crate::block::raw::RawPlan { file, offset: None, size: None });
    let look = open::open(&mut graph, &NoEnv, Plan { common, driver }).unwrap();
    let reads =
        HandleSpec { uses: Perm::CONSISTENT_READ, shares: Perm::CONSISTENT_READ, ..HandleSpec::default() };
    graph.attach(Some(look), reads).unwrap();
}
