use super::*;
use crate::block::graph::Graph;
use crate::block::open;
use crate::block::testing::Scratch;
use serde_json::json;

#[test]
fn every_driver_that_can_be_named_can_be_opened() {
    let dir = Scratch::new("formats");
    let path = dir.file("a", 1 << 20);
    for word in BlockdevDriver::WORDS {
        let options = match *word {
            "file" | "host_device" => json!({"driver": word, "filename": path}),
            "null-co" | "null-aio" => json!({"driver": word}),
            "nbd" => json!({"driver": word, "server": {"type": "unix", "path": "x"}}),
            "throttle" => json!({"driver": word, "throttle-group": "g", "file": "x"}),
            "blkverify" => json!({"driver": word, "raw": "x", "test": "y"}),
            "quorum" => json!({"driver": word, "vote-threshold": 1, "children": ["x"]}),
            "blkdebug" => json!({"driver": word, "image": "x"}),
            _ => json!({"driver": word, "file": {"driver": "file", "filename": path}}),
        };
        let options = BlockdevOptions::take(options, &qapi::Path::Root).unwrap();
        assert_eq!(plan(options).unwrap().driver.name(), *word);
    }
    let mut fds = FdSets::new();
    let objects = Objects::default();
    let env = Formats::new(&mut fds, &objects);
    for layer in FORMATS {
        assert!(BlockdevDriver::WORDS.contains(&layer.name));
        let file = Child::New(Box::new(env.protocol("file", &path).unwrap()));
        assert_eq!(env.layer(layer.name, file).unwrap().driver.name(), layer.name);
    }
    assert!(env.layer("file", Child::Node("x".into())).is_none());
}

#[test]
fn json_names_describe_a_node() {
    let dir = Scratch::new("formats-json");
    let path = dir.file("a", 1 << 20);
    let mut fds = FdSets::new();
    let objects = Objects::default();
    let env = Formats::new(&mut fds, &objects);
    let mut graph = Graph::new();
    let name = format!(
        "json:{{\"driver\": \"raw\", \"size\": 512, \"file\": {{\"driver\": \"file\", \"filename\": \"{path}\"}}}}"
    );
    let node = open::open(&mut graph, &env, open::from_file_name(&env, &name).unwrap()).unwrap();
    assert_eq!(node.len(), 512);
    let bad = open::from_file_name(&env, "json:{\"driver\": \"raw\"}").err().unwrap();
    assert_eq!(bad.desc, "Parameter 'file' is missing");
}

#[test]
fn the_drivers_without_storage() {
    let mut fds = FdSets::new();
    let objects = Objects::default();
    let env = Formats::new(&mut fds, &objects);
    let mut graph = Graph::new();
    let mut open_it = |v: serde_json::Value| {
        let options = BlockdevOptions::take(v, &qapi::Path::Root)?;
        open::open(&mut graph, &env, plan(options)?)
    };
    let node = open_it(json!({"driver": "null-co", "size": 4096, "read-zeroes": true})).unwrap();
    let mut data = [7u8; 512];
    node.read(0, &mut crate::sys::iov::IovMut::from_slice(&mut data)).unwrap();
    assert_eq!((node.len(), data), (4096, [0; 512]));
    let e = open_it(json!({"driver": "null-co", "size": -1})).err().unwrap();
    assert_eq!(e.desc, "size is invalid");
}

#[test]
fn negative_windows_are_refused() {
    let options = json!({"driver": "raw", "file": "x", "offset": -1});
    let options = BlockdevOptions::take(options, &qapi::Path::Root).unwrap();
    let e = plan(options).err().unwrap();
    assert_eq!(e.desc, "Value '-1' is out of range for parameter 'offset'");
}

#[test]
fn names_with_the_prefix_of_a_driver_for_tests() {
    let dir = Scratch::new("formats-prefix");
    let (a, b) = (dir.file("a", 4096), dir.file("b", 4096));
    let rules = dir.path("rules");
    std::fs::write(&rules, "[inject-error]\nevent = \"none\"\niotype = \"write\"\n").unwrap();
    let mut fds = FdSets::new();
    let objects = Objects::default();
    let env = Formats::new(&mut fds, &objects);
    let mut graph = Graph::new();
    for (name, driver, fails) in [
        (format!("blkdebug::{a}"), "blkdebug", false),
        (format!("blkdebug:{rules}:{a}"), "blkdebug", true),
        (format!("blkverify:{a}:{b}"), "blkverify", false),
        (format!("blkverify:{a}:blkdebug:{rules}:{b}"), "blkverify", true),
    ] {
        let node = open::open(&mut graph, &env, open::from_file_name(&env, &name).unwrap()).unwrap();
        assert_eq!((node.driver.name(), node.len()), (driver, 4096), "{name}");
        assert_eq!(node.driver.filename(), name);
        let user = graph.attach(Some(node), Default::default()).unwrap();
        let done =
            user.write(0, &crate::sys::iov::Iov::from_slice(&[0; 512]), crate::block::driver::Flags::NONE);
        assert_eq!(done.is_err(), fails, "{name}");
        graph.detach(&user);
    }
    for (name, want) in [
        ("blkdebug:x", "blkdebug requires both config file and image path"),
        ("blkverify:x", "blkverify requires raw copy and original image path"),
        ("blkdebug::nope:x", "Unknown protocol 'nope'"),
    ] {
        assert_eq!(named(name).unwrap_err().desc, want);
    }
}
