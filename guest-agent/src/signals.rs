//! Signals by name.

/// Of signal(7) for x86-64; the index is the number less one.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
const OTHER_NAMES: [(&str, i32); 4] = [
    ("IOT", libc::SIGABRT),
    ("CLD", libc::SIGCHLD),
    ("POLL", libc::SIGIO),
    ("UNUSED", libc::SIGSYS),
];
/// Of glibc, which uses two itself.
const RTMIN: i32 = 34;
const RTMAX: i32 = 64;

/// The number of "TERM", "SIGTERM", "15", "RTMIN+1" or "RTMAX-1"; letters may be
/// small.
pub(crate) fn parse_signal(text: &str) -> Option<i32> {
    let text = text.to_ascii_uppercase();
    let name = text.strip_prefix("SIG").unwrap_or(&text);
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        RTMIN + offset(rest, '+')?
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        RTMAX - offset(rest, '-')?
    } else if let Some(index) = NAMES.iter().position(|known| *known == name) {
        i32::try_from(index).ok()? + 1
    } else if let Some((_, number)) = OTHER_NAMES.iter().find(|(known, _)| *known == name) {
        *number
    } else {
        // Not "SIG15", and not "+15".
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse().ok()).flatten()?
    };
    (1..=RTMAX).contains(&number).then_some(number)
}

fn offset(rest: &str, sign: char) -> Option<i32> {
    if rest.is_empty() {
        return Some(0);
    }
    let digits = rest.strip_prefix(sign)?;
    let number: i32 = digits.parse().ok()?;
    let is_sound = digits.bytes().all(|byte| byte.is_ascii_digit());
    (is_sound && number <= RTMAX - RTMIN).then_some(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn knows_signals_by_name_and_number() {
        for (text, number) in [
            ("TERM", libc::SIGTERM),
            ("SIGTERM", libc::SIGTERM),
            ("sigterm", libc::SIGTERM),
            ("15", libc::SIGTERM),
            ("KILL", libc::SIGKILL),
            ("WINCH", libc::SIGWINCH),
            ("SYS", libc::SIGSYS),
            ("SIGPOLL", libc::SIGIO),
            ("RTMIN", 34),
            ("SIGRTMIN+2", 36),
            ("RTMAX-30", 34),
            ("64", 64),
        ] {
            assert_eq!(parse_signal(text), Some(number), "{text}");
        }
        for text in [
            "",
            "SIG",
            "0",
            "65",
            "-9",
            "+9",
            "SIG9",
            "RTMIN+31",
            "RTMIN-1",
            "RTMIN++1",
            "TERM ",
            "99999999999",
        ] {
            assert_eq!(parse_signal(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn is_a_signal_or_nothing(text in "(SIG)?[A-Z]{0,5}[+-]?[0-9]{0,10}") {
            if let Some(number) = parse_signal(&text) {
                prop_assert!((1..=64).contains(&number));
            }
        }
    }
}
