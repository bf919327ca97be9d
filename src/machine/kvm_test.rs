use super::*;

#[test]
fn a_missing_or_foreign_device_is_named_with_the_remedy() {
    let e = open_path("/dev/there-is-no-kvm").err().unwrap().desc;
    assert!(e.starts_with("/dev/there-is-no-kvm: No such file or directory: load the kvm_"), "{e}");
    let e = open_path("/dev/null").err().unwrap().desc;
    assert!(e.starts_with("/dev/null: not a KVM device"), "{e}");
    assert!(!e.contains('\n') && e.contains("accel"), "{e}");
}
