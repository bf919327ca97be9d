use super::*;
use serde_json::json;

/// All messages of `input`, fed in pieces of the given lengths (the last for ever).
fn parse_in(parser: &mut Parser, input: &[u8], pieces: &[usize]) -> Vec<Message> {
    let (mut out, mut at, mut n) = (Vec::new(), 0, 0);
    while at < input.len() {
        let len = pieces[n.min(pieces.len() - 1)].clamp(1, input.len() - at);
        n += 1;
        let piece = &input[at..at + len];
        let mut done = 0;
        while done < piece.len() {
            let (used, message) = parser.feed(&piece[done..]);
            assert!(used > 0 || message.is_some(), "no progress at {}", at + done);
            assert!(message.is_some() || done + used == piece.len(), "stopped without a message");
            done += used;
            out.extend(message);
        }
        at += len;
    }
    out
}

fn parse(input: &[u8]) -> Vec<Message> {
    let whole = parse_in(&mut Parser::new(), input, &[usize::MAX]);
    assert_eq!(parse_in(&mut Parser::new(), input, &[1]), whole, "byte by byte it is something else");
    for at in 1..input.len().min(200) {
        assert_eq!(parse_in(&mut Parser::new(), input, &[at, usize::MAX]), whole, "split at {at}");
    }
    whole
}

/// The texts of the errors; `V` stands for a value.
fn outcome(input: impl AsRef<[u8]>) -> Vec<String> {
    parse(input.as_ref())
        .into_iter()
        .map(|m| match m {
            Ok(_) => "V".to_string(),
            Err(e) => e.strip_prefix("JSON parse error, ").unwrap_or(&e).to_string(),
        })
        .collect()
}

fn one(input: impl AsRef<[u8]>) -> Value {
    let list = parse(input.as_ref());
    assert_eq!(list.len(), 1, "{list:?}");
    list.into_iter().next().unwrap().unwrap()
}

