# Runs Python code for the guest agent: reads pieces from descriptor 3 and answers
# with frames; see channel.rs. Python 3.8 and later, the standard library only.
#
# What is imported at the start is part of every interpreter that idles in a
# snapshot, and of the time that one needs to come up. So everything that most code
# does not need is in further parts (`Later`), which are compiled when it is.
# `channel` is the reader of descriptor 3, from which this source was read.
import _ast
import _signal
import builtins
import io
import os
import struct
import sys
import _thread

CHANNEL = 3
HEADER = struct.Struct('<IIQQ')
RESEED = 1
OK, FAILED, INTERRUPTED = 1, 2, 3
AWAIT = _ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
VALUE = '__soulbox_value__'
OWN = '<soulbox>'
# Of an error, and of pieces of code whose lines tracebacks show.
MAX_ERROR_CHARS = 48 * 1024
MAX_SOURCES = 1000
# What a form of a result costs beside its bytes, and a result beside its forms.
FORM_BYTES = 16
RESULT_BYTES = 80
MAX_FORMS = 32

main = sys.modules['__main__']
namespace = main.__dict__


class Later:
    """A part of this runner: a module that is compiled when it is first used."""

    def __init__(self, source):
        self.source = source

    def __getattr__(self, name):
        scope = self.__dict__
        source = scope.pop('source', None)
        if source is None:
            raise AttributeError(name)
        scope['runner'] = runner
        exec(compile(source, OWN, 'exec'), scope)
        return scope[name]


# --- Frames, as protobuf encodes them ---


def varint(number):
    if number < 128:
        return bytes((number,))
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def field(number, value):
    """A field that is bytes, text or a message."""
    if isinstance(value, str):
        value = value.encode('utf-8', 'backslashreplace')
    return b''.join((varint(number << 3 | 2), varint(len(value)), value))


def frame(message):
    return struct.pack('<I', len(message)) + message


def send(frames):
    view = memoryview(frames)
    while view:
        view = view[os.write(CHANNEL, view):]


def finished(outcome):
    return b'\x32\x02\x08' + bytes((outcome,))


# --- What runs ---


class State:
    # Code runs: it can be interrupted, and can show something.
    runs = False
    # A frame is being written: an interrupt must wait.
    writes = False
    interrupted = False
    result_left = 0
    # Frames that are to be sent with the next.
    held = b''
    number = 0
    loop = None


lock = _thread.allocate_lock()
main_thread = _thread.get_ident()


def interrupt(signal, stack):
    if State.writes:
        State.interrupted = True
    elif State.runs:
        raise KeyboardInterrupt


def show(main_value, data, chart=None):
    """Sends a result, but for what there is no room for. Outside of a run, and in
    a process that code has forked, there is nobody to show it to: false."""
    if os.getpid() != runner_pid:
        return False
    flush()
    is_main_thread = _thread.get_ident() == main_thread
    with lock:
        if not State.runs:
            return False
        if State.result_left < RESULT_BYTES:
            return True
        parts = [b'\x08\x01'] if main_value else []
        left = State.result_left - RESULT_BYTES
        omitted = []
        for mime, form in list(data.items())[:MAX_FORMS]:
            mime = mime[:128]
            if isinstance(form, str):
                form = form.encode('utf-8', 'backslashreplace')
            if len(mime) + len(form) + FORM_BYTES <= left:
                left -= len(mime) + len(form) + FORM_BYTES
                parts.append(field(2, field(1, mime) + field(2, form)))
            else:
                omitted.append(mime)
        if chart is not None and len(chart) + FORM_BYTES <= left:
            left -= len(chart) + FORM_BYTES
            parts.append(field(3, chart))
        for mime in omitted:
            left -= len(mime) + FORM_BYTES
            parts.append(field(4, mime))
        State.result_left = left
        if is_main_thread:
            State.writes = True
        try:
            shown = State.held + frame(field(4, b''.join(parts)))
            State.held = b''
            if main_value:
                # With what comes next: mostly that is the end, and one wake-up less.
                State.held = shown
            else:
                send(shown)
        finally:
            if is_main_thread:
                State.writes = False
    if is_main_thread and State.interrupted:
        State.interrupted = False
        raise KeyboardInterrupt
    return True


def show_value(value):
    builtins._ = value
    # What most values are, without looking for anything that they could be shown as.
    if type(value) in PLAIN:
        show(True, {'text/plain': repr(value)})
    else:
        rich.show_object(value, True)


PLAIN = frozenset((bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset))

sources = {}


def remember(name, code):
    """Makes the lines known to tracebacks and `inspect`."""
    sources[name] = code
    if len(sources) > MAX_SOURCES:
        oldest = next(iter(sources))
        del sources[oldest]
        if 'linecache' in sys.modules:
            sys.modules['linecache'].cache.pop(oldest, None)
    if 'linecache' in sys.modules:
        publish_sources(sys.modules['linecache'])


def publish_sources(linecache):
    for name, code in sources.items():
        if name not in linecache.cache:
            lines = [line + '\n' for line in code.splitlines()]
            # Without a time it is not compared with a file.
            linecache.cache[name] = (len(code), None, lines, name)


def parse(code, name):
    return compile(code, name, 'exec', _ast.PyCF_ONLY_AST | AWAIT, True)


