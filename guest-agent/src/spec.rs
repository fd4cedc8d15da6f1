//! What a caller asks Exec to run, checked before anything is done with it.

use std::ffi::CString;
use std::time::Duration;

use soulbox_proto::guest::v1::{EnvVar, ProcessSpec, ResourceLimits, TerminalSize};
use tonic_types::FieldViolation;

use crate::exec::Limits;

/// A [`ProcessSpec`] whose every field is known to be sound.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spec {
    /// Empty where there is a `shell_line`, and never else.
    pub(crate) argv: Vec<CString>,
    /// For the user's shell.
    pub(crate) shell_line: Option<CString>,
    /// Names and values; none has a NUL, and no name is empty or has a `=`.
    pub(crate) env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Absolute. None is the user's home.
    pub(crate) cwd: Option<CString>,
    pub(crate) user: String,
    pub(crate) timeout: Option<Duration>,
    pub(crate) limits: Vec<(libc::__rlimit_resource_t, libc::rlimit)>,
    pub(crate) stdin: bool,
    /// It has one instead of pipes.
    pub(crate) terminal: Option<TerminalSize>,
    pub(crate) nice: i32,
    pub(crate) cgroup: Option<Limits>,
    pub(crate) kill_on_disconnect: bool,
    pub(crate) tag: String,
    pub(crate) keep_output_bytes: u32,
}

/// Everything that is wrong with a request, field by field.
#[derive(Debug, Default)]
pub(crate) struct Violations(pub(crate) Vec<FieldViolation>);

/// A year: longer is a mistake in units.
const MAX_TIMEOUT: Duration = Duration::from_secs(366 * 24 * 60 * 60);
const MAX_TAG_BYTES: usize = 128;
const KEEP_OUTPUT_BYTES: u32 = 64 * 1024;
const MAX_KEEP_OUTPUT_BYTES: u32 = 16 * 1024 * 1024;
const NICE: std::ops::RangeInclusive<i32> = -20..=19;

// === impl Spec ===

impl TryFrom<ProcessSpec> for Spec {
    type Error = Violations;

    fn try_from(spec: ProcessSpec) -> Result<Self, Violations> {
        let mut violations = Violations::default();
        let (argv, shell_line) = check_command(spec.argv, spec.shell_line, &mut violations);
        let env = check_env(spec.env, &mut violations);
        let cwd = check_cwd(&spec.cwd, &mut violations);
        if spec.user.contains('\0') {
            violations.add("start.user", "holds a NUL byte");
        }
        let timeout = spec
            .timeout
            .and_then(|timeout| check_timeout(timeout, &mut violations));
        let limits = spec.limits.as_ref().map(limits_of).unwrap_or_default();
        if let Some(size) = spec.terminal {
            check_size("start.terminal", size, &mut violations);
        }
        if !NICE.contains(&spec.nice) {
            violations.add("start.nice", "must be -20 to 19");
        }
        let cgroup = spec.cgroup.as_ref();
        let cgroup = cgroup.and_then(|limits| Limits::check(limits, &mut violations));
        if spec.tag.len() > MAX_TAG_BYTES {
            let problem = format!("must have at most {MAX_TAG_BYTES} bytes");
            violations.add("start.tag", problem);
        }
        if spec.keep_output_bytes > MAX_KEEP_OUTPUT_BYTES {
            let problem = format!("must be at most {MAX_KEEP_OUTPUT_BYTES}");
            violations.add("start.keep_output_bytes", problem);
        }

        violations.into_result()?;
        Ok(Self {
            argv,
            shell_line,
            env,
            cwd,
            user: spec.user,
            timeout,
            limits,
            stdin: spec.stdin,
            terminal: spec.terminal,
            nice: spec.nice,
            cgroup,
            kill_on_disconnect: spec.kill_on_disconnect,
            tag: spec.tag,
            keep_output_bytes: match spec.keep_output_bytes {
                0 => KEEP_OUTPUT_BYTES,
                bytes => bytes,
            },
        })
    }
}

