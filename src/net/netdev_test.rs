use super::*;
use crate::net::tap::TapOptions;

struct Nothing;

impl Netdev for Nothing {
    fn fd(&self) -> RawFd {
        -1
    }
    fn offloads(&self) -> Offload {
        Offload::NONE
    }
    fn set_offload(&self, _: Offload) -> io::Result<()> {
        Ok(())
    }
    fn recv(&self, _: &mut IovMut) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn send(&self, _: &Iov) -> io::Result<()> {
        Ok(())
    }
    fn info(&self) -> String {
        "type=nothing".into()
    }
}

#[test]
fn a_backend_has_one_user_and_its_name_once() {
    let mut all = Netdevs::default();
    all.insert("net0", Arc::new(Nothing)).unwrap();
    let again = all.insert("net0", Arc::new(Nothing)).unwrap_err();
    assert_eq!(again.desc, "Duplicate ID 'net0'");
    for bad in ["1b", "", "a b", "ä"] {
        let e = all.insert(bad, Arc::new(Nothing)).unwrap_err();
        assert_eq!(e.desc, "Parameter 'id' expects an identifier", "{bad}");
    }

    let p = "virtio-net-pci.netdev";
    assert_eq!(
        all.attach("net1", p, "nic0").err().unwrap().desc,
        "Property 'virtio-net-pci.netdev' can't find value 'net1'"
    );
    all.attach("net0", p, "nic0").unwrap();
    assert_eq!(all.iter().next(), Some(("net0", "type=nothing".to_string(), Some("nic0"))));
    assert_eq!(
        all.attach("net0", p, "nic1").err().unwrap().desc,
        "Property 'virtio-net-pci.netdev' can't take value 'net0', it's in use"
    );
    all.detach("net0");
    all.attach("net0", p, "nic1").unwrap();

    all.remove("net0").unwrap();
    let gone = all.remove("net0").unwrap_err();
    assert_eq!((gone.class, gone.desc.as_str()), (Class::DeviceNotFound, "Device 'net0' not found"));
}

#[test]
fn impossible_options_are_refused_by_name() {
    let refused = |tap: TapOptions| {
        let options = NetdevOptions { id: "t".into(), backend: Backend::Tap(tap) };
        let mut all = Netdevs::default();
        let e = all.add(&options, |name| {
            Err(Error::new(format!("File descriptor named '{name}' has not been found")))
        });
        assert_eq!(all.iter().count(), 0);
        e.unwrap_err().desc
    };
    let some = |s: &str| Some(s.to_string());
    assert_eq!(
        refused(TapOptions { fd: some("3"), fds: some("1:2"), script: some("no"), ..Default::default() }),
        "ifname=, script=, downscript=, vnet_hdr=, helper=, queues=, fds=, and vhostfds= are invalid with fd="
    );
    assert_eq!(
        refused(TapOptions { fd: some("nofd"), ..Default::default() }),
        "File descriptor named 'nofd' has not been found"
    );
    assert!(refused(TapOptions { script: some("/etc/x"), ..Default::default() }).contains("'script'"));
    assert!(refused(TapOptions { downscript: some(""), ..Default::default() }).contains("'downscript'"));
    assert!(refused(TapOptions { vhost: Some(true), ..Default::default() }).contains("'vhost'"));
    assert!(refused(TapOptions { queues: Some(2), ..Default::default() }).contains("one queue"));
    assert!(refused(TapOptions { fds: some("4"), ..Default::default() }).contains("one queue"));
    assert!(
        refused(TapOptions { ifname: some("a-name-too-long-for-it"), ..Default::default() }).contains("15")
    );
}
