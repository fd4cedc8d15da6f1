//! From a checked spec and a user to what execve(2) takes.

use std::collections::BTreeMap;
use std::ffi::CString;

use crate::spec::Spec;
use crate::users::Identity;

/// A program, ready to be executed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Program {
    /// Paths to try in turn.
    pub(crate) candidates: Vec<CString>,
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    /// Nobody asked for that folder; it is only the user's home.
    pub(crate) cwd_is_home: bool,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} has {bytes} bytes, where Linux takes {MAX_STRING_BYTES} in one string: \
     pass it through stdin or a file"
)]
pub(crate) struct StringTooLong {
    what: String,
    bytes: usize,
}

/// MAX_ARG_STRLEN of linux/binfmts.h, which counts the NUL at the end.
const MAX_STRING_BYTES: usize = 32 * 4096 - 1;
/// More folders than that are no PATH. Bounds what one call can make us hold.
const MAX_PATH_FOLDERS: usize = 1024;
const MAX_PATH_BYTES: usize = 4096;
const MAX_NAME_BYTES: usize = 255;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What the terminal at the other end most likely is, or is like.
const TERM: &str = "xterm-256color";

// === impl Program ===

impl Program {
    pub(crate) fn new(spec: &Spec, identity: &Identity) -> Result<Self, StringTooLong> {
        let argv = match &spec.shell_line {
            // `Identity` holds no NUL; one could only truncate.
            Some(line) => vec![
                CString::new(identity.shell.as_str()).unwrap_or_default(),
                c"-c".to_owned(),
                line.clone(),
            ],
            None => spec.argv.clone(),
        };
        for (index, argument) in argv.iter().enumerate() {
            check_length(|| format!("argument {index}"), argument.count_bytes())?;
        }
        let variables = variables(spec, identity);
        let mut env = Vec::with_capacity(variables.len());
        for (name, value) in &variables {
            let variable = [*name, *value].join(&b'=');
            let what = || format!("the variable {}", crate::status::excerpt(name));
            check_length(what, variable.len())?;
            // `Spec` and `Identity` hold no NUL; one could only truncate.
            env.push(CString::new(variable).unwrap_or_default());
        }
        let path = variables.get(&b"PATH"[..]).copied().unwrap_or_default();
        let home = CString::new(identity.home.as_str()).unwrap_or_default();
        Ok(Self {
            candidates: candidates(name(&argv), path),
            argv,
            env,
            cwd_is_home: spec.cwd.is_none(),
            cwd: spec.cwd.clone().unwrap_or(home),
        })
    }

    pub(crate) fn name(&self) -> &[u8] {
        name(&self.argv)
    }
}

fn name(argv: &[CString]) -> &[u8] {
    argv.first().map_or(&b""[..], |name| name.as_bytes())
}

/// The base environment with the caller's variables on top; of two with one
/// name the last counts.
fn variables<'a>(spec: &'a Spec, identity: &'a Identity) -> BTreeMap<&'a [u8], &'a [u8]> {
    let base = [
        ("PATH", DEFAULT_PATH),
        ("HOME", &identity.home),
        ("USER", &identity.name),
        ("LOGNAME", &identity.name),
        ("SHELL", &identity.shell),
        ("LANG", "C.UTF-8"),
    ];
    let of_terminal = spec.terminal.map(|_| ("TERM", TERM));
    let base = base
        .into_iter()
        .chain(of_terminal)
        .map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    let own = spec
        .env
        .iter()
        .map(|(name, value)| (name.as_slice(), value.as_slice()));
    base.chain(own).collect()
}

/// As execvp(3): a name with a slash is a path; another is looked for in each
/// folder of PATH, where an empty one is the working directory.
fn candidates(name: &[u8], path: &[u8]) -> Vec<CString> {
    let own = || CString::new(name).into_iter().collect();
    if name.contains(&b'/') || name.len() > MAX_NAME_BYTES {
        return own();
    }
    let folders = path.split(|byte| *byte == b':').take(MAX_PATH_FOLDERS);
    let fitting = folders.filter(|folder| folder.len() + name.len() + 1 < MAX_PATH_BYTES);
    fitting
        .filter_map(|folder| match folder {
            b"" => CString::new(name).ok(),
            folder => CString::new([folder, name].join(&b'/')).ok(),
        })
        .collect()
}

fn check_length(what: impl FnOnce() -> String, bytes: usize) -> Result<(), StringTooLong> {
    if bytes > MAX_STRING_BYTES {
        Err(StringTooLong {
            what: what(),
            bytes,
        })
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::users::Users;

    fn program(argv: &[&str], env: &[(&str, &str)]) -> Program {
        of(&Spec {
            argv: argv
                .iter()
                .map(|argument| CString::new(*argument).unwrap())
                .collect(),
            env: env
                .iter()
                .map(|(name, value)| ((*name).into(), (*value).into()))
                .collect(),
            ..Spec::default()
        })
    }

    fn of(spec: &Spec) -> Program {
        let nobody_known = Users::read(std::path::Path::new("/nonexistent"));
        Program::new(spec, &nobody_known.find("0").unwrap()).unwrap()
    }

    #[test]
    fn a_line_is_for_the_users_shell() {
        let spec = Spec {
            shell_line: Some(c"a | b".to_owned()),
            ..Spec::default()
        };
        let line = of(&spec);
        let expected = [c"/bin/sh".to_owned(), c"-c".to_owned(), c"a | b".to_owned()];
        assert_eq!(line.argv, expected);
        assert_eq!(line.candidates, [c"/bin/sh".to_owned()]);
    }

    #[test]
    fn a_terminal_has_a_name_unless_the_caller_gives_another() {
        let mut spec = Spec {
            argv: vec![c"a".to_owned()],
            terminal: Some(Default::default()),
            ..Spec::default()
        };
        assert!(of(&spec).env.contains(&c"TERM=xterm-256color".to_owned()));
        spec.env.push((b"TERM".to_vec(), b"vt100".to_vec()));
        assert!(of(&spec).env.contains(&c"TERM=vt100".to_owned()));
    }

    #[test]
    fn a_path_is_not_looked_up() {
        assert_eq!(program(&["./a"], &[]).candidates, [c"./a".to_owned()]);
    }

    #[test]
    fn a_name_is_looked_up_in_its_own_path() {
        let found = program(&["a"], &[("PATH", "/x::/y")]).candidates;
        assert_eq!(
            found,
            [c"/x/a".to_owned(), c"a".to_owned(), c"/y/a".to_owned()]
        );
        assert_eq!(program(&["a"], &[]).candidates.len(), 6);
    }

    #[test]
    fn the_callers_variables_win_and_the_last_of_them() {
        let env = program(&["a"], &[("LANG", "x"), ("A", "1"), ("A", "2")]).env;
        assert!(env.contains(&c"LANG=x".to_owned()) && env.contains(&c"A=2".to_owned()));
        assert!(env.contains(&c"HOME=/root".to_owned()) && env.contains(&c"USER=root".to_owned()));
        assert_eq!(env.len(), 7);
    }
}
