# The part of the Python runner for what is more than text: objects with forms of
# their own, figures, the event loop, errors. Loaded when there is something of it.
import builtins
import os
import sys

# As `_repr_html_` and its kin are named; images may be base64.
METHODS = (
    ('_repr_html_', 'text/html'),
    ('_repr_markdown_', 'text/markdown'),
    ('_repr_svg_', 'image/svg+xml'),
    ('_repr_png_', 'image/png'),
    ('_repr_jpeg_', 'image/jpeg'),
    ('_repr_pdf_', 'application/pdf'),
    ('_repr_latex_', 'text/latex'),
    ('_repr_json_', 'application/json'),
    ('_repr_javascript_', 'application/javascript'),
)
BINARY = frozenset(('image/png', 'image/jpeg', 'application/pdf', 'image/gif', 'image/webp'))
FIGURE_MIMES = {
    'png': 'image/png',
    'svg': 'image/svg+xml',
    'jpeg': 'image/jpeg',
    'pdf': 'application/pdf',
}
figure_formats = ['png']


def form_of(mime, value):
    """A form as bytes or text; None where it is neither and cannot be made so."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        if mime in BINARY:
            import binascii

            try:
                return binascii.a2b_base64(value)
            except binascii.Error:
                return None
        return value
    import json

    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        return None


def forms_of(value):
    """All that an object has to be shown as, by MIME type; its text first."""
    try:
        data = {'text/plain': repr(value)}
    except Exception as error:
        data = {'text/plain': f'<{type(value).__name__}: its repr() failed with {error!r}>'}
    # A class has the methods of its instances, and must not be asked.
    if isinstance(value, type):
        return data
    bundle = call(value, '_repr_mimebundle_', include=None, exclude=None)
    if isinstance(bundle, tuple):
        bundle = bundle[0] if bundle else None
    if isinstance(bundle, dict):
        add(data, bundle)
    for method, mime in METHODS:
        if mime not in data:
            form = call(value, method)
            if isinstance(form, tuple):
                form = form[0] if form else None
            add(data, {mime: form})
    return data


def call(value, method, **arguments):
    try:
        found = getattr(value, method, None)
        # What answers to every name has no forms, such as a mock.
        if not callable(found) or callable(getattr(value, '_repr_soulbox_none_', None)):
            return None
        return found(**arguments)
    except Exception:
        return None


def add(data, bundle):
    for mime, value in bundle.items():
        form = None if value is None else form_of(mime, value)
        if form is not None:
            data[str(mime)] = form


def figure_of(value):
    """The figure that a value is, if it is one."""
    module = sys.modules.get('matplotlib.figure')
    return value if module and isinstance(value, module.Figure) else None


def show_object(value, main=False):
    figure = figure_of(value)
    if figure is not None:
        show_figure(figure, main)
    elif not runner.show(main, forms_of(value)) and not main:
        print(value)


def display(*objects, raw=False, **options):
    for value in objects:
        if raw and isinstance(value, dict):
            data = {}
            add(data, value)
            runner.show(False, data)
        else:
            show_object(value)


# --- matplotlib ---


def show_figure(figure, main=False):
    import io

    data = {'text/plain': repr(figure)}
    for form in figure_formats:
        image = io.BytesIO()
        figure.savefig(image, format=form, bbox_inches='tight')
        data[FIGURE_MIMES[form]] = image.getvalue()
    try:
        chart = runner.charts.encode(figure)
    except Exception:
        # It is shown all the same; what it is made of is another library's matter.
        chart = None
    shown = runner.show(main, data, chart)
    # Shown once, also where it is open in pyplot.
    pyplot = sys.modules.get('matplotlib.pyplot')
    if shown and pyplot:
        pyplot.close(figure)


def show_figures():
    """Those that are open, and closes them."""
    pyplot = sys.modules['matplotlib.pyplot']
    if not hasattr(pyplot, 'close'):
        # Its import failed half-way.
        return
    try:
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            if figure.get_axes():
                show_figure(figure)
    finally:
        pyplot.close('all')


def adopt_pyplot(pyplot):
    pyplot.show = lambda *arguments, **options: show_figures()
    runner.charts.record_boxes()


# --- await ---


def await_in_loop(coroutine):
    """Runs it in the one event loop that the code of this interpreter has. The loop
    stands still between runs."""
    import asyncio

    loop = runner.State.loop
    if loop is None or loop.is_closed():
        loop = runner.State.loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    task = loop.create_task(coroutine)
    try:
        return loop.run_until_complete(task)
    except BaseException:
        if not task.done():
            # Interrupted from outside: it must not go on with the next code.
            task.cancel()
            loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        raise


# --- errors ---


def format_error(kind, error, frames):
    import traceback

    try:
        told = traceback.TracebackException(kind, error, frames)
        without_own_frames(told, set())
        lines = list(told.format())
    except Exception:
        lines = [kind.__name__]
    return [line for text in lines for line in text.rstrip('\n').split('\n')]


def without_own_frames(told, seen):
    """Of the error and of those that it came from."""
    if told is None or id(told) in seen:
        return
    seen.add(id(told))
    told.stack[:] = [frame for frame in told.stack if frame.filename != runner.OWN]
    for other in (told.__cause__, told.__context__, *(getattr(told, 'exceptions', None) or ())):
        without_own_frames(other, seen)


def flush_c():
    """What code written in C keeps in its own buffer."""
    import ctypes

    try:
        ctypes.CDLL(None).fflush(None)
    except (AttributeError, OSError):
        pass


# --- IPython, as far as code uses it to show something ---


class Shown:
    def __init__(self, data=None, url=None, filename=None, **options):
        if filename is not None:
            with open(filename, 'rb') as file:
                data = file.read()
            if self.mime not in BINARY:
                data = data.decode()
        elif url is not None or (self.remote and str(data).startswith(('http://', 'https://'))):
            from urllib.request import urlopen

            with urlopen(url or data) as answer:
                data = answer.read()
        self.data = data

    remote = False

    def __repr__(self):
        return f'<IPython.core.display.{type(self).__name__} object>'

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {self.kind(): self.data}

    def kind(self):
        return self.mime


class Image(Shown):
    mime = 'image/png'
    remote = True

    def __init__(self, data=None, **options):
        if isinstance(data, (str, os.PathLike)) and os.path.exists(data):
            options['filename'], data = data, None
        super().__init__(data, **options)

    def kind(self):
        data = self.data if isinstance(self.data, bytes) else b''
        if data.startswith(b'\xff\xd8'):
            return 'image/jpeg'
        if data.startswith(b'GIF8'):
            return 'image/gif'
        return self.mime


def stand_in(name):
    """IPython.display, where IPython is not installed: `from IPython.display import
    display, HTML` is how much code begins."""
    from importlib.machinery import ModuleSpec

    class Loader:
        @staticmethod
        def create_module(spec):
            return None

        @staticmethod
        def exec_module(module):
            if name == 'IPython':
                module.version_info = (8, 24, 0)
                module.get_ipython = lambda: None
                return
            for kind, mime in (
                ('HTML', 'text/html'),
                ('Markdown', 'text/markdown'),
                ('SVG', 'image/svg+xml'),
                ('JSON', 'application/json'),
                ('Latex', 'text/latex'),
                ('Math', 'text/latex'),
                ('Javascript', 'application/javascript'),
            ):
                setattr(module, kind, type(kind, (Shown,), {'mime': mime}))
            module.Image = Image
            adopt_ipython(module)

    return ModuleSpec(name, Loader, is_package=name == 'IPython')


def adopt_ipython(module):
    module.display = runner.namespace.get('display', display)
    module.clear_output = lambda wait=False: None
