//! Bytes to JSON values, one message at a time, in QEMU's dialect; and values to bytes.
//!
//! Owns: the lexer, the parser, the serializer; limits of depth, size and count; every text of a
//! syntax error and what is skipped after one. Never: sockets, commands. Threads: control. Locks:
//! none.
//!
//! Three stages, all of them incremental, so that input is looked at once, in whatever pieces it
//! comes: bytes → tokens (a state machine), tokens → value (a stack), and a count of brackets that
//! says when a message is over. A syntax error among the tokens is remembered and reported when
//! the brackets balance; a byte that no token can have at its place drops the message at once.

use serde_json::{Map, Number, Value};
use std::io::Write;
use std::mem;

/// The most bytes of token text in one message, and in one token.
const MAX_SIZE: usize = 64 << 20;
/// The most tokens in one message.
const MAX_TOKENS: usize = 2 << 20;
/// The most brackets open at once.
const MAX_DEPTH: i32 = 1024;

/// Takes a stream of JSON texts apart.
#[derive(Debug)]
pub struct Parser {
    state: State,
    /// The text of the token that is being read.
    token: Vec<u8>,
    /// Open brackets of each kind; below 0 when closed too often.
    braces: i32,
    squares: i32,
    /// Bytes and number of the message's tokens so far.
    size: usize,
    tokens: usize,
    build: Build,
    max_size: usize,
    max_tokens: usize,
}

/// A message, or what is wrong with it (without the prefix that all but the limits have).
pub type Message = Result<Value, String>;

/// Where the lexer is: QEMU's own states, because errors show where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    /// After a byte that cannot be: skip up to something that may begin a message.
    Recovery,
    /// In a string, with its quote.
    String(u8),
    /// After the string's backslash.
    Escape(u8),
    Minus,
    Zero,
    Digits,
    /// After the point.
    Point,
    Fraction,
    /// After the e.
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// What a byte leads to.
enum Step {
    /// Part of the token; the state after it.
    To(State),
    /// The token is over with this byte.
    Last(Token),
    /// The token was over before this byte.
    Before(Token),
    /// Nothing: a blank.
    Blank,
    /// Back to the start, where the same byte is looked at again.
    Restart,
    /// No token has such a byte here.
    Stray,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Open(u8),
    Close(u8),
    Colon,
    Comma,
    String,
    Integer,
    Float,
    Keyword,
}

fn step(state: State, b: u8) -> Step {
    use State::*;
    match (state, b) {
        (Start, b'"' | b'\'') => Step::To(String(b)),
        (Start, b'{' | b'[') => Step::Last(Token::Open(b)),
        (Start, b'}' | b']') => Step::Last(Token::Close(b)),
        (Start, b':') => Step::Last(Token::Colon),
        (Start, b',') => Step::Last(Token::Comma),
        (Start, b'-') => Step::To(Minus),
        (Start | Minus, b'0') => Step::To(Zero),
        (Start | Minus, b'1'..=b'9') => Step::To(Digits),
        (Start, b'a'..=b'z') => Step::To(Keyword),
        (Start, b' ' | b'\t' | b'\r' | b'\n') => Step::Blank,
        (Recovery, b'\t') => Step::Blank,
        (Recovery, 0..=0x1f | 0xfe..=0xff | b'[' | b']' | b'{' | b'}' | b':' | b',') => Step::Restart,
        (Recovery, _) => Step::Blank,
        (String(quote), _) if b == quote => Step::Last(Token::String),
        (String(quote), b'\\') => Step::To(Escape(quote)),
        (String(quote) | Escape(quote), 0x20..=0xfd) => Step::To(String(quote)),
        (Zero, b'0'..=b'9') => Step::Stray,
        (Zero | Digits, b'.') => Step::To(Point),
        (Zero | Digits | Fraction, b'e' | b'E') => Step::To(Exponent),
        (Digits, b'0'..=b'9') => Step::To(Digits),
        (Point | Fraction, b'0'..=b'9') => Step::To(Fraction),
        (Exponent, b'+' | b'-') => Step::To(ExponentSign),
        (Exponent | ExponentSign | ExponentDigits, b'0'..=b'9') => Step::To(ExponentDigits),
        (Zero | Digits, _) => Step::Before(Token::Integer),
        (Fraction | ExponentDigits, _) => Step::Before(Token::Float),
        (Keyword, b'a'..=b'z') => Step::To(Keyword),
        (Keyword, _) => Step::Before(Token::Keyword),
        _ => Step::Stray,
    }
}

