# The part of the Python runner that understands what notebooks have beside Python:
# `!command`, `%magic` and `%%magic`. Loaded when code has such a line and does not
# parse for it.
import builtins
import os
import re
import subprocess
import sys

MAGIC = re.compile(r'(\s*)(%%?)(\w+)(?:\s+(.*))?$', re.S)
SHELL = re.compile(r'(\s*)(?:([\w, ]+?)\s*=\s*)?!(!?)(.*)$', re.S)
# What notebooks say, and needs nothing here.
NOTHING = frozenset(
    ('matplotlib', 'load_ext', 'reload_ext', 'autoreload', 'precision', 'pylab', 'colors')
)


class UsageError(Exception):
    """A magic that is not there, or is used wrongly."""


def translate(code, name):
    """Code with those lines as calls, on the lines where they were. Where the parser
    stops is such a line, or comes after it: so text that only looks like one, in the
    middle of a string, stays as it is."""
    first = code.lstrip()
    if first.startswith('%%'):
        head, _, body = first.partition('\n')
        match = MAGIC.match(head)
        if match:
            call = '__soulbox_magic__(%r, %r, %r)' % (match[3], match[4] or '', body)
            return '\n' * code[: len(code) - len(first)].count('\n') + call
    lines = code.split('\n')
    while True:
        try:
            runner.parse('\n'.join(lines), name)
            return '\n'.join(lines)
        except SyntaxError as error:
            at = min(error.lineno or len(lines), len(lines)) - 1
            while at >= 0 and not translate_line(lines, at):
                at -= 1
            if at < 0:
                raise


def translate_line(lines, at):
    if at > 0 and lines[at - 1].endswith('\\'):
        return False
    line, end = lines[at], at
    while line.endswith('\\') and end + 1 < len(lines):
        end += 1
        line = line[:-1] + lines[end]
    match = SHELL.match(line)
    if match:
        indent, names, twice, command = match.groups()
        if names:
            call = '%s%s = __soulbox_output__(%r)' % (indent, names, command)
        elif twice:
            call = '%s__soulbox_output__(%r)' % (indent, command)
        else:
            call = '%s__soulbox_shell__(%r)' % (indent, command)
    else:
        match = MAGIC.match(line)
        if not match or match[2] != '%':
            return False
        indent, _, name, rest = match.groups()
        call = '%s__soulbox_magic__(%r, %r)' % (indent, name, rest or '')
    lines[at : end + 1] = [call] + [''] * (end - at)
    return True


def expand(command):
    """`{expression}` is its value, where it is an expression."""

    def value(match):
        try:
            return str(eval(match[1], runner.namespace))
        except Exception:
            return match[0]

    return re.sub(r'\{([^{}]+)\}', value, command)


def shell(command, **options):
    runner.flush()
    bash = '/bin/bash'
    executable = bash if os.path.exists(bash) else None
    done = subprocess.run(expand(command), shell=True, executable=executable, **options)
    runner.namespace['_exit_code'] = done.returncode
    return done


def call_shell(command):
    shell(command)


def call_output(command):
    return shell(command, stdout=subprocess.PIPE, text=True, errors='replace').stdout.splitlines()


def call_magic(name, rest, body=None):
    if name in NOTHING:
        return None
    magic = (LINES if body is None else CELLS).get(name)
    if magic is None:
        sign = '%' if body is None else '%%'
        known = ', '.join(sign + known for known in sorted(LINES if body is None else CELLS))
        raise UsageError(f'there is no {sign}{name} here; there are {known}')
    return magic(rest) if body is None else magic(rest, body)


def change_folder(folder):
    os.chdir(os.path.expanduser(expand(folder.strip().strip('"\'')) or '~'))
    print(os.getcwd())


def environment(rest):
    if not rest:
        return dict(os.environ)
    name, sign, value = rest.partition('=')
    if not sign:
        name, _, value = rest.partition(' ')
        if not value:
            return os.environ.get(name)
    os.environ[name.strip()] = expand(value.strip())
    return None


def pip(rest):
    import importlib

    runner.flush()
    done = subprocess.run(f'{sys.executable} -m pip {expand(rest)}', shell=True)
    runner.namespace['_exit_code'] = done.returncode
    # What was installed can be imported at once.
    importlib.invalidate_caches()


def run_here(code):
    """Runs it like a piece of its own, and returns its value."""
    prepared = runner.prepare(code, '<magic>')
    result = eval(prepared, runner.namespace)
    if prepared.co_flags & 0x80:  # inspect.CO_COROUTINE
        runner.rich.await_in_loop(result)
    return runner.namespace.pop(runner.VALUE, None)


def time_it_once(code, body=None):
    import time

    wall, cpu = time.perf_counter(), time.process_time()
    value = run_here(code if body is None else body)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f'CPU time: {span(cpu)}, wall time: {span(wall)}')
    return value


def time_it_often(code, body=None):
    import timeit

    timer = timeit.Timer(code if body is None else body, globals=runner.namespace)
    number, _ = timer.autorange()
    times = [time / number for time in timer.repeat(5, number)]
    print(f'{span(min(times))} per loop (best of 5 times {number})')


def span(seconds):
    for unit, factor in (('s', 1), ('ms', 1e3), ('µs', 1e6)):
        if seconds * factor >= 1:
            break
    else:
        unit, factor = 'ns', 1e9
    return f'{seconds * factor:.3g} {unit}'


def config(rest):
    """`%config InlineBackend.figure_format = 'svg'`, and nothing else."""
    if 'InlineBackend.figure_format' in rest:
        formats = [form for form in ('png', 'svg', 'jpeg', 'pdf') if form in rest]
        runner.rich.figure_formats[:] = formats or ['png']


def write_file(rest, body):
    append = rest.startswith('-a ')
    path = os.path.expanduser(expand(rest[3:] if append else rest).strip().strip('"\''))
    with open(path, 'a' if append else 'w', encoding='utf-8') as file:
        file.write(body)
    print(('Appended to ' if append else 'Wrote ') + path)


def script(interpreter):
    def run(rest, body):
        runner.flush()
        command = f'{interpreter} {rest}'.strip()
        done = subprocess.run(command, shell=True, input=body.encode())
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command)

    return run


def shown_as(mime):
    return lambda rest, body: runner.show(False, {mime: body}) and None


def capture(rest, body):
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_here(body)
    if rest.strip().isidentifier():
        runner.namespace[rest.strip()] = out.getvalue()


LINES = {
    'cd': change_folder,
    'config': config,
    'env': environment,
    'ls': lambda rest: call_shell('ls ' + rest),
    'pip': pip,
    'pwd': lambda rest: os.getcwd(),
    'set_env': environment,
    'sx': call_output,
    'system': call_output,
    'time': time_it_once,
    'timeit': time_it_often,
}
CELLS = {
    'bash': script('bash'),
    'capture': capture,
    'html': shown_as('text/html'),
    'javascript': shown_as('application/javascript'),
    'latex': shown_as('text/latex'),
    'markdown': shown_as('text/markdown'),
    'python3': script('python3'),
    'sh': script('sh'),
    'svg': shown_as('image/svg+xml'),
    'time': time_it_once,
    'timeit': time_it_often,
    'writefile': write_file,
}
builtins.__soulbox_magic__ = call_magic
builtins.__soulbox_output__ = call_output
builtins.__soulbox_shell__ = call_shell