def prepare(code, name):
    """Code whose last expression is stored, so that it can be shown."""
    try:
        tree = parse(code, name)
    except SyntaxError:
        # Lines that are not Python, as notebooks have them: !command, %magic.
        if '!' not in code and '%' not in code:
            raise
        tree = parse(magic.translate(code, name), name)
    if tree.body and type(tree.body[-1]) is _ast.Expr and not code.rstrip().endswith(';'):
        last = tree.body[-1]
        place = {
            key: getattr(last, key)
            for key in ('lineno', 'col_offset', 'end_lineno', 'end_col_offset')
        }
        target = _ast.Name(id=VALUE, ctx=_ast.Store(), **place)
        tree.body[-1] = _ast.Assign(targets=[target], value=last.value, **place)
    return compile(tree, name, 'exec', AWAIT, True)


def execute(code):
    name = '<cell %d>' % State.number
    remember(name, code)
    prepared = prepare(code, name)
    try:
        result = eval(prepared, namespace)
        if prepared.co_flags & 0x80:  # inspect.CO_COROUTINE
            rich.await_in_loop(result)
        value = namespace.pop(VALUE, None)
        if value is not None:
            show_value(value)
    finally:
        if 'matplotlib.pyplot' in sys.modules:
            rich.show_figures()


def error_message():
    """The error that is being handled, as a message; empty if it is none."""
    kind, error, frames = sys.exc_info()
    if issubclass(kind, SystemExit) and error.code in (None, 0):
        return b''
    while frames is not None and frames.tb_frame.f_code.co_filename == OWN:
        frames = frames.tb_next
    try:
        value = str(error)
    except BaseException:
        value = '<its text could not be made>'
    message = field(1, kind.__name__) + field(2, value[:MAX_ERROR_CHARS // 4])
    left = MAX_ERROR_CHARS
    for line in rich.format_error(kind, error, frames):
        if left <= 0:
            break
        message += field(3, line[:left])
        left -= len(line)
    return field(5, message)


def run(code):
    """Runs it, and sends what came of it."""
    error = b''
    outcome = OK
    try:
        try:
            State.runs = True
            execute(code)
        except BaseException as raised:
            # Not interrupted any more: an error in here would be an endless one.
            State.writes = True
            outcome = INTERRUPTED if isinstance(raised, KeyboardInterrupt) else FAILED
            error = error_message()
            if not error:
                outcome = OK
            del raised
    except KeyboardInterrupt:
        # Between the two.
        outcome, error = INTERRUPTED, field(5, field(1, 'KeyboardInterrupt'))
    finally:
        State.writes = True
    namespace.pop(VALUE, None)
    if os.getpid() != runner_pid:
        # A child that code has forked, and that came to the end of it.
        leave(0)
    flush()
    if 'ctypes' in sys.modules:
        rich.flush_c()
    with lock:
        State.runs = False
        State.interrupted = False
        last, State.held = State.held, b''
        if error:
            last += frame(error)
        send(last + frame(finished(outcome)))
    State.writes = False


def flush():
    """Also when code has closed or replaced them: then they are made anew."""
    for number, name in enumerate(('stdout', 'stderr'), 1):
        try:
            getattr(sys, name).flush()
        except Exception:
            setattr(sys, name, open_output(number))


def leave(code):
    flush()
    os._exit(code)


def reseed():
    """In a copy of this interpreter random numbers must not be the same."""
    if 'random' in sys.modules:
        sys.modules['random'].seed()
    if 'numpy.random' in sys.modules:
        sys.modules['numpy.random'].seed()


def no_input(prompt='', /):
    raise EOFError('nobody can answer input() here: put the answer into the code')


class Imports:
    """Does something to a module when it has been imported."""

    after = {}

    def find_spec(self, name, path=None, target=None):
        done = self.after.pop(name, None)
        if done is None:
            return None
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return rich.stand_in(name) if name.startswith('IPython') else None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            done(module)

        spec.loader.exec_module = exec_module
        return spec


def open_output(number):
    raw = io.FileIO(number, 'wb', closefd=False)
    buffered = io.BufferedWriter(raw, 64 * 1024)
    # A line at a time, as on a terminal: who reads sees what is going on.
    return io.TextIOWrapper(buffered, 'utf-8', 'backslashreplace', line_buffering=True)


def serve():
    os.set_inheritable(CHANNEL, False)
    for name in [name for name in namespace if not name.startswith('__')]:
        del namespace[name]
    sys.stdout = sys.__stdout__ = open_output(1)
    sys.stderr = sys.__stderr__ = open_output(2)
    sys.argv = ['']
    builtins.input = no_input
    namespace['display'] = rich_display
    # Without a display there is no other; the programs that code starts have none
    # either.
    os.environ.setdefault('MPLBACKEND', 'agg')
    Imports.after = {
        'linecache': publish_sources,
        'matplotlib.pyplot': lambda module: rich.adopt_pyplot(module),
        'IPython': lambda module: None,
        'IPython.display': lambda module: rich.adopt_ipython(module),
    }
    if 'linecache' in sys.modules:
        del Imports.after['linecache']
    sys.meta_path.insert(0, Imports())
    _signal.signal(_signal.SIGINT, interrupt)
    send(frame(b''))
    while True:
        header = channel.read(HEADER.size)
        if len(header) < HEADER.size:
            leave(0)
        length, flags, State.number, State.result_left = HEADER.unpack(header)
        code = channel.read(length).decode('utf-8', 'replace')
        if flags & RESEED:
            reseed()
        run(code)


def rich_display(*objects, **options):
    """Shows objects; with raw=True, dicts of forms by MIME type."""
    return rich.display(*objects, **options)


rich_display.__name__ = 'display'
runner_pid = os.getpid()
runner = type(sys)(OWN)
runner.__dict__.update(globals())
magic, rich, charts = (Later(channel.read(int(channel.readline()))) for _ in range(3))
runner.__dict__.update(magic=magic, rich=rich, charts=charts)
try:
    serve()
except OSError:
    # The agent, or the descriptor by which it is reached, is gone.
    leave(70)