impl Default for Parser {
    fn default() -> Parser {
        Parser::new()
    }
}

impl Parser {
    /// At the beginning of a stream.
    pub fn new() -> Parser {
        Parser {
            state: State::Start,
            token: Vec::new(),
            braces: 0,
            squares: 0,
            size: 0,
            tokens: 0,
            build: Build::default(),
            max_size: MAX_SIZE,
            max_tokens: MAX_TOKENS,
        }
    }

    #[cfg(test)]
    fn with_limits(max_size: usize, max_tokens: usize) -> Parser {
        Parser { max_size, max_tokens, ..Parser::new() }
    }

    /// Reads `input` up to the end of the first message or error in it. Returns how many bytes
    /// that took, and the message or the error's text; none when all of `input` was read and the
    /// message is not over.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Option<Message>) {
        let mut at = 0;
        while let Some(&b) = input.get(at) {
            let message = match step(self.state, b) {
                Step::Blank => {
                    at += 1;
                    None
                }
                Step::Restart => {
                    self.state = State::Start;
                    None
                }
                Step::To(next) => {
                    let from = at;
                    at += 1;
                    if let State::String(quote) = next {
                        // The run up to the next byte that means something.
                        let room = self.max_size.saturating_sub(self.token.len()).min(input.len() - at);
                        at += run(&input[at..at + room], |b| {
                            (0x20..=0xfd).contains(&b) & (b != quote) & (b != b'\\')
                        });
                    }
                    self.token.extend_from_slice(&input[from..at]);
                    self.state = next;
                    if self.token.len() > self.max_size {
                        self.state = State::Start;
                        self.give_up("JSON token size limit exceeded".into())
                    } else {
                        None
                    }
                }
                Step::Last(token) => {
                    at += 1;
                    self.token.push(b);
                    self.accept(token)
                }
                Step::Before(token) => self.accept(token),
                Step::Stray => {
                    at += 1;
                    self.token.push(b);
                    self.state = State::Recovery;
                    // Shown as a C string is: up to the first zero byte.
                    let text = self.token.split(|b| *b == 0).next().unwrap_or(&[]);
                    let text =
                        format!("JSON parse error, stray '{}'", std::string::String::from_utf8_lossy(text));
                    self.give_up(text)
                }
            };
            if message.is_some() {
                return (at, message);
            }
        }
        (at, None)
    }

    /// Drops what was read of the message.
    fn give_up(&mut self, text: String) -> Option<Message> {
        self.reset();
        Some(Err(text))
    }

    fn reset(&mut self) -> Build {
        self.token.clear();
        // One long string must not keep its memory for ever.
        self.token.shrink_to(4096);
        (self.braces, self.squares, self.size, self.tokens) = (0, 0, 0, 0);
        mem::take(&mut self.build)
    }

    /// A token is complete: its text is in `self.token`.
    fn accept(&mut self, token: Token) -> Option<Message> {
        self.state = State::Start;
        match token {
            Token::Open(b'{') => self.braces += 1,
            Token::Open(_) => self.squares += 1,
            Token::Close(b'}') => self.braces -= 1,
            Token::Close(_) => self.squares -= 1,
            _ => {}
        }
        self.size += self.token.len();
        self.tokens += 1;
        if self.size >= self.max_size {
            return self.give_up("JSON token size limit exceeded".into());
        }
        if self.tokens > self.max_tokens {
            return self.give_up("JSON token count limit exceeded".into());
        }
        if self.braces + self.squares > MAX_DEPTH {
            return self.give_up("JSON nesting depth limit exceeded".into());
        }
        self.build.token(token, &self.token);
        self.token.clear();
        if (self.braces > 0 || self.squares > 0) && self.braces >= 0 && self.squares >= 0 {
            return None;
        }
        let build = self.reset();
        Some(match (build.error, build.done) {
            (Some(text), _) => Err(format!("JSON parse error, {text}")),
            (None, Some(value)) => Ok(value),
            // Balanced brackets without an error are a value; kept for the compiler.
            (None, None) => Err("JSON parse error, expecting value".into()),
        })
    }
}

