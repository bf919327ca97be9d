use super::*;
use crate::block::node::NodeOptions;
use crate::block::testing::Mem;
use crate::sys::inbox::Inbox;

struct Bench {
    graph: Graph,
    drives: Drives,
    events: Events,
}

impl Bench {
    fn new() -> Bench {
        let events = Arc::new(Inbox::new().unwrap());
        Bench { graph: Graph::new(), drives: Drives::new(), events }
    }

    fn node(&mut self, name: &str, read_only: bool) -> Arc<Node> {
        let options = NodeOptions { read_only, ..NodeOptions::default() };
        let node = Node::new(name, Box::new(Mem::new(4096)), options);
        self.graph.add(node.clone()).unwrap();
        node
    }

    fn drive(&mut self, name: &str, node: Option<Arc<Node>>) -> Result<Arc<Handle>> {
        let spec = HandleSpec { name: name.into(), ..HandleSpec::default() };
        self.drives.add(&mut self.graph, node, spec, false)
    }

    fn device(&mut self, what: &str, id: &str, how: &Use) -> Result<Arc<Handle>> {
        let device =
            Device { id: id.into(), qom_path: format!("/machine/peripheral/{id}"), ..Device::default() };
        let (graph, events) = (&mut self.graph, &self.events);
        self.drives.attach_device(graph, Some(what), "virtio-blk-pci", device, how, events)
    }
}

#[test]
fn named_drives_are_listed_first() {
    let mut b = Bench::new();
    let node = b.node("n0", false);
    b.graph.own(&node);
    b.device("n0", "vd0", &Use::default()).unwrap();
    b.drive("b", None).unwrap();
    b.drive("a", None).unwrap();
    let names: Vec<_> = b.drives.iter().map(|d| d.name().to_string()).collect();
    assert_eq!(names, ["b", "a", ""]);
    assert!(b.drives.find("").is_none(), "no drive is called nothing");
    assert!(b.drives.of_device("vd0").is_some() && b.drives.of_device("").is_none());
    assert!(b.drives.of_device("/machine/peripheral/vd0").is_some());
}

#[test]
fn names_that_are_taken() {
    let mut b = Bench::new();
    let node = b.node("n0", false);
    b.graph.own(&node);
    b.drive("a", None).unwrap();
    for (name, want) in [
        ("a", "Device with id 'a' already exists"),
        ("n0", "Device name 'n0' conflicts with an existing node name"),
        ("1", "Parameter 'id' expects an identifier"),
        ("", "Parameter 'id' expects an identifier"),
    ] {
        assert_eq!(b.drive(name, None).err().unwrap().desc, want);
    }
    let orphan = b.node("n1", false);
    assert!(b.drive("a", Some(orphan)).is_err());
    assert!(b.graph.find("n1").is_none(), "its node is not left behind");
}

#[test]
fn a_device_takes_a_drive_or_a_node_once() {
    let mut b = Bench::new();
    let (n0, n1) = (b.node("n0", false), b.node("n1", false));
    b.graph.own(&n1);
    let handle = b.drive("d0", Some(n0)).unwrap();
    assert_eq!(handle.shares(), Perm::ALL, "nobody uses it yet");
    let used = b.device("d0", "vd0", &Use::default()).unwrap();
    assert!(Arc::ptr_eq(&handle, &used));
    assert!(!used.shares().contains(Perm::WRITE) && used.uses().contains(Perm::WRITE));
    assert_eq!(
        b.device("d0", "vd1", &Use::default()).err().unwrap().desc,
        "Drive 'd0' is already in use by another device"
    );
    assert_eq!(
        b.device("nope", "vd1", &Use::default()).err().unwrap().desc,
        "Property 'virtio-blk-pci.drive' can't find value 'nope'"
    );
    b.device("n1", "vd1", &Use::default()).unwrap();
    let e = b.device("n1", "vd2", &Use::default()).err().unwrap();
    assert!(e.desc.contains("required by block device 'vd1'"), "{e}");
    assert!(e.desc.contains("unshared by block device 'vd2'"), "{e}");
    b.drive("empty", None).unwrap();
    let e = b.device("empty", "vd2", &Use::default()).err().unwrap();
    assert_eq!(e.desc, "Device needs media, but drive is empty");
    let both = Use { share_rw: true, ..Use::default() };
    b.drives.detach_device(&mut b.graph, "/machine/peripheral/vd1");
    b.device("n1", "vd3", &both).unwrap();
    b.device("n1", "vd4", &both).unwrap();
}

#[test]
fn a_device_on_a_read_only_node_only_reads() {
    let mut b = Bench::new();
    let node = b.node("n0", true);
    b.graph.own(&node);
    let handle = b.device("n0", "vd0", &Use::default()).unwrap();
    assert!(handle.read_only());
    assert_eq!(handle.uses(), Perm::CONSISTENT_READ);
}

#[test]
fn the_devices_own_policy_goes_before_the_drives() {
    let mut b = Bench::new();
    let n0 = b.node("n0", false);
    let handle = b.drive("d0", Some(n0)).unwrap();
    handle.set_policy(OnError::Ignore, OnError::Ignore);
    let how = Use { werror: OnError::Stop, write_cache: Some(false), ..Use::default() };
    b.device("d0", "vd0", &how).unwrap();
    assert_eq!(handle.policy(), (OnError::Ignore, OnError::Stop));
    assert!(!handle.write_cache());
}

#[test]
fn a_device_that_goes_takes_its_drive_along() {
    let mut b = Bench::new();
    let n0 = b.node("n0", false);
    b.drive("d0", Some(n0)).unwrap();
    let handle = b.device("d0", "vd0", &Use::default()).unwrap();
    b.drives.detach_device(&mut b.graph, "/machine/peripheral/vd0");
    assert!(b.drives.find("d0").is_none());
    assert!(b.graph.find("n0").is_none(), "nobody else used its node");
    assert_eq!(handle.len(), 0);
}
