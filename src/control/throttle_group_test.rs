use super::*;
use crate::control::objects::ObjectOptions;
use crate::control::vm::{Settings, Vm};
use crate::qapi::{Path, Wire};
use serde_json::{Value, json};

fn add(vm: &mut Vm, args: Value) -> Result<()> {
    vm.add_object(ObjectOptions::take(args, &Path::Root)?)
}

#[test]
fn limits_come_from_either_place() {
    let mut vm = Vm::new(Settings::default()).unwrap();
    let limits =
        json!({ "iops-total": 7, "iops-total-max": 9, "iops-total-max-length": 3, "iops-size": 4096 });
    add(&mut vm, json!({ "qom-type": "throttle-group", "id": "a", "limits": limits })).unwrap();
    let l = vm.objects.throttle_group("a").unwrap().limits();
    assert_eq!(l.get(Which::OpsTotal), Limit { avg: 7, max: 9, length: 3 });
    assert_eq!(l.iops_size, 4096);
    add(&mut vm, json!({ "qom-type": "throttle-group", "id": "b", "x-bps-read": 5 })).unwrap();
    let l = vm.objects.throttle_group("b").unwrap().limits();
    assert_eq!(l.get(Which::BpsRead), Limit { avg: 5, max: 0, length: 1 });
    assert!(vm.objects.throttle_group("c").is_none());
}

#[test]
fn the_texts_are_qemus() {
    let mut vm = Vm::new(Settings::default()).unwrap();
    for (props, want) in [
        (
            json!({ "limits": { "iops-total": -1 } }),
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        (json!({ "x-iops-total": -1 }), "Property values cannot be negative"),
        (
            json!({ "limits": { "iops-total": 5, "iops-total-max": 9,
                    "iops-total-max-length": 5000000000i64 } }),
            "iops-total-max-length value must be in the range [0, 4294967295]",
        ),
        (
            json!({ "limits": { "iops-total-max": 9 } }),
            "bps_max/iops_max require corresponding bps/iops values",
        ),
    ] {
        let mut args = props;
        args["qom-type"] = "throttle-group".into();
        args["id"] = "g".into();
        assert_eq!(add(&mut vm, args).unwrap_err().desc, want);
    }
}