/// What the grammar allows next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Want {
    /// A value, or a key.
    #[default]
    Value,
    /// The same, or the end: just after the opening bracket.
    ValueOrEnd,
    Colon,
    CommaOrEnd,
}

#[derive(Debug)]
enum Frame {
    Array(Vec<Value>),
    /// With the key whose value is being read.
    Object(Map<String, Value>, Option<String>),
}

/// Tokens to a value.
#[derive(Debug, Default)]
struct Build {
    want: Want,
    stack: Vec<Frame>,
    done: Option<Value>,
    /// The first error. After it nothing is built.
    error: Option<String>,
}

impl Build {
    fn fail(&mut self, text: impl Into<String>) {
        self.error = Some(text.into());
        self.stack = Vec::new();
        self.done = None;
    }

    fn token(&mut self, token: Token, text: &[u8]) {
        if self.error.is_some() {
            return;
        }
        let object = matches!(self.stack.last(), Some(Frame::Object(..)));
        let end = Token::Close(if object { b'}' } else { b']' });
        match (self.want, token) {
            (Want::ValueOrEnd | Want::CommaOrEnd, _) if token == end => match self.stack.pop() {
                Some(Frame::Array(list)) => self.value(Value::Array(list)),
                Some(Frame::Object(map, _)) => self.value(Value::Object(map)),
                None => self.fail("expecting value"),
            },
            (Want::Value | Want::ValueOrEnd, _) => self.start(token, text),
            (Want::Colon, Token::Colon) => self.want = Want::Value,
            (Want::Colon, _) => self.fail("missing : in object pair"),
            (Want::CommaOrEnd, Token::Comma) => self.want = Want::Value,
            (Want::CommaOrEnd, _) if object => self.fail("expected separator in dict"),
            (Want::CommaOrEnd, _) => self.fail("expected separator in list"),
        }
    }

    /// A token where a value may begin.
    fn start(&mut self, token: Token, text: &[u8]) {
        let frame = match token {
            Token::Open(b'{') => Frame::Object(Map::new(), None),
            Token::Open(_) => Frame::Array(Vec::new()),
            Token::Close(_) | Token::Colon | Token::Comma => return self.fail("expecting value"),
            Token::String | Token::Integer | Token::Float | Token::Keyword => {
                let value = match token {
                    Token::String => string(text).map(Value::String),
                    Token::Keyword => keyword(text),
                    _ => Ok(number(text)),
                };
                return match value {
                    Ok(value) => self.value(value),
                    Err(text) => self.fail(text),
                };
            }
        };
        self.stack.push(frame);
        self.want = Want::ValueOrEnd;
    }

    /// A value is complete.
    fn value(&mut self, value: Value) {
        self.want = Want::CommaOrEnd;
        match self.stack.last_mut() {
            None => self.done = Some(value),
            Some(Frame::Array(list)) => list.push(value),
            Some(Frame::Object(_, key @ None)) => match value {
                Value::String(name) => {
                    *key = Some(name);
                    self.want = Want::Colon;
                }
                _ => self.fail("key is not a string in object"),
            },
            Some(Frame::Object(map, key)) => {
                if key.take().is_some_and(|name| map.insert(name, value).is_some()) {
                    self.fail("duplicate key");
                }
            }
        }
    }
}

