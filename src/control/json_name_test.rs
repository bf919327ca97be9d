use super::*;
use serde_json::json;

#[test]
fn names_with_points_are_nested() {
    for (flat, want) in [
        (json!({"driver": "raw", "file": {"driver": "file", "filename": "x.y"}}), None),
        (
            json!({"driver": "raw", "file.driver": "file", "file.filename": "x.y"}),
            Some(json!({"driver": "raw", "file": {"driver": "file", "filename": "x.y"}})),
        ),
        (
            json!({"file": {"driver": "file"}, "file.filename": "x", "file.a": {"b.c": 1}}),
            Some(json!({"file": {"driver": "file", "filename": "x", "a": {"b": {"c": 1}}}})),
        ),
        (
            json!({"children.1.driver": "b", "children.0": {"driver": "a"}, "vote": 2}),
            Some(json!({"children": [{"driver": "a"}, {"driver": "b"}], "vote": 2})),
        ),
        (json!({"a": {"0": 1, "x": 2}, "b": {"1": 1}, "c": {}}), None),
        (json!([1]), None),
    ] {
        assert_eq!(nested(flat.clone()).unwrap(), want.unwrap_or(flat));
    }
    for bad in [json!({"a": 1, "a.b": 2}), json!({"a.b": 2, "a": 1}), json!({"a": {"b": 1}, "a.b": 1})] {
        assert_eq!(nested(bad).unwrap_err().desc, "Cannot mix scalar and non-scalar keys");
    }
}

#[test]
fn deep_nesting_is_an_error() {
    let deep = |n: usize| json!({ format!("a{}", ".a".repeat(n)): 1 });
    assert_eq!(nested(deep(1 << 20)).unwrap_err().desc, "the options are nested more than 600 deep");
    nested(deep(599)).unwrap();
}

#[test]
fn what_qemu_leaves_out_is_added() {
    let name =
        json!({"encrypt.key-secret": "s", "driver": "qcow2", "file": {"driver": "file", "filename": "x"}});
    let file = json!({"driver": "qcow2", "file": {"driver": "file", "filename": "x"}});
    assert_eq!(nested(json!({"driver": "qcow2", "file.filename": "x"})).unwrap(), file);
    assert_eq!(nested(json!({"filename": "x"})).unwrap(), json!({"filename": "x"}), "no format is guessed");
    let want = json!({"format": "luks", "key-secret": "s"});
    assert_eq!(nested(json!({"driver": "raw", "file": name})).unwrap()["file"]["encrypt"], want);
}
