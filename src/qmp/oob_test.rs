//! Clients that have enabled out-of-band execution, at a server that is driven by hand.

use super::tests::{Peer, Pipe, Rig, name};
use super::*;
use serde_json::{Value, json};
use std::io::Read;

#[test]
fn out_of_band_requests_are_answered_while_the_control_thread_is_elsewhere() {
    let mut rig = Rig::new();
    let pulled = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let own = pulled.clone();
    let node =
        rig.vm.graph.yanks().enter("far", move || own.store(true, std::sync::atomic::Ordering::SeqCst));
    let mut peer = rig.connect();
    peer.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}});
    assert_eq!(rig.ask(&mut peer, enable), json!({"return": {}}));
    // From here on nobody turns the loop.
    let line = |v: Value| format!("{v}\n").into_bytes();
    let far = json!([{"type": "block-node", "node-name": "far"}]);
    let near =
        json!([{"type": "block-node", "node-name": "far"}, {"type": "block-node", "node-name": "near"}]);
    let oob = |name: &str, args: Value, id: &str| json!({"exec-oob": name, "arguments": args, "id": id});
    for id in 0..7 {
        peer.send(&line(json!({"execute": "query-name", "id": id})));
    }
    peer.send(&line(oob("query-yank", json!({}), "a")));
    peer.send(&line(oob("yank", json!({"instances": near}), "b")));
    peer.send(&line(oob("query-name", json!({}), "c")));
    peer.send(&line(oob("no-such", json!({}), "d")));
    peer.send(&line(json!({"exec-oob": 7, "id": "e"})));
    peer.send(&line(oob("yank", json!({"instances": []}), "f")));
    let wait = |peer: &mut Peer| {
        let mut got = [0; 4096];
        while !peer.got.contains(&b'\n') {
            let n = peer.stream.read(&mut got).unwrap_or_else(|e| panic!("no answer: {e}"));
            assert!(n > 0, "the server has hung up");
            peer.got.extend(&got[..n]);
        }
        let end = peer.got.iter().position(|b| *b == b'\n').unwrap();
        serde_json::from_slice::<Value>(&peer.got.drain(..=end).collect::<Vec<_>>()).unwrap()
    };
    peer.stream.set_nonblocking(false).unwrap();
    let desc = |v: Value| (v["id"].clone(), v["error"]["class"].clone(), v["error"]["desc"].clone());
    assert_eq!(wait(&mut peer), json!({"return": far, "id": "a"}));
    assert_eq!(desc(wait(&mut peer)), (json!("b"), json!("DeviceNotFound"), json!("Instance not found")));
    assert!(!pulled.load(std::sync::atomic::Ordering::SeqCst));
    let text = json!("The command query-name does not support OOB");
    assert_eq!(desc(wait(&mut peer)), (json!("c"), json!("GenericError"), text));
    let text = json!("The command no-such has not been found");
    assert_eq!(desc(wait(&mut peer)), (json!("d"), json!("CommandNotFound"), text));
    let text = json!("QMP input member 'exec-oob' must be a string");
    assert_eq!(desc(wait(&mut peer)), (json!("e"), json!("GenericError"), text));
    assert_eq!(wait(&mut peer), json!({"return": {}, "id": "f"}));
    peer.send(&line(oob("yank", json!({"instances": far}), "g")));
    assert_eq!(wait(&mut peer), json!({"return": {}, "id": "g"}));
    assert!(pulled.load(std::sync::atomic::Ordering::SeqCst));
    // The eighth that waits is the last that is read.
    for id in 7..20 {
        peer.send(&line(json!({"execute": "query-name", "id": id})));
    }
    peer.send(&line(oob("query-yank", json!({}), "late")));
    peer.stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(peer.stream.read(&mut [0; 1]).is_err(), "read on, although eight wait");
    peer.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    drop(node);
    // And now the loop turns again: the others are answered in their order.
    let mut ids = Vec::new();
    let (start, mut late) = (Instant::now(), None);
    while ids.len() < 20 || late.is_none() {
        assert!(start.elapsed() < Duration::from_secs(20), "{ids:?}");
        rig.turn(Duration::from_millis(10));
        peer.stream.set_nonblocking(true).unwrap();
        while let Some(reply) = peer.next() {
            match reply["id"].as_i64() {
                Some(id) => ids.push(id),
                None => late = Some(reply),
            }
        }
    }
    assert_eq!(ids, (0..20).collect::<Vec<_>>());
    assert_eq!(late, Some(json!({"return": [], "id": "late"})));
}

#[test]
fn a_client_with_a_thread_gets_events_passes_descriptors_and_goes() {
    let mut rig = Rig::new();
    let mut peer = rig.connect();
    let enable = json!({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}});
    assert_eq!(rig.ask(&mut peer, enable), json!({"return": {}}));
    let turns = |rig: &mut Rig, peer: &mut Peer| {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < Duration::from_secs(20));
            rig.turn(Duration::from_millis(10));
            if let Some(message) = peer.next() {
                return message;
            }
        }
    };
    let pipe = Pipe::new();
    let request = json!({"execute": "getfd", "arguments": {"fdname": "p"}});
    peer.send_fds(format!("{request}\n").as_bytes(), &[pipe.fd()]);
    assert_eq!(turns(&mut rig, &mut peer), json!({"return": {}}));
    // With a space, long before the request, as QEMU's Python client sends them.
    peer.send_fds(b" ", &[pipe.fd()]);
    std::thread::sleep(Duration::from_millis(50));
    peer.send(format!("{request}\n").as_bytes());
    assert_eq!(turns(&mut rig, &mut peer), json!({"return": {}}));
    rig.vm.powerdown();
    assert_eq!(name(&turns(&mut rig, &mut peer)), "POWERDOWN");
    // A request, and gone: it is run, and the monitor is free again.
    peer.send(b"{\"execute\": \"closefd\", \"arguments\": {\"fdname\": \"p\"}}\n");
    drop(peer);
    let start = Instant::now();
    while rig.server.monitors[0].client.is_some() {
        assert!(start.elapsed() < Duration::from_secs(20), "the client stays");
        rig.turn(Duration::from_millis(10));
    }
    let e = rig.server.monitors[0].conn.take_named("p").unwrap_err();
    assert_eq!(e.desc, "File descriptor named 'p' has not been found");
}
