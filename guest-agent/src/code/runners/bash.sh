# Runs Bash code for the guest agent: reads pieces that end with a NUL from
# descriptor 3, and answers with frames; see channel.rs.
#
# A piece is read as a file is with `source`, at the top level: what it declares stays,
# and its messages have line numbers. On SIGINT a DEBUG trap returns from everything
# that runs: nothing else gets Bash out of a loop and keeps its state.

unset __soulbox
__soulbox_interrupt() {
    __soulbox_interrupted=1
    trap '__soulbox_unwind' DEBUG
    shopt -s extdebug
}
# With `extdebug`, 2 means to return from the function or file that runs.
__soulbox_unwind() {
    return $(((${#FUNCNAME[@]} > 1) * 2))
}
trap __soulbox_interrupt INT
PS4='+ '

# Empty: ready.
printf '\0\0\0\0' >&3
while IFS= read -r -d '' -u 3 __soulbox_code; do
    __soulbox_interrupted=
    # shellcheck disable=SC1091
    . /dev/fd/9 9<<<"$__soulbox_code" 3>&-
    __soulbox_status=$?
    { trap - DEBUG; shopt -u extdebug; set +x; } 2>/dev/null
    if [[ $__soulbox_interrupted ]]; then
        # finished { outcome: INTERRUPTED }
        printf '\x04\0\0\0\x32\x02\x08\x03' >&3
    elif [[ $__soulbox_status == 0 ]]; then
        printf '\x04\0\0\0\x32\x02\x08\x01' >&3
    else
        # error { name: "ExitStatus", value }, of a length that depends on its digits
        printf -v __soulbox_head '\\x%02x\\0\\0\\0\\x2a\\x%02x\\x0a\\x0aExitStatus\\x12\\x%02x' \
            $((${#__soulbox_status} + 16)) $((${#__soulbox_status} + 14)) ${#__soulbox_status}
        printf "$__soulbox_head%s\x04\0\0\0\x32\x02\x08\x02" "$__soulbox_status" >&3
    fi
done
