use super::*;
use crate::control::vm::Settings;
use crate::qapi::{Path, Wire};
use serde_json::{Value, json};

fn add(vm: &mut Vm, args: Value) -> Result<()> {
    vm.add_object(ObjectOptions::take(args, &Path::Root)?)
}

#[test]
fn an_object_is_found_by_its_type() {
    let mut vm = Vm::new(Settings::default()).unwrap();
    add(&mut vm, json!({"qom-type": "secret", "id": "s", "data": "abc"})).unwrap();
    add(&mut vm, json!({"qom-type": "iothread", "id": "t", "poll-max-ns": 7})).unwrap();
    assert_eq!(vm.objects.secret("s").unwrap().bytes(), b"abc");
    assert_eq!(vm.objects.secret("x").err().unwrap().desc, "No secret with id 'x'");
    assert_eq!(vm.objects.secret("t").err().unwrap().desc, "Object with id 't' is not a secret");
    let thread = vm.objects.iothread("t").unwrap();
    assert_eq!(thread.poll_max(), Duration::from_nanos(7));
    let lost = vm.objects.iothread("s").unwrap_err();
    assert_eq!((lost.class, &*lost.desc), (Class::DeviceNotFound, "Device 's' not found"));
}

#[test]
fn what_is_used_stays() {
    let mut vm = Vm::new(Settings::default()).unwrap();
    add(&mut vm, json!({"qom-type": "iothread", "id": "t"})).unwrap();
    let user = vm.objects.iothread("t").unwrap();
    assert_eq!(vm.delete_object("t").unwrap_err().desc, "object 't' is in use, can not be deleted");
    drop(user);
    vm.delete_object("t").unwrap();
    assert_eq!(vm.delete_object("t").unwrap_err().desc, "object 't' not found");
}
