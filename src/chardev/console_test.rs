use super::*;

fn keys(keys: &mut Keys, input: &[u8]) -> (Vec<u8>, Vec<Escape>) {
    let (mut bytes, mut escapes) = (Vec::new(), Vec::new());
    keys.take(input, &mut bytes, |e| escapes.push(e));
    (bytes, escapes)
}

#[test]
fn escapes_are_taken_out_and_the_rest_passes() {
    let mut k = Keys::default();
    assert_eq!(keys(&mut k, b"ab\x01xcd"), (b"abcd".to_vec(), vec![Escape::Quit]));
    assert_eq!(keys(&mut k, b"\x01\x01x\x01h"), (b"\x01x".to_vec(), vec![Escape::Help]));
    assert_eq!(keys(&mut k, b"\x01c\x01zq"), (b"q".to_vec(), vec![]));
}

#[test]
fn an_escape_may_come_in_two_reads() {
    let mut k = Keys::default();
    assert_eq!(keys(&mut k, b"a\x01"), (b"a".to_vec(), vec![]));
    assert_eq!(keys(&mut k, b"x"), (vec![], vec![Escape::Quit]));
    assert_eq!(keys(&mut k, b"x"), (b"x".to_vec(), vec![]));
}
