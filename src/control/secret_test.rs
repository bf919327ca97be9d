use super::*;
use crate::block::testing::Scratch;

fn load(data: Option<&str>, file: Option<&str>, format: Option<QCryptoSecretFormat>) -> Result<Vec<u8>> {
    let text = |s: Option<&str>| s.map(str::to_string);
    let options = SecretProperties { data: text(data), file: text(file), format, keyid: None, iv: None };
    Secret::load(&options, &Objects::default()).map(|s| s.bytes().to_vec())
}

fn error(r: Result<Vec<u8>>) -> String {
    r.map(|bytes| panic!("accepted: {bytes:?}")).unwrap_err().desc
}

#[test]
fn a_secret_comes_from_the_request_or_a_file() {
    let dir = Scratch::new("secret");
    let path = dir.path("key");
    std::fs::write(&path, b"a\0b\n").unwrap();
    assert_eq!(load(Some("abc"), None, None).unwrap(), b"abc");
    assert_eq!(load(Some(""), None, None).unwrap(), b"");
    assert_eq!(load(None, Some(&path), None).unwrap(), b"a\0b\n");
    std::fs::write(&path, "YWJj\nZA==\n").unwrap();
    assert_eq!(load(None, Some(&path), Some(QCryptoSecretFormat::Base64)).unwrap(), b"abcd");
    assert_eq!(error(load(None, None, None)), "Either 'file' or 'data' must be provided");
    assert_eq!(error(load(Some("x"), Some("y"), None)), "'file' and 'data' are mutually exclusive");
}

#[test]
fn files_that_are_no_secret_are_refused_at_once() {
    let dir = Scratch::new("secret-bad");
    let (fifo, long) = (dir.path("fifo"), dir.file("long", MAX_FILE + 1));
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let folder = dir.path("");
    for (path, why) in [
        ("/nope".to_string(), "Failed to open file “/nope”: No such file or directory".to_string()),
        (folder.clone(), format!("Error reading file “{folder}”: Is a directory")),
        (fifo.clone(), format!("Error reading file “{fifo}”: Not a regular file")),
        ("/dev/zero".into(), "Error reading file “/dev/zero”: Not a regular file".into()),
        (long.clone(), format!("Error reading file “{long}”: File too large")),
    ] {
        assert_eq!(error(load(None, Some(&path), None)), format!("Unable to read {path}: {why}"));
    }
}

#[test]
fn base64_is_decoded_whole_or_not_at_all() {
    for (text, bytes) in [
        ("", &b""[..]),
        ("YQ==", b"a"),
        ("YWI=", b"ab"),
        ("YWJj", b"abc"),
        ("YW\r\nJj\n", b"abc"),
        ("+/+/", &[0xfb, 0xff, 0xbf]),
    ] {
        assert_eq!(base64(text.as_bytes()).unwrap(), bytes, "{text}");
    }
    for text in ["!!!", "YW Jj", "=YWJ=", "YWJj\0", "Y=Jj"] {
        assert_eq!(error(base64(text.as_bytes())), "Base64 data contains invalid characters", "{text}");
    }
    for text in ["Y", "YW", "YWJ", "YWJjY===", "====", "="] {
        assert_eq!(error(base64(text.as_bytes())), "Base64 data is not complete", "{text}");
    }
}
