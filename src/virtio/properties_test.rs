use super::*;
use serde_json::json;

const TABLE: &[Property] = &[
    ("serial", Type::Text),
    ("num-queues", Type::Number(16)),
    ("max-bytes", Type::Number(64)),
    ("csum", Type::Bool),
    ("write-cache", Type::OnOffAuto),
    ("logical_block_size", Type::Size32),
    ("werror", Type::Word(&["ignore", "report"])),
];

fn parse(args: Value) -> Result<Properties> {
    Properties::parse("virtio-x-pci", &[TABLE], args.as_object().unwrap())
}

fn error(args: Value) -> String {
    parse(args).unwrap_err().desc
}

#[test]
fn values_come_as_their_type_or_as_text() {
    for (number, switch, size) in
        [(json!(4), json!(true), json!(4096)), (json!("4"), json!("on"), json!("4k"))]
    {
        let p = parse(json!({"driver": 1, "num-queues": number, "csum": switch, "logical_block_size": size,
            "serial": 12, "write-cache": "auto", "max-bytes": u64::MAX}))
        .unwrap();
        assert_eq!(p.number::<u16>("num-queues"), Some(4));
        assert_eq!(p.number::<u64>("max-bytes"), Some(u64::MAX));
        assert_eq!(p.switch("csum"), Some(true));
        assert_eq!(p.number::<u32>("logical_block_size"), Some(4096));
        assert_eq!(p.text("serial"), Some("12"));
        assert_eq!(p.text("write-cache"), Some("auto"));
        assert_eq!(p.text("werror"), None);
    }
    assert_eq!(parse(json!({"num-queues": "0x10"})).unwrap().number::<u16>("num-queues"), Some(16));
}

#[test]
fn what_is_wrong_gets_the_message_of_qemu() {
    assert_eq!(error(json!({"nope": 1})), "Property 'virtio-x-pci.nope' not found");
    assert_eq!(error(json!({"num-queues": "many"})), "Parameter 'num-queues' expects uint64");
    assert_eq!(error(json!({"num-queues": -1})), "Parameter 'num-queues' expects uint64");
    assert_eq!(error(json!({"num-queues": "+1"})), "Parameter 'num-queues' expects uint64");
    assert_eq!(error(json!({"num-queues": 1.5})), "Parameter 'num-queues' expects uint64");
    assert_eq!(error(json!({"num-queues": 65536})), "Parameter 'num-queues' expects uint16_t");
    assert_eq!(error(json!({"csum": 1})), "Parameter 'csum' expects 'on' or 'off'");
    assert_eq!(error(json!({"logical_block_size": "k"})), "Parameter 'logical_block_size' expects a size");
    assert_eq!(error(json!({"werror": "stop"})), "Parameter 'werror' does not accept value 'stop'");
    assert_eq!(error(json!({"serial": {}})), "Invalid parameter type for 'serial', expected: string");
    assert!(error(json!({"logical_block_size": "4G"})).contains("maximum: 4294967295"));
    assert_eq!(error(json!({"logical_block_size": "é"})), "Parameter 'logical_block_size' expects a size");
}