// === impl Violations ===

impl Violations {
    pub(crate) fn of(field: &str, description: &str) -> Self {
        Self(vec![FieldViolation::new(field, description)])
    }

    pub(crate) fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(FieldViolation::new(field, description));
    }

    pub(crate) fn into_result(self) -> Result<(), Self> {
        if self.0.is_empty() { Ok(()) } else { Err(self) }
    }
}

/// Checks a signal number that is to be sent.
pub(crate) fn check_signal(number: u32) -> Result<i32, Violations> {
    match i32::try_from(number) {
        Ok(number @ 1..=64) => Ok(number),
        _ => Err(Violations::of(
            "input.signal",
            "must be a Linux signal number, 1 to 64",
        )),
    }
}

/// Checks the size of a terminal.
pub(crate) fn check_size(field: &str, size: TerminalSize, violations: &mut Violations) {
    for (name, cells) in [("columns", size.columns), ("rows", size.rows)] {
        if !(1..=65_535).contains(&cells) {
            violations.add(format!("{field}.{name}"), "must be 1 to 65535");
        }
    }
}

fn check_command(
    argv: Vec<bytes::Bytes>,
    shell_line: bytes::Bytes,
    violations: &mut Violations,
) -> (Vec<CString>, Option<CString>) {
    if shell_line.is_empty() {
        return (check_argv(argv, violations), None);
    }
    if !argv.is_empty() {
        violations.add(
            "start.shell_line",
            "is in the place of argv: give one of them",
        );
    }
    let line = CString::new(Vec::from(shell_line)).ok();
    if line.is_none() {
        violations.add("start.shell_line", "holds a NUL byte");
    }
    (Vec::new(), line)
}

fn check_argv(argv: Vec<bytes::Bytes>, violations: &mut Violations) -> Vec<CString> {
    if argv.first().is_none_or(bytes::Bytes::is_empty) {
        violations.add("start.argv", "must begin with the name of a program");
    }
    let mut checked = Vec::with_capacity(argv.len());
    for (index, argument) in argv.into_iter().enumerate() {
        match CString::new(Vec::from(argument)) {
            Ok(argument) => checked.push(argument),
            Err(_) => violations.add(format!("start.argv[{index}]"), "holds a NUL byte"),
        }
    }
    checked
}

fn check_env(env: Vec<EnvVar>, violations: &mut Violations) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut checked = Vec::with_capacity(env.len());
    for (index, EnvVar { name, value }) in env.into_iter().enumerate() {
        if name.is_empty() || name.contains(&b'=') || name.contains(&0) {
            let problem = "must not be empty nor hold \"=\" or a NUL byte";
            violations.add(format!("start.env[{index}].name"), problem);
        }
        if value.contains(&0) {
            violations.add(format!("start.env[{index}].value"), "holds a NUL byte");
        }
        checked.push((name.into(), value.into()));
    }
    checked
}

fn check_cwd(cwd: &[u8], violations: &mut Violations) -> Option<CString> {
    if cwd.is_empty() {
        return None;
    }
    if !cwd.starts_with(b"/") {
        violations.add("start.cwd", "must be an absolute path");
    }
    let checked = CString::new(cwd).ok();
    if checked.is_none() {
        violations.add("start.cwd", "holds a NUL byte");
    }
    checked
}

fn check_timeout(timeout: prost_types::Duration, violations: &mut Violations) -> Option<Duration> {
    let timeout = Duration::try_from(timeout).ok();
    let checked = timeout.filter(|timeout| !timeout.is_zero() && *timeout <= MAX_TIMEOUT);
    if checked.is_none() {
        violations.add(
            "start.timeout",
            "must be more than zero and at most 366 days",
        );
    }
    checked
}

