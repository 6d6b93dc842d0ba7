"""Statements of a forward that change what is there: in place, or by an assignment."""

from support.grammar import Writer
from support.statements import part

# --- writing in place ----------------------------------------------------------------------------


def write_value(w: Writer) -> None:
    a = w.pick()
    b = w.pick(like=a)
    if (a.kind, a.size) != (b.kind, b.size):
        b = a
    form = w.choose(
        *("{a}.mul_(0.9)", "{a}.add_({b})", "{a} += {b}", "{a} *= 1.1", "{a}.clamp_(max=1.5)"),
        *("{a}.data.mul_(0.9)", "{a}.detach().mul_(0.9)", "{a}.copy_({b} * 0.5)", "F.relu_({a})"),
        *("{a}[:, :1].mul_(0.5)", "{a}[:, :2] += 0.5", "{a}[:, 0] = 0.25", "{a} -= 0.1 * {b}"),
        *(
            "{a}.flatten(1).mul_(0.9)",
            "{a}.view(3, -1).add_(0.1)",
            "{a}.zero_()",
            "{a}.sub_({b}, alpha=0.5)",
        ),
    )
    w.emit(form.format(a=a.name, b=b.name))


def write_part(w: Writer) -> None:
    if not w.parts:
        return part(w)
    owner, name = w.choose(*w.parts)
    other = w.pick("map", like=owner)
    form = w.choose("{}.mul_(0.5)", "{}.add_({}[:, 2:])", "{} += {}[:, :2]", "{}.copy_({}[:, 1:3])")
    if other.size != owner.size:
        form = "{}.mul_(0.5)"
    w.emit(form.format(name, other.name))


def write_around(w: Writer) -> None:
    """A layer reads a value whose memory is then changed, by its name or a view made before."""
    value = w.pick("map")
    view = w.choose("[:, :2]", ".flatten(2)[:, 1:3]", ".view_as({0})[:, 1:3]", ".detach()[:, :2]")
    name, call = w.fresh("part"), w.module("nn.Conv2d(4, 4, 3, padding=1)")
    w.emit(f"{name} = {value.name}{view.format(value.name)}")
    read = w.choose("torch.tanh({})", "{}.sigmoid()", "({} * 1.0)", "{}.clone()")
    result = w.make(f"{call}({read.format(value.name)})", value)
    size = "" if ".flatten" not in view else ".flatten(2)"
    w.emit(
        w.choose(
            f"{name}.add_({result.name}[:, :2]{size})",
            f"{value.name}.add_({result.name})",
            f"{name}.mul_(0.5)",
            f"{name}.copy_({result.name}.sigmoid()[:, 2:]{size})",
            f"F.relu({result.name}, inplace=True)",
            f"F.dropout({result.name}, 0.3, self.training, inplace=True)",
        )
    )
    w.parts.append((value, name)) if not size else None


# --- assignments ---------------------------------------------------------------------------------


def keep(w: Writer) -> None:
    """An attribute of the module set in the forward, and perhaps read again."""
    value = w.pick()
    name = w.attribute("kept")
    form = w.choose("{}.mean()", "{}", "{}.detach()", "{}.square().sum()")
    w.emit(f"self.{name} = {form.format(value.name)}")
    if w.rarely(3):
        w.make(f"{value.name} + 0.1 * self.{name}", value)


def buffer(w: Writer) -> None:
    value = w.pick("map")
    name = w.buffer("torch.zeros(4)")
    mean = f"{value.name}.detach().mean((0, 2, 3))"
    w.emit(
        w.choose(
            *("{0}.mul_(0.9).add_({1})", "{0}.copy_({1})", "{0} = 0.9 * {0} + {1}", "{0} += {1}"),
            "{0}.data = {1}",
            "{0}.lerp_({1}, 0.1)",
        ).format(name, mean)
    )
    if w.rarely(2):
        w.make(f"{value.name} - {name}[:, None, None]", value)


def counter(w: Writer) -> None:
    name = w.buffer("torch.zeros((), dtype=torch.long)")
    w.emit(w.choose("{0} += 1", "{0}.add_(1)", "{0} = {0} + 1").format(name))


def weight_write(w: Writer) -> None:
    """A weight changed by the forward that uses it, as masks do."""
    call = w.choose(*w.convs)
    w.emit(
        w.choose(
            "{}.weight.data.mul_(0.9)", "{}.weight.data *= 0.9", "{}.weight.data.clamp_(-1, 1)"
        ).format(call)
    )


def cache(w: Writer) -> None:
    """A table that the first forward makes."""
    value, name = w.pick("map"), w.fresh("table")
    w.init.append(f"self.{name} = None")
    with w.indented(f"if self.{name} is None:"):
        w.emit(f"self.{name} = torch.linspace(-1, 1, {value.size}, dtype=torch.float64)")
    w.make(f"{value.name} + self.{name}", value)
