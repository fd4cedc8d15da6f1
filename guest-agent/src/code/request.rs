//! What a caller asks of CodeService, checked before anything is done with it.

use std::time::Duration;

use bytes::Bytes;
use soulbox_proto::guest::v1::{CreateContextRequest, EnvVar, Language, RunCodeRequest};

use super::language::Runner;
use crate::spec::Violations;

/// A context that is to be made. Its environment, folder and user are checked as
/// those of any program when it starts.
#[derive(Clone, Debug)]
pub(super) struct ContextSpec {
    pub(super) runner: &'static Runner,
    pub(super) cwd: Bytes,
    pub(super) env: Vec<EnvVar>,
    pub(super) user: String,
}

/// A checked [`RunCodeRequest`].
#[derive(Debug)]
pub(super) struct RunSpec {
    pub(super) target: Target,
    pub(super) code: String,
    pub(super) timeout: Option<Duration>,
    pub(super) interrupt_on_disconnect: bool,
    pub(super) max_output_bytes: u64,
    pub(super) max_result_bytes: u64,
}

/// Where it is to run.
#[derive(Debug)]
pub(super) enum Target {
    /// Made when it is not there.
    Default(&'static Runner),
    /// That must be of this language, if one is given.
    Context(String, Option<Language>),
}

/// A year: longer is a mistake in units.
const MAX_TIMEOUT: Duration = Duration::from_secs(366 * 24 * 60 * 60);
/// Also what a message has at most that a client takes without being told to.
const DEFAULT_LIMIT_BYTES: u64 = 4 * 1024 * 1024 - 64 * 1024;
const MAX_LIMIT_BYTES: u64 = 64 * 1024 * 1024;

const NO_LANGUAGE: &str = "must be PYTHON, JAVASCRIPT, TYPESCRIPT or BASH";

// === impl ContextSpec ===

impl ContextSpec {
    pub(super) fn default_of(runner: &'static Runner) -> Self {
        Self {
            runner,
            cwd: Bytes::new(),
            env: Vec::new(),
            user: String::new(),
        }
    }
}

impl TryFrom<CreateContextRequest> for ContextSpec {
    type Error = Violations;

    fn try_from(request: CreateContextRequest) -> Result<Self, Violations> {
        let mut violations = Violations::default();
        let runner = Runner::of(request.language());
        if runner.is_none() {
            violations.add("language", NO_LANGUAGE);
        }
        for (index, EnvVar { name, value }) in request.env.iter().enumerate() {
            if name.is_empty() || name.contains(&b'=') || name.contains(&0) {
                let problem = "must not be empty nor hold \"=\" or a NUL byte";
                violations.add(format!("env[{index}].name"), problem);
            }
            if value.contains(&0) {
                violations.add(format!("env[{index}].value"), "holds a NUL byte");
            }
        }
        if !request.cwd.is_empty() && !request.cwd.starts_with(b"/") {
            violations.add("cwd", "must be an absolute path");
        }
        if request.cwd.contains(&0) {
            violations.add("cwd", "holds a NUL byte");
        }
        if request.user.contains('\0') {
            violations.add("user", "holds a NUL byte");
        }
        match runner.filter(|_| violations.0.is_empty()) {
            Some(runner) => Ok(Self {
                runner,
                cwd: request.cwd,
                env: request.env,
                user: request.user,
            }),
            None => Err(violations),
        }
    }
}

// === impl RunSpec ===

impl TryFrom<RunCodeRequest> for RunSpec {
    type Error = Violations;

    fn try_from(request: RunCodeRequest) -> Result<Self, Violations> {
        let mut violations = Violations::default();
        let language = request.language();
        let is_unknown = request.language != 0 && language == Language::Unspecified;
        let named = Runner::of(language);
        let target = match (named, request.context_id.is_empty()) {
            (Some(runner), true) => Some(Target::Default(runner)),
            (None, false) if is_unknown => None,
            (_, false) => {
                let language = named.map(|runner| runner.language);
                Some(Target::Context(request.context_id, language))
            }
            (None, true) => None,
        };
        if target.is_none() {
            violations.add("language", NO_LANGUAGE);
        }
        let timeout = request.timeout.map(|timeout| {
            let timeout = Duration::try_from(timeout).ok();
            let sound = timeout.filter(|timeout| !timeout.is_zero() && *timeout <= MAX_TIMEOUT);
            if sound.is_none() {
                violations.add("timeout", "must be more than zero and at most 366 days");
            }
            sound.unwrap_or_default()
        });
        let mut limit = |field: &str, bytes| {
            if bytes > MAX_LIMIT_BYTES {
                violations.add(field, format!("must be at most {MAX_LIMIT_BYTES}"));
            }
            if bytes == 0 {
                DEFAULT_LIMIT_BYTES
            } else {
                bytes
            }
        };
        let max_output_bytes = limit("max_output_bytes", request.max_output_bytes);
        let max_result_bytes = limit("max_result_bytes", request.max_result_bytes);
        if request.code.contains('\0') {
            violations.add("code", "holds a NUL character");
        }
        match target.filter(|_| violations.0.is_empty()) {
            Some(target) => Ok(Self {
                target,
                code: request.code,
                timeout,
                interrupt_on_disconnect: request.interrupt_on_disconnect,
                max_output_bytes,
                max_result_bytes,
            }),
            None => Err(violations),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(request: RunCodeRequest) -> Vec<String> {
        let violations = RunSpec::try_from(request).map(drop).unwrap_err();
        violations
            .0
            .into_iter()
            .map(|violation| violation.field)
            .collect()
    }

    #[test]
    fn every_wrong_field_of_a_run_is_named() {
        let request = RunCodeRequest {
            language: 99,
            code: "a\0b".to_owned(),
            timeout: Some(prost_types::Duration::default()),
            max_output_bytes: MAX_LIMIT_BYTES + 1,
            max_result_bytes: u64::MAX,
            ..RunCodeRequest::default()
        };
        let all = [
            "language",
            "timeout",
            "max_output_bytes",
            "max_result_bytes",
            "code",
        ];
        assert_eq!(fields(request.clone()), all);
        let known = RunCodeRequest {
            context_id: "python".to_owned(),
            ..request
        };
        assert_eq!(fields(known), all);
        assert_eq!(fields(RunCodeRequest::default()), ["language"]);
    }

    #[test]
    fn a_run_that_says_little_gets_the_defaults() {
        let request = RunCodeRequest {
            language: Language::Bash.into(),
            ..RunCodeRequest::default()
        };
        let run = RunSpec::try_from(request).unwrap();
        assert!(matches!(run.target, Target::Default(runner) if runner.language == Language::Bash));
        assert_eq!(
            (run.timeout, run.max_output_bytes),
            (None, DEFAULT_LIMIT_BYTES)
        );
    }

    #[test]
    fn every_wrong_field_of_a_context_is_named() {
        let request = CreateContextRequest {
            cwd: "relative\0".into(),
            env: vec![EnvVar {
                name: "A=".into(),
                value: "\0".into(),
            }],
            user: "\0".to_owned(),
            ..CreateContextRequest::default()
        };
        let violations = ContextSpec::try_from(request).unwrap_err();
        let named: Vec<_> = violations
            .0
            .into_iter()
            .map(|violation| violation.field)
            .collect();
        assert_eq!(
            named,
            [
                "language",
                "env[0].name",
                "env[0].value",
                "cwd",
                "cwd",
                "user"
            ]
        );
    }
}