#[test]
fn parser_errors() {
    let table: &[(&str, &[&str])] = &[
        (r#"{"execute"}"#, &["missing : in object pair"]),
        (r#"{"a" "b"}"#, &["missing : in object pair"]),
        (r#"{"execute":}"#, &["expecting value"]),
        (r#"{"a":1,}"#, &["expecting value"]),
        ("[1,]", &["expecting value"]),
        ("[,]", &["expecting value"]),
        ("]", &["expecting value"]),
        ("}", &["expecting value"]),
        (",", &["expecting value"]),
        (":", &["expecting value"]),
        ("{1:2}", &["key is not a string in object"]),
        ("{[1]:2}", &["key is not a string in object"]),
        ("{{}:2}", &["key is not a string in object"]),
        ("{tru:2}", &["invalid keyword 'tru'"]),
        (r#"{"a":1 "b":2}"#, &["expected separator in dict"]),
        ("[1 2]", &["expected separator in list"]),
        ("[[1]}", &["expected separator in list"]),
        (r#"{"a":1,"a":2}"#, &["duplicate key"]),
        (r#"{"a":1,"a":}"#, &["expecting value"]),
        (r#"{"a":1,"a":2}{}"#, &["duplicate key", "V"]),
        ("tru\n", &["invalid keyword 'tru'"]),
        ("nul ", &["invalid keyword 'nul'"]),
        ("abc,", &["invalid keyword 'abc'", "expecting value"]),
        (r#"{"a":]}"#, &["expecting value", "expecting value"]),
        (r#"{"a":[}1]"#, &["expecting value"]),
        (r#"[{]}"#, &["expecting value"]),
        // The first error is the one that is told.
        (r#"{"a":tru,1}"#, &["invalid keyword 'tru'"]),
    ];
    for (input, want) in table {
        assert_eq!(outcome(input), *want, "{input}");
        let then = format!("{input}\n{{}}");
        assert_eq!(outcome(&then).last().unwrap(), "V", "after {input}");
    }
}

#[test]
fn lexer_errors_and_recovery() {
    let table: &[(&[u8], &[&str])] = &[
        (b"@\n", &["stray '@'"]),
        (b"#comment\n", &["stray '#'"]),
        (b"abc(\n", &["invalid keyword 'abc'", "stray '('"]),
        (b"\x01\n", &["stray '\x01'"]),
        (b"\0\n", &["stray ''"]),
        (b"\"ab\0\n", &["stray '\"ab'"]),
        (b"\"unterminated\n", &["stray '\"unterminated\n'"]),
        // The newline was the stray byte: the next line is skipped up to something structural.
        (b"\"unterminated\n+1\n", &["stray '\"unterminated\n'"]),
        (b"\"unterminated\n+1 {}\n", &["stray '\"unterminated\n'", "V"]),
        (b"01\n", &["stray '01'"]),
        (b"1.\n1e\n", &["stray '1.\n'"]),
        (b"1.\n\n-\n", &["stray '1.\n'", "stray '-\n'"]),
        (b"1e\n\n", &["stray '1e\n'"]),
        (b"1e+x\n", &["stray '1e+x'"]),
        (b"+1\n", &["stray '+'"]),
        (b"{\"execute\":\"query-status\"@}\n", &["stray '@'", "expecting value"]),
        (b"0x10\n", &["V", "invalid keyword 'x'", "V"]),
        (b"%d\n", &["stray '%'"]),
        (b"{\"a\":TRUE}\n", &["stray 'T'", "expecting value"]),
        (b"{\"a\":1} garbage?", &["V", "invalid keyword 'garbage'", "stray '?'"]),
        (b"\xff", &["stray '\u{fffd}'"]),
        (b"\xff\xff\n", &["stray '\u{fffd}'", "stray '\u{fffd}'"]),
        (b"{\"execute\":\"query-st\xff", &["stray '\"query-st\u{fffd}'"]),
        (b"{\"a\":[1,{\xff\n{}", &["stray '\u{fffd}'", "V"]),
        (b"@ \t\"x\" [1]", &["stray '@'", "V"]),
        (b"\x7f\n", &["stray '\x7f'"]),
        (b"[\"\xfe\"]\n", &["stray '\"\u{fffd}'", "expecting value"]),
    ];
    for (input, want) in table {
        assert_eq!(outcome(input), *want, "{:?}", String::from_utf8_lossy(input));
    }
}

#[test]
fn strings() {
    let table: &[(&[u8], &str)] = &[
        (b"'it\\'s'", "it's"),
        (b"'say \"hi\"'", "say \"hi\""),
        (b"\"it's\"", "it's"),
        (b"\"\\u00e9\\u20AC\\ud83d\\ude00\"", "\u{e9}\u{20ac}\u{1f600}"),
        ("\"\u{e9}\u{20ac}\u{1f600}\"".as_bytes(), "\u{e9}\u{20ac}\u{1f600}"),
        (b"\"\\b\\f\\n\\r\\t\\/\\\\\\\"\"", "\u{8}\u{c}\n\r\t/\\\""),
        (b"\"\\u0000\"", "\0"),
        (b"\"a\xc0\x80b\"", "a\0b"),
        (b"\"%s\"", "%s"),
        (b"''", ""),
    ];
    for (input, want) in table {
        assert_eq!(one(input), json!(want), "{:?}", String::from_utf8_lossy(input));
    }
    let errors: &[(&[u8], &str)] = &[
        (b"\"\\ud83d\"", "\\ud83d is not a valid Unicode character"),
        (b"\"\\ude00\\ud83d\"", "\\ude00 is not a valid Unicode character"),
        (b"\"\\ud83d\\u0041\"", "\\ud83d is not a valid Unicode character"),
        (b"\"\\u12\"", "\\u12\" is not a valid Unicode character"),
        (b"\"\\u\"", "\\u\" is not a valid Unicode character"),
        (b"\"\\u12 xyz\"", "\\u12 x is not a valid Unicode character"),
        (b"\"\\u+123\"", "\\u+123 is not a valid Unicode character"),
        (b"\"\\uffff\"", "\\uffff is not a valid Unicode character"),
        (b"\"\\ufdd0\"", "\\ufdd0 is not a valid Unicode character"),
        (b"\"\\ud83f\\udffe\"", "\\ud83f\\udffe is not a valid Unicode character"),
        (b"\"\\x41\"", "invalid escape sequence in string"),
        (b"\"\xc3(\"", "invalid UTF-8 sequence in string"),
        (b"\"\xc3\"", "invalid UTF-8 sequence in string"),
        (b"\"\xc0\x81\"", "invalid UTF-8 sequence in string"),
        (b"\"\xed\xa0\x80\"", "invalid UTF-8 sequence in string"),
        (b"\"\xef\xbf\xbf\"", "invalid UTF-8 sequence in string"),
        (b"\"\xf8\x80\x80\x80\x80\"", "invalid UTF-8 sequence in string"),
    ];
    for (input, want) in errors {
        assert_eq!(outcome(input), [*want], "{:?}", String::from_utf8_lossy(input));
    }
}

#[test]
fn numbers() {
    let table = [
        ("0", json!(0)),
        ("-0", json!(0)),
        ("9223372036854775807", json!(i64::MAX)),
        ("-9223372036854775808", json!(i64::MIN)),
        ("9223372036854775808", json!(1u64 << 63)),
        ("18446744073709551615", json!(u64::MAX)),
        ("18446744073709551616", json!(18446744073709551616.0)),
        ("-9223372036854775809", json!(-9223372036854775809.0)),
        ("1.0", json!(1.0)),
        ("-1.5e3", json!(-1500.0)),
        ("1E+2", json!(100.0)),
        ("1e999", json!(f64::MAX)),
        ("-1e999", json!(f64::MIN)),
    ];
    for (input, want) in table {
        let got = one(format!("{input} "));
        assert_eq!(got, want, "{input}");
        assert_eq!((got.is_i64(), got.is_u64()), (want.is_i64(), want.is_u64()), "{input}");
    }
}

#[test]
fn every_byte_of_a_long_string_is_looked_at() {
    for at in 0..100 {
        let with = |byte: u8| {
            let mut text = [b'x'; 100];
            text[at] = byte;
            [b"\"", &text[..], b"\"\n[]"].concat()
        };
        assert_eq!(one(&with(b' ')[..102]).as_str().unwrap().find(' '), Some(at));
        assert_eq!(outcome(with(b'\n'))[0].len(), "stray '\"\n'".len() + at, "at {at}");
        assert_eq!(outcome(with(b'"')).len(), 3 + usize::from(at < 99), "at {at}");
        assert_eq!(outcome(with(0xc3)), ["invalid UTF-8 sequence in string", "V"], "at {at}");
        let mut out = Vec::new();
        write_string(&format!("{}\u{7f}{}", "x".repeat(at), "x".repeat(99 - at)), &mut out);
        assert_eq!(out, format!("\"{}\\u007F{}\"", "x".repeat(at), "x".repeat(99 - at)).into_bytes());
    }
}

#[test]
fn messages_need_no_framing() {
    let list = parse(b"{\"a\":1}{\"b\":[{}, [],\n null]}\t5 \"x\"true\r\n");
    let want = [json!({"a": 1}), json!({"b": [{}, [], null]}), json!(5), json!("x"), json!(true)];
    assert_eq!(list.into_iter().map(Result::unwrap).collect::<Vec<_>>(), want);
    assert!(parse(b"  \r\n\t ").is_empty());
    // A number is over only when something follows.
    assert!(parse(b"5").is_empty());
}

#[test]
fn a_message_ends_where_its_bracket_closes() {
    let mut parser = Parser::new();
    let (used, message) = parser.feed(b"{} {}");
    assert_eq!((used, message), (2, Some(Ok(json!({})))));
}

#[test]
fn limits() {
    let deep = |n: usize| [vec![b'['; n], vec![b']'; n], b"{}".to_vec()].concat();
    let whole = |input: &[u8]| parse_in(&mut Parser::new(), input, &[usize::MAX]);
    assert_eq!(whole(&deep(1024)).len(), 2);
    assert!(whole(&deep(1024)).iter().all(Result::is_ok));
    assert_eq!(whole(&vec![b'['; 1024]), []);
    let list = whole(&vec![b'['; 1025]);
    assert_eq!(list, [Err("JSON nesting depth limit exceeded".to_string())]);

    let limited = |input: &str| {
        let mut outcomes: Vec<_> = [1, 3, usize::MAX]
            .iter()
            .map(|n| parse_in(&mut Parser::with_limits(16, 6), input.as_bytes(), &[*n]))
            .collect();
        assert!(outcomes.windows(2).all(|w| w[0] == w[1]), "{outcomes:?}");
        outcomes.pop().unwrap()
    };
    assert!(limited("[1,2] ").iter().all(Result::is_ok));
    assert_eq!(limited("[1,2,3"), []);
    assert_eq!(limited("[1,2,3,4]")[0], Err("JSON token count limit exceeded".into()));
    assert_eq!(limited("'0123456789abcdef0123'")[0], Err("JSON token size limit exceeded".into()));
    assert_eq!(limited("['01234567','89']")[0], Err("JSON token size limit exceeded".into()));
}

#[test]
fn long_input_takes_linear_time() {
    // 2 MiB in one string, byte by byte: quadratic would take hours.
    let mut parser = Parser::new();
    assert_eq!(parser.feed(b"\""), (1, None));
    for _ in 0..2 << 20 {
        assert_eq!(parser.feed(b"x"), (1, None));
    }
    let (_, message) = parser.feed(b"\"");
    assert_eq!(message.unwrap().unwrap().as_str().unwrap().len(), 2 << 20);
    assert!(parser.token.capacity() <= 4096, "the buffer is kept");
}

fn written(value: Value, pretty: bool) -> String {
    let mut out = Vec::new();
    write_line(&value, pretty, &mut out);
    String::from_utf8(out).unwrap()
}

#[test]
fn output() {
    let v = json!({"a": [1, -2, 1.5, 1.0, 1e300, u64::MAX], "b": {}, "c": [], "d": null, "e": true});
    assert_eq!(
        written(v, false),
        "{\"a\": [1, -2, 1.5, 1, 1e+300, 18446744073709551615], \"b\": {}, \"c\": [], \"d\": null, \"e\": true}\r\n"
    );
    assert_eq!(
        written(json!("\u{8}\u{c}\n\r\t/\\\"\0\u{1f}\u{7f}\u{e9}\u{20ac}\u{1f600}'"), false),
        "\"\\b\\f\\n\\r\\t/\\\\\\\"\\u0000\\u001F\\u007F\\u00E9\\u20AC\\uD83D\\uDE00'\"\r\n"
    );
    assert_eq!(
        written(json!({"a": [1, {"b": 2}], "c": {}}), true),
        "{\r\n    \"a\": [\r\n        1,\r\n        {\r\n            \"b\": 2\r\n        }\r\n    ],\r\n    \"c\": {\r\n    }\r\n}\r\n"
    );
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn random_value(rng: &mut u64, depth: u32) -> Value {
    let string = |rng: &mut u64| -> String {
        let pool = ['a', '"', '\'', '\\', '\n', '\0', '\u{7f}', '\u{e9}', '\u{20ac}', '\u{1f600}', '%', '/'];
        let len = if random(rng).is_multiple_of(16) { 150 } else { 6 };
        // Long ones are plain for the most part.
        let pool: &[char] = if len > 6 && random(rng).is_multiple_of(2) { &['x'] } else { &pool };
        (0..random(rng) % len).map(|_| pool[random(rng) as usize % pool.len()]).collect()
    };
    match random(rng) % if depth == 0 { 6 } else { 8 } {
        0 => Value::Null,
        1 => json!(random(rng).is_multiple_of(2)),
        2 => json!(random(rng) as i64),
        3 => json!(random(rng)),
        4 => json!((random(rng) as i64) as f64 / 1024.0),
        5 => json!(string(rng)),
        6 => (0..random(rng) % 4).map(|_| random_value(rng, depth - 1)).collect(),
        _ => {
            Value::Object((0..random(rng) % 4).map(|_| (string(rng), random_value(rng, depth - 1))).collect())
        }
    }
}

/// Doubles that are whole come back as integers; compare what they are worth.
fn normal(v: &Value) -> Value {
    match v {
        Value::Number(n) => match n.as_f64() {
            Some(d) if n.is_f64() && d.fract() == 0.0 && d.abs() < 1e16 => json!(d as i64),
            _ => v.clone(),
        },
        Value::Array(list) => list.iter().map(normal).collect(),
        Value::Object(map) => Value::Object(map.iter().map(|(k, v)| (k.clone(), normal(v))).collect()),
        _ => v.clone(),
    }
}

#[test]
fn what_is_written_is_read_again() {
    let mut rng = 0x9e37_79b9_7f4a_7c15;
    for round in 0..2000 {
        let value = random_value(&mut rng, 4);
        let mut out = Vec::new();
        write_line(&value, round % 2 == 0, &mut out);
        assert!(out.is_ascii(), "round {round}");
        let back = parse_in(&mut Parser::new(), &out, &[1 + random(&mut rng) as usize % 7]);
        assert_eq!(back.len(), 1, "round {round}: {}", String::from_utf8_lossy(&out));
        assert_eq!(normal(back[0].as_ref().unwrap()), normal(&value), "round {round}");
    }
}

/// Random bytes made of what JSON is made of: whatever the pieces, the outcome is the same, every
/// byte is read, and after 0xFF and a newline a request is understood.
#[test]
fn nonsense_in_any_pieces_is_the_same_nonsense() {
    let pool: &[&[u8]] = &[
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b"\"",
        b"'",
        b"\\",
        b"\\u00e9",
        b"\\ud83d",
        b"\"a\"",
        b"'b'",
        b"1",
        b"0",
        b"-",
        b".",
        b"e",
        b"E",
        b"true",
        b"nul",
        b"x",
        b" ",
        b"\n",
        b"\t",
        b"\xff",
        b"\xfe",
        b"\xc3",
        b"\xc0\x80",
        b"\xe2\x82\xac",
        b"\0",
        b"@",
        b"%",
        b"\"k\":",
        b"{\"execute\":\"x\"}",
    ];
    let mut rng = 0x1234_5678_9abc_def1;
    for round in 0..3000 {
        let input: Vec<u8> = (0..random(&mut rng) % 24)
            .flat_map(|_| pool[random(&mut rng) as usize % pool.len()].iter().copied())
            .chain(b"\xff\n{\"id\":1}".iter().copied())
            .collect();
        let whole = parse_in(&mut Parser::new(), &input, &[usize::MAX]);
        for at in 1..input.len() {
            let split = parse_in(&mut Parser::new(), &input, &[at, usize::MAX]);
            assert_eq!(split, whole, "round {round}, split at {at}: {:?}", String::from_utf8_lossy(&input));
        }
        assert_eq!(parse_in(&mut Parser::new(), &input, &[1]), whole, "round {round}, byte by byte");
        assert_eq!(whole.last(), Some(&Ok(json!({"id": 1}))), "round {round}");
    }
}
