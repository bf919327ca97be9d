use crate::qmp::cmd_blockdev::tests::Qmp;
use serde_json::json;

#[test]
fn objects_come_and_go() {
    let mut q = Qmp::new();
    for (args, want) in [
        (json!({"id": "a"}), "Parameter 'qom-type' is missing"),
        (json!({"qom-type": "secret", "data": "x"}), "Parameter 'id' is missing"),
        (json!({"qom-type": "device", "id": "a"}), "Parameter 'qom-type' does not accept value 'device'"),
        (json!({"qom-type": "secret", "id": "1x", "data": ""}), "Parameter 'id' expects an identifier"),
        (json!({"qom-type": "secret", "id": "", "data": ""}), "Parameter 'id' expects an identifier"),
        (json!({"qom-type": "secret", "id": "a", "bogus": 1}), "Parameter 'bogus' is unexpected"),
        (json!({"qom-type": "secret", "id": "a"}), "Either 'file' or 'data' must be provided"),
        (
            json!({"qom-type": "secret", "id": "a", "data": "x", "format": "hex"}),
            "Parameter 'format' does not accept value 'hex'",
        ),
        (
            json!({"qom-type": "iothread", "id": "a", "poll-max-ns": -1}),
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
    ] {
        assert_eq!(q.err("object-add", args), want);
    }
    q.ok("object-add", json!({"qom-type": "secret", "id": "a", "data": "x"}));
    assert_eq!(
        q.err("object-add", json!({"qom-type": "iothread", "id": "a"})),
        "attempt to add duplicate property 'a' to object (type 'container')"
    );
    q.ok("object-del", json!({"id": "a"}));
    assert_eq!(q.err("object-del", json!({"id": "a"})), "object 'a' not found");
    assert_eq!(q.err("object-del", json!({})), "Parameter 'id' is missing");
}

#[test]
fn properties_may_stand_in_props_as_they_once_did() {
    let mut q = Qmp::new();
    q.ok("object-add", json!({"qom-type": "secret", "id": "a", "props": {"data": "x"}}));
    let twice = json!({"qom-type": "secret", "id": "b", "data": "x", "props": {"data": "y"}});
    assert_eq!(q.err("object-add", twice), "Parameter 'props.data' is unexpected");
    let list = json!({"qom-type": "secret", "id": "b", "props": []});
    assert_eq!(q.err("object-add", list), "Invalid parameter type for 'props', expected: dict");
}

#[test]
fn iothreads_are_listed_with_their_threads() {
    let mut q = Qmp::new();
    assert_eq!(q.ok("query-iothreads", json!({})), json!([]));
    q.ok("object-add", json!({"qom-type": "iothread", "id": "a"}));
    q.ok(
        "object-add",
        json!({"qom-type": "iothread", "id": "b", "poll-max-ns": 0, "poll-grow": 3, "poll-shrink": 4}),
    );
    let list = q.ok("query-iothreads", json!({}));
    let tid = |n: usize| list[n]["thread-id"].as_u64().unwrap();
    for n in 0..2 {
        assert!(std::path::Path::new(&format!("/proc/self/task/{}", tid(n))).exists());
    }
    assert_eq!(
        list,
        json!([
            {"id": "a", "thread-id": tid(0), "poll-max-ns": 32768, "poll-grow": 0, "poll-shrink": 0, "aio-max-batch": 0},
            {"id": "b", "thread-id": tid(1), "poll-max-ns": 0, "poll-grow": 3, "poll-shrink": 4, "aio-max-batch": 0},
        ])
    );
}
