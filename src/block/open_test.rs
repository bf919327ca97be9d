use super::*;
use crate::block::driver::{Extent, ExtentKind, Flags, ImageInfo};
use crate::block::file_open::FilePlan;
use crate::block::handle::HandleSpec;
use crate::block::raw::RawPlan;
use crate::block::testing::Scratch;
use crate::sys::iov::{Iov, IovMut};
use std::io;

/// A toy format: its file's text is the name of its backing file, or empty.
struct Toy {
    file: Arc<Edge>,
    backing: Arc<Edge>,
    writable: bool,
}

struct ToyPlan {
    file: Child,
    backing: Backing,
    /// Fails after its children were opened.
    broken: bool,
}

impl Open for ToyPlan {
    fn name(&self) -> &'static str {
        "toy"
    }
    fn open(self: Box<Self>, cx: &mut Opening) -> Result<Box<dyn Driver>> {
        let file = cx.file(self.file)?;
        let node = file.need()?;
        let mut text = vec![0; node.len() as usize];
        node.read(0, &mut IovMut::from_slice(&mut text))?;
        let text = String::from_utf8(text).unwrap();
        let named = (!text.is_empty()).then_some((text.as_str(), Some("toy")));
        let named = match named {
            Some((n, _)) if n.starts_with("noformat") => Some((n, None)),
            Some((n, _)) if n.starts_with("raw") => Some((n, Some("raw"))),
            Some((n, _)) if n.starts_with("odd") => Some((n, Some("odd"))),
            other => other,
        };
        let backing = cx.backing(self.backing, &file, named)?;
        if self.broken {
            bail!("broken");
        }
        Ok(Box::new(Toy { file, backing, writable: !cx.options.read_only }))
    }
}

impl Driver for Toy {
    fn name(&self) -> &'static str {
        "toy"
    }
    fn len(&self) -> u64 {
        512
    }
    fn edges(&self) -> Vec<Arc<Edge>> {
        vec![self.file.clone(), self.backing.clone()]
    }
    fn wants(&self, edge: &Edge, above: (Perm, Perm)) -> (Perm, Perm) {
        if edge.role == "file" { perm::for_metadata(above, self.writable) } else { perm::for_backing(above) }
    }
    fn read(&self, _: u64, _: &mut IovMut) -> io::Result<()> {
        Ok(())
    }
    fn write(&self, _: u64, _: &Iov, _: Flags) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn status(&self, _: u64, len: u64) -> io::Result<Extent> {
        Ok(Extent { kind: ExtentKind::Unallocated, len, host_offset: None })
    }
    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }
}

struct ToyEnv;

impl Env for ToyEnv {
    fn layer(&self, format: &str, file: Child) -> Option<Plan> {
        let driver: Box<dyn Open> = match format {
            "toy" => Box::new(ToyPlan { file, backing: Backing::FromImage, broken: false }),
            "raw" => Box::new(RawPlan { file, offset: None, size: None }),
            _ => return None,
        };
        Some(Plan { common: Common::default(), driver })
    }
    fn parse(&self, options: serde_json::Value) -> Result<Plan> {
        let path = options["filename"].as_str().unwrap();
        Ok(Plan { common: Common::default(), driver: Box::new(FilePlan::new("file", path)) })
    }
    fn protocol(&self, driver: &str, filename: &str) -> Option<Plan> {
        if driver != "file" {
            return None;
        }
        Some(Plan { common: Common::default(), driver: Box::new(FilePlan::new("file", filename)) })
    }
    fn fdset(&self, path: &str, _: i32) -> Result<PassedFd> {
        bail!("Failed to find fdset {path}")
    }
    fn secret(&self, id: &str) -> Result<Vec<u8>> {
        bail!("No secret with id '{id}'")
    }
}

fn toy(path: &str, name: Option<&str>, backing: Backing) -> Plan {
    let file = Plan { common: Common::default(), driver: Box::new(FilePlan::new("file", path)) };
    let common = Common { node_name: name.map(String::from), ..Common::default() };
    let file = Child::New(Box::new(file));
    Plan { common, driver: Box::new(ToyPlan { file, backing, broken: false }) }
}

