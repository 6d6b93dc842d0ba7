"""What a forward of `support.grammar` is made of: one function per kind of statement."""

from hypothesis import strategies as st

from support.grammar import Program, Statement, Writer, write

# --- layers --------------------------------------------------------------------------------------


def conv(w: Writer) -> None:
    options = w.choose(
        *("3, padding=1", "1", "3, padding=1, groups=4", "3, padding=1, bias=False"),
        *("3, padding='same'", "3, padding=1, padding_mode='circular'", "3, padding=2, dilation=2"),
    )
    call = w.module(f"nn.Conv2d(4, 4, {options})")
    w.convs.append(call)
    value = w.pick("map")
    w.make(f"{call}({value.name})", value)


def resize(w: Writer) -> None:
    value = w.pick("map")
    if value.size == 6:
        layer = w.choose(
            "nn.Conv2d(4, 4, 3, stride=2, padding=1)", "nn.MaxPool2d(2)", "nn.AvgPool2d(2)"
        )
    else:
        layer = w.choose("nn.ConvTranspose2d(4, 4, 2, stride=2)", "nn.Upsample(scale_factor=2)")
    w.make(f"{w.module(layer)}({value.name})", value, size=9 - value.size)


def linear(w: Writer) -> None:
    value = w.pick("tokens", "flat")
    if value.kind == "map":
        value = w.make(f"{value.name}.mean((2, 3))", value, "flat", 1)
    if w.linears and w.rarely(4):
        call = w.choose(*w.linears)
    else:
        call = w.module(f"nn.Linear(4, 4, bias={w.choose(True, False)})")
        w.linears.append(call)
    w.make(f"{call}({value.name})", value)


def functional_layer(w: Writer) -> None:
    value = w.pick()
    if value.kind == "map":
        k = w.choose(1, 3)
        weight = w.parameter(4, 4, k, k)
        if w.rarely(6):
            weight = f"{w.module('Centre()')}({weight})"
        bias = w.choose("None", "None", w.parameter(4))
        w.make(f"F.conv2d({value.name}, {weight}, {bias}, padding={k // 2})", value)
    else:
        w.make(f"F.linear({value.name}, {w.parameter(4, 4)})", value)


def again(w: Writer) -> None:
    """A module called a second time, by its own name or another."""
    value, call = w.pick("map"), w.choose(*w.convs)
    if w.rarely(3):
        name = w.attribute("other")
        w.init.append(f"self.{name} = {call}")
        call = f"self.{name}"
    w.make(f"{call}({value.name})", value)


def tied(w: Writer) -> None:
    value, owner = w.pick("map"), w.convs[0]
    name = w.attribute("tied")
    w.init.append(f"self.{name} = nn.Conv2d(4, 4, 3, padding=1)")
    w.init.append(f"self.{name}.weight = {owner}.weight")
    w.make(f"self.{name}({value.name})", value)


def stack(w: Writer) -> None:
    """Several modules in a container, called as one or in a loop."""
    value = w.pick("map")
    act = w.choose("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Tanh()", "nn.Dropout2d(0.3)")
    layers = f"nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), {act}"
    if w.rarely(2):
        call = w.module(w.choose(f"nn.Sequential({layers})", f"Residual(nn.Sequential({layers}))"))
        w.make(f"{call}({value.name})", value)
        return
    name = w.attribute("stack")
    w.init.append(f"self.{name} = nn.ModuleList([{layers}, nn.Conv2d(4, 4, 1)])")
    result = w.make(value.name, value)
    with w.indented(f"for one in self.{name}:"):
        w.emit(f"{result.name} = one({result.name})")


def attention(w: Writer) -> None:
    value = w.pick("tokens")
    if value.kind == "map":
        return tokens(w)
    call = w.module("nn.MultiheadAttention(4, 2, batch_first=True)")
    n = value.name
    w.make(f"{call}({n}, {n}, {n}, need_weights={w.choose(True, False)})[0]", value)


def freeze(w: Writer) -> None:
    w.init.append(f"{w.choose(*w.convs, *w.linears)}.weight.requires_grad_(False)")


# --- norms, activations, drops -------------------------------------------------------------------


def norm(w: Writer) -> None:
    value = w.pick("map")
    layer = w.choose(
        *("nn.BatchNorm2d(4)", "nn.BatchNorm2d(4)", "nn.BatchNorm2d(4, affine=False)"),
        *("nn.BatchNorm2d(4, momentum=None)", "nn.BatchNorm2d(4, track_running_stats=False)"),
        *("nn.InstanceNorm2d(4)", "nn.InstanceNorm2d(4, affine=True, track_running_stats=True)"),
        *("nn.GroupNorm(2, 4)", "NormRelu(4)"),
    )
    w.make(f"{w.module(layer)}({value.name})", value)


def token_norm(w: Writer) -> None:
    value = w.pick("tokens", "flat")
    if value.kind == "map":
        return norm(w)
    form = w.choose(f"{w.module('nn.LayerNorm(4)')}({{}})", "F.layer_norm({}, (4,))")
    w.make(form.format(value.name), value)


