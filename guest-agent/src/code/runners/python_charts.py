# The part of the Python runner that reads matplotlib figures: what they show, as a
# `Chart` message of code.proto. Loaded with the first figure.
import struct
import sys

LINE, SCATTER, BAR, PIE, BOX, SUPER, UNKNOWN = range(1, 8)
MAX_POINTS = 20_000
BOXES = '_soulbox_boxes'

field, varint = runner.field, runner.varint


class TooMuch(Exception):
    pass


def number_field(number, value):
    return varint(number << 3 | 1) + struct.pack('<d', float(value))


def record_boxes():
    """Makes axes remember the boxes that they draw: only lines are left of them."""
    from matplotlib.axes import Axes

    draw = Axes.bxp

    def bxp(self, bxpstats, positions=None, *arguments, **options):
        bxpstats = list(bxpstats)
        at = range(1, len(bxpstats) + 1) if positions is None else positions
        is_upright = options.get('orientation', 'vertical') == 'vertical'
        is_upright = is_upright and options.get('vert') in (None, True)
        boxes = self.__dict__.setdefault(BOXES, [])
        boxes.extend((stats, place, is_upright) for stats, place in zip(bxpstats, at))
        return draw(self, bxpstats, positions, *arguments, **options)

    Axes.bxp = bxp


def encode(figure):
    """The figure's chart; None where there is nothing to tell, or too much."""
    points = Points()
    try:
        charts = [chart_of(axes, points) for axes in figure.get_axes() if is_plot(axes)]
    except TooMuch:
        return None
    if not charts:
        return None
    if len(charts) == 1:
        return charts[0]
    title = getattr(figure, '_suptitle', None)
    parts = [b'\x08' + varint(SUPER)]
    if title is not None:
        parts.append(field(2, title.get_text()))
    parts.extend(field(8, chart) for chart in charts)
    return b''.join(parts)


def is_plot(axes):
    return axes.get_label() != '<colorbar>' and bool(
        axes.lines or axes.collections or axes.patches or axes.images or axes.containers
    )


def chart_of(axes, points):
    x, y = Axis(axes.xaxis, axes.get_xscale()), Axis(axes.yaxis, axes.get_yscale())
    kind, series = series_of(axes, x, points)
    texts = (axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), x.scale, y.scale)
    parts = [b'\x08' + varint(kind)]
    parts.extend(field(number, text) for number, text in enumerate(texts, 2))
    parts.extend(field(7, one) for one in series)
    return b''.join(parts)


def series_of(axes, x, points):
    from matplotlib.collections import PathCollection
    from matplotlib.container import BarContainer
    from matplotlib.patches import Wedge

    wedges = [patch for patch in axes.patches if isinstance(patch, Wedge)]
    if wedges:
        return PIE, [pie(wedges, axes, points)]
    boxes = getattr(axes, BOXES, None)
    if boxes:
        return BOX, [box(axes, *one, points) for one in boxes]
    bars = [one for one in axes.containers if isinstance(one, BarContainer)]
    if bars:
        return BAR, [bar(one, axes, points) for one in bars]
    series = []
    # What is drawn in the coordinates of the data: not the line across all of it.
    for line in axes.lines:
        if line.get_transform() == axes.transData:
            series.append(xy(line.get_label(), *line.get_data(orig=False), x, points))
    kind = LINE if series else SCATTER
    for dots in axes.collections:
        if isinstance(dots, PathCollection) and len(dots.get_offsets()):
            offsets = dots.get_offsets()
            series.append(xy(dots.get_label(), offsets[:, 0], offsets[:, 1], x, points))
    return (kind, series) if series else (UNKNOWN, [])


def xy(label, xs, ys, x, points):
    parts = [name(label)]
    for at, value in zip(xs, ys):
        points.count()
        parts.append(field(2, x.encode(at) + number_field(3, value)))
    return b''.join(parts)


def pie(wedges, axes, points):
    # Where labels are texts beside the slices, their wedges have them too.
    parts = []
    for wedge in wedges:
        points.count()
        label = name_text(wedge.get_label())
        angle = abs(wedge.theta2 - wedge.theta1)
        parts.append(field(2, field(2, label) + number_field(3, angle)))
    return b''.join(parts)


def bar(container, axes, points):
    vertical = getattr(container, 'orientation', 'vertical') != 'horizontal'
    names = Names(axes.xaxis if vertical else axes.yaxis)
    parts = [name(container.get_label())]
    for patch in container.patches:
        points.count()
        if vertical:
            middle, value = patch.get_x() + patch.get_width() / 2, patch.get_height()
        else:
            middle, value = patch.get_y() + patch.get_height() / 2, patch.get_width()
        parts.append(field(2, field(2, names.of(middle)) + number_field(3, value)))
    return b''.join(parts)


def box(axes, stats, at, is_upright, points):
    points.count()
    parts = [
        number_field(number, stats[key])
        for number, key in enumerate(('whislo', 'q1', 'med', 'q3', 'whishi'), 1)
    ]
    fliers = [float(flier) for flier in stats.get('fliers', ())]
    points.count(len(fliers))
    parts.append(field(6, struct.pack('<%dd' % len(fliers), *fliers)))
    names = Names(axes.xaxis if is_upright else axes.yaxis)
    return field(1, names.of(float(at))) + field(3, b''.join(parts))


def name(label):
    return field(1, name_text(label))


def name_text(label):
    """Labels that matplotlib makes itself begin with an underscore."""
    label = str(label)
    return '' if label.startswith('_') else label


class Points:
    left = MAX_POINTS

    def count(self, number=1):
        self.left -= number
        if self.left < 0:
            raise TooMuch


class Axis:
    """How numbers on an axis are to be read."""

    def __init__(self, axis, scale):
        self.scale = scale
        self.names = categories(axis)
        self.is_date = 'Date' in type(converter(axis)).__name__
        if self.names:
            self.scale = 'categorical'
        elif self.is_date:
            self.scale = 'datetime'

    def encode(self, value):
        if self.names and value in self.names:
            return field(2, self.names[value])
        if self.is_date and value == value:
            return field(2, date(value))
        return number_field(1, value)


class Names:
    """What bars are called, by where they stand."""

    def __init__(self, axis):
        self.axis = Axis(axis, '')
        # Ticks that were named by hand; those that matplotlib chose are numbers.
        self.ticks = {}
        formatter = type(axis.get_major_formatter()).__name__
        if formatter in ('FixedFormatter', 'FuncFormatter', 'StrCategoryFormatter'):
            for at, tick in zip(axis.get_ticklocs(), axis.get_ticklabels()):
                self.ticks[round(float(at), 6)] = tick.get_text()

    def of(self, value):
        # Bars that stand side by side share a name in the middle.
        near = min(self.ticks, key=lambda at: abs(at - value), default=None)
        if near is not None and abs(near - value) <= 0.5 and self.ticks[near]:
            return self.ticks[near]
        if self.axis.is_date:
            return date(value)
        return '%.10g' % value


def converter(axis):
    get = getattr(axis, 'get_converter', None)
    return get() if get else getattr(axis, 'converter', None)


def categories(axis):
    mapping = getattr(axis.units, '_mapping', None)
    return {at: str(text) for text, at in mapping.items()} if mapping else {}


def date(value):
    dates = sys.modules['matplotlib.dates']
    return dates.num2date(value).isoformat().replace('+00:00', 'Z')