fn make(dir: &Scratch, name: &str, text: &str) -> String {
    std::fs::write(dir.path(name), text).unwrap();
    dir.path(name)
}

fn names(graph: &Graph) -> Vec<String> {
    graph.nodes().map(|n| n.name.clone()).collect()
}

#[test]
fn a_chain_is_opened_read_only_relative_to_each_image_and_listed_newest_first() {
    let dir = Scratch::new("open-chain");
    std::fs::create_dir(dir.path("sub")).unwrap();
    make(&dir, "raw.base", "the bytes");
    make(&dir, "sub/mid", "../raw.base");
    let top = make(&dir, "top", "sub/mid");
    std::fs::write(dir.path("sub/mid"), "raw.base").unwrap();
    std::fs::rename(dir.path("raw.base"), dir.path("sub/raw.base")).unwrap();
    let mut graph = Graph::new();
    add(&mut graph, &ToyEnv, toy(&top, Some("top"), Backing::FromImage)).unwrap();
    let list: Vec<_> = graph.nodes().collect();
    let shown: Vec<_> = list
        .iter()
        .map(|n| (n.driver.name(), n.driver.filename().replace(&dir.path(""), ""), n.read_only()))
        .collect();
    // A backing file is younger than the image above it, which is younger than its own file.
    let want = [
        ("raw", "", true),
        ("file", "sub/raw.base", true),
        ("toy", "", true),
        ("file", "sub/mid", true),
        ("toy", "", false),
        ("file", "top", false),
    ];
    assert_eq!(shown, want.map(|(d, f, ro)| (d, f.to_string(), ro)));
    assert_eq!(list[4].name, "top");
    graph.delete("top").unwrap();
    assert!(names(&graph).is_empty(), "all of it is gone");
}

#[test]
fn what_cannot_be_opened_leaves_nothing_behind() {
    let dir = Scratch::new("open-fail");
    let mut graph = Graph::new();
    let prefix = "Could not open backing file: ";
    let missing = dir.path("missing");
    for (text, want) in [
        ("missing".to_string(), format!("{prefix}Could not open '{missing}': No such file or directory")),
        ("noformat".into(), format!("{prefix}the image does not record the format")),
        ("odd".into(), format!("{prefix}Unknown driver 'odd'")),
        ("nbd://host/x".into(), format!("{prefix}Unknown protocol 'nbd'")),
        ("json:{".into(), format!("{prefix}Could not parse the JSON options")),
        ("self".into(), format!("{prefix}the chain of backing files is a loop")),
        ("other".into(), format!("{prefix}{prefix}the chain of backing files is a loop")),
    ] {
        let top = make(&dir, "self", &text);
        make(&dir, "other", "self");
        let plan = toy(&top, Some("top"), Backing::FromImage);
        let e = add(&mut graph, &ToyEnv, plan).err().unwrap();
        assert!(e.desc.starts_with(&want), "{text}: {e}");
        assert!(names(&graph).is_empty(), "{text}");
        let fresh = Common { node_name: Some("top".into()), ..Common::default() };
        let plan = Plan { common: fresh, ..toy(&top, None, Backing::Nothing) };
        add(&mut graph, &ToyEnv, plan).unwrap();
        graph.delete("top").unwrap();
    }
    let top = make(&dir, "self", "raw.x");
    make(&dir, "raw.x", "");
    let mut plan = toy(&top, Some("top"), Backing::FromImage);
    let file = Plan { common: Common::default(), driver: Box::new(FilePlan::new("file", &top)) };
    let file = Child::New(Box::new(file));
    plan.driver = Box::new(ToyPlan { file, backing: Backing::FromImage, broken: true });
    assert_eq!(add(&mut graph, &ToyEnv, plan).err().unwrap().desc, "broken");
    assert!(names(&graph).is_empty());
}