def functional_norm(w: Writer) -> None:
    value = w.pick("map")
    mean, var = w.buffer("torch.zeros(4)"), w.buffer("torch.ones(4)")
    form = w.choose(
        "F.batch_norm({}, {}, {}, training=self.training)",
        "F.batch_norm({}, {}, {}, None, None, self.training, 0.2)",
        "F.batch_norm({}, None, None, training=True)",
        "F.instance_norm({}, {}, {}, use_input_stats=self.training)",
        "F.instance_norm({})",
        "F.group_norm({}, 2)",
    )
    w.make(form.format(value.name, mean, var), value)


def activation(w: Writer) -> None:
    value = w.pick()
    form = w.choose(
        *("F.relu({})", "torch.relu({})", "torch.tanh({})", "F.relu({}, inplace=True)"),
        *("F.leaky_relu({}, 0.1, inplace=True)", "{}.sigmoid()", "torch.relu_({})", "F.gelu({})"),
        *("F.silu({}, inplace=True)", "{}.clamp(min=-1)", "{} * torch.sigmoid({})"),
    )
    w.make(form.replace("{}", value.name), value)


def activation_module(w: Writer) -> None:
    value = w.pick()
    layer = w.choose("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Hardtanh(inplace=True)", "nn.ELU()")
    w.make(f"{w.module(layer)}({value.name})", value)


def drop(w: Writer) -> None:
    value = w.pick()
    form = w.choose(
        *(
            "F.dropout({}, 0.3, self.training)",
            "F.dropout({}, training=False)",
            "F.dropout({}, 0.2)",
        ),
        *(f"{w.module('nn.Dropout(0.3)')}({{}})", f"{w.module('nn.Dropout(0.0)')}({{}})"),
        *("F.dropout({}, 0.3, self.training, inplace=True)", "F.dropout({}, 0.0, self.training)"),
    )
    w.make(form.format(value.name), value)


# --- merges and views ----------------------------------------------------------------------------


def merge(w: Writer) -> None:
    a = w.pick()
    b = w.pick(like=a)
    if (a.kind, a.size) != (b.kind, b.size):
        return
    if a.kind == "map" and w.rarely(4):
        call = w.module("nn.Conv2d(8, 4, 1)")
        w.make(f"{call}(torch.cat([{a.name}, {b.name}], 1))", a)
        return
    form = w.choose("{} + {}", "{} + {}", "torch.add({}, {})", "{} * {}.sigmoid()", "{} - 0.5 * {}")
    w.make(form.format(a.name, b.name), a)


def broadcast(w: Writer) -> None:
    """A squeeze over all positions, added to or multiplied with the map."""
    value = w.pick("map")
    call = w.module("nn.Conv2d(4, 4, 1)")
    form = w.choose(
        "{} + {}({}.mean((2, 3), keepdim=True))", "{} * {}(F.adaptive_avg_pool2d({}, 1))"
    )
    w.make(form.format(value.name, call, value.name), value)


def view(w: Writer) -> None:
    """Another name for a value's memory, of the same shape."""
    value = w.pick()
    form = w.choose(
        *("{}.view_as({})", "{}.contiguous()", "{}.to({}.dtype)", "{}[:]", "{}.reshape({}.shape)"),
        *("{}.unsqueeze(0).squeeze(0)", "{}.transpose(-1, -2).transpose(-2, -1)", "{}.data"),
        *("{}.detach()", "{}.view({}.size())", "{}.narrow(1, 0, {}.shape[1])", "{}.clone()"),
        *("{}.unflatten(0, (-1, 1)).flatten(0, 1)", "{}.chunk(1, 1)[0]", "{}.expand_as({})"),
        f"{w.module('nn.Identity()')}({{}})",
    )
    w.make(form.replace("{}", value.name), value)


def tokens(w: Writer) -> None:
    value = w.pick("map", "tokens")
    if value.kind == "map":
        w.make(f"{value.name}.flatten(2).transpose(1, 2)", value, "tokens", value.size)
    else:
        n, s = value.name, value.size
        form = w.choose("{}.transpose(1, 2).reshape(-1, 4, {}, {})", "{}.mT.unflatten(2, ({}, {}))")
        w.make(form.format(n, s, s), value, "map", s)


def pool(w: Writer) -> None:
    value = w.pick("map")
    w.make(
        w.choose("{}.mean((2, 3))", "{}.amax((2, 3))", "{}[:, :, 1, 1]").format(value.name),
        value,
        "flat",
        1,
    )


def part(w: Writer) -> None:
    """A view of some of a value, to be written through later."""
    value = w.pick("map")
    form = w.choose("{}[:, :2]", "{}.chunk(2, 1)[0]", "{}.narrow(1, 1, 2)", "{}.split(2, dim=1)[1]")
    name = w.fresh("part")
    w.emit(f"{name} = {form.format(value.name)}")
    w.parts.append((value, name))


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
