//! The command line.
//!
//! Owns: the options and the text of `--help`. Never: acts on them. Threads: main. Locks: none.

use log::LevelFilter;
use std::ffi::OsString;
use std::path::PathBuf;

/// What the user wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Run the VM that the file describes.
    Run(PathBuf),
    /// Only say whether the file is right.
    Check(PathBuf),
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// `--help-qmp`, of one command or of all.
    HelpQmp(Option<String>),
}

/// The command line, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Args {
    /// What to do.
    pub action: Action,
    /// `--set KEY=VALUE`, in order.
    pub sets: Vec<String>,
    /// How much to log.
    pub log: LevelFilter,
}

/// The text of `--help`.
pub const HELP: &str = "\
Usage: minivmm [OPTION]... CONFIG.toml
Runs the virtual machine that CONFIG.toml describes ('-': standard input).

  --check            only check CONFIG.toml and what it names; change nothing
  --set KEY=VALUE    override a key, in TOML: --set 'machine.name=\"vm7\"'
                     elements of arrays by index, id or node-name:
                     --set 'drive.0.file=\"disk7.qcow2\"'
  --log LEVEL        off, error, warn (default), info, debug or trace;
                     also by the environment variable MINIVMM_LOG
  -v                 as --log info; -vv debug, -vvv trace
  --help-qmp [NAME]  describe the QMP commands, or one of them
  --help             show this text
  --version          show the version

Exit status: 0 when the guest, a client or a signal ended the machine, 1 for an
error, 2N+1 when the guest wrote N to an isa-debug-exit.
";

impl Args {
    /// Reads the arguments that follow the program's name; `log` is the environment's MINIVMM_LOG.
    /// The error is a line for the user.
    pub fn parse(args: impl IntoIterator<Item = OsString>, log: Option<OsString>) -> Result<Args, String> {
        let mut args = args.into_iter();
        let (mut sets, mut check, mut file) = (Vec::new(), false, None);
        let mut level = match log {
            Some(word) => parse_level(&word.to_string_lossy()).map_err(|e| format!("MINIVMM_LOG: {e}"))?,
            None => LevelFilter::Warn,
        };
        let mut operands = false;
        let done = |action, level| Ok(Args { action, sets: Vec::new(), log: level });
        while let Some(arg) = args.next() {
            let word = arg.to_str().unwrap_or("");
            if operands || word == "-" || !arg.as_encoded_bytes().starts_with(b"-") {
                if file.replace(PathBuf::from(&arg)).is_some() {
                    return Err(format!("one configuration only: what is '{}'?", arg.display()));
                }
                continue;
            }
            let (name, mut value) = match word.split_once('=') {
                Some((name, value)) if name.starts_with("--") => (name, Some(value.to_string())),
                _ => (word, None),
            };
            let mut take = |value: &mut Option<String>| -> Result<String, String> {
                match value.take() {
                    Some(v) => Ok(v),
                    None => match args.next().map(OsString::into_string) {
                        Some(Ok(v)) => Ok(v),
                        Some(Err(_)) => Err(format!("the value of '{name}' is not UTF-8")),
                        None => Err(format!("'{name}' needs a value (see --help)")),
                    },
                }
            };
            match name {
                "--" => operands = true,
                "--help" | "-h" => return done(Action::Help, level),
                "--version" | "-V" => return done(Action::Version, level),
                "--help-qmp" => {
                    let command = value.or_else(|| args.next().map(|a| a.to_string_lossy().into_owned()));
                    return done(Action::HelpQmp(command), level);
                }
                "--check" => check = true,
                "--set" => sets.push(take(&mut value)?),
                "--log" => level = parse_level(&take(&mut value)?)?,
                "-v" | "--verbose" => level = LevelFilter::Info,
                "-vv" => level = LevelFilter::Debug,
                "-vvv" => level = LevelFilter::Trace,
                _ => return Err(format!("unknown option '{}' (see --help)", arg.display())),
            }
            if value.is_some() {
                return Err(format!("'{name}' takes no value"));
            }
        }
        let Some(file) = file else { return Err("which configuration? (see --help)".into()) };
        let action = if check { Action::Check(file) } else { Action::Run(file) };
        Ok(Args { action, sets, log: level })
    }
}

fn parse_level(word: &str) -> Result<LevelFilter, String> {
    word.parse().map_err(|_| format!("unknown level '{word}' (off, error, warn, info, debug or trace)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Args, String> {
        Args::parse(words.iter().map(OsString::from), None)
    }

    #[test]
    fn options_and_their_errors() {
        let args = parse(&["--set", "a=1", "-vv", "c.toml", "--set=b=2", "--check"]).unwrap();
        assert_eq!(args.action, Action::Check("c.toml".into()));
        assert_eq!((args.sets, args.log), (vec!["a=1".into(), "b=2".into()], LevelFilter::Debug));
        assert_eq!(parse(&["-"]).unwrap().action, Action::Run("-".into()));
        assert_eq!(parse(&["--", "-x"]).unwrap().action, Action::Run("-x".into()));
        assert_eq!(parse(&["--help-qmp", "stop"]).unwrap().action, Action::HelpQmp(Some("stop".into())));
        assert_eq!(parse(&["--help-qmp"]).unwrap().action, Action::HelpQmp(None));
        for (bad, want) in [
            (&["--nope"][..], "unknown option '--nope'"),
            (&["-x", "c"], "unknown option '-x'"),
            (&["a", "b"], "one configuration only"),
            (&[], "which configuration?"),
            (&["--set"], "'--set' needs a value"),
            (&["--log", "loud", "c"], "unknown level 'loud'"),
            (&["--check=yes", "c"], "'--check' takes no value"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(want), "{bad:?}: {error}");
        }
        let env = Args::parse(["c".into()], Some("info".into())).unwrap();
        assert_eq!(env.log, LevelFilter::Info);
        assert!(Args::parse(["c".into()], Some("much".into())).unwrap_err().starts_with("MINIVMM_LOG"));
    }
}
