"""How pictures look. They are drawn without pyplot, whose backend and open figures are the user's."""

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter

styled = rc_context(  # a decorator for functions that draw
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "text.parse_math": False,  # a $ in a label is a dollar sign
        "text.usetex": False,
    }
)


def number_plainly(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, at 1, 2 and 5 only, so that they do not crowd."""
    plain = FuncFormatter(lambda value, position: f"{value:g}" if f"{value:e}"[0] in "125" else "")
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(plain)