/// Soft and hard limit alike, but for the processor time: its soft limit sends
/// SIGXCPU, which a program can catch, and a second later the hard one kills.
fn limits_of(limits: &ResourceLimits) -> Vec<(libc::__rlimit_resource_t, libc::rlimit)> {
    let both = |limit| libc::rlimit {
        rlim_cur: limit,
        rlim_max: limit,
    };
    let cpu = |limit: u64| libc::rlimit {
        rlim_cur: limit,
        rlim_max: limit.saturating_add(1),
    };
    [
        limits
            .cpu_seconds
            .map(|limit| (libc::RLIMIT_CPU, cpu(limit))),
        limits
            .address_space_bytes
            .map(|limit| (libc::RLIMIT_AS, both(limit))),
        limits
            .file_size_bytes
            .map(|limit| (libc::RLIMIT_FSIZE, both(limit))),
        limits
            .open_files
            .map(|limit| (libc::RLIMIT_NOFILE, both(limit))),
        limits
            .processes
            .map(|limit| (libc::RLIMIT_NPROC, both(limit))),
        limits
            .core_bytes
            .map(|limit| (libc::RLIMIT_CORE, both(limit))),
    ]
    .into_iter()
    .flatten()
    .collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn spec(argv: &[&'static [u8]]) -> ProcessSpec {
        let argv = argv.iter().copied().map(Bytes::from_static).collect();
        ProcessSpec {
            argv,
            ..ProcessSpec::default()
        }
    }

    fn fields(spec: ProcessSpec) -> Vec<String> {
        let violations = Spec::try_from(spec).unwrap_err();
        violations
            .0
            .into_iter()
            .map(|violation| violation.field)
            .collect()
    }

    #[test]
    fn names_every_field_that_is_wrong() {
        let wrong = ProcessSpec {
            argv: vec![Bytes::from_static(b"sh"), Bytes::from_static(b"a\0b")],
            env: vec![EnvVar {
                name: "A=B".into(),
                value: "x\0".into(),
            }],
            cwd: "relative".into(),
            user: "u\0".into(),
            timeout: Some(prost_types::Duration {
                seconds: -1,
                nanos: 0,
            }),
            terminal: Some(TerminalSize {
                columns: 0,
                rows: 65_536,
            }),
            nice: -21,
            tag: "t".repeat(129),
            keep_output_bytes: (16 << 20) + 1,
            ..ProcessSpec::default()
        };
        let expected = [
            "start.argv[1]",
            "start.env[0].name",
            "start.env[0].value",
            "start.cwd",
            "start.user",
            "start.timeout",
            "start.terminal.columns",
            "start.terminal.rows",
            "start.nice",
            "start.tag",
            "start.keep_output_bytes",
        ];
        assert_eq!(fields(wrong), expected);
    }

    #[test]
    fn a_line_is_in_the_place_of_arguments() {
        let line = |line: &'static [u8]| ProcessSpec {
            shell_line: Bytes::from_static(line),
            ..ProcessSpec::default()
        };
        let checked = Spec::try_from(line(b"a | b\xff")).unwrap();
        assert_eq!(checked.shell_line, CString::new(b"a | b\xff").ok());
        assert!(checked.argv.is_empty());
        assert_eq!(checked.keep_output_bytes, KEEP_OUTPUT_BYTES);
        assert_eq!(fields(line(b"a\0b")), ["start.shell_line"]);
        let both = ProcessSpec {
            argv: vec![Bytes::from_static(b"sh")],
            ..line(b"a")
        };
        assert_eq!(fields(both), ["start.shell_line"]);
    }

    #[test]
    fn wants_a_program() {
        assert_eq!(fields(spec(&[])), ["start.argv"]);
        assert_eq!(fields(spec(&[b"", b"x"])), ["start.argv"]);
    }

    #[test]
    fn bytes_need_not_be_utf8() {
        let checked = Spec::try_from(spec(&[b"/bin/echo", b"\xff\xfe"])).unwrap();
        assert_eq!(checked.argv[1].as_bytes(), b"\xff\xfe");
    }

    #[test]
    fn signals_are_1_to_64() {
        assert_eq!(check_signal(1).unwrap(), 1);
        assert_eq!(check_signal(64).unwrap(), 64);
        for number in [0, 65, u32::MAX] {
            assert!(check_signal(number).is_err());
        }
    }

    fn any_bytes() -> impl Strategy<Value = Bytes> {
        // NUL, `=` and `/` often, because they decide.
        let byte = prop_oneof![Just(0), Just(b'='), Just(b'/'), any::<u8>()];
        prop::collection::vec(byte, 0..8).prop_map(Bytes::from)
    }

    prop_compose! {
        fn any_spec()(
            argv in prop::collection::vec(any_bytes(), 0..4),
            env in prop::collection::vec((any_bytes(), any_bytes()), 0..4),
            cwd in any_bytes(),
            user in ".{0,8}",
            timeout in prop::option::of((any::<i64>(), any::<i32>())),
            limit in prop::option::of(any::<u64>()),
            stdin in any::<bool>(),
            line in prop_oneof![Just(Bytes::new()), any_bytes()],
            terminal in prop::option::of((any::<u32>(), any::<u32>())),
            nice in any::<i32>(),
            keep_output_bytes in any::<u32>(),
        ) -> ProcessSpec {
            ProcessSpec {
                argv,
                env: env.into_iter().map(|(name, value)| EnvVar { name, value }).collect(),
                cwd,
                user,
                timeout: timeout.map(|(seconds, nanos)| prost_types::Duration { seconds, nanos }),
                limits: limit.map(|limit| ResourceLimits {
                    cpu_seconds: Some(limit),
                    open_files: Some(limit),
                    ..ResourceLimits::default()
                }),
                stdin,
                shell_line: line,
                terminal: terminal.map(|(columns, rows)| TerminalSize { columns, rows }),
                nice: nice % 32,
                cgroup: limit.map(|limit| soulbox_proto::guest::v1::CgroupLimits {
                    pids: Some(limit % 8),
                    ..Default::default()
                }),
                keep_output_bytes: keep_output_bytes >> 6,
                ..ProcessSpec::default()
            }
        }
    }

    proptest! {
        #[test]
        fn what_passes_is_sound_and_whole(proto in any_spec()) {
            let Ok(spec) = Spec::try_from(proto.clone()) else { return Ok(()) };
            let argv: Vec<_> = spec.argv.iter().map(CString::as_bytes).collect();
            prop_assert_eq!(argv, proto.argv.iter().map(|argument| &argument[..]).collect::<Vec<_>>());
            prop_assert_eq!(spec.argv.is_empty(), spec.shell_line.is_some());
            prop_assert!(spec.argv.first().is_none_or(|name| !name.is_empty()));
            prop_assert!(spec.terminal.is_none_or(|size| size.columns > 0 && size.rows > 0));
            prop_assert!((-20..=19).contains(&spec.nice));
            prop_assert!((1..=MAX_KEEP_OUTPUT_BYTES).contains(&spec.keep_output_bytes));
            for (name, value) in &spec.env {
                prop_assert!(!name.is_empty() && !name.contains(&b'=') && !name.contains(&0));
                prop_assert!(!value.contains(&0));
            }
            prop_assert!(spec.cwd.is_none_or(|cwd| cwd.as_bytes().starts_with(b"/")));
            prop_assert!(spec.timeout.is_none_or(|timeout| !timeout.is_zero() && timeout <= MAX_TIMEOUT));
        }

        #[test]
        fn what_fails_says_where(proto in any_spec()) {
            if let Err(violations) = Spec::try_from(proto) {
                prop_assert!(!violations.0.is_empty());
                for violation in violations.0 {
                    prop_assert!(violation.field.starts_with("start."));
                    prop_assert!(!violation.description.is_empty());
                }
            }
        }
    }
}
