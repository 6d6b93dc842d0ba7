"""Programs of all statements; contexts, and what else a forward holds."""

from hypothesis import strategies as st

from support.grammar import Program, Statement, Writer, write
from support.statements import (
    activation,
    activation_module,
    again,
    attention,
    broadcast,
    conv,
    drop,
    freeze,
    functional_layer,
    functional_norm,
    linear,
    merge,
    norm,
    part,
    pool,
    resize,
    stack,
    tied,
    token_norm,
    tokens,
    view,
)
from support.writes import (
    buffer,
    cache,
    counter,
    keep,
    weight_write,
    write_around,
    write_part,
    write_value,
)

# --- contexts and constants ----------------------------------------------------------------------


def no_grad(w: Writer) -> None:
    inner = w.choose(conv, activation, merge, view, norm, write_value, write_part)
    with w.indented(w.choose("with torch.no_grad():", "with torch.set_grad_enabled(False):")):
        inner(w)


def branch(w: Writer) -> None:
    """Control flow on a shape, which only export can follow."""
    value = w.pick()
    with w.indented(f"if {value.name}.shape[1] > 2:"):
        w.choose(conv, activation, merge, view)(w)


def constant(w: Writer) -> None:
    value = w.pick()
    scale = w.choose("np.float64(0.5)", "np.float32(2)", "math.sqrt(0.5)", "float('inf')", "1e-3")
    w.make(f"({value.name} * 0.5).clamp(max={scale})", value)


def draw_noise(w: Writer) -> None:
    value = w.pick()
    w.make(f"{value.name} + 0.1 * torch.randn_like({value.name})", value)


LAYERS: tuple[Statement, ...] = (conv, conv, conv, resize, linear, linear, functional_layer)
LAYERS += (again, stack, stack, attention, broadcast)
PLAIN: tuple[Statement, ...] = (norm, norm, token_norm, functional_norm, activation, activation)
PLAIN += (activation_module, drop, merge, merge, merge, tokens, pool, constant, draw_noise)
HARD: tuple[Statement, ...] = (view, view, part, write_value, write_value, write_part, no_grad)
HARD += (write_around, write_around)
RARE: tuple[Statement, ...] = (tied, freeze, keep, buffer, counter, weight_write, cache, branch)
EVERY = LAYERS * 2 + PLAIN + HARD * 3 + RARE


@st.composite
def programs(draw: st.DrawFn, most: int = 10) -> Program:
    """A program; a third of them hold only what every model has, so that plans get their turn."""
    plain = draw(st.integers(0, 2)) == 0
    return write(draw, LAYERS * 2 + PLAIN if plain else EVERY, most)