/// How many of the first bytes are `plain`. In blocks, which the compiler makes vectors of.
fn run(bytes: &[u8], plain: impl Fn(u8) -> bool) -> usize {
    let blocks = bytes.chunks_exact(32).take_while(|block| block.iter().fold(true, |all, b| all & plain(*b)));
    let whole = 32 * blocks.count();
    whole + bytes[whole..].iter().take_while(|b| plain(**b)).count()
}

fn keyword(text: &[u8]) -> Result<Value, String> {
    match text {
        b"true" => Ok(Value::Bool(true)),
        b"false" => Ok(Value::Bool(false)),
        b"null" => Ok(Value::Null),
        _ => Err(format!("invalid keyword '{}'", String::from_utf8_lossy(text))),
    }
}

/// An integer if it is one of 64 bits, else a double; beyond the doubles the largest of them.
fn number(text: &[u8]) -> Value {
    // The lexer lets ASCII alone into numbers, of a form that f64 parses.
    let text = str::from_utf8(text).unwrap_or("0");
    if let Ok(n) = text.parse::<i64>() {
        return n.into();
    }
    if let Ok(n) = text.parse::<u64>() {
        return n.into();
    }
    let n = text.parse::<f64>().unwrap_or(0.0).clamp(f64::MIN, f64::MAX);
    Number::from_f64(n).map_or(Value::Null, Value::Number)
}

/// The contents of a string token: its quotes are still around it.
fn string(token: &[u8]) -> Result<String, String> {
    let text = &token[1..token.len() - 1];
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let plain = run(&text[at..], |b| b != b'\\');
        utf8(&text[at..at + plain], &mut out)?;
        at += plain;
        if at == text.len() {
            break;
        }
        // The lexer takes a backslash only with the byte after it.
        let escape = &text[at..];
        at += 2;
        out.push(match escape[1] {
            b @ (b'"' | b'\'' | b'\\' | b'/') => char::from(b),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let (c, len) = unicode(escape);
                at = at - 2 + len;
                c.ok_or_else(|| {
                    // What stands there, the closing quote included.
                    let shown = &token[token.len() - 1 - escape.len()..];
                    let shown = String::from_utf8_lossy(&shown[..len.min(shown.len())]);
                    format!("{shown} is not a valid Unicode character")
                })?
            }
            _ => return Err("invalid escape sequence in string".into()),
        });
    }
    Ok(out)
}

/// The character that `\uXXXX`, or two of them, stand for; and how many bytes they take.
fn unicode(escape: &[u8]) -> (Option<char>, usize) {
    let hex = |at: usize| -> Option<u32> {
        let mut n = 0;
        for i in at..at + 4 {
            n = n * 16 + char::from(*escape.get(i)?).to_digit(16)?;
        }
        Some(n)
    };
    let Some(first) = hex(2) else { return (None, 6) };
    if (0xd800..0xdc00).contains(&first)
        && escape[6..].starts_with(b"\\u")
        && let Some(second @ 0xdc00..0xe000) = hex(8)
    {
        let c = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
        return (char::from_u32(c).filter(is_character), 12);
    }
    (char::from_u32(first).filter(is_character), 6)
}

/// False for Unicode's noncharacters.
fn is_character(c: &char) -> bool {
    let c = u32::from(*c);
    !(0xfdd0..=0xfdef).contains(&c) && c & 0xfffe != 0xfffe
}

