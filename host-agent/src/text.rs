//! Words of a monitor or a guest: untrusted, and shown to people.

/// `text` on one line without control characters, cut to `max_chars`.
pub(crate) fn printable(text: &str, max_chars: usize) -> String {
    let mut characters = text.chars().map(|character| {
        if character.is_control() {
            ' '
        } else {
            character
        }
    });
    let mut cut: String = characters.by_ref().take(max_chars).collect();
    if characters.next().is_some() {
        cut.push('…');
    }
    cut
}

/// A console's bytes as text that is safe to print: a guest may have written
/// terminal escapes. Keeps the last `max_bytes`.
pub(crate) fn console(bytes: &[u8], max_bytes: usize) -> String {
    let tail = &bytes[bytes.len().saturating_sub(max_bytes)..];
    String::from_utf8_lossy(tail)
        .chars()
        .filter(|&character| character == '\n' || character == '\t' || !character.is_control())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminal_escapes_do_not_pass() {
        assert_eq!(
            console(b"a\x1b[31mb\r\n\xffc\x07", 100),
            "a[31mb\n\u{fffd}c"
        );
        assert_eq!(printable("a\x1b[31mb\nc\u{9b}", 100), "a [31mb c ");
    }

    #[test]
    fn what_is_too_long_is_cut() {
        assert_eq!(printable("äbc", 3), "äbc");
        assert_eq!(printable("äbcd", 3), "äbc…");
        assert_eq!(console(b"first\nlast\n", 5), "last\n");
    }
}