#[test]
fn a_long_chain_ends_somewhere() {
    let dir = Scratch::new("open-long");
    make(&dir, "n0", "");
    for i in 1..=MAX_CHAIN + 5 {
        make(&dir, &format!("n{i}"), &format!("n{}", i - 1));
    }
    let mut graph = Graph::new();
    let top = dir.path(&format!("n{}", MAX_CHAIN + 5));
    let e = open(&mut graph, &ToyEnv, toy(&top, None, Backing::FromImage)).err().unwrap();
    assert!(e.desc.ends_with("the chain of backing files is longer than 200"), "{e}");
    assert!(names(&graph).is_empty());
    let top = dir.path("n150");
    open(&mut graph, &ToyEnv, toy(&top, None, Backing::FromImage)).unwrap();
    graph.collect();
    assert!(names(&graph).is_empty());
}

#[test]
fn an_image_that_is_open_for_writing_is_no_backing_file_of_another() {
    let dir = Scratch::new("open-shared");
    let base = make(&dir, "base", "");
    let top = make(&dir, "top", "base");
    let mut graph = Graph::new();
    add(&mut graph, &ToyEnv, toy(&base, Some("base"), Backing::Nothing)).unwrap();
    let e = add(&mut graph, &ToyEnv, toy(&top, Some("top"), Backing::FromImage)).err().unwrap();
    assert_eq!(e.desc, "Could not open backing file: Failed to get shared \"write\" lock");
    // By its node it is one, until somebody writes to it.
    let by_name = || Backing::Child(Child::Node("base".into()));
    add(&mut graph, &ToyEnv, toy(&top, Some("top"), by_name())).unwrap();
    let node = graph.find("top").cloned();
    let disk = graph.attach(node, HandleSpec::default()).unwrap();
    let base_node = graph.find("base").cloned();
    let e = graph.attach(base_node, HandleSpec::default()).err().unwrap();
    assert!(e.desc.contains("unshared by node 'top' (uses node 'base' as 'backing' child)"), "{e}");
    graph.detach(&disk);
    let e = add(&mut graph, &ToyEnv, toy(&base, Some("x"), Backing::Child(Child::Node("no".into()))));
    assert!(e.is_err());
    assert_eq!(
        add(
            &mut graph,
            &ToyEnv,
            toy(&make(&dir, "z", ""), Some("x"), Backing::Child(Child::Node("no".into())))
        )
        .err()
        .unwrap()
        .desc,
        "Could not open backing file: Cannot find device='no' nor node-name='no'"
    );
}

#[test]
fn paths_are_combined_as_qemu_does() {
    for (own, name, want) in [
        ("/a/b/c.qcow2", "d.raw", "/a/b/d.raw"),
        ("/a/b/c.qcow2", "../d.raw", "/a/b/../d.raw"),
        ("/a/b/c.qcow2", "/d.raw", "/d.raw"),
        ("c.qcow2", "d.raw", "d.raw"),
        ("x/c.qcow2", "d.raw", "x/d.raw"),
        ("/c.qcow2", "d.raw", "/d.raw"),
        ("/a/c.qcow2", "nbd://h/x", "nbd://h/x"),
        ("/a/c.qcow2", "json:{}", "json:{}"),
        ("/a/c.qcow2", "./x:y", "/a/./x:y"),
    ] {
        assert_eq!(combine(own, name), want, "{own} {name}");
    }
}

#[test]
fn children_inherit_what_they_do_not_say() {
    let dir = Scratch::new("open-inherit");
    let top = make(&dir, "top", "base");
    make(&dir, "base", "");
    let mut graph = Graph::new();
    let mut plan = toy(&top, Some("top"), Backing::FromImage);
    plan.common.no_flush = Some(true);
    plan.common.read_only = Some(true);
    open(&mut graph, &ToyEnv, plan).unwrap();
    for node in graph.nodes() {
        let o = node.options();
        assert!(o.no_flush && o.read_only, "{}", node.name);
        assert_eq!(o.unmap, node.name != "top", "formats pass on what their users allow");
    }
}
