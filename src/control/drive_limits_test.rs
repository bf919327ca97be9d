use super::*;
use crate::block::handle::HandleSpec;
use crate::block::stats::Kind;
use crate::block::throttle::{Limit, Which};
use crate::control::vm::{Settings, Vm};
use serde_json::json;

fn take(v: Value) -> Result<(DriveLimits, Map<String, Value>)> {
    let mut map = v.as_object().cloned().unwrap();
    let limits = DriveLimits::take(&mut map)?;
    Ok((limits, map))
}

#[test]
fn a_table_and_dotted_names_are_the_same() {
    for args in [
        json!({"id": "d", "throttling": {"iops-total": 7, "iops-total-max": 9, "group": "g"}}),
        json!({"id": "d", "throttling.iops-total": 7, "throttling.iops-total-max": 9, "throttling.group": "g"}),
    ] {
        let (limits, rest) = take(args).unwrap();
        assert_eq!(rest.keys().collect::<Vec<_>>(), ["id"]);
        let handle = Handle::new(None, HandleSpec { name: "d".into(), ..HandleSpec::default() });
        limits.apply(&handle, |_| None);
        let group = handle.throttled().unwrap().group().clone();
        assert_eq!(group.name, "g");
        assert_eq!(group.limits().get(Which::OpsTotal), Limit { avg: 7, max: 9, length: 1 });
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (args, want) in [
        (json!({"throttling.iops": 7}), "Parameter 'throttling.iops' is unexpected"),
        (json!({"throttling.iops-total-max": 7}), "bps_max/iops_max require corresponding bps/iops values"),
        (json!({"stats-intervals": [0]}), "Invalid interval length: 0"),
        (json!({"stats-intervals.0": "x"}), "The specification of stats-intervals is invalid"),
    ] {
        assert_eq!(take(args).err().unwrap().desc, want);
    }
}

#[test]
fn statistics_are_kept_by_interval() {
    let args = json!({"stats-intervals": [60, 3600], "stats-account-failed": false});
    let handle = Handle::new(None, HandleSpec::default());
    take(args).unwrap().0.apply(&handle, |_| None);
    assert_eq!(handle.stats.account(), (true, false));
    let start = handle.stats.clock();
    handle.stats.done(Kind::Read, 512, start, true);
    handle.stats.done(Kind::Write, 512, start, false);
    let timed = handle.stats.timed();
    assert_eq!(timed.iter().map(|t| t.0).collect::<Vec<_>>(), [60, 3600]);
    assert!(timed[0].1[0].max > 0 && timed[0].1[0].max == timed[1].1[0].max);
    assert_eq!(timed[0].1[1].max, 0, "a failed one does not count");
}

#[test]
fn a_drive_copies_what_it_reads() {
    let dir = crate::block::testing::Scratch::new("drive-cor");
    let mut vm = Vm::new(Settings::default()).unwrap();
    let path = dir.file("a", 65536);
    let args = json!({"if": "none", "id": "d", "file": path, "format": "raw", "copy-on-read": true,
                      "throttling.bps-total": 5000});
    vm.add_drive(args.as_object().cloned().unwrap()).unwrap();
    let handle = vm.drives.find("d").unwrap().handle.clone();
    let node = handle.node().unwrap();
    assert_eq!((node.driver.name(), node.options().implicit), ("copy-on-read", true));
    assert_eq!(node.skip_implicit().driver.name(), "raw");
    assert_eq!(handle.throttled().unwrap().group().name, "d");
    let args = json!({"if": "none", "id": "r", "file": path, "format": "raw", "copy-on-read": true,
                      "read-only": true, "file.locking": "off"});
    let e = vm.add_drive(args.as_object().cloned().unwrap()).unwrap_err();
    assert!(e.desc.contains("unexpected"), "{e}");
    handle.throttle(None);
    vm.graph.detach(&handle);
    assert_eq!(vm.graph.nodes().count(), 0);
}

#[test]
fn names_with_a_protocol_and_json_names() {
    let dir = crate::block::testing::Scratch::new("drive-names");
    let mut vm = Vm::new(Settings::default()).unwrap();
    let path = dir.file("a", 65536);
    let raw =
        format!(r#"json:{{"driver":"raw","offset":512,"file.driver":"file","file.filename":"{path}"}}"#);
    let protocol = format!(r#"json:{{"driver":"file","filename":"{path}"}}"#);
    for (n, (file, format, want)) in [
        (path.clone(), Some("raw"), vec!["raw", "file"]),
        (format!("file:{path}"), Some("raw"), vec!["raw", "file"]),
        ("null-co://".into(), Some("raw"), vec!["raw", "null-co"]),
        // The name says it all.
        (raw.clone(), None, vec!["raw", "file"]),
        (raw, Some("raw"), vec!["raw", "file"]),
        (protocol, Some("raw"), vec!["raw", "file"]),
    ]
    .into_iter()
    .enumerate()
    {
        let mut args = json!({"if": "none", "id": format!("d{n}"), "file": file, "read-only": true});
        if let Some(format) = format {
            args["format"] = format.into();
        }
        vm.add_drive(args.as_object().cloned().unwrap()).unwrap();
        let mut node = vm.drives.find(&format!("d{n}")).unwrap().handle.node();
        let mut seen = Vec::new();
        while let Some(n) = node {
            seen.push(n.driver.name());
            node = n.driver.edges().first().and_then(|e| e.node());
        }
        assert_eq!(seen, want, "{file}");
    }
    for (file, want) in [
        ("foo:bar", "Unknown protocol 'foo'"),
        ("null-co://x", "The only allowed filename for this driver is 'null-co://'"),
        ("json:[]", "Invalid JSON object given"),
    ] {
        let args = json!({"if": "none", "id": "bad", "file": file, "format": "raw"});
        assert_eq!(vm.add_drive(args.as_object().cloned().unwrap()).unwrap_err().desc, want);
    }
}
