use super::*;
use crate::block::handle::HandleSpec;
use crate::block::node::NodeOptions;
use crate::error::Error;
use crate::virtio::testing::fake_disk;
use crate::virtio::testing_pci::Board;
use serde_json::json;

/// One drive, `d0`; no netdev.
#[derive(Default)]
struct One {
    asked: Vec<(String, String, DriveUse)>,
    released: Vec<String>,
}

impl Backends for One {
    fn drive(
        &mut self,
        property: &str,
        name: Option<&str>,
        user: &User,
        usage: &DriveUse,
    ) -> Result<Arc<Handle>> {
        let name = name.unwrap_or_default();
        if name != "d0" {
            return Err(Error::new(format!("Property '{property}' can't find value '{name}'")));
        }
        self.asked.push((name.into(), user.qom_path.clone(), usage.clone()));
        Ok(fake_disk(1 << 20, HandleSpec::default(), NodeOptions::default()).0)
    }
    fn netdev(&mut self, property: &str, name: &str, _: &User) -> Result<Arc<dyn Netdev>> {
        Err(Error::new(format!("Property '{property}' can't find value '{name}'")))
    }
    fn iothread(&mut self, name: &str) -> Result<Arc<IoThread>> {
        Err(Error::new(format!("Device '{name}' not found")))
    }
    fn next_mac(&mut self) -> [u8; 6] {
        [0x52, 0x54, 0, 1, 2, 3]
    }
    fn release(&mut self, user: &User) {
        self.released.push(user.qom_path.clone());
    }
}

fn sockets(board: &Board) -> Sockets {
    Sockets {
        root: board.root.clone(),
        mem: board.ram.mem.clone(),
        interrupts: board.caught.clone(),
        slow: board.slow.clone(),
        cpus: 2,
        buses: Vec::new(),
    }
}

fn request(args: Value) -> Result<Request> {
    Request::parse(args.as_object().unwrap(), false, &[])
}

#[test]
fn a_disk_is_made_from_its_properties_and_plugged() {
    let (board, mut backends) = (Board::new(), One::default());
    let args = json!({"driver": "virtio-blk-pci", "id": "disk0", "drive": "d0", "addr": "1f.0", "bus": "pcie.0",
        "serial": "abc", "read-only": true, "share-rw": "on", "write-cache": "off", "werror": "enospc", "rerror": "enospc"});
    let device = request(args).unwrap().plug(&sockets(&board), &mut backends, 0).unwrap();
    assert_eq!((device.model, &*device.user.id), ("virtio-blk-pci", "disk0"));
    let Place::Slot(0x1f, face) = &device.place else { panic!("not on slot 1f") };
    assert_eq!(face.queue_sizes().len(), 2, "a queue for each processor");
    let usage = DriveUse {
        read_only: true,
        share_rw: true,
        removable: false,
        whole: false,
        write_cache: Some(false),
        rerror: Some("enospc".into()),
        werror: Some("enospc".into()),
    };
    assert_eq!(backends.asked, [("d0".to_string(), "/machine/peripheral/disk0".to_string(), usage)]);
    let device = request(json!({"driver": "virtio-rng-pci"})).unwrap();
    let device = device.plug(&sockets(&board), &mut backends, 7).unwrap();
    assert!(matches!(device.place, Place::Slot(1, _)));
    assert_eq!(device.user.qom_path, "/machine/peripheral-anon/device[7]");
    assert!(backends.released.is_empty());
}

#[test]
fn what_cannot_be_parsed_says_so_as_qemu_does() {
    let text = |args: Value| request(args).unwrap_err().desc;
    assert_eq!(text(json!({})), "Parameter 'driver' is missing");
    assert_eq!(text(json!({"driver": 5})), "Parameter 'driver' is missing");
    assert_eq!(text(json!({"driver": "nope"})), "'nope' is not a valid device model name");
    let blk = |name: &str, value: Value| text(json!({"driver": "virtio-blk-pci", name: value}));
    assert_eq!(blk("nope", json!(1)), "Property 'virtio-blk-pci.nope' not found");
    assert_eq!(blk("netdev", json!("n")), "Property 'virtio-blk-pci.netdev' not found");
    assert_eq!(blk("bus", json!("nobus")), "Bus 'nobus' not found");
    for addr in ["20", "-1", "", "5.8", "g", "5.0.0", "+5", "005.+1"] {
        assert_eq!(
            blk("addr", json!(addr)),
            format!("Property 'virtio-blk-pci.addr' doesn't take value '{addr}'")
        );
    }
    assert!(blk("addr", json!("5.1")).ends_with("only function 0"));
    assert_eq!(blk("num-queues", json!("x")), "Parameter 'num-queues' expects uint64");
}

#[test]
fn a_device_that_fails_leaves_nothing_behind() {
    let (board, mut backends) = (Board::new(), One::default());
    let mut text = |args: Value| {
        let result = request(args).unwrap().plug(&sockets(&board), &mut backends, 0);
        result.err().expect("it must fail").desc
    };
    assert_eq!(text(json!({"driver": "virtio-blk-pci"})), "drive property not set");
    assert_eq!(
        text(json!({"driver": "virtio-blk-pci", "drive": "x"})),
        "Property 'virtio-blk-pci.drive' can't find value 'x'"
    );
    assert_eq!(
        text(json!({"driver": "virtio-net-pci", "netdev": "x"})),
        "Property 'virtio-net-pci.netdev' can't find value 'x'"
    );
    assert_eq!(
        text(json!({"driver": "virtio-net-pci", "netdev": "x", "mac": "zz"})),
        "Property 'virtio-net-pci.mac' doesn't take value 'zz'"
    );
    let before = text(json!({"driver": "virtio-rng-pci", "addr": "0"}));
    assert!(before.contains("slot 0 function 0 not available for virtio-rng-pci"), "{before}");
    assert_eq!(backends.released.len(), 4, "the fifth never asked for anything");
    assert!((1..32).all(|slot| board.root.function(slot).is_none()));
}