/// Appends UTF-8 text; the two bytes C0 80 are accepted as U+0000 ("modified UTF-8").
fn utf8(bytes: &[u8], out: &mut String) -> Result<(), String> {
    let mut rest = bytes;
    loop {
        let (good, bad) = match str::from_utf8(rest) {
            Ok(good) => (good, None),
            Err(e) => {
                let (good, bad) = rest.split_at(e.valid_up_to());
                (str::from_utf8(good).unwrap_or_default(), Some(bad))
            }
        };
        if !good.is_ascii() && !good.chars().all(|c| is_character(&c)) {
            return Err("invalid UTF-8 sequence in string".into());
        }
        out.push_str(good);
        match bad {
            None => return Ok(()),
            Some([0xc0, 0x80, after @ ..]) => {
                out.push('\0');
                rest = after;
            }
            Some(_) => return Err("invalid UTF-8 sequence in string".into()),
        }
    }
}

/// Appends `value` and CR LF. Pretty: over several lines, four spaces a level.
pub fn write_line(value: &Value, pretty: bool, out: &mut Vec<u8>) {
    write(value, pretty.then_some(0), out);
    out.extend_from_slice(b"\r\n");
}

/// Appends `value`; `indent` is the level of a pretty one.
fn write(value: &Value, indent: Option<usize>, out: &mut Vec<u8>) {
    let below = indent.map(|n| n + 1);
    let separate = |out: &mut Vec<u8>, first: bool| match below {
        Some(level) => {
            out.extend_from_slice(if first { b"" } else { b"," });
            new_line(level, out);
        }
        None => out.extend_from_slice(if first { b"" } else { b", " }),
    };
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(b) => out.extend_from_slice(if *b { b"true" } else { b"false" }),
        Value::Number(n) => {
            // Writing to a Vec cannot fail.
            let _ = write!(out, "{n}");
            // A whole double is written as QEMU's %.17g does: 1, not 1.0.
            if n.is_f64() && out.ends_with(b".0") {
                out.truncate(out.len() - 2);
            }
        }
        Value::String(s) => write_string(s, out),
        Value::Array(list) => {
            out.push(b'[');
            for (n, v) in list.iter().enumerate() {
                separate(out, n == 0);
                write(v, below, out);
            }
            if let Some(level) = indent {
                new_line(level, out);
            }
            out.push(b']');
        }
        Value::Object(map) => {
            out.push(b'{');
            for (n, (key, v)) in map.iter().enumerate() {
                separate(out, n == 0);
                write_string(key, out);
                out.extend_from_slice(b": ");
                write(v, below, out);
            }
            if let Some(level) = indent {
                new_line(level, out);
            }
            out.push(b'}');
        }
    }
}

fn new_line(level: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(b"\r\n");
    out.resize(out.len() + 4 * level, b' ');
}

/// In pure ASCII.
fn write_string(s: &str, out: &mut Vec<u8>) {
    let hex = |out: &mut Vec<u8>, unit: u16| {
        out.extend_from_slice(b"\\u");
        for shift in [12, 8, 4, 0] {
            out.push(b"0123456789ABCDEF"[usize::from(unit >> shift & 15)]);
        }
    };
    out.push(b'"');
    let mut rest = s;
    loop {
        let plain = run(rest.as_bytes(), |b| (0x20..0x7f).contains(&b) & (b != b'"') & (b != b'\\'));
        // All of these are ASCII, so they end at a character's boundary.
        let (plain, other) = rest.split_at(plain);
        out.extend_from_slice(plain.as_bytes());
        let mut chars = other.chars();
        let Some(c) = chars.next() else { break };
        match c {
            '"' => out.extend_from_slice(b"\\\""),
            '\\' => out.extend_from_slice(b"\\\\"),
            '\u{8}' => out.extend_from_slice(b"\\b"),
            '\u{c}' => out.extend_from_slice(b"\\f"),
            '\n' => out.extend_from_slice(b"\\n"),
            '\r' => out.extend_from_slice(b"\\r"),
            '\t' => out.extend_from_slice(b"\\t"),
            _ => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| hex(out, *unit)),
        }
        rest = chars.as_str();
    }
    out.push(b'"');
}

#[cfg(test)]
#[path = "wire_test.rs"]
mod tests;
